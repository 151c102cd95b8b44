/* Retrieval on a held-out split: embeds every sample with noise off and no drops, and ranks every modality's
 * items against every other's. METHODS section 0: a hit is any gallery item of equal label (equal id where
 * unlabelled) in the top k; ties with other items count against it. */
#ifndef TRAIN_RETRIEVAL_H
#define TRAIN_RETRIEVAL_H

#include <stdio.h>

#include "trainer/session.h"

enum { TRAIN_RECALLS = 3 }; /* R@1, R@5, R@10 */

typedef struct train_retrieval {
  int64_t samples;
  int64_t queries[CORE_MAX_MODALITIES][CORE_MAX_MODALITIES]; /* of modality a that have a positive in b */
  int64_t gallery[CORE_MAX_MODALITIES];
  int64_t hits[CORE_MAX_MODALITIES][CORE_MAX_MODALITIES][TRAIN_RECALLS];
  double chance[CORE_MAX_MODALITIES][CORE_MAX_MODALITIES]
               [TRAIN_RECALLS]; /* expected recall of a random ranking */
  double seconds;
} train_retrieval;

/* Evaluates session->evaluation. ERR_STOPPED when a stop was requested (agreed). The router's sums of the
 * split are left in the model. Collective over the world. */
CORE_NODISCARD core_status train_retrieval_run(train_session *session, train_retrieval *out);
double train_retrieval_recall(const train_retrieval *result, int32_t a, int32_t b, int32_t k);
/* Mean of R@1 over all directions that have queries. */
double train_retrieval_mean(const train_retrieval *result);
/* A table: direction, queries, gallery, R@1/5/10, chance. */
void train_retrieval_print(const train_retrieval *result, const train_settings *settings, FILE *out);

#endif
