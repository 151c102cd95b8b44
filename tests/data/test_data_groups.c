/* Homogeneous batches: the order of epochs is the definition written out plainly; every batch has one
 * signature and equal halves; no sample is lost; a stream gives it from every position. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/random.h"
#include "data/groups_impl.h" /* data_groups */
#include "data_fixture.h"

enum { B = 8, SAMPLES = 100, KINDS = 8, MOST = SAMPLES + KINDS * B };

static int kind_of(const fixture *f, int64_t sample) {
  int kind = 0;
  for (int32_t m = 0; m < f->modalities; ++m) kind |= (fixture_rows(f, m, fixture_id(sample)) > 0) << m;
  return kind;
}

static int64_t length_of(const fixture *f, int64_t sample) {
  int64_t length = 0;
  for (int32_t m = 0; m < f->modalities; ++m) length += fixture_rows(f, m, fixture_id(sample));
  return length;
}

static data_set *open_grouped(const fixture *f, data_incomplete incomplete) {
  data_set *set = fixture_open(f, "train");
  const data_group_options options = {.batch = B, .incomplete = incomplete};
  assert_int_equal(data_set_group(set, &options), CORE_OK);
  assert_int_equal(data_set_samples(set), SAMPLES);
  return set;
}

/* ---- the definition ---- */

/* What epochs so far have left over, by signature. */
typedef struct left {
  int64_t sample[KINDS][B], count[KINDS];
} left;

/* The places of a batch of 8 in the order in which its samples, sorted by falling length, take them. */
static const int places[B] = {0, 4, 2, 6, 1, 5, 3, 7};

static void sort_batch(const fixture *f, const int64_t *from, int64_t *out) {
  int64_t sorted[B];
  memcpy(sorted, from, sizeof sorted);
  for (int i = 1; i < B; ++i)
    for (int k = i; k > 0 && length_of(f, sorted[k - 1]) < length_of(f, sorted[k]); --k) {
      const int64_t kept = sorted[k];
      sorted[k] = sorted[k - 1];
      sorted[k - 1] = kept;
    }
  for (int i = 0; i < B; ++i) out[places[i]] = sorted[i];
}

/* One epoch after those that have left `before`; returns its samples. */
static int64_t reference(const fixture *f, const data_set *set, const data_order_options *options,
                         int64_t stage, int64_t epoch, left *before, int64_t *out) {
  int64_t order[SAMPLES], batch[MOST], count = 0, pick[MOST];
  const int64_t run = options->shuffle_samples / B > 1 ? options->shuffle_samples / B : 1;
  const uint64_t key = core_random_stream(CORE_RANDOM_ORDER, (uint64_t)stage, (uint64_t)epoch);
  assert_int_equal(data_set_order(set, options, stage, epoch, order), CORE_OK);
  for (int64_t i = 0; i < SAMPLES; ++i) {
    const int kind = kind_of(f, order[i]);
    before->sample[kind][before->count[kind]++] = order[i];
    if (before->count[kind] < B) continue;
    sort_batch(f, before->sample[kind], batch + count * B);
    before->count[kind] = 0;
    ++count;
  }
  for (int64_t at = 0, n = 0; at < count; at += run, ++n) {
    const int64_t some = count - at < run ? count - at : run;
    for (int64_t i = 0; i < some; ++i) pick[i] = i;
    if (options->shuffle_samples > 0)
      core_random_permutation(
          options->seed, core_random_stream(CORE_RANDOM_ORDER, key, UINT64_MAX - (uint64_t)n), some, pick);
    for (int64_t i = 0; i < some; ++i)
      memcpy(out + (at + i) * B, batch + (at + pick[i]) * B, B * sizeof *out);
  }
  return count * B;
}

static void equals_definition(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  const int64_t buffers[] = {0, 1, 30, 1000};
  for (int drop = 0; drop <= 1; ++drop) {
    data_set *set = open_grouped(&f, drop ? DATA_INCOMPLETE_DROP : DATA_INCOMPLETE_CARRY);
    for (size_t b = 0; b < sizeof buffers / sizeof *buffers; ++b) {
      const data_order_options options = {.seed = 42, .shuffle_samples = buffers[b]};
      left before = {.count = {0}};
      for (int64_t epoch = 0; epoch < 2 * B + 3; ++epoch) {
        int64_t order[MOST], expected[MOST];
        if (drop) memset(&before, 0, sizeof before);
        const int64_t count = reference(&f, set, &options, 3, epoch, &before, expected);
        assert_int_equal(data_set_epoch_samples(set, epoch), count);
        assert_int_equal(data_set_grouped_order(set, &options, 3, epoch, order), CORE_OK);
        assert_memory_equal(order, expected, (size_t)count * sizeof *order);
      }
    }
    data_set_close(set);
  }
  fixture_remove(f.directory);
}

/* ---- properties ---- */

static void check_batch(const fixture *f, const int64_t *batch) {
  int64_t half[2] = {0, 0}, longest = 0;
  for (int i = 0; i < B; ++i) {
    assert_int_equal(kind_of(f, batch[i]), kind_of(f, batch[0]));
    half[i >= B / 2] += length_of(f, batch[i]);
    if (length_of(f, batch[i]) > longest) longest = length_of(f, batch[i]);
    if (i > 0) assert_true(length_of(f, batch[places[i]]) <= length_of(f, batch[places[i - 1]]));
  }
  assert_true(half[0] >= half[1] && half[0] - half[1] <= longest);
}

/* After B epochs nothing is left over, so every sample has come B times; in each epoch at most once more than
 * it was left over. */
static void nothing_is_lost(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = open_grouped(&f, DATA_INCOMPLETE_CARRY);
  const data_order_options options = {.seed = 7, .shuffle_samples = 30};
  int64_t seen[SAMPLES] = {0}, all = 0, different = 0, first[MOST];
  for (int64_t epoch = 0; epoch < B; ++epoch) {
    int64_t order[MOST];
    const int64_t count = data_set_epoch_samples(set, epoch);
    assert_int_equal(data_set_grouped_order(set, &options, 0, epoch, order), CORE_OK);
    for (int64_t i = 0; i < count; i += B) check_batch(&f, order + i);
    for (int64_t i = 0; i < count; ++i) ++seen[order[i]];
    if (epoch == 0) memcpy(first, order, sizeof first);
    different += memcmp(first, order, 4 * B * sizeof *first) != 0;
    all += count;
  }
  assert_int_equal(all, B * SAMPLES);
  assert_int_equal(different, B - 1);
  for (int64_t i = 0; i < SAMPLES; ++i) assert_int_equal(seen[i], B);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void dropped_epochs_are_short_and_without_repeats(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = open_grouped(&f, DATA_INCOMPLETE_DROP);
  const data_order_options options = {.seed = 7, .shuffle_samples = 30};
  int64_t count[KINDS] = {0}, whole = 0, seen[SAMPLES] = {0};
  for (int64_t i = 0; i < SAMPLES; ++i) ++count[kind_of(&f, i)];
  for (int k = 0; k < KINDS; ++k) whole += count[k] / B * B;
  for (int64_t epoch = 0; epoch < 20; ++epoch) {
    int64_t order[MOST], here[SAMPLES] = {0};
    assert_int_equal(data_set_epoch_samples(set, epoch), whole);
    assert_int_equal(data_set_grouped_order(set, &options, 0, epoch, order), CORE_OK);
    for (int64_t i = 0; i < whole; i += B) check_batch(&f, order + i);
    for (int64_t i = 0; i < whole; ++i) assert_int_equal(++here[order[i]], 1);
    for (int64_t i = 0; i < whole; ++i) seen[order[i]] = 1;
  }
  for (int64_t i = 0; i < SAMPLES; ++i) /* other ones are left out in other epochs */
    assert_int_equal(seen[i], count[kind_of(&f, i)] >= B);
  data_set_close(set);
  fixture_remove(f.directory);
}

/* For ever: a run must resume with a later version of the program. */
static void the_order_is_pinned(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = open_grouped(&f, DATA_INCOMPLETE_CARRY);
  const data_order_options options = {.seed = 1, .shuffle_samples = 30};
  int64_t order[MOST];
  assert_int_equal(data_set_epoch_samples(set, 5), 120);
  assert_int_equal(data_set_grouped_order(set, &options, 2, 5, order), CORE_OK);
  assert_int_equal(core_hash(order, 120 * sizeof *order, 0), 0x6006d66f4a2b04ec);
  data_set_close(set);
  fixture_remove(f.directory);
}

/* ---- streams ---- */

static void check_stream(const fixture *f, data_set *set, data_stream_options options, int64_t batches) {
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  data_position at = options.start;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (int64_t b = 0; b < batches; ++b) {
    int64_t order[MOST];
    while (at.consumed == data_set_epoch_samples(set, at.epoch))
      at = (data_position){at.stage, at.epoch + 1, 0};
    assert_int_equal(data_set_grouped_order(set, &options.order, at.stage, at.epoch, order), CORE_OK);
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    assert_memory_equal(&batch->before, &at, sizeof at);
    fixture_check_batch(f, batch, order + at.consumed);
    at.consumed += B;
    assert_memory_equal(&batch->after, &at, sizeof at);
    data_stream_put(stream, batch);
  }
  data_stream_close(stream);
}

/* Every position of the first epochs, where it lies at the end of one too; with and without an index. */
static void streams_resume_anywhere(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  const data_range range[3] = {{0, B}, {2, 6}, {0, B}};
  const data_index_options index = {.directory = f.directory, .split = "train", .check_values = true};
  data_index_result result;
  for (int indexed = 0; indexed <= 1; ++indexed) {
    if (indexed) assert_int_equal(data_index_build(&index, &result), CORE_OK);
    data_set *set = open_grouped(&f, DATA_INCOMPLETE_CARRY);
    for (int64_t shuffle = 0; shuffle <= 60; shuffle += 20)
      for (int64_t epoch = 0; epoch < 9; epoch += 4)
        for (int64_t consumed = 0; consumed <= data_set_epoch_samples(set, epoch); consumed += B) {
          const data_stream_options options = {.order = {.seed = 5, .shuffle_samples = shuffle},
                                               .start = {.stage = 1, .epoch = epoch, .consumed = consumed},
                                               .batch = B,
                                               .micro_batches = 1,
                                               .range = range,
                                               .threads = 2,
                                               .grouped = true,
                                               .repeat = true};
          check_stream(&f, set, options, consumed == 0 ? 30 : 2);
        }
    data_set_close(set);
  }
  fixture_remove(f.directory);
}

/* Batches of a signature that fewer samples have hold them several times: memory is planned for that. */
static void rare_samples_fit_the_memory(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.shards = 2;
  f.shard_samples = 10;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_group_options options = {.batch = B};
  int64_t count[KINDS] = {0}, rarest = SAMPLES;
  for (int64_t i = 0; i < fixture_samples(&f); ++i) ++count[kind_of(&f, i)];
  for (int k = 0; k < KINDS; ++k)
    if (count[k] > 0 && count[k] < rarest) rarest = count[k];
  assert_true(rarest < 4);
  const int64_t before = data_set_most_rows(set, 0, B);
  assert_int_equal(data_set_group(set, &options), CORE_OK);
  assert_true(data_set_most_rows(set, 0, B) > before);
  const data_range range[3] = {{0, B}, {0, B}, {0, B}};
  const data_stream_options stream = {.order = {.seed = 5, .shuffle_samples = 20},
                                      .batch = B,
                                      .micro_batches = 1,
                                      .range = range,
                                      .grouped = true,
                                      .repeat = true};
  check_stream(&f, set, stream, 150); /* more epochs than a batch has samples */
  data_set_close(set);
  fixture_remove(f.directory);
}

/* What a model makes of an item counts, not what it has; an absent one counts nothing. */
static void lengths_are_those_of_the_model(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_group_options options = {.batch = B, .rows = {7, 0, 300}};
  assert_int_equal(data_set_group(set, &options), CORE_OK);
  int64_t absent = 0;
  for (int64_t i = 0; i < fixture_samples(&f); ++i) {
    const int64_t first = fixture_rows(&f, 0, fixture_id(i)), last = fixture_rows(&f, 2, fixture_id(i));
    absent += (first == 0) + (last == 0);
    assert_int_equal(set->groups->length[i],
                     (first > 0 ? 7 : 0) + fixture_rows(&f, 1, fixture_id(i)) + (last > 0 ? 300 : 0));
  }
  assert_true(absent > 0);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void bad_options(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  data_stream *stream = NULL;
  int64_t order[MOST];
  const data_range range[3] = {{0, B}, {0, B}, {0, B}};
  data_stream_options options = {
      .batch = B, .micro_batches = 1, .range = range, .grouped = true, .repeat = true};
  const data_order_options plain = {.seed = 1};
  fixture_expect(data_stream_open(set, &options, &stream), CORE_ERR_ARGUMENT, "need a set that is grouped",
                 NULL);
  fixture_expect(data_set_grouped_order(set, &plain, 0, 0, order), CORE_ERR_ARGUMENT, "is not grouped", NULL);
  assert_int_equal(data_set_epoch_samples(set, 3), SAMPLES);
  const data_group_options none = {.batch = 0}, large = {.batch = 90, .incomplete = DATA_INCOMPLETE_DROP},
                           good = {.batch = B};
  fixture_expect(data_set_group(set, &none), CORE_ERR_ARGUMENT, "batches of 0 samples", NULL);
  fixture_expect(data_set_group(set, &large), CORE_ERR_ARGUMENT, "no 90 samples have the same modalities",
                 NULL);
  assert_int_equal(data_set_group(set, &good), CORE_OK);
  fixture_expect(data_set_group(set, &good), CORE_ERR_ARGUMENT, "is already grouped", NULL);
  options.start.consumed = 4;
  fixture_expect(data_stream_open(set, &options, &stream), CORE_ERR_ARGUMENT,
                 "can only be changed for a new run", NULL);
  options.start.consumed = 1 << 20;
  fixture_expect(data_stream_open(set, &options, &stream), CORE_ERR_ARGUMENT, "does not lie in a set", NULL);
  options.start.consumed = 0;
  options.batch = 2 * B;
  fixture_expect(data_stream_open(set, &options, &stream), CORE_ERR_ARGUMENT, "need a set that is grouped",
                 NULL);
  data_set_close(set);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(equals_definition),
                                     cmocka_unit_test(nothing_is_lost),
                                     cmocka_unit_test(dropped_epochs_are_short_and_without_repeats),
                                     cmocka_unit_test(the_order_is_pinned),
                                     cmocka_unit_test(streams_resume_anywhere),
                                     cmocka_unit_test(rare_samples_fit_the_memory),
                                     cmocka_unit_test(lengths_are_those_of_the_model),
                                     cmocka_unit_test(bad_options)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
