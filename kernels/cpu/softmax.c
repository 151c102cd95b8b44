/* Softmax of rows. Compiled without peeling for alignment (CMakeLists.txt), so that router_choose, which
 * calls it on other memory, gives the same bits. */
#include "vecmath_impl.h" /* kern_exp, kern_row_max */

KERN_CLONES void kern_softmax_rows_priv(const core_real *x, core_real *y, int64_t rows, int64_t n) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real most = kern_row_max(x + t * n, n);
    core_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      const core_real e = kern_exp(x[t * n + i] - most);
      y[t * n + i] = e;
      sum += e;
    }
    const core_real inverse = 1 / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[t * n + i] *= inverse;
  }
}

core_status kern_softmax_fwd_cpu(kern_context *context, core_tensor logits, core_tensor prob) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(prob, logits);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  const kern_split split = kern_split_rows(n > 0 ? rows : 0, n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    kern_softmax_rows_priv((const core_real *)logits.data + begin * n, (core_real *)prob.data + begin * n,
                           kern_split_at(split, block + 1) - begin, n);
  }
  return CORE_OK;
}

KERN_CLONES static void softmax_run_back(const core_real *restrict dprob, const core_real *restrict prob,
                                         kern_write write, int64_t rows, int64_t n,
                                         core_real *restrict dlogits) {
  for (int64_t t = 0; t < rows; t++) {
    core_real dot = 0;
    for (int64_t i = 0; i < n; i++) dot += dprob[t * n + i] * prob[t * n + i];
    for (int64_t i = 0; i < n; i++)
      kern_put(&dlogits[t * n + i], write, prob[t * n + i] * (dprob[t * n + i] - dot));
  }
}

core_status kern_softmax_bwd_cpu(kern_context *context, core_tensor dprob, core_tensor prob, kern_write write,
                                 core_tensor dlogits) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(dprob, prob);
  KERN_CHECK_LIKE(dlogits, prob);
  const int64_t rows = prob.shape[0], n = prob.shape[1];
  const kern_split split = kern_split_rows(n > 0 ? rows : 0, n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block), end = kern_split_at(split, block + 1);
    softmax_run_back((const core_real *)dprob.data + begin * n, (const core_real *)prob.data + begin * n,
                     write, end - begin, n, (core_real *)dlogits.data + begin * n);
  }
  return CORE_OK;
}
