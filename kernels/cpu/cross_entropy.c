/* Cross entropy of rows of logits against one target each, a part of the columns at a time; -1 counts
 * nothing. */
#include "active_impl.h"  /* kern_to */
#include "vecmath_impl.h" /* kern_exp, kern_row_max */

typedef struct entropy_job {
  core_dtype dtype; /* of dlogits */
  int64_t n, first;
  const core_real *logits;
  const int32_t *target;
  const core_real *lse;
  core_real weight;
  void *dlogits;
} entropy_job;

/* What the columns before have given is one more term. */
KERN_CLONES static core_real row_lse(const core_real *restrict x, core_real before, int64_t n) {
  core_real most = kern_row_max(x, n);
  if (before > most) most = before;
  const core_real base = most > -INFINITY ? most : 0;
  core_real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += kern_exp(x[i] - base);
  return base + core_real_log(sum + (before > -INFINITY ? kern_exp(before - base) : 0));
}

core_status kern_cross_entropy_fwd_cpu(kern_context *context, core_tensor logits, int64_t first, int64_t all,
                                       core_tensor target, core_tensor lse, core_tensor positive) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK(target, CORE_INT32, rows);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK_REAL(positive, rows);
  TRY(kern_check_columns_priv(__func__, first, n, all));
  KERN_CHECK_INDEX(target, -1, all);
  const core_real *x = logits.data;
  const int32_t *at = target.data;
  core_real *to_lse = lse.data, *to_positive = positive.data;
  const kern_split split = kern_split_rows(n > 0 ? rows : 0, n);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++) {
      to_lse[t] = row_lse(x + t * n, to_lse[t], n);
      if (at[t] >= first && at[t] < first + n) to_positive[t] = x[t * n + at[t] - first];
    }
  }
  return CORE_OK;
}

/* In place where dlogits are the logits: an element is read before it is written. */
KERN_INLINE void entropy_back(const entropy_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const int64_t n = job->n;
  for (int64_t t = begin; t < end; t++) {
    const core_real *x = job->logits + t * n, lse = job->lse[t];
    const core_real weight = job->target[t] < 0 ? 0 : job->weight;
    void *dx = kern_element(job->dlogits, dtype, t * n);
    const int64_t own = job->target[t] - job->first;
    const core_real hit = own >= 0 && own < n ? weight * (kern_exp(x[own] - lse) - 1) : 0;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      kern_to(dx, dtype, i, KERN_SET, weight != 0 ? weight * kern_exp(x[i] - lse) : 0);
    if (job->target[t] >= 0 && own >= 0 && own < n) kern_to(dx, dtype, own, KERN_SET, hit);
  }
}
KERN_ACTIVE_RUN(entropy_back, entropy_job)

core_status kern_cross_entropy_bwd_cpu(kern_context *context, double weight, core_tensor lse, int64_t first,
                                       int64_t all, core_tensor target, core_tensor logits,
                                       core_tensor dlogits) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK_ACTIVE(dlogits, rows, n);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK(target, CORE_INT32, rows);
  TRY(kern_check_columns_priv(__func__, first, n, all));
  KERN_CHECK_INDEX(target, -1, all);
  const entropy_job job = {.dtype = dlogits.dtype,
                           .n = n,
                           .first = first,
                           .logits = logits.data,
                           .target = target.data,
                           .lse = lse.data,
                           .weight = (core_real)weight,
                           .dlogits = dlogits.data};
  const kern_split split = kern_split_rows(n > 0 ? rows : 0, n);
  KERN_FOR_BLOCKS(context, split, block) {
    entropy_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
