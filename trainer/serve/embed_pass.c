/* The table of a split, and passes over it: streams, the model, rounds of blocks. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/stop.h"
#include "trainer/serve/embed_impl.h"

/* ---- what the split holds ---- */

static core_status open_stream(train_embedder *e, int64_t batch, data_range range, int64_t first,
                               data_stream **out) {
  const train_settings *s = e->settings;
  const core_device *device = e->session ? e->session->env.ops->device : NULL;
  data_stream_options options = {.order = {s->run.seed, 0},
                                 .start = {0, 0, first},
                                 .batch = batch,
                                 .micro_batches = 1,
                                 .range = &range,
                                 .queue = (int32_t)s->data.queue,
                                 .threads = (int32_t)s->data.threads,
                                 .cache_bytes = s->data.cache << 20,
                                 .device = device && !device->host_access ? device : NULL,
                                 .non_finite = s->data.non_finite == TRAIN_NON_FINITE_SKIP
                                                   ? DATA_NON_FINITE_SKIP
                                                   : DATA_NON_FINITE_ERROR};
  TRY(data_stream_open(e->set, &options, out));
  return CORE_OK;
}

static void index_batch(train_embedder *e, const data_batch *batch, int64_t first, int64_t *row) {
  for (int64_t i = 0; i < batch->samples; i++) {
    if ((first + i) % e->block_samples == 0) e->block_row[(first + i) / e->block_samples] = (uint64_t)*row;
    e->present[first + i] = batch->present[i];
    if (!batch->present[i]) continue;
    e->id[*row] = batch->id[i];
    if (e->label) e->label[*row] = batch->label[i];
    (*row)++;
  }
}

/* A stream that wants no latents still tells ids, labels and which samples have the modality. */
static core_status index_stream(train_embedder *e, data_stream *stream) {
  int64_t first = 0, row = 0;
  while (first < e->samples) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    CHECK(batch, CORE_ERR_INTERNAL, "the stream of %lld samples ended at %lld", (long long)e->samples,
          (long long)first);
    index_batch(e, batch, first, &row);
    first += batch->samples;
    data_stream_put(stream, batch);
  }
  e->block_row[e->blocks] = (uint64_t)row;
  e->about.rows = row; /* samples whose latents are not finite and are skipped have gone */
  return CORE_OK;
}

core_status train_embed_index_priv(train_embedder *e) {
  enum { BATCH = 65536 };
  data_stream *stream = NULL;
  size_t rows = (size_t)e->about.rows;
  e->block_row = calloc((size_t)e->blocks + 1, sizeof *e->block_row);
  e->id = malloc((rows + 1) * sizeof *e->id);
  e->present = malloc((size_t)e->samples);
  if (data_set_has_labels(e->set)) e->label = malloc((rows + 1) * sizeof *e->label);
  CHECK(e->block_row && e->id && e->present && (e->label || !data_set_has_labels(e->set)), CORE_ERR_MEMORY,
        "no memory for the ids of %zu samples", rows);
  TRY(open_stream(e, e->samples < BATCH ? e->samples : BATCH, (data_range){0, 0}, 0, &stream));
  core_status status = index_stream(e, stream);
  data_stream_close(stream);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- the model ---- */

core_status train_embed_stream_priv(train_embedder *e, int64_t block) {
  data_stream_close(e->stream);
  e->stream = NULL;
  TRY(open_stream(e, e->block_samples, (data_range){0, e->block_samples}, block * e->block_samples,
                  &e->stream));
  e->next = block;
  return CORE_OK;
}

core_status train_embed_forward_priv(train_embedder *e, const data_batch *batch) {
  static const int64_t nothing[1] = {0};
  train_model *model = e->session->model;
  int32_t M = (int32_t)e->settings->data.modalities_count;
  data_batch whole = *batch;
  for (int32_t m = 0; m < M; m++)
    e->part[m] = (data_part){.offset = (int64_t *)nothing, .dtype = CORE_FLOAT32, .width = e->sizes.width[m]};
  e->part[e->modality] = batch->part[0];
  e->part[e->modality].hi = batch->samples; /* the last batch may be short */
  whole.part = e->part;
  whole.modalities = M;
  TRY(train_model_take(model, &whole, 0, e->direction));
  TRY(train_model_forward(model, TRAIN_MODE_EVALUATE));
  TRY(e->session->env.ops->device->stream_wait(NULL));
  return CORE_OK;
}

static core_tensor vectors_of(const train_embedder *e) {
  const train_model *model = e->session->model;
  if (e->about.kind == TRAIN_VECTORS_EMBEDDING) return model->head[e->modality].z;
  return e->about.kind == TRAIN_VECTORS_QUERY ? model->alignment.query_rows : model->alignment.key_rows;
}

core_status train_embed_fetch_priv(train_embedder *e, const data_batch *batch, int64_t *count) {
  int64_t Z = e->about.width;
  core_tensor rows = train_rows(vectors_of(e), batch->samples);
  *count = 0;
  TRY(e->session->env.ops->device->copy(e->real, rows.data, core_tensor_bytes(&rows), NULL));
  for (int64_t i = 0; i < batch->samples; i++) {
    if (!batch->present[i]) continue;
    float *to = e->rows + (*count)++ * Z;
    double square = 0;
    for (int64_t z = 0; z < Z; z++) {
      to[z] = (float)e->real[i * Z + z];
      square += (double)to[z] * (double)to[z];
    }
    CHECK(isfinite(square), CORE_ERR_NON_FINITE, "the vector of sample %llu of '%s' is not finite",
          (unsigned long long)batch->id[i], e->about.modality);
  }
  return CORE_OK;
}

/* ---- rounds ---- */

typedef struct rounds {
  int64_t *block; /* that are to be done, of all ranks */
  int64_t pending, lo, hi, count;
  train_embed_sink sink;
  void *context;
  double started, shown;
} rounds;

static core_status do_block(train_embedder *e, const rounds *r, int64_t block) {
  data_batch *batch = NULL;
  int64_t count = 0;
  double start = core_clock_now();
  if (!e->stream || e->next != block) TRY(train_embed_stream_priv(e, block));
  TRY(data_stream_get(e->stream, &batch));
  e->waited += core_clock_now() - start;
  CHECK(batch && batch->before.consumed == block * e->block_samples, CORE_ERR_INTERNAL,
        "the stream does not deliver block %lld", (long long)block);
  core_status status = train_embed_forward_priv(e, batch);
  if (status == CORE_OK) status = train_embed_fetch_priv(e, batch, &count);
  if (status == CORE_OK) status = r->sink(r->context, block, e->rows, count);
  data_stream_put(e->stream, batch);
  e->next = block + 1;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* A line like that of training. All ranks are as far as this one, or one block less. */
static void show_progress(const train_embedder *e, rounds *r, int64_t round) {
  double now = core_clock_now(), elapsed = now - r->started;
  int64_t done = (round + 1) * comm_size(e->control);
  if (done > r->pending) done = r->pending;
  bool terminal = core_log_is_terminal();
  if (comm_rank(e->control) != 0 || r->pending == 0 || now - r->shown < (terminal ? 0.1 : 10)) return;
  r->shown = now;
  double rate = (double)done / (elapsed > 0 ? elapsed : 1e-9), left = (double)(r->pending - done) / rate;
  char line[256];
  snprintf(line, sizeof line, "block %lld/%lld  %.1fk samples/s  wait %.1f %%  ETA %d:%02d", (long long)done,
           (long long)r->pending, rate * (double)e->block_samples / 1e3, 100 * e->waited / elapsed,
           (int)(left / 60), (int)left % 60);
  if (terminal)
    core_log_progress("%s", line);
  else
    LOG_INFO("%s", line);
}

static core_status run_rounds(train_embedder *e, rounds *r) {
  for (int64_t round = 0; round < r->count; round++) {
    core_status status = CORE_OK;
    comm_note(e->options.comm, e->options.step, -1, "embedding");
    if (core_stop_requested())
      status = core_error_begin(CORE_ERR_STOPPED, __func__, __FILE__, __LINE__, "stopped while embedding");
    else if (r->lo + round < r->hi)
      status = do_block(e, r, r->block[r->lo + round]);
    TRY(comm_agree(e->control, status));
    show_progress(e, r, round);
  }
  return CORE_OK;
}

core_status train_embed_pass_priv(train_embedder *e, const uint8_t *done, train_embed_sink sink,
                                  void *context) {
  rounds r = {.sink = sink, .context = context, .started = core_clock_now()};
  int64_t ranks = comm_size(e->control), rank = comm_rank(e->control);
  core_status status = CORE_OK;
  r.block = malloc((size_t)(e->blocks + 1) * sizeof *r.block);
  if (!r.block)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for %lld blocks",
                              (long long)e->blocks);
  for (int64_t b = 0; status == CORE_OK && b < e->blocks; b++)
    if (!done || !done[b]) r.block[r.pending++] = b;
  r.lo = r.pending * rank / ranks;
  r.hi = r.pending * (rank + 1) / ranks;
  r.count = (r.pending + ranks - 1) / ranks;
  r.shown = r.started;
  status = comm_agree(e->control, status);
  if (status == CORE_OK) status = run_rounds(e, &r);
  core_error saved;
  core_error_save(&saved);
  core_log_progress("%s", "");
  data_stream_close(e->stream);
  e->stream = NULL;
  free(r.block);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
