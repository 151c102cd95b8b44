/* Bias of a linear layer: added to rows in place; its gradient is the sum over rows. */
#include "cuda_vector.cuh"

template <typename T>
struct bias_add {
  const float *bias;
  T *x;
  int64_t c;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    float sum[V], add[V];
    kern_load(x + row * c + at, sum);
    kern_load(bias + at, add);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += add[i];
    kern_store(x + row * c + at, sum);
  }
};

core_status kern_bias_fwd_cuda(kern_context *context, core_tensor bias, core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(bias, c);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bias_add<T> add = {kern_data<const float>(bias), kern_data<T>(x), c};
    return kern_rows_priv<kern_vector<T>>(context, op, add, rows, c, kern_aligned({x.data, bias.data}));
  });
}

core_status kern_bias_bwd_cuda(kern_context *context, core_tensor dy, core_tensor dbias) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(dbias, dy.shape[1]);
  TRY(kern_sum_rows_priv(context, dy, NULL, 1, dy.shape[0], kern_data<float>(dbias)));
  return CORE_OK;
}
