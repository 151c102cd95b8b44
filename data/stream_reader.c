/* Outline: the reader thread. For batch after batch: plan its samples, walk what this rank wants of it in the
 * order in which the assembler will copy, merge neighbouring rows into segments, pin their slots, read bands
 * that are missing. */
#include <string.h>

#include "core/clock.h"
#include "data/order_impl.h"
#include "data/stream_impl.h"

/* ---- handles: the files most recently read stay open ---- */

static void close_handle(data_handle *handle) {
  if (handle->column == NULL) return;
  data_hdf5_dataset_close_priv(&handle->latent);
  data_hdf5_close_priv(&handle->file);
  handle->column = NULL;
}

/* Inside HDF5. */
static core_status open_handle(data_stream *stream, const data_column *column, data_handle **out) {
  data_handle *oldest = &stream->handle[0];
  for (int i = 0; i < DATA_HANDLES; ++i) {
    data_handle *handle = &stream->handle[i];
    if (handle->column == column) {
      handle->used = ++stream->uses;
      *out = handle;
      return CORE_OK;
    }
    if (handle->column == NULL || (oldest->column != NULL && handle->used < oldest->used)) oldest = handle;
  }
  close_handle(oldest);
  TRY(data_column_open_priv(column, &oldest->file, &oldest->latent));
  oldest->column = column;
  oldest->used = ++stream->uses;
  *out = oldest;
  return CORE_OK;
}

static void forget_handle(data_stream *stream, const data_column *column) {
  if (data_hdf5_enter_priv() != CORE_OK) return;
  for (int i = 0; i < DATA_HANDLES; ++i)
    if (column == NULL || stream->handle[i].column == column) close_handle(&stream->handle[i]);
  data_hdf5_leave_priv();
}

/* ---- reading, with retries ---- */

/* Whether a band needs no decoding: it is read into its slot. */
static bool is_plain(const data_column *column) {
  return !column->chunked || (column->pipeline.count == 0 && column->tiles == 1);
}

/* Inside HDF5. */
static core_status read_from(const data_column *column, const data_hdf5_dataset *latent, int64_t capacity,
                             data_tile *tile, uint8_t *target) {
  if (!column->chunked) {
    TRY(data_column_read_band_priv(column, latent, tile->band, target));
    return CORE_OK;
  }
  TRY(data_column_read_tile_priv(column, latent, capacity, tile, target));
  CHECK(column->pipeline.count > 0 || tile->bytes == data_column_tile_bytes_priv(column), CORE_ERR_CORRUPT,
        "%s: chunk at row %lld stores %lld bytes, expected %lld", column->path,
        (long long)(tile->band * column->band_rows), (long long)tile->bytes,
        (long long)data_column_tile_bytes_priv(column));
  return CORE_OK;
}

static core_status read_once(data_stream *stream, const data_column *column, int64_t capacity,
                             data_tile *tile, uint8_t *target) {
  data_handle *handle = NULL;
  TRY(data_hdf5_enter_priv());
  core_status status = open_handle(stream, column, &handle);
  if (status == CORE_OK) status = read_from(column, &handle->latent, capacity, tile, target);
  data_hdf5_leave_priv();
  TRY(status);
  return CORE_OK;
}

/* Network file systems fail now and then: the file is opened afresh for every attempt. Damage does not heal
 * by waiting, so only ERR_IO is worth it. */
static core_status read_retrying(data_stream *stream, const data_column *column, int64_t capacity,
                                 data_tile *tile, uint8_t *target) {
  enum { RETRIES = 3 };
  double pause = 0.01;
  for (int attempt = 0;; ++attempt, pause *= 4) {
    const core_status status = read_once(stream, column, capacity, tile, target);
    if (status == CORE_OK) return CORE_OK;
    if (status != CORE_ERR_IO || attempt == RETRIES || data_stream_stopping_priv(stream))
      return core_error_context(status, "chunk %lld, attempt %d", (long long)tile->band, attempt + 1);
    forget_handle(stream, column);
    core_clock_sleep(pause);
  }
}

/* ---- handing chunks to the decoders ---- */

/* A free raw buffer, -1: the stream is stopping. */
static int32_t take_raw(data_stream *stream) {
  int32_t raw = -1;
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken && stream->raws_free == 0)
    pthread_cond_wait(&stream->room, &stream->lock);
  if (!stream->closing && !stream->broken) raw = stream->raw_free[--stream->raws_free];
  pthread_mutex_unlock(&stream->lock);
  return raw;
}

static bool push_job(data_stream *stream, const data_job *job) {
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken && stream->queued - stream->taken == stream->jobs)
    pthread_cond_wait(&stream->room, &stream->lock);
  const bool going = !stream->closing && !stream->broken;
  if (going) {
    stream->job[stream->queued++ % stream->jobs] = *job;
    pthread_cond_signal(&stream->work);
  }
  pthread_mutex_unlock(&stream->lock);
  return going;
}

/* Reads the band of a fresh slot and queues its chunks. False: stop; the slot will not be loaded. */
static bool read_tiles(data_stream *stream, const data_column *column, int32_t m, int32_t slot,
                       int64_t band) {
  data_cache *cache = &stream->cache[m];
  const bool plain = is_plain(column);
  for (int64_t t = 0; t < (plain ? 1 : column->tiles); ++t) {
    data_job job = {.column = column, .m = m, .slot = slot, .raw = -1, .tile = {.band = band, .tile = t}};
    uint8_t *target = cache->slot[slot].rows;
    if (!plain) {
      job.raw = take_raw(stream);
      if (job.raw < 0) return false;
      target = stream->raw + job.raw * stream->raw_bytes;
    }
    const int64_t capacity = plain ? data_column_band_bytes_priv(column)
                                   : data_stored_most_priv(data_column_tile_bytes_priv(column));
    if (read_retrying(stream, column, capacity, &job.tile, target) != CORE_OK) {
      pthread_mutex_lock(&stream->lock);
      data_stream_break_priv(stream, cache->slot[slot].sequence);
      pthread_mutex_unlock(&stream->lock);
      return false;
    }
    if (!push_job(stream, &job)) return false;
  }
  return true;
}

/* As read_tiles. A slot whose chunks are not all queued must not look as if it were being loaded. */
static bool read_band(data_stream *stream, const data_column *column, int32_t m, int32_t slot, int64_t band) {
  if (read_tiles(stream, column, m, slot, band)) return true;
  pthread_mutex_lock(&stream->lock);
  stream->cache[m].slot[slot].state = DATA_SLOT_FAILED;
  pthread_cond_signal(&stream->filled);
  pthread_mutex_unlock(&stream->lock);
  return false;
}

/* ---- segments ---- */

/* Rows of one band of one column that follow one another. */
typedef struct piece {
  const data_column *column;
  int32_t m;
  int64_t band, first, rows; /* band within the column, rows from its start; rows = 0: nothing */
} piece;

/* Publishes a piece as a segment and reads its band when it is not in the cache. False: stop. */
static bool emit(data_stream *stream, piece *next) {
  if (next->rows == 0) return true;
  data_cache *cache = &stream->cache[next->m];
  bool fresh = false;
  int32_t slot = -1;
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken) {
    if (stream->pushed - stream->popped < DATA_SEGMENTS)
      slot = data_cache_pin_priv(cache, next->column->first_band + next->band, &fresh);
    if (slot >= 0) break;
    pthread_cond_wait(&stream->room, &stream->lock);
  }
  if (slot >= 0) {
    if (fresh) {
      cache->slot[slot].sequence = ++stream->sequence;
      cache->slot[slot].tiles_left = is_plain(next->column) ? 1 : (int32_t)next->column->tiles;
      cache->slot[slot].count = data_column_band_count_priv(next->column, next->band);
    }
    stream->segment[stream->pushed++ % DATA_SEGMENTS] =
        (data_segment){slot, (int32_t)next->first, (int32_t)next->rows};
    pthread_cond_signal(&stream->filled);
  }
  pthread_mutex_unlock(&stream->lock);
  next->rows = 0;
  if (slot < 0) return false;
  return !fresh || read_band(stream, next->column, next->m, slot, next->band);
}

/* Adds rows [first, end) of a sample, joining them to the piece before where they touch. */
static bool add_rows(data_stream *stream, piece *next, const data_column *column, int32_t m, int64_t first,
                     int64_t end) {
  while (first < end) {
    const int64_t band = first / column->band_rows, start = first - band * column->band_rows;
    const int64_t left = column->band_rows - start, rows = end - first < left ? end - first : left;
    if (next->rows > 0 && next->column == column && next->band == band && next->first + next->rows == start) {
      next->rows += rows;
    } else {
      if (!emit(stream, next)) return false;
      *next = (piece){column, m, band, start, rows};
    }
    first += rows;
  }
  return true;
}

/* A segment never reaches over the end of a part: the assembler counts on it. */
static bool walk_part(data_stream *stream, const data_plan *plan, int32_t m, const data_range *range) {
  const data_set *set = stream->set;
  piece next = {0};
  for (int64_t i = range->lo; i < range->hi && i < plan->samples; ++i) {
    const int32_t k = data_set_shard_of_priv(set, plan->sample[i]);
    const data_column *column = data_set_column_priv(set, m, k);
    const int64_t *offset = column->offset + (plan->sample[i] - set->sample_base[k]);
    if (!add_rows(stream, &next, column, m, offset[0], offset[1])) return false;
  }
  return emit(stream, &next);
}

/* ---- plans ---- */

static void load_order(data_stream *stream) {
  const data_position *at = &stream->position;
  if (stream->order_epoch == at->epoch) return;
  data_order_fill_priv(stream->set, &stream->options.order, at->stage, at->epoch, stream->shard_order,
                       stream->shard_start, stream->order);
  stream->order_epoch = at->epoch;
}

/* Fills the next plan; false at the end of a stream that does not repeat. */
static bool fill_plan(data_stream *stream, data_plan *plan) {
  const int64_t samples = stream->set->samples;
  data_position *at = &stream->position;
  plan->samples = 0;
  while (plan->samples < stream->options.batch) {
    if (at->consumed == samples) {
      if (!stream->options.repeat) break;
      ++at->epoch;
      at->consumed = 0;
    }
    if (plan->samples == 0) plan->before = *at;
    load_order(stream);
    const int64_t left = samples - at->consumed, wanted = stream->options.batch - plan->samples;
    const int64_t count = left < wanted ? left : wanted;
    memcpy(plan->sample + plan->samples, stream->order + at->consumed, (size_t)count * sizeof *plan->sample);
    plan->samples += count;
    at->consumed += count;
  }
  plan->after = *at;
  return plan->samples > 0;
}

static bool wait_for_plan(data_stream *stream) {
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken && stream->planned - stream->assembled == stream->plans)
    pthread_cond_wait(&stream->room, &stream->lock);
  const bool going = !stream->closing && !stream->broken;
  pthread_mutex_unlock(&stream->lock);
  return going;
}

static void publish_plan(data_stream *stream, bool more) {
  pthread_mutex_lock(&stream->lock);
  if (more)
    ++stream->planned;
  else
    stream->plans_ended = true;
  pthread_cond_signal(&stream->filled);
  pthread_mutex_unlock(&stream->lock);
}

static bool walk_plan(data_stream *stream, const data_plan *plan) {
  const int32_t modalities = stream->set->modalities;
  for (int32_t micro = 0; micro < stream->options.micro_batches; ++micro)
    for (int32_t m = 0; m < modalities; ++m)
      if (!walk_part(stream, plan, m, &stream->range[micro * modalities + m])) return false;
  return true;
}

void *data_stream_reader_priv(void *argument) {
  data_stream *stream = argument;
  bool going = true;
  while (going && wait_for_plan(stream)) {
    data_plan *plan = &stream->plan[stream->planned % stream->plans]; /* only this thread changes `planned` */
    const bool more = fill_plan(stream, plan);
    publish_plan(stream, more);
    going = more && walk_plan(stream, plan);
  }
  forget_handle(stream, NULL);
  return NULL;
}
