/* Outline: the assembler thread turns plan after plan into a batch: the columns of the whole global batch,
 * then the latents of every part, copied segment by segment. It is the thread that ends the stream, well or
 * with an error, so that everything before an error is still delivered. */
#include <string.h>

#include "data/stream_impl.h"

/* ---- columns of the global batch ---- */

static void fill_columns(const data_stream *stream, const data_plan *plan, data_batch *batch) {
  const data_set *set = stream->set;
  batch->samples = plan->samples;
  batch->before = plan->before;
  batch->after = plan->after;
  for (int64_t i = 0; i < plan->samples; ++i) {
    batch->id[i] = set->id[plan->sample[i]];
    batch->label[i] = set->label[plan->sample[i]];
  }
  for (int32_t m = 0; m < set->modalities; ++m)
    for (int64_t i = 0; i < plan->samples; ++i) {
      int64_t first = 0;
      batch->present[m * plan->samples + i] = data_set_rows_priv(set, m, plan->sample[i], &first) > first;
    }
}

static void fill_offsets(const data_stream *stream, const data_plan *plan, int32_t m, const data_range *range,
                         data_part *part) {
  part->lo = range->lo < plan->samples ? range->lo : plan->samples;
  part->hi = range->hi < plan->samples ? range->hi : plan->samples;
  part->offset[0] = 0;
  for (int64_t i = part->lo; i < part->hi; ++i) {
    int64_t first = 0;
    const int64_t end = data_set_rows_priv(stream->set, m, plan->sample[i], &first);
    part->offset[i - part->lo + 1] = part->offset[i - part->lo] + end - first;
  }
}

/* ---- latents ---- */

/* The next segment, when its slot is loaded. Errors: the one of the slot. *going = false when the stream
 * closes. */
static core_status take_segment(data_stream *stream, const data_cache *cache, data_segment *segment,
                                bool *going) {
  core_status status = CORE_OK;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    *going = !stream->closing;
    if (!*going) break;
    if (stream->popped < stream->pushed) {
      *segment = stream->segment[stream->popped % DATA_SEGMENTS];
      const data_slot_state state = cache->slot[segment->slot].state;
      if (state == DATA_SLOT_LOADED) break;
      if (state == DATA_SLOT_FAILED) status = core_error_restore(&stream->error);
    } else if (stream->broken) { /* the reader has stopped: there will be no segment */
      status = core_error_restore(&stream->error);
    }
    if (status != CORE_OK) break;
    pthread_cond_wait(&stream->filled, &stream->lock);
  }
  if (*going && status == CORE_OK) ++stream->popped;
  pthread_mutex_unlock(&stream->lock);
  TRY(status);
  return CORE_OK;
}

static void release_segment(data_stream *stream, data_cache *cache, const data_segment *segment) {
  pthread_mutex_lock(&stream->lock);
  data_cache_unpin_priv(cache, segment->slot, segment->rows);
  pthread_cond_signal(&stream->room);
  pthread_mutex_unlock(&stream->lock);
}

/* Names file, sample and row of the first value that is not finite, if the segment has one. */
static core_status check_finite(const data_stream *stream, int32_t m, const data_slot *slot,
                                const data_segment *segment) {
  const data_set *set = stream->set;
  const data_modality_info *info = &set->info[m];
  if (slot->bad < 0) return CORE_OK;
  const int64_t row_bytes = info->width * (int64_t)core_dtype_size(info->dtype);
  const int64_t value = data_first_non_finite_priv(info->dtype, slot->rows + segment->first * row_bytes,
                                                   segment->rows * info->width);
  if (value < 0) return CORE_OK;
  int32_t k = 0;
  while (k + 1 < set->shards && data_set_column_priv(set, m, k + 1)->first_band <= slot->band) ++k;
  const data_column *column = data_set_column_priv(set, m, k);
  const int64_t row =
      (slot->band - column->first_band) * column->band_rows + segment->first + value / info->width;
  const int64_t sample = data_column_sample_priv(column, row);
  FAIL(CORE_ERR_NON_FINITE, "%s: sample %llu holds NaN or infinity at row %lld, feature %lld", column->path,
       (unsigned long long)set->id[set->sample_base[k] + sample], (long long)(row - column->offset[sample]),
       (long long)(value % info->width));
}

static core_status fill_latents(data_stream *stream, int32_t m, data_part *part, bool *going) {
  data_cache *cache = &stream->cache[m];
  const int64_t row_bytes = part->width * (int64_t)core_dtype_size(part->dtype);
  const int64_t rows = part->offset[part->hi - part->lo];
  for (int64_t done = 0; done < rows && *going;) {
    data_segment segment = {0};
    TRY(take_segment(stream, cache, &segment, going));
    if (!*going) break;
    const data_slot *slot = &cache->slot[segment.slot];
    TRY(check_finite(stream, m, slot, &segment));
    memcpy((uint8_t *)part->latent + done * row_bytes, slot->rows + segment.first * row_bytes,
           (size_t)(segment.rows * row_bytes));
    done += segment.rows;
    release_segment(stream, cache, &segment);
  }
  return CORE_OK;
}

static core_status fill_batch(data_stream *stream, const data_plan *plan, data_batch *batch, bool *going) {
  const int32_t modalities = stream->set->modalities;
  fill_columns(stream, plan, batch);
  for (int32_t micro = 0; micro < stream->options.micro_batches; ++micro)
    for (int32_t m = 0; m < modalities && *going; ++m) {
      const int32_t at = micro * modalities + m;
      fill_offsets(stream, plan, m, &stream->range[at], &batch->part[at]);
      TRY(fill_latents(stream, m, &batch->part[at], going));
    }
  return CORE_OK;
}

/* ---- the thread ---- */

/* Waits for a plan and a free batch. False: closing, or no more plans (then the stream has ended). */
static bool next_plan(data_stream *stream, int32_t *batch) {
  bool going = true;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    const bool planned = stream->assembled < stream->planned;
    /* A reader that broke before its next plan says so by `broken` alone. */
    const bool over = !planned && (stream->plans_ended || stream->broken);
    going = !stream->closing && !over;
    if (!going || (planned && stream->batches_free > 0)) break;
    pthread_cond_wait(&stream->filled, &stream->lock);
  }
  if (going) *batch = stream->batch_free[--stream->batches_free];
  if (!going && !stream->closing) {
    stream->failed = stream->broken;
    stream->ended = true;
    pthread_cond_broadcast(&stream->ready);
  }
  pthread_mutex_unlock(&stream->lock);
  return going;
}

static void publish_batch(data_stream *stream, int32_t batch) {
  pthread_mutex_lock(&stream->lock);
  ++stream->assembled;
  stream->batch_ready[stream->readied++ % stream->batches] = batch;
  pthread_cond_signal(&stream->room);
  pthread_cond_signal(&stream->ready);
  pthread_mutex_unlock(&stream->lock);
}

static void end_with_error(data_stream *stream) {
  pthread_mutex_lock(&stream->lock);
  data_stream_break_priv(stream, 0); /* in the order of the batches this one is the first */
  stream->failed = stream->ended = true;
  pthread_cond_broadcast(&stream->ready);
  pthread_mutex_unlock(&stream->lock);
}

void *data_stream_assembler_priv(void *argument) {
  data_stream *stream = argument;
  bool going = true;
  int32_t batch = 0;
  while (going && next_plan(stream, &batch)) {
    const data_plan *plan =
        &stream->plan[stream->assembled % stream->plans]; /* only this thread changes it */
    if (fill_batch(stream, plan, &stream->batch[batch], &going) != CORE_OK) {
      end_with_error(stream);
      return NULL;
    }
    if (going) publish_batch(stream, batch);
  }
  return NULL;
}
