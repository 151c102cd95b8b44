/* Stable counting sort of the kept choices by expert. The pairs (token, choice) are cut into stretches of one
 * warp each: count per stretch and expert, scan over the stretches of an expert, scan over the experts,
 * place. Counts go to the host while the places are written. */
#include <string.h> /* memcpy */

#include "cuda_vector.cuh"

enum { SCAN_EACH = KERN_CHUNKS / KERN_BLOCK };

struct plan_pairs {
  const int32_t *choice;
  const uint8_t *keep; /* or NULL */
  int64_t count, stretch;
  int experts;
  kern_fault fault;

  /* Expert of a pair, -1 for one that is dropped or lies past the end. */
  __device__ int expert(int64_t i) const {
    if (i >= count || (keep != NULL && keep[i] == 0)) return -1;
    const int32_t e = choice[i];
    return fault.inside(e, 0, experts) ? e : -1;
  }
};

/* chunks[e][blockIdx.x] = pairs of the stretch that go to e. */
static __global__ void __launch_bounds__(32) plan_count(plan_pairs pairs, int32_t *chunks) {
  int *const own = KERN_SHARED(int);
  for (int e = threadIdx.x; e < pairs.experts; e += 32) own[e] = 0;
  __syncwarp();
  const int64_t begin = blockIdx.x * pairs.stretch;
  for (int64_t i = threadIdx.x; i < pairs.stretch; i += 32) {
    const int e = pairs.expert(begin + i);
    if (e >= 0) atomicAdd(&own[e], 1);
  }
  __syncwarp();
  for (int e = threadIdx.x; e < pairs.experts; e += 32)
    chunks[(int64_t)e * KERN_CHUNKS + blockIdx.x] = own[e];
}

/* Sum of the threads before this one; *total is that of all. The whole block of THREADS comes here once. */
template <int THREADS>
static __device__ __forceinline__ int64_t sum_before(int64_t own, int64_t *total) {
  __shared__ int64_t warps[THREADS / 32];
  int64_t sum = own;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffffu, sum, distance);
    if (threadIdx.x % 32 >= distance) sum += below;
  }
  if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    if (w < (int)threadIdx.x / 32) sum += warps[w];
    *total += warps[w];
  }
  return sum - own;
}

/* chunks[blockIdx.x][b] -> pairs of the expert in stretches before b; totals[expert] = all. */
static __global__ void __launch_bounds__(KERN_BLOCK)
    plan_scan_stretches(int32_t *chunks, int stretches, int64_t *totals) {
  int32_t *const row = chunks + (int64_t)blockIdx.x * KERN_CHUNKS;
  int32_t own[SCAN_EACH];
  int64_t sum = 0, total;
#pragma unroll
  for (int i = 0; i < SCAN_EACH; i++) {
    const int b = threadIdx.x * SCAN_EACH + i;
    own[i] = b < stretches ? row[b] : 0;
    sum += own[i];
  }
  int64_t before = sum_before<KERN_BLOCK>(sum, &total);
#pragma unroll
  for (int i = 0; i < SCAN_EACH; i++) {
    const int b = threadIdx.x * SCAN_EACH + i;
    if (b < stretches) row[b] = (int32_t)before;
    before += own[i];
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

/* first[e] = rows of the experts before e. */
static __global__ void __launch_bounds__(CORE_MAX_EXPERTS)
    plan_scan_experts(const int64_t *totals, int experts, int64_t *first) {
  int64_t total;
  const int64_t own = (int)threadIdx.x < experts ? totals[threadIdx.x] : 0;
  const int64_t before = sum_before<CORE_MAX_EXPERTS>(own, &total);
  if ((int)threadIdx.x < experts) first[threadIdx.x] = before;
}

/* Pairs of a stretch in order, a warp's width at a time; equal experts among them are ranked by lane. */
static __global__ void __launch_bounds__(32) plan_place(plan_pairs pairs, int k, const int32_t *chunks,
                                                        const int64_t *first, int32_t *slot, int32_t *index) {
  int *const next = KERN_SHARED(int);
  for (int e = threadIdx.x; e < pairs.experts; e += 32)
    next[e] = (int)first[e] + chunks[(int64_t)e * KERN_CHUNKS + blockIdx.x];
  __syncwarp();
  const int64_t begin = blockIdx.x * pairs.stretch;
  for (int64_t at = begin; at < begin + pairs.stretch && at < pairs.count; at += 32) {
    const int64_t i = at + threadIdx.x;
    const int e = pairs.expert(i);
    const unsigned equal = __match_any_sync(0xffffffffu, e);
    const int rank = __popc(equal & ((1u << threadIdx.x) - 1));
    const int row = e >= 0 ? next[e] + rank : -1;
    __syncwarp();
    if (e >= 0 && rank == 0) next[e] = row + __popc(equal);
    __syncwarp();
    if (i < pairs.count) slot[i] = row;
    if (e >= 0) index[row] = (int32_t)(i / k);
  }
}

static core_status plan_counts_to_host(kern_context *context, int64_t experts) {
  KERN_CUDA(cudaMemcpyAsync(context->pinned_counts, context->totals, (size_t)experts * sizeof(int64_t),
                            cudaMemcpyDeviceToHost, context->stream));
  KERN_CUDA(cudaEventRecord(context->fork, context->stream));
  return CORE_OK;
}

static core_status plan_run(kern_context *context, const plan_pairs &pairs, int64_t k, int32_t *slot,
                            int32_t *index) {
  const int64_t stretches = kern_divide_up(pairs.count, pairs.stretch);
  const kern_grid warps(stretches, dim3(32), 1, (size_t)pairs.experts * sizeof(int));
  int64_t *const first = context->totals + CORE_MAX_EXPERTS;
  KERN_LAUNCH(context, warps, plan_count, pairs, context->chunks);
  KERN_LAUNCH(context, kern_grid(pairs.experts, dim3(KERN_BLOCK)), plan_scan_stretches, context->chunks,
              (int)stretches, context->totals);
  TRY(plan_counts_to_host(context, pairs.experts));
  KERN_LAUNCH(context, kern_grid(1, dim3(CORE_MAX_EXPERTS)), plan_scan_experts, context->totals,
              pairs.experts, first);
  plan_pairs known = pairs; /* a bad choice was reported when it was counted */
  known.fault.word = NULL;
  KERN_LAUNCH(context, warps, plan_place, known, (int)k, context->chunks, first, slot, index);
  return CORE_OK;
}

core_status kern_dispatch_plan_cuda(kern_context *context, core_tensor choice, core_tensor keep,
                                    int64_t experts, int64_t *count, core_tensor slot, core_tensor index) {
  KERN_CHECK(choice, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = choice.shape[0], k = choice.shape[1], pairs = rows * k;
  if (keep.data != NULL) KERN_CHECK(keep, CORE_UINT8, rows, k);
  KERN_CHECK(slot, CORE_INT32, rows, k);
  KERN_CHECK(index, CORE_INT32, KERN_ANY);
  CHECK(experts >= 1 && experts <= CORE_MAX_EXPERTS && index.shape[0] >= pairs && pairs <= INT32_MAX,
        CORE_ERR_ARGUMENT, "%s: %lld experts, %lld choices, room for %lld rows", __func__, (long long)experts,
        (long long)pairs, (long long)index.shape[0]);
  KERN_CHECK_LIMIT("experts", experts, context->limits.experts);
  memset(count, 0, (size_t)experts * sizeof *count);
  if (pairs == 0) return CORE_OK;
  const int64_t fair = kern_divide_up(kern_divide_up(pairs, KERN_CHUNKS), 32) * 32;
  const plan_pairs list = {kern_data<const int32_t>(choice),
                           kern_data<const uint8_t>(keep),
                           pairs,
                           fair > 256 ? fair : 256,
                           (int)experts,
                           kern_cuda_fault_priv(KERN_CUDA_OP_dispatch_plan)};
  TRY(plan_run(context, list, k, kern_data<int32_t>(slot), kern_data<int32_t>(index)));
  TRY(kern_cuda_wait_event_priv(context->fork));
  memcpy(count, context->pinned_counts, (size_t)experts * sizeof *count);
  return CORE_OK;
}
