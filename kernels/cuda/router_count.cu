/* Counts of what the router chose. Integers, so atomics do not disturb the result. */
#include "cuda_vector.cuh"

/* Shared: choices per expert, kept choices per expert, rows that kept one. */
static __global__ void __launch_bounds__(KERN_BLOCK)
    count_kernel(const int32_t *choice, const int32_t *slot, int64_t rows, int k, int experts,
                 unsigned long long *count, kern_fault fault) {
  int *const own = KERN_SHARED(int);
  for (int i = threadIdx.x; i <= 2 * experts; i += KERN_BLOCK) own[i] = 0;
  __syncthreads();
  for (int64_t row = (int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x; row < rows;
       row += (int64_t)gridDim.x * KERN_BLOCK) {
    bool any = false;
    for (int64_t i = row * k; i < (row + 1) * k; i++) {
      const int32_t expert = choice[i];
      const bool kept = slot[i] >= 0;
      any |= kept;
      if (!fault.inside(expert, 0, experts)) continue;
      atomicAdd(&own[expert], 1);
      if (kept) atomicAdd(&own[experts + expert], 1);
    }
    if (any) atomicAdd(&own[2 * experts], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i <= 2 * experts; i += KERN_BLOCK)
    if (own[i] > 0) atomicAdd(&count[i], (unsigned long long)own[i]);
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(&count[2 * experts + 1], (unsigned long long)rows);
}

core_status kern_router_count_cuda(kern_context *context, core_tensor choice, core_tensor slot,
                                   core_tensor count) {
  KERN_CHECK(choice, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = choice.shape[0], k = choice.shape[1], experts = (count.shape[0] - 2) / 2;
  KERN_CHECK(slot, CORE_INT32, rows, k);
  KERN_CHECK(count, CORE_INT64, 2 * experts + 2);
  KERN_CHECK_LIMIT("experts", experts, CORE_MAX_EXPERTS);
  const int64_t blocks = kern_least(kern_divide_up(rows, 4 * KERN_BLOCK), KERN_PARTIALS);
  KERN_LAUNCH(context, kern_grid(blocks, dim3(KERN_BLOCK), 1, (size_t)(2 * experts + 1) * sizeof(int)),
              count_kernel, kern_data<const int32_t>(choice), kern_data<const int32_t>(slot), rows, (int)k,
              (int)experts, kern_data<unsigned long long>(count),
              kern_cuda_fault_priv(KERN_CUDA_OP_router_count));
  return CORE_OK;
}
