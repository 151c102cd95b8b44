/* Outline: NaN and infinity are exponents of all ones, the largest number that the exponent's bits can be. So
 * a block is sound when the maximum of its masked values is smaller: two instructions a vector. Where the
 * processor has wider vectors, a copy of the loop built for them is chosen at run time. */
#include "data/shard_impl.h"

enum { BLOCK_BYTES = 16384 };

/* Index of the first value whose masked bits are `exponent`, -1: none. Signed, because the masked values are
 * never negative and vectors of the oldest processors know no unsigned maximum. */
#define DEFINE_FIRST(name, type, attribute)                                         \
  attribute static int64_t name(const type *values, int64_t count, type exponent) { \
    const int64_t block = BLOCK_BYTES / (int64_t)sizeof *values;                    \
    for (int64_t at = 0; at < count; at += block) {                                 \
      const int64_t end = at + block < count ? at + block : count;                  \
      type most = 0;                                                                \
      for (int64_t i = at; i < end; ++i) {                                          \
        const type masked = (type)(values[i] & exponent);                           \
        most = masked > most ? masked : most;                                       \
      }                                                                             \
      for (int64_t i = at; most == exponent && i < end; ++i)                        \
        if ((values[i] & exponent) == exponent) return i;                           \
    }                                                                               \
    return -1;                                                                      \
  }

DEFINE_FIRST(first_half, int16_t, )
DEFINE_FIRST(first_single, int32_t, )

typedef struct finders {
  int64_t (*half)(const int16_t *values, int64_t count, int16_t exponent);
  int64_t (*single)(const int32_t *values, int64_t count, int32_t exponent);
} finders;

#if defined __x86_64__
DEFINE_FIRST(first_half_avx2, int16_t, __attribute__((target("avx2"))))
DEFINE_FIRST(first_single_avx2, int32_t, __attribute__((target("avx2"))))
#if defined __clang__
#define AVX512 __attribute__((target("avx512bw,avx512vl")))
#else
#define AVX512 __attribute__((target("avx512bw,avx512vl,prefer-vector-width=512")))
#endif
DEFINE_FIRST(first_half_avx512, int16_t, AVX512)
DEFINE_FIRST(first_single_avx512, int32_t, AVX512)

static finders choose(void) {
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return (finders){first_half_avx512, first_single_avx512};
  if (__builtin_cpu_supports("avx2")) return (finders){first_half_avx2, first_single_avx2};
  return (finders){first_half, first_single};
}
#else
static finders choose(void) {
  return (finders){first_half, first_single};
}
#endif

int64_t data_first_non_finite_priv(core_dtype dtype, const void *values, int64_t count) {
  const finders find = choose();
  if (dtype == CORE_FLOAT32) return find.single(values, count, 0x7f800000);
  return find.half(values, count, dtype == CORE_FLOAT16 ? 0x7c00 : 0x7f80);
}
