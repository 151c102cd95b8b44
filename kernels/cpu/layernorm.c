/* LayerNorm, population variance. With h = (x - mean) r and g = w dy:
 * dx = r (g - mean(g) - h mean(g h)); dweight = sum dy h; dbias = sum dy. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_put */

/* Two passes for the variance: a row lies in the first cache, and the shifted sum does not cancel. */
KERN_CLONES static void layer_rows(const core_real *restrict x, const core_real *restrict weight,
                                   const core_real *restrict bias, core_real epsilon, core_real *restrict y,
                                   core_real *restrict stat, int64_t rows, int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict from = x + t * c;
    core_real sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; i++) sum += from[i];
    const core_real mean = sum / (core_real)c;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < c; i++) square += (from[i] - mean) * (from[i] - mean);
    const core_real r = 1 / core_real_sqrt(square / (core_real)c + epsilon);
    stat[2 * t] = mean;
    stat[2 * t + 1] = r;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) y[t * c + i] = (from[i] - mean) * r * weight[i] + bias[i];
  }
}

KERN_CLONES static void layer_rows_back(const core_real *restrict dy, const core_real *restrict x,
                                        const core_real *restrict weight, const core_real *restrict stat,
                                        kern_write write, core_real *restrict dx, core_real *restrict dweight,
                                        core_real *restrict dbias, int64_t rows, int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict d = dy + t * c, *restrict from = x + t * c;
    core_real *restrict to = dx + t * c;
    const core_real mean = stat[2 * t], r = stat[2 * t + 1];
    core_real sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < c; i++) {
      const core_real h = (from[i] - mean) * r, g = d[i] * weight[i];
      sum += g;
      dot += g * h;
      dweight[i] += d[i] * h;
      dbias[i] += d[i];
    }
    sum /= (core_real)c;
    dot /= (core_real)c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++)
      kern_put(&to[i], write, r * (d[i] * weight[i] - sum - (from[i] - mean) * r * dot));
  }
}

core_status kern_layernorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   double epsilon, core_tensor y, core_tensor stat) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(bias, c);
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(stat, rows, 2);
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    layer_rows((const core_real *)x.data + begin * c, weight.data, bias.data, (core_real)epsilon,
               (core_real *)y.data + begin * c, (core_real *)stat.data + begin * 2,
               kern_split_at(split, block + 1) - begin, c);
  }
  return CORE_OK;
}

core_status kern_layernorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                   core_tensor stat, kern_write write, core_tensor dx, core_tensor dweight,
                                   core_tensor dbias) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(stat, rows, 2);
  KERN_CHECK_LIKE(dx, x);
  KERN_CHECK_REAL(dweight, c);
  KERN_CHECK_REAL(dbias, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    core_real *sum = context->partial + block * 2 * c;
    memset(sum, 0, (size_t)(2 * c) * sizeof *sum);
    layer_rows_back((const core_real *)dy.data + begin * c, (const core_real *)x.data + begin * c,
                    weight.data, (const core_real *)stat.data + begin * 2, write,
                    (core_real *)dx.data + begin * c, sum, sum + c, kern_split_at(split, block + 1) - begin,
                    c);
  }
  kern_partial_add_priv(context->partial, split.count, 2 * c, c, dweight.data);
  kern_partial_add_priv(context->partial + c, split.count, 2 * c, c, dbias.data);
  return CORE_OK;
}
