/* Private to kernels/cuda, device side: core/random.h's numbers. The integers are the same; normals differ by
 * last bits of log, cos and sqrt. */
#ifndef KERN_CUDA_RANDOM_CUH
#define KERN_CUDA_RANDOM_CUH

#include "cuda_impl.h"

/* Philox4x32-10 (Salmon et al. 2011), as core_random_at. */
__device__ __forceinline__ uint4 kern_random_at(uint64_t seed, uint64_t stream, uint64_t index) {
  uint4 c = make_uint4((uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32));
  uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c.x, p1 = (uint64_t)0xCD9E8D57u * c.z;
    c = make_uint4((uint32_t)(p1 >> 32) ^ c.y ^ low, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.w ^ high,
                   (uint32_t)p0);
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return c;
}

/* Uniform in the open interval (0, 1), 53 bits. */
__device__ __forceinline__ double kern_open_unit(uint32_t low, uint32_t high) {
  return ((double)(((uint64_t)high << 32 | low) >> 11) + 0.5) * 0x1p-53;
}

/* Standard normal by Box-Muller, as core_random_normal. */
__device__ __forceinline__ double kern_random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  const uint4 block = kern_random_at(seed, stream, index);
  const double radius = sqrt(-2.0 * log(kern_open_unit(block.x, block.y)));
  return radius * cos(6.283185307179586 * kern_open_unit(block.z, block.w));
}

#endif
