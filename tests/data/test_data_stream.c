/* Streams: equal to the order they promise, whatever the threads, the cache and the ranges; resumable
 * anywhere; two ranks together see the global batch; closing is quick in every state. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/clock.h"
#include "core/stop.h"
#include "data_fixture.h"

enum { EPOCHS = 4 };

/* The orders of epochs 0 .. EPOCHS-1 one after another. */
static int64_t *long_order(data_set *set, const data_order_options *options, int64_t stage) {
  const int64_t samples = data_set_samples(set);
  int64_t *order = malloc((size_t)(samples * EPOCHS) * sizeof *order);
  for (int64_t e = 0; e < EPOCHS; ++e)
    assert_int_equal(data_set_order(set, options, stage, e, order + e * samples), CORE_OK);
  return order;
}

static void check_position(const data_position *at, int64_t samples, int64_t seen, bool end) {
  assert_int_equal(at->epoch * samples + at->consumed, seen);
  assert_true(at->consumed >= 0 && at->consumed <= samples);
  if (!end) assert_true(at->consumed < samples); /* a batch begins inside an epoch */
}

/* Streams `batches` batches from `start` and checks all of it. */
static void check_stream(const fixture *f, data_set *set, data_stream_options options, int64_t batches) {
  const int64_t samples = data_set_samples(set);
  int64_t *order = long_order(set, &options.order, options.start.stage);
  int64_t seen = options.start.epoch * samples + options.start.consumed;
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (int64_t b = 0; b < batches; ++b) {
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    assert_non_null(batch);
    assert_int_equal(batch->samples, options.batch);
    check_position(&batch->before, samples, seen, false);
    fixture_check_batch(f, batch, order + seen);
    for (int32_t p = 0; p < batch->micro_batches * batch->modalities; ++p) {
      assert_int_equal(batch->part[p].lo, options.range[p].lo);
      assert_int_equal(batch->part[p].hi, options.range[p].hi);
    }
    seen += batch->samples;
    check_position(&batch->after, samples, seen, true);
    assert_int_equal(batch->after.stage, options.start.stage);
    data_stream_put(stream, batch);
  }
  data_stream_close(stream);
  free(order);
}

static void all_settings(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range whole[3] = {{0, 16}, {0, 16}, {0, 16}};
  const data_range split[6] = {{0, 4}, {0, 8}, {3, 3}, {4, 8}, {8, 16}, {15, 16}};
  for (int threads = 1; threads <= 4; threads += 3)
    for (int queue = 1; queue <= 3; queue += 2)
      for (int64_t cache = 1; cache <= 1 << 20; cache <<= 10)
        for (int64_t shuffle = 0; shuffle <= 64; shuffle += 32)
          for (int micro = 1; micro <= 2; ++micro) {
            const data_stream_options options = {.order = {.seed = 5, .shuffle_samples = shuffle},
                                                 .start = {.stage = 1},
                                                 .batch = 16,
                                                 .micro_batches = micro,
                                                 .range = micro == 1 ? whole : split,
                                                 .queue = queue,
                                                 .threads = threads,
                                                 .cache_bytes = cache,
                                                 .repeat = true};
            check_stream(&f, set, options, 15); /* two epoch ends */
          }
  data_set_close(set);
  fixture_remove(f.directory);
}

/* The same for files without chunks' filters, where bands are read in place. */
static void plain_files(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.filter = DATA_FILTER_NONE;
  f.dtype = CORE_BFLOAT16;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 33}, {5, 9}, {0, 33}};
  const data_stream_options options = {.order = {.seed = 6, .shuffle_samples = 50},
                                       .batch = 33,
                                       .micro_batches = 1,
                                       .range = range,
                                       .cache_bytes = 1,
                                       .threads = 2,
                                       .repeat = true};
  check_stream(&f, set, options, 9);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void resume_anywhere(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set);
  const data_range range[3] = {{0, 7}, {0, 7}, {0, 7}};
  for (int64_t epoch = 0; epoch < 2; ++epoch)
    for (int64_t consumed = 0; consumed <= samples; ++consumed) {
      const data_stream_options options = {.order = {.seed = 5, .shuffle_samples = 30},
                                           .start = {.epoch = epoch, .consumed = consumed},
                                           .batch = 7,
                                           .micro_batches = 1,
                                           .range = range,
                                           .repeat = true};
      check_stream(&f, set, options, 2);
    }
  data_set_close(set);
  fixture_remove(f.directory);
}

/* A batch may be larger than the set. */
static void batch_over_several_epochs(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.shards = 1;
  f.shard_samples = 9;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 17}, {0, 17}, {0, 17}};
  const data_stream_options options = {.order = {.seed = 5, .shuffle_samples = 4},
                                       .batch = 17,
                                       .micro_batches = 1,
                                       .range = range,
                                       .repeat = true};
  check_stream(&f, set, options, 2);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void two_ranks_make_the_batch(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  /* One rank has the images and the first texts, the other the rest. */
  const data_range range[2][3] = {{{0, 20}, {0, 5}, {0, 0}}, {{20, 20}, {5, 20}, {0, 20}}};
  data_stream *stream[2];
  for (int rank = 0; rank < 2; ++rank) {
    const data_stream_options options = {.order = {.seed = 8, .shuffle_samples = 25},
                                         .batch = 20,
                                         .micro_batches = 1,
                                         .range = range[rank],
                                         .repeat = true,
                                         .threads = 1 + rank};
    assert_int_equal(data_stream_open(set, &options, &stream[rank]), CORE_OK);
  }
  for (int b = 0; b < 12; ++b) {
    data_batch *batch[2];
    for (int rank = 0; rank < 2; ++rank)
      assert_int_equal(data_stream_get(stream[rank], &batch[rank]), CORE_OK);
    assert_memory_equal(batch[0]->id, batch[1]->id, 20 * sizeof(uint64_t));
    for (int32_t m = 0; m < 3; ++m) {
      int64_t rows = 0, expected = 0;
      for (int rank = 0; rank < 2; ++rank) {
        const data_part *part = &batch[rank]->part[m];
        rows += part->offset[part->hi - part->lo];
      }
      for (int i = 0; i < 20; ++i) expected += fixture_rows(&f, m, batch[0]->id[i]);
      assert_int_equal(rows, expected);
    }
    for (int rank = 0; rank < 2; ++rank) data_stream_put(stream[rank], batch[rank]);
  }
  for (int rank = 0; rank < 2; ++rank) data_stream_close(stream[rank]);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void one_epoch_for_evaluation(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set);
  const data_range range[3] = {{0, 32}, {20, 32}, {0, 32}};
  int64_t *order = malloc((size_t)samples * sizeof *order);
  for (int64_t i = 0; i < samples; ++i) order[i] = i;
  for (int64_t start = 0; start <= samples; start += samples / 2) {
    const data_stream_options options = {
        .start = {.consumed = start}, .batch = 32, .micro_batches = 1, .range = range};
    data_stream *stream = NULL;
    data_batch *batch = NULL;
    int64_t seen = start % samples;
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    for (;;) {
      assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
      if (batch == NULL) break;
      assert_int_equal(batch->before.epoch,
                       start == samples); /* the end of an epoch is the start of the next */
      fixture_check_batch(&f, batch, order + seen);
      seen += batch->samples;
      assert_int_equal(batch->samples,
                       seen < samples || samples % 32 == 0 ? 32 : (samples - start % samples) % 32);
      assert_int_equal(batch->part[1].lo, batch->samples < 20 ? batch->samples : 20);
      assert_int_equal(batch->part[1].hi, batch->samples);
      data_stream_put(stream, batch);
    }
    assert_int_equal(seen, samples);
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK); /* the end stays the end */
    assert_null(batch);
    data_stream_close(stream);
  }
  free(order);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void close_in_every_state(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.most_rows = 60;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 10}, {0, 10}, {0, 10}};
  for (int i = 0; i < 40; ++i) {
    const data_stream_options options = {.order = {.seed = 5, .shuffle_samples = 30},
                                         .batch = 10,
                                         .micro_batches = 1,
                                         .range = range,
                                         .cache_bytes = i % 2 ? 1 : 0,
                                         .threads = 1 + i % 3,
                                         .repeat = i % 4 != 3};
    data_stream *stream = NULL;
    data_batch *batch[3] = {NULL};
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    for (int b = 0; b < i % 4; ++b)
      assert_int_equal(data_stream_get(stream, &batch[b]), CORE_OK); /* none put back */
    if (i % 5 == 0) core_clock_sleep(0.002 * i);
    if (i % 4 == 3) /* queue and plan: 3 batches, all lent */
      fixture_expect(data_stream_get(stream, &batch[0]), CORE_ERR_ARGUMENT, "lent", NULL);
    const double since = core_clock_now();
    data_stream_close(stream);
    assert_true(core_clock_now() - since < 1.0);
  }
  data_stream_close(NULL);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void waiting_is_measured(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 10}, {0, 10}, {0, 10}};
  const data_stream_options options = {.batch = 10, .micro_batches = 1, .range = range, .repeat = true};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  assert_true(data_stream_waited(stream) == 0);
  assert_true(data_stream_bytes(stream) > 0);
  const double since = core_clock_now();
  assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
  data_stream_put(stream, batch);
  const double first = data_stream_waited(stream), took = core_clock_now() - since;
  assert_true(first > 0 && first <= took);
  core_clock_sleep(0.2); /* the queue fills: the next batch is there at once */
  assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
  assert_true(data_stream_waited(stream) - first < 0.05);
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void bad_options(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  data_range range[3] = {{0, 10}, {0, 10}, {0, 10}};
  const data_stream_options good = {.batch = 10, .micro_batches = 1, .range = range};
  for (int i = 0; i < 8; ++i) {
    data_stream_options bad = good;
    data_stream *stream = NULL;
    if (i == 0) bad.batch = 0;
    if (i == 1) bad.batch = 9;
    if (i == 2) bad.micro_batches = 0;
    if (i == 3) bad.threads = -1;
    if (i == 4) bad.queue = 1 << 20;
    if (i == 5) bad.start.consumed = data_set_samples(set) + 1;
    if (i == 6) bad.start.epoch = -1;
    if (i == 7) bad.cache_bytes = -1;
    fixture_expect(data_stream_open(set, &bad, &stream), CORE_ERR_ARGUMENT, NULL, NULL);
    assert_null(stream);
  }
  data_set_close(set);
  fixture_remove(f.directory);
}

/* Last in this file: the flag stays set. */
static void stop_request_ends_waiting(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.shards = 1;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 40}, {0, 40}, {0, 40}};
  const data_stream_options options = {
      .batch = 40, .micro_batches = 1, .range = range, .queue = 1, .repeat = true};
  data_stream *stream = NULL;
  data_batch *ready = NULL, *batch = NULL;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  assert_int_equal(data_stream_get(stream, &ready), CORE_OK);
  core_clock_sleep(0.2);
  core_stop_request(SIGTERM);
  data_stream_put(stream, ready);
  assert_int_equal(data_stream_get(stream, &batch), CORE_OK); /* what is ready is still handed out */
  assert_non_null(batch);
  core_status status = CORE_OK;
  for (int i = 0; i < 3 && status == CORE_OK; ++i) { /* sooner or later there is something to wait for */
    data_stream_put(stream, batch);
    status = data_stream_get(stream, &batch);
  }
  if (status != CORE_OK) fixture_expect(status, CORE_ERR_STOPPED, "stopped", NULL);
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(all_settings),
                                     cmocka_unit_test(plain_files),
                                     cmocka_unit_test(resume_anywhere),
                                     cmocka_unit_test(batch_over_several_epochs),
                                     cmocka_unit_test(two_ranks_make_the_batch),
                                     cmocka_unit_test(one_epoch_for_evaluation),
                                     cmocka_unit_test(close_in_every_state),
                                     cmocka_unit_test(waiting_is_measured),
                                     cmocka_unit_test(bad_options),
                                     cmocka_unit_test(stop_request_ends_waiting)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
