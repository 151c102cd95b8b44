/* Weighted un-permutation by an inverse map: every output row is written by one thread, so there are no
 * atomics and the sum over k has one order. */
#include "active_impl.h" /* kern_at, kern_to */

enum { CHUNK = 2048 }; /* columns whose sums stay in the first cache over the slots of a row */

typedef struct combine_job {
  core_dtype dtype;        /* of x, y, dy and dx */
  kern_write write;        /* of y */
  const int32_t *slot;     /* [T,K] */
  const core_real *weight; /* [T,K] or NULL */
  int64_t k, c;
  const void *x, *dy;
  void *to;           /* y or dx */
  core_real *dweight; /* [T,K] or NULL */
} combine_job;

KERN_INLINE core_real combine_weight(const combine_job *job, int64_t at) {
  return job->weight != NULL ? job->weight[at] : 1;
}

/* The last slot of row t that is set, or -1. */
KERN_INLINE int64_t combine_last(const combine_job *job, int64_t t) {
  int64_t at = (t + 1) * job->k - 1;
  while (at >= t * job->k && job->slot[at] < 0) at--;
  return at >= t * job->k ? at : -1;
}

/* Asks for the rows of the next token: they lie anywhere, so the hardware sees no stream. */
KERN_INLINE void combine_prefetch(const combine_job *job, core_dtype dtype, int64_t t) {
  for (int64_t at = t * job->k; at < (t + 1) * job->k; at++)
    if (job->slot[at] >= 0) kern_prefetch(kern_element(job->x, dtype, job->slot[at] * job->c), dtype, job->c);
}

/* y (+)= weight * x + sum, sum or NULL. */
KERN_INLINE void combine_add(void *restrict y, core_dtype dtype, kern_write write, core_real weight,
                             const void *restrict x, const core_real *restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const core_real value = weight * kern_at(x, dtype, i);
    kern_to(y, dtype, i, write, sum != NULL ? sum[i] + value : value);
  }
}

/* The slots before the last go into a sum, chunk by chunk, the last one straight to y. */
KERN_INLINE void combine_row(const combine_job *job, core_dtype dtype, kern_write write, int64_t t,
                             int64_t last) {
  core_real sum[CHUNK];
  for (int64_t from = 0; from < job->c; from += CHUNK) {
    const int64_t n = job->c - from < CHUNK ? job->c - from : CHUNK;
    int64_t before = 0;
    for (int64_t at = t * job->k; at < last; at++) {
      if (job->slot[at] < 0) continue;
      const void *x = kern_element(job->x, dtype, job->slot[at] * job->c + from);
      const core_real weight = combine_weight(job, at);
      if (before++ == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sum[i] = weight * kern_at(x, dtype, i);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sum[i] += weight * kern_at(x, dtype, i);
      }
    }
    const void *x = kern_element(job->x, dtype, job->slot[last] * job->c + from);
    void *y = kern_element(job->to, dtype, t * job->c + from);
    if (before > 0)
      combine_add(y, dtype, write, combine_weight(job, last), x, sum, n);
    else
      combine_add(y, dtype, write, combine_weight(job, last), x, NULL, n);
  }
}

KERN_INLINE void combine_rows(const combine_job *job, core_dtype dtype, kern_write write, int64_t begin,
                              int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    const int64_t last = combine_last(job, t);
    if (t + 1 < end) combine_prefetch(job, dtype, t + 1);
    if (last < 0 && write == KERN_SET && job->c > 0)
      memset(kern_element(job->to, dtype, t * job->c), 0, (size_t)job->c * core_dtype_size(dtype));
    if (last >= 0) combine_row(job, dtype, write, t, last);
  }
}
KERN_ACTIVE_WRITE_RUN(combine_rows, combine_job)

/* dx may be x itself: within a slot the product is read before the gradient is written. */
KERN_INLINE void combine_rows_back(const combine_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const int64_t c = job->c;
  for (int64_t at = begin * job->k; at < end * job->k; at++) {
    const int64_t slot = job->slot[at];
    core_real dot = 0;
    if (slot >= 0) {
      const void *dy = kern_element(job->dy, dtype, at / job->k * c);
      const void *x = kern_element(job->x, dtype, slot * c);
      void *dx = kern_element(job->to, dtype, slot * c);
      const core_real weight = combine_weight(job, at);
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < c; i++) {
        const core_real d = kern_at(dy, dtype, i);
        dot += d * kern_at(x, dtype, i);
        kern_to(dx, dtype, i, KERN_SET, weight * d);
      }
    }
    if (job->dweight != NULL) job->dweight[at] = dot;
  }
}
KERN_ACTIVE_RUN(combine_rows_back, combine_job)

core_status kern_combine_fwd_cpu(kern_context *context, core_tensor x, core_tensor slot, core_tensor weight,
                                 kern_write write, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = slot.shape[0], k = slot.shape[1];
  if (weight.data != NULL) KERN_CHECK_REAL(weight, rows, k);
  KERN_CHECK(y, x.dtype, rows, c);
  KERN_CHECK_INDEX(slot, -1, x.shape[0]);
  const combine_job job = {.dtype = x.dtype,
                           .write = write,
                           .slot = slot.data,
                           .weight = weight.data,
                           .k = k,
                           .c = c,
                           .x = x.data,
                           .to = y.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    combine_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_combine_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor slot,
                                 core_tensor weight, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = slot.shape[0], k = slot.shape[1];
  KERN_CHECK(dy, x.dtype, rows, c);
  if (weight.data != NULL) KERN_CHECK_REAL(weight, rows, k);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, rows, k);
  KERN_CHECK_INDEX(slot, -1, x.shape[0]);
  const combine_job job = {.dtype = x.dtype,
                           .slot = slot.data,
                           .weight = weight.data,
                           .k = k,
                           .c = c,
                           .x = x.data,
                           .dy = dy.data,
                           .to = dx.data,
                           .dweight = dweight.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    combine_rows_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
