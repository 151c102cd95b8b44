/* Outline: the order of one epoch. Shards are permuted first; the samples of the permuted shards, one after
 * another, are cut into buffers of `shuffle_samples`, and each buffer is permuted. Reading therefore stays
 * within a few neighbouring shards at a time, and a stream holds one buffer and never the whole order. */
#include <stdlib.h>

#include "core/random.h"
#include "data/memory_impl.h"
#include "data/order_impl.h"

static uint64_t epoch_key(int64_t stage, int64_t epoch) {
  return core_random_stream(CORE_RANDOM_ORDER, (uint64_t)stage, (uint64_t)epoch);
}

void data_order_shards_priv(const data_set *set, const data_order_options *options, int64_t stage,
                            int64_t epoch, int64_t *shard, int64_t *start) {
  const uint64_t stream = core_random_stream(CORE_RANDOM_ORDER, epoch_key(stage, epoch), 0);
  if (options->shuffle_samples > 0)
    core_random_permutation(options->seed, stream, set->shards, shard);
  else
    for (int32_t k = 0; k < set->shards; ++k) shard[k] = k;
  start[0] = 0;
  for (int32_t i = 0; i < set->shards; ++i)
    start[i + 1] = start[i] + set->sample_base[shard[i] + 1] - set->sample_base[shard[i]];
}

int32_t data_order_find_priv(const int64_t *start, int32_t shards, int64_t position) {
  int32_t lo = 0, hi = shards; /* start[lo] <= position < start[hi] */
  while (hi - lo > 1) {
    const int32_t middle = lo + (hi - lo) / 2;
    if (start[middle] <= position)
      lo = middle;
    else
      hi = middle;
  }
  return lo;
}

void data_order_buffer_priv(const data_order_options *options, int64_t stage, int64_t epoch, int64_t buffer,
                            int64_t count, int64_t *pick) {
  const uint64_t stream =
      core_random_stream(CORE_RANDOM_ORDER, epoch_key(stage, epoch), (uint64_t)buffer + 1);
  if (options->shuffle_samples > 0)
    core_random_permutation(options->seed, stream, count, pick);
  else
    for (int64_t n = 0; n < count; ++n) pick[n] = n;
}

/* Buffer by buffer. */
void data_order_fill_priv(const data_set *set, const data_order_options *options, int64_t stage,
                          int64_t epoch, int64_t *shard, int64_t *start, int64_t *order) {
  const int64_t samples = set->samples;
  const int64_t whole = options->shuffle_samples > 0 ? options->shuffle_samples : samples;
  data_order_shards_priv(set, options, stage, epoch, shard, start);
  for (int64_t at = 0, buffer = 0; at < samples; ++buffer) {
    const int64_t count = samples - at < whole ? samples - at : whole;
    data_order_buffer_priv(options, stage, epoch, buffer, count, order + at);
    for (int64_t n = at; n < at + count; ++n) {
      const int64_t position = at + order[n];
      const int32_t k = data_order_find_priv(start, set->shards, position);
      order[n] = set->sample_base[shard[k]] + position - start[k];
    }
    at += count;
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
