#include "trainer/model/tower.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
  model->L = s->model.layers;
  model->H = s->model.heads;
  model->G = s->model.kv_heads ? s->model.kv_heads : s->model.heads;
  model->A = s->model.head_width ? s->model.head_width : s->model.width / s->model.heads;
  model->Z = s->model.embedding ? s->model.embedding : s->model.width;
  int64_t gated = (model->C * 8 / 3 + 31) / 32 * 32; /* as many weights as an ungated layer of 4 C */
  model->F = s->model.hidden ? s->model.hidden : s->model.activation == TRAIN_SWIGLU ? gated : 4 * model->C;
}

static core_status declare(train_model *model) {
  train_env *env = model->env;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_connector_declare(model, m));
  for (int32_t l = 0; l < model->L; l++) TRY(train_block_declare(model, l));
  train_parameter norm = {.rank = 1, .shape = {model->C}, .init = TRAIN_INIT_ONE};
  TRY(train_declare(model, norm, &model->final_norm.weight, "final_norm.weight"));
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_declare(model, m));
  train_parameter scale = {.rank = 1, .shape = {1}, .init = TRAIN_INIT_CONSTANT};
  scale.init_value = log(env->settings->objective.scale);
  TRY(train_declare(model, scale, &model->log_scale, "log_scale"));
  train_parameters_place(&model->parameters);
  return CORE_OK;
}

core_status train_model_create(train_env *env, const int64_t *width, train_model **out) {
  train_model *model = calloc(1, sizeof *model);
  CHECK(model, CORE_ERR_MEMORY, "no memory for the model");
  model->env = env;
  take_sizes(model);
  memcpy(model->limits.width, width, (size_t)env->layout.modalities * sizeof *width);
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (env->settings->data.modalities[m].positions == TRAIN_POSITIONS_ROPE) model->rotates = true;
  model->block = calloc((size_t)model->L, sizeof *model->block);
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
  free(model->block);
  free(model);
}

/* ---- memory ---- */

static core_status plan_items(train_model *model, core_arena *arena) {
  train_items *items = &model->items;
  TRY(ARENA_TAKE(arena, model->S + 1, &items->offset));
  TRY(train_take(arena, CORE_INT32, model->T, 1, &items->position));
  TRY(train_take(arena, CORE_UINT64, model->T, 1, &items->key));
  items->position.rank = items->key.rank = 1;
  return CORE_OK;
}

static core_status plan_gradients(train_model *model, core_arena *arena) {
  int64_t T = model->T, C = model->C, columns = train_activation_columns(model);
  if (!model->limits.training) return CORE_OK;
  TRY(train_take(arena, CORE_REAL_DTYPE, T, C, &model->d_stream));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, C, &model->d_norm));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, model->H * model->A, &model->d_mixed));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, (model->H + 2 * model->G) * model->A, &model->d_qkv));
  int64_t widest = 0; /* of the dense layers */
  for (int32_t l = 0; l < model->L; l++)
    if (!model->block[l].has_moe && model->block[l].dense.active.shape[1] > widest)
      widest = model->block[l].dense.active.shape[1];
  TRY(train_take(arena, CORE_REAL_DTYPE, T, columns * widest, &model->d_hidden));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, widest, &model->d_active));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->S, C, &model->d_pooled));
  return CORE_OK;
}

static core_status plan_sums(train_model *model, core_arena *arena) {
  train_moe_sums *sums = &model->sums;
  sums->layers = model->moe_layers;
  sums->modalities = model->env->layout.modalities;
  sums->experts = model->env->settings->model.moe.experts;
  int64_t cells = (int64_t)sums->layers * sums->modalities;
  TRY(ARENA_TAKE(arena, cells * train_moe_value_stride(sums), &sums->value));
  TRY(ARENA_TAKE(arena, cells * train_moe_count_stride(sums), &sums->count));
  return CORE_OK;
}

static core_status plan_activations(train_model *model, core_arena *arena) {
  TRY(plan_items(model, arena));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, model->C, &model->input));
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    if (train_layout_holds(&model->env->layout, model->env->layout.rank, m)) {
      TRY(train_connector_plan(model, m, arena));
      TRY(train_head_plan(model, m, arena));
    }
  for (int32_t l = 0; l < model->L; l++) TRY(train_block_plan(model, l, arena));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, model->C, &model->final_norm.out));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, 1, &model->final_norm.inv));
  model->final_norm.inv.rank = 1;
  TRY(train_take(arena, CORE_REAL_DTYPE, model->S, model->C, &model->pooled));
  TRY(plan_gradients(model, arena));
  if (model->moe_layers > 0) TRY(train_moe_scratch_plan(model, arena));
  TRY(plan_sums(model, arena));
  return CORE_OK;
}

static core_status plan_rotation(train_model *model, core_arena *arena) {
  core_real *frequency = NULL;
  int64_t pairs = model->A / 2;
  TRY(ARENA_TAKE(arena, pairs, &frequency));
  model->inverse_frequency = core_tensor_1(frequency, CORE_REAL_DTYPE, pairs);
  double base = model->env->settings->model.rope_base;
  for (int64_t i = 0; frequency && i < pairs; i++)
    frequency[i] = (core_real)pow(base, -2.0 * (double)i / (double)model->A);
  return CORE_OK;
}

core_status train_model_plan(train_model *model, const train_model_limits *limits, core_arena *parameters,
                             core_arena *activations) {
  model->limits = *limits;
  model->T = model->S = 0;
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    model->T += limits->tokens[m];
    model->S += limits->segments[m];
  }
  TRY(train_parameters_plan(&model->parameters, parameters, limits->training));
  TRY(plan_rotation(model, parameters));
  TRY(plan_activations(model, activations));
  return CORE_OK;
}

/* ---- items ---- */

static void take_part(train_model *model, const data_part *part, int32_t m) {
  train_items *items = &model->items;
  const train_env *env = model->env;
  int64_t count = part->hi - part->lo, first = items->segment_first[m], row = items->row_first[m];
  uint64_t *key = (uint64_t *)items->key.data + row;
  int32_t *position = (int32_t *)items->position.data + row;
  bool rotates = env->settings->data.modalities[m].positions == TRAIN_POSITIONS_ROPE;
  for (int64_t i = 0; i < count; i++) {
    uint64_t place = ((uint64_t)(part->lo + i) * (uint64_t)env->layout.modalities + (uint64_t)m) << 24;
    int64_t length = part->offset[i + 1] - part->offset[i];
    items->offset[first + i] = row + part->offset[i];
    for (int64_t t = 0; t < length; t++) {
      *key++ = place | (uint64_t)t;
      *position++ = rotates ? (int32_t)t : 0;
    }
  }
  items->sample_first[m] = part->lo;
  items->part_offset[m] = part->offset;
  items->segment_first[m + 1] = first + count;
  items->row_first[m + 1] = row + part->offset[count];
  items->latent[m] = core_tensor_2(part->latent, part->dtype, part->offset[count], part->width);
}

core_status train_model_take(train_model *model, const data_batch *batch, int64_t micro) {
  train_items *items = &model->items;
  const train_env *env = model->env;
  int32_t M = env->layout.modalities;
  items->row_first[0] = items->segment_first[0] = 0;
  for (int32_t m = 0; m < M; m++) {
    const data_part *part = &batch->part[micro * M + m];
    int64_t count = part->hi - part->lo, rows = count > 0 ? part->offset[count] : 0;
    CHECK(count <= model->limits.segments[m] && rows <= model->limits.tokens[m], CORE_ERR_INTERNAL,
          "a micro-batch has %lld items and %lld tokens of '%s'; %lld and %lld were planned",
          (long long)count, (long long)rows, env->settings->data.modalities[m].name,
          (long long)model->limits.segments[m], (long long)model->limits.tokens[m]);
    take_part(model, part, m);
  }
  items->segments = items->segment_first[M];
  items->tokens = items->row_first[M];
  items->offset[items->segments] = items->tokens;
  return CORE_OK;
}

/* ---- the pass ---- */

static core_status pool(train_model *model, core_tensor x) {
  train_env *env = model->env;
  train_items *items = &model->items;
  kern_segments segments = {items->offset, items->segments};
  core_tensor out = train_rows(model->final_norm.out, items->tokens);
  KERN(env, rmsnorm_fwd, x, train_parameter_value(&model->parameters, model->final_norm.weight),
       env->settings->model.norm_epsilon, out, train_rows(model->final_norm.inv, items->tokens));
  KERN(env, segment_mean_fwd, segments, out, train_rows(model->pooled, items->segments));
  return CORE_OK;
}

core_status train_model_forward(train_model *model, train_mode mode) {
  train_env *env = model->env;
  train_items *items = &model->items;
  core_tensor x = train_rows(model->input, items->tokens);
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m))
      TRY(train_connector_forward(
          model, m, train_slice(x, items->row_first[m], items->row_first[m + 1] - items->row_first[m])));
  for (int32_t l = 0; l < model->L; l++) {
    comm_note(env->comm, env->step, l, "forward");
    TRY(train_block_forward(model, l, x, mode));
    x = train_rows(model->block[l].output, items->tokens);
  }
  comm_note(env->comm, env->step, -1, "heads");
  TRY(pool(model, x));
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_forward(model, m));
  return CORE_OK;
}

static core_tensor block_input(train_model *model, int32_t layer) {
  return train_rows(layer == 0 ? model->input : model->block[layer - 1].output, model->items.tokens);
}

core_status train_model_backward(train_model *model, const kern_router_weights *router) {
  train_env *env = model->env;
  train_items *items = &model->items;
  kern_segments segments = {items->offset, items->segments};
  core_tensor dx = train_rows(model->d_stream, items->tokens), dn = train_rows(model->d_norm, items->tokens);
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m)) TRY(train_head_backward(model, m));
  KERN(env, segment_mean_bwd, segments, train_rows(model->d_pooled, items->segments), KERN_SET, dn);
  KERN(env, rmsnorm_bwd, dn, block_input(model, (int32_t)model->L),
       train_parameter_value(&model->parameters, model->final_norm.weight),
       train_rows(model->final_norm.inv, items->tokens), KERN_SET, dx,
       train_parameter_gradient(&model->parameters, model->final_norm.weight));
  for (int32_t l = (int32_t)model->L - 1; l >= 0; l--) {
    comm_note(env->comm, env->step, l, "backward");
    const train_block *block = &model->block[l];
    const kern_router_weights *weights =
        block->has_moe ? router + block->moe.index * env->layout.modalities : NULL;
    TRY(train_block_backward(model, l, block_input(model, l), weights, dx));
  }
  comm_note(env->comm, env->step, -1, "connectors backward");
  for (int32_t m = 0; m < env->layout.modalities; m++)
    if (train_layout_holds(&env->layout, env->layout.rank, m))
      TRY(train_connector_backward(
          model, m, train_slice(dx, items->row_first[m], items->row_first[m + 1] - items->row_first[m])));
  return CORE_OK;
}
