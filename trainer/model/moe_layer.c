/* Mixture of experts (METHODS sections 0 and 1; Mustafa et al. 2022; Riquelme et al. 2021):
 *   y += sum over the chosen and kept of gate_e FFN_e(x) with FFN_e(x) = act(x W1^T + b1) W2^T + b2,
 * biases where configured, and dropout on it in training; choice and gates are moe_router.c's. Forward:
 * router
 * -> keep -> plan -> gather -> all-to-all -> experts -> all-to-all -> combine. Backward mirrors it.
 *
 * Expert buffers have R rows. Where more arrive, the stream is taken in rounds; only the last round's
 * activations stay, the others are sent and computed again in backward. Imbalance costs time, never memory.
 */
#include "core/random.h"
#include "trainer/model/tower.h"

core_status train_moe_declare(train_model *model, int32_t layer) {
  train_moe *moe = &model->block[layer].moe;
  moe->index = model->moe_layers++;
  moe->experts = train_settings_experts(model->env->settings, moe->index);
  TRY(train_moe_router_declare(model, moe, layer));
  TRY(train_experts_declare(model, moe, layer));
  return CORE_OK;
}

core_status train_moe_plan(train_model *model, train_moe *moe, const train_arenas *arenas) {
  const train_settings *s = model->env->settings;
  core_arena *arena = arenas->activations;
  int64_t T = model->T, K = s->model.moe.choose;
  TRY(train_moe_router_plan(model, moe, arena));
  TRY(train_take(arena, CORE_UINT8, train_capacity_planned(s, model->limits.training) ? T : 0, K,
                 &moe->keep));
  TRY(train_take(arena, CORE_INT32, T, K, &moe->slot));
  TRY(train_take(arena, CORE_INT32, T * K, 1, &moe->index_rows));
  moe->index_rows.rank = 1;
  TRY(train_take_active(model, arena, T * K, model->C, &moe->returned));
  TRY(train_experts_plan(model, moe, arena));
  TRY(ARENA_TAKE(arenas->host, moe->experts * model->env->layout.expert_ranks, &moe->dispatch.counts));
  TRY(ARENA_TAKE(arenas->host, train_experts_local(model, moe) + 1, &moe->dispatch.group));
  return CORE_OK;
}

/* With one rank in the expert group a row's place at the sender is its place at the expert: the receiving
 * buffers are the sending ones and nothing is copied. */
core_status train_moe_scratch_plan(train_model *model, const train_arenas *arenas) {
  core_arena *arena = arenas->activations;
  train_moe_scratch *s = &model->moe_scratch;
  const train_settings *settings = model->env->settings;
  int64_t E = train_settings_most_experts(settings), e = model->env->layout.expert_ranks;
  int64_t rows = model->T * settings->model.moe.choose, R = model->limits.expert_rows;
  bool alone = e == 1, training = model->limits.training;
  s->expert_rows = R;
  TRY(train_take_active(model, arena, alone ? 0 : rows, model->C, &s->send_x));
  TRY(train_take_active(model, arena, training ? rows : 0, model->C, &s->send_dy));
  TRY(train_take_active(model, arena, training ? rows : 0, model->C, &s->send_dx));
  TRY(train_take_active(model, arena, alone ? 0 : R, model->C, &s->recv_y));
  TRY(train_take_active(model, arena, alone || !training ? 0 : R, model->C, &s->recv_dx));
  TRY(train_experts_scratch_plan(model, arena));
  TRY(train_moe_router_scratch_plan(model, arenas));
  TRY(train_moe_sorted_plan(model, arena));
  if (training && train_settings_balance_groups(settings) > 0)
    TRY(train_mirror_plan(arenas, arena, CORE_INT32, model->T, 1, &s->group));
  TRY(ARENA_TAKE(arenas->host, E + e,
                 &s->send)); /* at an expert: a piece from each rank for each of its own */
  TRY(ARENA_TAKE(arenas->host, E + e, &s->recv));
  TRY(train_capacity_plan(model, arenas));
  return CORE_OK;
}

/* On rows at their sender, an expert's output or its gradient. */
static core_status drop_out(train_model *model, const train_moe *moe, core_tensor rows) {
  train_env *env = model->env;
  int64_t T = model->items.tokens;
  uint64_t stream = core_random_stream(CORE_RANDOM_DROPOUT, (uint64_t)env->step, (uint64_t)moe->index);
  if (moe->dropout > 0)
    KERN(env, dropout, env->settings->run.seed, stream, moe->dropout, train_rows(model->items.key.device, T),
         train_rows(moe->slot, T), train_rows(rows, moe->dispatch.sent));
  return CORE_OK;
}

core_status train_moe_forward(train_model *model, train_moe *moe, core_tensor x, int mode, core_tensor y) {
  train_env *env = model->env;
  const train_settings *s = env->settings;
  int64_t T = x.shape[0];
  TRY(train_moe_route(model, moe, x, mode));
  if (model->observe.call && mode == TRAIN_MODE_EVALUATE)
    TRY(model->observe.call(model->observe.context, model, moe, T));
  moe->capacity = train_capacity_factor(s, mode);
  moe->drops = moe->capacity > 0;
  if (moe->drops) TRY(train_capacity_keep(model, moe));
  TRY(train_dispatch_make(model, moe, T));
  if (mode != TRAIN_MODE_AGAIN) TRY(train_moe_sums_add(model, moe, T, mode));
  TRY(train_experts_forward(model, moe, x));
  moe->dropout = mode == TRAIN_MODE_EVALUATE ? 0 : s->model.moe.dropout;
  TRY(drop_out(model, moe, moe->returned));
  KERN(env, combine_fwd, train_rows(moe->returned, moe->dispatch.sent), train_rows(moe->slot, T),
       train_rows(moe->gate, T), KERN_ADD, y);
  return CORE_OK;
}

core_status train_moe_backward(train_model *model, train_moe *moe, core_tensor x, core_tensor dy,
                               core_tensor weights, core_tensor dx) {
  train_env *env = model->env;
  train_moe_scratch *s = &model->moe_scratch;
  int64_t T = x.shape[0], sent = moe->dispatch.sent;
  core_tensor slot = train_rows(moe->slot, T);
  KERN(env, combine_bwd, dy, train_rows(moe->returned, sent), slot, train_rows(moe->gate, T),
       train_rows(s->send_dy, sent), train_rows(s->d_gate, T));
  TRY(drop_out(model, moe, s->send_dy));
  TRY(train_experts_backward(model, moe, x));
  KERN(env, combine_fwd, train_rows(s->send_dx, sent), slot, train_none(), KERN_SET, dx);
  TRY(train_moe_route_backward(model, moe, x, weights, dx));
  return CORE_OK;
}
