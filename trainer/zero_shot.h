/* Zero-shot classification (Radford et al. 2021, section 3.1): a class is the L2-normalised mean of the
 * vectors of its prompts, and an item is of the class whose vector has the largest product with its own. Ties
 * with other classes count against it, as in retrieval. Labels tell the class, of prompts and of items. */
#ifndef TRAIN_ZERO_SHOT_H
#define TRAIN_ZERO_SHOT_H

#include <stdio.h>

#include "trainer/session.h"

enum { TRAIN_TOPS = 2 }; /* top-1, top-5 */

typedef struct train_zero_shot {
  int64_t prompts, classes;
  int64_t items;      /* that were classified */
  int64_t unlabelled; /* items left out: without a label (label -1) */
  int64_t absent;     /* items left out: without rows */
  int64_t hits[TRAIN_TOPS];
  double seconds;
} train_zero_shot;

/* session->part[0] are the items, part[1] the prompts. A connector needs the direction from the items'
 * modality toward the prompts'. Errors: ERR_FORMAT for a prompt without label, a class whose prompts are all
 * empty, items of which none has a label; ERR_MISMATCH for an item of a class without prompt, or a direction
 * that is not there; ERR_STOPPED. Collective over the world. */
CORE_NODISCARD core_status train_zero_shot_run(train_session *session, train_zero_shot *out);
/* Share of hits among n, and its 95 % interval (Wilson 1927). 0 and [0, 1] for n = 0. */
double train_zero_shot_share(int64_t hits, int64_t n, double interval[2]);
/* names: of the items' and of the prompts' modality. */
void train_zero_shot_print(const train_zero_shot *result, const char *const names[2], FILE *out);
/* The members of a JSON object, without braces. */
void train_zero_shot_json(const train_zero_shot *result, const char *const names[2], FILE *out);

#endif
