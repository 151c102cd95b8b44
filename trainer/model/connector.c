/* Connector of modality m, its own parameters:
 *   linear  x = s W1^T + b1            mlp  x = GELU(s W1^T + b1) W2^T + b2            resampler: resampler.h
 * with s the standardised latents (METHODS: per feature, or one root mean square for all), plus a learned
 * position table where configured. Matrices start at N(0, 1/sqrt(fan in)), positions at N(0, 0.02). */
#include <math.h>
#include <string.h>

#include "trainer/model/tower.h"

static train_parameter matrix(int32_t m, int64_t rows, int64_t columns) {
  return (train_parameter){.rank = 2,
                           .shape = {rows, columns},
                           .scope = TRAIN_SCOPE_MODALITY,
                           .modality = m,
                           .init = TRAIN_INIT_NORMAL,
                           .init_value = 1 / sqrt((double)columns),
                           .decay = true};
}

static train_parameter bias(int32_t m, int64_t count) {
  return (train_parameter){.rank = 1, .shape = {count}, .scope = TRAIN_SCOPE_MODALITY, .modality = m};
}

core_status train_connector_declare(train_model *model, int32_t m) {
  const train_modality_settings *settings = &model->env->settings->data.modalities[m];
  train_connector_layer *layer = &model->connector[m];
  bool mlp = settings->connector == TRAIN_CONNECTOR_MLP;
  int64_t D = model->limits.width[m], C = model->C;
  layer->width = D;
  layer->position = -1;
  if (settings->connector == TRAIN_CONNECTOR_RESAMPLER)
    return train_resampler_declare(model, m, D, &layer->resampler);
  layer->hidden = mlp ? (settings->hidden ? settings->hidden : C) : 0;
  int64_t first = mlp ? layer->hidden : C;
  TRY(train_declare(model, matrix(m, first, D), &layer->first.weight, "connector.%s.first.weight",
                    settings->name));
  TRY(train_declare(model, bias(m, first), &layer->first.bias, "connector.%s.first.bias", settings->name));
  TRY(train_linear_add(model, &layer->first));
  if (mlp) {
    TRY(train_linear_add(model, &layer->second));
    TRY(train_declare(model, matrix(m, C, first), &layer->second.weight, "connector.%s.second.weight",
                      settings->name));
    TRY(train_declare(model, bias(m, C), &layer->second.bias, "connector.%s.second.bias", settings->name));
  }
  if (settings->positions == TRAIN_POSITIONS_LEARNED) {
    train_parameter table = matrix(m, settings->length, C);
    table.init_value = 0.02;
    table.decay = false; /* an embedding */
    TRY(train_declare(model, table, &layer->position, "connector.%s.position", settings->name));
  }
  return CORE_OK;
}

core_status train_connector_plan(train_model *model, int32_t m, const train_arenas *arenas) {
  train_connector_layer *layer = &model->connector[m];
  core_arena *arena = arenas->activations;
  int64_t T = model->limits.latents[m];
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, layer->width, 1, &layer->shift));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, layer->width, 1, &layer->scale));
  TRY(train_take_active(model, arena, T, layer->width, &layer->input));
  if (layer->resampler) return train_resampler_plan(model, m, arenas);
  TRY(train_take_active(model, arena, T, layer->hidden, &layer->before));
  TRY(train_take_active(model, arena, T, layer->hidden, &layer->active));
  return CORE_OK;
}

/* A decoder's latents are listed apart from the sequences that they lie in. */
static train_linear_rows rows_of(const train_model *model, int32_t m) {
  const int64_t *first = model->items.row_first;
  core_tensor key = model->env->settings->model.kind == TRAIN_KIND_DECODER ? model->decoder.latent_key.device
                                                                           : model->items.key.device;
  return (train_linear_rows){.key = train_slice(key, first[m], first[m + 1] - first[m])};
}

core_status train_connector_take(train_model *model, int32_t m, const data_part *part, int64_t *offset) {
  if (model->connector[m].resampler) return train_resampler_take(model, m, part, offset);
  memcpy(offset, part->offset, (size_t)(part->hi - part->lo + 1) * sizeof *offset);
  return CORE_OK;
}

core_status train_connector_forward(train_model *model, int32_t m, core_tensor x) {
  train_env *env = model->env;
  train_connector_layer *layer = &model->connector[m];
  train_parameters *p = &model->parameters;
  train_linear_rows rows = rows_of(model, m);
  int64_t T = model->items.latent[m].shape[0];
  core_tensor input = train_rows(layer->input, T), before = train_rows(layer->before, T);
  core_tensor active = train_rows(layer->active, T);
  KERN(env, standardize, model->items.latent[m], layer->shift.device, layer->scale.device, input);
  if (layer->resampler) return train_resampler_forward(model, m, input, rows, x);
  TRY(train_linear_forward(model, &layer->first, rows, input, KERN_SET, layer->hidden > 0 ? before : x));
  if (layer->hidden > 0) {
    KERN(env, gelu_fwd, KERN_GELU_ERF, before, active);
    TRY(train_linear_forward(model, &layer->second, rows, active, KERN_SET, x));
  }
  if (layer->position >= 0)
    KERN(env, position_fwd, train_segments_of(model, m), train_parameter_value(p, layer->position), x);
  return CORE_OK;
}

core_status train_connector_backward(train_model *model, int32_t m, core_tensor dx) {
  train_env *env = model->env;
  train_connector_layer *layer = &model->connector[m];
  train_parameters *p = &model->parameters;
  train_linear_rows rows = rows_of(model, m);
  int64_t T = model->items.latent[m].shape[0];
  core_tensor before = train_rows(layer->before, T), active = train_rows(layer->active, T), first = dx;
  if (layer->resampler) return train_resampler_backward(model, m, train_rows(layer->input, T), rows, dx);
  if (train_parameter_trained(p, layer->position))
    KERN(env, position_bwd, train_segments_of(model, m), dx, train_parameter_gradient(p, layer->position));
  if (layer->hidden > 0 && !train_linear_trained(model, &layer->first))
    return train_linear_backward(model, &layer->second, rows, dx, active, train_none());
  if (layer->hidden > 0) {
    first = active; /* not needed any more: holds its own gradient from here on */
    TRY(train_linear_backward(model, &layer->second, rows, dx, active, first));
    KERN(env, gelu_bwd, KERN_GELU_ERF, first, before, KERN_SET, first);
  }
  TRY(train_linear_backward(model, &layer->first, rows, first, train_rows(layer->input, T), train_none()));
  return CORE_OK;
}
