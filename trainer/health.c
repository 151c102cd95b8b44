#include "trainer/health.h"

#include <math.h>

#include "trainer/objective/objective.h" /* train_entropy, train_squared_variation */

train_health train_health_of(const train_moe_sums *sums, int32_t layer, int32_t m) {
  const double *value = train_moe_values(sums, layer, m), *gate = train_moe_gates(sums, layer, m);
  const int64_t *count = train_moe_counts(sums, layer, m);
  int64_t E = train_moe_layer_experts(sums, layer), chosen = 0, kept = 0;
  double histogram[CORE_MAX_EXPERTS];
  train_health h = {.tokens = count[2 * E + 1]};
  for (int64_t e = 0; e < E; e++) {
    chosen += count[e];
    kept += count[E + e];
    histogram[e] = (double)count[e];
  }
  h.success = h.tokens > 0 ? (double)count[2 * E] / (double)h.tokens : 1;
  h.dropped = h.tokens > 0 ? (double)(h.tokens - count[2 * E]) / (double)h.tokens : 0;
  h.kept_choices = chosen > 0 ? (double)kept / (double)chosen : 1;
  h.entropy = value[0] > 0 ? value[2] / value[0] : 0;
  h.entropy_of_mean = train_entropy(value + 3, E);
  h.effective_experts = exp(h.entropy_of_mean);
  h.entropy_of_choices = train_entropy(histogram, E);
  for (int64_t k = 0; k < sums->choices; k++) h.gate[k] = h.tokens > 0 ? gate[k] / (double)h.tokens : 0;
  return h;
}

train_layer_health train_health_of_layer(const train_moe_sums *sums, int32_t layer) {
  int64_t E = train_moe_layer_experts(sums, layer), count[CORE_MAX_EXPERTS] = {0}, most = 0, total = 0;
  double prob[CORE_MAX_EXPERTS] = {0}, load[CORE_MAX_EXPERTS] = {0};
  train_layer_health h = {0};
  for (int32_t m = 0; m < sums->modalities; m++)
    for (int64_t e = 0; e < E; e++) {
      count[e] += train_moe_counts(sums, layer, m)[E + e];
      prob[e] += train_moe_values(sums, layer, m)[3 + e];
      load[e] += train_moe_values(sums, layer, m)[3 + E + e];
    }
  for (int64_t e = 0; e < E; e++) {
    total += count[e];
    h.dead += count[e] == 0;
    if (count[e] > most) most = count[e];
  }
  h.max_over_mean = total > 0 ? (double)(most * E) / (double)total : 0;
  h.importance = train_squared_variation(prob, E);
  h.load = train_squared_variation(load, E);
  return h;
}

double train_health_new(const train_moe_sums *sums, const train_settings *settings, int32_t c) {
  double sum = 0;
  int32_t layers = 0;
  for (int32_t l = 0; l < sums->layers; l++) {
    int64_t E = train_moe_layer_experts(sums, l), added = train_settings_added(settings, l);
    int64_t tokens = 0, chose = 0;
    for (int32_t i = 0; i < sums->modalities; i++) {
      const int64_t *count = train_moe_counts(sums, l, i);
      if (c >= 0 && i != c) continue;
      tokens += count[2 * E + 1];
      for (int64_t e = E - added; e < E; e++) chose += count[e];
    }
    if (added == 0 || tokens == 0) continue;
    sum += (double)chose / (double)tokens;
    layers++;
  }
  return layers > 0 ? sum / layers : 0;
}

void train_health_print_new(const train_moe_sums *sums, const train_settings *settings, FILE *out) {
  int64_t added = 0;
  for (int32_t l = 0; l < sums->layers; l++) added += train_settings_added(settings, l);
  if (added == 0) return;
  fprintf(out, "tokens at new experts: %.2f %%", 100 * train_health_new(sums, settings, -1));
  for (int32_t c = 0; c < sums->modalities; c++)
    fprintf(out, ", %s %.2f %%", train_settings_class(settings, c),
            100 * train_health_new(sums, settings, c));
  fprintf(out, "\n");
}

void train_health_print(const train_moe_sums *sums, const train_settings *settings, FILE *out) {
  if (sums->layers == 0) return;
  fprintf(out, "%-24s %9s %9s %9s %9s %9s %9s\n", "mixture, modality", "tokens", "dropped", "H(p)",
          "H(mean p)", "experts", "gate");
  for (int32_t layer = 0; layer < sums->layers; layer++)
    for (int32_t m = 0; m < sums->modalities; m++) {
      char name[2 * CORE_NAME];
      train_health h = train_health_of(sums, layer, m);
      if (h.tokens == 0) continue;
      snprintf(name, sizeof name, "%d, %s", layer + 1, train_settings_class(settings, m));
      fprintf(out, "%-24s %9lld %8.2f%% %9.3f %9.3f %9.2f %9.3f\n", name, (long long)h.tokens,
              100 * h.dropped, h.entropy, h.entropy_of_mean, h.effective_experts, h.gate[0]);
    }
}
