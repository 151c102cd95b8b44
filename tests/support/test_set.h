/* Small latent sets made on the spot, for tests of the trainer. */
#ifndef TEST_SET_H
#define TEST_SET_H

#include "comm/comm.h"
#include "data/data.h"

/* Rows that sample `sample` has of modality `m`; 0: it lacks it. */
typedef int64_t (*test_rows)(int64_t sample, int32_t m);

typedef struct test_set_options {
  const char *directory; /* of the split, made if missing */
  int32_t modalities;    /* named image, text, speech */
  int64_t width[3];
  int64_t samples, shards;
  uint64_t first_id;
  bool labels;        /* samples 3 k, 3 k + 1 share a label */
  int32_t vocabulary; /* the first modality's shards carry prompts and responses of such tokens; 0: none */
  test_rows rows;
} test_set_options;

enum { TEST_MOST_TOKENS = 16 };
/* The prompt and response of sample s, as made by test_set_write: prompts of none to five tokens, of which
 * every third marks the place of the second modality, every fifth also that of the first; responses of 1
 * to 7.
 */
int64_t test_set_prompt(int64_t s, int32_t vocabulary, int32_t modalities, int32_t token[TEST_MOST_TOKENS]);
int64_t test_set_target(int64_t s, int32_t vocabulary, int32_t token[TEST_MOST_TOKENS]);

extern const char *const test_modality_names[3];
CORE_NODISCARD core_status test_set_write(const test_set_options *options);
/* A set for all ranks of a job, written by rank 0 as the split `train` of a new directory, whose name every
 * rank gets. root: a template as of mkdtemp in a buffer of `capacity` bytes, equal on all ranks;
 * options->directory is not read. Errors are agreed. Collective. */
CORE_NODISCARD core_status test_set_share(comm_world *job, const test_set_options *options, char *root,
                                          size_t capacity);
/* Removes a directory and all in it. */
void test_remove_tree(const char *path);

#endif
