/* The router's own product. Forward row by row in one order: the logits of a token must not depend on the
 * tokens that lie beside it, and GEMM libraries give other last bits for other row counts. Compiled without
 * peeling for alignment (CMakeLists.txt), which would make the order depend on the row's address. */
#include "cpu_impl.h" /* checks, blocks */

/* Four experts at a time share the loads of x. */
KERN_INLINE void logits_four(const core_real *restrict x, const core_real *restrict w, int64_t c,
                             core_real *restrict out) {
  core_real a = 0, b = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, d, e)
  for (int64_t i = 0; i < c; i++) {
    a += x[i] * w[i];
    b += x[i] * w[c + i];
    d += x[i] * w[2 * c + i];
    e += x[i] * w[3 * c + i];
  }
  out[0] = a, out[1] = b, out[2] = d, out[3] = e;
}

KERN_CLONES static void logits_rows(const core_real *restrict x, const core_real *restrict weight,
                                    const core_real *restrict bias, core_real *restrict logits, int64_t rows,
                                    int64_t c, int64_t experts) {
  for (int64_t t = 0; t < rows; t++) {
    core_real *restrict out = logits + t * experts;
    int64_t e = 0;
    for (; e + 4 <= experts; e += 4) logits_four(x + t * c, weight + e * c, c, out + e);
    for (; e < experts; e++) {
      core_real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < c; i++) sum += x[t * c + i] * weight[e * c + i];
      out[e] = sum;
    }
    for (e = 0; bias != NULL && e < experts; e++) out[e] += bias[e];
  }
}

core_status kern_router_logits_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   core_tensor logits) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, KERN_ANY, c);
  const int64_t experts = weight.shape[0];
  if (bias.data != NULL) KERN_CHECK_REAL(bias, experts);
  KERN_CHECK_REAL(logits, rows, experts);
  const kern_split split = kern_split_rows(rows, c * 2);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    logits_rows((const core_real *)x.data + begin * c, weight.data, bias.data,
                (core_real *)logits.data + begin * experts, kern_split_at(split, block + 1) - begin, c,
                experts);
  }
  return CORE_OK;
}

/* Three products like any other: nothing is decided by the last bits of a gradient. */
core_status kern_router_logits_bwd_cpu(kern_context *context, core_tensor dlogits, core_tensor x,
                                       core_tensor weight, kern_write write, core_tensor dx,
                                       core_tensor dweight, core_tensor dbias) {
  KERN_CHECK_REAL(dlogits, KERN_ANY, KERN_ANY);
  const int64_t rows = dlogits.shape[0], experts = dlogits.shape[1];
  KERN_CHECK_REAL(x, rows, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK_REAL(weight, experts, c);
  KERN_CHECK_LIKE(dx, x);
  KERN_CHECK_LIKE(dweight, weight);
  TRY(kern_gemm_cpu(context, KERN_NN, dlogits, weight, write, dx));
  TRY(kern_gemm_cpu(context, KERN_TN, dlogits, x, KERN_ADD, dweight));
  if (dbias.data != NULL) TRY(kern_bias_bwd_cpu(context, dlogits, dbias));
  return CORE_OK;
}
