/* The emulation judged by itself: kernels, barriers, warps, numbers. What it must detect is made to happen.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tests/cuda_double/test_double.h"

/* ---- kernels ---- */

__global__ static void write_indices(uint4 *out) {
  unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      make_uint4(block, thread, gridDim.z, blockDim.z);
}

static void every_thread_of_every_block_runs_once(void **) {
  dim3 grid(3, 2, 4), block(5, 3, 2);
  size_t threads = 30, count = 24 * threads;
  Array<uint4> out(count);
  CALL(launch(write_indices, grid, block, out.data));
  std::vector<uint4> got = out.get();
  for (size_t i = 0; i < count; i++) {
    assert_int_equal(got[i].x, i / threads);
    assert_int_equal(got[i].y, i % threads);
    assert_int_equal(got[i].z, 4);
    assert_int_equal(got[i].w, 2);
  }
}

template <class T>
__global__ static void block_sum(const T *x, int count, T *out, bool with_barriers) {
  __shared__ T part[256];
  int t = (int)threadIdx.x;
  T sum = 0;
  for (int i = t; i < count; i += (int)blockDim.x) sum += x[(int)blockIdx.x * count + i];
  part[t] = sum;
  for (int half = (int)blockDim.x / 2; half > 0; half /= 2) {
    if (with_barriers) __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

static void a_reduction_in_shared_memory_is_right_with_its_barriers_only(void **) {
  std::vector<float> x(7 * 1000);
  for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i % 17);
  Array<float> in(x), out(7);
  for (bool barriers : {true, false}) {
    CALL(launch(block_sum<float>, 7, 256, in.data, 1000, out.data, barriers));
    std::vector<float> got = out.get();
    int wrong = 0;
    for (int b = 0; b < 7; b++) {
      float sum = 0;
      for (int i = 0; i < 1000; i++) sum += x[(size_t)(b * 1000 + i)];
      wrong += got[(size_t)b] != sum;
    }
    assert_int_equal(wrong, barriers ? 0 : 7);
  }
  expect_no_report();
}

__global__ static void warp_operations(int *out) {
  int t = (int)threadIdx.x, lane = t & 31;
  int sum = t;
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  double half = 0.5 * lane;
  int *row = out + 12 * (blockIdx.x * blockDim.x + threadIdx.x);
  row[0] = sum;
  row[1] = __shfl_sync(0xffffffffu, t, 5);
  row[2] = __shfl_up_sync(0xffffffffu, t, 3);
  row[3] = __shfl_down_sync(0xffffffffu, t, 3);
  row[4] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
  row[5] = __any_sync(0xffffffffu, lane == 40);
  row[6] = __all_sync(0xffffffffu, lane < 32);
  row[7] = (int)(2 * __shfl_sync(0xffffffffu, half, 31 - lane));
  row[8] = __shfl_sync(0xffffffffu, t, 9, 8); /* lane 1 of each eight */
  if (lane < 16)
    row[9] = __shfl_xor_sync(0x0000ffffu, t, 1); /* half a warp */
  else
    row[9] = __shfl_xor_sync(0xffff0000u, t, 2); /* and the other */
  row[10] = (int)__match_any_sync(0xffffffffu, lane / 4);
  row[11] = __syncthreads_count(t % 5 == 0);
}

static void warp_operations_exchange_what_they_should(void **) {
  Array<int> out(2 * 96 * 12);
  CALL(launch(warp_operations, 2, 96, out.data));
  std::vector<int> got = out.get();
  for (int i = 0; i < 2 * 96; i++) {
    int t = i % 96, lane = t % 32, warp = t - lane;
    const int *row = &got[(size_t)i * 12];
    assert_int_equal(row[0], 32 * warp + 31 * 16);
    assert_int_equal(row[1], warp + 5);
    assert_int_equal(row[2], lane < 3 ? t : t - 3);
    assert_int_equal(row[3], lane > 28 ? t : t + 3);
    assert_int_equal((unsigned)row[4], 0x49249249u);
    assert_int_equal(row[5], 0);
    assert_int_equal(row[6], 1);
    assert_int_equal(row[7], 31 - lane);
    assert_int_equal(row[8], warp + lane / 8 * 8 + 1);
    assert_int_equal(row[9], lane < 16 ? t ^ 1 : t ^ 2);
    assert_int_equal((unsigned)row[10], 15u << lane / 4 * 4);
    assert_int_equal(row[11], 20);
  }
  expect_no_report();
}

__global__ static void transpose_by_warp(int *out, bool with_barrier) {
  __shared__ int tile[32];
  int lane = (int)threadIdx.x;
  tile[lane] = lane;
  if (with_barrier) __syncwarp();
  out[lane] = tile[31 - lane];
}

static void lanes_do_not_run_in_step(void **) {
  Array<int> out(32);
  for (bool barrier : {true, false}) {
    CALL(launch(transpose_by_warp, 1, 32, out.data, barrier));
    std::vector<int> got = out.get();
    int wrong = 0;
    for (int lane = 0; lane < 32; lane++) wrong += got[(size_t)lane] != 31 - lane;
    if (barrier)
      assert_int_equal(wrong, 0);
    else
      assert_true(wrong > 0);
  }
}

/* In which order threads came to three places: the beginning, behind a barrier, behind a warp's barrier. */
__global__ static void record_order(unsigned *count, int *order) {
  for (int place = 0; place < 3; place++) {
    order[place * 64 + (int)atomicAdd(&count[place], 1u)] = (int)threadIdx.x;
    if (place == 0) __syncthreads();
    if (place == 1) __syncwarp();
  }
}

static void no_order_of_threads_can_be_relied_on(void **) {
  Array<unsigned> count(3);
  Array<int> order(192);
  int ups[3] = {0, 0, 0}; /* threads that ran right after their neighbour */
  for (int i = 0; i < 20; i++) {
    CALL(cudaMemsetAsync(count.data, 0, 12, stream));
    CALL(launch(record_order, 1, 64, count.data, order.data));
    std::vector<int> got = order.get();
    for (int place = 0; place < 3; place++)
      for (int k = 1; k < 64; k++)
        ups[place] += abs(got[(size_t)(place * 64 + k)] - got[(size_t)(place * 64 + k - 1)]) == 1;
  }
  for (int up : ups)
    assert_true(up < 20 * 63 / 4); /* 1 in 16 within a warp at random; all in a fixed order */
}

__global__ static void count_blocks(unsigned *count, unsigned long long *sum) {
  if (threadIdx.x == 0) atomicAdd(count, 1u);
  atomicAdd(sum, (unsigned long long)threadIdx.x);
  atomicMax(count + 1, blockIdx.x);
}

static void integer_atomics_count(void **) {
  Array<unsigned> count(2);
  Array<unsigned long long> sum(1);
  CALL(cudaMemsetAsync(count.data, 0, 8, stream));
  CALL(cudaMemsetAsync(sum.data, 0, 8, stream));
  CALL(launch(count_blocks, 300, 64, count.data, sum.data));
  assert_int_equal(count.get()[0], 300);
  assert_int_equal(count.get()[1], 299);
  assert_int_equal(sum.get()[0], 300 * 63 * 32);
}

__global__ static void use_dynamic_shared(float *out, int count) {
  float *part = reinterpret_cast<float *>(antiphon_emulated_shared());
  for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) part[i] = (float)i;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < count; i++) out[i] = part[count - 1 - i];
}

static void dynamic_shared_memory_has_the_size_that_was_asked_for(void **) {
  Array<float> out(20000);
  CALL(launch_on(stream, use_dynamic_shared, 1, 128, 4096, out.data, 1024));
  assert_true(out.get()[0] == 1023);
  size_t large = 80000;
  assert_int_equal(launch_on(stream, use_dynamic_shared, 1, 128, large, out.data, 20000),
                   cudaErrorInvalidValue);
  CALL(cudaFuncSetAttribute(use_dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)large));
  CALL(launch_on(stream, use_dynamic_shared, 1, 128, large, out.data, 20000));
  assert_true(out.get()[0] == 19999);
  assert_int_equal(
      cudaFuncSetAttribute(use_dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10),
      cudaErrorInvalidValue);
  CALL(launch_on(stream, use_dynamic_shared, 1, 128, 4096, out.data, 1030));
  assert_int_equal(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
  expect_report("wrote past its 4096 bytes of dynamic shared memory");
}

template <int N>
__global__ static void read_shared_first(float *out) {
  __shared__ float row[N];
  unsigned char *dynamic = antiphon_emulated_shared();
  out[threadIdx.x] = row[threadIdx.x % N];
  out[threadIdx.x + blockDim.x] = reinterpret_cast<float *>(dynamic)[threadIdx.x];
  __syncthreads();
  row[threadIdx.x % N] = 1;
  reinterpret_cast<float *>(dynamic)[threadIdx.x] = 1;
}

static void a_kernel_is_reported_by_its_name(void **) {
  float host = 0;
  assert_int_equal(launch(read_shared_first<16>, 1, 32, &host), cudaErrorInvalidValue);
  expect_report("kernel read_shared_first<16>: argument 0 is the address");
}

static void shared_memory_begins_as_nan_in_every_block(void **) {
  Array<float> out(64);
  CALL(launch_on(stream, read_shared_first<16>, 5, 32, 128, out.data));
  for (float value : out.get()) assert_true(std::isnan(value));
}

static void wrong_configurations_are_refused(void **) {
  Array<unsigned> out(1000);
  Array<unsigned long long> sum(1);
  auto attempt = [&](dim3 grid, dim3 block) { return launch(count_blocks, grid, block, out.data, sum.data); };
  assert_int_equal(attempt(0, 32), cudaErrorInvalidConfiguration);
  assert_int_equal(attempt(1, 0), cudaErrorInvalidConfiguration);
  assert_int_equal(attempt(1, 1025), cudaErrorInvalidConfiguration);
  assert_int_equal(attempt(1, dim3(32, 33)), cudaErrorInvalidConfiguration);
  assert_int_equal(attempt(dim3(1, 65536), 32), cudaErrorInvalidConfiguration);
  assert_int_equal(cudaGetLastError(), cudaErrorInvalidConfiguration);
  assert_int_equal(cudaGetLastError(), cudaSuccess);
  assert_int_equal(launch_on(nullptr, count_blocks, 1, 32, 0, out.data, sum.data),
                   cudaErrorInvalidResourceHandle);
  expect_report("the legacy stream is used");
}

/* ---- what goes wrong in kernels ---- */

__global__ static void diverge(int how, int *out) {
  int t = (int)threadIdx.x;
  if (how == 0 && t == 3) return;
  if (how == 1 && t >= 32) __syncthreads();
  if (how == 2) {
    if (t < 40)
      __syncthreads();
    else
      __syncthreads();
    return;
  }
  if (how == 3 && t != 9) __shfl_sync(0xffffffffu, t, 0);
  if (how == 4) __shfl_sync(0x0000ffffu, t, 20);
  if (how == 5 && t == 33) __trap();
  if (how == 6 && t < 16) __shfl_sync(0x0000ffffu, t, 20);
  if (how == 7 && (t & 1)) __shfl_sync(0xffffffffu, t, 0);
  if (how == 7 && !(t & 1)) __shfl_sync(0xffffffffu, t, 0);
  __syncthreads();
  out[t] = t;
}

static void divergence_is_reported_with_kernel_and_block(void **) {
  static const char *const expected[] = {"1 threads ended, the first is (3,0,0)",
                                         "threads wait at the barrier",
                                         "wait at the barrier",
                                         "31 threads wait in the warp operation",
                                         "does not name the lane that calls it",
                                         "thread (33,0,0): __trap",
                                         "reads lane 20, which its mask 0000ffff does not name",
                                         "32 threads wait in the warp operation"};
  for (int how = 0; how < 8; how++) {
    int *out = nullptr;
    CALL(cudaMalloc((void **)&out, 64 * sizeof *out));
    CALL(launch(diverge, 2, 64, how, out));
    assert_int_equal(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
    assert_int_equal(launch(diverge, 1, 64, 9, out), cudaErrorLaunchFailure); /* the context is broken */
    std::string all = cuda_double_reports();
    assert_true(all.find("kernel diverge, block (") != std::string::npos);
    expect_report(expected[how]);
    assert_int_equal(cuda_double_pending(), 0);
    CALL(launch(diverge, 2, 64, 9, out)); /* forgotten: it works again */
    CALL(cudaStreamSynchronize(stream));
    CALL(cudaFree(out));
  }
  expect_no_report();
}

static void arguments_in_pageable_memory_are_refused(void **) {
  int host[64] = {0};
  assert_int_equal(launch(diverge, 1, 64, 9, (int *)host), cudaErrorInvalidValue);
  expect_report("kernel diverge: argument 1 is the address of pageable host memory");
}

/* ---- numbers ---- */

static void bfloat16_and_half_round_to_nearest_even(void **) {
  static const struct {
    float value;
    unsigned short bits;
  } bf16[] = {{1.0f, 0x3f80},  {1.00390625f, 0x3f80}, {1.01171875f, 0x3f82},
              {-2.5f, 0xc020}, {1e-40f, 0x0001},      {3.4e38f, 0x7f80},
              {0.0f, 0},       {-INFINITY, 0xff80}},
    half[] = {{1.0f, 0x3c00},          {1.00048828125f, 0x3c00}, {65504.0f, 0x7bff}, {65520.0f, 0x7c00},
              {5.9604645e-8f, 0x0001}, {-0.0f, 0x8000},          {2047.5f, 0x6800}};
  for (const auto &one : bf16)
    assert_int_equal(__bfloat16_as_ushort(__float2bfloat16_rn(one.value)), one.bits);
  for (const auto &one : half) assert_int_equal(__half_as_ushort(__float2half_rn(one.value)), one.bits);
  for (unsigned bits = 0; bits < 65536; bits++) {
    float wide = __half2float(__ushort_as_half((unsigned short)bits));
    if (!std::isnan(wide)) assert_int_equal(__half_as_ushort(__float2half_rn(wide)), bits);
    wide = __bfloat162float(__ushort_as_bfloat16((unsigned short)bits));
    if (!std::isnan(wide)) assert_int_equal(__bfloat16_as_ushort(__float2bfloat16_rn(wide)), bits);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_thread_of_every_block_runs_once),
      cmocka_unit_test(a_reduction_in_shared_memory_is_right_with_its_barriers_only),
      cmocka_unit_test(warp_operations_exchange_what_they_should),
      cmocka_unit_test(lanes_do_not_run_in_step),
      cmocka_unit_test(no_order_of_threads_can_be_relied_on),
      cmocka_unit_test(integer_atomics_count),
      cmocka_unit_test(dynamic_shared_memory_has_the_size_that_was_asked_for),
      cmocka_unit_test(a_kernel_is_reported_by_its_name),
      cmocka_unit_test(shared_memory_begins_as_nan_in_every_block),
      cmocka_unit_test(wrong_configurations_are_refused),
      cmocka_unit_test(divergence_is_reported_with_kernel_and_block),
      cmocka_unit_test(arguments_in_pageable_memory_are_refused),
      cmocka_unit_test(bfloat16_and_half_round_to_nearest_even),
  };
  return cmocka_run_group_tests_name("emulated kernels", tests, begin, end);
}
