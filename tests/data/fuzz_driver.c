/* Runs a fuzz target without libFuzzer: every seed, then mutations of the seeds for a bounded time, always
 * the same ones in the same order.
 *
 *   fuzz_x SECONDS              seeds and mutations
 *   fuzz_x --write-seeds DIR    the seeds as files, for libFuzzer */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/random.h"
#include "fuzz_target.h"

enum { MOST_BYTES = 1 << 16, MOST_SEEDS = 16 };

typedef struct corpus {
  uint8_t bytes[MOST_SEEDS][MOST_BYTES];
  int64_t count[MOST_SEEDS];
  int seeds;
} corpus;

static int write_seeds(const corpus *c, const char *directory) {
  for (int i = 0; i < c->seeds; ++i) {
    char path[512];
    (void)snprintf(path, sizeof path, "%s/seed-%02d", directory, i);
    fuzz_write(path, c->bytes[i], (size_t)c->count[i]);
  }
  return 0;
}

/* A number that headers are made of, at a random place: small, huge, negative, all ones. */
static void put_number(uint64_t seed, uint8_t *out, int64_t count) {
  static const uint64_t numbers[] = {0,         1,          2,         255,        65535,
                                     INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX, 1ull << 62};
  const uint64_t number = numbers[core_random_below(2, seed, 1, sizeof numbers / sizeof *numbers)];
  const int64_t bytes = 1 << core_random_below(2, seed, 2, 4);
  if (count < bytes) return;
  memcpy(out + core_random_below(2, seed, 3, (uint64_t)(count - bytes + 1)), &number, (size_t)bytes);
}

/* Copies a stretch over another place. */
static void move_stretch(uint64_t seed, uint8_t *out, int64_t count) {
  const int64_t bytes = 1 + (int64_t)core_random_below(2, seed, 4, 64);
  if (count <= bytes) return;
  memmove(out + core_random_below(2, seed, 5, (uint64_t)(count - bytes)),
          out + core_random_below(2, seed, 6, (uint64_t)(count - bytes)), (size_t)bytes);
}

static int64_t mutate(uint64_t seed, uint8_t *out, int64_t count) {
  const uint64_t changes = 1 + core_random_below(2, seed, 7, 4);
  for (uint64_t i = 0; i < changes && count > 0; ++i) {
    const uint64_t draw = core_random_u64(2, seed, 8 + i), at = (draw >> 8) % (uint64_t)count;
    switch (draw % 5) {
      case 0:
        out[at] ^= (uint8_t)(1u << (draw >> 40) % 8);
        break;
      case 1:
        out[at] = (uint8_t)(draw >> 48);
        break;
      case 2:
        put_number(seed + i, out, count);
        break;
      case 3:
        move_stretch(seed + i, out, count);
        break;
      default:
        if (i == 0 && (draw >> 50) % 4 == 0) count = (int64_t)at;
    }
  }
  return count;
}

static int run(const corpus *c, double seconds) {
  uint8_t *mutant = malloc(MOST_BYTES);
  int64_t runs = 0;
  const double since = core_clock_now();
  for (int i = 0; i < c->seeds; ++i) (void)LLVMFuzzerTestOneInput(c->bytes[i], (size_t)c->count[i]);
  for (uint64_t seed = 0; core_clock_now() - since < seconds; ++seed, ++runs) {
    const int i = (int)(seed % (uint64_t)c->seeds);
    memcpy(mutant, c->bytes[i], (size_t)c->count[i]);
    (void)LLVMFuzzerTestOneInput(mutant, (size_t)mutate(seed * 16, mutant, c->count[i]));
  }
  free(mutant);
  (void)printf("%d seeds, %lld mutations, no fault\n", c->seeds, (long long)runs);
  return runs < 100; /* so few would be no test */
}

int main(int count, char **arguments) {
  corpus *c = calloc(1, sizeof *c);
  int failed = 1;
  while (c != NULL && c->seeds < MOST_SEEDS &&
         (c->count[c->seeds] = fuzz_seed(c->seeds, c->bytes[c->seeds], MOST_BYTES)) > 0)
    ++c->seeds;
  if (c != NULL && c->seeds > 0 && count == 3 && strcmp(arguments[1], "--write-seeds") == 0)
    failed = write_seeds(c, arguments[2]);
  else if (c != NULL && c->seeds > 0)
    failed = run(c, count > 1 ? strtod(arguments[1], NULL) : 10);
  free(c);
  return failed;
}
