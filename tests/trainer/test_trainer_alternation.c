/* Alternation: schedules worked out by hand, and the adaptive rule. */
#include <math.h>

#include "tests/support/test_unit.h"
#include "trainer/schedule/alternation.h"

static char *names[] = {"a:b", "b:a", "a:c"};

static train_alternation make(train_alternate kind, int64_t *steps) {
  train_settings s;
  memset(&s, 0, sizeof s);
  s.run.seed = 5;
  s.objective.directions = names;
  s.objective.directions_count = 3;
  s.schedule.alternate = kind;
  s.schedule.steps = steps;
  s.schedule.steps_count = steps ? 3 : 0;
  s.schedule.gain = 1;
  s.schedule.most = 1;
  train_alternation a;
  train_alternation_make(&s, &a);
  return a;
}

static void expect_directions(const train_alternation *a, const char *expected) {
  for (int64_t t = 0; expected[t]; t++)
    if (train_alternation_direction(a, t) != expected[t] - '0')
      fail_msg("step %lld trains direction %d, expected %c", (long long)t, train_alternation_direction(a, t),
               expected[t]);
}

/* Own steps and totals are what counting gives. */
static void expect_counts(const train_alternation *a, int64_t steps) {
  int64_t own[3] = {0, 0, 0};
  for (int64_t t = 0; t < steps; t++) {
    for (int d = 0; d < 3; d++) {
      assert_int_equal(train_alternation_own(a, d, t), own[d]);
      assert_int_equal(train_alternation_total(a, d, t), own[d]);
    }
    own[train_alternation_direction(a, t)]++;
  }
}

static void joint_trains_all(void **state) {
  (void)state;
  train_alternation a = make(TRAIN_ALTERNATE_NONE, NULL);
  for (int64_t t = 0; t < 5; t++) {
    assert_int_equal(train_alternation_direction(&a, t), -1);
    assert_int_equal(train_alternation_own(&a, 2, t), t);
  }
}

static void cyclic_takes_turns(void **state) {
  (void)state;
  train_alternation a = make(TRAIN_ALTERNATE_CYCLIC, (int64_t[]){4, 4, 4}); /* which is of block only */
  expect_directions(&a, "0120120120");
  expect_counts(&a, 20);
}

static void blocks_have_their_lengths(void **state) {
  (void)state;
  train_alternation a = make(TRAIN_ALTERNATE_BLOCK, (int64_t[]){2, 1, 3});
  expect_directions(&a, "001222001222001");
  expect_counts(&a, 40);
}

static void adaptive_follows_recall(void **state) {
  (void)state;
  train_alternation a = make(TRAIN_ALTERNATE_ADAPTIVE, NULL);
  for (int d = 0; d < 3; d++) assert_true(fabs(a.probability[d] - 1.0 / 3) < 1e-15);
  /* mean 0.4: wanted 1/3 + 0.3, 1/3, 1/3 - 0.3 = 0.0333 -> at least 0.1 / 3; then divided by their sum, 1 */
  train_alternation_adapt(&a, (const double[]){0.1, 0.4, 0.7});
  const double wanted[3] = {1.0 / 3 + 0.3, 1.0 / 3, 1.0 / 3 - 0.3};
  for (int d = 0; d < 3; d++) assert_true(fabs(a.probability[d] - wanted[d]) < 1e-12);
  /* mean 2/3: wanted 1/3 + 2/3, 0 twice -> 0.1 / 3 */
  train_alternation_adapt(&a, (const double[]){0, 1, 1});
  const double high = 1, low = 0.1 / 3, sum = high + 2 * low;
  assert_true(fabs(a.probability[0] - high / sum) < 1e-12);
  assert_true(fabs(a.probability[1] - low / sum) < 1e-12 && fabs(a.probability[2] - low / sum) < 1e-12);
  int64_t drawn[3] = {0, 0, 0};
  for (int64_t t = 0; t < 20000; t++) drawn[train_alternation_direction(&a, t)]++;
  for (int d = 0; d < 3; d++) {
    double p = a.probability[d];
    assert_true(fabs((double)drawn[d] / 20000 - p) < 5 * sqrt(p * (1 - p) / 20000));
  }
  train_alternation_done(&a, 1);
  train_alternation_done(&a, 1);
  assert_int_equal(train_alternation_own(&a, 1, 999), 2);
  assert_int_equal(train_alternation_total(&a, 1, 100), 34);
}

static void adaptive_depends_on_seed_step_and_state_alone(void **state) {
  (void)state;
  train_alternation a = make(TRAIN_ALTERNATE_ADAPTIVE, NULL), b = a;
  for (int64_t t = 0; t < 50; t++) train_alternation_done(&a, train_alternation_direction(&a, t));
  for (int64_t t = 50; t < 100; t++)
    assert_int_equal(train_alternation_direction(&a, t), train_alternation_direction(&b, t));
  b.seed++;
  int different = 0;
  for (int64_t t = 0; t < 100; t++)
    different += train_alternation_direction(&a, t) != train_alternation_direction(&b, t);
  assert_true(different > 30);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(joint_trains_all), cmocka_unit_test(cyclic_takes_turns),
                                     cmocka_unit_test(blocks_have_their_lengths),
                                     cmocka_unit_test(adaptive_follows_recall),
                                     cmocka_unit_test(adaptive_depends_on_seed_step_and_state_alone)};
  return cmocka_run_group_tests_name("trainer, alternation", tests, NULL, NULL);
}
