#include "trainer/model/alignment.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/model/tower.h"

static const double layer_norm_epsilon = 1e-5;

static bool holds(const train_model *model, int32_t m) {
  return train_layout_holds(&model->env->layout, model->env->layout.rank, m);
}

static const train_direction *active(const train_model *model) {
  return &model->alignment.direction[model->alignment.active];
}

static train_block *active_block(train_model *model) {
  return &model->block[active(model)->block];
}

static const char *name_of(const train_model *model, int32_t m) {
  return model->env->settings->data.modalities[m].name;
}

/* ---- parameters ---- */

static train_parameter matrix(int64_t rows, int64_t columns) {
  return (train_parameter){.rank = 2,
                           .shape = {rows, columns},
                           .init = TRAIN_INIT_NORMAL,
                           .init_value = 1 / sqrt((double)columns),
                           .decay = true};
}

static train_parameter vector(int64_t count) {
  return (train_parameter){.rank = 1, .shape = {count}};
}

static train_parameter held_by(train_parameter parameter, int32_t m) {
  parameter.scope = TRAIN_SCOPE_MODALITY;
  parameter.modality = m;
  return parameter;
}

/* Weight and bias of one linear map. */
static core_status declare_linear(train_model *model, train_parameter weight, const char *format,
                                  const char *name, int32_t *index, int32_t *bias_index) {
  train_parameter bias = weight;
  char text[CORE_NAME];
  bias.rank = 1;
  bias.shape[1] = 1;
  bias.init = TRAIN_INIT_ZERO;
  bias.decay = false;
  snprintf(text, sizeof text, format, name);
  TRY(train_declare(model, weight, index, "%s.weight", text));
  TRY(train_declare(model, bias, bias_index, "%s.bias", text));
  return CORE_OK;
}

static core_status declare_modality(train_model *model, int32_t m) {
  train_alignment *a = &model->alignment;
  int64_t D = model->limits.width[m], H = model->C;
  bool from = false, toward = false;
  for (int32_t d = 0; d < a->directions; d++) {
    from = from || a->direction[d].from == m;
    toward = toward || a->direction[d].toward == m;
  }
  a->adapter[m] = a->target[m] = a->key[m] = -1;
  if (from && holds(model, m))
    TRY(declare_linear(model, held_by(matrix(H, D), m), "adapter.%s", name_of(model, m), &a->adapter[m],
                       &a->adapter_bias[m]));
  if (toward)
    TRY(declare_linear(model, matrix(D, H), "prediction.%s", name_of(model, m), &a->target[m],
                       &a->target_bias[m]));
  if (toward && holds(model, m))
    TRY(declare_linear(model, held_by(matrix(model->Z, D), m), "key.%s", name_of(model, m), &a->key[m],
                       &a->key_bias[m]));
  return CORE_OK;
}

static core_status declare_direction(train_model *model, train_direction *direction) {
  char name[2 * CORE_NAME];
  snprintf(name, sizeof name, "%.40s-%.40s", name_of(model, direction->from),
           name_of(model, direction->toward));
  train_parameter embedding = held_by(vector(model->limits.width[direction->from]), direction->from);
  embedding.init = TRAIN_INIT_NORMAL;
  embedding.init_value = 0.02;
  direction->embedding = -1;
  if (holds(model, direction->from))
    TRY(train_declare(model, embedding, &direction->embedding, "direction.%s", name));
  TRY(declare_linear(model, matrix(model->Z, model->C), "query.%s", name, &direction->query,
                     &direction->query_bias));
  return CORE_OK;
}

static core_status declare_part(train_model *model, int32_t p) {
  static const char *const names[TRAIN_VIEWS] = {"prediction", "contrast"};
  train_connector_part *part = &model->alignment.part[p];
  train_block *block = &model->block[p];
  train_parameter view = vector(model->C), one = vector(model->C);
  view.init = TRAIN_INIT_NORMAL;
  view.init_value = 0.02;
  one.init = TRAIN_INIT_ONE;
  for (int v = 0; v < TRAIN_VIEWS; v++) {
    TRY(train_declare(model, view, &part->view[v], "blocks.%d.view.%s", p, names[v]));
    TRY(train_declare(model, one, &part->norm[v], "blocks.%d.norm.%s.weight", p, names[v]));
    TRY(train_declare(model, vector(model->C), &part->norm_bias[v], "blocks.%d.norm.%s.bias", p, names[v]));
  }
  block->layer = p;
  block->has_moe = !model->env->settings->model.dense;
  part->dense_in_bias = part->dense_out_bias = -1;
  if (block->has_moe) return train_moe_declare(model, p);
  TRY(train_feed_forward_declare(model, block));
  if (!model->env->settings->model.moe.bias) return CORE_OK;
  train_parameter in = vector(block->dense.width * train_activation_columns(model));
  TRY(train_declare(model, in, &part->dense_in_bias, "blocks.%d.feed_forward.in.bias", p));
  TRY(train_declare(model, vector(model->C), &part->dense_out_bias, "blocks.%d.feed_forward.out.bias", p));
  return CORE_OK;
}

core_status train_alignment_declare(train_model *model) {
  train_alignment *a = &model->alignment;
  const train_settings *s = model->env->settings;
  a->directions = (int32_t)s->objective.directions_count;
  a->parts = (int32_t)model->L;
  a->direction = calloc((size_t)a->directions, sizeof *a->direction);
  a->part = calloc((size_t)a->parts, sizeof *a->part);
  CHECK(a->direction && a->part, CORE_ERR_MEMORY, "no memory for %d directions", a->directions);
  for (int32_t d = 0; d < a->directions; d++) {
    int32_t pair[2] = {0, 0};
    CHECK(train_settings_direction(s, (unsigned)d, pair), CORE_ERR_CONFIG, "'%s' is not a direction",
          s->objective.directions[d]);
    a->direction[d].from = pair[0];
    a->direction[d].toward = pair[1];
    a->direction[d].block = s->model.per_direction ? d : 0;
  }
  for (int32_t m = 0; m < model->env->layout.modalities; m++) TRY(declare_modality(model, m));
  for (int32_t d = 0; d < a->directions; d++) TRY(declare_direction(model, &a->direction[d]));
  for (int32_t p = 0; p < a->parts; p++) TRY(declare_part(model, p));
  return CORE_OK;
}

void train_alignment_free(train_alignment *alignment) {
  free(alignment->direction);
  free(alignment->part);
}

/* ---- the active set ---- */

static void mark(train_model *model, int32_t index) {
  if (index >= 0) model->parameters.list[index].active = !model->parameters.list[index].frozen;
}

static void mark_block(train_model *model, int32_t p) {
  char prefix[CORE_NAME];
  snprintf(prefix, sizeof prefix, "blocks.%d.", p);
  for (int32_t i = 0; i < model->parameters.count; i++)
    if (strncmp(model->parameters.list[i].name, prefix, strlen(prefix)) == 0) mark(model, i);
}

void train_alignment_activate(train_model *model, int32_t d) {
  train_alignment *a = &model->alignment;
  for (int32_t i = 0; i < model->parameters.count; i++) model->parameters.list[i].active = false;
  for (int32_t i = 0; i < a->directions; i++) {
    const train_direction *direction = &a->direction[i];
    if (d >= 0 && i != d) continue;
    const int32_t indices[] = {direction->embedding,         direction->query,
                               direction->query_bias,        a->adapter[direction->from],
                               a->target[direction->toward], a->target_bias[direction->toward],
                               a->key[direction->toward]};
    for (size_t n = 0; n < sizeof indices / sizeof *indices; n++) mark(model, indices[n]);
    if (a->adapter[direction->from] >= 0) mark(model, a->adapter_bias[direction->from]);
    if (a->key[direction->toward] >= 0) mark(model, a->key_bias[direction->toward]);
    mark_block(model, direction->block);
  }
}

/* ---- memory ---- */

core_status train_alignment_plan(train_model *model, const train_arenas *arenas) {
  train_alignment *a = &model->alignment;
  core_arena *arena = arenas->activations;
  int64_t H = model->C, T = model->T / TRAIN_VIEWS, S = 0, D = 0, latents = 0, Z = model->Z;
  bool training = model->limits.training;
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    const train_model_limits *l = &model->limits;
    if (l->segments[m] > S) S = l->segments[m];
    if (l->width[m] > D) D = l->width[m];
    if (l->tokens[m] * l->width[m] > latents) latents = l->tokens[m] * l->width[m];
  }
  for (int side = 0; side < 2; side++) TRY(train_take_active(model, arena, latents, 1, &a->input[side]));
  TRY(train_take_active(model, arena, T, H, &a->before));
  core_tensor *rows[] = {&a->x, &a->y, &a->norm, &a->gated, &a->output};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    TRY(train_take_active(model, arena, TRAIN_VIEWS * T, H, rows[i]));
  core_tensor *down[] = {&a->d_output, &a->d_norm, &a->d_y, &a->d_x};
  for (size_t i = 0; i < sizeof down / sizeof *down; i++)
    TRY(train_take_active(model, arena, training ? TRAIN_VIEWS * T : 0, H, down[i]));
  for (int v = 0; v < TRAIN_VIEWS; v++) TRY(train_take(arena, CORE_REAL_DTYPE, T, 2, &a->stat[v]));
  TRY(train_take_active(model, arena, TRAIN_VIEWS * S, H, &a->pooled));
  TRY(train_take_active(model, arena, TRAIN_VIEWS * S, H, &a->d_pooled));
  TRY(train_take_active(model, arena, S * D, 1, &a->mean));
  TRY(train_take_active(model, arena, S * D, 1, &a->d_predicted));
  TRY(train_take(arena, CORE_REAL_DTYPE, S * D, 1, &a->predicted));
  TRY(train_take(arena, CORE_REAL_DTYPE, S * D, 1, &a->target_rows));
  core_tensor *wide[] = {&a->raw, &a->query_rows, &a->key_raw, &a->key_rows, &a->d_query, &a->d_key};
  for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
    TRY(train_take(arena, CORE_REAL_DTYPE, S, Z, wide[i]));
  TRY(train_take(arena, CORE_REAL_DTYPE, S, 1, &a->query_norm));
  TRY(train_take(arena, CORE_REAL_DTYPE, S, 1, &a->key_norm));
  TRY(train_take_active(model, arena, S, Z, &a->d_raw));
  TRY(train_take(arena, CORE_REAL_DTYPE, 1, H, &a->d_sum));
  TRY(train_take_active(model, arena, 1, H, &a->d_sum_active));
  return CORE_OK;
}

/* ---- items ---- */

/* Both views of the tokens, one after the other; everything that routes sees 2 T rows of modality `from`. The
 * key of the second view differs in one bit of the position. */
static void describe_views(train_model *model, const data_part *part, int32_t from) {
  train_items *items = &model->items;
  int64_t S = part->hi - part->lo, T = S > 0 ? part->offset[S] : 0;
  uint64_t *key = items->key.host, M = (uint64_t)model->env->layout.modalities;
  int64_t *offset = items->offset.host;
  for (int64_t v = 0; v < TRAIN_VIEWS; v++)
    for (int64_t i = 0; i < S; i++) {
      uint64_t place = (((uint64_t)(part->lo + i) * M + (uint64_t)from) << 24) | ((uint64_t)v << 23);
      offset[v * S + i] = v * T + part->offset[i];
      for (int64_t t = part->offset[i]; t < part->offset[i + 1]; t++)
        key[v * T + t] = place | (uint64_t)(t - part->offset[i]);
    }
  items->tokens = TRAIN_VIEWS * T;
  items->segments = TRAIN_VIEWS * S;
  offset[items->segments] = items->tokens;
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    items->row_first[m + 1] = m >= from ? items->tokens : 0;
    items->segment_first[m + 1] = m >= from ? items->segments : 0;
  }
}

core_status train_alignment_take(train_model *model, const data_batch *batch, int64_t micro, int32_t d) {
  train_items *items = &model->items;
  const train_env *env = model->env;
  int32_t M = env->layout.modalities;
  model->alignment.active = d;
  items->row_first[0] = items->segment_first[0] = 0;
  for (int32_t m = 0; m < M; m++) {
    if (m == active(model)->from || m == active(model)->toward)
      TRY(train_items_take_part(model, &batch->part[micro * M + m], m));
  }
  describe_views(model, &batch->part[micro * M + active(model)->from], active(model)->from);
  TRY(train_mirror_up(env, &items->offset, items->segments + 1));
  TRY(train_mirror_up(env, &items->key, items->tokens));
  return CORE_OK;
}

/* Segments of one view, or of the latents of a modality: both count from the first row. */
static kern_segments segments_of(const train_model *model, int32_t m) {
  const train_items *items = &model->items;
  return (kern_segments){items->part_offset[m].host,
                         train_rows(items->part_offset[m].device, items->part_count[m] + 1),
                         items->part_count[m]};
}

/* ---- forward ---- */

static core_tensor shaped(core_tensor flat, int64_t rows, int64_t columns) {
  return core_tensor_2(flat.data, flat.dtype, rows, columns);
}

static int64_t view_rows(const train_model *model) {
  return model->items.tokens / TRAIN_VIEWS;
}

static core_tensor view_of(const train_model *model, core_tensor rows, int v) {
  return train_slice(rows, v * view_rows(model), view_rows(model));
}

/* Part v of pooled [2 S, H]. */
static core_tensor pooled_view(const train_model *model, core_tensor pooled, int v) {
  int64_t S = model->items.segments / TRAIN_VIEWS;
  return train_slice(pooled, v * S, S);
}

static core_status copy(train_model *model, core_tensor from, core_tensor to) {
  if (core_tensor_bytes(&from) > 0)
    TRY(model->env->ops->device->copy(to.data, from.data, core_tensor_bytes(&from), NULL));
  return CORE_OK;
}

/* Standardised latents of modality m into input[side]; *out is their [T, D]. */
static core_status standardised(train_model *model, int side, int32_t m, core_tensor *out) {
  const train_connector_layer *layer = &model->connector[m];
  core_tensor latent = model->items.latent[m];
  *out = shaped(model->alignment.input[side], latent.shape[0], latent.shape[1]);
  KERN(model->env, standardize, latent, layer->shift.device, layer->scale.device, *out);
  return CORE_OK;
}

/* rows W^T + bias. */
static core_status linear(train_model *model, core_tensor rows, int32_t weight, int32_t bias,
                          core_tensor out) {
  train_env *env = model->env;
  KERN(env, gemm, KERN_NT, rows, train_parameter_matrix(&model->parameters, weight), KERN_SET, out);
  if (bias >= 0) KERN(env, bias_fwd, train_parameter_value(&model->parameters, bias), out);
  return CORE_OK;
}

static core_status adapt(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor input, before = train_rows(a->before, view_rows(model));
  if (!holds(model, d->from)) return CORE_OK;
  TRY(standardised(model, 0, d->from, &input));
  KERN(env, bias_fwd, train_parameter_value(&model->parameters, d->embedding), input);
  TRY(linear(model, input, a->adapter[d->from], a->adapter_bias[d->from], before));
  KERN(env, gelu_fwd, KERN_GELU_ERF, before, view_of(model, a->x, 0));
  TRY(copy(model, view_of(model, a->x, 0), view_of(model, a->x, 1)));
  for (int v = 0; v < TRAIN_VIEWS; v++)
    KERN(env, bias_fwd, train_parameter_value(&model->parameters, part->view[v]), view_of(model, a->x, v));
  return CORE_OK;
}

/* y = block(x): the mixture, or the dense baseline with its biases. */
static core_status run_block(train_model *model, int mode, core_tensor x, core_tensor y) {
  train_env *env = model->env;
  train_block *block = active_block(model);
  const train_connector_part *part = &model->alignment.part[block->layer];
  KERN(env, fill, 0, y);
  if (block->has_moe) return train_moe_forward(model, &block->moe, x, mode, y);
  core_tensor hidden = train_rows(block->dense.hidden, x.shape[0]),
              active_rows = train_rows(block->dense.active, x.shape[0]);
  TRY(linear(model, x, block->dense.in, part->dense_in_bias, hidden));
  TRY(train_activate(model, hidden, active_rows));
  TRY(linear(model, active_rows, block->dense.out, part->dense_out_bias, y));
  return CORE_OK;
}

/* o_v = s_v + GELU(LN_v(y_v)), and the means over items. */
static core_status leave_block(train_model *model, int v) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor norm = view_of(model, a->norm, v), gated = view_of(model, a->gated, v);
  core_tensor output = view_of(model, a->output, v);
  KERN(env, layernorm_fwd, view_of(model, a->y, v), train_parameter_value(&model->parameters, part->norm[v]),
       train_parameter_value(&model->parameters, part->norm_bias[v]), layer_norm_epsilon, norm,
       train_rows(a->stat[v], view_rows(model)));
  KERN(env, gelu_fwd, KERN_GELU_ERF, norm, gated);
  TRY(copy(model, view_of(model, a->x, v), output));
  KERN(env, axpy, 1, gated, output);
  KERN(env, segment_mean_fwd, segments_of(model, d->from), output, pooled_view(model, a->pooled, v));
  return CORE_OK;
}

/* The side that is asked from: prediction and query. */
static core_status ask(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->from];
  if (!holds(model, d->from)) return CORE_OK;
  for (int v = 0; v < TRAIN_VIEWS; v++) TRY(leave_block(model, v));
  TRY(linear(model, pooled_view(model, a->pooled, TRAIN_VIEW_PREDICTION), a->target[d->toward],
             a->target_bias[d->toward], shaped(a->predicted, S, model->limits.width[d->toward])));
  TRY(linear(model, pooled_view(model, a->pooled, TRAIN_VIEW_CONTRAST), d->query, d->query_bias,
             train_rows(a->raw, S)));
  KERN(env, l2norm_fwd, train_rows(a->raw, S), train_rows(a->query_rows, S), train_rows(a->query_norm, S));
  return CORE_OK;
}

/* The side that is looked for: target and key, which depend on its latents alone. */
static core_status answer(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->toward], D = model->limits.width[d->toward];
  core_tensor input, mean = shaped(a->mean, S, D);
  if (!holds(model, d->toward)) return CORE_OK;
  TRY(standardised(model, 1, d->toward, &input));
  KERN(env, segment_mean_fwd, segments_of(model, d->toward), input, mean);
  KERN(env, cast, mean, shaped(a->target_rows, S, D));
  TRY(linear(model, mean, a->key[d->toward], a->key_bias[d->toward], train_rows(a->key_raw, S)));
  KERN(env, l2norm_fwd, train_rows(a->key_raw, S), train_rows(a->key_rows, S), train_rows(a->key_norm, S));
  return CORE_OK;
}

core_status train_alignment_forward(train_model *model, int mode) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  comm_note(env->comm, env->step, active(model)->block, "forward");
  TRY(adapt(model));
  TRY(run_block(model, mode, train_rows(a->x, model->items.tokens), train_rows(a->y, model->items.tokens)));
  TRY(ask(model));
  TRY(answer(model));
  return CORE_OK;
}

/* ---- backward ---- */

/* dy: gradient of rows W^T + bias. d_rows may be absent. */
static core_status linear_backward(train_model *model, core_tensor dy, core_tensor rows, int32_t weight,
                                   int32_t bias, core_tensor d_rows) {
  train_env *env = model->env;
  train_parameters *p = &model->parameters;
  KERN(env, gemm, KERN_TN, dy, rows, KERN_ADD, train_parameter_gradient(p, weight));
  if (bias >= 0) KERN(env, bias_bwd, dy, train_parameter_gradient(p, bias));
  if (d_rows.data) KERN(env, gemm, KERN_NN, dy, train_parameter_matrix(p, weight), KERN_SET, d_rows);
  return CORE_OK;
}

static core_status answer_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->toward];
  if (!holds(model, d->toward)) return CORE_OK;
  KERN(env, l2norm_bwd, train_rows(a->d_key, S), train_rows(a->key_rows, S), train_rows(a->key_norm, S),
       KERN_SET, train_rows(a->d_raw, S));
  TRY(linear_backward(model, train_rows(a->d_raw, S), shaped(a->mean, S, model->limits.width[d->toward]),
                      a->key[d->toward], a->key_bias[d->toward], train_none()));
  return CORE_OK;
}

/* Heads, means, GELU and norm of both views: leaves d_output and d_y. */
static core_status ask_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  train_parameters *p = &model->parameters;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  int64_t S = model->items.part_count[d->from], T = view_rows(model);
  KERN(env, l2norm_bwd, train_rows(a->d_query, S), train_rows(a->query_rows, S), train_rows(a->query_norm, S),
       KERN_SET, train_rows(a->d_raw, S));
  TRY(linear_backward(model, train_rows(a->d_raw, S), pooled_view(model, a->pooled, TRAIN_VIEW_CONTRAST),
                      d->query, d->query_bias, pooled_view(model, a->d_pooled, TRAIN_VIEW_CONTRAST)));
  TRY(linear_backward(model, shaped(a->d_predicted, S, model->limits.width[d->toward]),
                      pooled_view(model, a->pooled, TRAIN_VIEW_PREDICTION), a->target[d->toward],
                      a->target_bias[d->toward], pooled_view(model, a->d_pooled, TRAIN_VIEW_PREDICTION)));
  for (int v = 0; v < TRAIN_VIEWS; v++) {
    core_tensor d_output = view_of(model, a->d_output, v), d_norm = view_of(model, a->d_norm, v);
    KERN(env, segment_mean_bwd, segments_of(model, d->from), pooled_view(model, a->d_pooled, v), KERN_SET,
         d_output);
    KERN(env, gelu_bwd, KERN_GELU_ERF, d_output, view_of(model, a->norm, v), KERN_SET, d_norm);
    KERN(env, layernorm_bwd, d_norm, view_of(model, a->y, v), train_parameter_value(p, part->norm[v]),
         train_rows(a->stat[v], T), KERN_SET, view_of(model, a->d_y, v),
         train_parameter_gradient(p, part->norm[v]), train_parameter_gradient(p, part->norm_bias[v]));
  }
  return CORE_OK;
}

static core_status block_backward(train_model *model, core_tensor x, core_tensor dy, core_tensor dx) {
  train_env *env = model->env;
  train_block *block = active_block(model);
  const train_connector_part *part = &model->alignment.part[block->layer];
  if (block->has_moe) return train_moe_backward(model, &block->moe, x, dy, train_none(), dx);
  int64_t T = x.shape[0], F = block->dense.width;
  core_tensor hidden = train_rows(block->dense.hidden, T), active_rows = train_rows(block->dense.active, T);
  core_tensor d_hidden = core_tensor_2(model->d_hidden.data, env->active, T, hidden.shape[1]);
  core_tensor d_active = core_tensor_2(model->d_active.data, env->active, T, F);
  TRY(linear_backward(model, dy, active_rows, block->dense.out, part->dense_out_bias, d_active));
  TRY(train_activate_backward(model, d_active, hidden, d_hidden));
  TRY(linear_backward(model, d_hidden, x, block->dense.in, part->dense_in_bias, dx));
  return CORE_OK;
}

/* u was added to every token: its gradient is W^T of the columns' sum, one row instead of T. */
static core_status embedding_backward(train_model *model, core_tensor d_before) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  train_parameters *p = &model->parameters;
  const train_direction *d = active(model);
  core_tensor gradient = train_parameter_gradient(p, d->embedding);
  core_tensor sum = core_tensor_1(a->d_sum.data, CORE_REAL_DTYPE, model->C);
  KERN(env, fill, 0, sum);
  KERN(env, bias_bwd, d_before, sum);
  KERN(env, cast, a->d_sum, a->d_sum_active);
  KERN(env, gemm, KERN_NN, a->d_sum_active, train_parameter_matrix(p, a->adapter[d->from]), KERN_ADD,
       core_tensor_2(gradient.data, gradient.dtype, 1, gradient.shape[0]));
  return CORE_OK;
}

static core_status adapt_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  train_parameters *p = &model->parameters;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor latent = model->items.latent[d->from];
  core_tensor input = shaped(a->input[0], latent.shape[0], latent.shape[1]);
  core_tensor dz = view_of(model, a->d_x, 0), d_before = view_of(model, a->d_norm, 0);
  for (int v = 0; v < TRAIN_VIEWS; v++) {
    KERN(env, axpy, 1, view_of(model, a->d_output, v), view_of(model, a->d_x, v));
    KERN(env, bias_bwd, view_of(model, a->d_x, v), train_parameter_gradient(p, part->view[v]));
  }
  KERN(env, axpy, 1, view_of(model, a->d_x, 1), dz);
  KERN(env, gelu_bwd, KERN_GELU_ERF, dz, train_rows(a->before, view_rows(model)), KERN_SET, d_before);
  TRY(linear_backward(model, d_before, input, a->adapter[d->from], a->adapter_bias[d->from], train_none()));
  TRY(embedding_backward(model, d_before));
  return CORE_OK;
}

core_status train_alignment_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  int64_t rows = model->items.tokens;
  bool asks = holds(model, active(model)->from);
  comm_note(env->comm, env->step, active(model)->block, "backward");
  TRY(answer_backward(model));
  if (asks) TRY(ask_backward(model));
  TRY(block_backward(model, train_rows(a->x, rows), train_rows(a->d_y, rows), train_rows(a->d_x, rows)));
  if (asks) TRY(adapt_backward(model));
  return CORE_OK;
}
