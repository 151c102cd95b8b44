/* Outline: the files most recently read stay open; a file that workers still read stays open too. Where a
 * chunk lies is asked of HDF5, by the reader alone; reading it is left to the workers. */
#include <fcntl.h>
#include <unistd.h>

#include "core/file.h"
#include "data/index_impl.h"
#include "data/retry_impl.h"
#include "data/stream_impl.h"

bool data_column_is_plain_priv(const data_column *column) {
  return !column->chunked || (column->pipeline.count == 0 && column->tiles == 1);
}

/* Inside HDF5. */
static void close_handle(data_handle *handle) {
  if (handle->column == NULL) return;
  (void)close(handle->fd);
  data_hdf5_dataset_close_priv(&handle->latent);
  data_hdf5_close_priv(&handle->file);
  handle->column = NULL;
}

void data_stream_close_files_priv(data_stream *stream) {
  if (data_hdf5_enter_priv() != CORE_OK) return;
  for (int i = 0; i < DATA_HANDLES; ++i) close_handle(&stream->handle[i]);
  data_hdf5_leave_priv();
}

/* The handle of the column, or else a free one, or else the one that was used longest ago and that no worker
 * needs. Waits for one. -1: the stream is stopping. */
static int32_t choose_handle(data_stream *stream, const data_column *column) {
  int32_t best = -1;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    for (int32_t i = 0; i < DATA_HANDLES; ++i) {
      const data_handle *handle = &stream->handle[i];
      const bool own = handle->column == column;
      if (own) best = i;
      if (own) break;
      if (handle->column != NULL && handle->jobs > 0) continue;
      if (best < 0 || handle->column == NULL ||
          (stream->handle[best].column != NULL && handle->used < stream->handle[best].used))
        best = i;
    }
    if (best >= 0 || stream->closing || stream->broken) break;
    data_stream_wake_workers_priv(stream);
    pthread_cond_wait(&stream->room, &stream->lock);
  }
  pthread_mutex_unlock(&stream->lock);
  return best;
}

/* An indexed set has not seen the file yet. Inside HDF5. */
static core_status verify(data_stream *stream, const data_column *column, int32_t m,
                          const data_hdf5_file *file) {
  if (stream->verified == NULL) return CORE_OK;
  const int32_t k = (int32_t)(column - data_set_column_priv(stream->set, m, 0));
  uint8_t *done = &stream->verified[(int64_t)m * stream->set->shards + k];
  if (!*done) TRY(data_index_verify_shard_priv(stream->set, m, k, file, stream->verify_scratch));
  *done = 1;
  return CORE_OK;
}

/* Inside HDF5. */
static core_status open_handle(data_stream *stream, const data_column *column, int32_t m,
                               data_handle *handle) {
  handle->used = ++stream->uses;
  if (handle->column == column) return CORE_OK;
  close_handle(handle);
  TRY(data_column_open_priv(column, &handle->file, &handle->latent));
  core_status status = verify(stream, column, m, &handle->file);
  if (status == CORE_OK) status = data_hdf5_descriptor_priv(&handle->file, &handle->fd);
  if (status != CORE_OK) {
    data_hdf5_dataset_close_priv(&handle->latent);
    data_hdf5_close_priv(&handle->file);
  }
  TRY(status);
  handle->column = column;
  return CORE_OK;
}

/* What lies among the metadata is read here, at once. Inside HDF5. */
static core_status find(data_stream *stream, const data_column *column, int32_t m, data_handle *handle,
                        data_tile *tile, uint8_t *rows) {
  TRY(open_handle(stream, column, m, handle));
  TRY(data_column_locate_priv(column, &handle->latent, tile));
  if (tile->at < 0) TRY(data_column_read_band_priv(column, &handle->latent, tile->band, rows));
  if (tile->at < 0) TRY(data_identity_unchanged_priv(column->path, handle->fd, &column->identity));
  return CORE_OK;
}

static core_status find_once(data_stream *stream, const data_column *column, int32_t m, data_tile *tile,
                             uint8_t *rows, int32_t *at) {
  *at = choose_handle(stream, column);
  CHECK(*at >= 0, CORE_ERR_STOPPED, "%s: the stream ends", column->path);
  TRY(data_hdf5_enter_priv());
  const core_status status = find(stream, column, m, &stream->handle[*at], tile, rows);
  data_hdf5_leave_priv();
  TRY(status);
  if (tile->at < 0) *at = -1;
  pthread_mutex_lock(&stream->lock);
  if (*at >= 0) ++stream->handle[*at].jobs;
  pthread_mutex_unlock(&stream->lock);
  return CORE_OK;
}

/* A file that failed is opened afresh, unless workers use it. */
static void forget(data_stream *stream, int32_t at) {
  pthread_mutex_lock(&stream->lock);
  const bool idle = at >= 0 && stream->handle[at].jobs == 0;
  pthread_mutex_unlock(&stream->lock);
  if (!idle || data_hdf5_enter_priv() != CORE_OK) return;
  close_handle(&stream->handle[at]);
  data_hdf5_leave_priv();
}

core_status data_stream_find_priv(data_stream *stream, const data_column *column, int32_t m, data_tile *tile,
                                  uint8_t *rows, int32_t *handle) {
  data_patience patience = {0};
  core_status status = find_once(stream, column, m, tile, rows, handle);
  while (status != CORE_OK && !data_stream_stopping_priv(stream)) {
    if (status == CORE_ERR_IO) forget(stream, *handle);
    pthread_mutex_lock(&stream->lock);
    data_stream_wake_workers_priv(stream);
    pthread_mutex_unlock(&stream->lock);
    if (!data_try_again_priv(&patience, status)) break;
    status = find_once(stream, column, m, tile, rows, handle);
  }
  if (status != CORE_OK)
    return core_error_context(status, "chunk %lld, attempt %d", (long long)tile->band, patience.retries + 1);
  return CORE_OK;
}
