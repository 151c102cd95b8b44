/* Weighted un-permutation by an inverse map: every output row is written by one thread, so there are no
 * atomics and the sum over k has one order. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_put */

typedef struct combine_rows {
  const int32_t *slot;     /* [T,K] */
  const core_real *weight; /* [T,K] or NULL */
  int64_t k, c;
} combine_rows;

/* y (+)= weight * row; the first slot of a row that is set overwrites. */
KERN_INLINE void combine_add(core_real *restrict y, const core_real *restrict x, core_real weight,
                             kern_write write, int64_t c) {
#pragma omp simd
  for (int64_t i = 0; i < c; i++) kern_put(&y[i], write, weight * x[i]);
}

KERN_CLONES static void combine_run(const combine_rows *job, const core_real *restrict x, kern_write write,
                                    core_real *restrict y, int64_t begin, int64_t end) {
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    kern_write how = write;
    for (int64_t k = 0; k < job->k; k++) {
      const int64_t slot = job->slot[t * job->k + k];
      if (slot < 0) continue;
      combine_add(y + t * c, x + slot * c, job->weight != NULL ? job->weight[t * job->k + k] : 1, how, c);
      how = KERN_ADD;
    }
    if (how == KERN_SET && c > 0) memset(y + t * c, 0, (size_t)c * sizeof *y);
  }
}

/* dx may be x itself: within a slot the product is read before the gradient is written. */
KERN_CLONES static void combine_run_back(const combine_rows *job, const core_real *restrict dy,
                                         const core_real *x, core_real *dx, core_real *restrict dweight,
                                         int64_t begin, int64_t end) {
  const int64_t c = job->c;
  for (int64_t at = begin * job->k; at < end * job->k; at++) {
    const int64_t slot = job->slot[at];
    core_real dot = 0;
    if (slot >= 0) {
      const core_real *restrict d = dy + at / job->k * c;
      const core_real weight = job->weight != NULL ? job->weight[at] : 1;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < c; i++) {
        dot += d[i] * x[slot * c + i];
        dx[slot * c + i] = weight * d[i];
      }
    }
    if (dweight != NULL) dweight[at] = dot;
  }
}

core_status kern_combine_fwd_cpu(kern_context *context, core_tensor x, core_tensor slot, core_tensor weight,
                                 kern_write write, core_tensor y) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = slot.shape[0], k = slot.shape[1];
  if (weight.data != NULL) KERN_CHECK_REAL(weight, rows, k);
  KERN_CHECK_REAL(y, rows, c);
  KERN_CHECK_INDEX(slot, -1, x.shape[0]);
  const combine_rows job = {.slot = slot.data, .weight = weight.data, .k = k, .c = c};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    combine_run(&job, x.data, write, y.data, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_combine_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor slot,
                                 core_tensor weight, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = slot.shape[0], k = slot.shape[1];
  KERN_CHECK_REAL(dy, rows, c);
  if (weight.data != NULL) KERN_CHECK_REAL(weight, rows, k);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, rows, k);
  KERN_CHECK_INDEX(slot, -1, x.shape[0]);
  const combine_rows job = {.slot = slot.data, .weight = weight.data, .k = k, .c = c};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    combine_run_back(&job, dy.data, x.data, dx.data, dweight.data, kern_split_at(split, block),
                     kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
