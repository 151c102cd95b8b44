/* Flat arrays: sum of squares, conversion, y += alpha x, x *= alpha, x = value. */
#include "cuda_vector.cuh"

template <typename T>
struct axpy_each {
  float alpha;
  const T *x;
  T *y;

  template <int V>
  __device__ void run(int64_t at) const {
    float from[V], to[V];
    kern_load(x + at, from);
    kern_load(y + at, to);
#pragma unroll
    for (int i = 0; i < V; i++) to[i] += alpha * from[i];
    kern_store(y + at, to);
  }
};

struct scale_each {
  float alpha;
  float *x;

  template <int V>
  __device__ void run(int64_t at) const {
    float value[V];
    kern_load(x + at, value);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] *= alpha;
    kern_store(x + at, value);
  }
};

template <typename T>
struct fill_each {
  float value;
  T *x;

  template <int V>
  __device__ void run(int64_t at) const {
    float all[V];
#pragma unroll
    for (int i = 0; i < V; i++) all[i] = value;
    kern_store(x + at, all);
  }
};

template <typename From, typename To>
struct cast_each {
  const From *x;
  To *y;

  template <int V>
  __device__ void run(int64_t at) const {
    float value[V];
    kern_load(x + at, value);
    kern_store(y + at, value);
  }
};

/* partial[blockIdx.x] = sum of squares of every gridDim.x-th stretch of 4 KERN_BLOCK elements. The order does
 * not depend on alignment, which only decides how four elements are read. */
template <int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    squares_kernel(const float *x, int64_t count, double *partial) {
  double sum = 0;
  for (int64_t at = ((int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x) * 4; at < count;
       at += (int64_t)gridDim.x * KERN_BLOCK * 4) {
    float four[4] = {};
    if (V == 4 && at + 4 <= count) {
      kern_load(x + at, four);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (at + i < count) four[i] = x[at + i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sum += (double)four[i] * (double)four[i];
  }
  sum = kern_team_sum<KERN_BLOCK>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

core_status kern_sum_squares_cuda(kern_context *context, core_tensor x, core_tensor out) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK(out, CORE_FLOAT64, 1);
  const int64_t count = core_tensor_count(&x);
  if (count == 0) return CORE_OK;
  const int64_t blocks = kern_least(kern_divide_up(count, 16 * KERN_BLOCK), 4 * KERN_PARTIALS);
  KERN_LAUNCH(context, kern_grid(blocks, dim3(KERN_BLOCK)),
              kern_aligned({x.data}) ? squares_kernel<4> : squares_kernel<1>, kern_data<const float>(x),
              count, context->sums);
  TRY(kern_sum_doubles_priv(context, context->sums, blocks, kern_data<double>(out)));
  return CORE_OK;
}

core_status kern_cast_cuda(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK_ACTIVE(y, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  const int64_t count = core_tensor_count(&x);
  CHECK(core_tensor_count(&y) == count, CORE_ERR_ARGUMENT, "%s: x has %lld elements, y %lld", __func__,
        (long long)count, (long long)core_tensor_count(&y));
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto from) {
    return kern_with_active(y.dtype, [&](auto to) {
      const cast_each<decltype(from), decltype(to)> cast = {kern_data<const decltype(from)>(x),
                                                            kern_data<decltype(to)>(y)};
      return kern_flat_priv<8>(context, op, cast, count, kern_aligned({x.data, y.data}));
    });
  });
}

core_status kern_axpy_cuda(kern_context *context, double alpha, core_tensor x, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(y, x);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const axpy_each<T> each = {(float)alpha, kern_data<const T>(x), kern_data<T>(y)};
    return kern_flat_priv<kern_vector<T>>(context, op, each, core_tensor_count(&x),
                                          kern_aligned({x.data, y.data}));
  });
}

core_status kern_scale_cuda(kern_context *context, double alpha, core_tensor x) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  const scale_each each = {(float)alpha, kern_data<float>(x)};
  return kern_flat_priv<4>(context, __func__, each, core_tensor_count(&x), kern_aligned({x.data}));
}

core_status kern_fill_cuda(kern_context *context, double value, core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const fill_each<T> each = {(float)value, kern_data<T>(x)};
    return kern_flat_priv<kern_vector<T>>(context, op, each, core_tensor_count(&x), kern_aligned({x.data}));
  });
}
