/* One case of golden.h5 (see make_golden.py; make_decoder.py, make_mixture.py): a configuration, parameters
 * by name, and what PyTorch computes.
 */
#ifndef GOLDEN_CASE_H
#define GOLDEN_CASE_H

#include <stdint.h>

enum { GOLDEN_NAME = 96 };

/* In the order of SCALARS in make_golden.py. */
typedef struct golden_scalars {
  double loss, contrastive, importance, load, z, local, global, scale, norm, clip, rate, loss_after;
} golden_scalars;

typedef struct golden_case {
  char *config;     /* YAML */
  int64_t consumed; /* samples of the first epoch before the batch */
  double balance;   /* weighted balance loss; 0 in a file that has none */
  golden_scalars scalar;
  int64_t parameters;                     /* N */
  char (*name)[GOLDEN_NAME];              /* [N] */
  int64_t *size, *first;                  /* [N] numbers of each, and where they begin */
  float *value;                           /* initial parameters, one after another */
  double *gradient, *update, *update_two; /* of the loss before clipping; added by one step, by two */
  double *pair;                           /* [pairs] */
  double *sums;                           /* as train_moe_sums.value */
  int64_t *counts;                        /* as train_moe_sums.count */
  double *embedding;                      /* [M, B, Z] of an evaluation */
  int64_t pair_count, sum_count, count_count, embedding_count;
} golden_case;

/* Reads everything; a test fails if it cannot. Free with golden_free. */
golden_case *golden_read(const char *path, const char *name);
void golden_free(golden_case *golden);
/* Number of the parameter, -1 if there is none. */
int64_t golden_find(const golden_case *golden, const char *name);

#endif
