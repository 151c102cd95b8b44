/* SwiGLU: y = silu(gate) * up on rows [gate | up]. */
#include "vecmath_impl.h" /* kern_sigmoid */

typedef struct swiglu_job {
  core_dtype dtype;
  kern_write write;
  int64_t f;
  const void *x, *dy; /* [T, 2F], [T, F] */
  void *y, *dx;       /* [T, F], [T, 2F] */
} swiglu_job;

/* The next row is asked for while this one is worked on: rows come cold from the last product, and the
 * hardware loses its stream at every end of a half row. (Halves the forward pass; the backward one is bound
 * by writing.) */
KERN_INLINE void swiglu_rows(const swiglu_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const int64_t f = job->f;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict gate = kern_element(job->x, dtype, t * 2 * f);
    const void *restrict up = kern_element(gate, dtype, f);
    void *restrict y = kern_element(job->y, dtype, t * f);
    if (t + 1 < end) kern_prefetch(kern_element(gate, dtype, 2 * f), dtype, 2 * f);
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      const core_real g = kern_at(gate, dtype, i);
      kern_to(y, dtype, i, KERN_SET, g * kern_sigmoid(g) * kern_at(up, dtype, i));
    }
  }
}
KERN_ACTIVE_RUN(swiglu_rows, swiglu_job)

/* d silu(g) / dg = s + g s (1 - s), s = sigmoid(g). */
KERN_INLINE void swiglu_rows_back(const swiglu_job *job, core_dtype dtype, kern_write write, int64_t begin,
                                  int64_t end) {
  const int64_t f = job->f;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict gate = kern_element(job->x, dtype, t * 2 * f);
    const void *restrict up = kern_element(gate, dtype, f), *restrict dy =
                                                                kern_element(job->dy, dtype, t * f);
    void *restrict dgate = kern_element(job->dx, dtype, t * 2 * f);
    void *restrict dup = kern_element(dgate, dtype, f);
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      const core_real g = kern_at(gate, dtype, i), d = kern_at(dy, dtype, i);
      const core_real s = kern_sigmoid(g);
      const core_real silu = g * s;
      kern_to(dgate, dtype, i, write, d * kern_at(up, dtype, i) * (s + silu * (1 - s)));
      kern_to(dup, dtype, i, write, d * silu);
    }
  }
}
KERN_ACTIVE_WRITE_RUN(swiglu_rows_back, swiglu_job)

core_status kern_swiglu_fwd_cpu(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_ACTIVE(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], f = y.shape[1];
  KERN_CHECK(x, y.dtype, rows, 2 * f);
  const swiglu_job job = {.dtype = y.dtype, .f = f, .x = x.data, .y = y.data};
  const kern_split split = kern_split_rows(rows, 2 * f);
  KERN_FOR_BLOCKS(context, split, block) {
    swiglu_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_swiglu_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, kern_write write,
                                core_tensor dx) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  const int64_t rows = dy.shape[0], f = dy.shape[1];
  KERN_CHECK(x, dy.dtype, rows, 2 * f);
  KERN_CHECK_LIKE(dx, x);
  const swiglu_job job = {
      .dtype = dy.dtype, .write = write, .f = f, .x = x.data, .dy = dy.data, .dx = dx.data};
  const kern_split split = kern_split_rows(rows, 2 * f);
  KERN_FOR_BLOCKS(context, split, block) {
    swiglu_rows_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
