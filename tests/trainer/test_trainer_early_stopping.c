/* Early stopping: when a run ends is a function of the sequence of evaluations, wherever it was interrupted.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/test_unit.h"
#include "trainer/schedule/early_stopping.h"
#include "trainer/state.h"

typedef struct observation {
  double recall;
  bool best; /* expected: the largest so far */
  bool due;
} observation;

static train_early_stopping make(int64_t patience, double min_delta) {
  train_settings settings = {0};
  train_early_stopping stopping;
  settings.run.early_stopping.patience = patience;
  settings.run.early_stopping.min_delta = min_delta;
  train_early_stopping_make(&settings, &stopping);
  return stopping;
}

static void expect(train_early_stopping *s, const observation *list, int count, int64_t first) {
  for (int i = 0; i < count; i++) {
    assert_int_equal(train_early_stopping_observe(s, first + i, list[i].recall), list[i].best);
    assert_int_equal(train_early_stopping_due(s), list[i].due);
  }
}

static void stops_after_patience_without_a_rise(void **state) {
  (void)state;
  train_early_stopping s = make(2, 0);
  static const observation list[] = {{0.1, true, false},  {0.2, true, false},  {0.2, false, false},
                                     {0.25, true, false}, {0.1, false, false}, {0.25, false, true}};
  expect(&s, list, 6, 10);
  assert_int_equal(s.best_step, 13);
  assert_true(s.best == 0.25);
}

/* Small steps upward do not count as rises, one after another or together, until they exceed the last rise by
 * min_delta; the best follows them all the same. */
static void a_rise_must_exceed_min_delta(void **state) {
  (void)state;
  train_early_stopping s = make(3, 0.1);
  static const observation list[] = {{0.5, true, false},   {0.55, true, false}, {0.6, true, false},
                                     {0.625, true, false}, {0.65, true, false}, {0.7, true, false},
                                     {0.6, false, true}};
  expect(&s, list, 7, 0);
  assert_int_equal(s.best_step, 5);
  assert_int_equal(s.risen_step, 3);
}

static void without_patience_it_never_stops(void **state) {
  (void)state;
  train_early_stopping s = make(0, 0);
  for (int64_t step = 0; step < 100; step++) {
    assert_int_equal(train_early_stopping_observe(&s, step, 0.5), step == 0);
    assert_false(train_early_stopping_due(&s));
  }
}

static void recall_zero_is_an_evaluation(void **state) {
  (void)state;
  train_early_stopping s = make(1, 0);
  static const observation list[] = {{0, true, false}, {0, false, true}};
  expect(&s, list, 2, 1);
}

static void an_evaluation_made_again_counts_once(void **state) {
  (void)state;
  train_early_stopping s = make(2, 0);
  static const observation list[] = {{0.5, true, false}, {0.4, false, false}};
  expect(&s, list, 2, 1);
  assert_false(train_early_stopping_observe(&s, 2, 0.4));
  assert_false(train_early_stopping_due(&s));
  assert_false(train_early_stopping_observe(&s, 3, 0.4));
  assert_true(train_early_stopping_due(&s));
}

/* Through a checkpoint's description after each evaluation: the same end, bit for bit. */
static void survives_a_checkpoint(void **state) {
  (void)state;
  train_early_stopping straight = make(3, 0.01), resumed = straight;
  for (int64_t step = 1; step < 40; step++) {
    double recall = 1.0 / 3 + 0.1 * (double)(step * 7 % 11) / (double)(step + 3);
    bool best = train_early_stopping_observe(&straight, step, recall);
    assert_int_equal(train_early_stopping_observe(&resumed, step, recall), best);
    train_state_meta meta = {.step = step, .config = (char *)"", .stopping = resumed}, read;
    char *json = NULL;
    assert_ok(train_state_meta_write(&meta, &json));
    assert_ok(train_state_meta_read(json, &read));
    free(json);
    free(read.config);
    resumed.best = read.stopping.best;
    resumed.best_step = read.stopping.best_step;
    resumed.risen = read.stopping.risen;
    resumed.risen_step = read.stopping.risen_step;
    resumed.stale = read.stopping.stale;
    resumed.seen = read.stopping.seen;
    assert_true(resumed.best == straight.best && resumed.risen == straight.risen);
    assert_int_equal(resumed.best_step, straight.best_step);
    assert_int_equal(resumed.risen_step, straight.risen_step);
    assert_int_equal(resumed.stale, straight.stale);
    assert_int_equal(resumed.seen, straight.seen);
    assert_int_equal(train_early_stopping_due(&resumed), train_early_stopping_due(&straight));
  }
  assert_true(train_early_stopping_due(&straight));
}

/* One written before there was early stopping begins anew; one with a part missing is refused. */
static void older_and_damaged_descriptions(void **state) {
  (void)state;
  static const char fields[] =
      "\"step\":\"5\",\"stage\":\"0\",\"epoch\":\"0\",\"consumed\":\"3\","
      "\"fingerprint\":\"1\",\"ranks\":\"1\",\"expert_ranks\":\"1\",\"config\":\"\"";
  char json[600];
  train_state_meta meta;
  snprintf(json, sizeof json, "{%s}", fields);
  assert_ok(train_state_meta_read(json, &meta));
  assert_true(meta.stopping.best_step == -1 && meta.stopping.risen_step == -1 && meta.stopping.seen == -1);
  assert_int_equal(meta.stopping.stale, 0);
  free(meta.config);
  snprintf(json, sizeof json, "{%s,\"early_stopping\":{\"best\":\"0.5\",\"best_step\":\"2\"}}", fields);
  assert_error(train_state_meta_read(json, &meta), CORE_ERR_FORMAT, "lacks a field");
  snprintf(
      json, sizeof json,
      "{%s,\"early_stopping\":{\"best\":\"0.5x\",\"best_step\":\"2\",\"risen\":\"0\",\"risen_step\":\"1\","
      "\"stale\":\"0\",\"seen\":\"2\"}}",
      fields);
  assert_error(train_state_meta_read(json, &meta), CORE_ERR_FORMAT, "lacks a field");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(stops_after_patience_without_a_rise),  cmocka_unit_test(a_rise_must_exceed_min_delta),
      cmocka_unit_test(without_patience_it_never_stops),      cmocka_unit_test(recall_zero_is_an_evaluation),
      cmocka_unit_test(an_evaluation_made_again_counts_once), cmocka_unit_test(survives_a_checkpoint),
      cmocka_unit_test(older_and_damaged_descriptions),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
