/* Rows to unit length, with a floor: y = x / max(|x|, 1e-12). dx = (dy - y <y, dy>) / |x|; below the floor y
 * is linear in x. */
#include "cuda_vector.cuh"

#define L2_FLOOR 1e-12f

template <typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    l2_forward(const float *x, float *y, float *norm, int64_t rows, int64_t c) {
  constexpr int N = W::N, V = W::V;
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float held[N][V] = {}, sum = 0;
    W::load(x + row * c, c, held);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < V; i++) sum += held[n][i] * held[n][i];
    const float length = sqrtf(kern_team_sum<W::THREADS>(sum));
    if (threadIdx.x % W::THREADS == 0) norm[row] = length;
    const float inverse = 1.0f / (length < L2_FLOOR ? L2_FLOOR : length);
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
#pragma unroll
      for (int i = 0; i < V; i++) held[n][i] *= inverse;
      kern_store(y + row * c + W::column(n), held[n]);
    }
  }
}

template <typename T, typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    l2_backward(const float *dy, const float *y, const float *norm, kern_write write, T *dx, int64_t rows,
                int64_t c) {
  constexpr int N = W::N, V = W::V;
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float d[N][V] = {}, at[N][V] = {}, dot = 0;
    W::load(dy + row * c, c, d);
    W::load(y + row * c, c, at);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < V; i++) dot += d[n][i] * at[n][i];
    dot = kern_team_sum<W::THREADS>(dot);
    const bool floored = norm[row] < L2_FLOOR;
    const float inverse = 1.0f / (floored ? L2_FLOOR : norm[row]);
    if (floored) dot = 0;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
#pragma unroll
      for (int i = 0; i < V; i++) d[n][i] = (d[n][i] - at[n][i] * dot) * inverse;
      kern_put(dx + row * c + W::column(n), write, d[n]);
    }
  }
}

core_status kern_l2norm_fwd_cuda(kern_context *context, core_tensor x, core_tensor y, core_tensor norm) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(norm, rows);
  KERN_CHECK_LIMIT("width", c, KERN_MAX_NORM_WIDTH);
  return kern_with_team<float>(c, kern_aligned({x.data, y.data}), [&](auto team) -> core_status {
    using W = decltype(team);
    KERN_LAUNCH(context, kern_team_grid<W>(rows, KERN_BLOCKS_MOST), l2_forward<W>, kern_data<const float>(x),
                kern_data<float>(y), kern_data<float>(norm), rows, c);
    return CORE_OK;
  });
}

core_status kern_l2norm_bwd_cuda(kern_context *context, core_tensor dy, core_tensor y, core_tensor norm,
                                 kern_write write, core_tensor dx) {
  KERN_CHECK_REAL(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], c = y.shape[1];
  KERN_CHECK_LIKE(dy, y);
  KERN_CHECK_REAL(norm, rows);
  KERN_CHECK_ACTIVE(dx, rows, c);
  KERN_CHECK_LIMIT("width", c, KERN_MAX_NORM_WIDTH);
  return kern_with_active(dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = kern_aligned({dy.data, y.data, dx.data});
    return kern_with_team<float>(c, aligned, [&](auto team) -> core_status {
      using W = decltype(team);
      KERN_LAUNCH(context, kern_team_grid<W>(rows, KERN_BLOCKS_MOST), (l2_backward<T, W>),
                  kern_data<const float>(dy), kern_data<const float>(y), kern_data<const float>(norm), write,
                  kern_data<T>(dx), rows, c);
      return CORE_OK;
    });
  });
}
