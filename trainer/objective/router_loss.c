#include <math.h>
#include <string.h>

#include "trainer/objective/objective.h"

static const double smallest_share =
    1e-30; /* keeps log finite; such an expert's gradient is multiplied by p = 0 */

core_status train_router_plan(train_router_objective *objective, const train_env *env, int32_t layers,
                              core_arena *arena) {
  int64_t M = env->layout.modalities, E = env->settings->model.moe.experts;
  objective->env = env;
  objective->layers = layers;
  TRY(ARENA_TAKE(arena, layers * M, &objective->weights));
  TRY(ARENA_TAKE(arena, layers * M * E, &objective->prob));
  TRY(ARENA_TAKE(arena, layers * E, &objective->load));
  return CORE_OK;
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

/* CV^2 = population variance / mean^2 of x, and weight times its derivative added to gradient. */
static double squared_variation(const double *x, int64_t n, double weight, double *gradient) {
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < n; i++) mean += x[i] / (double)n;
  for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean) / (double)n;
  if (mean <= 0) return 0;
  for (int64_t i = 0; i < n; i++)
    gradient[i] += weight * 2 / ((double)n * mean * mean) * (x[i] - mean - variance / mean);
  return variance / (mean * mean);
}

/* Losses of one layer that take all modalities together. */
static void joint_losses(train_router_objective *objective, const train_moe_sums *sums, int32_t layer,
                         train_router_loss *out) {
  const train_settings *s = objective->env->settings;
  int64_t M = sums->modalities, E = sums->experts;
  double prob[CORE_MAX_EXPERTS] = {0}, load[CORE_MAX_EXPERTS] = {0}, d_prob[CORE_MAX_EXPERTS] = {0},
         tokens = 0, z = 0;
  double *d_load = objective->load + layer * E;
  for (int64_t m = 0; m < M; m++) {
    const double *value = train_moe_values(sums, layer, m);
    tokens += value[0];
    z += value[1];
    for (int64_t e = 0; e < E; e++) {
      prob[e] += value[3 + e];
      load[e] += value[3 + E + e];
    }
  }
  memset(d_load, 0, (size_t)E * sizeof *d_load);
  out->importance += s->objective.importance * squared_variation(prob, E, s->objective.importance, d_prob);
  out->load += s->objective.load * squared_variation(load, E, s->objective.load, d_load);
  if (tokens > 0) out->z += s->objective.z * z / tokens;
  for (int64_t m = 0; m < M; m++) {
    kern_router_weights *weights = &objective->weights[layer * M + m];
    double *target = objective->prob + (layer * M + m) * E;
    memcpy(target, d_prob, (size_t)E * sizeof *target);
    *weights =
        (kern_router_weights){.z = tokens > 0 ? s->objective.z / tokens : 0, .prob = target, .load = d_load};
  }
}

/* Entropy losses of one layer and modality. */
static void entropy_losses(train_router_objective *objective, const train_moe_sums *sums, int32_t layer,
                           int32_t m, train_router_loss *out) {
  const train_modality_settings *s = &objective->env->settings->data.modalities[m];
  const double *value = train_moe_values(sums, layer, m);
  int64_t cell = layer * sums->modalities + m, E = sums->experts;
  double tokens = value[0];
  if (tokens <= 0) return;
  out->local += s->local * value[2] / tokens;
  objective->weights[cell].entropy = s->local / tokens;
  if (s->global <= 0) return;
  double missing = log(s->experts) - train_entropy(value + 3, E);
  if (missing <= 0) return;
  out->global += s->global * missing;
  for (int64_t e = 0; e < E; e++) {
    double share = value[3 + e] / tokens;
    objective->prob[cell * E + e] +=
        s->global * (log(share > smallest_share ? share : smallest_share) + 1) / tokens;
  }
}

void train_router_evaluate(train_router_objective *objective, const train_moe_sums *sums,
                           train_router_loss *out) {
  memset(out, 0, sizeof *out);
  for (int32_t layer = 0; layer < objective->layers; layer++) {
    joint_losses(objective, sums, layer, out);
    for (int32_t m = 0; m < sums->modalities; m++) entropy_losses(objective, sums, layer, m, out);
  }
}
