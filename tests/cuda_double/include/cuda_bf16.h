/* bfloat16, rounded to nearest even. */
#ifndef CUDA_DOUBLE_CUDA_BF16_H
#define CUDA_DOUBLE_CUDA_BF16_H

#ifdef __cplusplus

#include "cuda_runtime.h"

static inline float cuda_double_from_bf16(unsigned short bits) {
  return cuda_double_bits<float>((unsigned)bits << 16);
}
static inline unsigned short cuda_double_to_bf16(float value) {
  unsigned bits = cuda_double_bits<unsigned>(value);
  if (value != value) return 0x7fff;
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct __nv_bfloat16 {
  unsigned short __x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : __x(cuda_double_to_bf16(value)) {}
  operator float() const {
    return cuda_double_from_bf16(__x);
  }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

static inline float __bfloat162float(__nv_bfloat16 a) {
  return (float)a;
}
static inline __nv_bfloat16 __float2bfloat16(float a) {
  return __nv_bfloat16(a);
}
static inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  return __nv_bfloat16(a);
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {a, b};
}
static inline __nv_bfloat162 __float22bfloat162_rn(float2 a) {
  return {a.x, a.y};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 a) {
  return {(float)a.x, (float)a.y};
}
static inline float __low2float(__nv_bfloat162 a) {
  return (float)a.x;
}
static inline float __high2float(__nv_bfloat162 a) {
  return (float)a.y;
}
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) {
  return {a, b};
}
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) {
  return a.__x;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) {
  return cuda_double_bits<__nv_bfloat16>(a);
}

#else
typedef struct {
  unsigned short x;
} __nv_bfloat16;
#endif

#endif
