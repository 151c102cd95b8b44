/* The router's own products: the logits of a token do not depend on the tokens that lie beside it, which
 * cuBLAS does not promise for other row counts, and activations may be bfloat16 beside float32 weights. */
#include "tile_gemm.cuh"

struct logits_done {
  const float *bias; /* or NULL */
  float *logits;
  int64_t experts;

  __device__ void operator()(int64_t, int64_t row, int64_t e, float sum) const {
    logits[row * experts + e] = bias != NULL ? sum + bias[e] : sum;
  }
};

template <typename T>
struct logits_dx {
  T *dx;
  int64_t c;
  kern_write write;

  __device__ void operator()(int64_t, int64_t row, int64_t at, float sum) const {
    T *const to = dx + row * c + at;
    kern_set(to, write == KERN_ADD ? kern_get(to) + sum : sum);
  }
};

/* Partial sums of a stretch of rows, or the gradient itself where there is one stretch. */
struct logits_dweight {
  float *to;
  int64_t experts, c;
  kern_write write;

  __device__ void operator()(int64_t stretch, int64_t e, int64_t at, float sum) const {
    float *const one = to + (stretch * experts + e) * c + at;
    *one = write == KERN_ADD ? *one + sum : sum;
  }
};

core_status kern_router_logits_cuda(kern_context *context, core_tensor x, core_tensor weight,
                                    core_tensor bias, core_tensor logits) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, KERN_ANY, c);
  const int64_t experts = weight.shape[0];
  if (bias.data != NULL) KERN_CHECK_REAL(bias, experts);
  KERN_CHECK_REAL(logits, rows, experts);
  const logits_done done = {kern_data<const float>(bias), kern_data<float>(logits), experts};
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return kern_tile_gemm_priv<KERN_NT>(context, op, kern_operand_of(kern_data<const T>(x), rows, c, c),
                                        kern_operand_of(kern_data<const float>(weight), experts, c, c), 1,
                                        done);
  });
}

/* Rows are cut into stretches so that all tiles of dweight together fill the device. */
template <typename T>
static core_status dweight_run(kern_context *context, core_tensor dlogits, core_tensor x,
                               core_tensor dweight) {
  const int64_t rows = x.shape[0], c = x.shape[1], experts = dlogits.shape[1];
  const int64_t tiles = kern_divide_up(experts, KERN_GEMM_TILE) * kern_divide_up(c, KERN_GEMM_TILE);
  const int64_t fair = kern_least(KERN_PARTIALS / tiles, kern_divide_up(rows, 8 * KERN_GEMM_INNER));
  const int64_t stretches = fair > 1 ? fair : 1;
  float *const out = stretches > 1 ? context->partial : kern_data<float>(dweight);
  const logits_dweight done = {out, experts, c, stretches > 1 ? KERN_SET : KERN_ADD};
  TRY(kern_tile_gemm_priv<KERN_TN>(context, __func__,
                                   kern_operand_of(kern_data<const float>(dlogits), experts, rows, experts),
                                   kern_operand_of(kern_data<const T>(x), c, rows, c), stretches, done));
  if (stretches > 1)
    TRY(kern_combine_partials_priv(context, out, stretches, experts * c, experts * c,
                                   kern_data<float>(dweight)));
  return CORE_OK;
}

core_status kern_router_logits_bwd_cuda(kern_context *context, core_tensor dlogits, core_tensor x,
                                        core_tensor weight, kern_write write, core_tensor dx,
                                        core_tensor dweight, core_tensor dbias) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(dlogits, rows, KERN_ANY);
  const int64_t experts = dlogits.shape[1];
  KERN_CHECK_REAL(weight, experts, c);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, experts, c);
  if (dbias.data != NULL) KERN_CHECK_REAL(dbias, experts);
  if (rows == 0 || c == 0) return CORE_OK;
  const char *const op = __func__;
  TRY(kern_with_active(x.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    const logits_dx<T> done = {kern_data<T>(dx), c, write};
    TRY(kern_tile_gemm_priv<KERN_NN>(
        context, op, kern_operand_of(kern_data<const float>(dlogits), rows, experts, experts),
        kern_operand_of(kern_data<const float>(weight), c, experts, c), 1, done));
    if (experts > 0 && dweight.data != NULL) TRY(dweight_run<T>(context, dlogits, x, dweight));
    return CORE_OK;
  }));
  if (dbias.data != NULL) TRY(kern_sum_rows_priv(context, dlogits, NULL, 1, rows, kern_data<float>(dbias)));
  return CORE_OK;
}
