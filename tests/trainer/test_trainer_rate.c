/* Learning rates against values worked out by hand. */
#include <math.h>

#include "tests/support/test_unit.h"
#include "trainer/schedule/rate.h"

static train_settings make(train_rate_kind schedule) {
  train_settings s;
  memset(&s, 0, sizeof s);
  s.optimizer.schedule = schedule;
  s.optimizer.rate = 0.8;
  s.optimizer.timescale = 1;
  return s;
}

static void expect_rate(const train_settings *s, int64_t t, int64_t steps, double expected) {
  double got = train_rate(s, t, steps);
  if (!(fabs(got - expected) <= 1e-12))
    fail_msg("rate of step %lld is %.15g, expected %.15g", (long long)t, got, expected);
}

static void constant_is_the_rate_after_the_warm_up(void **state) {
  (void)state;
  train_settings s = make(TRAIN_RATE_CONSTANT);
  expect_rate(&s, 0, 10, 0.8);
  s.optimizer.warmup = 4;
  for (int t = 0; t < 4; t++) expect_rate(&s, t, 10, 0.2 * (t + 1)); /* the first step already moves */
  for (int t = 4; t < 10; t++) expect_rate(&s, t, 10, 0.8);
  s.optimizer.min_rate = 0.9; /* never below the least */
  expect_rate(&s, 6, 10, 0.9);
}

static void shares_are_rounded_up_once(void **state) {
  (void)state;
  train_settings s = make(TRAIN_RATE_CONSTANT);
  static const struct {
    double share;
    int64_t steps, warmup;
  } list[] = {{0.07, 100, 7}, {0.03, 1000, 30},   {0.29, 100, 29}, {0.1, 25, 3},  {0.001, 10, 1},
              {0.5, 7, 4},    {0.999, 1000, 999}, {1, 100, 1},     {2.5, 100, 3}, {0, 100, 0}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    s.optimizer.warmup = list[i].share;
    for (int64_t t = 0; t < list[i].warmup; t++)
      expect_rate(&s, t, list[i].steps, 0.8 * (double)(t + 1) / (double)list[i].warmup);
    expect_rate(&s, list[i].warmup, list[i].steps, 0.8);
  }
}

static void cosine_falls_to_the_least_at_the_end(void **state) {
  (void)state;
  train_settings s = make(TRAIN_RATE_COSINE);
  s.optimizer.min_rate = 0.2;
  s.optimizer.warmup = 4;
  expect_rate(&s, 3, 104, 0.8);
  expect_rate(&s, 4, 104, 0.8);
  expect_rate(&s, 54, 104, 0.5);
  expect_rate(&s, 29, 104, 0.2 + 0.6 * 0.5 * (1 + sqrt(0.5)));
  expect_rate(&s, 104, 104, 0.2);
  expect_rate(&s, 1000, 104, 0.2); /* beyond the plan it stays */
  double before = 1;
  for (int t = 4; t < 104; t++) {
    double now = train_rate(&s, t, 104);
    assert_true(now < before && now > 0.2);
    before = now;
  }
  s.optimizer.warmup = 10; /* as long as the run, and longer */
  expect_rate(&s, 9, 10, 0.8);
  expect_rate(&s, 4, 5, 0.4);
}

static void rsqrt_falls_by_the_root_and_cools_down(void **state) {
  (void)state;
  train_settings s = make(TRAIN_RATE_RSQRT);
  s.optimizer.timescale = 3;
  s.optimizer.warmup = 10;
  expect_rate(&s, 10, 100, 0.8);
  expect_rate(&s, 19, 100, 0.4);
  expect_rate(&s, 55, 100, 0.2);
  s.optimizer.cooldown = 20;
  s.optimizer.min_rate = 0.05;
  double start = 0.8 / sqrt(1 + 70.0 / 3);
  expect_rate(&s, 79, 100, 0.8 / sqrt(1 + 69.0 / 3));
  expect_rate(&s, 80, 100, start); /* the two pieces meet */
  expect_rate(&s, 90, 100, 0.05 + (start - 0.05) / 2);
  expect_rate(&s, 99, 100, 0.05 + (start - 0.05) / 20);
  expect_rate(&s, 100, 100, 0.05);
  s.optimizer.cooldown = 0.2; /* the same as a share */
  expect_rate(&s, 90, 100, 0.05 + (start - 0.05) / 2);
  s.optimizer.cooldown = 95; /* reaches into the warm-up, which goes first */
  expect_rate(&s, 9, 100, 0.8);
  expect_rate(&s, 10, 100, 0.05 + 0.75 * 90 / 95);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(constant_is_the_rate_after_the_warm_up),
      cmocka_unit_test(shares_are_rounded_up_once),
      cmocka_unit_test(cosine_falls_to_the_least_at_the_end),
      cmocka_unit_test(rsqrt_falls_by_the_root_and_cools_down),
  };
  return cmocka_run_group_tests_name("trainer, learning rate", tests, NULL, NULL);
}
