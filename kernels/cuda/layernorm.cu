/* LayerNorm, population variance. With h = (x - mean) r and g = w dy:
 * dx = r (g - mean(g) - h mean(g h)); dweight = sum dy h; dbias = sum dy. A row lies in the registers of its
 * team, so the variance is of shifted values and costs no second read. */
#include "cuda_vector.cuh"

template <typename T, typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    layer_forward(const T *x, const float *weight, const float *bias, float epsilon, T *y, float *stat,
                  int64_t rows, int64_t c) {
  constexpr int N = W::N, V = W::V;
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float held[N][V] = {}, sum = 0, square = 0;
    W::load(x + row * c, c, held);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < V; i++) sum += held[n][i];
    const float mean = kern_team_sum<W::THREADS>(sum) / (float)c;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
#pragma unroll
      for (int i = 0; i < V; i++) {
        held[n][i] -= mean;
        square += held[n][i] * held[n][i];
      }
    }
    const float r = 1.0f / sqrtf(kern_team_sum<W::THREADS>(square) / (float)c + epsilon);
    if (threadIdx.x % W::THREADS == 0) stat[2 * row] = mean, stat[2 * row + 1] = r;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
      float w[V], b[V];
      kern_load(weight + W::column(n), w);
      kern_load(bias + W::column(n), b);
#pragma unroll
      for (int i = 0; i < V; i++) held[n][i] = held[n][i] * r * w[i] + b[i];
      kern_store(y + row * c + W::column(n), held[n]);
    }
  }
}

/* Leaves the sums over the block's rows in partial[blockIdx.x][dweight | dbias]. */
template <typename T, typename W>
static __global__ void __launch_bounds__(W::BLOCK)
    layer_backward(const T *dy, const T *x, const float *weight, const float *stat, kern_write write, T *dx,
                   float *partial, int64_t rows, int64_t c) {
  constexpr int N = W::N, V = W::V;
  float dweight[N][V] = {}, dbias[N][V] = {};
  for (int64_t row = W::first(); row < rows; row += W::stride()) {
    float d[N][V] = {}, h[N][V] = {}, sum = 0, dot = 0;
    W::load(dy + row * c, c, d);
    W::load(x + row * c, c, h);
    const float mean = stat[2 * row], r = stat[2 * row + 1];
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
      float w[V];
      kern_load(weight + W::column(n), w);
#pragma unroll
      for (int i = 0; i < V; i++) {
        h[n][i] = (h[n][i] - mean) * r;
        dweight[n][i] += d[n][i] * h[n][i];
        dbias[n][i] += d[n][i];
        d[n][i] *= w[i];
        sum += d[n][i];
        dot += d[n][i] * h[n][i];
      }
    }
    sum = kern_team_sum<W::THREADS>(sum) / (float)c;
    dot = kern_team_sum<W::THREADS>(dot) / (float)c;
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (W::column(n) >= c) break;
#pragma unroll
      for (int i = 0; i < V; i++) d[n][i] = r * (d[n][i] - sum - h[n][i] * dot);
      kern_put(dx + row * c + W::column(n), write, d[n]);
    }
  }
  kern_block_partial<W>(dweight, c, partial + blockIdx.x * 2 * c);
  kern_block_partial<W>(dbias, c, partial + blockIdx.x * 2 * c + c);
}

core_status kern_layernorm_fwd_cuda(kern_context *context, core_tensor x, core_tensor weight,
                                    core_tensor bias, double epsilon, core_tensor y, core_tensor stat) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(weight, c);
  KERN_CHECK_REAL(bias, c);
  KERN_CHECK_LIKE(y, x);
  KERN_CHECK_REAL(stat, rows, 2);
  KERN_CHECK_LIMIT("width", c, KERN_MAX_NORM_WIDTH);
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = kern_aligned({x.data, weight.data, bias.data, y.data});
    return kern_with_team<T>(c, aligned, [&](auto team) -> core_status {
      using W = decltype(team);
      KERN_LAUNCH(context, kern_team_grid<W>(rows, KERN_BLOCKS_MOST), (layer_forward<T, W>),
                  kern_data<const T>(x), kern_data<const float>(weight), kern_data<const float>(bias),
                  (float)epsilon, kern_data<T>(y), kern_data<float>(stat), rows, c);
      return CORE_OK;
    });
  });
}

core_status kern_layernorm_bwd_cuda(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
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
  KERN_CHECK_LIMIT("width", c, kern_least(context->limits.width, KERN_MAX_NORM_WIDTH));
  if (rows == 0 || c == 0) return CORE_OK;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = kern_aligned({dy.data, x.data, weight.data, dx.data});
    return kern_with_team<T>(c, aligned, [&](auto team) -> core_status {
      using W = decltype(team);
      const kern_grid grid = kern_team_grid<W>(rows, KERN_PARTIALS, kern_partial_bytes<W>(c));
      KERN_LAUNCH(context, grid, (layer_backward<T, W>), kern_data<const T>(dy), kern_data<const T>(x),
                  kern_data<const float>(weight), kern_data<const float>(stat), write, kern_data<T>(dx),
                  context->partial, rows, c);
      const float *partial = context->partial;
      if (dweight.data != NULL)
        TRY(kern_combine_partials_priv(context, partial, grid.x, 2 * c, c, kern_data<float>(dweight)));
      if (dbias.data != NULL)
        TRY(kern_combine_partials_priv(context, partial + c, grid.x, 2 * c, c, kern_data<float>(dbias)));
      return CORE_OK;
    });
  });
}
