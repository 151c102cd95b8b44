#include "core/random.h"

#include <math.h>
#include <string.h>
#include <xxhash.h> /* XXH64 */

/* One Philox round: two 32x32 -> 64 products, mixed with the key. Constants from the paper, table 2. */
static void philox_round(uint32_t counter[4], const uint32_t key[2]) {
  uint64_t p0 = (uint64_t)0xD2511F53u * counter[0], p1 = (uint64_t)0xCD9E8D57u * counter[2];
  uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ counter[1] ^ key[0], (uint32_t)p1,
                      (uint32_t)(p0 >> 32) ^ counter[3] ^ key[1], (uint32_t)p0};
  memcpy(counter, next, sizeof next);
}

core_random_block core_random_at(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream,
                         (uint32_t)(stream >> 32)};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    philox_round(counter, key);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  core_random_block block;
  memcpy(block.word, counter, sizeof counter);
  return block;
}

static uint64_t join(uint32_t low, uint32_t high) {
  return (uint64_t)high << 32 | low;
}

static double open_unit(uint64_t bits) {
  return ((double)(bits >> 11) + 0.5) * 0x1p-53;
}

uint64_t core_random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
  core_random_block block = core_random_at(seed, stream, index);
  return join(block.word[0], block.word[1]);
}

double core_random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return open_unit(core_random_u64(seed, stream, index));
}

double core_random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  core_random_block block = core_random_at(seed, stream, index);
  double radius = sqrt(-2.0 * log(open_unit(join(block.word[0], block.word[1]))));
  return radius * cos(6.283185307179586 * open_unit(join(block.word[2], block.word[3])));
}

/* Lemire's multiplication; the words of one block are enough tries for every n that occurs, and the last one
 * is taken with its bias of at most n / 2^64. */
uint64_t core_random_below(uint64_t seed, uint64_t stream, uint64_t index, uint64_t n) {
  core_random_block block = core_random_at(seed, stream, index);
  uint64_t threshold = (0 - n) % n;
  unsigned __int128 product = (unsigned __int128)join(block.word[0], block.word[1]) * n;
  if ((uint64_t)product < threshold) product = (unsigned __int128)join(block.word[2], block.word[3]) * n;
  return (uint64_t)(product >> 64);
}

uint64_t core_random_stream(core_random_purpose purpose, uint64_t a, uint64_t b) {
  uint64_t words[3] = {(uint64_t)purpose, a, b};
  return XXH64(words, sizeof words, 0);
}

void core_random_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *out) {
  for (int64_t i = 0; i < n; i++) out[i] = i;
  for (int64_t i = n - 1; i > 0; i--) {
    int64_t j = (int64_t)core_random_below(seed, stream, (uint64_t)i, (uint64_t)i + 1);
    int64_t swap = out[i];
    out[i] = out[j];
    out[j] = swap;
  }
}

uint64_t core_hash(const void *bytes, size_t count, uint64_t seed) {
  return XXH64(bytes, count, seed);
}

uint64_t core_hash_text(const char *text) {
  return XXH64(text, strlen(text), 0);
}
