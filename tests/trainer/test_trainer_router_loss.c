/* Router losses of made-up sums: values worked out by hand, derivatives against central differences. */
#include <math.h>
#include <stdlib.h>

#include "core/random.h"
#include "tests/support/test_unit.h"
#include "trainer/objective/objective.h"

enum { M = 3, E = 5, LAYERS = 2 };

static train_modality_settings modalities[M];
static train_settings settings;
static train_env env;
static train_moe_sums sums;
static train_router_objective objective;
static core_arena *arena;

static int set_up(void **state) {
  (void)state;
  memset(&settings, 0, sizeof settings);
  memset(modalities, 0, sizeof modalities);
  memset(&env, 0, sizeof env);
  settings.data.modalities = modalities;
  settings.data.modalities_count = M;
  settings.model.moe.experts = E;
  env.settings = &settings;
  env.layout.modalities = M;
  sums = (train_moe_sums){.layers = LAYERS, .modalities = M, .experts = E};
  sums.value.host = calloc(LAYERS * M * (3 + 2 * E), sizeof(double));
  env.ops = kern_cpu();
  if (!sums.value.host || core_arena_create("test", NULL, &arena) != CORE_OK) return -1;
  train_arenas arenas = {.objective = arena, .host = arena, .host_access = true};
  for (int phase = 0; phase < 2; phase++) {
    if (train_router_plan(&objective, &env, LAYERS, &arenas) != CORE_OK) return -1;
    if (phase == 0 && core_arena_commit(arena) != CORE_OK) return -1;
  }
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  free(sums.value.host);
  core_arena_destroy(arena);
  return 0;
}

/* Derivatives by the sums of a layer and modality, laid out as they are. */
typedef struct weights {
  double z, entropy;
  const double *prob, *load; /* [E] */
} weights;

static weights weights_of(int layer, int m) {
  const double *row = (const double *)objective.weights.host + (layer * M + m) * (3 + 2 * E);
  return (weights){row[1], row[2], row + 3, row + 3 + E};
}

static train_router_loss evaluate(void) {
  train_router_loss loss;
  assert_ok(train_router_evaluate(&objective, &sums, &loss));
  return loss;
}

static double total(void) {
  train_router_loss l = evaluate();
  return l.importance + l.load + l.z + l.local + l.global;
}

/* tokens, sum of lse^2, sum of H, then prob and load of each expert */
static void set_cell(int layer, int m, double tokens, double z, double entropy, const double *prob,
                     const double *load) {
  double *value = train_moe_values(&sums, layer, m);
  value[0] = tokens;
  value[1] = z;
  value[2] = entropy;
  memcpy(value + 3, prob, E * sizeof *prob);
  memcpy(value + 3 + E, load, E * sizeof *load);
}

static void assert_near(double got, double expected) {
  if (!(fabs(got - expected) <= 1e-13 * (1 + fabs(expected))))
    fail_msg("got %.17g, expected %.17g", got, expected);
}

static void entropy_of_a_histogram(void **state) {
  (void)state;
  assert_near(train_entropy((const double[]){1, 1, 1, 1}, 4), log(4));
  assert_near(train_entropy((const double[]){7, 0, 0}, 3), 0);
  assert_near(train_entropy((const double[]){2, 1, 1, 0}, 4), 1.5 * log(2));
  assert_near(train_entropy((const double[]){200, 100, 100, 0}, 4), 1.5 * log(2));
  assert_near(train_entropy((const double[]){0, 0}, 2), 0);
}

static const double nothing[E] = {0};

static void losses_of_a_hand_made_histogram(void **state) {
  (void)state;
  settings.objective.importance = 2;
  settings.objective.load = 3;
  settings.objective.z = 0.5;
  modalities[0].local = 0.25;
  modalities[1].local = 4;
  modalities[1].global = 10;
  modalities[1].experts = 4;
  /* both modalities together: prob 4 2 2 1 1 = mean 2, variance 6/5; load 5 0 0 0 0 = mean 1, variance 4 */
  set_cell(0, 0, 6, 12, 3, (const double[]){2, 2, 2, 0, 0}, (const double[]){2, 0, 0, 0, 0});
  set_cell(0, 1, 4, 8, 2, (const double[]){2, 0, 0, 1, 1}, (const double[]){3, 0, 0, 0, 0});
  train_router_loss l = evaluate();
  assert_near(l.importance, 2 * (6.0 / 5) / 4);
  assert_near(l.load, 3 * 4.0);
  assert_near(l.z, 0.5 * 20 / 10);
  assert_near(l.local, 0.25 * 3 / 6 + 4 * 2.0 / 4);
  assert_near(l.global, 10 * (log(4) - 1.5 * log(2)));
  assert_near(weights_of(0, 0).z, 0.5 / 10);
  assert_near(weights_of(0, 1).z, 0.5 / 10);
  assert_near(weights_of(0, 0).entropy, 0.25 / 6);
  assert_near(weights_of(0, 1).entropy, 4.0 / 4);
  for (int m = 0; m < M; m++) assert_near(weights_of(1, m).z, 0); /* an empty layer */
}

static void the_global_loss_is_a_hinge(void **state) {
  (void)state;
  modalities[0].global = 10;
  set_cell(0, 0, 4, 0, 0, (const double[]){2, 1, 1, 0, 0}, nothing);
  const double limit = exp(1.5 * log(2)); /* experts that the marginal spreads over */
  modalities[0].experts = limit * 0.99;
  assert_near(evaluate().global, 0);
  for (int e = 0; e < E; e++) assert_near(weights_of(0, 0).prob[e], 0);
  modalities[0].experts = limit * 1.01;
  assert_near(evaluate().global, 10 * log(1.01));
  assert_true(weights_of(0, 0).prob[0] > weights_of(0, 0).prob[1]); /* away from the fullest */
  assert_true(isfinite(weights_of(0, 0).prob[4]));                  /* an expert with nothing */
}

static void an_absent_modality_costs_nothing(void **state) {
  (void)state;
  settings.objective.importance = settings.objective.load = settings.objective.z = 1;
  for (int m = 0; m < M; m++) {
    modalities[m].local = modalities[m].global = 1;
    modalities[m].experts = 4;
  }
  assert_near(total(), 0); /* nothing at all: no 0 / 0 */
  for (int layer = 0; layer < LAYERS; layer++)
    for (int m = 0; m < M; m++) assert_near(weights_of(layer, m).z, 0);
  set_cell(0, 0, 2, 3, 1, (const double[]){1, 1, 0, 0, 0}, (const double[]){1, 0.5, 0.5, 0, 0});
  assert_true(total() > 0);
  assert_near(weights_of(0, 2).entropy, 0); /* modality 2 has no tokens */
  for (int e = 0; e < E; e++) assert_true(isfinite(weights_of(0, 2).prob[e]));
}

/* ---- derivatives ---- */

static double draw(uint64_t i) {
  return core_random_uniform(12, 34, i);
}

static void fill_at_random(void) {
  uint64_t n = 0;
  for (int layer = 0; layer < LAYERS; layer++)
    for (int m = 0; m < M; m++) {
      double tokens = 0, prob[E], load[E];
      for (int e = 0; e < E; e++) {
        prob[e] = 0.2 + 5 * draw(n) * (e + 1);
        tokens += prob[e];
        load[e] = 0.1 + 3 * draw(n + 1);
        n += 2;
      }
      set_cell(layer, m, tokens, 7 * draw(n), 2 * draw(n + 1), prob, load);
      n += 2;
    }
}

/* (L(up + h, down - h) - L(up - h, down + h)) / 2h; down NULL: one value alone */
static double difference(double *up, double *down) {
  const double h = 1e-5, old_up = *up, old_down = down ? *down : 0;
  double side[2];
  for (int s = 0; s < 2; s++) {
    double move = s == 0 ? h : -h;
    *up = old_up + move;
    if (down) *down = old_down - move;
    side[s] = total();
    *up = old_up;
    if (down) *down = old_down;
  }
  (void)total();
  return (side[0] - side[1]) / (2 * h);
}

static void assert_derivative(double got, double expected) {
  if (!(fabs(got - expected) <= 1e-8 * (1 + fabs(expected))))
    fail_msg("got %.12g, differences give %.12g", got, expected);
}

/* Probabilities of a token add up to one, so a modality's sums move against each other. */
static void check_derivatives(void) {
  fill_at_random();
  (void)total();
  for (int layer = 0; layer < LAYERS; layer++)
    for (int m = 0; m < M; m++) {
      const weights w = weights_of(layer, m);
      double *value = train_moe_values(&sums, layer, m), expected;
      expected = difference(value + 1, NULL);
      assert_derivative(w.z, expected);
      expected = difference(value + 2, NULL);
      assert_derivative(w.entropy, expected);
      for (int e = 0; e < E; e++) {
        expected = difference(value + 3 + E + e, NULL);
        assert_derivative(w.load[e], expected);
        expected = difference(value + 3 + e, value + 3 + (e + 1) % E);
        assert_derivative(w.prob[e] - w.prob[(e + 1) % E], expected);
      }
    }
}

static void derivatives_are_those_of_the_losses(void **state) {
  (void)state;
  double *const factor[] = {&settings.objective.importance, &settings.objective.load, &settings.objective.z,
                            &modalities[0].local,           &modalities[1].global,    &modalities[2].global};
  modalities[1].experts = 4.9; /* hinge on, and off */
  modalities[2].experts = 1.1;
  for (int i = 0; i < 6; i++) { /* each loss alone */
    *factor[i] = 1.7;
    check_derivatives();
    assert_int_equal(total() > 0, i != 5);
    *factor[i] = 0;
  }
  for (int i = 0; i < 6; i++) *factor[i] = 0.3 + i;
  check_derivatives();
}

/* ---- balance ---- */

enum { GROUPS = 3, CELL = 1 + 2 * E };

/* Counts of the two layers' experts: 3 and E. Three groups, of which one has no tokens. */
static const int64_t layer_experts[LAYERS] = {3, E};

static void give_balance(int shares) {
  settings.objective.balance = 0.5;
  settings.objective.balance_shares = shares;
  sums.layer_experts = layer_experts;
  sums.choices = 2;
  sums.groups = GROUPS;
  sums.balance.host = calloc(LAYERS * GROUPS * CELL, sizeof(double));
  sums.balance_weights.host = calloc(LAYERS * GROUPS * E, sizeof(double));
  assert_true(sums.balance.host && sums.balance_weights.host);
  sums.balance_weights.device = core_tensor_2(sums.balance_weights.host, CORE_FLOAT64, LAYERS * GROUPS, E);
}

static void take_balance(void) {
  free(sums.balance.host);
  free(sums.balance_weights.host);
}

static void set_group(int layer, int group, const double *numbers) {
  int64_t cell = 1 + 2 * layer_experts[layer];
  memcpy(train_moe_balance(&sums, layer) + group * cell, numbers, (size_t)cell * sizeof *numbers);
}

/* Layer 0: groups of 4 and of 2 tokens; layer 1: none at all. tokens, sums of p, choices of each expert. */
static void balance_is_the_mean_over_groups_with_tokens(void **state) {
  (void)state;
  for (int shares = TRAIN_SHARES_FIRST; shares <= TRAIN_SHARES_ALL; shares++) {
    double choices = shares == TRAIN_SHARES_FIRST ? 1 : 2;
    give_balance(shares);
    set_group(0, 0, (const double[]){4, 2, 1, 1, 3 * choices, 1 * choices, 0});
    set_group(0, 2, (const double[]){2, 0.5, 0.5, 1, 0, 0, 2 * choices});
    /* 3 (1/2 3/4 + 1/4 1/4) and 3 (1/2 1), halved by the mean over groups and by the two layers */
    double first = 3 * (0.375 + 0.0625), second = 3 * 0.5;
    assert_near(evaluate().balance, 0.5 * (first + second) / 2 / LAYERS);
    const double *weight = train_moe_balance_weights(&sums, 0);
    assert_near(weight[0], 0.5 / 2 / LAYERS * 3 * 0.75 / 4);
    assert_near(weight[2], 0);
    for (int e = 0; e < 3; e++) assert_near(weight[3 + e], 0);
    assert_near(weight[2 * 3 + 2], 0.5 / 2 / LAYERS * 3 * 1 / 2);
    for (int i = 0; i < GROUPS * E; i++) assert_near(train_moe_balance_weights(&sums, 1)[i], 0);
    take_balance();
  }
}

/* Uniform probabilities cost the coefficient whatever is chosen, and their derivatives are its differences.
 */
static void balance_derivatives_are_its_differences(void **state) {
  (void)state;
  give_balance(TRAIN_SHARES_FIRST);
  for (int g = 0; g < GROUPS; g++) {
    set_group(0, g, (const double[]){3, 1, 1, 1, 2, 0, 1});
    set_group(1, g, (const double[]){5, 1, 1, 1, 1, 1, 4, 0, 0, 1, 0});
  }
  assert_near(evaluate().balance, 0.5);
  for (int layer = 0; layer < LAYERS; layer++)
    for (int g = 0; g < GROUPS; g++)
      for (int64_t e = 0; e < layer_experts[layer]; e++) {
        double *p = train_moe_balance(&sums, layer) + g * (1 + 2 * layer_experts[layer]) + 1 + e;
        double got = train_moe_balance_weights(&sums, layer)[g * layer_experts[layer] + e], expected;
        *p += 0.5;
        expected = (evaluate().balance - 0.5) / 0.5; /* linear in p */
        *p -= 0.5;
        assert_near(got, expected);
        (void)evaluate();
      }
  take_balance();
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(entropy_of_a_histogram),
      TEST(losses_of_a_hand_made_histogram),
      TEST(the_global_loss_is_a_hinge),
      TEST(an_absent_modality_costs_nothing),
      TEST(derivatives_are_those_of_the_losses),
      TEST(balance_is_the_mean_over_groups_with_tokens),
      TEST(balance_derivatives_are_its_differences),
  };
  return cmocka_run_group_tests_name("trainer, router losses", tests, NULL, NULL);
}
