/* Outline: a worker thread takes a job, reads the stored bytes (again, when the system refuses them), undoes
 * their filters into the load's place, or beside its neighbours, and looks for values that are not finite
 * while the rows are warm. The worker that completes a load shows it to the assembler. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "data/retry_impl.h"
#include "data/stream_impl.h"

/* ---- reading ---- */

/* Bytes of the file, and where they go. */
typedef struct stretch {
  int64_t at, bytes;
  uint8_t *target;
} stretch;

/* By a descriptor of its own: after a failure of a network file system the old one may be of no more use. */
static core_status read_afresh(const data_column *column, const stretch *what) {
  data_file_identity now;
  int fd = -1;
  TRY(data_identity_of_priv(column->path, &now));
  CHECK(data_identity_equal_priv(&now, &column->identity), CORE_ERR_MISMATCH,
        "%s: was changed while it was in use", column->path);
  TRY(core_file_open(column->path, O_RDONLY, &fd));
  const core_status status = core_file_read_at(fd, column->path, what->target, (size_t)what->bytes, what->at);
  (void)close(fd);
  TRY(status);
  return CORE_OK;
}

static core_status read_stretch(data_stream *stream, const data_job *job, const stretch *what) {
  const char *path = job->column->path;
  const int fd = stream->handle[job->handle].fd;
  data_patience patience = {0};
  core_status status = core_file_read_at(fd, path, what->target, (size_t)what->bytes, what->at);
  if (status == CORE_OK) { /* afterwards: what was read is of the file that was seen */
    TRY(data_identity_unchanged_priv(path, fd, &job->column->identity));
    return CORE_OK;
  }
  while (!data_stream_stopping_priv(stream) && data_try_again_priv(&patience, status))
    status = read_afresh(job->column, what);
  if (status != CORE_OK)
    return core_error_context(status, "%s: chunk %lld, attempt %d", path, (long long)job->tile.band,
                              patience.retries + 1);
  return CORE_OK;
}

/* ---- decoding ---- */

/* Copies a decoded chunk to its place among the chunks of its band. */
static void place_tile(const data_column *column, int64_t tile, const uint8_t *from, uint8_t *rows) {
  const int64_t value = (int64_t)core_dtype_size(column->dtype),
                row_bytes = data_column_row_bytes_priv(column);
  const int64_t first = tile * column->tile_width, left = column->width - first;
  const int64_t used = (left < column->tile_width ? left : column->tile_width) * value;
  for (int64_t r = 0; r < column->band_rows; ++r)
    memcpy(rows + r * row_bytes + first * value, from + r * column->tile_width * value, (size_t)used);
}

/* Rows as they are stored: read where they belong. */
static core_status load_plain(const data_worker *worker, const data_job *job) {
  const int64_t row_bytes = data_column_row_bytes_priv(job->column);
  const stretch what = {job->tile.at + job->first * row_bytes, job->load->count * row_bytes, job->load->rows};
  TRY(read_stretch(worker->stream, job, &what));
  return CORE_OK;
}

/* Rows as they are stored, all of them, with a checksum behind. */
static core_status load_summed(const data_worker *worker, const data_job *job) {
  const int64_t bytes = data_column_tile_bytes_priv(job->column);
  uint8_t sum[DATA_CHECKSUM_BYTES];
  CHECK(job->tile.bytes == bytes + DATA_CHECKSUM_BYTES, CORE_ERR_CORRUPT,
        "it stores %lld bytes, expected %lld and a checksum", (long long)job->tile.bytes, (long long)bytes);
  const stretch rows = {job->tile.at, bytes, job->load->rows},
                behind = {job->tile.at + bytes, sizeof sum, sum};
  TRY(read_stretch(worker->stream, job, &rows));
  TRY(read_stretch(worker->stream, job, &behind));
  TRY(data_checksum_verify_priv(job->load->rows, bytes, sum));
  return CORE_OK;
}

/* *finite: that all values are, as far as decoding them tells. */
static core_status load_coded(const data_worker *worker, const data_job *job, bool *finite) {
  const data_column *column = job->column;
  const stretch what = {job->tile.at, job->tile.bytes, worker->stored};
  uint8_t *out = column->tiles == 1 ? job->load->rows : worker->tile;
  TRY(read_stretch(worker->stream, job, &what));
  TRY(data_decode_priv(worker->decoder, &column->pipeline, job->tile.skipped, worker->stored, job->tile.bytes,
                       out, data_column_tile_bytes_priv(column)));
  *finite = data_decoder_saw_finite_priv(worker->decoder, column->dtype);
  if (column->tiles > 1) place_tile(column, job->tile.tile, out, job->load->rows);
  return CORE_OK;
}

static core_status do_job(const data_worker *worker, const data_job *job, bool *finite) {
  const data_column *column = job->column;
  core_status status = CORE_OK;
  *finite = false;
  if (job->handle < 0) return CORE_OK; /* the reader had to read it */
  if (data_column_is_plain_priv(column))
    status = load_plain(worker, job);
  else if (column->tiles == 1 && data_pipeline_is_checksum_priv(&column->pipeline, job->tile.skipped))
    status = load_summed(worker, job);
  else
    status = load_coded(worker, job, finite);
  if (status == CORE_OK || status == CORE_ERR_IO) return status; /* the latter names the chunk already */
  return core_error_context(status, "%s: chunk %lld at row %lld", column->path, (long long)job->tile.band,
                            (long long)(job->tile.band * column->band_rows));
}

/* ---- the thread ---- */

/* Waits for a job; false when the stream closes. */
static bool take_job(data_stream *stream, data_job *job) {
  pthread_mutex_lock(&stream->lock);
  ++stream->idle;
  while (!stream->closing && stream->queued == stream->taken) pthread_cond_wait(&stream->work, &stream->lock);
  --stream->idle;
  const bool going = !stream->closing;
  if (going) *job = stream->job[stream->taken++ % DATA_JOBS];
  if (going && stream->queued - stream->taken == DATA_JOBS / 2) pthread_cond_signal(&stream->room);
  pthread_mutex_unlock(&stream->lock);
  return going;
}

/* Under the lock. */
static void show_load(data_stream *stream, data_load *load, int64_t bad) {
  load->bad = bad;
  load->state = DATA_LOAD_DONE;
  if (stream->awaited == load) pthread_cond_signal(&stream->filled);
}

/* Gives the file back. True when this was the last chunk of its load and nothing went wrong: a band of
 * several is searched by whoever completes it. */
static bool finish_job(data_stream *stream, const data_job *job, core_status status, int64_t bad) {
  data_load *load = job->load;
  pthread_mutex_lock(&stream->lock);
  if (job->handle >= 0 && --stream->handle[job->handle].jobs == 0) pthread_cond_signal(&stream->room);
  if (status != CORE_OK) {
    load->state = DATA_LOAD_FAILED;
    data_stream_break_priv(stream, load->sequence);
  }
  const bool last = --load->jobs_left == 0 && load->state == DATA_LOAD_UNDER_WAY;
  const bool search = last && job->column->tiles > 1;
  if (last && !search) show_load(stream, load, bad);
  pthread_mutex_unlock(&stream->lock);
  return search;
}

static int64_t find_bad(const data_job *job) {
  return data_first_non_finite_priv(job->column->dtype, job->load->rows,
                                    job->load->count * job->column->width);
}

void *data_stream_worker_priv(void *argument) {
  const data_worker *worker = argument;
  data_stream *stream = worker->stream;
  const bool deliver = stream->options.non_finite == DATA_NON_FINITE_DELIVER;
  data_job job;
  while (take_job(stream, &job)) {
    bool finite = false;
    const core_status status = do_job(worker, &job, &finite);
    const bool search = status == CORE_OK && job.column->tiles == 1 && !deliver && !finite;
    const int64_t bad = search ? find_bad(&job) : -1;
    if (!finish_job(stream, &job, status, bad)) continue;
    const int64_t late = deliver ? -1 : find_bad(&job);
    pthread_mutex_lock(&stream->lock);
    show_load(stream, job.load, late);
    pthread_mutex_unlock(&stream->lock);
  }
  return NULL;
}
