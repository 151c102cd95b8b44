/* Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as
 * easy as 1, 2, 3"). A value is a pure function of (seed, stream, index): it never depends on the rank, the
 * layout or on what was drawn before. Callers build `stream` from a purpose and whatever names the event
 * (step, layer, a hash of a parameter's name). */
#ifndef CORE_RANDOM_H
#define CORE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

/* One 128-bit block. */
typedef struct core_random_block {
  uint32_t word[4];
} core_random_block;

core_random_block core_random_at(uint64_t seed, uint64_t stream, uint64_t index);
uint64_t core_random_u64(uint64_t seed, uint64_t stream, uint64_t index);
/* Uniform in the open interval (0, 1), 53 bits. */
double core_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);
/* Standard normal by Box-Muller. */
double core_random_normal(uint64_t seed, uint64_t stream, uint64_t index);
/* Uniform in [0, n) without bias; n > 0. */
uint64_t core_random_below(uint64_t seed, uint64_t stream, uint64_t index, uint64_t n);

/* Purposes, to keep streams apart. */
typedef enum core_random_purpose {
  CORE_RANDOM_INIT = 1,   /* parameters */
  CORE_RANDOM_ORDER = 2,  /* sample order */
  CORE_RANDOM_ROUTER = 3, /* router noise */
  CORE_RANDOM_DROPOUT = 4,
  CORE_RANDOM_SAMPLE = 5, /* generation */
  CORE_RANDOM_SCHEDULE = 6,
  CORE_RANDOM_TEST = 7,
  CORE_RANDOM_SECOND = 8 /* the second choice of a router */
} core_random_purpose;

/* Mixes a purpose and two numbers into a stream key (64-bit finaliser; collisions are as of a random hash).
 */
uint64_t core_random_stream(core_random_purpose purpose, uint64_t a, uint64_t b);

/* A permutation of [0, n) as a pure function of (seed, stream): Fisher-Yates. out: int64 [n]. */
void core_random_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *out);

/* 64-bit xxHash of bytes, and of a string. */
uint64_t core_hash(const void *bytes, size_t count, uint64_t seed);
uint64_t core_hash_text(const char *text);

#endif
