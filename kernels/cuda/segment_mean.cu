/* Mean of each segment's rows. */
#include "cuda_vector.cuh"

template <typename T>
struct mean_forward {
  const int64_t *offset;
  const T *x;
  T *y;
  int64_t rows, c;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t segment, int64_t at) const {
    const kern_span span(offset, segment, rows, fault);
    float sum[V] = {};
#pragma unroll 4
    for (int64_t row = span.begin; row < span.end; row++) {
      float value[V];
      kern_load(x + row * c + at, value);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += value[i];
    }
    const float inverse = span.end > span.begin ? 1.0f / (float)(span.end - span.begin) : 0.0f;
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] *= inverse;
    kern_store(y + segment * c + at, sum);
  }
};

template <typename T>
struct mean_backward {
  const T *dy;
  T *dx;
  int64_t c;
  kern_write write;

  template <int V>
  __device__ void run(int64_t segment, const kern_span &span, int64_t row, int64_t at) const {
    const float inverse = 1.0f / (float)(span.end - span.begin);
    float value[V];
    kern_load(dy + segment * c + at, value);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] *= inverse;
    kern_put(dx + row * c + at, write, value);
  }
};

core_status kern_segment_mean_fwd_cuda(kern_context *context, kern_segments segments, core_tensor x,
                                       core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  TRY(kern_check_segments_cuda_priv(__func__, segments, rows, rows));
  KERN_CHECK(y, x.dtype, segments.count, c);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const mean_forward<T> mean = {
        kern_data<const int64_t>(segments.device_offset),   kern_data<const T>(x), kern_data<T>(y), rows, c,
        kern_cuda_fault_priv(KERN_CUDA_OP_segment_mean_fwd)};
    return kern_rows_priv<kern_vector<T>>(context, op, mean, segments.count, c,
                                          kern_aligned({x.data, y.data}));
  });
}

core_status kern_segment_mean_bwd_cuda(kern_context *context, kern_segments segments, core_tensor dy,
                                       kern_write write, core_tensor dx) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t rows = dx.shape[0], c = dx.shape[1];
  TRY(kern_check_segments_cuda_priv(__func__, segments, rows, rows));
  KERN_CHECK(dy, dx.dtype, segments.count, c);
  const char *const op = __func__;
  return kern_with_active(dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    const mean_backward<T> mean = {kern_data<const T>(dy), kern_data<T>(dx), c, write};
    return kern_segments_priv<kern_vector<T>>(context, op, mean, segments, rows, c,
                                              kern_cuda_fault_priv(KERN_CUDA_OP_segment_mean_bwd),
                                              kern_aligned({dy.data, dx.data}));
  });
}
