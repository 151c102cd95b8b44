/* Squared and smooth absolute differences of rows, and their gradients. */
#include "cuda_vector.cuh"

struct regression_rows {
  kern_regression kind;
  float weight, share; /* of a coordinate in its row's loss */
  const float *prediction, *target;
  const uint8_t *valid;
  float *loss;
  int64_t rows, d;
};

/* Value and derivative of one coordinate; NaN stays. */
static __device__ __forceinline__ float coordinate(kern_regression kind, float d, float *derivative) {
  if (kind == KERN_SQUARED) {
    *derivative = 2.0f * d;
    return d * d;
  }
  const float size = fabsf(d);
  *derivative = size < 1.0f ? d : d > 0 ? 1.0f : d < 0 ? -1.0f : d;
  return size < 1.0f ? 0.5f * d * d : size - 0.5f;
}

/* A team a row; gradient: [rows, d] or NULL. */
template <typename T, int THREADS, int V>
static __global__ void __launch_bounds__(KERN_BLOCK) regression_kernel(regression_rows job, T *gradient) {
  const int64_t row = (int64_t)blockIdx.x * (KERN_BLOCK / THREADS) + threadIdx.x / THREADS;
  if (THREADS <= 32 && row >= job.rows) return; /* whole warps */
  const bool counts = job.valid[row] != 0;
  float sum = 0;
  for (int64_t at = threadIdx.x % THREADS * V; at < job.d; at += THREADS * V) {
    float p[V], t[V];
    kern_load(job.prediction + row * job.d + at, p);
    kern_load(job.target + row * job.d + at, t);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float derivative;
      const float value = coordinate(job.kind, p[i] - t[i], &derivative);
      sum += counts ? value : 0.0f;
      p[i] = counts ? job.weight * job.share * derivative : 0.0f;
    }
    if (gradient != NULL) kern_store(gradient + row * job.d + at, p);
  }
  sum = kern_team_sum<THREADS>(sum);
  if (threadIdx.x % THREADS == 0) job.loss[row] = sum * job.share;
}

core_status kern_regression_cuda(kern_context *context, kern_regression kind, double weight,
                                 core_tensor prediction, core_tensor target, core_tensor valid,
                                 core_tensor loss, core_tensor dprediction) {
  KERN_CHECK_REAL(prediction, KERN_ANY, KERN_ANY);
  const int64_t rows = prediction.shape[0], d = prediction.shape[1];
  KERN_CHECK_LIKE(target, prediction);
  KERN_CHECK(valid, CORE_UINT8, rows);
  KERN_CHECK_REAL(loss, rows);
  if (dprediction.data != NULL) KERN_CHECK_ACTIVE(dprediction, rows, d);
  const float share = kind == KERN_SQUARED || d == 0 ? 1.0f : 1.0f / (float)d;
  const regression_rows job = {kind,
                               (float)weight,
                               share,
                               kern_data<const float>(prediction),
                               kern_data<const float>(target),
                               kern_data<const uint8_t>(valid),
                               kern_data<float>(loss),
                               rows,
                               d};
  const bool vectors = d % 4 == 0 && kern_aligned({prediction.data, target.data, dprediction.data});
  const bool wide = d > 1024;
  return kern_with_active(dprediction.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    const auto kernel = vectors ? (wide ? regression_kernel<T, KERN_BLOCK, 4> : regression_kernel<T, 32, 4>)
                                : (wide ? regression_kernel<T, KERN_BLOCK, 1> : regression_kernel<T, 32, 1>);
    KERN_LAUNCH(context, kern_grid(wide ? rows : kern_divide_up(rows, KERN_BLOCK / 32), dim3(KERN_BLOCK)),
                kernel, job, kern_data<T>(dprediction));
    return CORE_OK;
  });
}
