/* Self-attention inside each item, causal in a decoder: [q | k | v] = x W^T (+ b), rotated where positions
 * are RoPE, mixed, y += mixed O^T. Matrices start at N(0, 1/sqrt(fan in)); O is divided by sqrt(2 L), so that
 * the residual stream keeps its size. */
#include <math.h>
#include <stdio.h>

#include "trainer/model/tower.h"

static core_status declare_matrix(train_model *model, train_block *block, train_parameter matrix,
                                  const char *which, int32_t *index) {
  char name[CORE_NAME];
  snprintf(name, sizeof name, "blocks.%d.attention.%s.weight", block->layer, which);
  TRY(train_trunk_declare_parameter(model, block->trunk, matrix, index, name));
  return CORE_OK;
}

core_status train_attention_declare(train_model *model, train_block *block) {
  int64_t C = model->C, inner = model->H * model->A;
  train_parameter matrix = {.rank = 2, .init = TRAIN_INIT_NORMAL, .decay = true};
  matrix.shape[0] = (model->H + 2 * model->G) * model->A;
  matrix.shape[1] = C;
  matrix.init_value = 1 / sqrt((double)C);
  TRY(declare_matrix(model, block, matrix, "qkv", &block->attention.qkv.weight));
  train_parameter bias = {.rank = 1, .shape = {matrix.shape[0]}};
  block->attention.qkv.bias = block->attention.out.bias = -1;
  if (model->env->settings->model.qkv_bias)
    TRY(train_declare(model, bias, &block->attention.qkv.bias, "blocks.%d.attention.qkv.bias", block->layer));
  matrix.shape[0] = C;
  matrix.shape[1] = inner;
  matrix.init_value = 1 / sqrt((double)inner * 2 * (double)model->L);
  TRY(declare_matrix(model, block, matrix, "out", &block->attention.out.weight));
  TRY(train_linear_add(model, &block->attention.qkv));
  TRY(train_linear_add(model, &block->attention.out));
  return CORE_OK;
}

core_status train_attention_plan(train_model *model, train_block *block, core_arena *arena) {
  train_attention_layer *layer = &block->attention;
  int64_t T = block->rows;
  TRY(train_take_active(model, arena, T, (model->H + 2 * model->G) * model->A, &layer->qkv_rows));
  TRY(train_take_active(model, arena, T, model->H * model->A, &layer->mixed));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, model->H, &layer->lse));
  return CORE_OK;
}

/* Of the rows that pass the block. */
static core_tensor positions_of(const train_model *model, const train_block *block) {
  train_span rows = train_trunk_rows(model, block->trunk);
  return train_slice(model->items.position.device, rows.first, rows.count);
}

static kern_attention describe(const train_model *model, const train_block *block) {
  bool causal = model->env->settings->model.kind == TRAIN_KIND_DECODER;
  return (kern_attention){.segments = train_trunk_segments(model, block->trunk),
                          .heads = (int32_t)model->H,
                          .kv_heads = (int32_t)model->G,
                          .head_width = (int32_t)model->A,
                          .mask = causal ? KERN_CAUSAL : KERN_BIDIRECTIONAL,
                          .scale = 1 / sqrt((double)model->A)};
}

/* Keeps the rows; new ones attend to all that is kept of their sequences. Slots are distinct. */
static core_status attend_cached(train_model *model, int32_t l, const kern_attention *attention,
                                 core_tensor qkv, core_tensor mixed, core_tensor lse) {
  train_env *env = model->env;
  const train_cache *cache = model->cache;
  int64_t T = qkv.shape[0];
  KERN(env, combine_bwd, qkv, cache->layer[l], train_rows(cache->slot, T), train_none(), cache->layer[l],
       train_none());
  if (cache->stepping)
    KERN(env, attention_cached, attention, train_rows(cache->first, T), train_rows(cache->length, T), qkv,
         cache->layer[l], mixed);
  else
    KERN(env, attention_fwd, attention, qkv, mixed, lse);
  return CORE_OK;
}

core_status train_attention_forward(train_model *model, train_block *block, core_tensor x, core_tensor y) {
  train_env *env = model->env;
  train_attention_layer *layer = &block->attention;
  train_linear_rows rows = train_trunk_linear_rows(model, block->trunk);
  int64_t T = x.shape[0];
  kern_attention attention = describe(model, block);
  core_tensor qkv = train_rows(layer->qkv_rows, T), mixed = train_rows(layer->mixed, T);
  TRY(train_linear_forward(model, &layer->qkv, rows, x, KERN_SET, qkv));
  if (model->rotates)
    KERN(env, rope, KERN_ROTATE, (int32_t)(model->H + model->G), positions_of(model, block),
         model->inverse_frequency.device, qkv);
  if (model->cache)
    TRY(attend_cached(model, block->layer, &attention, qkv, mixed, train_rows(layer->lse, T)));
  else
    KERN(env, attention_fwd, &attention, qkv, mixed, train_rows(layer->lse, T));
  TRY(train_linear_forward(model, &layer->out, rows, mixed, KERN_ADD, y));
  return CORE_OK;
}

core_status train_attention_backward(train_model *model, train_block *block, core_tensor x, core_tensor dy,
                                     core_tensor dx) {
  train_env *env = model->env;
  train_attention_layer *layer = &block->attention;
  train_linear_rows rows = train_trunk_linear_rows(model, block->trunk);
  int64_t T = x.shape[0];
  kern_attention attention = describe(model, block);
  core_tensor qkv = train_rows(layer->qkv_rows, T), mixed = train_rows(layer->mixed, T);
  core_tensor d_mixed = train_rows(model->d_mixed, T), d_qkv = train_rows(model->d_qkv, T);
  TRY(train_linear_backward(model, &layer->out, rows, dy, mixed, d_mixed));
  KERN(env, attention_bwd, &attention, d_mixed, qkv, mixed, train_rows(layer->lse, T), d_qkv);
  if (model->rotates)
    KERN(env, rope, KERN_ROTATE_BACK, (int32_t)(model->H + model->G), positions_of(model, block),
         model->inverse_frequency.device, d_qkv);
  TRY(train_linear_backward(model, &layer->qkv, rows, d_qkv, x, dx));
  return CORE_OK;
}
