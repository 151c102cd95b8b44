#include "trainer/model/lora.h"

#include <fnmatch.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/random.h"
#include "trainer/model/tower.h"

/* ---- which maps ---- */

/* "blocks.0.attention.qkv" of "blocks.0.attention.qkv.weight". */
static void map_name(const char *weight, char out[CORE_NAME]) {
  size_t length = strlen(weight), tail = strlen(".weight");
  snprintf(out, CORE_NAME, "%.*s", (int)(length - tail), weight);
}

bool train_lora_names(const train_lora_settings *entry, const char *weight) {
  char map[CORE_NAME];
  map_name(weight, map);
  return fnmatch(entry->parameters, map, 0) == 0 || fnmatch(entry->parameters, weight, 0) == 0;
}

const train_lora_settings *train_lora_entry(const train_settings *settings, const char *weight) {
  for (unsigned i = 0; i < settings->model.lora_count; i++)
    if (train_lora_names(&settings->model.lora[i], weight)) return &settings->model.lora[i];
  return NULL;
}

/* Matrices of a map: one, or one for each group. */
static int64_t matrices(const train_linear *map) {
  return map->groups > 0 ? map->groups : map->weight >= 0 ? 1 : 0;
}

int64_t train_lora_matches(const train_model *model, unsigned i) {
  int64_t count = 0;
  for (int32_t n = 0; n < model->map_count; n++) {
    const train_linear *map = model->map[n];
    for (int64_t g = 0; g < matrices(map); g++)
      count += train_lora_names(&model->env->settings->model.lora[i],
                                model->parameters.list[map->weight + g].name);
  }
  return count;
}

/* ---- parameters ---- */

/* One of the two matrices of every adapter of a map, one after another; *index: the first's. */
static core_status declare_side(train_model *model, const train_linear *map, char side, int64_t rows,
                                int64_t columns, int32_t *index) {
  for (int64_t g = 0; g < matrices(map); g++) {
    const train_parameter base = model->parameters.list[map->weight + g]; /* the list may move */
    train_parameter p = {.rank = 2,
                         .shape = {rows, columns},
                         .scope = base.scope,
                         .modality = base.modality,
                         .expert = base.expert,
                         .init = side == 'a' ? TRAIN_INIT_UNIFORM : TRAIN_INIT_ZERO,
                         .init_value = 1 / sqrt((double)columns),
                         .decay = true};
    char name[CORE_NAME];
    int32_t each;
    map_name(base.name, name);
    TRY(train_declare(model, p, &each, "%s.lora_%c.weight", name, side));
    if (g == 0) *index = each;
  }
  return CORE_OK;
}

static core_status adapt(train_model *model, train_linear *map) {
  train_parameters *set = &model->parameters;
  const train_settings *s = model->env->settings;
  const char *name = set->list[map->weight].name;
  const train_lora_settings *entry = train_lora_entry(s, name);
  for (int64_t g = 1; g < matrices(map); g++)
    if (train_lora_entry(s, set->list[map->weight + g].name) != entry)
      return core_config_refuse(model->env->config, "model.lora",
                                "'%s' and '%s' are of one layer: an entry names all of its experts or none",
                                name, set->list[map->weight + g].name);
  if (!entry) return CORE_OK;
  int64_t n = set->list[map->weight].shape[0], k = set->list[map->weight].shape[1];
  if (entry->rank > n || entry->rank > k)
    return core_config_refuse(model->env->config, "model.lora",
                              "a rank of %lld is no less than '%s' itself has, [%lld, %lld]",
                              (long long)entry->rank, name, (long long)n, (long long)k);
  map->lora = (train_lora){
      .rank = entry->rank, .scale = entry->alpha / (double)entry->rank, .dropout = entry->dropout};
  for (int64_t g = 0; g < matrices(map); g++) {
    set->list[map->weight + g].frozen = true;
    set->list[map->weight + g].active = false;
  }
  TRY(declare_side(model, map, 'a', entry->rank, k, &map->lora.a));
  TRY(declare_side(model, map, 'b', n, entry->rank, &map->lora.b));
  return CORE_OK;
}

core_status train_lora_declare(train_model *model) {
  for (int32_t i = 0; i < model->map_count; i++)
    if (matrices(model->map[i]) > 0) TRY(adapt(model, model->map[i]));
  return CORE_OK;
}

/* ---- memory ---- */

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

core_status train_lora_plan(train_model *model, const train_arenas *arenas) {
  train_lora_scratch *l = &model->lora;
  core_arena *arena = arenas->activations;
  int64_t r = 0, k = 0, rows = most(model->T, model->moe_layers > 0 ? model->limits.expert_rows : 0);
  for (int32_t m = 0; m < model->env->layout.modalities; m++) rows = most(rows, model->limits.latents[m]);
  for (int32_t i = 0; i < model->map_count; i++) {
    const train_linear *map = model->map[i];
    r = most(r, map->lora.rank);
    if (map->lora.rank > 0 && map->lora.dropout > 0 && model->limits.training)
      k = most(k, model->parameters.list[map->weight].shape[1]);
  }
  TRY(train_take(arena, CORE_REAL_DTYPE, rows, r, &l->low));
  l->rounded = l->low;
  if (model->env->active != CORE_REAL_DTYPE) TRY(train_take_active(model, arena, rows, r, &l->rounded));
  TRY(train_take_active(model, arena, rows, k, &l->input));
  TRY(train_mirror_plan(arenas, arena, CORE_INT32, k > 0 ? rows : 0, 1, &l->row));
  int64_t sent = model->moe_layers > 0 ? model->T * model->env->settings->model.moe.choose : 0;
  bool sends = k > 0 && model->env->layout.expert_ranks > 1;
  TRY(train_take(arena, CORE_INT32, sends ? sent : 0, 2, &l->sent_key));
  return CORE_OK;
}

core_status train_lora_prepare(train_model *model) {
  const train_mirror *row = &model->lora.row;
  int32_t *number = row->host;
  for (int64_t i = 0; i < row->device.shape[0]; i++) number[i] = (int32_t)i;
  TRY(train_mirror_up(model->env, row, row->device.shape[0]));
  return CORE_OK;
}

/* ---- passes ---- */

bool train_lora_drops(const train_model *model, const train_linear *map) {
  return map->lora.rank > 0 && map->lora.dropout > 0 && model->lora.drops;
}

/* Of a flat buffer that is at least as large. */
static core_tensor shaped(core_tensor buffer, int64_t rows, int64_t columns) {
  return core_tensor_2(buffer.data, buffer.dtype, rows, columns);
}

/* Drops numbers of rows [first, last), for the adapter whose A is parameter `a`, or of a gradient by them. */
static core_status drop_part(train_model *model, const train_linear *map, int32_t a, core_tensor key,
                             int64_t first, int64_t last, core_tensor x) {
  train_env *env = model->env;
  uint64_t stream = core_random_stream(CORE_RANDOM_DROPOUT, (uint64_t)env->step,
                                       core_hash_text(model->parameters.list[a].name));
  if (last > first)
    KERN(env, dropout, env->settings->run.seed, stream, map->lora.dropout,
         train_slice(key, first, last - first), train_rows(model->lora.row.device, last - first),
         train_slice(x, first, last - first));
  return CORE_OK;
}

static core_status drop(train_model *model, const train_linear *map, train_linear_rows rows, core_tensor x) {
  if (!rows.group) return drop_part(model, map, map->lora.a, rows.key, 0, x.shape[0], x);
  for (int64_t g = 0; g < map->groups; g++)
    TRY(drop_part(model, map, map->lora.a + (int32_t)g, rows.key, rows.group[g], rows.group[g + 1], x));
  return CORE_OK;
}

/* out = scale a b in float32, rounded once to what products take. */
static core_status low_product(train_model *model, const train_linear *map, train_linear_rows rows,
                               kern_form form, core_tensor a, int32_t b, core_tensor *out) {
  train_env *env = model->env;
  core_tensor low = shaped(model->lora.low, a.shape[0], map->lora.rank);
  core_tensor matrix = train_parameter_matrices(&model->parameters, b, map->groups);
  TRY(train_product(model, form, rows.group, a, matrix, KERN_SET, low));
  KERN(env, scale, map->lora.scale, low);
  *out = shaped(model->lora.rounded, a.shape[0], map->lora.rank);
  if (out->data != low.data) KERN(env, cast, low, *out);
  return CORE_OK;
}

/* The branch's input, and alpha / r of its product with A. */
static core_status reduce(train_model *model, const train_linear *map, train_linear_rows rows, core_tensor x,
                          core_tensor *input, core_tensor *low) {
  *input = x;
  if (train_lora_drops(model, map)) {
    *input = shaped(model->lora.input, x.shape[0], x.shape[1]);
    TRY(model->env->ops->device->copy(input->data, x.data, core_tensor_bytes(&x), NULL));
    TRY(drop(model, map, rows, *input));
  }
  TRY(low_product(model, map, rows, KERN_NT, *input, map->lora.a, low));
  return CORE_OK;
}

core_status train_lora_forward(train_model *model, const train_linear *map, train_linear_rows rows,
                               core_tensor x, core_tensor y) {
  core_tensor input, low;
  TRY(reduce(model, map, rows, x, &input, &low));
  TRY(train_product(model, KERN_NT, rows.group, low,
                    train_parameter_matrices(&model->parameters, map->lora.b, map->groups), KERN_ADD, y));
  return CORE_OK;
}

core_status train_lora_backward(train_model *model, const train_linear *map, train_linear_rows rows,
                                core_tensor dy, core_tensor x) {
  core_tensor input, low;
  TRY(reduce(model, map, rows, x, &input, &low));
  TRY(train_matrix_backward(model, map->lora.b, map->groups, rows, dy, low));
  TRY(low_product(model, map, rows, KERN_NN, dy, map->lora.b, &low));
  TRY(train_matrix_backward(model, map->lora.a, map->groups, rows, low, input));
  return CORE_OK;
}

core_status train_lora_backward_input(train_model *model, const train_linear *map, train_linear_rows rows,
                                      core_tensor dx) {
  core_tensor low = shaped(model->lora.rounded, dx.shape[0], map->lora.rank);
  core_tensor matrix = train_parameter_matrices(&model->parameters, map->lora.a, map->groups), part = dx;
  bool drops = train_lora_drops(model, map);
  if (drops) part = shaped(model->lora.input, dx.shape[0], dx.shape[1]);
  TRY(train_product(model, KERN_NN, rows.group, low, matrix, drops ? KERN_SET : KERN_ADD, part));
  if (!drops) return CORE_OK;
  TRY(drop(model, map, rows, part));
  KERN(model->env, axpy, 1, part, dx);
  return CORE_OK;
}
