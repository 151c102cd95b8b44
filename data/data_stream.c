/* Outline: opening (options checked, memory planned, threads started); get and put; closing. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/stop.h"
#include "data/groups_impl.h"
#include "data/index_impl.h"
#include "data/memory_impl.h"
#include "data/stream_impl.h"

/* ---- options ---- */

int64_t data_stream_epoch_priv(const data_stream *stream, int64_t epoch) {
  return stream->options.grouped ? data_set_epoch_samples(stream->set, epoch) : stream->set->samples;
}

/* A batch of one signature is all of a plan. */
static core_status check_groups(const data_stream *stream) {
  const data_stream_options *o = &stream->options;
  if (!o->grouped) return CORE_OK;
  CHECK(stream->set->groups != NULL && stream->set->groups->batch == o->batch && o->repeat, CORE_ERR_ARGUMENT,
        "homogeneous batches of %lld samples need a set that is grouped for them, and a stream that repeats",
        (long long)o->batch);
  CHECK(o->start.consumed % o->batch == 0, CORE_ERR_ARGUMENT,
        "%lld samples of the epoch are consumed, which are no homogeneous batches of %lld: the batch, or how "
        "batches "
        "are made, can only be changed for a new run",
        (long long)o->start.consumed, (long long)o->batch);
  return CORE_OK;
}

static core_status check_position(const data_stream *stream) {
  const data_position *start = &stream->options.start;
  TRY(check_groups(stream));
  CHECK(start->stage >= 0 && start->epoch >= 0 && start->consumed >= 0 &&
            start->consumed <= data_stream_epoch_priv(stream, start->epoch),
        CORE_ERR_ARGUMENT,
        "position (stage %lld, epoch %lld, consumed %lld) does not lie in a set of %lld samples",
        (long long)start->stage, (long long)start->epoch, (long long)start->consumed,
        (long long)stream->set->samples);
  return CORE_OK;
}

/* Ranks see different latents, so none may decide alone that a sample lacks a modality: the index says it to
 * all. */
static core_status check_policy(const data_stream *stream) {
  const data_set *set = stream->set;
  if (stream->options.non_finite != DATA_NON_FINITE_SKIP) return CORE_OK;
  CHECK(set->index != NULL && data_index_values_checked_priv(set->index), CORE_ERR_ARGUMENT,
        "%s: samples that are not finite can only be skipped when an index lists them; run "
        "`antiphon index --values`",
        data_set_column_priv(set, 0, 0)->path);
  for (int32_t m = 0; m < set->modalities; ++m)
    if (data_index_bad_count_priv(set->index, m) > 0)
      LOG_WARNING("modality %s: %lld samples hold NaN or infinity and are treated as without it",
                  set->info[m].name, (long long)data_index_bad_count_priv(set->index, m));
  return CORE_OK;
}

static core_status check_options(const data_stream *stream) {
  const data_stream_options *o = &stream->options;
  CHECK(o->batch >= 1 && o->batch <= INT32_MAX, CORE_ERR_ARGUMENT, "batch of %lld samples, expected 1 to %d",
        (long long)o->batch, INT32_MAX);
  CHECK(o->micro_batches >= 1 && o->range != NULL, CORE_ERR_ARGUMENT,
        "%d micro-batches, expected at least 1 with their ranges", o->micro_batches);
  CHECK(o->queue >= 1 && o->queue <= DATA_MOST_QUEUE, CORE_ERR_ARGUMENT,
        "queue of %d batches, expected 1 to %d", o->queue, DATA_MOST_QUEUE);
  CHECK(o->threads >= 1 && o->threads <= DATA_MOST_THREADS, CORE_ERR_ARGUMENT,
        "%d threads for decompression, expected 1 to %d", o->threads, DATA_MOST_THREADS);
  CHECK(o->cache_bytes >= 0, CORE_ERR_ARGUMENT, "cache of %lld bytes", (long long)o->cache_bytes);
  CHECK(o->order.shuffle_samples >= 0, CORE_ERR_ARGUMENT,
        "shuffle buffer of %lld samples, expected 0 or more", (long long)o->order.shuffle_samples);
  for (int64_t i = 0; i < (int64_t)o->micro_batches * stream->set->modalities; ++i)
    CHECK(o->range[i].lo >= 0 && o->range[i].lo <= o->range[i].hi && o->range[i].hi <= o->batch,
          CORE_ERR_ARGUMENT, "range [%lld, %lld) does not lie in a batch of %lld samples",
          (long long)o->range[i].lo, (long long)o->range[i].hi, (long long)o->batch);
  for (int64_t i = 0; o->text != NULL && i < o->micro_batches; ++i)
    CHECK(stream->set->text != NULL && o->text[i].lo >= 0 && o->text[i].lo <= o->text[i].hi &&
              o->text[i].hi <= o->batch,
          CORE_ERR_ARGUMENT, "tokens of [%lld, %lld) of a batch of %lld samples, of a set %s",
          (long long)o->text[i].lo, (long long)o->text[i].hi, (long long)o->batch,
          stream->set->text != NULL ? "with tokens" : "whose tokens were not taken");
  TRY(check_position(stream));
  TRY(check_policy(stream));
  return CORE_OK;
}

/* Copies what the caller lends and puts defaults for zeros. */
static core_status take_options(data_stream *stream, const data_stream_options *options) {
  enum { DEFAULT_QUEUE = 2, DEFAULT_CACHE_MIB = 256 };
  data_stream_options *o = &stream->options;
  *o = *options;
  if (o->queue == 0) o->queue = DEFAULT_QUEUE;
  if (o->threads == 0) o->threads = 1;
  if (o->cache_bytes == 0) o->cache_bytes = (int64_t)DEFAULT_CACHE_MIB << 20;
  TRY(check_options(stream));
  const int64_t ranges = (int64_t)o->micro_batches * stream->set->modalities;
  TRY(DATA_ALLOCATE(ranges, "ranges of a stream", &stream->range));
  memcpy(stream->range, o->range, (size_t)ranges * sizeof *stream->range);
  o->range = stream->range;
  if (o->text != NULL) {
    TRY(DATA_ALLOCATE(o->micro_batches, "ranges of tokens", &stream->text));
    memcpy(stream->text, o->text, (size_t)o->micro_batches * sizeof *stream->text);
    o->text = stream->text;
  }
  stream->position = o->start;
  stream->window.order_epoch = -1;
  stream->direct = o->order.shuffle_samples == 0 && !o->grouped;
  if (stream->position.consumed ==
      data_stream_epoch_priv(stream,
                             stream->position.epoch)) { /* the end of an epoch is the start of the next */
    ++stream->position.epoch;
    stream->position.consumed = 0;
  }
  return CORE_OK;
}

/* ---- threads ---- */

static core_status create_locks(data_stream *stream) {
  pthread_condattr_t attributes;
  pthread_cond_t *conditions[] = {&stream->work, &stream->room, &stream->filled, &stream->ready};
  CHECK(pthread_mutex_init(&stream->lock, NULL) == 0 && pthread_condattr_init(&attributes) == 0,
        CORE_ERR_MEMORY, "no lock for a stream");
  (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  for (size_t i = 0; i < sizeof conditions / sizeof *conditions; ++i)
    (void)pthread_cond_init(conditions[i], &attributes); /* cannot fail with these attributes */
  (void)pthread_condattr_destroy(&attributes);
  return CORE_OK;
}

static core_status start(pthread_t *thread, void *(*body)(void *), void *argument) {
  const int error = pthread_create(thread, NULL, body, argument);
  CHECK(error == 0, CORE_ERR_MEMORY, "cannot start a thread: %s", strerror(error));
  return CORE_OK;
}

static core_status start_all(data_stream *stream) {
  TRY(start(&stream->reader, data_stream_reader_priv, stream));
  stream->has_reader = true;
  TRY(start(&stream->assembler, data_stream_assembler_priv, stream));
  stream->has_assembler = true;
  for (; stream->workers < stream->options.threads; ++stream->workers)
    TRY(start(&stream->thread[stream->workers], data_stream_worker_priv, &stream->worker[stream->workers]));
  return CORE_OK;
}

/* Signals are for the thread that trains: a handler that interrupts a read here would look like a fault. */
static core_status start_threads(data_stream *stream) {
  sigset_t all, before;
  (void)sigfillset(&all);
  (void)pthread_sigmask(SIG_SETMASK, &all, &before);
  const core_status status = start_all(stream);
  (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
  TRY(status);
  return CORE_OK;
}

void data_stream_break_priv(data_stream *stream, int64_t sequence) {
  if (!stream->broken || sequence < stream->broken_at) {
    core_error_save(&stream->error);
    stream->broken_at = sequence;
  }
  stream->broken = true;
  pthread_cond_broadcast(&stream->room);
  pthread_cond_broadcast(&stream->filled);
}

bool data_stream_stopping_priv(data_stream *stream) {
  pthread_mutex_lock(&stream->lock);
  const bool stopping = stream->closing || stream->broken;
  pthread_mutex_unlock(&stream->lock);
  return stopping;
}

/* ---- opening ---- */

static core_status prepare(data_stream *stream, const data_stream_options *options) {
  TRY(take_options(stream, options));
  TRY(data_stream_plan_priv(stream));
  TRY(start_threads(stream));
  return CORE_OK;
}

core_status data_stream_open(data_set *set, const data_stream_options *options, data_stream **out) {
  data_stream *stream = NULL;
  *out = NULL;
  TRY(DATA_ALLOCATE(1, "stream", &stream));
  stream->set = set;
  core_status status = create_locks(stream);
  if (status != CORE_OK) free(stream);
  TRY(status);
  status = prepare(stream, options);
  if (status != CORE_OK) data_stream_close(stream);
  TRY(status);
  *out = stream;
  return CORE_OK;
}

/* ---- get and put ---- */

/* Waits on `ready` for a moment. Under the lock. */
static void wait_briefly(data_stream *stream) {
  enum { POLL_NANOSECONDS = 20 * 1000 * 1000, SECOND = 1000 * 1000 * 1000 };
  struct timespec until;
  (void)clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += POLL_NANOSECONDS;
  if (until.tv_nsec >= SECOND) {
    until.tv_nsec -= SECOND;
    ++until.tv_sec;
  }
  (void)pthread_cond_timedwait(&stream->ready, &stream->lock, &until);
}

/* Under the lock. Takes the next ready batch, leaves NULL at the end. */
static core_status take_ready(data_stream *stream, data_batch **batch) {
  const double since = core_clock_now();
  while (stream->given == stream->readied && !stream->ended && !core_stop_requested()) wait_briefly(stream);
  stream->waited += core_clock_now() - since;
  if (stream->given < stream->readied) {
    *batch = &stream->batch[stream->batch_ready[stream->given++ % stream->batches]];
    stream->skipped += (*batch)->skipped;
    ++stream->batches_lent;
    return CORE_OK;
  }
  if (stream->ended && stream->failed) TRY(core_error_restore(&stream->error));
  CHECK(stream->ended, CORE_ERR_STOPPED, "stopped on request while waiting for data");
  return CORE_OK;
}

core_status data_stream_get(data_stream *stream, data_batch **batch) {
  *batch = NULL;
  CHECK(stream->batches_lent < stream->batches, CORE_ERR_ARGUMENT,
        "all %d batches of the stream are lent; put one back before asking for another", stream->batches);
  pthread_mutex_lock(&stream->lock);
  const core_status status = take_ready(stream, batch);
  pthread_mutex_unlock(&stream->lock);
  TRY(status);
  return CORE_OK;
}

void data_stream_put(data_stream *stream, data_batch *batch) {
  if (batch == NULL) return;
  pthread_mutex_lock(&stream->lock);
  stream->batch_free[stream->batches_free++] = (int32_t)(batch - stream->batch);
  --stream->batches_lent;
  pthread_cond_signal(stream->direct ? &stream->room : &stream->filled);
  pthread_mutex_unlock(&stream->lock);
}

double data_stream_waited(const data_stream *stream) {
  return stream->waited;
}

int64_t data_stream_skipped(const data_stream *stream) {
  return stream->skipped;
}

int64_t data_stream_bytes(const data_stream *stream) {
  return stream->bytes;
}

/* ---- closing ---- */

static void stop_threads(data_stream *stream) {
  pthread_mutex_lock(&stream->lock);
  stream->closing = true;
  pthread_cond_broadcast(&stream->work);
  pthread_cond_broadcast(&stream->room);
  pthread_cond_broadcast(&stream->filled);
  pthread_mutex_unlock(&stream->lock);
  if (stream->has_reader) (void)pthread_join(stream->reader, NULL);
  if (stream->has_assembler) (void)pthread_join(stream->assembler, NULL);
  for (int32_t w = 0; w < stream->workers; ++w) (void)pthread_join(stream->thread[w], NULL);
}

void data_stream_close(data_stream *stream) {
  if (stream == NULL) return;
  stop_threads(stream);
  const bool planned = stream->arena != NULL && stream->bytes > 0;
  for (int32_t w = 0; planned && w < stream->options.threads; ++w)
    data_decoder_destroy_priv(stream->worker[w].decoder);
  data_stream_close_files_priv(stream);
  core_arena_destroy(stream->arena);
  core_arena_destroy(stream->latents);
  pthread_cond_t *conditions[] = {&stream->work, &stream->room, &stream->filled, &stream->ready};
  for (size_t i = 0; i < sizeof conditions / sizeof *conditions; ++i)
    (void)pthread_cond_destroy(conditions[i]);
  (void)pthread_mutex_destroy(&stream->lock);
  free(stream->range);
  free(stream->text);
  free(stream);
}
