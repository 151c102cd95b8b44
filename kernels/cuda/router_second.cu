/* A second choice drawn in proportion to the probabilities of the others: the largest of logits plus Gumbel
 * noise, keyed by the token's number in the global order. NaN ranks as -infinity, ties go to the lower
 * expert.
 */
#include "cuda_random.cuh"
#include "router_row.cuh"

struct second_best {
  float value;
  int expert;
};

template <typename R>
static __device__ __forceinline__ second_best best_of_lanes(second_best own) {
#pragma unroll
  for (int distance = R::LANES / 2; distance > 0; distance /= 2) {
    const second_best other = {__shfl_xor_sync(0xffffffffu, own.value, distance),
                               __shfl_xor_sync(0xffffffffu, own.expert, distance)};
    if (other.value > own.value || (other.value == own.value && other.expert < own.expert)) own = other;
  }
  return own;
}

template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    second_kernel(const float *logits, uint64_t seed, uint64_t stream, const uint64_t *key, int32_t *choice,
                  int64_t rows, int experts, kern_fault fault) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  const bool there = row < rows;
  const int first = there ? choice[2 * row] : 0;
  const bool good = there && fault.inside(first, 0, experts);
  second_best best = {-INFINITY, INT32_MAX};
#pragma unroll
  for (int n = 0; n < R::N; n++) {
    const int e = R::expert(n);
    if (!good || e >= experts || e == first) continue;
    const uint4 block = kern_random_at(seed, stream, key[row] * (uint64_t)experts + (uint64_t)e);
    const double noise = -log(-log(kern_open_unit(block.x, block.y)));
    const float sum = (float)((double)logits[row * experts + e] + noise);
    const float value = sum >= -INFINITY ? sum : -INFINITY;
    if (value > best.value || (value == best.value && e < best.expert)) best = second_best{value, e};
  }
  best = best_of_lanes<R>(best);
  if (good && R::lane() == 0) choice[2 * row + 1] = best.expert;
}

core_status kern_router_second_cuda(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                    core_tensor key, core_tensor choice) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  KERN_CHECK(key, CORE_UINT64, rows);
  KERN_CHECK(choice, CORE_INT32, rows, 2);
  CHECK(experts >= 2 && experts <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT, "%s: %lld experts, expected 2 to %d",
        __func__, (long long)experts, (int)CORE_MAX_EXPERTS);
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), second_kernel<R>,
                kern_data<const float>(logits), seed, stream, kern_data<const uint64_t>(key),
                kern_data<int32_t>(choice), rows, (int)experts,
                kern_cuda_fault_priv(KERN_CUDA_OP_router_second));
    return CORE_OK;
  });
}
