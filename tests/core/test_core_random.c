#include "core/random.h"

#include <math.h>
#include <stdlib.h>

#include "tests/support/test_unit.h"

/* Known answers of Philox4x32-10 from Random123's kat_vectors: counter, key, result. Counter words 0 and 1
 * are the index, 2 and 3 the stream, the key is the seed; low words first. */
static void philox_gives_the_known_answers(void **state) {
  (void)state;
  static const uint32_t vectors[3][10] = {{0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                          {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff,
                                           0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                          {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822,
                                           0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 3; i++) {
    const uint32_t *v = vectors[i];
    uint64_t index = (uint64_t)v[1] << 32 | v[0], stream = (uint64_t)v[3] << 32 | v[2],
             seed = (uint64_t)v[5] << 32 | v[4];
    core_random_block block = core_random_at(seed, stream, index);
    for (int w = 0; w < 4; w++) assert_int_equal(block.word[w], v[6 + w]);
    assert_true(core_random_u64(seed, stream, index) == ((uint64_t)v[7] << 32 | v[6]));
  }
}

static void every_argument_matters(void **state) {
  (void)state;
  uint64_t base = core_random_u64(1, 2, 3);
  assert_true(base == core_random_u64(1, 2, 3));
  for (int bit = 0; bit < 64; bit++) {
    uint64_t flip = (uint64_t)1 << bit;
    assert_true(core_random_u64(1 ^ flip, 2, 3) != base);
    assert_true(core_random_u64(1, 2 ^ flip, 3) != base);
    assert_true(core_random_u64(1, 2, 3 ^ flip) != base);
    uint64_t stream = core_random_stream(CORE_RANDOM_INIT, 5, 6);
    assert_true(core_random_stream(CORE_RANDOM_INIT, 5 ^ flip, 6) != stream);
    assert_true(core_random_stream(CORE_RANDOM_INIT, 5, 6 ^ flip) != stream);
  }
  assert_true(core_random_stream(CORE_RANDOM_ORDER, 5, 6) != core_random_stream(CORE_RANDOM_INIT, 5, 6));
  assert_true(core_random_stream(CORE_RANDOM_INIT, 6, 5) != core_random_stream(CORE_RANDOM_INIT, 5, 6));
}

/* Chi-square of counts against equal shares, as a normal deviate (Wilson and Hilferty 1931). */
static double deviate(const int64_t *count, int64_t cells, int64_t draws) {
  double share = (double)draws / (double)cells, sum = 0, freedom = (double)cells - 1;
  for (int64_t i = 0; i < cells; i++) sum += ((double)count[i] - share) * ((double)count[i] - share) / share;
  double spread = 2 / (9 * freedom);
  return (cbrt(sum / freedom) - (1 - spread)) / sqrt(spread);
}

static void below_is_even(void **state) {
  (void)state;
  static const uint64_t sizes[] = {2, 3, 7, 10, 64, 1000};
  enum { DRAWS = 200000 };
  int64_t count[1000];
  for (int i = 0; i < 6; i++) {
    memset(count, 0, sizeof count);
    for (uint64_t d = 0; d < DRAWS; d++) {
      uint64_t value = core_random_below(11, (uint64_t)i, d, sizes[i]);
      assert_true(value < sizes[i]);
      count[value]++;
    }
    assert_true(fabs(deviate(count, (int64_t)sizes[i], DRAWS)) < 4);
  }
  for (uint64_t d = 0; d < 1000; d++) {
    assert_int_equal(core_random_below(1, 2, d, 1), 0);
    assert_true(core_random_below(1, 2, d, UINT64_MAX) < UINT64_MAX);
  }
}

static void uniforms_fill_the_open_interval(void **state) {
  (void)state;
  enum { DRAWS = 400000, CELLS = 256 };
  int64_t count[CELLS] = {0};
  double mean = 0;
  for (uint64_t i = 0; i < DRAWS; i++) {
    double value = core_random_uniform(5, 6, i);
    assert_true(value > 0 && value < 1);
    count[(int)(value * CELLS)]++;
    mean += value / DRAWS;
  }
  assert_true(fabs(deviate(count, CELLS, DRAWS)) < 4);
  assert_true(fabs(mean - 0.5) < 4 * sqrt(1.0 / 12 / DRAWS));
}

static void normals_have_the_moments_and_the_shape(void **state) {
  (void)state;
  enum { DRAWS = 400000, CELLS = 64 };
  double moment[5] = {0}, n = DRAWS, pairs = 0, before = 0;
  int64_t count[CELLS] = {0};
  for (uint64_t i = 0; i < DRAWS; i++) {
    double value = core_random_normal(7, 8, i), power = 1;
    assert_true(isfinite(value));
    for (int k = 1; k < 5; k++) moment[k] += (power *= value) / n;
    count[(int)(CELLS * 0.5 * erfc(-value / sqrt(2)))]++; /* its distribution function is uniform */
    pairs += value * before / n;
    before = value;
  }
  assert_true(fabs(moment[1]) < 4 / sqrt(n));
  assert_true(fabs(moment[2] - 1) < 4 * sqrt(2 / n));
  assert_true(fabs(moment[3]) < 4 * sqrt(15 / n));
  assert_true(fabs(moment[4] - 3) < 4 * sqrt(96 / n));
  assert_true(fabs(pairs) < 4 / sqrt(n));
  assert_true(fabs(deviate(count, CELLS, DRAWS)) < 4);
}

static void permutations_hold_every_number_once(void **state) {
  (void)state;
  static const int64_t sizes[] = {0, 1, 2, 3, 100, 5001};
  for (int i = 0; i < 6; i++) {
    int64_t n = sizes[i], *out = malloc((size_t)(n + 1) * sizeof *out),
            *again = malloc((size_t)(n + 1) * sizeof *out);
    char *seen = calloc((size_t)n + 1, 1);
    assert_true(out && again && seen);
    out[n] = again[n] = -77;
    core_random_permutation(1, 2, n, out);
    core_random_permutation(1, 2, n, again);
    assert_memory_equal(out, again, (size_t)(n + 1) * sizeof *out);
    assert_int_equal(out[n], -77);
    for (int64_t k = 0; k < n; k++) {
      assert_true(out[k] >= 0 && out[k] < n && !seen[out[k]]);
      seen[out[k]] = 1;
    }
    core_random_permutation(1, 3, n, again);
    if (n > 50) assert_memory_not_equal(out, again, (size_t)n * sizeof *out);
    free(out);
    free(again);
    free(seen);
  }
}

static void permutations_are_equally_likely(void **state) {
  (void)state;
  enum { N = 5, ALL = 120, DRAWS = 36000 };
  int64_t count[ALL] = {0}, out[N];
  for (uint64_t d = 0; d < DRAWS; d++) {
    int64_t number = 0;
    core_random_permutation(42, d, N, out);
    for (int i = 0; i < N; i++) { /* Lehmer's number of the permutation */
      int64_t smaller = 0;
      for (int j = i + 1; j < N; j++) smaller += out[j] < out[i];
      number = number * (N - i) + smaller;
    }
    count[number]++;
  }
  assert_true(fabs(deviate(count, ALL, DRAWS)) < 4);
}

static void hashes_are_xxhash64(void **state) {
  (void)state;
  assert_true(core_hash_text("") == 0xef46db3751d8e999u);
  assert_true(core_hash_text("a") == 0xd24ec4f1a98c6e5bu);
  assert_true(core_hash_text("abc") == 0x44bc2cf5ad770999u);
  assert_true(core_hash("abc", 3, 0) == core_hash_text("abc"));
  assert_true(core_hash("abc", 3, 1) != core_hash_text("abc"));
  assert_true(core_hash("abcd", 3, 0) == core_hash_text("abc"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(philox_gives_the_known_answers),
      cmocka_unit_test(every_argument_matters),
      cmocka_unit_test(below_is_even),
      cmocka_unit_test(uniforms_fill_the_open_interval),
      cmocka_unit_test(normals_have_the_moments_and_the_shape),
      cmocka_unit_test(permutations_hold_every_number_once),
      cmocka_unit_test(permutations_are_equally_likely),
      cmocka_unit_test(hashes_are_xxhash64),
  };
  return cmocka_run_group_tests_name("core/random", tests, NULL, NULL);
}
