/* What the configuration says of each MoE layer: how many experts it has, how many of them were added, how
 * they are weighed and balanced. */
#include <stdio.h>

#include "core/dims.h"
#include "trainer/settings.h"

int64_t train_settings_mixtures(const train_settings *settings) {
  if (settings->model.kind == TRAIN_KIND_CONNECTOR)
    return settings->model.per_direction ? settings->objective.directions_count : 1;
  return train_settings_mixture(settings, settings->model.layers);
}

int64_t train_settings_mixture(const train_settings *settings, int64_t l) {
  int64_t before = 0;
  if (settings->model.kind == TRAIN_KIND_CONNECTOR) return l;
  for (int64_t i = 0; i < l; i++)
    before += train_settings_moe_layer(settings->model.moe.layers, settings->model.layers, i);
  return before;
}

int64_t train_settings_experts(const train_settings *settings, int64_t mixture) {
  if (settings->model.moe.layer_experts_count == 0) return settings->model.moe.experts;
  return settings->model.moe.layer_experts[mixture];
}

int64_t train_settings_added(const train_settings *settings, int64_t mixture) {
  return settings->model.moe.added_count == 0 ? 0 : settings->model.moe.added[mixture];
}

int64_t train_settings_most_experts(const train_settings *settings) {
  int64_t most = train_settings_experts(settings, 0);
  for (int64_t i = 1; i < (int64_t)settings->model.moe.layer_experts_count; i++)
    if (train_settings_experts(settings, i) > most) most = train_settings_experts(settings, i);
  return most;
}

int64_t train_settings_fewest_experts(const train_settings *settings) {
  int64_t fewest = train_settings_experts(settings, 0);
  for (int64_t i = 1; i < (int64_t)settings->model.moe.layer_experts_count; i++)
    if (train_settings_experts(settings, i) < fewest) fewest = train_settings_experts(settings, i);
  return fewest;
}

bool train_settings_calibrated(const train_settings *settings, int64_t mixture) {
  return settings->model.moe.calibration != TRAIN_CALIBRATION_NONE &&
         train_settings_added(settings, mixture) > 0;
}

int64_t train_settings_balance_groups(const train_settings *settings) {
  if (settings->objective.balance <= 0 || train_settings_dense(settings)) return 0;
  if (settings->objective.balance_scope == TRAIN_BALANCE_GLOBAL) return 1;
  return settings->optimizer.batch / settings->model.moe.group_samples;
}

/* A list that has one number for each MoE layer, or none at all; nothing else counts these layers. */
static core_status check_list(const core_config *config, const char *key, unsigned count) {
  const train_settings *s = core_config_data(config);
  if (count == 0) return CORE_OK;
  if (s->model.kind == TRAIN_KIND_CONNECTOR)
    return core_config_refuse(config, key, "a connector's blocks are alike: expected an empty list");
  if (s->model.moe.partition != TRAIN_PARTITION_NONE)
    return core_config_refuse(
        config, key, "with model.moe.partition the layers are divided alike: expected an empty list");
  if (count != train_settings_mixtures(s))
    return core_config_refuse(config, key, "expected a number for each of the %lld MoE layers, got %u",
                              (long long)train_settings_mixtures(s), count);
  return CORE_OK;
}

static core_status check_added(const core_config *config, const train_settings *s) {
  bool any = false;
  TRY(check_list(config, "model.moe.added", s->model.moe.added_count));
  for (unsigned i = 0; i < s->model.moe.added_count; i++) {
    int64_t added = s->model.moe.added[i], experts = train_settings_experts(s, i);
    any = any || added > 0;
    if (added < 0 || added >= experts)
      return core_config_refuse(config, "model.moe.added",
                                "expected 0 to %lld added experts among the %lld of MoE layer %u, got %lld",
                                (long long)experts - 1, (long long)experts, i, (long long)added);
  }
  if (s->model.moe.added_bias && !any)
    return core_config_refuse(config, "model.moe.added_bias", "no layer has added experts: expected false");
  if (s->model.moe.calibration != TRAIN_CALIBRATION_NONE && !any)
    return core_config_refuse(config, "model.moe.calibration", "no layer has added experts: expected none");
  return CORE_OK;
}

static core_status check_second(const core_config *config, const train_settings *s) {
  if (s->model.moe.second_noise == TRAIN_SECOND_PLAIN) return CORE_OK;
  if (s->model.moe.choose != 2)
    return core_config_refuse(config, "model.moe.second_noise",
                              "draws the second of two choices, and model.moe.choose is %lld: expected none",
                              (long long)s->model.moe.choose);
  if (s->model.moe.noise > 0)
    return core_config_refuse(config, "model.moe.noise",
                              "with model.moe.second_noise the first choice is that of the plain logits: "
                              "expected 0, got %g",
                              s->model.moe.noise);
  return CORE_OK;
}

/* Numbers that a step sums for a local balance loss: of every group of the batch, since a group may lie on
 * any ranks and in any micro-batches. 128 MiB of them on each side. */
enum { MOST_BALANCE_NUMBERS = 1 << 24, MOST_GROUPS = 65535 };

static core_status check_balance(const core_config *config, const train_settings *s) {
  int64_t groups = train_settings_balance_groups(s), samples = s->model.moe.group_samples;
  int64_t numbers = groups * train_settings_mixtures(s) * (1 + 2 * train_settings_most_experts(s));
  if (groups > 1 || s->objective.balance_scope == TRAIN_BALANCE_LOCAL) {
    if (s->objective.balance > 0 && s->optimizer.batch % samples != 0)
      return core_config_refuse(config, "model.moe.group_samples",
                                "with objective.balance_scope local, groups of %lld samples must divide the "
                                "batch of %lld",
                                (long long)samples, (long long)s->optimizer.batch);
  }
  if (groups > MOST_GROUPS || numbers > MOST_BALANCE_NUMBERS)
    return core_config_refuse(config, "model.moe.group_samples",
                              "with objective.balance_scope local, %lld groups of a batch have %lld sums, "
                              "and at most %d groups and %d sums are kept: expected larger groups",
                              (long long)groups, (long long)numbers, MOST_GROUPS, MOST_BALANCE_NUMBERS);
  return CORE_OK;
}

core_status train_settings_check_mixtures(const core_config *config) {
  const train_settings *s = core_config_data(config);
  TRY(check_list(config, "model.moe.layer_experts", s->model.moe.layer_experts_count));
  for (unsigned i = 0; i < s->model.moe.layer_experts_count; i++) {
    int64_t experts = s->model.moe.layer_experts[i];
    if (experts < s->model.moe.choose || experts > CORE_MAX_EXPERTS)
      return core_config_refuse(config, "model.moe.layer_experts",
                                "expected %lld to %d experts, as many as a token chooses or more, got %lld",
                                (long long)s->model.moe.choose, CORE_MAX_EXPERTS, (long long)experts);
  }
  TRY(check_added(config, s));
  TRY(check_second(config, s));
  TRY(check_balance(config, s));
  if (!train_settings_dense(s) && s->parallel.experts > train_settings_most_experts(s))
    return core_config_refuse(config, "parallel.experts",
                              "%lld ranks for at most %lld experts of a layer: some would hold none at all",
                              (long long)s->parallel.experts, (long long)train_settings_most_experts(s));
  return CORE_OK;
}
