/* Flat arrays: sum of squares, y += alpha x, x *= alpha, x = value. */
#include "cpu_impl.h" /* checks, blocks */

KERN_CLONES static double squares(const core_real *restrict x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}
KERN_CLONES static void add_scaled(core_real alpha, const core_real *x, core_real *y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] += alpha * x[i];
}
KERN_CLONES static void multiply(core_real alpha, core_real *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= alpha;
}
KERN_CLONES static void set(core_real value, core_real *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = value;
}

core_status kern_sum_squares_cpu(kern_context *context, core_tensor x, double *out) {
  KERN_CHECK_ANY(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  double partial[KERN_BLOCKS];
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    partial[block] = squares((const core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  *out = 0;
  for (int64_t block = 0; block < split.count; block++) *out += partial[block];
  return CORE_OK;
}

core_status kern_axpy_cpu(kern_context *context, double alpha, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY(x);
  KERN_CHECK_LIKE(y, x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    add_scaled((core_real)alpha, (const core_real *)x.data + begin, (core_real *)y.data + begin,
               kern_line_at(split, block + 1, n) - begin);
  }
  return CORE_OK;
}

core_status kern_scale_cpu(kern_context *context, double alpha, core_tensor x) {
  KERN_CHECK_ANY(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    multiply((core_real)alpha, (core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  return CORE_OK;
}

core_status kern_fill_cpu(kern_context *context, double value, core_tensor x) {
  KERN_CHECK_ANY(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    set((core_real)value, (core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  return CORE_OK;
}
