/* GELU, erf and tanh forms; (1 + tanh(u)) / 2 is computed as sigmoid(2u), which does not cancel. Same-index
 * aliasing of input and output is allowed, so nothing is restrict. */
#include "vecmath_impl.h" /* kern_normal_below, kern_sigmoid */

/* 2 sqrt(2 / pi) and the cubic coefficient of the tanh form. */
#define GELU_TWICE_ROOT ((core_real)1.59576912160573071176)
#define GELU_CUBE ((core_real)0.044715)

typedef struct gelu_job {
  core_dtype dtype;
  kern_write write;
  const void *x, *dy;
  void *to; /* y or dx */
} gelu_job;

KERN_INLINE void gelu_erf(const gelu_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const void *x = job->x;
  void *y = job->to;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const core_real v = kern_at(x, dtype, i);
    kern_to(y, dtype, i, KERN_SET, v * kern_normal_below(v));
  }
}
KERN_ACTIVE_RUN(gelu_erf, gelu_job)

KERN_INLINE void gelu_tanh(const gelu_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const void *x = job->x;
  void *y = job->to;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const core_real v = kern_at(x, dtype, i);
    kern_to(y, dtype, i, KERN_SET, v * kern_sigmoid(GELU_TWICE_ROOT * (v + GELU_CUBE * v * v * v)));
  }
}
KERN_ACTIVE_RUN(gelu_tanh, gelu_job)

KERN_INLINE void gelu_erf_back(const gelu_job *job, core_dtype dtype, kern_write write, int64_t begin,
                               int64_t end) {
  const void *x = job->x, *dy = job->dy;
  void *dx = job->to;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const core_real v = kern_at(x, dtype, i), slope = kern_normal_below(v) + v * kern_normal_density(v);
    kern_to(dx, dtype, i, write, kern_at(dy, dtype, i) * slope);
  }
}
KERN_ACTIVE_WRITE_RUN(gelu_erf_back, gelu_job)

KERN_INLINE void gelu_tanh_back(const gelu_job *job, core_dtype dtype, kern_write write, int64_t begin,
                                int64_t end) {
  const void *x = job->x, *dy = job->dy;
  void *dx = job->to;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const core_real v = kern_at(x, dtype, i), square = v * v;
    const core_real below = kern_sigmoid(GELU_TWICE_ROOT * (v + GELU_CUBE * square * v));
    const core_real slope = GELU_TWICE_ROOT * (1 + 3 * GELU_CUBE * square);
    kern_to(dx, dtype, i, write, kern_at(dy, dtype, i) * (below + v * below * (1 - below) * slope));
  }
}
KERN_ACTIVE_WRITE_RUN(gelu_tanh_back, gelu_job)

core_status kern_gelu_fwd_cpu(kern_context *context, kern_gelu form, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY_ACTIVE(x);
  KERN_CHECK_LIKE(y, x);
  const gelu_job job = {.dtype = x.dtype, .x = x.data, .to = y.data};
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), end = kern_line_at(split, block + 1, n);
    if (form == KERN_GELU_ERF)
      gelu_erf_run(&job, begin, end);
    else
      gelu_tanh_run(&job, begin, end);
  }
  return CORE_OK;
}

core_status kern_gelu_bwd_cpu(kern_context *context, kern_gelu form, core_tensor dy, core_tensor x,
                              kern_write write, core_tensor dx) {
  KERN_CHECK_ANY_ACTIVE(x);
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_LIKE(dx, x);
  const gelu_job job = {.dtype = x.dtype, .write = write, .x = x.data, .dy = dy.data, .to = dx.data};
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), end = kern_line_at(split, block + 1, n);
    if (form == KERN_GELU_ERF)
      gelu_erf_back_run(&job, begin, end);
    else
      gelu_tanh_back_run(&job, begin, end);
  }
  return CORE_OK;
}
