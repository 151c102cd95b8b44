/* Dense feed-forward: y += act(x W1^T) W2^T, act SwiGLU (Shazeer 2020; W1 = [gate; up]) or GELU. As the
 * baseline of an MoE layer (model.dense) its hidden width is K times an expert's: equal FLOPs per token; or,
 * with model.dense_match total, E times: equal parameters. */
#include <math.h>
#include <stdio.h>

#include "trainer/model/tower.h"

int64_t train_activation_columns(const train_model *model) {
  return model->env->settings->model.activation == TRAIN_SWIGLU ? 2 : 1;
}

core_status train_activate(train_model *model, core_tensor hidden, core_tensor active) {
  train_env *env = model->env;
  int activation = env->settings->model.activation;
  if (activation == TRAIN_SWIGLU)
    KERN(env, swiglu_fwd, hidden, active);
  else
    KERN(env, gelu_fwd, activation == TRAIN_GELU ? KERN_GELU_ERF : KERN_GELU_TANH, hidden, active);
  return CORE_OK;
}

core_status train_activate_backward(train_model *model, core_tensor d_active, core_tensor hidden,
                                    core_tensor d_hidden) {
  train_env *env = model->env;
  int activation = env->settings->model.activation;
  if (activation == TRAIN_SWIGLU)
    KERN(env, swiglu_bwd, d_active, hidden, KERN_SET, d_hidden);
  else
    KERN(env, gelu_bwd, activation == TRAIN_GELU ? KERN_GELU_ERF : KERN_GELU_TANH, d_active, hidden, KERN_SET,
         d_hidden);
  return CORE_OK;
}

int64_t train_dense_experts(const train_settings *settings) {
  return settings->model.dense_match == TRAIN_MATCH_TOTAL ? settings->model.moe.experts
                                                          : settings->model.moe.choose;
}

/* A layer that stands for a mixture is as wide as its experts; every block of a connector does. */
static int64_t hidden_width(const train_model *model, const train_block *block) {
  const train_settings *s = model->env->settings;
  bool mixture = s->model.kind == TRAIN_KIND_CONNECTOR ||
                 train_settings_moe_layer(s->model.moe.layers, model->L, block->layer);
  if (!mixture) return model->F;
  return train_dense_experts(s) * (s->model.moe.hidden ? s->model.moe.hidden : model->F);
}

static core_status declare_matrix(train_model *model, train_block *block, train_parameter matrix,
                                  const char *which, int32_t *index) {
  char name[CORE_NAME];
  snprintf(name, sizeof name, "blocks.%d.feed_forward.%s.weight", block->layer, which);
  TRY(train_trunk_declare_parameter(model, block->trunk, matrix, index, name));
  return CORE_OK;
}

core_status train_feed_forward_declare(train_model *model, train_block *block) {
  int64_t F = hidden_width(model, block), C = model->C;
  block->dense.width = F;
  train_parameter in = {.rank = 2,
                        .shape = {F * train_activation_columns(model), C},
                        .init = TRAIN_INIT_NORMAL,
                        .init_value = 1 / sqrt((double)C),
                        .decay = true};
  train_parameter out = {.rank = 2,
                         .shape = {C, F},
                         .init = TRAIN_INIT_NORMAL,
                         .init_value = 1 / sqrt((double)F * 2 * (double)model->L),
                         .decay = true};
  TRY(declare_matrix(model, block, in, "in", &block->dense.in.weight));
  TRY(declare_matrix(model, block, out, "out", &block->dense.out.weight));
  block->dense.in.bias = block->dense.out.bias = -1;
  TRY(train_linear_add(model, &block->dense.in));
  TRY(train_linear_add(model, &block->dense.out));
  return CORE_OK;
}

core_status train_feed_forward_plan(train_model *model, train_block *block, core_arena *arena) {
  int64_t F = hidden_width(model, block);
  TRY(train_take_active(model, arena, block->rows, F * train_activation_columns(model),
                        &block->dense.hidden));
  TRY(train_take_active(model, arena, block->rows, F, &block->dense.active));
  return CORE_OK;
}

core_status train_feed_forward_forward(train_model *model, train_block *block, core_tensor x, core_tensor y) {
  train_linear_rows rows = train_trunk_linear_rows(model, block->trunk);
  core_tensor hidden = train_rows(block->dense.hidden, x.shape[0]),
              active = train_rows(block->dense.active, x.shape[0]);
  TRY(train_linear_forward(model, &block->dense.in, rows, x, KERN_SET, hidden));
  TRY(train_activate(model, hidden, active));
  TRY(train_linear_forward(model, &block->dense.out, rows, active, KERN_ADD, y));
  return CORE_OK;
}

core_status train_feed_forward_backward(train_model *model, train_block *block, core_tensor x, core_tensor dy,
                                        core_tensor dx) {
  train_env *env = model->env;
  train_linear_rows rows = train_trunk_linear_rows(model, block->trunk);
  int64_t T = x.shape[0], F = block->dense.width;
  core_tensor hidden = train_rows(block->dense.hidden, T), active = train_rows(block->dense.active, T);
  core_tensor d_hidden = core_tensor_2(model->d_hidden.data, env->active, T, hidden.shape[1]);
  core_tensor d_active = core_tensor_2(model->d_active.data, env->active, T, F);
  TRY(train_linear_backward(model, &block->dense.out, rows, dy, active, d_active));
  TRY(train_activate_backward(model, d_active, hidden, d_hidden));
  TRY(train_linear_backward(model, &block->dense.in, rows, d_hidden, x, dx));
  return CORE_OK;
}
