/* RMSNorm. With r = inv: dx = r (w dy) - x r^3 / C <w dy, x>; dweight = sum over rows of dy x r. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_put */

KERN_CLONES static void rms_rows(const core_real *restrict x, const core_real *restrict weight,
                                 core_real epsilon, core_real *restrict y, core_real *restrict inv,
                                 int64_t rows, int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict from = x + t * c;
    core_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; i++) sum += from[i] * from[i];
    const core_real r = 1 / core_real_sqrt(sum / (core_real)c + epsilon);
    inv[t] = r;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) y[t * c + i] = from[i] * r * weight[i];
  }
}

KERN_CLONES static void rms_rows_back(const core_real *restrict dy, const core_real *restrict x,
                                      const core_real *restrict weight, const core_real *restrict inv,
                                      kern_write write, core_real *restrict dx, core_real *restrict dweight,
                                      int64_t rows, int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict d = dy + t * c, *restrict from = x + t * c;
    core_real *restrict to = dx + t * c;
    const core_real r = inv[t];
    core_real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < c; i++) {
      const core_real product = d[i] * from[i];
      dot += product * weight[i];
      dweight[i] += product * r;
    }
    const core_real along = dot * r * r * r / (core_real)c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) kern_put(&to[i], write, d[i] * weight[i] * r - from[i] * along);
  }
}

core_status kern_rmsnorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, double epsilon,
                                 core_tensor y, core_tensor inv) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(y, rows, c);
  KERN_CHECK_REAL(inv, rows);
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    rms_rows((const core_real *)x.data + begin * c, weight.data, (core_real)epsilon,
             (core_real *)y.data + begin * c, (core_real *)inv.data + begin,
             kern_split_at(split, block + 1) - begin, c);
  }
  return CORE_OK;
}

core_status kern_rmsnorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                 core_tensor inv, kern_write write, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(inv, rows);
  KERN_CHECK_LIKE(dx, x);
  KERN_CHECK_REAL(dweight, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    core_real *sum = context->partial + block * c;
    memset(sum, 0, (size_t)c * sizeof *sum);
    rms_rows_back((const core_real *)dy.data + begin * c, (const core_real *)x.data + begin * c, weight.data,
                  (const core_real *)inv.data + begin, write, (core_real *)dx.data + begin * c, sum,
                  kern_split_at(split, block + 1) - begin, c);
  }
  kern_partial_add_priv(context->partial, split.count, c, c, dweight.data);
  return CORE_OK;
}
