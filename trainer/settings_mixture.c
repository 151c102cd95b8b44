/* What the configuration says of each MoE layer: how many experts it has, and how many of them were added. */
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
  if (!train_settings_dense(s) && s->parallel.experts > train_settings_most_experts(s))
    return core_config_refuse(config, "parallel.experts",
                              "%lld ranks for at most %lld experts of a layer: some would hold none at all",
                              (long long)s->parallel.experts, (long long)train_settings_most_experts(s));
  return CORE_OK;
}
