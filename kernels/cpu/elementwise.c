/* Flat arrays: sum of squares, change of type, y += alpha x, x *= alpha, x = value. */
#include <string.h> /* memmove */

#include "vecmath_impl.h" /* kern_bfloat_of */

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
KERN_CLONES static void narrow(const core_real *restrict x, uint16_t *restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = kern_bfloat_of(x[i]);
}
KERN_CLONES static void widen(const uint16_t *restrict x, core_real *restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = core_float_from_bfloat(x[i]);
}
KERN_CLONES static void set_brief(uint16_t value, uint16_t *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = value;
}
KERN_CLONES static void set(core_real value, core_real *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = value;
}

core_status kern_sum_squares_cpu(kern_context *context, core_tensor x, core_tensor out) {
  KERN_CHECK_ANY(x);
  KERN_CHECK(out, CORE_FLOAT64, 1);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  double partial[KERN_BLOCKS], *total = out.data;
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    partial[block] = squares((const core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  for (int64_t block = 0; block < split.count; block++) *total += partial[block];
  return CORE_OK;
}

/* Elements [begin, begin + n) of x into y. */
static void cast_run(core_tensor x, core_tensor y, int64_t begin, int64_t n) {
  char *to = (char *)y.data + (size_t)begin * core_dtype_size(y.dtype);
  const char *from = (const char *)x.data + (size_t)begin * core_dtype_size(x.dtype);
  if (x.dtype == y.dtype)
    memmove(to, from, (size_t)n * core_dtype_size(x.dtype));
  else if (x.dtype == CORE_BFLOAT16)
    widen((const uint16_t *)from, (core_real *)to, n);
  else
    narrow((const core_real *)from, (uint16_t *)to, n);
}

core_status kern_cast_cpu(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY_ACTIVE(x);
  KERN_CHECK_ANY_ACTIVE(y);
  const int64_t n = core_tensor_count(&x);
  CHECK(core_tensor_count(&y) == n, CORE_ERR_ARGUMENT, "%s: x has %lld elements and y has %lld", __func__,
        (long long)n, (long long)core_tensor_count(&y));
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    if (count > 0) cast_run(x, y, begin, count);
  }
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
  KERN_CHECK_ANY_ACTIVE(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    if (x.dtype == CORE_BFLOAT16)
      set_brief(kern_bfloat_of((core_real)value), (uint16_t *)x.data + begin, count);
    else
      set((core_real)value, (core_real *)x.data + begin, count);
  }
  return CORE_OK;
}
