/* Outline: a source of samples cut into shards; threads that take the shards one after another. A shard that
 * is there and says that it was made from just this is kept. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/random.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

typedef struct packing {
  data_pack_options options; /* completed */
  const data_source *source;
  const char *encoder;
  int32_t shards;
  pthread_mutex_t lock; /* of all below, and of progress */
  int32_t next, done, kept;
  bool stopping;
  core_status status;
  core_error error;
} packing;

/* ---- what a shard is made from ---- */

/* Everything that a shard's content depends on, as 16 digits. */
static void origin_of(const packing *p, int32_t shard, char out[CORE_NAME]) {
  const data_pack_options *o = &p->options;
  const int64_t facts[] = {(int64_t)p->source->identity,
                           p->source->samples,
                           p->source->width,
                           o->dtype,
                           o->filter,
                           o->level,
                           o->chunk_bytes,
                           o->samples_per_shard,
                           shard};
  uint64_t hash = core_hash(facts, sizeof facts, 0);
  hash = core_hash(o->modality, strlen(o->modality), hash);
  hash = core_hash(p->encoder, strlen(p->encoder), hash);
  (void)snprintf(out, CORE_NAME, "pack %016llx", (unsigned long long)hash);
}

static int64_t first_of(const packing *p, int32_t shard) {
  const int64_t first = (int64_t)shard * p->options.samples_per_shard;
  return first < p->source->samples ? first : p->source->samples;
}

static core_status read_origin(const char *path, char out[CORE_NAME]) {
  data_hdf5_file file;
  TRY(data_hdf5_enter_priv());
  core_status status = data_hdf5_open_priv(path, &file);
  if (status == CORE_OK) status = data_hdf5_text_priv(&file, "origin", out, CORE_NAME);
  data_hdf5_close_priv(&file);
  data_hdf5_leave_priv();
  TRY(status);
  return CORE_OK;
}

/* *kept: the shard is there, whole by its header, and made from this. A file of this name that was made from
 * something else is not ours to remove. */
static core_status look_at_shard(const packing *p, int32_t shard, const char *origin, bool *kept) {
  data_shard there = {0};
  char *path = NULL, found[CORE_NAME] = "";
  *kept = false;
  TRY(data_text_priv(&path, "%s/%s-%05d.h5", p->options.to, p->options.modality, shard));
  const bool exists = core_file_exists(path);
  core_status status = exists ? data_shard_open_priv(path, p->options.modality, &there) : CORE_OK;
  if (exists && status == CORE_OK && read_origin(path, found) != CORE_OK) core_error_clear();
  if (exists && status == CORE_OK) {
    *kept = strcmp(found, origin) == 0 && there.column.samples == first_of(p, shard + 1) - first_of(p, shard);
    if (!*kept)
      status = core_error_begin(
          CORE_ERR_MISMATCH, __func__, __FILE__, __LINE__,
          "%s: is there and was made from something else or with other options; remove it, or "
          "write somewhere else",
          path);
  }
  data_shard_release_priv(&there);
  free(path);
  TRY(status);
  return CORE_OK;
}

/* ---- threads ---- */

static core_status write_shard(const packing *p, int32_t shard, const char *origin) {
  const data_pack_options *o = &p->options;
  const data_writer_options options = {.directory = o->to,
                                       .modality = o->modality,
                                       .encoder = p->encoder,
                                       .dtype = o->dtype,
                                       .width = p->source->width,
                                       .shard = shard,
                                       .filter = o->filter,
                                       .level = o->level,
                                       .chunk_bytes = o->chunk_bytes,
                                       .origin = origin};
  data_writer *writer = NULL;
  const int64_t first = first_of(p, shard);
  TRY(data_writer_open(&options, &writer));
  const core_status status = p->source->copy(p->source, first, first_of(p, shard + 1) - first, writer);
  if (status != CORE_OK) data_writer_abandon(writer);
  TRY(status);
  TRY(data_writer_close(writer));
  return CORE_OK;
}

/* The next shard, -1: no more, or somebody failed. */
static int32_t take_shard(packing *p) {
  pthread_mutex_lock(&p->lock);
  const int32_t shard = p->stopping || p->next == p->shards ? -1 : p->next++;
  pthread_mutex_unlock(&p->lock);
  return shard;
}

static void report(packing *p, bool kept, core_status status) {
  pthread_mutex_lock(&p->lock);
  if (status == CORE_OK) {
    ++p->done;
    p->kept += kept;
    const data_pack_progress now = {p->done, p->kept, p->shards};
    if (p->options.progress != NULL) status = p->options.progress(p->options.context, &now);
  }
  if (status != CORE_OK && p->status == CORE_OK) {
    p->status = status;
    core_error_save(&p->error);
  }
  p->stopping = p->stopping || status != CORE_OK;
  pthread_mutex_unlock(&p->lock);
}

static void *pack_shards(void *argument) {
  packing *p = argument;
  for (int32_t shard; (shard = take_shard(p)) >= 0;) {
    char origin[CORE_NAME];
    bool kept = false;
    origin_of(p, shard, origin);
    core_status status = look_at_shard(p, shard, origin, &kept);
    if (status == CORE_OK && !kept) status = write_shard(p, shard, origin);
    report(p, kept, status);
  }
  return NULL;
}

static core_status run_threads(packing *p) {
  enum { MOST_THREADS = 256 };
  pthread_t thread[MOST_THREADS];
  int32_t started = 0;
  while (started < p->options.threads && started < MOST_THREADS &&
         pthread_create(&thread[started], NULL, pack_shards, p) == 0)
    ++started;
  if (started == 0) (void)pack_shards(p);
  for (int32_t t = 0; t < started; ++t) (void)pthread_join(thread[t], NULL);
  if (p->status != CORE_OK) TRY(core_error_restore(&p->error));
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status complete_options(packing *p) {
  enum { DEFAULT_SAMPLES = 4096 };
  data_pack_options *o = &p->options;
  if (o->samples_per_shard == 0) o->samples_per_shard = DEFAULT_SAMPLES;
  if (o->threads == 0) o->threads = 1;
  if (o->dtype == CORE_DTYPE_COUNT) o->dtype = p->source->dtype;
  p->encoder = o->encoder != NULL ? o->encoder : p->source->encoder;
  CHECK(o->samples_per_shard >= 1 && o->threads >= 1, CORE_ERR_ARGUMENT,
        "%lld samples a shard and %d threads, expected at least 1", (long long)o->samples_per_shard,
        o->threads);
  const int64_t shards = (p->source->samples + o->samples_per_shard - 1) / o->samples_per_shard;
  CHECK(shards <= INT32_MAX - 1, CORE_ERR_ARGUMENT, "%lld shards", (long long)shards);
  p->shards = (int32_t)shards;
  return CORE_OK;
}

/* A shard behind the last one would become part of the set. */
static core_status check_behind(const packing *p) {
  char *path = NULL;
  TRY(data_text_priv(&path, "%s/%s-%05d.h5", p->options.to, p->options.modality, p->shards));
  const bool exists = core_file_exists(path);
  core_status status = CORE_OK;
  if (exists)
    status = core_error_begin(CORE_ERR_MISMATCH, __func__, __FILE__, __LINE__,
                              "%s: is there, but these samples make only %d shards", path, p->shards);
  free(path);
  TRY(status);
  return CORE_OK;
}

static core_status pack_source(packing *p, data_pack_progress *out) {
  TRY(complete_options(p));
  TRY(check_behind(p));
  const core_status status = run_threads(p);
  *out = (data_pack_progress){p->done, p->kept, p->shards};
  TRY(status);
  return CORE_OK;
}

core_status data_pack(const data_pack_options *options, data_pack_progress *out) {
  packing p = {.options = *options, .lock = PTHREAD_MUTEX_INITIALIZER};
  data_source *source = NULL;
  *out = (data_pack_progress){0};
  CHECK((options->from == NULL) != (options->from_set == NULL), CORE_ERR_ARGUMENT,
        "pack either features or a set");
  if (options->from != NULL)
    TRY(data_source_features_priv(options, &source));
  else
    TRY(data_source_set_priv(options, &source));
  p.source = source;
  const core_status status = pack_source(&p, out);
  source->close(source);
  TRY(status);
  return CORE_OK;
}
