/* Private to kernels/cpu: arrays that are core_real or bfloat16 ("Active" in kernels.h).
 *
 * An op's loop is written once, over kern_at and kern_to, as an always-inline function that takes the type as
 * its second argument; KERN_ACTIVE_RUN makes the function that ops call, in which that argument is a
 * constant, so that each type has loops of its own. Values are core_real between a load and a store: what is
 * computed does not depend on the type, and a result is rounded once. */
#ifndef KERN_ACTIVE_IMPL_H
#define KERN_ACTIVE_IMPL_H

#include <string.h> /* memcpy */

#include "cpu_impl.h" /* KERN_INLINE, KERN_CLONES */

KERN_INLINE float kern_float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
KERN_INLINE uint32_t kern_bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* Rounds to nearest even; NaN stays NaN and becomes quiet. */
KERN_INLINE uint16_t kern_bfloat_of(core_real value) {
  const uint32_t bits = kern_bits_of((float)value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

/* target = value or target + value. */
KERN_INLINE void kern_put(core_real *target, kern_write write, core_real value) {
  *target = write == KERN_ADD ? *target + value : value;
}

/* Element i of an Active array. */
KERN_INLINE core_real kern_at(const void *x, core_dtype dtype, int64_t i) {
  if (dtype == CORE_BFLOAT16) return (core_real)kern_float_of((uint32_t)((const uint16_t *)x)[i] << 16);
  return ((const core_real *)x)[i];
}
/* Its new value: set, or the sum rounded once. */
KERN_INLINE void kern_to(void *y, core_dtype dtype, int64_t i, kern_write write, core_real value) {
  if (dtype == CORE_BFLOAT16)
    ((uint16_t *)y)[i] = kern_bfloat_of(write == KERN_ADD ? kern_at(y, dtype, i) + value : value);
  else
    kern_put((core_real *)y + i, write, value);
}

/* Where element i of an Active array lies. */
static inline void *kern_element(const void *x, core_dtype dtype, int64_t i) {
  return (char *)x + i * (dtype == CORE_BFLOAT16 ? (int64_t)sizeof(uint16_t) : (int64_t)sizeof(core_real));
}

/* Asks for n elements before they are needed. */
KERN_INLINE void kern_prefetch(const void *x, core_dtype dtype, int64_t n) {
  const int64_t line = dtype == CORE_BFLOAT16 ? 2 * KERN_LANES : KERN_LANES;
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(kern_element(x, dtype, i));
}

/* Defines name_run(job, begin, end) from name(job, dtype, begin, end); job->dtype says which. */
#define KERN_ACTIVE_RUN(name, job_type)                                                 \
  KERN_CLONES static void name##_run(const job_type *job, int64_t begin, int64_t end) { \
    if (job->dtype == CORE_BFLOAT16)                                                    \
      name(job, CORE_BFLOAT16, begin, end);                                             \
    else                                                                                \
      name(job, CORE_REAL_DTYPE, begin, end);                                           \
  }
/* The same from name(job, dtype, write, begin, end): left to itself the compiler loads what a KERN_SET does
 * not need. */
#define KERN_ACTIVE_WRITE_RUN(name, job_type)                                           \
  KERN_CLONES static void name##_run(const job_type *job, int64_t begin, int64_t end) { \
    if (job->dtype == CORE_BFLOAT16 && job->write == KERN_ADD)                          \
      name(job, CORE_BFLOAT16, KERN_ADD, begin, end);                                   \
    else if (job->dtype == CORE_BFLOAT16)                                               \
      name(job, CORE_BFLOAT16, KERN_SET, begin, end);                                   \
    else if (job->write == KERN_ADD)                                                    \
      name(job, CORE_REAL_DTYPE, KERN_ADD, begin, end);                                 \
    else                                                                                \
      name(job, CORE_REAL_DTYPE, KERN_SET, begin, end);                                 \
  }

#endif
