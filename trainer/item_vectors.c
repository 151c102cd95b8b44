#include "trainer/item_vectors.h"

#include <stdlib.h>
#include <string.h>

#include "core/stop.h"
#include "trainer/share_rows.h"

core_status train_item_vectors_batch(train_session *session, data_stream *stream, data_batch **batch) {
  core_status status = data_stream_get(stream, batch);
  if (status == CORE_OK && core_stop_requested())
    status = core_error_begin(CORE_ERR_STOPPED, __func__, __FILE__, __LINE__, "stopped during evaluation");
  TRY(comm_agree(session->env.control, status));
  return CORE_OK;
}

core_tensor train_item_vectors_rows(const train_session *session, int32_t direction, int32_t m) {
  const train_model *model = session->model;
  if (direction < 0) return model->head[m].z;
  bool asks = model->alignment.direction[direction].from == m;
  return asks ? model->alignment.query_rows : model->alignment.key_rows;
}

/* A batch of one modality as the model takes it: nothing of the others. */
typedef struct widened {
  data_batch batch;
  data_part part[CORE_MAX_MODALITIES];
  int64_t nothing;
} widened;

static void widen(const train_session *session, const data_batch *batch, int32_t m, widened *out) {
  *out = (widened){.batch = *batch};
  out->batch.modalities = session->env.layout.modalities;
  out->batch.part = out->part;
  for (int32_t other = 0; other < session->env.layout.modalities; other++)
    out->part[other] = (data_part){.offset = &out->nothing,
                                   .latent = &out->nothing,
                                   .dtype = batch->part[0].dtype,
                                   .width = session->model->limits.width[other]};
  out->part[m] = batch->part[0];
}

typedef struct work {
  train_session *session;
  const train_part *part;
  int32_t direction;
  comm_piece *send, *recv;
  train_item_vectors *out;
} work;

static core_status take_batch(const work *w, const data_batch *batch, int64_t first) {
  train_session *session = w->session;
  train_env *env = &session->env;
  train_layout layout = session->evaluation_layout;
  int32_t m = w->part->modality;
  widened all;
  layout.batch = batch->samples; /* the last one may be short; ranges are cut to it */
  size_t n = (size_t)batch->samples;
  memcpy(w->out->id + first, batch->id, n * sizeof *batch->id);
  memcpy(w->out->label + first, batch->label, n * sizeof *batch->label);
  memcpy(w->out->present + first, batch->present, n);
  widen(session, batch, m, &all);
  TRY(train_model_take(session->model, &all.batch, 0, w->direction));
  TRY(train_model_forward(session->model, TRAIN_MODE_EVALUATE));
  TRY(env->ops->device->stream_wait(NULL)); /* the batch's latents have been fetched: it may be given back */
  data_range range = train_layout_range(&layout, layout.rank, m, 0);
  core_tensor rows = train_slice(w->out->z, first, batch->samples);
  core_tensor own = train_slice(rows, range.lo, range.hi - range.lo);
  core_tensor made = train_item_vectors_rows(session, w->direction, m);
  if (own.shape[0] > 0) TRY(env->ops->device->copy(own.data, made.data, core_tensor_bytes(&own), NULL));
  TRY(train_share_rows(env, &layout, m, rows, w->send, w->recv));
  return CORE_OK;
}

static core_status take_all(const work *w, data_stream *stream) {
  data_batch *batch = NULL;
  for (int64_t first = 0, count; first < w->out->samples; first += count) {
    comm_note(w->session->env.comm, w->session->env.step, -1, "evaluation data");
    TRY(train_item_vectors_batch(w->session, stream, &batch));
    CHECK(batch, CORE_ERR_INTERNAL, "%lld of %lld samples were embedded", (long long)first,
          (long long)w->out->samples);
    core_status status = take_batch(w, batch, first);
    count = batch->samples;
    data_stream_put(stream, batch);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static core_status plan(work *w) {
  const train_session *session = w->session;
  train_item_vectors *out = w->out;
  size_t n = (size_t)data_set_samples(w->part->set), ranks = (size_t)session->env.layout.ranks;
  out->samples = (int64_t)n;
  out->z = core_tensor_2(NULL, CORE_REAL_DTYPE, out->samples, session->model->Z);
  TRY(out->device->allocate(core_tensor_bytes(&out->z), &out->z.data));
  TRY(out->device->fill(out->z.data, 0, core_tensor_bytes(&out->z), NULL));
  out->present = calloc(n, 1);
  out->id = calloc(n, sizeof *out->id);
  out->label = calloc(n, sizeof *out->label);
  w->send = calloc(ranks, sizeof *w->send);
  w->recv = calloc(ranks, sizeof *w->recv);
  CHECK(out->present && out->id && out->label && w->send && w->recv, CORE_ERR_MEMORY,
        "no memory for the embeddings of %zu samples", n);
  return CORE_OK;
}

core_status train_item_vectors_make(train_session *session, const train_part *part, int32_t direction,
                                    train_item_vectors *out) {
  work w = {.session = session, .part = part, .direction = direction, .out = out};
  data_stream *stream = NULL;
  comm_group *control = session->env.control;
  *out = (train_item_vectors){.device = session->env.ops->device};
  core_status status = comm_agree(control, plan(&w));
  if (status == CORE_OK) status = comm_agree(control, train_session_part_stream(session, part, &stream));
  if (status == CORE_OK) status = take_all(&w, stream);
  data_stream_close(stream);
  free(w.send);
  free(w.recv);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

void train_item_vectors_free(train_item_vectors *vectors) {
  if (vectors->device) vectors->device->release(vectors->z.data);
  free(vectors->present);
  free(vectors->id);
  free(vectors->label);
}
