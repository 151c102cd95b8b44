#include <math.h>
#include <string.h>

#include "trainer/objective/objective.h"

static const double smallest_share =
    1e-30; /* keeps log finite; such an expert's gradient is multiplied by p = 0 */

core_status train_router_plan(train_router_objective *objective, const train_env *env, int32_t layers,
                              const train_arenas *arenas) {
  objective->env = env;
  objective->layers = layers;
  TRY(train_mirror_plan(
      arenas, arenas->objective, CORE_FLOAT64, (int64_t)layers * train_settings_classes(env->settings),
      kern_router_sums_count(train_settings_most_experts(env->settings)), &objective->weights));
  return CORE_OK;
}

/* Derivatives by the sums of one layer and modality, laid out as the sums. */
static double *weights_of(const train_router_objective *objective, int64_t cell) {
  return (double *)objective->weights.host + cell * objective->weights.device.shape[1];
}

double train_entropy(const double *values, int64_t count) {
  double total = 0, entropy = 0;
  for (int64_t i = 0; i < count; i++) total += values[i];
  for (int64_t i = 0; i < count && total > 0; i++) {
    double share = values[i] / total;
    if (share > 0) entropy -= share * log(share);
  }
  return entropy;
}

static double moments(const double *x, int64_t n, double *variance) {
  double mean = 0;
  *variance = 0;
  for (int64_t i = 0; i < n; i++) mean += x[i] / (double)n;
  for (int64_t i = 0; i < n; i++) *variance += (x[i] - mean) * (x[i] - mean) / (double)n;
  return mean;
}

double train_squared_variation(const double *values, int64_t count) {
  double variance, mean = moments(values, count, &variance);
  return mean > 0 ? variance / (mean * mean) : 0;
}

/* CV^2 of x, and weight times its derivative added to gradient. */
static double squared_variation(const double *x, int64_t n, double weight, double *gradient) {
  double variance, mean = moments(x, n, &variance);
  if (mean <= 0) return 0;
  for (int64_t i = 0; i < n; i++)
    gradient[i] += weight * 2 / ((double)n * mean * mean) * (x[i] - mean - variance / mean);
  return variance / (mean * mean);
}

/* Losses of one layer that take all modalities together. */
static void joint_losses(train_router_objective *objective, const train_moe_sums *sums, int32_t layer,
                         train_router_loss *out) {
  const train_settings *s = objective->env->settings;
  int64_t M = sums->modalities, E = train_moe_layer_experts(sums, layer);
  double prob[CORE_MAX_EXPERTS] = {0}, load[CORE_MAX_EXPERTS] = {0}, d_prob[CORE_MAX_EXPERTS] = {0},
         d_load[CORE_MAX_EXPERTS] = {0}, tokens = 0, z = 0;
  for (int64_t m = 0; m < M; m++) {
    const double *value = train_moe_values(sums, layer, m);
    tokens += value[0];
    z += value[1];
    for (int64_t e = 0; e < E; e++) {
      prob[e] += value[3 + e];
      load[e] += value[3 + E + e];
    }
  }
  out->importance += s->objective.importance * squared_variation(prob, E, s->objective.importance, d_prob);
  out->load += s->objective.load * squared_variation(load, E, s->objective.load, d_load);
  if (tokens > 0) out->z += s->objective.z * z / tokens;
  for (int64_t m = 0; m < M; m++) {
    double *weights = weights_of(objective, layer * M + m);
    weights[0] = weights[2] = 0;
    weights[1] = tokens > 0 ? s->objective.z / tokens : 0;
    memcpy(weights + 3, d_prob, (size_t)E * sizeof *weights);
    memcpy(weights + 3 + E, d_load, (size_t)E * sizeof *weights);
  }
}

/* Entropy losses of one layer and class. */
static void entropy_losses(train_router_objective *objective, const train_moe_sums *sums, int32_t layer,
                           int32_t m, train_router_loss *out) {
  static const train_modality_settings none = {0}; /* of a decoder's own tokens */
  const train_settings *settings = objective->env->settings;
  const train_modality_settings *s =
      m < (int32_t)settings->data.modalities_count ? &settings->data.modalities[m] : &none;
  const double *value = train_moe_values(sums, layer, m);
  int64_t E = train_moe_layer_experts(sums, layer);
  double tokens = value[0], *weights = weights_of(objective, (int64_t)layer * sums->modalities + m);
  if (tokens <= 0) return;
  out->local += s->local * value[2] / tokens;
  weights[2] = s->local / tokens;
  if (s->global <= 0) return;
  int64_t first, own; /* a baseline that divides the experts is one key: S_m follows */
  train_settings_expert_share(settings, m, &first, &own);
  if (settings->model.moe.partition == TRAIN_PARTITION_NONE) own = E;
  double missing = log(fmin(s->experts, (double)own)) - train_entropy(value + 3, E);
  if (missing <= 0) return;
  out->global += s->global * missing;
  for (int64_t e = 0; e < E; e++) {
    double share = value[3 + e] / tokens;
    weights[3 + e] += s->global * (log(share > smallest_share ? share : smallest_share) + 1) / tokens;
  }
}

double train_router_loss_total(const train_router_loss *loss) {
  return loss->importance + loss->load + loss->z + loss->local + loss->global + loss->balance;
}

/* E sum_e me_e ce_e of one group, and its derivatives by the sums of p_e, times weight. of: the group's sums;
 * counted: choices of a token that ce counts. */
static double group_balance(const double *of, int64_t E, double counted, double weight, double *derivative) {
  double tokens = of[0], loss = 0;
  for (int64_t e = 0; e < E; e++) {
    double share = tokens > 0 ? of[1 + E + e] / (tokens * counted) : 0;
    derivative[e] = tokens > 0 ? weight * (double)E * share / tokens : 0;
    loss += derivative[e] * of[1 + e];
  }
  return loss;
}

/* Mean over the groups that have tokens. */
static void balance_loss(const train_router_objective *objective, const train_moe_sums *sums, int32_t layer,
                         train_router_loss *out) {
  const train_settings *s = objective->env->settings;
  int64_t E = train_moe_layer_experts(sums, layer), full = 0;
  const double *of = train_moe_balance(sums, layer);
  double *derivative = train_moe_balance_weights(sums, layer);
  double counted = s->objective.balance_shares == TRAIN_SHARES_FIRST ? 1 : (double)sums->choices;
  for (int64_t g = 0; g < sums->groups; g++) full += of[g * (1 + 2 * E)] > 0;
  double weight = full > 0 ? s->objective.balance / ((double)objective->layers * (double)full) : 0;
  for (int64_t g = 0; g < sums->groups; g++)
    out->balance += group_balance(of + g * (1 + 2 * E), E, counted, weight, derivative + g * E);
}

core_status train_router_evaluate(train_router_objective *objective, const train_moe_sums *sums,
                                  train_router_loss *out) {
  memset(out, 0, sizeof *out);
  for (int32_t layer = 0; layer < objective->layers; layer++) {
    joint_losses(objective, sums, layer, out);
    for (int32_t m = 0; m < sums->modalities; m++) entropy_losses(objective, sums, layer, m, out);
    if (sums->groups > 0) balance_loss(objective, sums, layer, out);
  }
  if (sums->groups > 0 && objective->layers > 0)
    TRY(train_mirror_up(objective->env, &sums->balance_weights, sums->balance_weights.device.shape[0]));
  TRY(train_mirror_up(objective->env, &objective->weights, objective->weights.device.shape[0]));
  return CORE_OK;
}
