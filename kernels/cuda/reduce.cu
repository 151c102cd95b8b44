/* Sums over rows for gradients of shared vectors: blocks leave partial sums, which a second kernel adds up in
 * the order of the blocks. */
#include "cuda_vector.cuh"

enum { LANES = 32, LINES = 8, COMBINE_LINES = 32 };

/* A block of LANES columns; COMBINE_LINES threads share a column's partials. */
template <typename T>
static __global__ void combine_kernel(const T *partial, int64_t count, int64_t stride, int64_t n, T *out) {
  __shared__ T line[COMBINE_LINES][LANES];
  const int64_t i = (int64_t)blockIdx.x * LANES + threadIdx.x;
  T sum = 0;
  if (i < n)
    for (int64_t p = threadIdx.y; p < count; p += COMBINE_LINES) sum += partial[p * stride + i];
  line[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= n) return;
  for (int l = 1; l < COMBINE_LINES; l++) sum += line[l][threadIdx.x];
  out[i] += sum;
}

template <typename T>
static core_status combine(const kern_context *context, const T *partial, int64_t count, int64_t stride,
                           int64_t n, T *out) {
  KERN_LAUNCH(context, kern_grid(kern_divide_up(n, LANES), dim3(LANES, COMBINE_LINES)), combine_kernel<T>,
              partial, count, stride, n, out);
  return CORE_OK;
}

core_status kern_combine_partials_priv(const kern_context *context, const float *partial, int64_t count,
                                       int64_t stride, int64_t n, float *out) {
  return combine(context, partial, count, stride, n, out);
}
core_status kern_combine_doubles_priv(const kern_context *context, const double *partial, int64_t count,
                                      int64_t stride, int64_t n, double *out) {
  return combine(context, partial, count, stride, n, out);
}

static __global__ void __launch_bounds__(KERN_BLOCK)
    sum_doubles_kernel(const double *partial, int64_t count, double *out) {
  double sum = 0;
#pragma unroll 4
  for (int64_t p = threadIdx.x; p < count; p += KERN_BLOCK) sum += partial[p];
  sum = kern_team_sum<KERN_BLOCK>(sum);
  if (threadIdx.x == 0) out[0] += sum;
}

core_status kern_sum_doubles_priv(const kern_context *context, const double *partial, int64_t count,
                                  double *out) {
  KERN_LAUNCH(context, kern_grid(1, dim3(KERN_BLOCK)), sum_doubles_kernel, partial, count, out);
  return CORE_OK;
}

/* A block: a stretch (blockIdx.x) of the rows of a group (blockIdx.z), LANES * V columns (blockIdx.y).
 * out[stretch][group][c]: partial sums, or the sums themselves where there is one stretch. */
template <typename T, int V>
static __global__ void __launch_bounds__(LANES *LINES)
    sum_rows_kernel(const T *x, const int64_t *offset, int64_t rows, int64_t c, kern_write write,
                    float *out) {
  __shared__ float line[LINES][V][LANES];
  const int64_t at = ((int64_t)blockIdx.y * LANES + threadIdx.x) * V;
  const int64_t first = offset != NULL ? offset[blockIdx.z] : 0;
  const int64_t last = offset != NULL ? offset[blockIdx.z + 1] : rows;
  const int64_t stretch = kern_divide_up(last - first, gridDim.x), begin = first + blockIdx.x * stretch;
  const int64_t end = kern_least(begin + stretch, last);
  float sum[V] = {};
  if (at < c) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += LINES) {
      float one[V];
      kern_load(x + row * c + at, one);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += one[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; i++) line[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || at >= c) return;
  for (int l = 1; l < LINES; l++)
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += line[l][i][threadIdx.x];
  kern_put(out + ((int64_t)blockIdx.x * gridDim.z + blockIdx.z) * c + at, write, sum);
}

template <typename T, int V>
static core_status sum_rows(const kern_context *context, const core_tensor &x, const int64_t *offset,
                            int64_t groups, int64_t stretches, kern_write write, float *out) {
  const int64_t c = x.shape[1];
  KERN_LAUNCH(context, kern_grid(stretches, dim3(LANES, LINES), kern_divide_up(c, LANES * V), 0, groups),
              sum_rows_kernel<T, V>, kern_data<const T>(x), offset, x.shape[0], c, write, out);
  return CORE_OK;
}

core_status kern_sum_rows_priv(const kern_context *context, const core_tensor &x, const int64_t *offset,
                               int64_t groups, int64_t longest, float *out) {
  const int64_t c = x.shape[1], table = groups * c;
  if (longest == 0 || table == 0) return CORE_OK;
  /* As many stretches as have rows enough and find room; one writes the sums itself. */
  const int64_t room = kern_least(context->partial_count / table, KERN_PARTIALS);
  const int64_t wanted = kern_least(kern_divide_up(longest, 4 * LINES), room);
  const int64_t stretches = wanted > 1 ? wanted : 1;
  const kern_write write = stretches > 1 ? KERN_SET : KERN_ADD;
  float *const to = stretches > 1 ? context->partial : out;
  TRY(kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kern_vector<T>;
    return kern_aligned({x.data, to}) && c % V == 0
               ? sum_rows<T, V>(context, x, offset, groups, stretches, write, to)
               : sum_rows<T, 1>(context, x, offset, groups, stretches, write, to);
  }));
  if (stretches > 1) TRY(kern_combine_partials_priv(context, to, stretches, table, table, out));
  return CORE_OK;
}
