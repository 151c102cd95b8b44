/* Cross entropy of rows of logits against one target each, a part of the columns at a time; -1 counts
 * nothing. */
#include "cuda_math.cuh"

/* Columns [first, first + n) of `all`. */
struct entropy_columns {
  int64_t n, first, all;

  /* Where the target lies among them, -1: elsewhere or none. */
  __device__ int64_t place(int64_t target, const kern_fault &fault) const {
    if (target == -1 || !fault.inside(target, 0, all)) return -1;
    const int64_t own = target - first;
    return own >= 0 && own < n ? own : -1;
  }
};

template <int THREADS, int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    entropy_forward(const float *logits, const int32_t *target, float *lse, float *positive, int64_t rows,
                    entropy_columns columns, kern_fault fault) {
  const int64_t row = (int64_t)blockIdx.x * (KERN_BLOCK / THREADS) + threadIdx.x / THREADS, n = columns.n;
  const int lane = threadIdx.x % THREADS;
  if (THREADS <= 32 && row >= rows) return; /* whole warps */
  const float *const x = logits + row * n;
  kern_logsum sum;
  if (lane == 0) { /* what the columns before have given is one more term */
    const float before[1] = {lse[row]};
    sum.add(before);
  }
#pragma unroll 4
  for (int64_t at = (int64_t)lane * V; at < n; at += THREADS * V) {
    float value[V];
    kern_load(x + at, value);
    sum.add(value);
  }
  const float value = kern_team_logsum<THREADS>(sum).value();
  if (lane != 0) return;
  lse[row] = value;
  const int64_t own = columns.place(target[row], fault);
  if (own >= 0) positive[row] = x[own];
}

template <typename T>
struct entropy_backward {
  float weight;
  const float *lse;
  const int32_t *target;
  const float *x;
  T *dx; /* x itself, or of another type: an element is read by the thread that writes it */
  entropy_columns columns;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    const int64_t wanted = target[row], own = columns.place(wanted, fault);
    const float from = lse[row];
    const bool counted = wanted >= 0 && wanted < columns.all;
    float value[V];
    kern_load(x + row * columns.n + at, value);
#pragma unroll
    for (int i = 0; i < V; i++)
      value[i] = counted ? weight * (expf(value[i] - from) - (at + i == own ? 1.0f : 0.0f)) : 0.0f;
    kern_store(dx + row * columns.n + at, value);
  }
};

core_status kern_cross_entropy_fwd_cuda(kern_context *context, core_tensor logits, int64_t first, int64_t all,
                                        core_tensor target, core_tensor lse, core_tensor positive) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK(target, CORE_INT32, rows);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK_REAL(positive, rows);
  TRY(kern_check_columns_cuda_priv(__func__, first, n, all));
  if (n == 0) return CORE_OK;
  const entropy_columns columns = {n, first, all};
  const bool vectors = n % 4 == 0 && kern_aligned({logits.data}), wide = n > 1024;
  const auto kernel = vectors ? (wide ? entropy_forward<KERN_BLOCK, 4> : entropy_forward<32, 4>)
                              : (wide ? entropy_forward<KERN_BLOCK, 1> : entropy_forward<32, 1>);
  KERN_LAUNCH(context, kern_grid(wide ? rows : kern_divide_up(rows, KERN_BLOCK / 32), dim3(KERN_BLOCK)),
              kernel, kern_data<const float>(logits), kern_data<const int32_t>(target), kern_data<float>(lse),
              kern_data<float>(positive), rows, columns,
              kern_cuda_fault_priv(KERN_CUDA_OP_cross_entropy_fwd));
  return CORE_OK;
}

core_status kern_cross_entropy_bwd_cuda(kern_context *context, double weight, core_tensor lse, int64_t first,
                                        int64_t all, core_tensor target, core_tensor logits,
                                        core_tensor dlogits) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  KERN_CHECK_ACTIVE(dlogits, rows, n);
  KERN_CHECK_REAL(lse, rows);
  KERN_CHECK(target, CORE_INT32, rows);
  TRY(kern_check_columns_cuda_priv(__func__, first, n, all));
  const char *const op = __func__;
  return kern_with_active(dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const entropy_backward<T> backward = {(float)weight,
                                          kern_data<const float>(lse),
                                          kern_data<const int32_t>(target),
                                          kern_data<const float>(logits),
                                          kern_data<T>(dlogits),
                                          {n, first, all},
                                          kern_cuda_fault_priv(KERN_CUDA_OP_cross_entropy_bwd)};
    return kern_rows_priv<4>(context, op, backward, rows, n, kern_aligned({logits.data, dlogits.data}));
  });
}
