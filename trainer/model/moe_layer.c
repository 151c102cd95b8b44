/* Mixture of experts (METHODS sections 0 and 1; Mustafa et al. 2022; Riquelme et al. 2021):
 *   l = W_g x (+ b), noise in training: l~ = l + N(0, noise / E);  chosen = the K largest l~;  gate =
 * softmax(l~) of the chosen (or renormalised over them);  y += sum over the chosen and kept of gate_e
 * FFN_e(x) with FFN_e(x) = act(x W1^T + b1) W2^T + b2, biases where configured, and dropout on it in
 * training. Forward: router -> keep -> plan -> gather -> all-to-all -> experts -> all-to-all -> combine.
 * Backward mirrors it.
 *
 * With model.moe.partition (a baseline: each modality has experts of its own, as in VLMo, Bao et al. 2022) b
 * is so low for those of the others that their probability is exactly 0: they are not chosen, and no loss and
 * no gradient of the token reaches them.
 *
 * Expert buffers have R rows. Where more arrive, the stream is taken in rounds; only the last round's
 * activations stay, the others are sent and computed again in backward. Imbalance costs time, never memory.
 */
#include "core/random.h"
#include "trainer/model/tower.h"

/* Far below any logit and far from the end of float32: exp(forbidden - l) is 0, and it may be squared and
 * divided by a small sigma. */
static const double forbidden = -1e9;

core_status train_moe_sums_clear(const train_env *env, const train_moe_sums *sums) {
  TRY(train_mirror_clear(env, &sums->value));
  TRY(train_mirror_clear(env, &sums->count));
  TRY(train_mirror_clear(env, &sums->gate));
  return CORE_OK;
}

core_status train_moe_sums_down(const train_env *env, const train_moe_sums *sums) {
  TRY(train_mirror_down(env, &sums->value, sums->value.device.shape[0]));
  TRY(train_mirror_down(env, &sums->count, sums->count.device.shape[0]));
  TRY(train_mirror_down(env, &sums->gate, sums->gate.device.shape[0]));
  const core_real *gate = sums->gate.host;
  for (int64_t i = 0; i < train_moe_gate_count(sums); i++) sums->gate_sum[i] = (double)gate[i];
  return CORE_OK;
}

core_status train_moe_declare(train_model *model, int32_t layer) {
  train_moe *moe = &model->block[layer].moe;
  moe->index = model->moe_layers++;
  moe->router_bias = -1;
  train_parameter router = {
      .rank = 2,
      .shape = {model->env->settings->model.moe.experts, model->C},
      .init = TRAIN_INIT_NORMAL,
      .init_value = 0.02}; /* not zero: the entropy losses have no gradient at uniform */
  TRY(train_declare(model, router, &moe->router, "blocks.%d.router.weight", layer));
  train_parameter bias = {.rank = 1, .shape = {router.shape[0]}};
  if (model->env->settings->model.moe.bias)
    TRY(train_declare(model, bias, &moe->router_bias, "blocks.%d.router.bias", layer));
  TRY(train_experts_declare(model, moe, layer));
  return CORE_OK;
}

core_status train_moe_plan(train_model *model, train_moe *moe, const train_arenas *arenas) {
  const train_settings *s = model->env->settings;
  core_arena *arena = arenas->activations;
  int64_t T = model->T, E = s->model.moe.experts, K = s->model.moe.choose, C = model->C;
  bool noise = s->model.moe.noise > 0 && model->limits.training;
  TRY(train_take(arena, CORE_REAL_DTYPE, T, E, &moe->logits));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, E, &moe->prob));
  TRY(train_take(arena, CORE_REAL_DTYPE, noise ? T : 0, E, &moe->noisy));
  TRY(train_take(arena, CORE_REAL_DTYPE, noise ? T : 0, E, &moe->noisy_prob));
  TRY(train_take(arena, CORE_INT32, T, K, &moe->choice));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, K, &moe->gate));
  TRY(train_take(arena, CORE_UINT8, train_capacity_planned(s, model->limits.training) ? T : 0, K,
                 &moe->keep));
  TRY(train_take(arena, CORE_INT32, T, K, &moe->slot));
  TRY(train_take(arena, CORE_INT32, T * K, 1, &moe->index_rows));
  moe->index_rows.rank = 1;
  TRY(train_take_active(model, arena, T * K, C, &moe->returned));
  TRY(train_experts_plan(model, moe, arena));
  TRY(ARENA_TAKE(arenas->host, E * model->env->layout.expert_ranks, &moe->dispatch.counts));
  TRY(ARENA_TAKE(arenas->host, train_experts_local(model) + 1, &moe->dispatch.group));
  return CORE_OK;
}

static core_status plan_mask(train_model *model, const train_arenas *arenas) {
  const train_settings *s = model->env->settings;
  int64_t M = model->env->layout.modalities, E = s->model.moe.experts;
  if (s->model.moe.partition == TRAIN_PARTITION_NONE) return CORE_OK;
  train_moe_scratch *scratch = &model->moe_scratch;
  TRY(train_mirror_plan(arenas, arenas->parameters, CORE_REAL_DTYPE, M, E, &scratch->mask));
  if (s->model.moe.bias) TRY(train_take(arenas->parameters, CORE_REAL_DTYPE, M, E, &scratch->masked_bias));
  return CORE_OK;
}

core_status train_moe_scratch_prepare(train_model *model) {
  const train_settings *s = model->env->settings;
  const train_mirror *mask = &model->moe_scratch.mask;
  core_real *value = mask->host;
  if (!value) return CORE_OK;
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    int64_t first, count;
    train_settings_expert_share(s, m, &first, &count);
    for (int64_t e = 0; e < s->model.moe.experts; e++)
      *value++ = e >= first && e < first + count ? 0 : (core_real)forbidden;
  }
  TRY(train_mirror_up(model->env, mask, mask->device.shape[0]));
  return CORE_OK;
}

static bool sorts(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_DECODER;
}

static core_status plan_sorted(train_model *model, core_arena *arena) {
  train_moe_scratch *s = &model->moe_scratch;
  const train_settings *settings = model->env->settings;
  int64_t E = settings->model.moe.experts, K = settings->model.moe.choose, T = model->T;
  core_tensor *real[] = {&s->sorted_logits, &s->sorted_prob, &s->sorted_noisy, &s->sorted_d};
  if (!sorts(model)) return CORE_OK;
  for (size_t i = 0; i < sizeof real / sizeof *real; i++)
    TRY(train_take(arena, CORE_REAL_DTYPE, T, E, real[i]));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, K, &s->sorted_gate));
  TRY(train_take(arena, CORE_INT32, T, K, &s->sorted_choice));
  TRY(train_take(arena, CORE_INT32, T, K, &s->sorted_slot));
  return CORE_OK;
}

/* With one rank in the expert group a row's place at the sender is its place at the expert: the receiving
 * buffers are the sending ones and nothing is copied. */
core_status train_moe_scratch_plan(train_model *model, const train_arenas *arenas) {
  core_arena *arena = arenas->activations;
  train_moe_scratch *s = &model->moe_scratch;
  const train_settings *settings = model->env->settings;
  int64_t K = settings->model.moe.choose, E = settings->model.moe.experts;
  int64_t rows = model->T * K, R = model->limits.expert_rows, e = model->env->layout.expert_ranks;
  bool alone = e == 1, training = model->limits.training;
  s->expert_rows = R;
  TRY(train_take_active(model, arena, alone ? 0 : rows, model->C, &s->send_x));
  TRY(train_take_active(model, arena, training ? rows : 0, model->C, &s->send_dy));
  TRY(train_take_active(model, arena, training ? rows : 0, model->C, &s->send_dx));
  TRY(train_take_active(model, arena, alone ? 0 : R, model->C, &s->recv_y));
  TRY(train_take_active(model, arena, alone || !training ? 0 : R, model->C, &s->recv_dx));
  TRY(train_experts_scratch_plan(model, arena));
  TRY(train_take(arena, CORE_REAL_DTYPE, training ? model->T : 0, K, &s->d_gate));
  TRY(train_take(arena, CORE_REAL_DTYPE, training ? model->T : 0, E, &s->d_logits));
  TRY(plan_sorted(model, arena));
  TRY(ARENA_TAKE(arenas->host, E, &s->send));
  TRY(ARENA_TAKE(arenas->host, E, &s->recv));
  TRY(plan_mask(model, arenas));
  TRY(train_capacity_plan(model, arenas));
  return CORE_OK;
}

/* ---- forward ---- */

/* Rows of modality m, or of the decoder's own tokens behind the last, in a tensor of all tokens by class. */
static core_tensor of_modality(const train_model *model, int32_t m, core_tensor all) {
  const int64_t *first = model->items.row_first;
  return train_slice(all, first[m], first[m + 1] - first[m]);
}

/* Row `index` of a matrix, as a vector. */
static core_tensor cell(core_tensor matrix, int64_t index) {
  core_tensor row = train_slice(matrix, index, 1);
  return core_tensor_1(row.data, row.dtype, row.shape[1]);
}

/* What is added to the logits of modality m's tokens under a partition: the mask, and the layer's bias. */
static core_status mask_of(train_model *model, const train_moe *moe, int32_t m, core_tensor *out) {
  train_env *env = model->env;
  *out = cell(model->moe_scratch.mask.device, m);
  if (moe->router_bias < 0) return CORE_OK;
  core_tensor bias = train_parameter_value(&model->parameters, moe->router_bias), mask = *out;
  *out = cell(model->moe_scratch.masked_bias, m);
  TRY(env->ops->device->copy(out->data, bias.data, core_tensor_bytes(&bias), NULL));
  KERN(env, axpy, 1, mask, *out);
  return CORE_OK;
}

static core_status logits_of(train_model *model, train_moe *moe, core_tensor x, core_tensor logits) {
  train_env *env = model->env;
  core_tensor weight = train_parameter_value(&model->parameters, moe->router), bias = train_none();
  if (env->settings->model.moe.partition == TRAIN_PARTITION_NONE) {
    if (moe->router_bias >= 0) bias = train_parameter_value(&model->parameters, moe->router_bias);
    KERN(env, router_logits, x, weight, bias, logits);
    return CORE_OK;
  }
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    TRY(mask_of(model, moe, m, &bias));
    KERN(env, router_logits, of_modality(model, m, x), weight, bias, of_modality(model, m, logits));
  }
  return CORE_OK;
}

static core_status route(train_model *model, train_moe *moe, core_tensor x, train_mode mode) {
  train_env *env = model->env;
  const train_settings *s = env->settings;
  int64_t T = x.shape[0];
  core_tensor logits = train_rows(moe->logits, T), prob = train_rows(moe->prob, T);
  core_tensor noisy = logits, noisy_prob = prob;
  TRY(logits_of(model, moe, x, logits));
  moe->noise = s->model.moe.noise > 0 && mode != TRAIN_MODE_EVALUATE;
  if (moe->noise) {
    KERN(env, softmax_fwd, logits, prob);
    noisy = train_rows(moe->noisy, T);
    noisy_prob = train_rows(moe->noisy_prob, T);
    uint64_t stream = core_random_stream(CORE_RANDOM_ROUTER, (uint64_t)env->step, (uint64_t)moe->index);
    KERN(env, router_noise, logits, s->run.seed, stream, train_rows(model->items.key.device, T),
         s->model.moe.noise / (double)s->model.moe.experts, noisy);
  }
  KERN(env, router_choose, (kern_gate)s->model.moe.gate, noisy, noisy_prob, train_rows(moe->choice, T),
       train_rows(moe->gate, T));
  return CORE_OK;
}

static core_tensor noisy_logits(const train_moe *moe, int64_t T) {
  return train_rows(moe->noise ? moe->noisy : moe->logits, T);
}

static core_tensor noisy_prob(const train_moe *moe, int64_t T) {
  return train_rows(moe->noise ? moe->noisy_prob : moe->prob, T);
}

static double noise_deviation(const train_model *model, const train_moe *moe) {
  const train_settings *s = model->env->settings;
  return moe->noise ? s->model.moe.noise / (double)s->model.moe.experts : 0;
}

/* The router's tensors by class. */
typedef struct routed {
  core_tensor logits, prob, noisy, choice, slot, gate;
} routed;

static core_status gather(train_model *model, core_tensor from, core_tensor to, core_tensor *out) {
  *out = train_rows(to, from.shape[0]);
  KERN(model->env, gather_rows, from, train_rows(model->decoder.order.device, from.shape[0]), *out);
  return CORE_OK;
}

/* A tower's rows lie by class already. */
static core_status by_class(train_model *model, const train_moe *moe, int64_t T, routed *out) {
  const train_moe_scratch *s = &model->moe_scratch;
  *out = (routed){train_rows(moe->logits, T), train_rows(moe->prob, T), noisy_logits(moe, T),
                  train_rows(moe->choice, T), train_rows(moe->slot, T), train_rows(moe->gate, T)};
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

static core_status add_sums(train_model *model, train_moe *moe, core_tensor x) {
  train_env *env = model->env;
  const train_moe_sums *sums = &model->sums;
  routed r;
  TRY(by_class(model, moe, x.shape[0], &r));
  for (int32_t c = 0; c < sums->modalities; c++) {
    int64_t at = (int64_t)moe->index * sums->modalities + c;
    KERN(env, router_sums, of_modality(model, c, r.logits), of_modality(model, c, r.prob),
         of_modality(model, c, r.noisy), of_modality(model, c, r.choice), noise_deviation(model, moe),
         cell(sums->value.device, at));
    KERN(env, router_count, of_modality(model, c, r.choice), of_modality(model, c, r.slot),
         cell(sums->count.device, at));
    KERN(env, bias_bwd, of_modality(model, c, r.gate), cell(sums->gate.device, at)); /* sums over rows */
  }
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
  TRY(route(model, moe, x, (train_mode)mode));
  moe->capacity = train_capacity_factor(s, mode);
  moe->drops = moe->capacity > 0;
  if (moe->drops) TRY(train_capacity_keep(model, moe));
  TRY(train_dispatch_make(model, moe, T));
  if (mode != TRAIN_MODE_AGAIN) TRY(add_sums(model, moe, x));
  TRY(train_experts_forward(model, moe, x));
  moe->dropout = mode == TRAIN_MODE_EVALUATE ? 0 : s->model.moe.dropout;
  TRY(drop_out(model, moe, moe->returned));
  KERN(env, combine_fwd, train_rows(moe->returned, moe->dispatch.sent), train_rows(moe->slot, T),
       train_rows(moe->gate, T), KERN_ADD, y);
  return CORE_OK;
}

/* ---- backward ---- */

/* Adds the gradients of the losses that are made of this layer's sums. */
static core_status sums_backward(train_model *model, train_moe *moe, int64_t T, core_tensor weights,
                                 core_tensor d_logits) {
  train_env *env = model->env;
  routed r;
  core_tensor d = sorts(model) ? train_rows(model->moe_scratch.sorted_d, T) : d_logits;
  TRY(by_class(model, moe, T, &r));
  if (sorts(model)) KERN(env, fill, 0, d);
  for (int32_t c = 0; c < model->sums.modalities; c++)
    KERN(env, router_sums_bwd, cell(weights, c), of_modality(model, c, r.logits),
         of_modality(model, c, r.prob), of_modality(model, c, r.noisy), of_modality(model, c, r.choice),
         noise_deviation(model, moe), of_modality(model, c, d));
  if (sorts(model))
    KERN(env, combine_fwd, d, train_rows(model->decoder.place.device, T), train_none(), KERN_ADD, d_logits);
  return CORE_OK;
}

static core_status router_backward(train_model *model, train_moe *moe, core_tensor x, core_tensor weights,
                                   core_tensor dx) {
  train_env *env = model->env;
  train_parameters *p = &model->parameters;
  int64_t T = x.shape[0];
  core_tensor d_logits = train_rows(model->moe_scratch.d_logits, T);
  KERN(env, router_gate_bwd, (kern_gate)env->settings->model.moe.gate,
       train_rows(model->moe_scratch.d_gate, T), noisy_prob(moe, T), train_rows(moe->choice, T),
       train_rows(moe->gate, T), KERN_SET, d_logits);
  if (weights.data) TRY(sums_backward(model, moe, T, weights, d_logits));
  KERN(env, router_logits_bwd, d_logits, x, train_parameter_value(p, moe->router), KERN_ADD, dx,
       train_parameter_gradient(p, moe->router),
       moe->router_bias < 0 ? train_none() : train_parameter_gradient(p, moe->router_bias));
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
  TRY(router_backward(model, moe, x, weights, dx));
  return CORE_OK;
}
