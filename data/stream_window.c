/* Outline: the columns of one shuffle buffer (in file order: of a stretch of samples) are held; the next one
 * is fetched when a plan asks for it. So what a stream keeps of the samples does not grow with the set. */
#include <stdlib.h>

#include "data/index_impl.h"
#include "data/stream_impl.h"

/* The window that covers `position`. */
static void place_window(data_stream *stream, const data_position *at) {
  data_window *window = &stream->window;
  const data_set *set = stream->set;
  if (window->order_epoch != at->epoch && stream->options.grouped)
    data_groups_order_priv(set, &stream->options.order, at->stage, at->epoch, &window->groups,
                           window->sample);
  else if (window->order_epoch != at->epoch)
    data_order_shards_priv(set, &stream->options.order, at->stage, at->epoch, window->shard, window->begin);
  window->order_epoch = window->epoch = at->epoch;
  window->start = at->consumed / window->capacity * window->capacity;
  const int64_t left = data_stream_epoch_priv(stream, at->epoch) - window->start;
  window->count = left < window->capacity ? left : window->capacity;
}

/* Takes the modality from samples that the index lists. */
static void strike_out(data_stream *stream, const data_samples *column, int32_t k, int64_t first,
                       int64_t count, int64_t at) {
  const data_set *set = stream->set;
  for (int32_t m = 0; m < set->modalities; ++m)
    for (int64_t i = 0; i < count && data_index_bad_count_priv(set->index, m) > 0; ++i)
      if (data_index_is_bad_priv(set->index, m, set->sample_base[k] + first + i))
        column->rows[m][at + i] = -1; /* counted, then 0 in the plan */
}

/* Sample i of one list of columns to place `at` of another; lengths below 0 stay what they are. */
static void move_sample(const data_samples *from, int64_t i, int32_t modalities, const data_samples *to,
                        int64_t at) {
  to->id[at] = from->id[i];
  to->label[at] = from->label[i];
  to->shard[at] = from->shard[i];
  if (to->sample != NULL) to->sample[at] = from->sample[i];
  for (int32_t m = 0; m < modalities; ++m) {
    to->first[m][at] = from->first[m][i];
    to->rows[m][at] = from->rows[m][i];
  }
}

static int compare_samples(const void *left, const void *right, void *sample) {
  const int64_t a = ((const int64_t *)sample)[*(const int64_t *)left],
                b = ((const int64_t *)sample)[*(const int64_t *)right];
  return a < b ? -1 : a > b;
}

/* Positions whose samples lie anywhere: taken in file order, a span of neighbours at a time. */
static core_status gather_window(data_stream *stream, int64_t count) {
  data_window *window = &stream->window;
  const data_set *set = stream->set;
  const int64_t *sample = window->sample + window->start;
  for (int64_t i = 0; i < count; ++i) window->pick[i] = i;
  qsort_r(window->pick, (size_t)count, sizeof *window->pick, compare_samples, (void *)(uintptr_t)sample);
  for (int64_t done = 0, end; done < count; done = end) {
    const int64_t first = sample[window->pick[done]];
    const int32_t k = data_set_shard_of_priv(set, first);
    int64_t limit = first + DATA_SPAN;
    if (limit > set->sample_base[k + 1]) limit = set->sample_base[k + 1];
    for (end = done; end < count && sample[window->pick[end]] < limit; ++end) continue;
    const int64_t span = sample[window->pick[end - 1]] + 1 - first;
    TRY(data_set_read_samples_priv(set, k, first - set->sample_base[k], span, window->scratch, &window->span,
                                   0));
    if (stream->options.non_finite == DATA_NON_FINITE_SKIP)
      strike_out(stream, &window->span, k, first - set->sample_base[k], span, 0);
    for (int64_t i = done; i < end; ++i)
      move_sample(&window->span, sample[window->pick[i]] - first, set->modalities, &window->column,
                  window->pick[i]);
  }
  for (int64_t i = 0; i < count; ++i) window->pick[i] = i;
  return CORE_OK;
}

static core_status fill_window(data_stream *stream, const data_position *at) {
  data_window *window = &stream->window;
  const data_set *set = stream->set;
  place_window(stream, at);
  const int64_t count = window->count;
  window->count = 0; /* until it is whole */
  if (stream->options.grouped) {
    TRY(gather_window(stream, count));
    window->count = count;
    return CORE_OK;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t position = window->start + done;
    const int32_t i = data_order_find_priv(window->begin, set->shards, position);
    const int32_t k = (int32_t)window->shard[i];
    const int64_t first = position - window->begin[i], left = window->begin[i + 1] - position;
    const int64_t some = count - done < left ? count - done : left;
    TRY(data_set_read_samples_priv(set, k, first, some, window->scratch, &window->column, done));
    if (stream->options.non_finite == DATA_NON_FINITE_SKIP)
      strike_out(stream, &window->column, k, first, some, done);
    done += some;
  }
  data_order_buffer_priv(&stream->options.order, at->stage, at->epoch, window->start / window->capacity,
                         count, window->pick);
  window->count = count;
  return CORE_OK;
}

static void copy_sample(const data_samples *from, int64_t i, int32_t modalities, data_plan *out,
                        int64_t place) {
  data_samples *to = &out->column;
  to->id[place] = from->id[i];
  to->label[place] = from->label[i];
  to->shard[place] = from->shard[i];
  if (to->sample != NULL) to->sample[place] = from->sample[i];
  for (int32_t m = 0; m < modalities; ++m) {
    const int32_t rows = from->rows[m][i];
    to->first[m][place] = from->first[m][i];
    to->rows[m][place] = rows > 0 ? rows : 0;
    out->skipped += rows < 0;
  }
}

core_status data_window_read_priv(data_stream *stream, const data_position *at, int64_t count, data_plan *out,
                                  int64_t place) {
  data_window *window = &stream->window;
  for (int64_t i = 0; i < count; ++i) {
    const data_position now = {at->stage, at->epoch, at->consumed + i};
    const bool here = window->count > 0 && window->epoch == now.epoch && now.consumed >= window->start &&
                      now.consumed < window->start + window->count;
    if (!here) TRY(fill_window(stream, &now));
    copy_sample(&window->column, window->pick[now.consumed - window->start], stream->set->modalities, out,
                place + i);
  }
  return CORE_OK;
}
