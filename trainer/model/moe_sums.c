/* Sums over tokens that the router's losses and the health figures are made of, and the gradients of these
 * losses. They are taken class by class; a tower's rows lie by class already, a decoder's are brought in that
 * order. */
#include "trainer/model/tower.h"

core_status train_moe_sums_clear(const train_env *env, const train_moe_sums *sums) {
  TRY(train_mirror_clear(env, &sums->value));
  TRY(train_mirror_clear(env, &sums->count));
  TRY(train_mirror_clear(env, &sums->gate));
  if (sums->groups > 0) TRY(train_mirror_clear(env, &sums->balance));
  return CORE_OK;
}

core_status train_moe_sums_down(const train_env *env, const train_moe_sums *sums) {
  TRY(train_mirror_down(env, &sums->value, sums->value.device.shape[0]));
  TRY(train_mirror_down(env, &sums->count, sums->count.device.shape[0]));
  TRY(train_mirror_down(env, &sums->gate, sums->gate.device.shape[0]));
  if (sums->groups > 0) TRY(train_mirror_down(env, &sums->balance, sums->balance.device.shape[0]));
  const core_real *gate = sums->gate.host;
  for (int64_t i = 0; i < train_moe_gate_count(sums); i++) sums->gate_sum[i] = (double)gate[i];
  return CORE_OK;
}

static bool sorts(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_DECODER;
}

core_status train_moe_sorted_plan(train_model *model, core_arena *arena) {
  train_moe_scratch *s = &model->moe_scratch;
  const train_settings *settings = model->env->settings;
  int64_t E = train_settings_most_experts(settings), K = settings->model.moe.choose, T = model->T;
  core_tensor *real[] = {&s->sorted_logits, &s->sorted_prob, &s->sorted_noisy, &s->sorted_d};
  if (!sorts(model)) return CORE_OK;
  for (size_t i = 0; i < sizeof real / sizeof *real; i++)
    TRY(train_take(arena, CORE_REAL_DTYPE, T, E, real[i]));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, K, &s->sorted_gate));
  TRY(train_take(arena, CORE_INT32, T, K, &s->sorted_choice));
  TRY(train_take(arena, CORE_INT32, T, K, &s->sorted_slot));
  return CORE_OK;
}

/* Rows of class c in a tensor of all tokens by class. */
static core_tensor of_class(const train_model *model, int32_t c, core_tensor all) {
  const int64_t *first = model->items.row_first;
  return train_slice(all, first[c], first[c + 1] - first[c]);
}

/* The first `count` numbers of a row: a layer's with fewer experts than the largest. */
static core_tensor cell(core_tensor matrix, int64_t index, int64_t count) {
  core_tensor row = train_slice(matrix, index, 1);
  return core_tensor_1(row.data, row.dtype, count);
}

/* ---- groups of a balance loss ---- */

core_status train_moe_groups_take(train_model *model) {
  const train_settings *s = model->env->settings;
  const train_items *items = &model->items;
  const uint64_t *key = items->key.host;
  int32_t *group = model->moe_scratch.group.host;
  bool local = s->objective.balance_scope == TRAIN_BALANCE_LOCAL;
  uint64_t samples = (uint64_t)s->model.moe.group_samples * (uint64_t)model->env->layout.modalities;
  if (!group) return CORE_OK;
  for (int64_t row = 0; row < items->tokens; row++)
    group[row] = local ? (int32_t)((key[row] >> 24) / samples) : 0;
  TRY(train_mirror_up(model->env, &model->moe_scratch.group, items->tokens));
  return CORE_OK;
}

/* The groups of the current rows, as a vector. */
static core_tensor groups_of(const train_model *model) {
  return core_tensor_1(model->moe_scratch.group.device.data, CORE_INT32, model->items.tokens);
}

static core_status add_balance(train_model *model, const train_moe *moe, int64_t T) {
  train_env *env = model->env;
  const train_moe_sums *sums = &model->sums;
  bool first = env->settings->objective.balance_shares == TRAIN_SHARES_FIRST;
  core_tensor part = train_slice(sums->balance.device, moe->index * sums->groups, sums->groups);
  KERN(env, router_balance, train_rows(moe->prob, T), train_rows(moe->choice, T), groups_of(model),
       first ? 1 : sums->choices, core_tensor_2(part.data, CORE_FLOAT64, sums->groups, 1 + 2 * moe->experts));
  return CORE_OK;
}

static core_status balance_backward(train_model *model, const train_moe *moe, int64_t T,
                                    core_tensor d_logits) {
  train_env *env = model->env;
  const train_moe_sums *sums = &model->sums;
  core_tensor part = train_slice(sums->balance_weights.device, moe->index * sums->groups, sums->groups);
  KERN(env, router_balance_bwd, core_tensor_2(part.data, CORE_FLOAT64, sums->groups, moe->experts),
       groups_of(model), train_rows(moe->prob, T), d_logits);
  return CORE_OK;
}

/* ---- by class ---- */

/* The router's tensors by class. */
typedef struct routed {
  core_tensor logits, prob, noisy, choice, slot, gate;
} routed;

static core_status gather(train_model *model, core_tensor from, core_tensor to, core_tensor *out) {
  *out = core_tensor_2(to.data, to.dtype, from.shape[0], from.shape[1]);
  KERN(model->env, gather_rows, from, train_rows(model->decoder.order.device, from.shape[0]), *out);
  return CORE_OK;
}

static core_status by_class(train_model *model, const train_moe *moe, int64_t T, routed *out) {
  const train_moe_scratch *s = &model->moe_scratch;
  *out = (routed){train_rows(moe->logits, T),
                  train_rows(moe->prob, T),
                  train_rows(moe->noise ? moe->noisy : moe->logits, T),
                  train_rows(moe->choice, T),
                  train_rows(moe->slot, T),
                  train_rows(moe->gate, T)};
  if (!sorts(model)) return CORE_OK;
  TRY(gather(model, out->logits, s->sorted_logits, &out->logits));
  TRY(gather(model, out->prob, s->sorted_prob, &out->prob));
  if (moe->noise)
    TRY(gather(model, out->noisy, s->sorted_noisy, &out->noisy));
  else
    out->noisy = out->logits;
  TRY(gather(model, out->choice, s->sorted_choice, &out->choice));
  TRY(gather(model, out->slot, s->sorted_slot, &out->slot));
  TRY(gather(model, out->gate, s->sorted_gate, &out->gate));
  return CORE_OK;
}

core_status train_moe_sums_add(train_model *model, const train_moe *moe, int64_t T, int mode) {
  train_env *env = model->env;
  const train_moe_sums *sums = &model->sums;
  int64_t E = moe->experts;
  routed r;
  TRY(by_class(model, moe, T, &r));
  for (int32_t c = 0; c < sums->modalities; c++) {
    int64_t at = (int64_t)moe->index * sums->modalities + c;
    KERN(env, router_sums, of_class(model, c, r.logits), of_class(model, c, r.prob),
         of_class(model, c, r.noisy), of_class(model, c, r.choice), train_moe_deviation(model, moe),
         cell(sums->value.device, at, kern_router_sums_count(E)));
    KERN(env, router_count, of_class(model, c, r.choice), of_class(model, c, r.slot),
         cell(sums->count.device, at, 2 * E + 2));
    KERN(env, bias_bwd, of_class(model, c, r.gate),
         cell(sums->gate.device, at, sums->choices)); /* sums rows */
  }
  if (sums->groups > 0 && mode == TRAIN_MODE_TRAIN) TRY(add_balance(model, moe, T));
  return CORE_OK;
}

core_status train_moe_sums_backward(train_model *model, const train_moe *moe, int64_t T, core_tensor weights,
                                    core_tensor d_logits) {
  train_env *env = model->env;
  routed r;
  core_tensor d = d_logits;
  TRY(by_class(model, moe, T, &r));
  if (model->sums.groups > 0) TRY(balance_backward(model, moe, T, d_logits));
  if (sorts(model)) {
    d = core_tensor_2(model->moe_scratch.sorted_d.data, CORE_REAL_DTYPE, T, moe->experts);
    KERN(env, fill, 0, d);
  }
  for (int32_t c = 0; c < model->sums.modalities; c++)
    KERN(env, router_sums_bwd, cell(weights, c, kern_router_sums_count(moe->experts)),
         of_class(model, c, r.logits), of_class(model, c, r.prob), of_class(model, c, r.noisy),
         of_class(model, c, r.choice), train_moe_deviation(model, moe), of_class(model, c, d));
  if (sorts(model))
    KERN(env, combine_fwd, d, train_rows(model->decoder.place.device, T), train_none(), KERN_ADD, d_logits);
  return CORE_OK;
}
