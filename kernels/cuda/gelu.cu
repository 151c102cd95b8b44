/* GELU, erf and tanh forms; (1 + tanh(u)) / 2 is computed as sigmoid(2u), which does not cancel. An element
 * is read before it is written, by one thread, so input and output may be one array. */
#include "cuda_math.cuh"

/* 2 sqrt(2 / pi) and the cubic coefficient of the tanh form. */
#define GELU_TWICE_ROOT 1.59576912160573071176f
#define GELU_CUBE 0.044715f

struct gelu_erf {
  __device__ static float value(float x) {
    return x * kern_normal_below(x);
  }
  __device__ static float slope(float x) {
    return kern_normal_below(x) + x * kern_normal_density(x);
  }
};

struct gelu_tanh {
  __device__ static float value(float x) {
    return x * kern_sigmoid(GELU_TWICE_ROOT * (x + GELU_CUBE * x * x * x));
  }
  __device__ static float slope(float x) {
    const float square = x * x;
    const float below = kern_sigmoid(GELU_TWICE_ROOT * (x + GELU_CUBE * square * x));
    return below + x * below * (1.0f - below) * GELU_TWICE_ROOT * (1.0f + 3.0f * GELU_CUBE * square);
  }
};

template <typename T, typename Form>
struct gelu_forward {
  const T *x;
  T *y;

  template <int V>
  __device__ void run(int64_t at) const {
    float value[V];
    kern_load(x + at, value);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] = Form::value(value[i]);
    kern_store(y + at, value);
  }
};

template <typename T, typename Form>
struct gelu_backward {
  const T *dy, *x;
  T *dx;
  kern_write write;

  template <int V>
  __device__ void run(int64_t at) const {
    float value[V], d[V];
    kern_load(x + at, value);
    kern_load(dy + at, d);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] = d[i] * Form::slope(value[i]);
    kern_put(dx + at, write, value);
  }
};

core_status kern_gelu_fwd_cuda(kern_context *context, kern_gelu form, core_tensor x, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(y, x);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = core_tensor_count(&x);
    const bool aligned = kern_aligned({x.data, y.data});
    const gelu_forward<T, gelu_erf> erf_form = {kern_data<const T>(x), kern_data<T>(y)};
    const gelu_forward<T, gelu_tanh> tanh_form = {kern_data<const T>(x), kern_data<T>(y)};
    return form == KERN_GELU_ERF ? kern_flat_priv<kern_vector<T>>(context, op, erf_form, count, aligned)
                                 : kern_flat_priv<kern_vector<T>>(context, op, tanh_form, count, aligned);
  });
}

core_status kern_gelu_bwd_cuda(kern_context *context, kern_gelu form, core_tensor dy, core_tensor x,
                               kern_write write, core_tensor dx) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(dy, x);
  KERN_CHECK_LIKE(dx, x);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = core_tensor_count(&x);
    const bool aligned = kern_aligned({dy.data, x.data, dx.data});
    const gelu_backward<T, gelu_erf> erf_form = {kern_data<const T>(dy), kern_data<const T>(x),
                                                 kern_data<T>(dx), write};
    const gelu_backward<T, gelu_tanh> tanh_form = {kern_data<const T>(dy), kern_data<const T>(x),
                                                   kern_data<T>(dx), write};
    return form == KERN_GELU_ERF ? kern_flat_priv<kern_vector<T>>(context, op, erf_form, count, aligned)
                                 : kern_flat_priv<kern_vector<T>>(context, op, tanh_form, count, aligned);
  });
}
