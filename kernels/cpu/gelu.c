/* GELU, erf and tanh forms; (1 + tanh(u)) / 2 is computed as sigmoid(2u), which does not cancel. Same-index
 * aliasing of input and output is allowed, so nothing is restrict. */
#include "vecmath_impl.h" /* kern_normal_below, kern_sigmoid */

/* 2 sqrt(2 / pi) and the cubic coefficient of the tanh form. */
#define GELU_TWICE_ROOT ((core_real)1.59576912160573071176)
#define GELU_CUBE ((core_real)0.044715)

KERN_CLONES static void gelu_erf(const core_real *x, core_real *y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * kern_normal_below(x[i]);
}

KERN_CLONES static void gelu_tanh(const core_real *x, core_real *y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    y[i] = x[i] * kern_sigmoid(GELU_TWICE_ROOT * (x[i] + GELU_CUBE * x[i] * x[i] * x[i]));
}

KERN_CLONES static void gelu_erf_back(const core_real *dy, const core_real *x, core_real *dx, int64_t n,
                                      kern_write write) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    kern_put(&dx[i], write, dy[i] * (kern_normal_below(x[i]) + x[i] * kern_normal_density(x[i])));
}

KERN_CLONES static void gelu_tanh_back(const core_real *dy, const core_real *x, core_real *dx, int64_t n,
                                       kern_write write) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const core_real square = x[i] * x[i];
    const core_real below = kern_sigmoid(GELU_TWICE_ROOT * (x[i] + GELU_CUBE * square * x[i]));
    const core_real slope = GELU_TWICE_ROOT * (1 + 3 * GELU_CUBE * square);
    kern_put(&dx[i], write, dy[i] * (below + x[i] * below * (1 - below) * slope));
  }
}

core_status kern_gelu_fwd_cpu(kern_context *context, kern_gelu form, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY(x);
  KERN_CHECK_LIKE(y, x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    const core_real *from = (const core_real *)x.data + begin;
    core_real *to = (core_real *)y.data + begin;
    if (form == KERN_GELU_ERF)
      gelu_erf(from, to, count);
    else
      gelu_tanh(from, to, count);
  }
  return CORE_OK;
}

core_status kern_gelu_bwd_cpu(kern_context *context, kern_gelu form, core_tensor dy, core_tensor x,
                              kern_write write, core_tensor dx) {
  KERN_CHECK_ANY(x);
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_LIKE(dx, x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    const core_real *from = (const core_real *)dy.data + begin, *at = (const core_real *)x.data + begin;
    core_real *to = (core_real *)dx.data + begin;
    if (form == KERN_GELU_ERF)
      gelu_erf_back(from, at, to, count, write);
    else
      gelu_tanh_back(from, at, to, count, write);
  }
  return CORE_OK;
}
