/* SwiGLU: y = silu(gate) * up on rows [gate | up]. */
#include "cuda_math.cuh"

template <typename T>
struct swiglu_forward {
  const T *x;
  T *y;
  int64_t f;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    float gate[V], up[V];
    kern_load(x + row * 2 * f + at, gate);
    kern_load(x + row * 2 * f + f + at, up);
#pragma unroll
    for (int i = 0; i < V; i++) up[i] *= gate[i] * kern_sigmoid(gate[i]);
    kern_store(y + row * f + at, up);
  }
};

/* silu' = s + g s (1 - s), s = sigmoid(g). */
template <typename T>
struct swiglu_backward {
  const T *dy, *x;
  T *dx;
  int64_t f;
  kern_write write;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    const int64_t low = row * 2 * f + at, high = low + f;
    float gate[V], up[V], d[V];
    kern_load(x + low, gate);
    kern_load(x + high, up);
    kern_load(dy + row * f + at, d);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float s = kern_sigmoid(gate[i]), silu = gate[i] * s;
      gate[i] = d[i] * up[i] * (s + silu * (1.0f - s));
      up[i] = d[i] * silu;
    }
    kern_put(dx + low, write, gate);
    kern_put(dx + high, write, up);
  }
};

core_status kern_swiglu_fwd_cuda(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_ACTIVE(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], f = y.shape[1];
  KERN_CHECK(x, y.dtype, rows, 2 * f);
  const char *const op = __func__;
  return kern_with_active(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const swiglu_forward<T> forward = {kern_data<const T>(x), kern_data<T>(y), f};
    return kern_rows_priv<kern_vector<T>>(context, op, forward, rows, f, kern_aligned({x.data, y.data}));
  });
}

core_status kern_swiglu_bwd_cuda(kern_context *context, core_tensor dy, core_tensor x, kern_write write,
                                 core_tensor dx) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  const int64_t rows = dy.shape[0], f = dy.shape[1];
  KERN_CHECK(x, dy.dtype, rows, 2 * f);
  KERN_CHECK(dx, dy.dtype, rows, 2 * f);
  const char *const op = __func__;
  return kern_with_active(dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const swiglu_backward<T> backward = {kern_data<const T>(dy), kern_data<const T>(x), kern_data<T>(dx), f,
                                         write};
    return kern_rows_priv<kern_vector<T>>(context, op, backward, rows, f,
                                          kern_aligned({dy.data, x.data, dx.data}));
  });
}
