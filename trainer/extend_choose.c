/* Which layers are extended, and with a copy of which expert: from counts alone, so that every rank and every
 * layout comes to the same. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "trainer/extend.h"

/* ---- rules ---- */

static bool is(const char *rule, const char *word) {
  return strcmp(rule, word) == 0;
}

/* Rules that take floor(share L) layers. */
static bool takes_share(const char *rule) {
  return is(rule, "d") || is(rule, "lowest") || is(rule, "random");
}

bool train_extension_rule_measures(const char *rule) {
  return is(rule, "d") || is(rule, "lowest");
}

bool train_extension_rule_valid(const char *rule, int64_t layers) {
  return takes_share(rule) || (!is(rule, "none") && train_settings_rule_valid(rule, layers));
}

/* ---- figures ---- */

static int64_t total_of(int64_t experts, const int64_t *count) {
  int64_t total = 0;
  for (int64_t i = 0; i < experts; i++) total += count[i];
  return total;
}

double train_extension_deviation(int64_t experts, const int64_t *before, const int64_t *after) {
  double mean = 0, square = 0, value[CORE_MAX_EXPERTS], E = (double)experts;
  double all_before = (double)total_of(experts, before), all_after = (double)total_of(experts, after);
  if (all_before <= 0 || all_after <= 0) return 0;
  for (int64_t i = 0; i < experts; i++) {
    value[i] = E * ((double)before[i] / all_before - (double)after[i] / all_after);
    mean += value[i] / E;
  }
  for (int64_t i = 0; i < experts; i++) square += (value[i] - mean) * (value[i] - mean);
  return sqrt(square / E);
}

/* Tokens of the counted classes that chose each expert of a layer. */
static core_status counts_of(const train_extend_settings *how, const train_measurement *m, int32_t layer,
                             int64_t count[CORE_MAX_EXPERTS]) {
  memset(count, 0, CORE_MAX_EXPERTS * sizeof *count);
  for (unsigned i = 0; i < (how->classes_count ? how->classes_count : 1); i++) {
    int32_t c = how->classes_count ? train_measurement_class(m, how->classes[i]) : -1;
    CHECK(c >= 0 || how->classes_count == 0, CORE_ERR_ARGUMENT,
          "extend.classes names '%s', and the held-out tokens are of no such class", how->classes[i]);
    for (int64_t e = 0; e < m->experts[layer]; e++) count[e] += train_measurement_count(m, layer, c, e);
  }
  return CORE_OK;
}

static core_status fill_layer(const train_extend_settings *how, const train_measurement *before,
                              const train_measurement *after, int32_t j, train_extension_layer *out) {
  int64_t count[CORE_MAX_EXPERTS], other[CORE_MAX_EXPERTS], E = before->experts[j];
  *out = (train_extension_layer){.experts = E, .block = before->block[j]};
  TRY(counts_of(how, before, j, count));
  for (int64_t e = 1; e < E; e++)
    if (count[e] > count[out->source]) out->source = e;
  int64_t total = total_of(E, count);
  CHECK(total > 0, CORE_ERR_ARGUMENT, "no token of the held-out split was counted in MoE layer %d", j);
  out->share = (double)count[out->source] / (double)total;
  if (!after) return CORE_OK;
  TRY(counts_of(how, after, j, other));
  out->d = train_extension_deviation(E, count, other);
  return CORE_OK;
}

/* ---- the choice ---- */

/* Places by d, the largest first. */
static void rank_layers(train_extension_choice *choice) {
  for (int32_t j = 0; j < choice->layers; j++) {
    choice->layer[j].place = 1;
    for (int32_t i = 0; i < choice->layers; i++)
      choice->layer[j].place +=
          choice->layer[i].d > choice->layer[j].d || (choice->layer[i].d == choice->layer[j].d && i < j);
  }
}

/* How many layers lie behind layer j by d: with the smallest first, again ties to the lower one. */
static int32_t place_from_below(const train_extension_choice *choice, int32_t j) {
  int32_t place = 1;
  for (int32_t i = 0; i < choice->layers; i++)
    place += choice->layer[i].d < choice->layer[j].d || (choice->layer[i].d == choice->layer[j].d && i < j);
  return place;
}

static core_status draw(train_extension_choice *choice, uint64_t seed) {
  int64_t *order = malloc((size_t)choice->layers * sizeof *order);
  CHECK(order, CORE_ERR_MEMORY, "no memory for the order of %d layers", choice->layers);
  core_random_permutation(seed, core_random_stream(CORE_RANDOM_SCHEDULE, core_hash_text("extend"), 0),
                          choice->layers, order);
  for (int32_t i = 0; i < choice->wanted; i++) choice->layer[order[i]].chosen = true;
  free(order);
  return CORE_OK;
}

static core_status apply_rule(const train_extend_settings *how, uint64_t seed,
                              train_extension_choice *choice) {
  const char *rule = how->layers;
  int64_t L = choice->layers, share = train_settings_thousandths(how->share);
  CHECK(train_extension_rule_valid(rule, L), CORE_ERR_ARGUMENT,
        "extend.layers '%s': expected d, lowest, random, all, every N, first half, second half, or a list of "
        "numbers below %lld, of the MoE layers",
        rule, (long long)L);
  if (takes_share(rule)) choice->wanted = (int32_t)(share * L / 1000);
  if (is(rule, "random")) TRY(draw(choice, seed));
  for (int32_t j = 0; j < L; j++) {
    train_extension_layer *layer = &choice->layer[j];
    if (is(rule, "d")) layer->chosen = layer->place <= choice->wanted;
    if (is(rule, "lowest")) layer->chosen = place_from_below(choice, j) <= choice->wanted;
    if (!takes_share(rule)) layer->chosen = train_settings_moe_layer(rule, L, j);
    if (!takes_share(rule)) choice->wanted += layer->chosen;
  }
  CHECK(choice->wanted > 0, CORE_ERR_ARGUMENT,
        "extend.share %s of %lld MoE layers by the rule '%s' is no layer: nothing would be extended",
        how->share, (long long)L, rule);
  return CORE_OK;
}

core_status train_extension_choose(const train_extend_settings *how, uint64_t seed,
                                   const train_measurement *before, const train_measurement *after,
                                   train_extension_choice *choice) {
  *choice = (train_extension_choice){.layers = before->layers};
  CHECK(before->layers > 0, CORE_ERR_ARGUMENT, "the model has no mixture that could be extended");
  choice->layer = calloc((size_t)before->layers, sizeof *choice->layer);
  CHECK(choice->layer, CORE_ERR_MEMORY, "no memory for %d layers", before->layers);
  for (int32_t j = 0; j < before->layers; j++) TRY(fill_layer(how, before, after, j, &choice->layer[j]));
  if (after) rank_layers(choice);
  TRY(apply_rule(how, seed, choice));
  return CORE_OK;
}

static double least_chosen(const train_extension_choice *choice) {
  double least = INFINITY;
  for (int32_t j = 0; j < choice->layers; j++)
    if (choice->layer[j].chosen) least = fmin(least, choice->layer[j].d);
  return least;
}

void train_extension_why(const train_extend_settings *how, const train_extension_choice *choice, int32_t j,
                         char *out, size_t capacity) {
  const train_extension_layer *layer = &choice->layer[j];
  if (is(how->layers, "d"))
    snprintf(out, capacity, "place %d by d of %d, the first %d are chosen (least chosen d %.6g)",
             layer->place, choice->layers, choice->wanted, least_chosen(choice));
  else if (is(how->layers, "lowest"))
    snprintf(out, capacity, "place %d by d of %d, the last %d are chosen", layer->place, choice->layers,
             choice->wanted);
  else
    snprintf(out, capacity, "the rule '%.60s' %s it", how->layers, layer->chosen ? "takes" : "passes over");
}
