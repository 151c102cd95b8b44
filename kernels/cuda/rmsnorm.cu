/* RMSNorm. With r = inv: dx = r (w dy) - x r^3 / C <w dy, x>; dweight = sum over rows of dy x r. A row lies
 * in the registers of its team, so everything is read once. */
#include "cuda_vector.cuh"

template <typename T, typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    rms_forward(const T *x, const float *weight, float epsilon, T *y, float *inv, int64_t rows, int64_t c) {
  constexpr int N = W::N, V = W::V;
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float held[N][V] = {}, sum = 0;
    W::load(x + row * c, c, held);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < V; i++) sum += held[n][i] * held[n][i];
    sum = kern_team_sum<W::THREADS>(sum);
    const float r = 1.0f / sqrtf(sum / (float)c + epsilon);
    if (threadIdx.x % W::THREADS == 0) inv[row] = r;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
      float w[V];
      kern_load(weight + W::column(n), w);
#pragma unroll
      for (int i = 0; i < V; i++) held[n][i] *= r * w[i];
      kern_store(y + row * c + W::column(n), held[n]);
    }
  }
}

/* Leaves dweight's sum over the block's rows in partial[blockIdx.x][c]. */
template <typename T, typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    rms_backward(const T *dy, const T *x, const float *weight, const float *inv, kern_write write, T *dx,
                 float *partial, int64_t rows, int64_t c) {
  constexpr int N = W::N, V = W::V;
  float dweight[N][V] = {};
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float d[N][V] = {}, held[N][V] = {}, dot = 0;
    W::load(dy + row * c, c, d);
    W::load(x + row * c, c, held);
    const float r = inv[row];
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
      float w[V];
      kern_load(weight + W::column(n), w);
#pragma unroll
      for (int i = 0; i < V; i++) {
        dweight[n][i] += d[n][i] * held[n][i] * r;
        d[n][i] *= w[i];
        dot += d[n][i] * held[n][i];
      }
    }
    dot = kern_team_sum<W::THREADS>(dot);
    const float along = dot * r * r * r / (float)c;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
#pragma unroll
      for (int i = 0; i < V; i++) d[n][i] = d[n][i] * r - held[n][i] * along;
      kern_put(dx + row * c + W::column(n), write, d[n]);
    }
  }
  kern_block_partial<W>(dweight, c, partial + blockIdx.x * c);
}

core_status kern_rmsnorm_fwd_cuda(kern_context *context, core_tensor x, core_tensor weight, double epsilon,
                                  core_tensor y, core_tensor inv) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK(y, x.dtype, rows, c);
  KERN_CHECK_REAL(inv, rows);
  KERN_CHECK_LIMIT("width", c, KERN_MAX_NORM_WIDTH);
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return kern_with_team<T>(c, kern_aligned({x.data, weight.data, y.data}), [&](auto team) -> core_status {
      using W = decltype(team);
      KERN_LAUNCH(context, kern_team_grid<W>(rows, KERN_BLOCKS_MOST), (rms_forward<T, W>),
                  kern_data<const T>(x), kern_data<const float>(weight), (float)epsilon, kern_data<T>(y),
                  kern_data<float>(inv), rows, c);
      return CORE_OK;
    });
  });
}

core_status kern_rmsnorm_bwd_cuda(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                  core_tensor inv, kern_write write, core_tensor dx, core_tensor dweight) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(inv, rows);
  KERN_CHECK_LIKE(dx, x);
  if (dweight.data != NULL) KERN_CHECK_REAL(dweight, c);
  KERN_CHECK_LIMIT("width", c, kern_least(context->limits.width, KERN_MAX_NORM_WIDTH));
  if (rows == 0 || c == 0) return CORE_OK;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = kern_aligned({dy.data, x.data, weight.data, dx.data});
    return kern_with_team<T>(c, aligned, [&](auto team) -> core_status {
      using W = decltype(team);
      const kern_grid grid = kern_team_grid<W>(rows, KERN_PARTIALS, kern_partial_bytes<W>(c));
      KERN_LAUNCH(context, grid, (rms_backward<T, W>), kern_data<const T>(dy), kern_data<const T>(x),
                  kern_data<const float>(weight), kern_data<const float>(inv), write, kern_data<T>(dx),
                  context->partial, rows, c);
      if (dweight.data != NULL)
        TRY(kern_combine_partials_priv(context, context->partial, grid.x, c, c, kern_data<float>(dweight)));
      return CORE_OK;
    });
  });
}
