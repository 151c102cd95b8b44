/* Bias of a linear layer: added to rows in place; its gradient is the sum over rows. */
#include <string.h> /* memset */

#include "active_impl.h" /* kern_at, kern_to */

typedef struct bias_job {
  core_dtype dtype; /* of x and dy */
  int64_t c;
  const core_real *bias;
  void *x;        /* [T, C] */
  const void *dy; /* [T, C] */
  core_real *sum; /* [C] */
} bias_job;

KERN_INLINE void bias_add(const bias_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real *restrict bias = job->bias;
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    void *restrict x = kern_element(job->x, dtype, t * c);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) kern_to(x, dtype, i, KERN_ADD, bias[i]);
  }
}
KERN_ACTIVE_RUN(bias_add, bias_job)

/* Four rows at a time: one pass over the sums instead of four. */
KERN_INLINE void bias_sum(const bias_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  core_real *restrict sum = job->sum;
  const int64_t c = job->c;
  int64_t t = begin;
  for (; t + 4 <= end; t += 4) {
    const void *restrict d = kern_element(job->dy, dtype, t * c);
#pragma omp simd
    for (int64_t i = 0; i < c; i++)
      sum[i] += (kern_at(d, dtype, i) + kern_at(d, dtype, c + i)) +
                (kern_at(d, dtype, 2 * c + i) + kern_at(d, dtype, 3 * c + i));
  }
  for (; t < end; t++) {
    const void *restrict d = kern_element(job->dy, dtype, t * c);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) sum[i] += kern_at(d, dtype, i);
  }
}
KERN_ACTIVE_RUN(bias_sum, bias_job)

core_status kern_bias_fwd_cpu(kern_context *context, core_tensor bias, core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const bias_job job = {.dtype = x.dtype, .c = x.shape[1], .bias = bias.data, .x = x.data};
  KERN_CHECK_REAL(bias, job.c);
  const kern_split split = kern_split_rows(x.shape[0], job.c);
  KERN_FOR_BLOCKS(context, split, block) {
    bias_add_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_bias_bwd_cpu(kern_context *context, core_tensor dy, core_tensor dbias) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  const int64_t rows = dy.shape[0], c = dy.shape[1];
  KERN_CHECK_REAL(dbias, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const bias_job job = {.dtype = dy.dtype, .c = c, .dy = dy.data, .sum = context->partial + block * c};
    memset(job.sum, 0, (size_t)c * sizeof *job.sum);
    bias_sum_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  kern_partial_add_priv(context->partial, split.count, c, c, dbias.data);
  return CORE_OK;
}
