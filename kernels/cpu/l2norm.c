/* Rows to unit length, with the floor of METHODS: y = x / max(|x|, 1e-12). */
#include "active_impl.h" /* kern_to */

#define L2_FLOOR ((core_real)1e-12)

typedef struct l2_job {
  core_dtype dtype; /* of dx */
  kern_write write;
  int64_t c;
  const core_real *dy, *y, *norm;
  void *dx;
} l2_job;

KERN_CLONES static void l2_rows(const core_real *restrict x, core_real *restrict y, core_real *restrict norm,
                                int64_t rows, int64_t c) {
  for (int64_t t = 0; t < rows; t++) {
    core_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; i++) sum += x[t * c + i] * x[t * c + i];
    norm[t] = core_real_sqrt(sum);
    const core_real inverse = 1 / (norm[t] < L2_FLOOR ? L2_FLOOR : norm[t]);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) y[t * c + i] = x[t * c + i] * inverse;
  }
}

/* dx = (dy - y <y, dy>) / |x|; below the floor y is linear in x. */
KERN_INLINE void l2_rows_back(const l2_job *job, core_dtype dtype, kern_write write, int64_t begin,
                              int64_t end) {
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    const core_real *restrict d = job->dy + t * c, *restrict y = job->y + t * c;
    void *restrict dx = kern_element(job->dx, dtype, t * c);
    core_real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < c; i++) dot += d[i] * y[i];
    const bool floored = job->norm[t] < L2_FLOOR;
    const core_real inverse = 1 / (floored ? L2_FLOOR : job->norm[t]);
    if (floored) dot = 0;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) kern_to(dx, dtype, i, write, (d[i] - y[i] * dot) * inverse);
  }
}
KERN_ACTIVE_WRITE_RUN(l2_rows_back, l2_job)

core_status kern_l2norm_fwd_cpu(kern_context *context, core_tensor x, core_tensor y, core_tensor norm) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(norm, rows);
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    l2_rows((const core_real *)x.data + begin * c, (core_real *)y.data + begin * c,
            (core_real *)norm.data + begin, kern_split_at(split, block + 1) - begin, c);
  }
  return CORE_OK;
}

core_status kern_l2norm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor y, core_tensor norm,
                                kern_write write, core_tensor dx) {
  KERN_CHECK_REAL(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], c = y.shape[1];
  KERN_CHECK_LIKE(dy, y);
  KERN_CHECK_REAL(norm, rows);
  KERN_CHECK_ACTIVE(dx, rows, c);
  const l2_job job = {.dtype = dx.dtype,
                      .write = write,
                      .c = c,
                      .dy = dy.data,
                      .y = y.data,
                      .norm = norm.data,
                      .dx = dx.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    l2_rows_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
