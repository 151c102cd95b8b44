/* Small latent sets made on the spot, for tests of the trainer. */
#ifndef TEST_SET_H
#define TEST_SET_H

#include "data/data.h"

/* Rows that sample `sample` has of modality `m`; 0: it lacks it. */
typedef int64_t (*test_rows)(int64_t sample, int32_t m);

typedef struct test_set_options {
  const char *directory; /* of the split, made if missing */
  int32_t modalities;    /* named image, text, speech */
  int64_t width[3];
  int64_t samples, shards;
  uint64_t first_id;
  bool labels; /* samples 3 k, 3 k + 1 share a label */
  test_rows rows;
} test_set_options;

extern const char *const test_modality_names[3];
CORE_NODISCARD core_status test_set_write(const test_set_options *options);
/* Removes a directory and all in it. */
void test_remove_tree(const char *path);

#endif
