/* Outline: the order of one epoch. Shards are permuted first; the samples of the permuted shards, one after
 * another, are cut into buffers of `shuffle_samples`, and each buffer is permuted. Reading therefore stays
 * within a few neighbouring shards at a time. */
#include "data/order_impl.h"

#include <stdlib.h>

#include "core/random.h"
#include "data/memory_impl.h"

/* start[i]: position at which the i-th shard of the permuted order begins. */
static void place_shards(const data_set *set, const int64_t *shard, int64_t *start) {
  start[0] = 0;
  for (int32_t i = 0; i < set->shards; ++i)
    start[i + 1] = start[i] + set->sample_base[shard[i] + 1] - set->sample_base[shard[i]];
}

/* The sample at `position` of the permuted shards laid one after another. */
static int64_t sample_at(const data_set *set, const int64_t *shard, const int64_t *start, int64_t position) {
  int32_t lo = 0, hi = set->shards;
  while (hi - lo > 1) {
    const int32_t middle = lo + (hi - lo) / 2;
    if (start[middle] <= position)
      lo = middle;
    else
      hi = middle;
  }
  return set->sample_base[shard[lo]] + position - start[lo];
}

void data_order_fill_priv(const data_set *set, const data_order_options *options, int64_t stage,
                          int64_t epoch, int64_t *shard, int64_t *start, int64_t *order) {
  const int64_t samples = set->samples, buffer = options->shuffle_samples;
  const uint64_t key = core_random_stream(CORE_RANDOM_ORDER, (uint64_t)stage, (uint64_t)epoch);
  if (buffer <= 0) {
    for (int64_t n = 0; n < samples; ++n) order[n] = n;
    return;
  }
  core_random_permutation(options->seed, core_random_stream(CORE_RANDOM_ORDER, key, 0), set->shards, shard);
  place_shards(set, shard, start);
  uint64_t stream = 0;
  for (int64_t at = 0; at < samples; at += buffer) {
    const int64_t count = samples - at < buffer ? samples - at : buffer;
    core_random_permutation(options->seed, core_random_stream(CORE_RANDOM_ORDER, key, ++stream), count,
                            order + at);
    for (int64_t n = at; n < at + count; ++n) order[n] = sample_at(set, shard, start, at + order[n]);
    if (buffer >= samples - at) break; /* also keeps `at` from overflowing */
  }
}

core_status data_set_order(const data_set *set, const data_order_options *options, int64_t stage,
                           int64_t epoch, int64_t *order) {
  int64_t *shard = NULL, *start = NULL;
  CHECK(options->shuffle_samples >= 0, CORE_ERR_ARGUMENT,
        "shuffle buffer of %lld samples, expected 0 or more", (long long)options->shuffle_samples);
  TRY(DATA_ALLOCATE(set->shards, "order of shards", &shard));
  const core_status status = DATA_ALLOCATE((int64_t)set->shards + 1, "order of shards", &start);
  if (status == CORE_OK) data_order_fill_priv(set, options, stage, epoch, shard, start, order);
  free(shard);
  free(start);
  TRY(status);
  return CORE_OK;
}
