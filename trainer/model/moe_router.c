/* The router of a mixture (METHODS section 0; Riquelme et al. 2021):
 *   l = W_g x (+ b), noise in training: l~ = l + N(0, noise / E);  chosen = the K largest l~;  gate =
 * softmax(l~) of the chosen (or renormalised over them). In training the second of two may be drawn instead
 * (Lepikhin et al. 2021): the largest of l + g of the others, g Gumbel; the gates are those of l.
 *
 * With model.moe.partition (a baseline: each modality has experts of its own, as in VLMo, Bao et al. 2022) b
 * is so low for those of the others that their probability is exactly 0: they are not chosen, and no loss and
 * no gradient of the token reaches them.
 *
 * The columns (rows of W_g) of experts that were added to a model are tensors of their own, so that the old
 * ones can be frozen. Old and added ones are declared one after another: products see them as one matrix. */
#include "core/random.h"
#include "trainer/model/tower.h"

/* Far below any logit and far from the end of float32: exp(forbidden - l) is 0, and it may be squared and
 * divided by a small sigma. */
static const double forbidden = -1e9;

/* ---- parameters and memory ---- */

core_status train_moe_router_declare(train_model *model, train_moe *moe, int32_t layer) {
  const train_settings *s = model->env->settings;
  moe->added = train_settings_added(s, moe->index);
  moe->router_bias = moe->router_added = moe->router_added_bias = -1;
  train_parameter router = {
      .rank = 2,
      .shape = {moe->experts - moe->added, model->C},
      .init = TRAIN_INIT_NORMAL,
      .init_value = 0.02}; /* not zero: the entropy losses have no gradient at uniform */
  train_parameter bias = {.rank = 1, .shape = {router.shape[0]}};
  TRY(train_declare(model, router, &moe->router, "blocks.%d.router.weight", layer));
  router.shape[0] = moe->added;
  if (moe->added > 0)
    TRY(train_declare(model, router, &moe->router_added, "blocks.%d.router.added.weight", layer));
  if (s->model.moe.bias) TRY(train_declare(model, bias, &moe->router_bias, "blocks.%d.router.bias", layer));
  bias.shape[0] = moe->added;
  if (moe->added > 0 && (s->model.moe.bias || s->model.moe.added_bias))
    TRY(train_declare(model, bias, &moe->router_added_bias, "blocks.%d.router.added.bias", layer));
  moe->calibrated = train_settings_calibrated(s, moe->index);
  if (moe->calibrated) TRY(train_calibration_declare(model, moe, layer));
  return CORE_OK;
}

core_status train_moe_router_plan(train_model *model, train_moe *moe, core_arena *arena) {
  const train_settings *s = model->env->settings;
  int64_t T = model->T, E = moe->experts, K = s->model.moe.choose;
  int64_t noisy = s->model.moe.noise > 0 && model->limits.training ? T : 0;
  TRY(train_take(arena, CORE_REAL_DTYPE, T, E, &moe->logits));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, E, &moe->prob));
  TRY(train_take(arena, CORE_REAL_DTYPE, noisy, E, &moe->noisy));
  TRY(train_take(arena, CORE_REAL_DTYPE, noisy, E, &moe->noisy_prob));
  TRY(train_take(arena, CORE_INT32, T, K, &moe->choice));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, K, &moe->gate));
  if (moe->calibrated) TRY(train_calibration_plan(model, moe, arena));
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

core_status train_moe_router_scratch_plan(train_model *model, const train_arenas *arenas) {
  train_moe_scratch *s = &model->moe_scratch;
  const train_settings *settings = model->env->settings;
  core_arena *arena = arenas->activations;
  int64_t E = train_settings_most_experts(settings), T = model->limits.training ? model->T : 0;
  int64_t added = settings->model.moe.added_count > 0 ? E : 0;
  TRY(train_take(arena, CORE_REAL_DTYPE, T, settings->model.moe.choose, &s->d_gate));
  TRY(train_take(arena, CORE_REAL_DTYPE, T, E, &s->d_logits));
  TRY(train_take(arena, CORE_REAL_DTYPE, added, 1, &s->router_bias));
  TRY(train_take(arena, CORE_REAL_DTYPE, T > 0 ? added : 0, model->C, &s->d_router));
  TRY(train_take(arena, CORE_REAL_DTYPE, T > 0 ? added : 0, 1, &s->d_router_bias));
  if (settings->model.moe.calibration != TRAIN_CALIBRATION_NONE && T > 0)
    TRY(train_calibration_scratch_plan(model, arena));
  TRY(plan_mask(model, arenas));
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

/* ---- forward ---- */

/* A row of a matrix, as a vector. */
static core_tensor cell(core_tensor matrix, int64_t index) {
  core_tensor row = train_slice(matrix, index, 1);
  return core_tensor_1(row.data, row.dtype, row.shape[1]);
}

static core_tensor of_modality(const train_model *model, int32_t m, core_tensor all) {
  const int64_t *first = model->items.row_first;
  return train_slice(all, first[m], first[m + 1] - first[m]);
}

/* All columns, the old and the added. */
static core_tensor columns_of(const train_model *model, const train_moe *moe) {
  return train_rows(train_parameter_value(&model->parameters, moe->router), moe->experts);
}

/* The bias of all columns, absent where there is none; where only the added ones have one, the others' is 0.
 */
static core_status bias_of(train_model *model, const train_moe *moe, core_tensor *out) {
  train_env *env = model->env;
  const train_parameters *p = &model->parameters;
  *out = train_none();
  if (moe->router_bias >= 0) *out = train_rows(train_parameter_value(p, moe->router_bias), moe->experts);
  if (moe->router_bias >= 0 || moe->router_added_bias < 0) return CORE_OK;
  core_tensor added = train_parameter_value(p, moe->router_added_bias);
  *out = core_tensor_1(model->moe_scratch.router_bias.data, CORE_REAL_DTYPE, moe->experts);
  KERN(env, fill, 0, *out);
  KERN(env, axpy, 1, added, train_slice(*out, moe->experts - moe->added, moe->added));
  return CORE_OK;
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
  core_tensor weight = columns_of(model, moe), bias;
  if (env->settings->model.moe.partition == TRAIN_PARTITION_NONE) {
    TRY(bias_of(model, moe, &bias));
    KERN(env, router_logits, x, weight, bias, logits);
    return CORE_OK;
  }
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    TRY(mask_of(model, moe, m, &bias));
    KERN(env, router_logits, of_modality(model, m, x), weight, bias, of_modality(model, m, logits));
  }
  return CORE_OK;
}

double train_moe_deviation(const train_model *model, const train_moe *moe) {
  return moe->noise ? model->env->settings->model.moe.noise / (double)moe->experts : 0;
}

/* The second choice by the logits makes way for one that is drawn; the gates follow it. */
static core_status draw_second(train_model *model, train_moe *moe, core_tensor logits, core_tensor prob) {
  train_env *env = model->env;
  const train_settings *s = env->settings;
  int64_t T = logits.shape[0];
  core_tensor choice = train_rows(moe->choice, T);
  if (s->model.moe.second_noise != TRAIN_SECOND_GUMBEL) return CORE_OK;
  uint64_t stream = core_random_stream(CORE_RANDOM_SECOND, (uint64_t)env->step, (uint64_t)moe->index);
  KERN(env, router_second, logits, s->run.seed, stream, train_rows(model->items.key.device, T), choice);
  KERN(env, router_gate_fwd, (kern_gate)s->model.moe.gate, KERN_CALIBRATE_ADD, prob, train_none(), choice,
       train_rows(moe->gate, T));
  return CORE_OK;
}

core_status train_moe_route(train_model *model, train_moe *moe, core_tensor x, int mode) {
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
         train_moe_deviation(model, moe), noisy);
  }
  KERN(env, router_choose, (kern_gate)s->model.moe.gate, noisy, noisy_prob, train_rows(moe->choice, T),
       train_rows(moe->gate, T));
  if (mode != TRAIN_MODE_EVALUATE) TRY(draw_second(model, moe, logits, prob));
  if (moe->calibrated) TRY(train_calibration_forward(model, moe, x, noisy_prob));
  return CORE_OK;
}

/* ---- backward ---- */

core_tensor train_trained_gradient(const train_model *model, int32_t index) {
  bool trained = train_parameter_trained(&model->parameters, index);
  return trained ? train_parameter_gradient(&model->parameters, index) : train_none();
}

static core_status add_part(train_model *model, int32_t index, core_tensor all, int64_t first) {
  core_tensor gradient = train_trained_gradient(model, index);
  if (gradient.data) KERN(model->env, axpy, 1, train_slice(all, first, gradient.shape[0]), gradient);
  return CORE_OK;
}

/* Old and added columns whose gradients need not lie together: first all of them, then to those that train.
 */
static core_status columns_backward(train_model *model, train_moe *moe, core_tensor x, core_tensor d_logits,
                                    core_tensor dx) {
  train_env *env = model->env;
  const train_moe_scratch *s = &model->moe_scratch;
  int64_t old = moe->experts - moe->added;
  core_tensor columns = core_tensor_2(s->d_router.data, CORE_REAL_DTYPE, moe->experts, model->C);
  core_tensor bias = train_none();
  KERN(env, fill, 0, columns);
  if (moe->router_added_bias >= 0) {
    bias = core_tensor_1(s->d_router_bias.data, CORE_REAL_DTYPE, moe->experts);
    KERN(env, fill, 0, bias);
  }
  KERN(env, router_logits_bwd, d_logits, x, columns_of(model, moe), KERN_ADD, dx, columns, bias);
  TRY(add_part(model, moe->router, columns, 0));
  TRY(add_part(model, moe->router_added, columns, old));
  TRY(add_part(model, moe->router_bias, bias, 0));
  TRY(add_part(model, moe->router_added_bias, bias, old));
  return CORE_OK;
}

core_status train_moe_route_backward(train_model *model, train_moe *moe, core_tensor x, core_tensor weights,
                                     core_tensor dx) {
  train_env *env = model->env;
  int64_t T = x.shape[0];
  core_tensor d_logits = core_tensor_2(model->moe_scratch.d_logits.data, CORE_REAL_DTYPE, T, moe->experts);
  core_tensor prob = train_rows(moe->noise ? moe->noisy_prob : moe->prob, T);
  if (moe->calibrated)
    TRY(train_calibration_backward(model, moe, x, prob, d_logits, dx));
  else
    KERN(env, router_gate_bwd, (kern_gate)env->settings->model.moe.gate,
         train_rows(model->moe_scratch.d_gate, T), prob, train_rows(moe->choice, T), train_rows(moe->gate, T),
         KERN_SET, d_logits);
  if (weights.data) TRY(train_moe_sums_backward(model, moe, T, weights, d_logits));
  if (moe->added > 0) return columns_backward(model, moe, x, d_logits, dx);
  KERN(env, router_logits_bwd, d_logits, x, columns_of(model, moe), KERN_ADD, dx,
       train_trained_gradient(model, moe->router), train_trained_gradient(model, moe->router_bias));
  return CORE_OK;
}
