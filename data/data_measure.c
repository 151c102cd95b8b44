/* Outline: where every stored chunk of a split lies; threads that pread and decompress them and do nothing
 * else; the same split by a stream; rounds of both, one after the other. */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/file.h"
#include "data/memory_impl.h"
#include "data/stream_impl.h"

/* A piece of a file that one decoding makes out of. */
typedef struct stored_chunk {
  const data_column *column;
  int fd;
  int64_t at, bytes, decoded;
  uint32_t skipped;
} stored_chunk;

typedef struct chunk_list {
  data_bytes chunks; /* stored_chunk */
  data_bytes files;  /* int: descriptors */
  int64_t largest, stored, decoded;
} chunk_list;

static const stored_chunk *chunk_at(const chunk_list *list, int64_t i) {
  return (const stored_chunk *)(const void *)list->chunks.bytes + i;
}

static int64_t chunk_count(const chunk_list *list) {
  return list->chunks.count / (int64_t)sizeof(stored_chunk);
}

static core_status add_chunk(chunk_list *list, const stored_chunk *chunk) {
  TRY(data_bytes_append_priv(&list->chunks, chunk, sizeof *chunk));
  if (chunk->decoded > list->largest) list->largest = chunk->decoded;
  list->stored += chunk->bytes;
  return CORE_OK;
}

/* Inside HDF5. */
static core_status list_chunks(const data_column *column, const data_hdf5_dataset *latent, int fd,
                               chunk_list *list) {
  const int64_t row_bytes = data_column_row_bytes_priv(column);
  const haddr_t start = column->chunked ? 0 : H5Dget_offset(latent->id);
  const hid_t space = H5Dget_space(latent->id);
  core_status status = CORE_OK;
  CHECK(space >= 0, CORE_ERR_IO, "%s: %s", column->path, data_hdf5_reason_priv().text);
  for (int64_t i = 0; status == CORE_OK && i < column->bands * column->tiles; ++i) {
    stored_chunk chunk = {.column = column, .fd = fd, .decoded = data_column_tile_bytes_priv(column)};
    hsize_t at[2] = {0, 0}, bytes = 0;
    haddr_t address = HADDR_UNDEF;
    if (!column->chunked) {
      bytes = (hsize_t)(data_column_band_count_priv(column, i) * row_bytes);
      address = start == HADDR_UNDEF ? HADDR_UNDEF : start + (hsize_t)(i * column->band_rows * row_bytes);
      chunk.decoded = (int64_t)bytes;
    } else if (H5Dget_chunk_info(latent->id, space, (hsize_t)i, at, &chunk.skipped, &address, &bytes) < 0) {
      address = HADDR_UNDEF;
    }
    chunk.at = (int64_t)address;
    chunk.bytes = (int64_t)bytes;
    status = address != HADDR_UNDEF
                 ? add_chunk(list, &chunk)
                 : core_error_begin(CORE_ERR_UNSUPPORTED, __func__, __FILE__, __LINE__,
                                    "%s: chunk %lld has no address", column->path, (long long)i);
  }
  (void)H5Sclose(space);
  TRY(status);
  return CORE_OK;
}

static core_status list_column(const data_column *column, chunk_list *list) {
  data_hdf5_file file;
  data_hdf5_dataset latent;
  int fd = -1;
  TRY(core_file_open(column->path, O_RDONLY, &fd));
  TRY(data_bytes_append_priv(&list->files, &fd, sizeof fd));
  TRY(data_hdf5_enter_priv());
  core_status status = data_column_open_priv(column, &file, &latent);
  if (status == CORE_OK) {
    status = list_chunks(column, &latent, fd, list);
    data_hdf5_dataset_close_priv(&latent);
    data_hdf5_close_priv(&file);
  }
  data_hdf5_leave_priv();
  TRY(status);
  list->decoded += column->rows * data_column_row_bytes_priv(column);
  return CORE_OK;
}

static void free_list(chunk_list *list) {
  const int *fd = (const int *)(const void *)list->files.bytes;
  for (int64_t i = 0; i < list->files.count / (int64_t)sizeof *fd; ++i) (void)close(fd[i]);
  free(list->files.bytes);
  free(list->chunks.bytes);
}

/* ---- time ---- */

typedef struct stopwatch {
  double wall, processor;
} stopwatch;

static stopwatch read_clocks(void) {
  struct timespec now = {0};
  (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (stopwatch){core_clock_now(), (double)now.tv_sec + 1e-9 * (double)now.tv_nsec};
}

/* `share` of the time since `start`. */
static stopwatch elapsed(const stopwatch *start, double share) {
  const stopwatch now = read_clocks();
  return (stopwatch){(now.wall - start->wall) * share, (now.processor - start->processor) * share};
}

static int compare_double(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int32_t count) {
  qsort(values, (size_t)count, sizeof *values, compare_double);
  return values[count / 2];
}

/* ---- the limit ---- */

typedef struct limit_state {
  const chunk_list *list;
  atomic_llong next;
} limit_state;

typedef struct limit_worker {
  limit_state *state;
  pthread_t thread;
  data_decoder *decoder;
  uint8_t *stored, *decoded;
  core_status status;
  core_error error;
} limit_worker;

static core_status read_and_decode(const limit_worker *worker, const stored_chunk *chunk) {
  TRY(core_file_read_at(chunk->fd, chunk->column->path, worker->stored, (size_t)chunk->bytes, chunk->at));
  const data_pipeline *pipeline = &chunk->column->pipeline;
  const int64_t bytes = chunk->decoded;
  if (pipeline->count == 0) return CORE_OK; /* read is all there is to do */
  if (data_pipeline_is_checksum_priv(pipeline, chunk->skipped) &&
      chunk->bytes == bytes + DATA_CHECKSUM_BYTES) {
    TRY(data_checksum_verify_priv(worker->stored, bytes, worker->stored + bytes));
    return CORE_OK;
  }
  TRY(data_decode_priv(worker->decoder, pipeline, chunk->skipped, worker->stored, chunk->bytes,
                       worker->decoded, bytes));
  return CORE_OK;
}

static void *limit_body(void *argument) {
  limit_worker *worker = argument;
  const int64_t count = chunk_count(worker->state->list);
  for (int64_t i; worker->status == CORE_OK && (i = atomic_fetch_add(&worker->state->next, 1)) < count;)
    worker->status = read_and_decode(worker, chunk_at(worker->state->list, i));
  core_error_save(&worker->error);
  return NULL;
}

static core_status run_limit(const chunk_list *list, limit_worker *worker, int32_t threads, stopwatch *out) {
  limit_state state = {.list = list};
  const stopwatch since = read_clocks();
  int32_t started = 0;
  for (; started < threads; ++started) {
    worker[started].state = &state;
    worker[started].status = CORE_OK;
    if (pthread_create(&worker[started].thread, NULL, limit_body, &worker[started]) != 0) break;
  }
  for (int32_t t = 0; t < started; ++t) (void)pthread_join(worker[t].thread, NULL);
  *out = elapsed(&since, 1);
  CHECK(started == threads, CORE_ERR_MEMORY, "cannot start %d threads", threads);
  for (int32_t t = 0; t < threads; ++t)
    if (worker[t].status != CORE_OK) TRY(core_error_restore(&worker[t].error));
  return CORE_OK;
}

/* ---- the stream ---- */

/* Takes `batches` batches and gives them back unread. */
static core_status take_batches(data_stream *stream, int64_t batches) {
  for (int64_t b = 0; b < batches; ++b) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    data_stream_put(stream, batch);
  }
  return CORE_OK;
}

/* Batches of a few MiB; the cache is small against the set, so that nothing is kept from one epoch to the
 * next, unless it must hold the shuffle buffer. */
static core_status open_stream(data_set *set, const chunk_list *list, const data_bench_options *o,
                               data_stream **stream) {
  enum { LEAST_CACHE = 16 << 20 };
  const double batch_bytes = 4194304.0;
  data_range range[CORE_MAX_MODALITIES] = {0};
  data_stream_options options = {.order = {.seed = 1, .shuffle_samples = o->shuffle_samples},
                                 .micro_batches = 1,
                                 .range = range,
                                 .threads = o->threads,
                                 .repeat = true};
  const double a_sample = (double)list->decoded / (double)set->samples;
  options.batch = 1 + (int64_t)(batch_bytes / (a_sample > 1 ? a_sample : 1));
  if (options.batch > set->samples) options.batch = set->samples;
  const double buffer = 2 * a_sample * (double)o->shuffle_samples;
  options.cache_bytes = buffer > LEAST_CACHE ? (int64_t)buffer : LEAST_CACHE;
  if (o->shuffle_samples == 0 && options.cache_bytes > list->decoded / 4)
    options.cache_bytes = list->decoded / 4 + 1;
  for (int32_t m = 0; m < set->modalities; ++m) range[m].hi = options.batch;
  TRY(data_stream_open(set, &options, stream));
  return CORE_OK;
}

/* One epoch to get under way, two that are timed: what is read ahead at their beginning is read ahead at
 * their end. */
static core_status time_stream(const data_set *set, data_stream *stream, stopwatch *out) {
  const int64_t batch = stream->options.batch, batches = (set->samples + batch - 1) / batch;
  TRY(take_batches(stream, batches));
  const stopwatch since = read_clocks();
  TRY(take_batches(stream, 2 * batches));
  *out = elapsed(&since, (double)set->samples / (double)(2 * batch * batches));
  return CORE_OK;
}

static core_status run_stream(data_set *set, const chunk_list *list, const data_bench_options *o,
                              stopwatch *out) {
  data_stream *stream = NULL;
  TRY(open_stream(set, list, o, &stream));
  const core_status status = time_stream(set, stream, out);
  data_stream_close(stream);
  TRY(status);
  return CORE_OK;
}

/* ---- rounds ---- */

static core_status run_rounds(data_set *set, const chunk_list *list, const data_bench_options *o,
                              limit_worker *worker, stopwatch *limit, stopwatch *stream) {
  for (int32_t t = 0; t < o->threads; ++t) {
    TRY(data_decoder_create_priv(list->largest, DATA_DECODED_FOR_NOW, &worker[t].decoder));
    TRY(DATA_ALLOCATE(data_stored_most_priv(list->largest), "bench", &worker[t].stored));
    TRY(DATA_ALLOCATE(list->largest, "bench", &worker[t].decoded));
  }
  for (int32_t round = 0; round < o->rounds; ++round) {
    TRY(run_limit(list, worker, o->threads, &limit[round]));
    TRY(run_stream(set, list, o, &stream[round]));
  }
  return CORE_OK;
}

static void summarise(const data_bench_options *o, const stopwatch *limit, const stopwatch *stream,
                      data_bench_result *out) {
  double wall[DATA_MOST_ROUNDS], processor[DATA_MOST_ROUNDS];
  out->stream_seconds = out->limit_seconds = 1e300;
  for (int32_t r = 0; r < o->rounds; ++r) {
    wall[r] = limit[r].wall / stream[r].wall;
    processor[r] = limit[r].processor / stream[r].processor;
    if (stream[r].wall < out->stream_seconds) out->stream_seconds = stream[r].wall;
    if (limit[r].wall < out->limit_seconds) out->limit_seconds = limit[r].wall;
  }
  out->wall_ratio = median(wall, o->rounds);
  out->processor_ratio = median(processor, o->rounds);
}

static core_status bench_set(data_set *set, const data_bench_options *o, data_bench_result *out) {
  chunk_list list = {0};
  limit_worker *worker = NULL;
  stopwatch limit[DATA_MOST_ROUNDS], stream[DATA_MOST_ROUNDS];
  core_status status = DATA_ALLOCATE(o->threads, "bench", &worker);
  for (int64_t i = 0; status == CORE_OK && i < (int64_t)set->modalities * set->shards; ++i)
    status = list_column(&set->column[i], &list);
  if (status == CORE_OK) status = run_rounds(set, &list, o, worker, limit, stream);
  *out = (data_bench_result){
      .samples = set->samples, .decoded_bytes = list.decoded, .stored_bytes = list.stored};
  if (status == CORE_OK) summarise(o, limit, stream, out);
  for (int32_t t = 0; worker != NULL && t < o->threads; ++t) {
    data_decoder_destroy_priv(worker[t].decoder);
    free(worker[t].stored);
    free(worker[t].decoded);
  }
  free(worker);
  free_list(&list);
  TRY(status);
  return CORE_OK;
}

core_status data_bench(const data_bench_options *options, data_bench_result *out) {
  data_set *set = NULL;
  *out = (data_bench_result){0};
  CHECK(options->threads >= 1 && options->rounds >= 1 && options->rounds <= DATA_MOST_ROUNDS,
        CORE_ERR_ARGUMENT, "bench with %d threads and %d rounds, expected at least 1 and at most %d rounds",
        options->threads, options->rounds, DATA_MOST_ROUNDS);
  TRY(data_set_open(options->directory, options->split, options->modalities, options->modality_count, &set));
  const core_status status = bench_set(set, options, out);
  data_set_close(set);
  TRY(status);
  return CORE_OK;
}
