/* Softmax of rows of at most CORE_MAX_EXPERTS. */
#include "router_row.cuh"

template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    softmax_kernel(const float *logits, float *prob, int64_t rows, int experts) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  float p[R::N];
  R::load(logits, row, rows, experts, -INFINITY, p);
  kern_router_softmax<R>(p);
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (row < rows && R::expert(n) < experts) prob[row * experts + R::expert(n)] = p[n];
}

core_status kern_softmax_fwd_cuda(kern_context *context, core_tensor logits, core_tensor prob) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(prob, logits);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK_LIMIT("width", n, CORE_MAX_EXPERTS);
  return kern_with_router_row(n, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), softmax_kernel<R>,
                kern_data<const float>(logits), kern_data<float>(prob), rows, (int)n);
    return CORE_OK;
  });
}

template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    softmax_backward(const float *dprob, const float *prob, kern_write write, float *dlogits, int64_t rows,
                     int experts) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  float p[R::N], d[R::N], dot = 0;
  R::load(prob, row, rows, experts, 0.0f, p);
  R::load(dprob, row, rows, experts, 0.0f, d);
#pragma unroll
  for (int n = 0; n < R::N; n++) dot += p[n] * d[n];
  dot = R::sum(dot);
#pragma unroll
  for (int n = 0; n < R::N; n++) {
    if (row >= rows || R::expert(n) >= experts) continue;
    float *const to = dlogits + row * experts + R::expert(n);
    *to = (write == KERN_ADD ? *to : 0.0f) + p[n] * (d[n] - dot);
  }
}

core_status kern_softmax_bwd_cuda(kern_context *context, core_tensor dprob, core_tensor prob,
                                  kern_write write, core_tensor dlogits) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(dprob, prob);
  KERN_CHECK_LIKE(dlogits, prob);
  const int64_t rows = prob.shape[0], n = prob.shape[1];
  KERN_CHECK_LIMIT("width", n, CORE_MAX_EXPERTS);
  return kern_with_router_row(n, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), softmax_backward<R>,
                kern_data<const float>(dprob), kern_data<const float>(prob), write, kern_data<float>(dlogits),
                rows, (int)n);
    return CORE_OK;
  });
}
