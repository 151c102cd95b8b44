/* The experts of a mixture on the rows that a dispatch brings: FFN_e(x) = act(x W1^T + b1) W2^T + b2, all
 * local experts in one grouped product each. See moe_layer.c for the pass around them. */
#include <math.h>

#include "trainer/model/lora.h"
#include "trainer/model/tower.h"

int64_t train_experts_local(const train_model *model, const train_moe *moe) {
  int64_t slot = model->env->layout.slot, ranks = model->env->layout.expert_ranks;
  return train_experts_first(moe->experts, slot + 1, ranks) - train_experts_first(moe->experts, slot, ranks);
}

static int64_t expert_hidden(const train_model *model) {
  int64_t hidden = model->env->settings->model.moe.hidden;
  return hidden ? hidden : model->F;
}

/* One kind of parameter of all local experts, one after another; *index: the first's. */
static core_status declare_kind(train_model *model, const train_moe *moe, train_parameter parameter,
                                int32_t layer, const char *which, int32_t *index) {
  int64_t first = train_experts_first(moe->experts, model->env->layout.slot, model->env->layout.expert_ranks);
  for (int64_t j = 0; j < train_experts_local(model, moe); j++) {
    int32_t each;
    parameter.expert = first + j;
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
  moe->in = moe->out = (train_linear){.weight = -1, .bias = -1, .groups = train_experts_local(model, moe)};
  TRY(declare_kind(model, moe, in, layer, "in.weight", &moe->in.weight));
  TRY(declare_kind(model, moe, out, layer, "out.weight", &moe->out.weight));
  TRY(train_linear_add(model, &moe->in));
  TRY(train_linear_add(model, &moe->out));
  if (!model->env->settings->model.moe.bias) return CORE_OK;
  train_parameter in_bias = {.rank = 1, .shape = {in.shape[0]}, .scope = TRAIN_SCOPE_EXPERT};
  train_parameter out_bias = {.rank = 1, .shape = {C}, .scope = TRAIN_SCOPE_EXPERT};
  TRY(declare_kind(model, moe, in_bias, layer, "in.bias", &moe->in.bias));
  TRY(declare_kind(model, moe, out_bias, layer, "out.bias", &moe->out.bias));
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

/* The rows of the current chunk in a buffer of a round. */
static core_tensor chunk_rows(const train_moe *moe, core_tensor buffer) {
  return train_slice(buffer, moe->dispatch.first, moe->dispatch.rows);
}

static train_linear_rows chunk_linear_rows(const train_moe *moe) {
  core_tensor key = chunk_rows(moe, moe->received_key);
  return (train_linear_rows){.group = moe->dispatch.group,
                             .key = core_tensor_1(key.data, CORE_UINT64, moe->dispatch.rows)};
}

/* received -> hidden -> active, for the rows of the current chunk. */
static core_status experts_inner(train_model *model, train_moe *moe) {
  core_tensor hidden = chunk_rows(moe, moe->hidden);
  TRY(train_linear_forward(model, &moe->in, chunk_linear_rows(moe), chunk_rows(moe, moe->received), KERN_SET,
                           hidden));
  TRY(train_activate(model, hidden, chunk_rows(moe, moe->active)));
  return CORE_OK;
}

/* The rows' global places go with them where adapters drop inputs: whole keys, as pairs of int32, which rows
 * of a matrix can be. */
static bool sends_keys(const train_model *model, const train_moe *moe) {
  return train_lora_drops(model, &moe->in) || train_lora_drops(model, &moe->out);
}

/* Where the inputs and their keys lie at the sender. */
static core_tensor sent_inputs(const train_model *model, const train_moe *moe) {
  bool alone = model->env->layout.expert_ranks == 1;
  return train_rows(alone ? moe->received : model->moe_scratch.send_x, moe->dispatch.sent);
}

static core_tensor sent_keys(const train_model *model, const train_moe *moe) {
  bool alone = model->env->layout.expert_ranks == 1;
  return train_rows(alone ? moe->received_key : model->lora.sent_key, moe->dispatch.sent);
}

static core_status gather_inputs(train_model *model, train_moe *moe, core_tensor x) {
  train_env *env = model->env;
  core_tensor rows = train_rows(moe->index_rows, moe->dispatch.sent);
  core_tensor key = core_tensor_2(model->items.key.device.data, CORE_INT32, model->items.tokens, 2);
  KERN(env, gather_rows, x, rows, sent_inputs(model, moe));
  if (sends_keys(model, moe)) KERN(env, gather_rows, key, rows, sent_keys(model, moe));
  return CORE_OK;
}

/* All chunks of a round set out. */
static core_status send_inputs(train_model *model, train_moe *moe, int64_t round) {
  for (int64_t c = 0; c < train_dispatch_chunks(model, moe); c++) {
    if (sends_keys(model, moe))
      TRY(train_dispatch_send(model, moe, round, c, sent_keys(model, moe), moe->received_key));
    TRY(train_dispatch_send(model, moe, round, c, sent_inputs(model, moe), moe->received));
  }
  return CORE_OK;
}

/* Waits for a chunk and makes it the current one. */
static core_status take(train_model *model, train_moe *moe, int64_t round, int64_t chunk) {
  TRY(train_dispatch_arrived(model, chunk));
  train_dispatch_take(model, moe, round, chunk);
  return CORE_OK;
}

core_status train_experts_forward(train_model *model, train_moe *moe, core_tensor x) {
  core_tensor out = model->env->layout.expert_ranks == 1 ? moe->returned : model->moe_scratch.recv_y;
  TRY(gather_inputs(model, moe, x));
  for (int64_t round = 0; round < moe->dispatch.rounds; round++) {
    TRY(send_inputs(model, moe, round));
    for (int64_t c = 0; c < train_dispatch_chunks(model, moe); c++) {
      TRY(take(model, moe, round, c));
      TRY(experts_inner(model, moe));
      TRY(train_linear_forward(model, &moe->out, chunk_linear_rows(moe), chunk_rows(moe, moe->active),
                               KERN_SET, chunk_rows(moe, out)));
      TRY(train_dispatch_return(model, moe, round, c, out, moe->returned));
    }
    TRY(train_dispatch_returned(model));
  }
  return CORE_OK;
}

/* Gradients of one chunk; its inputs and activations are in place. dy, dx: [R, C] at the experts. */
static core_status experts_chunk_backward(train_model *model, train_moe *moe, core_tensor dy,
                                          core_tensor dx) {
  train_moe_scratch *s = &model->moe_scratch;
  core_tensor d_active = chunk_rows(moe, s->d_active), d_hidden = chunk_rows(moe, s->d_hidden);
  TRY(train_linear_backward(model, &moe->out, chunk_linear_rows(moe), chunk_rows(moe, dy),
                            chunk_rows(moe, moe->active), d_active));
  TRY(train_activate_backward(model, d_active, chunk_rows(moe, moe->hidden), d_hidden));
  TRY(train_linear_backward(model, &moe->in, chunk_linear_rows(moe), d_hidden, chunk_rows(moe, moe->received),
                            chunk_rows(moe, dx)));
  return CORE_OK;
}

/* Inputs and activations of a round that is not the last one. */
static core_status again(train_model *model, train_moe *moe, int64_t round) {
  TRY(send_inputs(model, moe, round));
  for (int64_t c = 0; c < train_dispatch_chunks(model, moe); c++) {
    TRY(take(model, moe, round, c));
    TRY(experts_inner(model, moe));
  }
  return CORE_OK;
}

/* Last round first: its activations are still there. */
core_status train_experts_backward(train_model *model, train_moe *moe, core_tensor x) {
  train_moe_scratch *s = &model->moe_scratch;
  bool alone = model->env->layout.expert_ranks == 1;
  int64_t last = moe->dispatch.rounds - 1, chunks = train_dispatch_chunks(model, moe);
  core_tensor dy = alone ? s->send_dy : s->recv_y, dx = alone ? s->send_dx : s->recv_dx;
  for (int64_t round = last; round >= 0; round--) {
    if (round == last - 1) TRY(gather_inputs(model, moe, x));
    if (round < last) TRY(again(model, moe, round));
    for (int64_t c = 0; c < chunks; c++) TRY(train_dispatch_send(model, moe, round, c, s->send_dy, dy));
    for (int64_t c = 0; c < chunks; c++) {
      TRY(take(model, moe, round, c));
      TRY(experts_chunk_backward(model, moe, dy, dx));
      TRY(train_dispatch_return(model, moe, round, c, dx, s->send_dx));
    }
    TRY(train_dispatch_returned(model));
  }
  return CORE_OK;
}
