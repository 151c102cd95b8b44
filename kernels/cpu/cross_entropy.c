/* Cross entropy of rows of logits against one target each; -1 counts nothing. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_exp, kern_row_max */

KERN_CLONES static core_real row_lse(const core_real *restrict x, int64_t n) {
  const core_real most = kern_row_max(x, n);
  core_real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += kern_exp(x[i] - most);
  return most + core_real_log(sum);
}

KERN_CLONES static void row_back(core_real *restrict x, core_real lse, core_real weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = weight * kern_exp(x[i] - lse);
}

core_status kern_cross_entropy_fwd_cpu(kern_context *context, core_tensor logits, core_tensor target,
                                       core_tensor lse, core_tensor loss) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK(target, CORE_INT32, rows);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK_REAL(loss, rows);
  KERN_CHECK_INDEX(target, -1, n);
  const core_real *x = logits.data;
  const int32_t *at = target.data;
  core_real *to_lse = lse.data, *to_loss = loss.data;
  const kern_split split = kern_split_rows(rows, n);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++) {
      to_lse[t] = n > 0 ? row_lse(x + t * n, n) : 0;
      to_loss[t] = at[t] < 0 ? 0 : to_lse[t] - x[t * n + at[t]];
    }
  }
  return CORE_OK;
}

core_status kern_cross_entropy_bwd_cpu(kern_context *context, double weight, core_tensor lse,
                                       core_tensor target, core_tensor logits) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK(target, CORE_INT32, rows);
  KERN_CHECK_INDEX(target, -1, n);
  core_real *x = logits.data;
  const core_real *from = lse.data;
  const int32_t *at = target.data;
  const kern_split split = kern_split_rows(n > 0 ? rows : 0, n);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++) {
      if (at[t] < 0) {
        memset(x + t * n, 0, (size_t)n * sizeof *x);
        continue;
      }
      row_back(x + t * n, from[t], (core_real)weight, n);
      x[t * n + at[t]] -= (core_real)weight;
    }
  }
  return CORE_OK;
}
