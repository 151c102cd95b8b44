/* The experts of a mixture on the rows that a dispatch brings: FFN_e(x) = act(x W1^T + b1) W2^T + b2, all
 * local experts in one grouped product each. See moe_layer.c for the pass around them. */
#include <math.h>

#include "trainer/model/tower.h"

int64_t train_experts_local(const train_model *model, const train_moe *moe) {
  int64_t slot = model->env->layout.slot, ranks = model->env->layout.expert_ranks;
  return train_experts_first(moe->experts, slot + 1, ranks) - train_experts_first(moe->experts, slot, ranks);
}

static int64_t expert_hidden(const train_model *model) {
  int64_t hidden = model->env->settings->model.moe.hidden;
  return hidden ? hidden : model->F;
}

/* All first matrices of the local experts, then all second ones, so that each kind is one [E_local, n, k]
 * block. */
core_status train_experts_declare(train_model *model, train_moe *moe, int32_t layer) {
  int64_t F = expert_hidden(model), C = model->C, count = train_experts_local(model, moe);
  int64_t first = train_experts_first(moe->experts, model->env->layout.slot, model->env->layout.expert_ranks);
  train_parameter in = {.rank = 2,
                        .shape = {F * train_activation_columns(model), C},
                        .scope = TRAIN_SCOPE_EXPERT,
                        .init = TRAIN_INIT_NORMAL,
                        .init_value = 1 / sqrt((double)C),
                        .decay = true};
  train_parameter out = in;
  out.shape[0] = C;
  out.shape[1] = F;
  out.init_value = 1 / sqrt((double)F * 2 * (double)model->L);
  moe->in = moe->out = moe->in_bias = moe->out_bias = -1;
  for (int64_t j = 0; j < count; j++) {
    int32_t index;
    in.expert = first + j;
    TRY(train_declare(model, in, &index, "blocks.%d.experts.%d.in.weight", layer, (int)(first + j)));
    if (j == 0) moe->in = index;
  }
  for (int64_t j = 0; j < count; j++) {
    int32_t index;
    out.expert = first + j;
    TRY(train_declare(model, out, &index, "blocks.%d.experts.%d.out.weight", layer, (int)(first + j)));
    if (j == 0) moe->out = index;
  }
  if (!model->env->settings->model.moe.bias) return CORE_OK;
  train_parameter in_bias = {.rank = 1, .shape = {in.shape[0]}, .scope = TRAIN_SCOPE_EXPERT};
  train_parameter out_bias = {.rank = 1, .shape = {C}, .scope = TRAIN_SCOPE_EXPERT};
  for (int64_t j = 0; j < count; j++) {
    int32_t index;
    in_bias.expert = first + j;
    TRY(train_declare(model, in_bias, &index, "blocks.%d.experts.%d.in.bias", layer, (int)(first + j)));
    if (j == 0) moe->in_bias = index;
  }
  for (int64_t j = 0; j < count; j++) {
    int32_t index;
    out_bias.expert = first + j;
    TRY(train_declare(model, out_bias, &index, "blocks.%d.experts.%d.out.bias", layer, (int)(first + j)));
    if (j == 0) moe->out_bias = index;
  }
  return CORE_OK;
}

core_status train_experts_plan(train_model *model, train_moe *moe, core_arena *arena) {
  int64_t R = model->limits.expert_rows, F = expert_hidden(model);
  TRY(train_take_active(model, arena, R, model->C, &moe->received));
  TRY(train_take_active(model, arena, R, F * train_activation_columns(model), &moe->hidden));
  TRY(train_take_active(model, arena, R, F, &moe->active));
  return CORE_OK;
}

core_status train_experts_scratch_plan(train_model *model, core_arena *arena) {
  train_moe_scratch *s = &model->moe_scratch;
  int64_t R = model->limits.training ? model->limits.expert_rows : 0, F = expert_hidden(model);
  TRY(train_take_active(model, arena, R, F * train_activation_columns(model), &s->d_hidden));
  TRY(train_take_active(model, arena, R, F, &s->d_active));
  return CORE_OK;
}

static core_tensor weights_in(const train_model *model, const train_moe *moe) {
  return train_parameter_matrices(&model->parameters, moe->in, train_experts_local(model, moe));
}

static core_tensor weights_out(const train_model *model, const train_moe *moe) {
  return train_parameter_matrices(&model->parameters, moe->out, train_experts_local(model, moe));
}

/* received -> hidden -> active, for the rows of the current round. */
static core_status experts_inner(train_model *model, train_moe *moe) {
  train_env *env = model->env;
  int64_t n = moe->dispatch.rows;
  if (moe->in < 0) return CORE_OK; /* this rank holds none */
  KERN(env, gemm_grouped, KERN_NT, moe->dispatch.group, train_rows(moe->received, n), weights_in(model, moe),
       KERN_SET, train_rows(moe->hidden, n));
  if (moe->in_bias >= 0)
    KERN(env, bias_grouped_fwd, moe->dispatch.group,
         train_parameter_vectors(&model->parameters, moe->in_bias, train_experts_local(model, moe)),
         train_rows(moe->hidden, n));
  TRY(train_activate(model, train_rows(moe->hidden, n), train_rows(moe->active, n)));
  return CORE_OK;
}

static core_status send_inputs(train_model *model, train_moe *moe, int64_t round, core_tensor x) {
  train_env *env = model->env;
  bool alone = env->layout.expert_ranks == 1;
  core_tensor staging = train_rows(alone ? moe->received : model->moe_scratch.send_x, moe->dispatch.sent);
  if (round == 0 || x.data)
    KERN(env, gather_rows, x, train_rows(moe->index_rows, moe->dispatch.sent), staging);
  train_dispatch_round(model, moe, round);
  TRY(train_dispatch_send(model, moe, round, staging, moe->received));
  return CORE_OK;
}

/* active -> out, likewise. */
static core_status experts_outer(train_model *model, train_moe *moe, core_tensor out) {
  train_env *env = model->env;
  int64_t n = moe->dispatch.rows;
  if (moe->out < 0) return CORE_OK;
  KERN(env, gemm_grouped, KERN_NT, moe->dispatch.group, train_rows(moe->active, n), weights_out(model, moe),
       KERN_SET, train_rows(out, n));
  if (moe->out_bias >= 0)
    KERN(env, bias_grouped_fwd, moe->dispatch.group,
         train_parameter_vectors(&model->parameters, moe->out_bias, train_experts_local(model, moe)),
         train_rows(out, n));
  return CORE_OK;
}

core_status train_experts_forward(train_model *model, train_moe *moe, core_tensor x) {
  core_tensor out = model->env->layout.expert_ranks == 1 ? moe->returned : model->moe_scratch.recv_y;
  for (int64_t round = 0; round < moe->dispatch.rounds; round++) {
    TRY(send_inputs(model, moe, round, round == 0 ? x : train_none()));
    TRY(experts_inner(model, moe));
    TRY(experts_outer(model, moe, out));
    TRY(train_dispatch_return(model, moe, round, out, moe->returned));
  }
  return CORE_OK;
}

/* Gradients of one round; the round's inputs and activations are in place. dy, dx: [rows, C] at the experts.
 */
static core_status experts_round_backward(train_model *model, train_moe *moe, core_tensor dy,
                                          core_tensor dx) {
  train_env *env = model->env;
  train_moe_scratch *s = &model->moe_scratch;
  train_parameters *p = &model->parameters;
  const int64_t *group = moe->dispatch.group;
  int64_t n = moe->dispatch.rows, count = train_experts_local(model, moe);
  core_tensor d_active = train_rows(s->d_active, n), d_hidden = train_rows(s->d_hidden, n);
  dy = train_rows(dy, n);
  if (moe->in < 0) return CORE_OK;
  KERN(env, gemm_grouped, KERN_TN, group, dy, train_rows(moe->active, n), KERN_ADD,
       train_parameter_gradients(p, moe->out, count));
  if (moe->out_bias >= 0)
    KERN(env, bias_grouped_bwd, group, dy, train_parameter_gradients(p, moe->out_bias, count));
  KERN(env, gemm_grouped, KERN_NN, group, dy, weights_out(model, moe), KERN_SET, d_active);
  TRY(train_activate_backward(model, d_active, train_rows(moe->hidden, n), d_hidden));
  KERN(env, gemm_grouped, KERN_TN, group, d_hidden, train_rows(moe->received, n), KERN_ADD,
       train_parameter_gradients(p, moe->in, count));
  if (moe->in_bias >= 0)
    KERN(env, bias_grouped_bwd, group, d_hidden, train_parameter_gradients(p, moe->in_bias, count));
  KERN(env, gemm_grouped, KERN_NN, group, d_hidden, weights_in(model, moe), KERN_SET, train_rows(dx, n));
  return CORE_OK;
}

/* Last round first: its activations are still there. */
core_status train_experts_backward(train_model *model, train_moe *moe, core_tensor x) {
  train_moe_scratch *s = &model->moe_scratch;
  bool alone = model->env->layout.expert_ranks == 1;
  core_tensor dy = alone ? s->send_dy : s->recv_y, dx = alone ? s->send_dx : s->recv_dx;
  for (int64_t round = moe->dispatch.rounds - 1; round >= 0; round--) {
    if (round < moe->dispatch.rounds - 1) {
      TRY(send_inputs(model, moe, round, x));
      TRY(experts_inner(model, moe));
    }
    TRY(train_dispatch_send(model, moe, round, s->send_dy, dy));
    TRY(experts_round_backward(model, moe, dy, dx));
    TRY(train_dispatch_return(model, moe, round, dx, s->send_dx));
  }
  return CORE_OK;
}
