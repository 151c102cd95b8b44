/* Private to kernels/cuda, device side: a row of router numbers spread over the lanes of a warp or of a part
 * of one, in registers. Lane l holds experts l, l + LANES, ... */
#ifndef KERN_ROUTER_ROW_CUH
#define KERN_ROUTER_ROW_CUH

#include "cuda_math.cuh"

template <int LANES_, int N_>
struct kern_router_row {
  static constexpr int LANES = LANES_, N = N_, BLOCK = 128, ROWS = BLOCK / LANES;

  __device__ static int lane() {
    return threadIdx.x % LANES;
  }
  /* Lane of the warp that holds expert e of this row. */
  __device__ static int holder(int e) {
    return threadIdx.x % 32 / LANES * LANES + e % LANES;
  }
  __device__ static int expert(int n) {
    return lane() + n * LANES;
  }
  /* Rows past the end take part in exchanges with `rest` everywhere. */
  __device__ static void load(const float *from, int64_t row, int64_t rows, int experts, float rest,
                              float (&to)[N]) {
#pragma unroll
    for (int n = 0; n < N; n++)
      to[n] = row < rows && expert(n) < experts ? from[row * experts + expert(n)] : rest;
  }
  template <typename T>
  __device__ static T sum(T value) {
    return kern_lanes_reduce<LANES>(value, kern_plus());
  }
  __device__ static float most(float value) {
    return kern_lanes_reduce<LANES>(value, kern_larger());
  }
};

/* x -> softmax(x) in place; lanes without an expert hold -infinity. One order, so every op that needs
 * probabilities gets the same bits. */
template <typename R>
__device__ __forceinline__ void kern_router_softmax(float (&x)[R::N]) {
  float most = -INFINITY, sum = 0;
#pragma unroll
  for (int n = 0; n < R::N; n++) most = fmaxf(most, x[n]);
  most = R::most(most);
#pragma unroll
  for (int n = 0; n < R::N; n++) {
    x[n] = expf(x[n] - most);
    sum += x[n];
  }
  const float inverse = 1.0f / R::sum(sum);
#pragma unroll
  for (int n = 0; n < R::N; n++) x[n] *= inverse;
}

/* Calls run with the kern_router_row for so many experts, at least the most choices wide. */
template <typename F>
core_status kern_with_router_row(int64_t experts, F run) {
  if (experts <= 8) return run(kern_router_row<8, 1>());
  if (experts <= 16) return run(kern_router_row<16, 1>());
  if (experts <= 32) return run(kern_router_row<32, 1>());
  if (experts <= 64) return run(kern_router_row<32, 2>());
  if (experts <= 128) return run(kern_router_row<32, 4>());
  if (experts <= 256) return run(kern_router_row<32, 8>());
  return run(kern_router_row<32, 32>());
}
static_assert(CORE_MAX_CHOICES <= 8 && CORE_MAX_EXPERTS <= 32 * 32, "rows of the router do not fit");

#endif
