/* The experts of a mixture on the rows that a dispatch brings: FFN_e(x) = act(x W1^T + b1) W2^T + b2, all
 * local experts in one grouped product each. See moe_layer.c for the pass around them. */
#include <math.h>

#include "trainer/model/lora.h"
#include "trainer/model/tower.h"

int64_t train_experts_local(const train_model *model) {
  return model->env->settings->model.moe.experts / model->env->layout.expert_ranks;
}

static int64_t expert_hidden(const train_model *model) {
  int64_t hidden = model->env->settings->model.moe.hidden;
  return hidden ? hidden : model->F;
}

/* One kind of parameter of all local experts, one after another; *index: the first's. */
static core_status declare_kind(train_model *model, train_parameter parameter, int32_t layer,
                                const char *which, int32_t *index) {
  int64_t count = train_experts_local(model), first = model->env->layout.slot * count;
  for (int64_t j = 0; j < count; j++) {
    int32_t each;
    TRY(train_declare(model, parameter, &each, "blocks.%d.experts.%d.%s", layer, (int)(first + j), which));
    if (j == 0) *index = each;
  }
  return CORE_OK;
}

/* All first matrices of the local experts, then all second ones, so that each kind is one [E_local, n, k]
 * block. */
core_status train_experts_declare(train_model *model, train_moe *moe, int32_t layer) {
  int64_t F = expert_hidden(model), C = model->C;
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
  moe->in = moe->out = (train_linear){.weight = -1, .bias = -1, .groups = train_experts_local(model)};
  TRY(declare_kind(model, in, layer, "in.weight", &moe->in.weight));
  TRY(declare_kind(model, out, layer, "out.weight", &moe->out.weight));
  TRY(train_linear_add(model, &moe->in));
  TRY(train_linear_add(model, &moe->out));
  if (!model->env->settings->model.moe.bias) return CORE_OK;
  train_parameter in_bias = {.rank = 1, .shape = {in.shape[0]}, .scope = TRAIN_SCOPE_EXPERT};
  train_parameter out_bias = {.rank = 1, .shape = {C}, .scope = TRAIN_SCOPE_EXPERT};
  TRY(declare_kind(model, in_bias, layer, "in.bias", &moe->in.bias));
  TRY(declare_kind(model, out_bias, layer, "out.bias", &moe->out.bias));
  return CORE_OK;
}

core_status train_experts_plan(train_model *model, train_moe *moe, core_arena *arena) {
  int64_t R = model->limits.expert_rows, F = expert_hidden(model);
  TRY(train_take_active(model, arena, R, model->C, &moe->received));
  TRY(train_take_active(model, arena, R, F * train_activation_columns(model), &moe->hidden));
  TRY(train_take_active(model, arena, R, F, &moe->active));
  bool drops = model->limits.training && (moe->in.lora.dropout > 0 || moe->out.lora.dropout > 0);
  TRY(train_take(arena, CORE_INT32, drops ? R : 0, 2, &moe->received_key));
  return CORE_OK;
}

core_status train_experts_scratch_plan(train_model *model, core_arena *arena) {
  train_moe_scratch *s = &model->moe_scratch;
  int64_t R = model->limits.training ? model->limits.expert_rows : 0, F = expert_hidden(model);
  TRY(train_take_active(model, arena, R, F * train_activation_columns(model), &s->d_hidden));
  TRY(train_take_active(model, arena, R, F, &s->d_active));
  return CORE_OK;
}

/* The rows of the current round. */
static train_linear_rows round_rows(const train_moe *moe) {
  return (train_linear_rows){.group = moe->dispatch.group,
                             .key = core_tensor_1(moe->received_key.data, CORE_UINT64, moe->dispatch.rows)};
}

/* received -> hidden -> active, for the rows of the current round. */
static core_status experts_inner(train_model *model, train_moe *moe) {
  int64_t n = moe->dispatch.rows;
  core_tensor hidden = train_rows(moe->hidden, n);
  TRY(train_linear_forward(model, &moe->in, round_rows(moe), train_rows(moe->received, n), KERN_SET, hidden));
  TRY(train_activate(model, hidden, train_rows(moe->active, n)));
  return CORE_OK;
}

/* The rows' global places, where adapters drop inputs: whole keys, as pairs of int32, which rows of a matrix
 * can be. */
static core_status send_keys(train_model *model, train_moe *moe, int64_t round, bool gathers) {
  train_env *env = model->env;
  int64_t sent = moe->dispatch.sent;
  core_tensor key = core_tensor_2(model->items.key.device.data, CORE_INT32, model->items.tokens, 2);
  core_tensor staging = env->layout.expert_ranks == 1 ? moe->received_key : model->lora.sent_key;
  if (!train_lora_drops(model, &moe->in) && !train_lora_drops(model, &moe->out)) return CORE_OK;
  if (gathers) KERN(env, gather_rows, key, train_rows(moe->index_rows, sent), train_rows(staging, sent));
  TRY(train_dispatch_send(model, moe, round, train_rows(staging, sent), moe->received_key));
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
  TRY(send_keys(model, moe, round, round == 0 || x.data));
  return CORE_OK;
}

core_status train_experts_forward(train_model *model, train_moe *moe, core_tensor x) {
  core_tensor out = model->env->layout.expert_ranks == 1 ? moe->returned : model->moe_scratch.recv_y;
  for (int64_t round = 0; round < moe->dispatch.rounds; round++) {
    TRY(send_inputs(model, moe, round, round == 0 ? x : train_none()));
    TRY(experts_inner(model, moe));
    int64_t n = moe->dispatch.rows;
    TRY(train_linear_forward(model, &moe->out, round_rows(moe), train_rows(moe->active, n), KERN_SET,
                             train_rows(out, n)));
    TRY(train_dispatch_return(model, moe, round, out, moe->returned));
  }
  return CORE_OK;
}

/* Gradients of one round; the round's inputs and activations are in place. dy, dx: [rows, C] at the experts.
 */
static core_status experts_round_backward(train_model *model, train_moe *moe, core_tensor dy,
                                          core_tensor dx) {
  train_moe_scratch *s = &model->moe_scratch;
  int64_t n = moe->dispatch.rows;
  core_tensor d_active = train_rows(s->d_active, n), d_hidden = train_rows(s->d_hidden, n);
  TRY(train_linear_backward(model, &moe->out, round_rows(moe), train_rows(dy, n), train_rows(moe->active, n),
                            d_active));
  TRY(train_activate_backward(model, d_active, train_rows(moe->hidden, n), d_hidden));
  TRY(train_linear_backward(model, &moe->in, round_rows(moe), d_hidden, train_rows(moe->received, n),
                            train_rows(dx, n)));
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
