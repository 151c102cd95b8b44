/* Where vectors go: a vectors file, or memory; and how long the forward passes take by themselves. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/random.h" /* core_hash */
#include "trainer/serve/embed_impl.h"

/* ---- keys ---- */

/* Bytes of the longest key; 0 unless every shard has keys. */
static core_status longest_key(const train_embedder *e, int64_t *bytes) {
  int64_t longest = 0;
  *bytes = 0;
  for (int32_t k = 0; k < data_set_shards(e->set); k++) {
    char *keys = NULL;
    int64_t samples = 0, its = 0;
    TRY(train_shard_keys(e->directory, e->split, e->about.modality, k, &keys, &samples, &its));
    if (!keys) return CORE_OK;
    free(keys);
    if (its > longest) longest = its;
  }
  *bytes = longest;
  return CORE_OK;
}

/* Keys of the samples of one shard that have rows, widened to those of the file. */
static core_status take_keys(const train_embedder *e, int32_t shard, int64_t first, int64_t key_bytes,
                             char **wide, int64_t *samples, int64_t *kept) {
  char *keys = NULL;
  int64_t its = 0;
  TRY(train_shard_keys(e->directory, e->split, e->about.modality, shard, &keys, samples, &its));
  *kept = 0;
  *wide = calloc((size_t)*samples + 1, (size_t)key_bytes);
  bool good = *wide && keys && its <= key_bytes && first + *samples <= e->samples;
  for (int64_t i = 0; good && i < *samples; i++)
    if (e->present[first + i]) memcpy(*wide + (*kept)++ * key_bytes, keys + i * its, (size_t)its);
  free(keys);
  CHECK(good, *wide ? CORE_ERR_MISMATCH : CORE_ERR_MEMORY,
        "the keys of shard %d of '%s' have changed or do not fit into memory", shard, e->about.modality);
  return CORE_OK;
}

static core_status put_keys(const train_embedder *e, const train_vectors_writer *writer, int64_t key_bytes) {
  int64_t first = 0, row = 0;
  for (int32_t k = 0; key_bytes > 0 && k < data_set_shards(e->set); k++) {
    char *wide = NULL;
    int64_t samples = 0, kept = 0;
    core_status status = take_keys(e, k, first, key_bytes, &wide, &samples, &kept);
    if (status == CORE_OK) status = train_vectors_put_keys(writer, row, kept, wide);
    free(wide);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
    first += samples;
    row += kept;
  }
  return CORE_OK;
}

/* ---- a file ---- */

/* Of everything that the bits depend on. */
static uint64_t identity_of(const train_embedder *e, core_dtype dtype) {
  char text[1024];
  int length = snprintf(
      text, sizeof text, "%016llx %d %.*s>%.*s %s %lld %016llx %s %d %d %016llx",
      (unsigned long long)e->about.checkpoint, (int)e->about.kind, CORE_NAME, e->about.modality, CORE_NAME,
      e->about.toward, core_dtype_text(dtype), (long long)e->block_samples,
      (unsigned long long)data_set_fingerprint(e->set), core_dtype_text(e->session->env.active),
      e->session->env.ops->context_threads(e->session->env.kern), (int)e->session->env.ops->device->kind,
      (unsigned long long)core_hash_text(e->options.overrides ? e->options.overrides : ""));
  return core_hash(text, (size_t)length, 0);
}

/* What one file takes while it is written. */
typedef struct target {
  const train_embedder *e;
  const char *path;
  core_dtype dtype;
  train_vectors_writer *writer;
  train_vectors_state state;
  uint8_t *done;  /* [blocks] */
  uint16_t *half; /* [block_samples, width] */
} target;

/* Rank 0 begins, or takes up. */
static core_status begin(target *t) {
  const train_embedder *e = t->e;
  train_vectors_plan plan = {.about = e->about,
                             .identity = identity_of(e, t->dtype),
                             .samples = e->samples,
                             .block_samples = e->block_samples,
                             .blocks = e->blocks,
                             .block_row = e->block_row,
                             .id = e->id,
                             .label = e->label};
  plan.about.dtype = t->dtype;
  TRY(longest_key(e, &plan.key_bytes));
  TRY(train_vectors_begin(t->path, &plan, &t->state, &t->writer));
  if (t->state == TRAIN_VECTORS_DONE) return CORE_OK;
  TRY(put_keys(e, t->writer, plan.key_bytes)); /* again when resumed: the start may have ended here */
  TRY(train_vectors_done(t->writer, t->done));
  return CORE_OK;
}

static core_status take_target(target *t) {
  t->done = calloc((size_t)t->e->blocks + 1, 1);
  t->half = malloc((size_t)(t->e->block_samples * t->e->about.width) * sizeof *t->half);
  CHECK(t->done && t->half, CORE_ERR_MEMORY, "no memory for blocks of %lld vectors",
        (long long)t->e->block_samples);
  return CORE_OK;
}

static core_status to_file(void *context, int64_t block, const float *rows, int64_t count) {
  target *t = context;
  int64_t numbers = count * t->e->about.width;
  for (int64_t i = 0; t->dtype == CORE_FLOAT16 && i < numbers; i++)
    t->half[i] = core_half_from_float(rows[i]);
  TRY(train_vectors_put(t->writer, block, t->dtype == CORE_FLOAT16 ? (const void *)t->half : rows));
  return CORE_OK;
}

static int64_t count_done(const target *t) {
  int64_t kept = 0;
  for (int64_t b = 0; b < t->e->blocks; b++) kept += t->done[b];
  return kept;
}

static core_status write_all(train_embedder *e, target *t, train_embed_figures *figures) {
  bool first = comm_rank(e->control) == 0;
  int32_t state = 0;
  TRY(comm_agree(e->control, take_target(t)));
  TRY(comm_agree(e->control, first ? begin(t) : CORE_OK));
  state = (int32_t)t->state;
  TRY(comm_broadcast(e->control, 0, &state, sizeof state));
  t->state = (train_vectors_state)state;
  figures->state = t->state;
  figures->kept = e->blocks;
  if (t->state == TRAIN_VECTORS_DONE) return CORE_OK;
  TRY(comm_broadcast(e->control, 0, t->done, (size_t)e->blocks));
  figures->kept = count_done(t);
  if (first && t->state == TRAIN_VECTORS_RESUMED)
    LOG_INFO("%s: %lld of %lld blocks are there, going on", t->path, (long long)figures->kept,
             (long long)e->blocks);
  TRY(comm_agree(e->control, first ? CORE_OK : train_vectors_attach(t->path, &t->writer)));
  TRY(train_embed_pass_priv(e, t->done, to_file, t));
  TRY(comm_agree(e->control, train_vectors_sync(t->writer)));
  TRY(comm_agree(e->control, first ? train_vectors_publish(t->writer) : CORE_OK));
  return CORE_OK;
}

core_status train_embedder_write(train_embedder *e, const char *path, core_dtype dtype,
                                 train_embed_figures *figures) {
  target t = {.e = e, .path = path, .dtype = dtype};
  double start = core_clock_now();
  *figures = (train_embed_figures){.blocks = e->blocks};
  CHECK(dtype == CORE_FLOAT16 || dtype == CORE_FLOAT32, CORE_ERR_ARGUMENT,
        "vectors are float16 or float32, not %s", core_dtype_text(dtype));
  e->waited = 0;
  core_status status = write_all(e, &t, figures);
  train_vectors_leave(t.writer);
  free(t.done);
  free(t.half);
  figures->seconds = core_clock_now() - start;
  figures->waited = e->waited;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- memory ---- */

typedef struct memory_target {
  const train_embedder *e;
  float *rows;
} memory_target;

static core_status to_memory(void *context, int64_t block, const float *rows, int64_t count) {
  memory_target *t = context;
  int64_t Z = t->e->about.width;
  memcpy(t->rows + (int64_t)t->e->block_row[block] * Z, rows, (size_t)(count * Z) * sizeof *rows);
  return CORE_OK;
}

core_status train_embedder_rows(train_embedder *e, float *rows) {
  memory_target t = {e, rows};
  CHECK(comm_size(e->control) == 1, CORE_ERR_USAGE, "vectors go to memory on one rank, not on %d",
        comm_size(e->control));
  TRY(train_embed_pass_priv(e, NULL, to_memory, &t));
  return CORE_OK;
}

/* ---- the forward passes alone ---- */

static core_status time_forward(train_embedder *e, int64_t blocks, double *seconds) {
  enum { QUIET_MILLISECONDS = 200 }; /* until the stream has read ahead all it may */
  data_batch *batch = NULL;
  TRY(train_embed_stream_priv(e, 0));
  TRY(data_stream_get(e->stream, &batch));
  core_clock_sleep(QUIET_MILLISECONDS / 1e3);
  core_status status = train_embed_forward_priv(e, batch);
  double start = core_clock_now();
  for (int64_t b = 0; b < blocks && status == CORE_OK; b++) status = train_embed_forward_priv(e, batch);
  *seconds = core_clock_now() - start;
  data_stream_put(e->stream, batch);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status time_stream(train_embedder *e, int64_t first, int64_t last, double *seconds) {
  double start = core_clock_now();
  TRY(train_embed_stream_priv(e, first));
  for (int64_t b = first; b < last; b++) {
    data_batch *batch = NULL;
    TRY(data_stream_get(e->stream, &batch));
    data_stream_put(e->stream, batch);
  }
  *seconds = core_clock_now() - start;
  return CORE_OK;
}

core_status train_embedder_parts(train_embedder *e, train_embed_parts *out) {
  int64_t ranks = comm_size(e->control), rank = comm_rank(e->control);
  double seconds[2] = {0, 0};
  core_status status = time_forward(e, (e->blocks + ranks - 1) / ranks, &seconds[0]);
  if (status == CORE_OK)
    status = time_stream(e, e->blocks * rank / ranks, e->blocks * (rank + 1) / ranks, &seconds[1]);
  data_stream_close(e->stream);
  e->stream = NULL;
  TRY(comm_agree(e->control, status));
  TRY(comm_all_reduce(e->control, COMM_MAX, CORE_FLOAT64, seconds, 2));
  *out = (train_embed_parts){.forward = seconds[0], .stream = seconds[1]};
  return CORE_OK;
}
