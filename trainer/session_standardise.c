/* Standardisation of the latents: the ranks share the modalities out, one reads, the others wait step by
 * step. */
#include <math.h>
#include <stdlib.h>

#include "trainer/session_impl.h"

/* One step of a long measurement is done: the ranks that wait learn it, and the deadline begins anew. */
static core_status step_done(void *session) {
  TRY(comm_agree(((train_session *)session)->env.control, CORE_OK));
  return CORE_OK;
}

static core_status measure(train_session *session, int32_t m, double *shift, double *scale) {
  int64_t width = session->model->limits.width[m];
  int normalize = session->env.settings->data.modalities[m].normalize;
  TRY(data_set_moments(session->training, m, train_session_non_finite_priv(session), step_done, session,
                       shift, scale));
  double square = 0;
  for (int64_t d = 0; d < width; d++) square += (shift[d] * shift[d] + scale[d] * scale[d]) / (double)width;
  for (int64_t d = 0; d < width; d++) {
    double deviation = normalize == TRAIN_NORMALIZE_RMS ? sqrt(square) : scale[d];
    if (normalize == TRAIN_NORMALIZE_RMS) shift[d] = 0;
    scale[d] = deviation > 0 ? 1 / deviation : 1; /* a constant feature becomes 0 */
  }
  return CORE_OK;
}

/* The other side of step_done. */
static core_status wait_for_steps(train_session *session, int32_t m) {
  int64_t steps = data_set_moment_steps(session->training, m);
  for (int64_t i = 0; i < steps; i++) TRY(comm_agree(session->env.control, CORE_OK));
  return CORE_OK;
}

static core_status take_standardisation(train_session *session, int32_t m, const double *shift,
                                        const double *scale) {
  train_connector_layer *layer = &session->model->connector[m];
  core_real *to_shift = layer->shift.host, *to_scale = layer->scale.host;
  if (!to_shift) return CORE_OK;
  for (int64_t d = 0; d < layer->width; d++) {
    to_shift[d] = (core_real)shift[d];
    to_scale[d] = (core_real)scale[d];
  }
  TRY(train_mirror_up(&session->env, &layer->shift, layer->width));
  TRY(train_mirror_up(&session->env, &layer->scale, layer->width));
  return CORE_OK;
}

/* The ranks share the modalities out: rank m mod W reads modality m. A failure of the reader between its
 * steps meets the others where they wait for the next one, or for the end. */
static core_status standardise_one(train_session *session, int32_t m, double *shift, double *scale) {
  train_env *env = &session->env;
  int64_t width = session->model->limits.width[m];
  int32_t reader = m % comm_size(env->world);
  for (int64_t d = 0; d < width; d++) {
    shift[d] = 0;
    scale[d] = 1;
  }
  if (env->settings->data.modalities[m].normalize != TRAIN_NORMALIZE_NONE) {
    core_status status;
    if (comm_rank(env->world) == reader) {
      status = measure(session, m, shift, scale);
      status = comm_agree(env->control, status);
    } else {
      status = wait_for_steps(session, m);
      if (status == CORE_OK) status = comm_agree(env->control, CORE_OK);
    }
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  TRY(comm_broadcast(env->world, reader, shift, (size_t)width * sizeof *shift));
  TRY(comm_broadcast(env->world, reader, scale, (size_t)width * sizeof *scale));
  TRY(take_standardisation(session, m, shift, scale));
  return CORE_OK;
}

core_status train_session_standardise(train_session *session) {
  for (int32_t m = 0; m < session->env.layout.modalities; m++) {
    int64_t width = session->model->limits.width[m];
    double *both = malloc((size_t)width * 2 * sizeof *both);
    CHECK(both, CORE_ERR_MEMORY, "no memory for %lld features", (long long)width);
    comm_note(session->env.comm, 0, -1, "standardisation");
    core_status status = standardise_one(session, m, both, both + width);
    free(both);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
