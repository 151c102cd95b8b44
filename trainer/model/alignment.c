#include "trainer/model/alignment.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/model/tower.h"

static bool holds(const train_model *model, int32_t m) {
  return train_layout_holds(&model->env->layout, model->env->layout.rank, m);
}

static const train_direction *active(const train_model *model) {
  return &model->alignment.direction[model->alignment.active];
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
  if (block->has_moe) return train_moe_declare(model, p);
  TRY(train_feed_forward_declare(model, block));
  if (!model->env->settings->model.moe.bias) return CORE_OK;
  train_parameter in = vector(block->dense.width * train_activation_columns(model));
  TRY(train_declare(model, in, &block->dense.in.bias, "blocks.%d.feed_forward.in.bias", p));
  TRY(train_declare(model, vector(model->C), &block->dense.out.bias, "blocks.%d.feed_forward.out.bias", p));
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
