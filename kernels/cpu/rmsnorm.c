/* RMSNorm. With r = inv: dx = r (w dy) - x r^3 / C <w dy, x>; dweight = sum over rows of dy x r. */
#include <string.h> /* memset */

#include "active_impl.h" /* kern_at, kern_to */

typedef struct rms_job {
  core_dtype dtype; /* of x, y, dy and dx */
  kern_write write;
  int64_t c;
  core_real epsilon;
  const void *x, *dy;       /* [T, C] */
  void *to;                 /* y or dx */
  const core_real *weight;  /* [C] */
  core_real *inv, *dweight; /* [T], [C] */
} rms_job;

KERN_INLINE void rms_rows(const rms_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real *restrict weight = job->weight;
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict x = kern_element(job->x, dtype, t * c);
    void *restrict y = kern_element(job->to, dtype, t * c);
    core_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; i++) sum += kern_at(x, dtype, i) * kern_at(x, dtype, i);
    const core_real r = 1 / core_real_sqrt(sum / (core_real)c + job->epsilon);
    job->inv[t] = r;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) kern_to(y, dtype, i, KERN_SET, kern_at(x, dtype, i) * r * weight[i]);
  }
}
KERN_ACTIVE_RUN(rms_rows, rms_job)

KERN_INLINE void rms_rows_back(const rms_job *job, core_dtype dtype, kern_write write, int64_t begin,
                               int64_t end) {
  const core_real *restrict weight = job->weight;
  core_real *restrict dweight = job->dweight;
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict d = kern_element(job->dy, dtype, t * c);
    const void *restrict x = kern_element(job->x, dtype, t * c);
    void *restrict dx = kern_element(job->to, dtype, t * c);
    const core_real r = job->inv[t];
    core_real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < c; i++) {
      const core_real product = kern_at(d, dtype, i) * kern_at(x, dtype, i);
      dot += product * weight[i];
      dweight[i] += product * r;
    }
    const core_real along = dot * r * r * r / (core_real)c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++)
      kern_to(dx, dtype, i, write, kern_at(d, dtype, i) * weight[i] * r - kern_at(x, dtype, i) * along);
  }
}
KERN_ACTIVE_WRITE_RUN(rms_rows_back, rms_job)

core_status kern_rmsnorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, double epsilon,
                                 core_tensor y, core_tensor inv) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(inv, rows);
  const rms_job job = {.dtype = x.dtype,
                       .c = c,
                       .epsilon = (core_real)epsilon,
                       .x = x.data,
                       .to = y.data,
                       .weight = weight.data,
                       .inv = inv.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    rms_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_rmsnorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                 core_tensor inv, kern_write write, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(inv, rows);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const rms_job all = {.dtype = x.dtype,
                       .write = write,
                       .c = c,
                       .x = x.data,
                       .dy = dy.data,
                       .to = dx.data,
                       .weight = weight.data,
                       .inv = inv.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    rms_job job = all;
    job.dweight = context->partial + block * c;
    memset(job.dweight, 0, (size_t)c * sizeof *job.dweight);
    rms_rows_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  if (dweight.data != NULL) kern_partial_add_priv(context->partial, split.count, c, c, dweight.data);
  return CORE_OK;
}
