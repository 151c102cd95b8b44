/* Calibration of a mixture that experts were added to (Zhong et al. 2024): which are chosen is the router's
 * alone; the weights p of the chosen are corrected,
 *   add: p + c(p);   multiply: p (1 + c(x));   c(v) = W_out GELU(W_in v), 16 hidden,
 * at least 1e-6, and divided by their sum (model.moe.calibration_renormalize). W_out = 0 at first: the
 * correction begins at nothing. p is the softmax over all experts, with its noise where there is some. All of
 * it is float32, by the router's product, which a token's neighbours do not touch. */
#include "trainer/model/tower.h"

core_status train_calibration_declare(train_model *model, train_moe *moe, int32_t layer) {
  bool adds = model->env->settings->model.moe.calibration == TRAIN_CALIBRATION_ADD;
  train_parameter in = {.rank = 2,
                        .shape = {TRAIN_CALIBRATION_WIDTH, adds ? moe->experts : model->C},
                        .init = TRAIN_INIT_NORMAL,
                        .init_value = 0.02,
                        .decay = true};
  train_parameter out = {.rank = 2, .shape = {moe->experts, TRAIN_CALIBRATION_WIDTH}, .decay = true};
  TRY(train_declare(model, in, &moe->calibration_in, "blocks.%d.calibration.in.weight", layer));
  TRY(train_declare(model, out, &moe->calibration_out, "blocks.%d.calibration.out.weight", layer));
  return CORE_OK;
}

core_status train_calibration_plan(train_model *model, train_moe *moe, core_arena *arena) {
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, TRAIN_CALIBRATION_WIDTH, &moe->before));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, TRAIN_CALIBRATION_WIDTH, &moe->between));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, moe->experts, &moe->correction));
  return CORE_OK;
}

core_status train_calibration_scratch_plan(train_model *model, core_arena *arena) {
  train_moe_scratch *s = &model->moe_scratch;
  int64_t E = train_settings_most_experts(model->env->settings);
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, E, &s->d_prob));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, E, &s->d_correction));
  TRY(train_take(arena, CORE_REAL_DTYPE, model->T, TRAIN_CALIBRATION_WIDTH, &s->d_between));
  return CORE_OK;
}

static bool adds(const train_model *model) {
  return model->env->settings->model.moe.calibration == TRAIN_CALIBRATION_ADD;
}

static kern_calibration kind_of(const train_model *model) {
  return adds(model) ? KERN_CALIBRATE_ADD : KERN_CALIBRATE_MULTIPLY;
}

static kern_gate form_of(const train_model *model) {
  return model->env->settings->model.moe.calibration_renormalize ? KERN_GATE_RENORMALISED : KERN_GATE_SOFTMAX;
}

core_status train_calibration_forward(train_model *model, train_moe *moe, core_tensor x, core_tensor prob) {
  train_env *env = model->env;
  const train_parameters *p = &model->parameters;
  int64_t T = x.shape[0];
  core_tensor before = train_rows(moe->before, T), between = train_rows(moe->between, T);
  core_tensor correction = train_rows(moe->correction, T);
  KERN(env, router_logits, adds(model) ? prob : x, train_parameter_value(p, moe->calibration_in),
       train_none(), before);
  KERN(env, gelu_fwd, KERN_GELU_ERF, before, between);
  KERN(env, router_logits, between, train_parameter_value(p, moe->calibration_out), train_none(), correction);
  KERN(env, router_gate_fwd, form_of(model), kind_of(model), prob, correction, train_rows(moe->choice, T),
       train_rows(moe->gate, T));
  return CORE_OK;
}

core_status train_calibration_backward(train_model *model, train_moe *moe, core_tensor x, core_tensor prob,
                                       core_tensor d_logits, core_tensor dx) {
  train_env *env = model->env;
  const train_parameters *p = &model->parameters;
  const train_moe_scratch *s = &model->moe_scratch;
  int64_t T = x.shape[0], E = moe->experts;
  core_tensor d_prob = core_tensor_2(s->d_prob.data, CORE_REAL_DTYPE, T, E);
  core_tensor d_correction = core_tensor_2(s->d_correction.data, CORE_REAL_DTYPE, T, E);
  core_tensor d_between = train_rows(s->d_between, T);
  KERN(env, router_calibrated_bwd, form_of(model), kind_of(model), train_rows(s->d_gate, T), prob,
       train_rows(moe->correction, T), train_rows(moe->choice, T), d_prob, d_correction);
  KERN(env, router_logits_bwd, d_correction, train_rows(moe->between, T),
       train_parameter_value(p, moe->calibration_out), KERN_SET, d_between,
       train_trained_gradient(model, moe->calibration_out), train_none());
  KERN(env, gelu_bwd, KERN_GELU_ERF, d_between, train_rows(moe->before, T), KERN_SET, d_between);
  KERN(env, router_logits_bwd, d_between, adds(model) ? prob : x,
       train_parameter_value(p, moe->calibration_in), KERN_ADD, adds(model) ? d_prob : dx,
       train_trained_gradient(model, moe->calibration_in), train_none());
  KERN(env, softmax_bwd, d_prob, prob, KERN_SET, d_logits);
  return CORE_OK;
}
