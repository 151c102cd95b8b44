/* Bias of a linear layer: added to rows in place; its gradient is the sum over rows. */
#include <string.h> /* memset */

#include "cpu_impl.h" /* checks, blocks */

KERN_CLONES static void bias_add(const core_real *restrict bias, core_real *restrict x, int64_t rows,
                                 int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
#pragma omp simd
    for (int64_t i = 0; i < c; i++) x[t * c + i] += bias[i];
  }
}

/* Four rows at a time: one pass over the sums instead of four. */
KERN_CLONES static void bias_sum(const core_real *restrict dy, core_real *restrict sum, int64_t rows,
                                 int64_t c) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    const core_real *restrict d = dy + t * c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) sum[i] += (d[i] + d[c + i]) + (d[2 * c + i] + d[3 * c + i]);
  }
  for (; t < rows; t++) {
#pragma omp simd
    for (int64_t i = 0; i < c; i++) sum[i] += dy[t * c + i];
  }
}

core_status kern_bias_fwd_cpu(kern_context *context, core_tensor bias, core_tensor x) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(bias, c);
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    bias_add(bias.data, (core_real *)x.data + begin * c, kern_split_at(split, block + 1) - begin, c);
  }
  return CORE_OK;
}

core_status kern_bias_bwd_cpu(kern_context *context, core_tensor dy, core_tensor dbias) {
  KERN_CHECK_REAL(dy, KERN_ANY, KERN_ANY);
  const int64_t rows = dy.shape[0], c = dy.shape[1];
  KERN_CHECK_REAL(dbias, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    core_real *sum = context->partial + block * c;
    memset(sum, 0, (size_t)c * sizeof *sum);
    bias_sum((const core_real *)dy.data + begin * c, sum, kern_split_at(split, block + 1) - begin, c);
  }
  kern_partial_add_priv(context->partial, split.count, c, c, dbias.data);
  return CORE_OK;
}
