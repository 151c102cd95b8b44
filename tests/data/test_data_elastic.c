/* Elastic order: whatever the number of ranks, the accumulation and the places where a run was cut and
 * resumed, the samples of an epoch come in one order, each once, and every rank sees the same ids. And how
 * good the shuffle is: measured against a full permutation. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/random.h"
#include "data_fixture.h"

enum { BATCH = 16, MOST_RANKS = 8 };

typedef struct layout {
  int ranks, accumulation;
} layout;

/* The share of a rank: micro-batch after micro-batch a contiguous piece. */
static void share(const layout *l, int rank, data_range *range) {
  const int64_t micro = BATCH / l->accumulation, own = micro / l->ranks;
  for (int a = 0; a < l->accumulation; ++a)
    for (int m = 0; m < 3; ++m)
      range[a * 3 + m] = (data_range){a * micro + rank * own, a * micro + (rank + 1) * own};
}

static data_stream *open_rank(data_set *set, const layout *l, int rank, data_position start) {
  data_range range[3 * BATCH];
  data_stream *stream = NULL;
  share(l, rank, range);
  const data_stream_options options = {.order = {.seed = 8, .shuffle_samples = 33},
                                       .start = start,
                                       .batch = BATCH,
                                       .micro_batches = l->accumulation,
                                       .range = range,
                                       .threads = 1 + rank % 2,
                                       .repeat = true};
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  return stream;
}

/* One batch of all ranks: the ids agree, the parts put together are the batch. Latents are compared by the
 * fixture. */
static void take_batch(const fixture *f, const layout *l, data_stream **stream, const int64_t *order,
                       uint64_t *id, data_position *after) {
  data_batch *batch[MOST_RANKS];
  int seen[3][BATCH] = {{0}};
  for (int r = 0; r < l->ranks; ++r) {
    assert_int_equal(data_stream_get(stream[r], &batch[r]), CORE_OK);
    fixture_check_batch(f, batch[r], order);
    assert_memory_equal(batch[r]->id, batch[0]->id, BATCH * sizeof *id);
    for (int p = 0; p < 3 * l->accumulation; ++p)
      for (int64_t i = batch[r]->part[p].lo; i < batch[r]->part[p].hi; ++i) ++seen[p % 3][i];
  }
  for (int m = 0; m < 3; ++m)
    for (int i = 0; i < BATCH; ++i) assert_int_equal(seen[m][i], 1);
  memcpy(id, batch[0]->id, BATCH * sizeof *id);
  *after = batch[0]->after;
  for (int r = 0; r < l->ranks; ++r) data_stream_put(stream[r], batch[r]);
}

/* Two epochs, with the layout changing at every cut: the run goes on with other ranks and another
 * accumulation. */
static void run(const fixture *f, data_set *set, const layout *layouts, int count, int64_t batches_each,
                uint64_t *ids) {
  const int64_t samples = data_set_samples(set), batches = 2 * samples / BATCH;
  const data_order_options order_options = {.seed = 8, .shuffle_samples = 33};
  int64_t *order = malloc((size_t)(3 * samples) * sizeof *order);
  data_position at = {0};
  for (int64_t e = 0; e < 3; ++e)
    assert_int_equal(data_set_order(set, &order_options, 0, e, order + e * samples), CORE_OK);
  for (int64_t done = 0, cut = 0; done < batches; ++cut) {
    const layout *l = &layouts[cut % count];
    data_stream *stream[MOST_RANKS];
    for (int r = 0; r < l->ranks; ++r) stream[r] = open_rank(set, l, r, at);
    for (int64_t b = 0; b < batches_each && done < batches; ++b, ++done)
      take_batch(f, l, stream, order + done * BATCH, ids + done * BATCH, &at);
    for (int r = 0; r < l->ranks; ++r) data_stream_close(stream[r]);
  }
  assert_int_equal(at.epoch * samples + at.consumed, batches * BATCH);
  free(order);
}

static int compare_ids(const void *a, const void *b) {
  const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return (x > y) - (x < y);
}

static void one_order_for_all(void **state) {
  (void)state;
  static const layout layouts[] = {{1, 1}, {2, 1}, {4, 2}, {8, 2}, {8, 1}, {1, 4}, {2, 8}, {4, 4}};
  enum { LAYOUTS = sizeof layouts / sizeof *layouts };
  fixture f = fixture_small();
  f.shards = 4;
  f.shard_samples = 32; /* 112 samples: 7 batches, so an epoch also ends with a batch */
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set), all = 2 * samples;
  uint64_t *first = calloc((size_t)all, sizeof *first), *other = calloc((size_t)all, sizeof *other);
  assert_int_equal(samples % BATCH, 0);
  run(&f, set, layouts, 1, 1000, first);
  for (int l = 1; l < LAYOUTS; ++l) { /* whole runs, and runs cut after every 1, 2, ... batches */
    run(&f, set, &layouts[l], 1, 1000, other);
    assert_memory_equal(first, other, (size_t)all * sizeof *first);
    run(&f, set, layouts, LAYOUTS, l, other);
    assert_memory_equal(first, other, (size_t)all * sizeof *first);
  }
  for (int e = 0; e < 2; ++e) { /* an epoch is every sample once */
    qsort(first + e * samples, (size_t)samples, sizeof *first, compare_ids);
    for (int64_t i = 0; i < samples; ++i) other[i] = fixture_id(i);
    qsort(other, (size_t)samples, sizeof *other, compare_ids);
    assert_memory_equal(first + e * samples, other, (size_t)samples * sizeof *first);
  }
  free(first);
  free(other);
  data_set_close(set);
  fixture_remove(f.directory);
}

/* ---- quality ---- */

typedef struct quality {
  double distance;  /* mean |place in the epoch - place in the files|, of the N/3 of a random permutation */
  double adjacency; /* share of neighbours in the epoch that are neighbours in the files (random: 2/N) */
  double mixture;   /* mean over batches of 64: distinct shards in a batch, of what random draws would show */
  double repeat;    /* |correlation| of a sample's places in two epochs */
} quality;

static void places(const int64_t *order, int64_t samples, int64_t *place) {
  for (int64_t n = 0; n < samples; ++n) place[order[n]] = n;
}

static double correlation(const int64_t *a, const int64_t *b, int64_t samples) {
  const double mean = (double)(samples - 1) / 2;
  double product = 0, square = 0;
  for (int64_t i = 0; i < samples; ++i) {
    product += ((double)a[i] - mean) * ((double)b[i] - mean);
    square += ((double)a[i] - mean) * ((double)a[i] - mean);
  }
  return fabs(product / square);
}

static double count_shards(const int64_t *order, int64_t count, int64_t shard_samples) {
  uint8_t seen[4096] = {0};
  double shards = 0;
  for (int64_t i = 0; i < count; ++i) {
    shards += seen[order[i] / shard_samples] == 0;
    seen[order[i] / shard_samples] = 1;
  }
  return shards;
}

static quality measure(data_set *set, int64_t shuffle, int64_t shard_samples) {
  enum { DRAW = 64, EPOCHS = 4 };
  const int64_t samples = data_set_samples(set), shards = data_set_shards(set);
  int64_t *order = malloc((size_t)samples * 8), *place = malloc((size_t)samples * 8),
          *before = calloc((size_t)samples, 8);
  const double expected = (double)shards * (1 - pow(1 - 1.0 / (double)shards, DRAW));
  quality q = {0};
  for (int64_t e = 0; e < EPOCHS; ++e) {
    const data_order_options options = {.seed = 4, .shuffle_samples = shuffle};
    assert_int_equal(data_set_order(set, &options, 0, e, order), CORE_OK);
    places(order, samples, place);
    double distance = 0, adjacent = 0, mixture = 0;
    for (int64_t i = 0; i < samples; ++i) distance += fabs((double)(place[i] - i));
    for (int64_t n = 1; n < samples; ++n) adjacent += llabs(order[n] - order[n - 1]) == 1;
    for (int64_t n = 0; n + DRAW <= samples; n += DRAW)
      mixture += count_shards(order + n, DRAW, shard_samples);
    q.distance += distance / (double)samples / ((double)samples / 3) / EPOCHS;
    q.adjacency += adjacent / (double)(samples - 1) / EPOCHS;
    q.mixture += mixture / (double)(samples / DRAW) / expected / EPOCHS;
    if (e > 0) q.repeat = fmax(q.repeat, correlation(place, before, samples));
    memcpy(before, place, (size_t)samples * 8);
  }
  free(order);
  free(place);
  free(before);
  return q;
}

static void shuffle_quality(void **state) {
  (void)state;
  enum { SHARDS = 64, SHARD_SAMPLES = 128 };
  fixture f = fixture_small();
  f.modalities = 1;
  f.width[0] = 1;
  f.most_rows = 1;
  f.shards = SHARDS;
  f.shard_samples = SHARD_SAMPLES;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set);
  print_message("shuffle buffer   distance   adjacency   shards in 64   epochs correlate\n");
  for (int64_t shards = 1; shards <= SHARDS; shards *= 4) {
    const int64_t buffer = shards == SHARDS ? samples : shards * SHARD_SAMPLES;
    const quality q = measure(set, buffer, SHARD_SAMPLES);
    print_message("%4lld of 64 shards   %.3f     %.5f        %.3f          %.3f\n", (long long)shards,
                  q.distance, q.adjacency, q.mixture, q.repeat);
    /* Shards are permuted, so a sample moves as far as in a full permutation, up to the chance of 64 shards.
     */
    assert_true(q.distance > 0.85 && q.distance < 1.15);
    assert_true(q.repeat < 0.3);
    /* Within a buffer neighbours are as rare as among its samples at random: 2 / buffer. */
    assert_true(q.adjacency <
                3.0 / (double)buffer + 4 / sqrt((double)samples) / (double)sqrt((double)buffer));
    /* A draw of 64 sees min(shards, ...) shards: a buffer of 16 shards shows a fifth of them, a full one all.
     */
    const double seen = (double)shards * (1 - pow(1 - 1.0 / (double)shards, 64)),
                 ideal = 64 * (1 - pow(1 - 1.0 / 64, 64));
    assert_true(fabs(q.mixture - seen / ideal) < 0.1 * seen / ideal + 0.02);
  }
  data_set_close(set);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(one_order_for_all), cmocka_unit_test(shuffle_quality)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
