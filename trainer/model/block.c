/* Pre-norm block (Vaswani et al. 2017; Zhang and Sennrich 2019):
 *   m = x + Attention(RMSNorm(x))        y = m + FeedForward(RMSNorm(m))
 * with the feed-forward dense or a mixture of experts.
 *
 * With model.recompute only the residual stream at the blocks' ends is kept for backward; everything inside
 * is computed again there, block by block, in memory that all blocks of a kind share (Chen et al. 2016). The
 * second pass gives the same bits: what is random in a block is keyed by the token's place. */
#include <stdio.h>

#include "trainer/model/tower.h"

static core_status declare_norm(train_model *model, train_block *block, const char *which, train_norm *norm) {
  train_parameter weight = {.rank = 1, .shape = {model->C}, .init = TRAIN_INIT_ONE};
  char name[CORE_NAME];
  snprintf(name, sizeof name, "blocks.%d.%s.weight", block->layer, which);
  TRY(train_trunk_declare_parameter(model, block->trunk, weight, &norm->weight, name));
  return CORE_OK;
}

core_status train_block_declare(train_model *model, int32_t b) {
  train_block *block = &model->block[b];
  const train_settings *settings = model->env->settings;
  block->trunk = (int32_t)(b / model->L);
  block->layer = (int32_t)(b % model->L);
  bool moe = train_settings_moe_layer(settings->model.moe.layers, model->L, block->layer);
  block->has_moe = moe && !train_settings_dense(settings);
  TRY(declare_norm(model, block, "attention_norm", &block->attention_norm));
  TRY(train_attention_declare(model, block));
  TRY(declare_norm(model, block, "forward_norm", &block->forward_norm));
  if (block->has_moe)
    TRY(train_moe_declare(model, b));
  else
    TRY(train_feed_forward_declare(model, block));
  return CORE_OK;
}

static core_status plan_norm(const train_model *model, train_norm *norm, int64_t rows, int64_t width,
                             core_arena *arena) {
  TRY(train_take_active(model, arena, rows, width, &norm->out));
  TRY(train_take(arena, CORE_REAL_DTYPE, rows, 1, &norm->inv));
  norm->inv.rank = 1;
  return CORE_OK;
}

static core_status plan_inside(train_model *model, train_block *block, const train_arenas *arenas) {
  core_arena *arena = arenas->activations;
  TRY(plan_norm(model, &block->attention_norm, block->rows, model->C, arena));
  TRY(train_attention_plan(model, block, arena));
  TRY(train_take_active(model, arena, block->rows, model->C, &block->middle));
  TRY(plan_norm(model, &block->forward_norm, block->rows, model->C, arena));
  if (block->has_moe)
    TRY(train_moe_plan(model, &block->moe, arenas));
  else
    TRY(train_feed_forward_plan(model, block, arena));
  return CORE_OK;
}

/* The memory of `from`, another block of the same kind, with the block's own parameters. */
static void share_inside(train_block *block, const train_block *from) {
  train_block own = *block;
  *block = *from;
  block->layer = own.layer;
  block->attention_norm.weight = own.attention_norm.weight;
  block->forward_norm.weight = own.forward_norm.weight;
  block->attention.qkv = own.attention.qkv;
  block->attention.out = own.attention.out;
  block->dense.in = own.dense.in;
  block->dense.out = own.dense.out;
  block->moe.index = own.moe.index;
  block->moe.router = own.moe.router;
  block->moe.router_bias = own.moe.router_bias;
  block->moe.in = own.moe.in;
  block->moe.out = own.moe.out;
}

/* The first block of the trunk that has the same kind and sizes. */
static const train_block *first_alike(const train_model *model, const train_block *block) {
  const train_block *first = &model->block[block->trunk * model->L];
  while (first->has_moe != block->has_moe || (!block->has_moe && first->dense.width != block->dense.width))
    first++;
  return first;
}

core_status train_block_plan(train_model *model, int32_t b, const train_arenas *arenas) {
  train_block *block = &model->block[b];
  const train_block *alike = first_alike(model, block);
  if (model->recomputes && alike != block)
    share_inside(block, alike);
  else
    TRY(plan_inside(model, block, arenas));
  TRY(train_take_active(model, arenas->activations, block->rows, model->C, &block->output));
  return CORE_OK;
}

static core_status norm_forward(train_model *model, train_norm *norm, core_tensor x, core_tensor *out) {
  train_env *env = model->env;
  *out = train_rows(norm->out, x.shape[0]);
  KERN(env, rmsnorm_fwd, x, train_parameter_value(&model->parameters, norm->weight),
       env->settings->model.norm_epsilon, *out, train_rows(norm->inv, x.shape[0]));
  return CORE_OK;
}

static core_status norm_backward(train_model *model, train_norm *norm, core_tensor dy, core_tensor x,
                                 core_tensor dx) {
  train_env *env = model->env;
  KERN(env, rmsnorm_bwd, dy, x, train_parameter_value(&model->parameters, norm->weight),
       train_rows(norm->inv, x.shape[0]), KERN_ADD, dx,
       train_parameter_gradient(&model->parameters, norm->weight));
  return CORE_OK;
}

/* The residual stream is kept at both places, because each norm's backward needs its input: y = x first, and
 * each branch adds to y with its last product. */
static core_status copy(train_model *model, core_tensor from, core_tensor to) {
  TRY(model->env->ops->device->copy(to.data, from.data, core_tensor_bytes(&from), NULL));
  return CORE_OK;
}

core_status train_block_forward(train_model *model, int32_t b, core_tensor x, train_mode mode) {
  train_block *block = &model->block[b];
  core_tensor normed, middle = train_rows(block->middle, x.shape[0]),
                      output = train_rows(block->output, x.shape[0]);
  TRY(norm_forward(model, &block->attention_norm, x, &normed));
  TRY(copy(model, x, middle));
  TRY(train_attention_forward(model, block, normed, middle));
  TRY(norm_forward(model, &block->forward_norm, middle, &normed));
  TRY(copy(model, middle, output));
  if (block->has_moe)
    TRY(train_moe_forward(model, &block->moe, normed, (int)mode, output));
  else
    TRY(train_feed_forward_forward(model, block, normed, output));
  return CORE_OK;
}

core_status train_block_backward(train_model *model, int32_t b, core_tensor x, core_tensor router,
                                 core_tensor dx) {
  train_block *block = &model->block[b];
  int64_t T = x.shape[0];
  core_tensor dn = train_rows(model->d_norm, T), middle = train_rows(block->middle, T);
  if (block->has_moe)
    TRY(train_moe_backward(model, &block->moe, train_rows(block->forward_norm.out, T), dx, router, dn));
  else
    TRY(train_feed_forward_backward(model, block, train_rows(block->forward_norm.out, T), dx, dn));
  TRY(norm_backward(model, &block->forward_norm, dn, middle, dx));
  TRY(train_attention_backward(model, block, train_rows(block->attention_norm.out, T), dx, dn));
  TRY(norm_backward(model, &block->attention_norm, dn, x, dx));
  return CORE_OK;
}
