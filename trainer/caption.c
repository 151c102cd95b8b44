#include "trainer/caption.h"

#include "core/clock.h"
#include "core/stop.h"

/* The next batch on all ranks, or the agreed reason why there is none. */
static core_status next_batch(train_session *session, data_stream *stream, data_batch **batch) {
  core_status status = data_stream_get(stream, batch);
  if (status == CORE_OK && core_stop_requested())
    status = core_error_begin(CORE_ERR_STOPPED, __func__, __FILE__, __LINE__, "stopped during evaluation");
  TRY(comm_agree(session->env.control, status));
  return CORE_OK;
}

static core_status take_stream(train_session *session, data_stream *stream, train_caption *out) {
  train_env *env = &session->env;
  for (;;) {
    data_batch *batch = NULL;
    TRY(next_batch(session, stream, &batch));
    if (!batch) return CORE_OK;
    out->samples += batch->samples;
    out->predictions += train_decoder_predictions(session->model, batch, 0);
    core_status status = train_model_take(session->model, batch, 0, -1);
    if (status == CORE_OK) status = train_model_forward(session->model, TRAIN_MODE_EVALUATE);
    if (status == CORE_OK) status = env->ops->device->stream_wait(NULL); /* the batch's latents are fetched */
    data_stream_put(stream, batch);
    TRY(status);
  }
}

static core_status reduce(train_session *session, train_caption *out) {
  train_moe_sums *sums = &session->model->sums;
  comm_group *world = session->env.world;
  TRY(train_moe_sums_down(&session->env, sums));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, sums->value.host,
                      core_tensor_count(&sums->value.device)));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_INT64, sums->count.host, core_tensor_count(&sums->count.device)));
  out->loss = session->model->decoder.loss;
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, &out->loss, 1));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_INT64, &out->predictions, 1));
  if (out->predictions > 0) out->loss /= (double)out->predictions;
  return CORE_OK;
}

core_status train_caption_run(train_session *session, train_caption *out) {
  data_stream *stream = NULL;
  data_position start = {0, 0, 0};
  double began = core_clock_now();
  *out = (train_caption){0};
  session->model->decoder.loss = 0;
  TRY(train_moe_sums_clear(&session->env, &session->model->sums));
  TRY(comm_agree(session->env.control,
                 train_session_stream(session, session->evaluation, &session->evaluation_layout, &start,
                                      false, &stream)));
  core_status status = take_stream(session, stream, out);
  data_stream_close(stream);
  if (status == CORE_OK) status = reduce(session, out);
  TRY(status);
  out->seconds = core_clock_now() - began;
  return CORE_OK;
}
