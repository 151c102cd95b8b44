/* Outline: parameters; memory; the items of a micro-batch. */
#include "trainer/model/resampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/model/tower.h"

enum { WIDER = 4 }; /* the feed-forward's hidden width in units of W */

/* ---- parameters ---- */

typedef struct declaration {
  train_model *model;
  const char *name; /* of the modality */
  int32_t m;
} declaration;

static train_parameter parameter_of(const declaration *d, int64_t rows, int64_t columns, double deviation) {
  return (train_parameter){.rank = columns > 0 ? 2 : 1,
                           .shape = {rows, columns},
                           .scope = TRAIN_SCOPE_MODALITY,
                           .modality = d->m,
                           .init = deviation > 0 ? TRAIN_INIT_NORMAL : TRAIN_INIT_ZERO,
                           .init_value = deviation,
                           .decay = columns > 0};
}

/* part: "layers.0.self.qkv"; shrink: what the deviation is divided by. */
static core_status declare_map(const declaration *d, const char *part, int64_t rows, int64_t columns,
                               double shrink, train_linear *map) {
  train_parameter weight = parameter_of(d, rows, columns, 1 / sqrt((double)columns * shrink * shrink));
  TRY(train_declare(d->model, weight, &map->weight, "connector.%s.%s.weight", d->name, part));
  TRY(train_declare(d->model, parameter_of(d, rows, 0, 0), &map->bias, "connector.%s.%s.bias", d->name,
                    part));
  TRY(train_linear_add(d->model, map));
  return CORE_OK;
}

static core_status declare_norm(const declaration *d, int64_t layer, const char *part, int64_t W,
                                train_layer_norm *norm) {
  train_parameter weight = parameter_of(d, W, 0, 0);
  weight.init = TRAIN_INIT_ONE;
  TRY(train_declare(d->model, weight, &norm->weight, "connector.%s.layers.%lld.%s.weight", d->name,
                    (long long)layer, part));
  TRY(train_declare(d->model, parameter_of(d, W, 0, 0), &norm->bias, "connector.%s.layers.%lld.%s.bias",
                    d->name, (long long)layer, part));
  return CORE_OK;
}

static core_status declare_layer(const declaration *d, const train_resampler *r, int64_t l, int64_t D) {
  train_resampler_layer *layer = &r->layer[l];
  const int64_t W = r->W;
  const double shrink = sqrt(3 * (double)r->depth);
  const struct {
    const char *name;
    int64_t rows, columns;
    double shrink;
    train_linear *map;
  } list[] = {{"self.qkv", 3 * W, W, 1, &layer->qkv},
              {"self.out", W, W, shrink, &layer->self_out},
              {"cross.q", W, W, 1, &layer->q},
              {"cross.kv", 2 * W, D, 1, &layer->kv},
              {"cross.out", W, W, shrink, &layer->cross_out},
              {"forward.in", WIDER * W, W, 1, &layer->in},
              {"forward.out", W, WIDER * W, shrink, &layer->out}};
  TRY(declare_norm(d, l, "self_norm", W, &layer->self_norm));
  TRY(declare_norm(d, l, "cross_norm", W, &layer->cross_norm));
  TRY(declare_norm(d, l, "forward_norm", W, &layer->forward_norm));
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    char part[64];
    snprintf(part, sizeof part, "layers.%lld.%s", (long long)l, list[i].name);
    TRY(declare_map(d, part, list[i].rows, list[i].columns, list[i].shrink, list[i].map));
  }
  return CORE_OK;
}

static core_status declare_all(const declaration *d, train_resampler *r, int64_t D) {
  train_parameter query = parameter_of(d, r->Q, r->W, 0.02);
  query.decay = false; /* an embedding */
  TRY(train_declare(d->model, query, &r->query, "connector.%s.query", d->name));
  for (int64_t l = 0; l < r->depth; l++) TRY(declare_layer(d, r, l, D));
  TRY(declare_map(d, "out", d->model->C, r->W, 1, &r->map));
  return CORE_OK;
}

core_status train_resampler_declare(train_model *model, int32_t m, int64_t D, train_resampler **out) {
  const train_modality_settings *s = &model->env->settings->data.modalities[m];
  const declaration d = {model, s->name, m};
  train_resampler *r = *out = calloc(1, sizeof *r);
  CHECK(r, CORE_ERR_MEMORY, "no memory for the resampler of '%s'", s->name);
  r->Q = s->queries;
  r->depth = s->depth;
  r->W = s->hidden ? s->hidden : model->C;
  r->H = s->heads ? s->heads : model->H;
  r->layer = calloc((size_t)r->depth, sizeof *r->layer);
  CHECK(r->layer, CORE_ERR_MEMORY, "no memory for %lld layers of '%s'", (long long)r->depth, s->name);
  TRY(declare_all(&d, r, D));
  return CORE_OK;
}

void train_resampler_free(train_resampler *resampler) {
  if (!resampler) return;
  free(resampler->layer);
  free(resampler);
}

/* ---- memory ---- */

static core_status plan_norm(train_model *model, core_arena *arena, int64_t R, int64_t W,
                             train_layer_norm *norm) {
  TRY(train_take_active(model, arena, R, W, &norm->out));
  TRY(train_take(arena, CORE_REAL_DTYPE, R, 2, &norm->stat));
  return CORE_OK;
}

/* What backward needs of a layer, besides its input. */
static core_status plan_inside(train_model *model, core_arena *arena, const train_resampler *r, int64_t R,
                               int64_t T, train_resampler_layer *layer) {
  const int64_t W = r->W;
  const struct {
    core_tensor *tensor;
    int64_t rows, columns;
  } list[] = {{&layer->attended, R, W},    {&layer->read, R, W},           {&layer->qkv_rows, R, 3 * W},
              {&layer->self_mixed, R, W},  {&layer->q_rows, R, W},         {&layer->kv_rows, T, 2 * W},
              {&layer->cross_mixed, R, W}, {&layer->hidden, R, WIDER * W}, {&layer->active, R, WIDER * W}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    TRY(train_take_active(model, arena, list[i].rows, list[i].columns, list[i].tensor));
  TRY(train_take(arena, CORE_REAL_DTYPE, R, r->H, &layer->self_lse));
  TRY(train_take(arena, CORE_REAL_DTYPE, R, r->H, &layer->cross_lse));
  TRY(plan_norm(model, arena, R, W, &layer->self_norm));
  TRY(plan_norm(model, arena, R, W, &layer->cross_norm));
  TRY(plan_norm(model, arena, R, W, &layer->forward_norm));
  return CORE_OK;
}

static void share_norm(train_layer_norm *norm, const train_layer_norm *first) {
  norm->out = first->out;
  norm->stat = first->stat;
}

/* The memory of another layer of equal sizes, which is computed again before it is read. */
static void share_inside(train_resampler_layer *layer, const train_resampler_layer *first) {
  layer->attended = first->attended, layer->read = first->read;
  layer->qkv_rows = first->qkv_rows, layer->self_mixed = first->self_mixed;
  layer->q_rows = first->q_rows, layer->kv_rows = first->kv_rows;
  layer->cross_mixed = first->cross_mixed;
  layer->hidden = first->hidden, layer->active = first->active;
  layer->self_lse = first->self_lse, layer->cross_lse = first->cross_lse;
  share_norm(&layer->self_norm, &first->self_norm);
  share_norm(&layer->cross_norm, &first->cross_norm);
  share_norm(&layer->forward_norm, &first->forward_norm);
}

static core_status plan_gradients(train_model *model, core_arena *arena, train_resampler *r, int64_t R,
                                  int64_t T) {
  TRY(train_take_active(model, arena, R, r->W, &r->d_stream));
  TRY(train_take_active(model, arena, R, r->W, &r->d_norm));
  TRY(train_take_active(model, arena, R, r->W, &r->d_mixed));
  TRY(train_take_active(model, arena, R, WIDER * r->W, &r->d_wide));
  TRY(train_take_active(model, arena, T, 2 * r->W, &r->d_kv));
  return CORE_OK;
}

core_status train_resampler_plan(train_model *model, int32_t m, const train_arenas *arenas) {
  train_resampler *r = model->connector[m].resampler;
  core_arena *arena = arenas->activations;
  int64_t R = model->limits.tokens[m], T = model->limits.latents[m];
  TRY(train_mirror_plan(arenas, arena, CORE_INT64, model->limits.segments[m] + 1, 1, &r->latent_offset));
  TRY(train_mirror_plan(arenas, arena, CORE_UINT64, T, 1, &r->latent_key));
  for (int64_t l = 0; l < r->depth; l++) {
    TRY(train_take_active(model, arena, R, r->W, &r->layer[l].input));
    if (l > 0 && (model->recomputes || !model->limits.training))
      share_inside(&r->layer[l], &r->layer[0]);
    else
      TRY(plan_inside(model, arena, r, R, T, &r->layer[l]));
  }
  TRY(train_take_active(model, arena, R, r->W, &r->output));
  if (model->limits.training) TRY(plan_gradients(model, arena, r, R, T));
  return CORE_OK;
}

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

void train_resampler_limits(const train_model *model, int32_t m, const train_model_limits *limits,
                            kern_limits *out) {
  const train_resampler *r = model->connector[m].resampler;
  if (!r) return;
  out->heads = larger(out->heads, r->H);
  out->width = larger(out->width, WIDER * r->W);
  out->rows = larger(out->rows, limits->latents[m]);
}

/* ---- items ---- */

core_status train_resampler_take(train_model *model, int32_t m, const data_part *part, int64_t *offset) {
  train_resampler *r = model->connector[m].resampler;
  uint64_t *key = r->latent_key.host, M = (uint64_t)model->env->layout.modalities;
  int64_t count = part->hi - part->lo;
  memcpy(r->latent_offset.host, part->offset, (size_t)(count + 1) * sizeof *part->offset);
  offset[0] = 0;
  for (int64_t i = 0; i < count; i++) {
    uint64_t place = ((uint64_t)(part->lo + i) * M + (uint64_t)m) << 24;
    int64_t length = part->offset[i + 1] - part->offset[i];
    for (int64_t t = 0; t < length; t++) *key++ = place | (uint64_t)t;
    offset[i + 1] = offset[i] + train_settings_item_rows(model->env->settings, m, length);
  }
  TRY(train_mirror_up(model->env, &r->latent_offset, count + 1));
  TRY(train_mirror_up(model->env, &r->latent_key, part->offset[count]));
  return CORE_OK;
}

/* ---- figures ---- */

double train_resampler_attention(const train_resampler *r, double latents) {
  return 4 * (double)(r->W * r->depth) * ((double)r->Q + latents);
}
