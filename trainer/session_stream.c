/* Streams of batches for the share of a rank. */
#include <stdlib.h>

#include "trainer/session_impl.h"

data_non_finite train_session_non_finite_priv(const train_session *session) {
  return session->env.settings->data.non_finite == TRAIN_NON_FINITE_SKIP ? DATA_NON_FINITE_SKIP
                                                                         : DATA_NON_FINITE_ERROR;
}

core_status train_session_stream(train_session *session, data_set *set, const train_layout *layout,
                                 const data_position *start, bool training, data_stream **out) {
  const train_settings *s = session->env.settings;
  int64_t cells = layout->micro_batches * layout->modalities;
  data_range *range = calloc((size_t)cells, sizeof *range);
  CHECK(range, CORE_ERR_MEMORY, "no memory for %lld ranges", (long long)cells);
  for (int64_t i = 0; i < cells; i++)
    range[i] =
        train_layout_range(layout, layout->rank, (int32_t)(i % layout->modalities), i / layout->modalities);
  data_range *text = calloc((size_t)layout->micro_batches, sizeof *text);
  if (!text) free(range);
  CHECK(text, CORE_ERR_MEMORY, "no memory for %lld ranges", (long long)layout->micro_batches);
  for (int64_t micro = 0; micro < layout->micro_batches; micro++)
    text[micro] = range[micro * layout->modalities];
  data_stream_options options = {.order = {s->run.seed, training ? s->data.shuffle : 0},
                                 .start = *start,
                                 .batch = layout->batch,
                                 .micro_batches = (int32_t)layout->micro_batches,
                                 .range = range,
                                 .text = s->model.kind == TRAIN_KIND_DECODER ? text : NULL,
                                 .queue = (int32_t)s->data.queue,
                                 .threads = (int32_t)s->data.threads,
                                 .cache_bytes = s->data.cache << 20,
                                 .device = session->arenas.host_access ? NULL : session->env.ops->device,
                                 .non_finite = train_session_non_finite_priv(session),
                                 .grouped = training && s->data.batches == TRAIN_BATCHES_HOMOGENEOUS,
                                 .repeat = training};
  core_status status = data_stream_open(set, &options, out);
  free(range);
  free(text);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status train_session_part_stream(train_session *session, const train_part *part, data_stream **out) {
  const train_settings *s = session->env.settings;
  const train_layout *layout = &session->evaluation_layout;
  data_range range = train_layout_range(layout, layout->rank, part->modality, 0);
  data_stream_options options = {.order = {s->run.seed, 0},
                                 .batch = layout->batch,
                                 .micro_batches = 1,
                                 .range = &range,
                                 .queue = (int32_t)s->data.queue,
                                 .threads = (int32_t)s->data.threads,
                                 .cache_bytes = s->data.cache << 20,
                                 .device = session->arenas.host_access ? NULL : session->env.ops->device};
  TRY(data_stream_open(part->set, &options, out));
  return CORE_OK;
}
