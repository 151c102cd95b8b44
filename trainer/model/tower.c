#include "trainer/model/tower.h"

#include <fnmatch.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/model/lora.h"

core_status train_declare(train_model *model, train_parameter parameter, int32_t *index, const char *format,
                          ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(parameter.name, sizeof parameter.name, format, arguments);
  va_end(arguments);
  CHECK(length < CORE_NAME, CORE_ERR_ARGUMENT, "the parameter name '%s...' is too long", parameter.name);
  TRY(train_parameters_add(&model->parameters, &parameter, index));
  return CORE_OK;
}

static void take_sizes(train_model *model) {
  const train_settings *s = model->env->settings;
  model->C = s->model.width;
  model->L = s->model.per_direction ? s->objective.directions_count : s->model.layers;
  model->H = s->model.heads;
  model->G = s->model.kv_heads ? s->model.kv_heads : s->model.heads;
  if (s->model.kind != TRAIN_KIND_CONNECTOR)
    model->A = s->model.head_width ? s->model.head_width : s->model.width / s->model.heads;
  model->own_trunks = s->model.trunks == TRAIN_TRUNK_PER_MODALITY;
  model->trunks = model->own_trunks ? model->env->layout.modalities : 1;
  model->Z = s->model.embedding ? s->model.embedding : s->model.width;
  int64_t gated = (model->C * 8 / 3 + 31) / 32 * 32; /* as many weights as an ungated layer of 4 C */
  model->F = s->model.hidden ? s->model.hidden : s->model.activation == TRAIN_SWIGLU ? gated : 4 * model->C;
}

static core_status declare_tower(train_model *model) {
  train_env *env = model->env;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_connector_declare(model, m));
  for (int32_t t = 0; t < model->trunks; t++)
    if (train_trunk_held(model, t)) TRY(train_trunk_declare(model, t));
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_declare(model, m));
  train_parameter scale = {.rank = 1, .shape = {1}, .init = TRAIN_INIT_CONSTANT};
  scale.init_value = log(env->settings->objective.scale);
  TRY(train_declare(model, scale, &model->log_scale, "log_scale"));
  return CORE_OK;
}

static bool is_connector(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_CONNECTOR;
}

static bool is_decoder(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_DECODER;
}

/* Freezes by those patterns that contain a text. */
static void freeze(train_model *model, const char *text) {
  const train_settings *s = model->env->settings;
  for (unsigned i = 0; i < s->optimizer.frozen_count; i++)
    if (strstr(s->optimizer.frozen[i], text))
      train_parameters_freeze(&model->parameters, s->optimizer.frozen[i]);
}

/* Of an added expert, of its column, or of the calibration that its layer has. */
static bool is_added(const train_model *model, const char *name) {
  const train_settings *s = model->env->settings;
  int layer = 0, expert = 0;
  if (strstr(name, ".router.added.") || strstr(name, ".calibration.")) return true;
  if (sscanf(name, "blocks.%d.experts.%d.", &layer, &expert) != 2) return false;
  int64_t j = train_settings_mixture(s, layer);
  return expert >= train_settings_experts(s, j) - train_settings_added(s, j);
}

bool train_model_names(const train_model *model, const char *pattern, const train_parameter *parameter) {
  if (strcmp(pattern, "added") == 0) return is_added(model, parameter->name);
  return fnmatch(pattern, parameter->name, 0) == 0;
}

/* optimizer.trained: all else is frozen. */
static void freeze_others(train_model *model) {
  const train_settings *s = model->env->settings;
  train_parameters *set = &model->parameters;
  for (int32_t i = 0; s->optimizer.trained_count > 0 && i < set->count; i++) {
    bool named = false;
    for (unsigned k = 0; k < s->optimizer.trained_count; k++)
      named = named || train_model_names(model, s->optimizer.trained[k], &set->list[i]);
    set->list[i].frozen = set->list[i].frozen || !named;
    set->list[i].active = set->list[i].active && named;
  }
}

static core_status declare(train_model *model) {
  model->log_scale = -1;
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    model->connector[m].width = model->limits.width[m];
  TRY(is_connector(model) ? train_alignment_declare(model)
      : is_decoder(model) ? train_decoder_declare(model)
                          : declare_tower(model));
  const train_settings *s = model->env->settings;
  freeze(model, "");
  TRY(train_lora_declare(model));
  freeze(model, "lora_"); /* other patterns do not reach adapters */
  freeze_others(model);
  train_parameters_place(&model->parameters);
  train_parameters_share(&model->parameters, model->env, s->parallel.shard_optimizer);
  return CORE_OK;
}

/* Parts that lie above the blocks, by the beginnings of names; what is not known counts as below. */
static bool is_above(const char *name) {
  static const char *const above[] = {"final_norm.", "output.", "head.", "log_scale"};
  for (size_t i = 0; i < sizeof above / sizeof *above; i++)
    if (strncmp(name, above[i], strlen(above[i])) == 0) return true;
  return false;
}

int64_t train_model_lowest(const train_model *model) {
  int64_t lowest = model->L;
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    int layer = -1;
    if (p->frozen || is_above(p->name)) continue;
    if (sscanf(p->name, "blocks.%d.", &layer) != 1) return -1;
    if (layer < lowest) lowest = layer;
  }
  return lowest;
}

int32_t train_model_directions(const train_model *model) {
  return is_connector(model) ? model->alignment.directions : 1;
}

void train_model_activate(train_model *model, int32_t d) {
  if (is_connector(model)) train_alignment_activate(model, d);
}

core_status train_model_create(train_env *env, const int64_t *width, train_model **out) {
  train_model *model = calloc(1, sizeof *model);
  CHECK(model, CORE_ERR_MEMORY, "no memory for the model");
  model->env = env;
  take_sizes(model);
  model->recomputes = env->settings->model.recompute;
  model->lowest = -1;
  memcpy(model->limits.width, width, (size_t)env->layout.modalities * sizeof *width);
  model->rotates = is_decoder(model);
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (env->settings->data.modalities[m].positions == TRAIN_POSITIONS_ROPE) model->rotates = true;
  model->block = calloc((size_t)model->L * (size_t)model->trunks, sizeof *model->block);
  core_status status = model->block ? declare(model) : CORE_ERR_MEMORY;
  if (status != CORE_OK) {
    train_model_destroy(model);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = model;
  return CORE_OK;
}

void train_model_destroy(train_model *model) {
  if (!model) return;
  train_parameters_free(&model->parameters);
  train_dispatch_free(model);
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; m++) train_resampler_free(model->connector[m].resampler);
  train_alignment_free(&model->alignment);
  free(model->map);
  free(model->block);
  free(model);
}

/* ---- memory ---- */

static core_status plan_items(train_model *model, const train_arenas *arenas) {
  train_items *items = &model->items;
  core_arena *arena = arenas->activations;
  TRY(train_mirror_plan(arenas, arena, CORE_INT64, model->S + 1, 1, &items->offset));
  TRY(train_mirror_plan(arenas, arena, CORE_INT32, model->T, 1, &items->position));
  TRY(train_mirror_plan(arenas, arena, CORE_UINT64, model->T, 1, &items->key));
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    const train_model_limits *l = &model->limits;
    TRY(train_mirror_plan(arenas, arena, CORE_INT64, l->segments[m] + 1, 1, &items->part_offset[m]));
    if (!arenas->host_access)
      TRY(core_arena_take(arena, l->latents[m] * l->width[m], l->latent_bytes[m], &items->arrived[m]));
  }
  return CORE_OK;
}

static core_status plan_gradients(train_model *model, core_arena *arena) {
  int64_t T = model->T, C = model->C, columns = train_activation_columns(model);
  if (!model->limits.training) return CORE_OK;
  TRY(train_take_active(model, arena, T, C, &model->d_stream));
  TRY(train_take_active(model, arena, T, C, &model->d_norm));
  TRY(train_take_active(model, arena, T, model->H * model->A, &model->d_mixed));
  TRY(train_take_active(model, arena, T, (model->H + 2 * model->G) * model->A, &model->d_qkv));
  int64_t widest = 0; /* of the dense layers */
  for (int64_t b = 0; b < model->L * model->trunks; b++)
    if (!model->block[b].has_moe && model->block[b].dense.width > widest)
      widest = model->block[b].dense.width;
  TRY(train_take_active(model, arena, T, columns * widest, &model->d_hidden));
  TRY(train_take_active(model, arena, T, widest, &model->d_active));
  TRY(train_take_active(model, arena, model->S, C, &model->d_pooled));
  return CORE_OK;
}

static core_status plan_sums(train_model *model, const train_arenas *arenas) {
  train_moe_sums *sums = &model->sums;
  sums->layers = model->moe_layers;
  sums->modalities = train_settings_classes(model->env->settings);
  sums->experts = train_settings_most_experts(model->env->settings);
  sums->layer_experts = model->env->settings->model.moe.layer_experts_count
                            ? model->env->settings->model.moe.layer_experts
                            : NULL;
  sums->choices = model->env->settings->model.moe.choose;
  int64_t cells = (int64_t)sums->layers * sums->modalities;
  core_arena *arena = arenas->activations;
  TRY(train_mirror_plan(arenas, arena, CORE_FLOAT64, cells, train_moe_value_stride(sums), &sums->value));
  TRY(train_mirror_plan(arenas, arena, CORE_INT64, cells, train_moe_count_stride(sums), &sums->count));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, cells, sums->choices, &sums->gate));
  TRY(ARENA_TAKE(arenas->host, train_moe_gate_count(sums), &sums->gate_sum));
  bool balanced = sums->layers > 0 && model->limits.training;
  sums->groups = balanced ? train_settings_balance_groups(model->env->settings) : 0;
  if (sums->groups == 0) return CORE_OK;
  cells = sums->layers * sums->groups;
  TRY(train_mirror_plan(arenas, arena, CORE_FLOAT64, cells, 1 + 2 * sums->experts, &sums->balance));
  TRY(train_mirror_plan(arenas, arena, CORE_FLOAT64, cells, sums->experts, &sums->balance_weights));
  return CORE_OK;
}

/* What the connector's blocks need of a tower's. */
static core_status plan_connector(train_model *model, const train_arenas *arenas) {
  TRY(plan_items(model, arenas));
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    train_connector_layer *layer = &model->connector[m];
    TRY(train_mirror_plan(arenas, arenas->activations, CORE_REAL_DTYPE, layer->width, 1, &layer->shift));
    TRY(train_mirror_plan(arenas, arenas->activations, CORE_REAL_DTYPE, layer->width, 1, &layer->scale));
  }
  for (int32_t p = 0; p < model->L; p++) {
    model->block[p].rows = model->T;
    TRY(model->block[p].has_moe ? train_moe_plan(model, &model->block[p].moe, arenas)
                                : train_feed_forward_plan(model, &model->block[p], arenas->activations));
  }
  TRY(plan_gradients(model, arenas->activations));
  if (model->moe_layers > 0) TRY(train_moe_scratch_plan(model, arenas));
  TRY(plan_sums(model, arenas));
  TRY(train_alignment_plan(model, arenas));
  return CORE_OK;
}

static core_status plan_activations(train_model *model, const train_arenas *arenas) {
  core_arena *arena = arenas->activations;
  if (is_connector(model)) return plan_connector(model, arenas);
  TRY(plan_items(model, arenas));
  TRY(train_take_active(model, arena, model->T, model->C, &model->input));
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    if (train_layout_holds(&model->env->layout, model->env->layout.rank, m)) {
      TRY(train_connector_plan(model, m, arenas));
      if (!is_decoder(model)) TRY(train_head_plan(model, m, arena));
    }
  if (is_decoder(model)) TRY(train_decoder_plan(model, arenas));
  for (int32_t t = 0; t < model->trunks; t++)
    if (train_trunk_held(model, t)) TRY(train_trunk_plan(model, t, arenas));
  TRY(train_take_active(model, arena, model->T, model->C, &model->final_norm[0].out));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, 1, &model->final_norm[0].inv));
  model->final_norm[0].inv.rank = 1;
  TRY(train_take_active(model, arena, model->S, model->C, &model->pooled));
  TRY(plan_gradients(model, arena));
  if (model->moe_layers > 0) TRY(train_moe_scratch_plan(model, arenas));
  TRY(plan_sums(model, arenas));
  return CORE_OK;
}

core_status train_model_plan(train_model *model, const train_model_limits *limits,
                             const train_arenas *arenas) {
  model->limits = *limits;
  train_model_rows(model->env->settings, limits, &model->T, &model->S);
  TRY(train_parameters_plan(&model->parameters, model->env, arenas->parameters, limits->training));
  TRY(train_mirror_plan(arenas, arenas->parameters, CORE_REAL_DTYPE, model->A / 2, 1,
                        &model->inverse_frequency));
  TRY(train_linear_plan(model, arenas));
  TRY(train_lora_plan(model, arenas));
  TRY(plan_activations(model, arenas));
  return CORE_OK;
}

/* Turns per position. llama3 counts the turns that a frequency makes in the positions of the first training:
 * fewer than `low` are slow, more than `high` fast. */
static double scaled_frequency(const train_settings *s, double frequency) {
  double factor = s->model.rope_scaling.factor, low = s->model.rope_scaling.low,
         high = s->model.rope_scaling.high;
  double turns = (double)s->model.rope_scaling.length * frequency / (2 * 3.14159265358979323846);
  if (s->model.rope_scaling.kind == TRAIN_ROPE_PLAIN) return frequency;
  if (s->model.rope_scaling.kind == TRAIN_ROPE_LINEAR || turns < low) return frequency / factor;
  if (turns > high) return frequency;
  double fast = (turns - low) / (high - low);
  return (1 - fast) * frequency / factor + fast * frequency;
}

core_status train_model_prepare(train_model *model) {
  core_real *frequency = model->inverse_frequency.host;
  const train_settings *s = model->env->settings;
  for (int64_t i = 0; i < model->A / 2; i++)
    frequency[i] =
        (core_real)scaled_frequency(s, pow(s->model.rope_base, -2.0 * (double)i / (double)model->A));
  TRY(train_mirror_up(model->env, &model->inverse_frequency, model->A / 2));
  TRY(train_moe_scratch_prepare(model));
  TRY(train_dispatch_prepare(model));
  TRY(train_lora_prepare(model));
  TRY(train_parameters_initialise(&model->parameters, model->env));
  return CORE_OK;
}

void train_model_rows(const train_settings *settings, const train_model_limits *limits, int64_t *tokens,
                      int64_t *segments) {
  bool connector = settings->model.kind == TRAIN_KIND_CONNECTOR;
  *tokens = *segments = 0;
  for (unsigned m = 0; m < settings->data.modalities_count; m++) {
    int64_t T = limits->tokens[m], S = limits->segments[m];
    *tokens = !connector ? *tokens + T : TRAIN_VIEWS * T > *tokens ? TRAIN_VIEWS * T : *tokens;
    *segments = !connector ? *segments + S : TRAIN_VIEWS * S > *segments ? TRAIN_VIEWS * S : *segments;
  }
  if (settings->model.kind != TRAIN_KIND_DECODER) return;
  *tokens += limits->text;
  *segments = limits->segments[0]; /* all modalities of a sample lie in one */
}

/* ---- items ---- */

/* What the host knows of one part: offsets, keys, positions. */
static void describe_part(train_model *model, const data_part *part, int32_t m) {
  train_items *items = &model->items;
  const train_env *env = model->env;
  int64_t count = part->hi - part->lo, first = items->segment_first[m], row = items->row_first[m];
  uint64_t *key = (uint64_t *)items->key.host + row;
  int32_t *position = (int32_t *)items->position.host + row;
  const int64_t *rows = items->part_offset[m].host;
  int64_t *offset = (int64_t *)items->offset.host + first;
  bool rotates = env->settings->data.modalities[m].positions == TRAIN_POSITIONS_ROPE;
  for (int64_t i = 0; i < count; i++) {
    uint64_t place = ((uint64_t)(part->lo + i) * (uint64_t)env->layout.modalities + (uint64_t)m) << 24;
    int64_t length = rows[i + 1] - rows[i];
    offset[i] = row + rows[i];
    for (int64_t t = 0; t < length; t++) {
      *key++ = place | (uint64_t)t;
      *position++ = rotates ? (int32_t)t : 0;
    }
  }
  items->segment_first[m + 1] = first + count;
  items->row_first[m + 1] = row + rows[count];
}

core_status train_items_take_part(train_model *model, const data_part *part, int32_t m) {
  train_items *items = &model->items;
  core_tensor *latent = &items->latent[m];
  int64_t count = part->hi - part->lo, rows = count > 0 ? part->offset[count] : 0;
  CHECK(count <= model->limits.segments[m] && rows <= model->limits.latents[m], CORE_ERR_INTERNAL,
        "a micro-batch has %lld items and %lld latents of '%s'; %lld and %lld were planned", (long long)count,
        (long long)rows, model->env->settings->data.modalities[m].name, (long long)model->limits.segments[m],
        (long long)model->limits.latents[m]);
  TRY(train_connector_take(model, m, part, items->part_offset[m].host));
  TRY(train_mirror_up(model->env, &items->part_offset[m], count + 1));
  items->part_count[m] = count;
  items->sample_first[m] = part->lo;
  *latent = core_tensor_2(part->latent, part->dtype, part->offset[part->hi - part->lo], part->width);
  if (!items->arrived[m] || latent->shape[0] == 0) return CORE_OK;
  /* The batch is lent until the step is over, and the step waits for the device after this. */
  TRY(model->env->ops->device->copy_later(items->arrived[m], part->latent, core_tensor_bytes(latent), NULL));
  latent->data = items->arrived[m];
  return CORE_OK;
}

core_status train_model_take(train_model *model, const data_batch *batch, int64_t micro, int32_t d) {
  if (is_connector(model)) return train_alignment_take(model, batch, micro, d);
  if (is_decoder(model)) return train_decoder_take(model, batch, micro);
  train_items *items = &model->items;
  const train_env *env = model->env;
  int32_t M = env->layout.modalities;
  items->row_first[0] = items->segment_first[0] = 0;
  for (int32_t m = 0; m < M; m++) {
    const data_part *part = &batch->part[micro * M + m];
    TRY(train_items_take_part(model, part, m));
    describe_part(model, part, m);
  }
  items->segments = items->segment_first[M];
  items->tokens = items->row_first[M];
  ((int64_t *)items->offset.host)[items->segments] = items->tokens;
  TRY(train_mirror_up(env, &items->offset, items->segments + 1));
  TRY(train_mirror_up(env, &items->key, items->tokens));
  TRY(train_mirror_up(env, &items->position, items->tokens));
  TRY(train_moe_groups_take(model));
  return CORE_OK;
}

kern_segments train_segments(const train_model *model) {
  const train_items *items = &model->items;
  return (kern_segments){items->offset.host, train_rows(items->offset.device, items->segments + 1),
                         items->segments};
}

kern_segments train_segments_of(const train_model *model, int32_t m) {
  const train_items *items = &model->items;
  int64_t count = items->part_count[m];
  return (kern_segments){items->part_offset[m].host, train_rows(items->part_offset[m].device, count + 1),
                         count};
}

/* ---- the ends of a tower: connectors, pooled heads ---- */

static core_status connect(train_model *model, core_tensor x) {
  const train_env *env = model->env;
  const int64_t *first = model->items.row_first;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m))
      TRY(train_connector_forward(model, m, train_slice(x, first[m], first[m + 1] - first[m])));
  return CORE_OK;
}

static core_status connect_backward(train_model *model, core_tensor dx) {
  const train_env *env = model->env;
  const int64_t *first = model->items.row_first;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m))
      TRY(train_connector_backward(model, m, train_slice(dx, first[m], first[m + 1] - first[m])));
  return CORE_OK;
}

static core_status pool(train_model *model, core_tensor rows) {
  train_env *env = model->env;
  KERN(env, segment_mean_fwd, train_segments(model), rows, train_rows(model->pooled, model->items.segments));
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_forward(model, m));
  return CORE_OK;
}

static core_status pool_backward(train_model *model, core_tensor drows) {
  train_env *env = model->env;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_backward(model, m));
  KERN(env, segment_mean_bwd, train_segments(model), train_rows(model->d_pooled, model->items.segments),
       KERN_SET, drows);
  return CORE_OK;
}

/* ---- passes ---- */

core_status train_model_forward(train_model *model, train_mode mode) {
  model->lora.drops = mode != TRAIN_MODE_EVALUATE;
  if (is_connector(model)) return train_alignment_forward(model, (int)mode);
  train_env *env = model->env;
  train_items *items = &model->items;
  core_tensor x = train_rows(model->input, items->tokens);
  TRY(is_decoder(model) ? train_decoder_embed(model, x) : connect(model, x));
  for (int32_t t = 0; t < model->trunks; t++)
    if (train_trunk_held(model, t)) TRY(train_trunk_forward(model, t, x, mode));
  comm_note(env->comm, env->step, -1, "heads");
  core_tensor rows = train_rows(model->final_norm[0].out, items->tokens);
  TRY(is_decoder(model) ? train_decoder_predict(model, rows, (int)mode) : pool(model, rows));
  return CORE_OK;
}

core_status train_model_backward(train_model *model, core_tensor router) {
  if (is_connector(model)) return train_alignment_backward(model);
  train_env *env = model->env;
  train_items *items = &model->items;
  core_tensor dx = train_rows(model->d_stream, items->tokens), dn = train_rows(model->d_norm, items->tokens);
  TRY(is_decoder(model) ? train_decoder_predict_backward(model, dn) : pool_backward(model, dn));
  for (int32_t t = 0; t < model->trunks; t++)
    if (train_trunk_held(model, t)) TRY(train_trunk_backward(model, t, router, dn, dx));
  if (model->lowest >= 0) return CORE_OK;
  comm_note(env->comm, env->step, -1, "connectors backward");
  TRY(is_decoder(model) ? train_decoder_embed_backward(model, dx) : connect_backward(model, dx));
  return CORE_OK;
}
