/* The router's own product. Forward row by row in one order: the logits of a token must not depend on the
 * tokens that lie beside it, and GEMM libraries give other last bits for other row counts. Compiled without
 * peeling for alignment (CMakeLists.txt), which would make the order depend on the row's address. */
#include "active_impl.h" /* kern_at */
#include "gemm_impl.h"   /* kern_product */

typedef struct logits_job {
  core_dtype dtype; /* of x */
  int64_t c, experts;
  const void *x;
  const core_real *weight, *bias; /* bias or NULL */
  core_real *logits;
} logits_job;

/* Four experts at a time share the loads of x. */
KERN_INLINE void logits_four(const void *restrict x, core_dtype dtype, const core_real *const row[4],
                             int64_t c, core_real out[4]) {
  const core_real *restrict w0 = row[0], *restrict w1 = row[1], *restrict w2 = row[2], *restrict w3 = row[3];
  core_real a = 0, b = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, d, e)
  for (int64_t i = 0; i < c; i++) {
    const core_real v = kern_at(x, dtype, i);
    a += v * w0[i];
    b += v * w1[i];
    d += v * w2[i];
    e += v * w3[i];
  }
  out[0] = a, out[1] = b, out[2] = d, out[3] = e;
}

/* The last experts go through the same sums, the last of them again in the place of those that there are not:
 * an expert's logit has the same bits however many follow it, so that a mixture can be extended. */
KERN_INLINE void logits_rows(const logits_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const int64_t c = job->c, experts = job->experts;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict x = kern_element(job->x, dtype, t * c);
    core_real *restrict out = job->logits + t * experts;
    for (int64_t e = 0; e < experts; e += 4) {
      const core_real *row[4];
      core_real four[4];
      for (int64_t i = 0; i < 4; i++) row[i] = job->weight + (e + i < experts ? e + i : experts - 1) * c;
      logits_four(x, dtype, row, c, four);
      for (int64_t i = 0; i < 4 && e + i < experts; i++) out[e + i] = four[i];
    }
    for (int64_t e = 0; job->bias != NULL && e < experts; e++) out[e] += job->bias[e];
  }
}
KERN_ACTIVE_RUN(logits_rows, logits_job)

core_status kern_router_logits_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   core_tensor logits) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, KERN_ANY, c);
  const int64_t experts = weight.shape[0];
  if (bias.data != NULL) KERN_CHECK_REAL(bias, experts);
  KERN_CHECK_REAL(logits, rows, experts);
  const logits_job job = {.dtype = x.dtype,
                          .c = c,
                          .experts = experts,
                          .x = x.data,
                          .weight = weight.data,
                          .bias = bias.data,
                          .logits = logits.data};
  const kern_split split = kern_split_rows(rows, c * 2);
  KERN_FOR_BLOCKS(context, split, block) {
    logits_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

/* Products like any other, in core_real whatever x is: nothing is decided by the last bits of a gradient. */
core_status kern_router_logits_bwd_cpu(kern_context *context, core_tensor dlogits, core_tensor x,
                                       core_tensor weight, kern_write write, core_tensor dx,
                                       core_tensor dweight, core_tensor dbias) {
  KERN_CHECK_REAL(dlogits, KERN_ANY, KERN_ANY);
  const int64_t rows = dlogits.shape[0], experts = dlogits.shape[1];
  KERN_CHECK_ACTIVE(x, rows, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK_REAL(weight, experts, c);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_LIKE(dweight, weight);
  const core_dtype real = CORE_REAL_DTYPE;
  const kern_product to_x = {KERN_NN, write,   {rows, c, experts}, dlogits.data, weight.data, dx.data, real,
                             real,    dx.dtype};
  const kern_product to_weight = {
      KERN_TN, KERN_ADD, {experts, c, rows}, dlogits.data, x.data, dweight.data, real, x.dtype, real};
  TRY(kern_product_run_priv(context, &to_x));
  if (dweight.data != NULL) TRY(kern_product_run_priv(context, &to_weight));
  if (dbias.data != NULL) TRY(kern_bias_bwd_cpu(context, dlogits, dbias));
  return CORE_OK;
}
