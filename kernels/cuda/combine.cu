/* Weighted un-permutation by an inverse map: every output row is written by one team, so there are no atomics
 * and the sum over k has one order. */
#include "cuda_vector.cuh"

template <typename T>
struct combine_row {
  const T *x;
  const int32_t *slot; /* [T,K] */
  const float *weight; /* [T,K] or NULL */
  T *y;
  int64_t rows, k, c; /* rows of x */
  kern_write write;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    float sum[V] = {};
    if (write == KERN_ADD) kern_load(y + row * c + at, sum);
#pragma unroll 4
    for (int64_t i = row * k; i < (row + 1) * k; i++) {
      const int64_t from = slot[i];
      if (from == -1 || !fault.inside(from, 0, rows)) continue;
      float value[V];
      kern_load(x + from * c + at, value);
      const float by = weight != NULL ? weight[i] : 1.0f;
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += by * value[j];
    }
    kern_store(y + row * c + at, sum);
  }
};

/* A team a row of dy. dx may be x: a vector is read before its gradient is written, by one thread. */
template <typename T, int THREADS, int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    combine_backward(const T *dy, const T *x, const int32_t *slot, const float *weight, T *dx, float *dweight,
                     int64_t tokens, int64_t rows, int64_t k, int64_t c, kern_fault fault) {
  const int64_t token = (int64_t)blockIdx.x * (KERN_BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  if (THREADS <= 32 && token >= tokens) return; /* whole warps */
  for (int64_t i = token * k; i < (token + 1) * k; i++) {
    const int64_t to = slot[i];
    const bool there = to != -1 && fault.inside(to, 0, rows);
    const float by = weight != NULL ? weight[i] : 1.0f;
    float dot = 0;
    for (int64_t at = (int64_t)lane * V; there && at < c; at += THREADS * V) {
      float d[V], value[V];
      kern_load(dy + token * c + at, d);
      kern_load(x + to * c + at, value);
#pragma unroll
      for (int j = 0; j < V; j++) {
        dot += d[j] * value[j];
        d[j] *= by;
      }
      kern_store(dx + to * c + at, d);
    }
    dot = kern_team_sum<THREADS>(dot);
    if (lane == 0 && dweight != NULL) dweight[i] = dot;
  }
}

core_status kern_combine_fwd_cuda(kern_context *context, core_tensor x, core_tensor slot, core_tensor weight,
                                  kern_write write, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = slot.shape[0], k = slot.shape[1];
  if (weight.data != NULL) KERN_CHECK_REAL(weight, rows, k);
  KERN_CHECK(y, x.dtype, rows, c);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const combine_row<T> combine = {kern_data<const T>(x),
                                    kern_data<const int32_t>(slot),
                                    kern_data<const float>(weight),
                                    kern_data<T>(y),
                                    x.shape[0],
                                    k,
                                    c,
                                    write,
                                    kern_cuda_fault_priv(KERN_CUDA_OP_combine_fwd)};
    return kern_rows_priv<kern_vector<T>>(context, op, combine, rows, c, kern_aligned({x.data, y.data}));
  });
}

core_status kern_combine_bwd_cuda(kern_context *context, core_tensor dy, core_tensor x, core_tensor slot,
                                  core_tensor weight, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t tokens = slot.shape[0], k = slot.shape[1];
  KERN_CHECK(dy, x.dtype, tokens, c);
  if (weight.data != NULL) KERN_CHECK_REAL(weight, tokens, k);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, tokens, k);
  return kern_with_active(x.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    constexpr int V = kern_vector<T>;
    const bool vectors = c % V == 0 && kern_aligned({dy.data, x.data, dx.data});
    const bool wide = c > 32 * 8 * V;
    const auto kernel = vectors ? (wide ? combine_backward<T, KERN_BLOCK, V> : combine_backward<T, 32, V>)
                                : (wide ? combine_backward<T, KERN_BLOCK, 1> : combine_backward<T, 32, 1>);
    const int64_t blocks = wide ? tokens : kern_divide_up(tokens, KERN_BLOCK / 32);
    KERN_LAUNCH(context, kern_grid(blocks, dim3(KERN_BLOCK)), kernel, kern_data<const T>(dy),
                kern_data<const T>(x), kern_data<const int32_t>(slot), kern_data<const float>(weight),
                kern_data<T>(dx), kern_data<float>(dweight), tokens, x.shape[0], k, c,
                kern_cuda_fault_priv(KERN_CUDA_OP_combine_bwd));
    return CORE_OK;
  });
}
