/* IEEE half precision, rounded to nearest even: conversions only. */
#ifndef CUDA_DOUBLE_CUDA_FP16_H
#define CUDA_DOUBLE_CUDA_FP16_H

#ifdef __cplusplus

#include "cuda_runtime.h"

static inline float cuda_double_from_half(unsigned short bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf((float)fraction, -24);
  return sign * ldexpf((float)(fraction + 1024), exponent - 25);
}
static inline unsigned short cuda_double_to_half(float value) {
  unsigned short sign = (unsigned short)(cuda_double_bits<unsigned>(value) >> 16 & 0x8000);
  float size = fabsf(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00);
  int exponent = -13; /* and below: the numbers without a leading one */
  if (size >= 0x1p-14f) frexpf(size, &exponent);
  int unit = exponent - 11; /* power of two of the last place */
  unsigned count = (unsigned)nearbyintf(ldexpf(size, -unit));
  return (unsigned short)(sign | (count + (unsigned)(unit + 24) * 1024));
}

struct __half {
  unsigned short __x;
  __half() = default;
  __half(float value) : __x(cuda_double_to_half(value)) {}
  operator float() const {
    return cuda_double_from_half(__x);
  }
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;

static inline float __half2float(__half a) {
  return (float)a;
}
static inline __half __float2half(float a) {
  return __half(a);
}
static inline __half __float2half_rn(float a) {
  return __half(a);
}
static inline float2 __half22float2(__half2 a) {
  return {(float)a.x, (float)a.y};
}
static inline unsigned short __half_as_ushort(__half a) {
  return a.__x;
}
static inline __half __ushort_as_half(unsigned short a) {
  return cuda_double_bits<__half>(a);
}

#else
typedef struct {
  unsigned short x;
} __half;
#endif

#endif
