/* Elementary functions that the compiler can vectorise: branch-free, inline, no tables. In the float build
 * they are polynomials (relative errors: exp 2e-7, normal distribution 2e-6 far down its tail; sine and
 * cosine 1e-7 absolute); in the double build libm, since that build exists to be exact and not to be fast. */
#ifndef KERN_VECMATH_IMPL_H
#define KERN_VECMATH_IMPL_H

#include "active_impl.h" /* kern_float_of, KERN_INLINE */

/* float16 to float32: exponents are rebased by a multiplication, which also normalises subnormals. */
KERN_INLINE float kern_half_to_float(uint16_t half) {
  const uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t finite = kern_bits_of(kern_float_of(magnitude) * 0x1p112f);
  return kern_float_of(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

#ifdef ANTIPHON_DOUBLE

KERN_INLINE core_real kern_exp(core_real x) {
  return exp(x);
}
/* Standard normal distribution function. */
KERN_INLINE core_real kern_normal_below(core_real x) {
  return 0.5 * erfc(-x * 0.70710678118654752440);
}
KERN_INLINE void kern_sincos(core_real x, core_real *sine, core_real *cosine) {
  *sine = sin(x);
  *cosine = cos(x);
}

#else

/* Cody and Waite 1980 with the coefficients of Moshier's Cephes. The power of two is applied in two halves,
 * so that results overflow to infinity and fade into subnormals as they should. Adding 1.5 * 2^23 rounds to
 * an integer and leaves it in the low bits, which needs no conversion that NaN would make undefined. */
KERN_INLINE core_real kern_exp(core_real x) {
  const float magic = 12582912.0f;
  x = x > 89.0f ? 89.0f : x;
  x = x < -105.0f ? -105.0f : x;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t power = (int32_t)(kern_bits_of(shifted) - kern_bits_of(magic));
  const int32_t half = power >> 1;
  const uint32_t low = ((uint32_t)half + 127u) << 23;
  const uint32_t high = ((uint32_t)power - (uint32_t)half + 127u) << 23;
  return p * kern_float_of(low) * kern_float_of(high);
}

/* Standard normal distribution function by erfc. Juffa's two-piece minimax form of erf: an odd polynomial
 * near 0 and 1 - exp(polynomial) beyond; the exponential is erfc itself, so the lower tail, which GELU
 * multiplies by a large x, does not cancel. */
KERN_INLINE core_real kern_normal_below(core_real x) {
  const float t = fabsf(x) * 0.70710678118654752440f;
  const float s = t * t;
  float far = (-1.72853470e-5f * t + 3.83197126e-4f) * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = far * t - t;
  float near = -5.96761703e-4f;
  near = near * s + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * t + t;
  const float half_tail = t > 0.927734375f ? 0.5f * kern_exp(far) : 0.5f - 0.5f * near;
  return x < 0.0f ? half_tail : 1.0f - half_tail;
}

/* Reduction modulo pi / 2 in double: exact enough for every position that a float can count. */
KERN_INLINE void kern_sincos(core_real x, core_real *sine, core_real *cosine) {
  const double magic = 6755399441055744.0; /* 1.5 * 2^52 */
  const double turns = (double)x * 0.63661977236758134308;
  const double n = (turns + magic) - magic;
  const float r = (float)((turns - n) * 1.57079632679489661923);
  const float quarter = (float)(n - 4.0 * (((n * 0.25 - 0.375) + magic) - magic)); /* 0..3 */
  const float s = r * r;
  const float sin_r = ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f) * s * r + r;
  const float cos_r =
      ((2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f) * s * s - 0.5f * s +
      1.0f;
  const bool odd = quarter == 1.0f || quarter == 3.0f;
  const float a = odd ? cos_r : sin_r;
  const float b = odd ? sin_r : cos_r;
  *sine = quarter >= 2.0f ? -a : a;
  *cosine = quarter == 1.0f || quarter == 2.0f ? -b : b;
}

#endif

KERN_INLINE core_real kern_sigmoid(core_real x) {
  return (core_real)1 / ((core_real)1 + kern_exp(-x));
}
/* Standard normal density. */
KERN_INLINE core_real kern_normal_density(core_real x) {
  return (core_real)0.39894228040143267794 * kern_exp((core_real)-0.5 * x * x);
}

/* Largest of n values, by lanes so that the comparison vectorises without assuming finite values; NaN loses.
 * -INFINITY when n is 0. */
KERN_INLINE core_real kern_row_max(const core_real *x, int64_t n) {
  core_real lane[KERN_LANES];
  for (int64_t l = 0; l < KERN_LANES; l++) lane[l] = -INFINITY;
  int64_t i = 0;
  for (; i + KERN_LANES <= n; i += KERN_LANES)
    for (int64_t l = 0; l < KERN_LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  core_real best = -INFINITY;
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  for (int64_t l = 0; l < KERN_LANES; l++) best = lane[l] > best ? lane[l] : best;
  return best;
}

#endif
