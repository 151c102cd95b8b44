/* Outline: a decoder thread takes a job, decodes the chunk (into its slot, or beside its neighbours), and the
 * one that completes a band looks for values that are not finite before the band is shown to the assembler.
 */
#include <string.h>

#include "data/stream_impl.h"

/* Waits for a job; false when the stream closes. */
static bool take_job(data_stream *stream, data_job *job) {
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && stream->queued == stream->taken) pthread_cond_wait(&stream->work, &stream->lock);
  const bool going = !stream->closing;
  if (going) *job = stream->job[stream->taken++ % stream->jobs];
  pthread_mutex_unlock(&stream->lock);
  return going;
}

/* Copies a decoded chunk to its place among the chunks of its band. */
static void place_tile(const data_column *column, int64_t tile, const uint8_t *from, uint8_t *rows) {
  const int64_t value = (int64_t)core_dtype_size(column->dtype),
                row_bytes = data_column_row_bytes_priv(column);
  const int64_t first = tile * column->tile_width, left = column->width - first;
  const int64_t used = (left < column->tile_width ? left : column->tile_width) * value;
  for (int64_t r = 0; r < column->band_rows; ++r)
    memcpy(rows + r * row_bytes + first * value, from + r * column->tile_width * value, (size_t)used);
}

static core_status decode_job(data_stream *stream, int32_t worker, const data_job *job, uint8_t *rows) {
  const data_column *column = job->column;
  const uint8_t *stored = stream->raw + job->raw * stream->raw_bytes;
  uint8_t *out = column->tiles == 1 ? rows : stream->tile_buffer[worker];
  core_status status = data_decode_priv(stream->decoder[worker], &column->pipeline, job->tile.skipped, stored,
                                        job->tile.bytes, out, data_column_tile_bytes_priv(column));
  if (status != CORE_OK)
    return core_error_context(status, "%s: chunk %lld at row %lld", column->path, (long long)job->tile.band,
                              (long long)(job->tile.band * column->band_rows));
  if (column->tiles > 1) place_tile(column, job->tile.tile, out, rows);
  return CORE_OK;
}

/* Gives the raw buffer back; true when this was the last chunk of its band. */
static bool finish_tile(data_stream *stream, const data_job *job, data_slot *slot, core_status status) {
  pthread_mutex_lock(&stream->lock);
  if (job->raw >= 0) stream->raw_free[stream->raws_free++] = job->raw;
  if (status != CORE_OK) {
    slot->state = DATA_SLOT_FAILED;
    data_stream_break_priv(stream, slot->sequence);
  }
  const bool last = --slot->tiles_left == 0 && slot->state == DATA_SLOT_LOADING;
  pthread_cond_signal(&stream->room);
  pthread_mutex_unlock(&stream->lock);
  return last;
}

static void show_slot(data_stream *stream, data_slot *slot, int64_t bad) {
  pthread_mutex_lock(&stream->lock);
  slot->bad = bad;
  slot->state = DATA_SLOT_LOADED;
  pthread_cond_signal(&stream->filled);
  pthread_mutex_unlock(&stream->lock);
}

void *data_stream_decoder_priv(void *argument) {
  const data_worker *worker = argument;
  data_stream *stream = worker->stream;
  data_job job;
  while (take_job(stream, &job)) {
    const data_column *column = job.column;
    data_slot *slot = &stream->cache[job.m].slot[job.slot];
    const core_status status = job.raw >= 0 ? decode_job(stream, worker->index, &job, slot->rows) : CORE_OK;
    if (!finish_tile(stream, &job, slot, status)) continue;
    const int64_t values = data_column_band_count_priv(column, job.tile.band) * column->width;
    show_slot(stream, slot, data_first_non_finite_priv(column->dtype, slot->rows, values));
  }
  return NULL;
}
