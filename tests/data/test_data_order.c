/* The order of samples: equal to the definition written out plainly, a permutation, different for every
 * epoch, and the same for ever (its hash is pinned: a run must resume with a later version of the program).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/random.h"
#include "data_fixture.h"

/* Definition: permute the shards; write their samples one after another; permute each run of `buffer`
 * samples. */
static void reference(const fixture *f, const data_order_options *options, int64_t stage, int64_t epoch,
                      int64_t *out) {
  const int64_t samples = fixture_samples(f);
  int64_t shard[64], at = 0;
  int64_t *list = malloc((size_t)samples * sizeof *list), *mix = malloc((size_t)samples * sizeof *mix);
  const uint64_t key = core_random_stream(CORE_RANDOM_ORDER, (uint64_t)stage, (uint64_t)epoch);
  core_random_permutation(options->seed, core_random_stream(CORE_RANDOM_ORDER, key, 0), f->shards, shard);
  for (int32_t s = 0; s < f->shards; ++s) {
    const int64_t first = shard[s] * f->shard_samples;
    const int64_t end = shard[s] == f->shards - 1 ? samples : first + f->shard_samples;
    for (int64_t i = first; i < end; ++i) list[at++] = i;
  }
  uint64_t block = 1;
  for (int64_t lo = 0; lo < samples; lo += options->shuffle_samples, ++block) {
    const int64_t count = samples - lo < options->shuffle_samples ? samples - lo : options->shuffle_samples;
    core_random_permutation(options->seed, core_random_stream(CORE_RANDOM_ORDER, key, block), count, mix);
    for (int64_t i = 0; i < count; ++i) out[lo + i] = list[lo + mix[i]];
  }
  free(list);
  free(mix);
}

static int compare(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

static void equals_definition(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.modalities = 1;
  f.shards = 7;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set), buffers[] = {1, 2, 17, 64, 259, 260, 261, 1000000};
  int64_t *order = malloc((size_t)samples * 8), *expected = malloc((size_t)samples * 8);
  int64_t *previous = calloc((size_t)samples, 8);
  for (size_t b = 0; b < sizeof buffers / sizeof *buffers; ++b)
    for (int64_t epoch = 0; epoch < 4; ++epoch) {
      const data_order_options options = {.seed = 42, .shuffle_samples = buffers[b]};
      assert_int_equal(data_set_order(set, &options, 3, epoch, order), CORE_OK);
      reference(&f, &options, 3, epoch, expected);
      assert_memory_equal(order, expected, (size_t)samples * 8);
      assert_memory_not_equal(order, previous, (size_t)samples * 8);
      memcpy(previous, order, (size_t)samples * 8);
      qsort(order, (size_t)samples, 8, compare);
      for (int64_t i = 0; i < samples; ++i) assert_int_equal(order[i], i);
    }
  free(order);
  free(expected);
  free(previous);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void depends_on_all_keys(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.modalities = 1;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  int64_t order[5][100];
  const data_order_options base = {.seed = 1, .shuffle_samples = 30},
                           seed = {.seed = 2, .shuffle_samples = 30};
  const data_order_options plain = {.seed = 9};
  assert_int_equal(data_set_samples(set), 100);
  assert_int_equal(data_set_order(set, &base, 0, 0, order[0]), CORE_OK);
  assert_int_equal(data_set_order(set, &base, 1, 0, order[1]), CORE_OK);
  assert_int_equal(data_set_order(set, &base, 0, 1, order[2]), CORE_OK);
  assert_int_equal(data_set_order(set, &seed, 0, 0, order[3]), CORE_OK);
  assert_int_equal(data_set_order(set, &plain, 0, 5, order[4]), CORE_OK);
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < a; ++b) assert_memory_not_equal(order[a], order[b], sizeof order[0]);
  for (int64_t i = 0; i < 100; ++i) assert_int_equal(order[4][i], i);
  assert_int_equal(core_hash(order[0], sizeof order[0], 0), 0x43d22835fc027061u);
  const data_order_options negative = {.shuffle_samples = -1};
  fixture_expect(data_set_order(set, &negative, 0, 0, order[0]), CORE_ERR_ARGUMENT, "shuffle", NULL);
  data_set_close(set);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(equals_definition),
                                     cmocka_unit_test(depends_on_all_keys)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
