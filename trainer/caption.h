/* A decoder on a held-out split: the mean loss of its response tokens, noise off. */
#ifndef TRAIN_CAPTION_H
#define TRAIN_CAPTION_H

#include "trainer/session.h"

typedef struct train_caption {
  int64_t samples, predictions;
  double loss; /* mean over the predictions, natural log */
  double seconds;
} train_caption;

/* Evaluates session->evaluation. ERR_STOPPED when a stop was requested (agreed). The router's sums of the
 * split are left in the model, summed over the ranks. Collective over the world. */
CORE_NODISCARD core_status train_caption_run(train_session *session, train_caption *out);

#endif
