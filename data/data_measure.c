/* Outline: where every stored chunk of a split lies; threads that pread and decompress them and do nothing
 * else; the same split by a stream; the best of each. */
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

/* Keeps the shorter of *best and `share` of the time since `start`. */
static void keep_best(const stopwatch *start, double share, stopwatch *best) {
  const stopwatch now = read_clocks();
  const double wall = (now.wall - start->wall) * share,
               processor = (now.processor - start->processor) * share;
  if (wall < best->wall) best->wall = wall;
  if (processor < best->processor) best->processor = processor;
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
  if (chunk->column->pipeline.count == 0) return CORE_OK; /* read is all there is to do */
  TRY(data_decode_priv(worker->decoder, &chunk->column->pipeline, chunk->skipped, worker->stored,
                       chunk->bytes, worker->decoded, chunk->decoded));
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

static core_status run_limit(const chunk_list *list, limit_worker *worker, int32_t threads, stopwatch *best) {
  limit_state state = {.list = list};
  const stopwatch since = read_clocks();
  int32_t started = 0;
  for (; started < threads; ++started) {
    worker[started].state = &state;
    worker[started].status = CORE_OK;
    if (pthread_create(&worker[started].thread, NULL, limit_body, &worker[started]) != 0) break;
  }
  for (int32_t t = 0; t < started; ++t) (void)pthread_join(worker[t].thread, NULL);
  keep_best(&since, 1, best);
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

/* A stream in file order. Batches and cache are small against the set, so that what is read ahead before the
 * timing starts does not count for much, and nothing is kept from one epoch to the next. */
static core_status open_stream(data_set *set, const chunk_list *list, int32_t threads, data_stream **stream) {
  enum { MOST_CACHE = 64 << 20, SHARE = 256 };
  data_range range[CORE_MAX_MODALITIES] = {0};
  data_stream_options options = {
      .micro_batches = 1, .range = range, .threads = threads, .queue = 4, .repeat = true};
  options.batch = (set->samples + SHARE - 1) / SHARE;
  options.cache_bytes = list->decoded / 16 < MOST_CACHE ? list->decoded / 16 + 1 : MOST_CACHE;
  for (int32_t m = 0; m < set->modalities; ++m) range[m].hi = options.batch;
  TRY(data_stream_open(set, &options, stream));
  return CORE_OK;
}

/* One epoch to get under way, two that are timed: what is read ahead at their beginning is read ahead at
 * their end. */
static core_status time_stream(const data_set *set, data_stream *stream, stopwatch *best) {
  const int64_t batch = stream->options.batch, batches = (set->samples + batch - 1) / batch;
  TRY(take_batches(stream, batches));
  const stopwatch since = read_clocks();
  TRY(take_batches(stream, 2 * batches));
  keep_best(&since, (double)set->samples / (double)(2 * batch * batches), best);
  return CORE_OK;
}

static core_status run_stream(data_set *set, const chunk_list *list, int32_t threads, stopwatch *best) {
  data_stream *stream = NULL;
  TRY(open_stream(set, list, threads, &stream));
  const core_status status = time_stream(set, stream, best);
  data_stream_close(stream);
  TRY(status);
  return CORE_OK;
}

static core_status run_rounds(data_set *set, const chunk_list *list, limit_worker *worker, int32_t threads,
                              int32_t rounds, data_bench_result *out) {
  for (int32_t t = 0; t < threads; ++t) {
    TRY(data_decoder_create_priv(list->largest, &worker[t].decoder));
    TRY(DATA_ALLOCATE(data_stored_most_priv(list->largest), "bench", &worker[t].stored));
    TRY(DATA_ALLOCATE(list->largest, "bench", &worker[t].decoded));
  }
  stopwatch limit = {1e300, 1e300}, stream = limit;
  for (int32_t round = 0; round < rounds; ++round) {
    TRY(run_limit(list, worker, threads, &limit));
    TRY(run_stream(set, list, threads, &stream));
  }
  *out = (data_bench_result){.decoded_bytes = list->decoded,
                             .stored_bytes = list->stored,
                             .stream_seconds = stream.wall,
                             .limit_seconds = limit.wall,
                             .stream_processor_seconds = stream.processor,
                             .limit_processor_seconds = limit.processor};
  return CORE_OK;
}

static core_status bench_set(data_set *set, int32_t threads, int32_t rounds, data_bench_result *out) {
  chunk_list list = {0};
  limit_worker *worker = NULL;
  core_status status = DATA_ALLOCATE(threads, "bench", &worker);
  for (int64_t i = 0; status == CORE_OK && i < (int64_t)set->modalities * set->shards; ++i)
    status = list_column(&set->column[i], &list);
  if (status == CORE_OK) status = run_rounds(set, &list, worker, threads, rounds, out);
  for (int32_t t = 0; worker != NULL && t < threads; ++t) {
    data_decoder_destroy_priv(worker[t].decoder);
    free(worker[t].stored);
    free(worker[t].decoded);
  }
  free(worker);
  free_list(&list);
  TRY(status);
  return CORE_OK;
}

core_status data_bench(const char *directory, const char *split, const char *const *modalities,
                       int32_t modality_count, int32_t threads, int32_t rounds, data_bench_result *out) {
  data_set *set = NULL;
  *out = (data_bench_result){0};
  CHECK(threads >= 1 && rounds >= 1, CORE_ERR_ARGUMENT,
        "bench with %d threads and %d rounds, expected 1 or more", threads, rounds);
  TRY(data_set_open(directory, split, modalities, modality_count, &set));
  const core_status status = bench_set(set, threads, rounds, out);
  data_set_close(set);
  TRY(status);
  return CORE_OK;
}
