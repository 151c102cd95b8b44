/* LayerNorm, population variance. With h = (x - mean) r and g = w dy:
 * dx = r (g - mean(g) - h mean(g h)); dweight = sum dy h; dbias = sum dy. */
#include <string.h> /* memset */

#include "active_impl.h" /* kern_at, kern_to */

typedef struct layer_job {
  core_dtype dtype; /* of x, y, dy and dx */
  kern_write write;
  int64_t c;
  core_real epsilon;
  const void *x, *dy;             /* [T, C] */
  void *to;                       /* y or dx */
  const core_real *weight, *bias; /* [C] */
  core_real *stat;                /* [T, 2] */
  core_real *dweight, *dbias;     /* [C] */
} layer_job;

/* Two passes for the variance: a row lies in the first cache, and the shifted sum does not cancel. */
KERN_INLINE void layer_rows(const layer_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real *restrict weight = job->weight, *restrict bias = job->bias;
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict x = kern_element(job->x, dtype, t * c);
    void *restrict y = kern_element(job->to, dtype, t * c);
    core_real sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; i++) sum += kern_at(x, dtype, i);
    const core_real mean = sum / (core_real)c;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < c; i++) square += (kern_at(x, dtype, i) - mean) * (kern_at(x, dtype, i) - mean);
    const core_real r = 1 / core_real_sqrt(square / (core_real)c + job->epsilon);
    job->stat[2 * t] = mean;
    job->stat[2 * t + 1] = r;
#pragma omp simd
    for (int64_t i = 0; i < c; i++)
      kern_to(y, dtype, i, KERN_SET, (kern_at(x, dtype, i) - mean) * r * weight[i] + bias[i]);
  }
}
KERN_ACTIVE_RUN(layer_rows, layer_job)

KERN_INLINE void layer_rows_back(const layer_job *job, core_dtype dtype, kern_write write, int64_t begin,
                                 int64_t end) {
  const core_real *restrict weight = job->weight;
  core_real *restrict dweight = job->dweight, *restrict dbias = job->dbias;
  const int64_t c = job->c;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict dy = kern_element(job->dy, dtype, t * c);
    const void *restrict x = kern_element(job->x, dtype, t * c);
    void *restrict dx = kern_element(job->to, dtype, t * c);
    const core_real mean = job->stat[2 * t], r = job->stat[2 * t + 1];
    core_real sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < c; i++) {
      const core_real d = kern_at(dy, dtype, i);
      const core_real h = (kern_at(x, dtype, i) - mean) * r, g = d * weight[i];
      sum += g;
      dot += g * h;
      dweight[i] += d * h;
      dbias[i] += d;
    }
    sum /= (core_real)c;
    dot /= (core_real)c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
      const core_real h = (kern_at(x, dtype, i) - mean) * r;
      kern_to(dx, dtype, i, write, r * (kern_at(dy, dtype, i) * weight[i] - sum - h * dot));
    }
  }
}
KERN_ACTIVE_WRITE_RUN(layer_rows_back, layer_job)

core_status kern_layernorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   double epsilon, core_tensor y, core_tensor stat) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(bias, c);
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(stat, rows, 2);
  const layer_job job = {.dtype = x.dtype,
                         .c = c,
                         .epsilon = (core_real)epsilon,
                         .x = x.data,
                         .to = y.data,
                         .weight = weight.data,
                         .bias = bias.data,
                         .stat = stat.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    layer_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_layernorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                   core_tensor stat, kern_write write, core_tensor dx, core_tensor dweight,
                                   core_tensor dbias) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(stat, rows, 2);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, c);
  if (dbias.data != NULL) KERN_CHECK_REAL(dbias, c);
  TRY(kern_check_limit_priv(__func__, "width", c, context->limits.width));
  if (rows == 0 || c == 0) return CORE_OK;
  const layer_job all = {.dtype = x.dtype,
                         .write = write,
                         .c = c,
                         .x = x.data,
                         .dy = dy.data,
                         .to = dx.data,
                         .weight = weight.data,
                         .stat = stat.data};
  const kern_split split = kern_split_rows(rows, c);
  KERN_FOR_BLOCKS(context, split, block) {
    layer_job job = all;
    job.dweight = context->partial + block * 2 * c, job.dbias = job.dweight + c;
    memset(job.dweight, 0, (size_t)(2 * c) * sizeof *job.dweight);
    layer_rows_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  if (dweight.data != NULL) kern_partial_add_priv(context->partial, split.count, 2 * c, c, dweight.data);
  if (dbias.data != NULL) kern_partial_add_priv(context->partial + c, split.count, 2 * c, c, dbias.data);
  return CORE_OK;
}
