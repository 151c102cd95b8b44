/* Runs a fuzz target without libFuzzer: every input of the corpus and every seed, then mutations of all of
 * them for a bounded time (at least LEAST_RUNS, however slow the machine), always the same ones in the same
 * order.
 *
 *   fuzz_x CORPUS SECONDS              CORPUS: what libFuzzer found worth keeping, lengths (32 bits) and
 * bytes, by zstd fuzz_x CORPUS --write-seeds DIR    seeds and corpus as files, for libFuzzer */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "core/clock.h"
#include "core/random.h"
#include "fuzz_target.h"

enum { MOST_BYTES = 1 << 16, MOST_SEEDS = 16, MOST_INPUTS = 1024, MOST_CORPUS = 1 << 24, LEAST_RUNS = 100 };

typedef struct corpus {
  uint8_t made[MOST_SEEDS][MOST_BYTES];
  uint8_t *kept; /* decompressed */
  const uint8_t *bytes[MOST_INPUTS];
  int64_t count[MOST_INPUTS];
  int seeds;
} corpus;

/* False: it is damaged, which is no reason to test less in silence. */
static bool add_corpus(corpus *c, const char *path) {
  uint8_t *packed = malloc(MOST_CORPUS);
  c->kept = malloc(MOST_CORPUS);
  if (packed == NULL || c->kept == NULL) return false;
  const int64_t stored = fuzz_read(path, packed, MOST_CORPUS);
  const size_t bytes = ZSTD_decompress(c->kept, MOST_CORPUS, packed, (size_t)stored);
  free(packed);
  if (stored <= 0 || ZSTD_isError(bytes)) return false;
  for (size_t at = 0; at + 4 <= bytes;) {
    uint32_t length = 0;
    memcpy(&length, c->kept + at, sizeof length);
    if (c->seeds == MOST_INPUTS || length > MOST_BYTES || length > bytes - at - 4) return false;
    c->bytes[c->seeds] = c->kept + at + 4;
    c->count[c->seeds++] = length;
    at += 4 + (size_t)length;
  }
  return true;
}

static int write_seeds(const corpus *c, const char *directory) {
  for (int i = 0; i < c->seeds; ++i) {
    char path[512];
    (void)snprintf(path, sizeof path, "%s/seed-%03d", directory, i);
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

static void run(const corpus *c, double seconds) {
  uint8_t *mutant = malloc(MOST_BYTES);
  int64_t runs = 0;
  const double since = core_clock_now();
  for (int i = 0; i < c->seeds; ++i) (void)LLVMFuzzerTestOneInput(c->bytes[i], (size_t)c->count[i]);
  for (uint64_t seed = 0; runs < LEAST_RUNS || core_clock_now() - since < seconds; ++seed, ++runs) {
    const int i = (int)(seed % (uint64_t)c->seeds);
    memcpy(mutant, c->bytes[i], (size_t)c->count[i]);
    (void)LLVMFuzzerTestOneInput(mutant, (size_t)mutate(seed * 16, mutant, c->count[i]));
  }
  free(mutant);
  (void)printf("%d inputs, %lld mutations, no fault\n", c->seeds, (long long)runs);
}

int main(int count, char **arguments) {
  corpus *c = calloc(1, sizeof *c);
  int failed = 1;
  if (count < 3 || c == NULL) {
    (void)fprintf(stderr, "usage: %s CORPUS SECONDS | CORPUS --write-seeds DIRECTORY\n", arguments[0]);
    return 2;
  }
  while (c->seeds < MOST_SEEDS &&
         (c->count[c->seeds] = fuzz_seed(c->seeds, c->made[c->seeds], MOST_BYTES)) > 0) {
    c->bytes[c->seeds] = c->made[c->seeds];
    ++c->seeds;
  }
  const int made = c->seeds;
  if (!add_corpus(c, arguments[1]))
    (void)fprintf(stderr, "%s: no corpus, or a damaged one\n", arguments[1]);
  else if (made > 0 && count == 4 && strcmp(arguments[2], "--write-seeds") == 0)
    failed = write_seeds(c, arguments[3]);
  else if (made > 0) {
    run(c, strtod(arguments[2], NULL));
    failed = 0;
  }
  free(c->kept);
  free(c);
  return failed;
}
