/* Cross entropy of rows of logits against one target each; -1 counts nothing. */
#include "cuda_math.cuh"

template <int THREADS, int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    entropy_forward(const float *logits, const int32_t *target, float *lse, float *loss, int64_t rows,
                    int64_t n, kern_fault fault) {
  const int64_t row = (int64_t)blockIdx.x * (KERN_BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  if (THREADS <= 32 && row >= rows) return; /* whole warps */
  const float *const x = logits + row * n;
  kern_logsum sum;
#pragma unroll 4
  for (int64_t at = (int64_t)lane * V; at < n; at += THREADS * V) {
    float value[V];
    kern_load(x + at, value);
    sum.add(value);
  }
  const float value = n > 0 ? kern_team_logsum<THREADS>(sum).value() : 0.0f;
  if (lane != 0) return;
  const int64_t at = target[row];
  lse[row] = value;
  loss[row] = at != -1 && fault.inside(at, 0, n) ? value - x[at] : 0.0f;
}

struct entropy_backward {
  float weight;
  const float *lse;
  const int32_t *target;
  float *x;
  int64_t n;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    const int64_t own = target[row];
    const float from = lse[row];
    const bool counted = own != -1 && fault.inside(own, 0, n);
    float value[V];
    kern_load(x + row * n + at, value);
#pragma unroll
    for (int i = 0; i < V; i++)
      value[i] = counted ? weight * expf(value[i] - from) - (at + i == own ? weight : 0.0f) : 0.0f;
    kern_store(x + row * n + at, value);
  }
};

core_status kern_cross_entropy_fwd_cuda(kern_context *context, core_tensor logits, core_tensor target,
                                        core_tensor lse, core_tensor loss) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK(target, CORE_INT32, rows);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK_REAL(loss, rows);
  const bool vectors = n % 4 == 0 && kern_aligned({logits.data}), wide = n > 1024;
  const auto kernel = vectors ? (wide ? entropy_forward<KERN_BLOCK, 4> : entropy_forward<32, 4>)
                              : (wide ? entropy_forward<KERN_BLOCK, 1> : entropy_forward<32, 1>);
  KERN_LAUNCH(context, kern_grid(wide ? rows : kern_divide_up(rows, KERN_BLOCK / 32), dim3(KERN_BLOCK)),
              kernel, kern_data<const float>(logits), kern_data<const int32_t>(target), kern_data<float>(lse),
              kern_data<float>(loss), rows, n, kern_cuda_fault_priv(KERN_CUDA_OP_cross_entropy_fwd));
  return CORE_OK;
}

core_status kern_cross_entropy_bwd_cuda(kern_context *context, double weight, core_tensor lse,
                                        core_tensor target, core_tensor logits) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK(target, CORE_INT32, rows);
  const entropy_backward backward = {(float)weight,
                                     kern_data<const float>(lse),
                                     kern_data<const int32_t>(target),
                                     kern_data<float>(logits),
                                     n,
                                     kern_cuda_fault_priv(KERN_CUDA_OP_cross_entropy_bwd)};
  return kern_rows_priv<4>(context, __func__, backward, rows, n, kern_aligned({logits.data}));
}
