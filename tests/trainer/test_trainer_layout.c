/* Who works on what: every sample of every modality is worked on exactly once, on every layout. */
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/test_unit.h"
#include "trainer/layout.h"

static const char base[] =
    "data:\n"
    "  path: nowhere\n"
    "  modalities: [{name: image}, {name: text}, {name: speech}]\n"
    "model: {width: 32, layers: 2, heads: 4, moe: {experts: 24}}\n";

enum { MOST_BATCH = 4096, M = 3 };

static core_config *config;

static int forget(void **state) {
  (void)state;
  core_config_destroy(config);
  config = NULL;
  return 0;
}

static const train_settings *load(int e, bool partitioned, int64_t batch, int64_t micro, const int *ranks) {
  char text[8][64];
  const char *set[8];
  int32_t count = 0;
  snprintf(text[0], 64, "parallel.experts=%d", e);
  snprintf(text[1], 64, "parallel.placement=%s", partitioned ? "partitioned" : "shared");
  snprintf(text[2], 64, "optimizer.batch=%lld", (long long)batch);
  snprintf(text[3], 64, "optimizer.accumulate=%lld", (long long)micro);
  for (count = 4; ranks && count < 4 + M; count++)
    snprintf(text[count], 64, "data.modalities.%d.ranks=%d", count - 4, ranks[count - 4]);
  for (int i = 0; i < count; i++) set[i] = text[i];
  forget(NULL);
  assert_ok(core_config_load(train_settings_spec(), "layout", base, set, count, &config));
  return core_config_data(config);
}

static train_layout make(int32_t ranks, int32_t rank, const double *cost) {
  train_layout layout;
  assert_ok(train_layout_make(config, ranks, rank, cost, &layout));
  return layout;
}

/* Marks what each rank takes; all ranks must take all once, in order, and no more than they say. */
static void expect_whole(const train_layout *layout) {
  static unsigned char taken[MOST_BATCH];
  for (int32_t m = 0; m < M; m++) {
    memset(taken, 0, sizeof taken);
    int64_t before = 0;
    for (int64_t micro = 0; micro < layout->micro_batches; micro++)
      for (int32_t rank = 0; rank < layout->ranks; rank++) {
        data_range range = train_layout_range(layout, rank, m, micro);
        bool holds = train_layout_holds(layout, rank, m);
        assert_true(range.lo >= 0 && range.lo <= range.hi && range.hi <= layout->batch);
        if (range.lo == range.hi) continue;
        assert_true(holds);
        assert_true(range.hi - range.lo <= train_layout_most_samples(layout, rank, m));
        assert_int_equal(range.lo, before); /* ranks and micro-batches go through the batch in order */
        before = range.hi;
        for (int64_t s = range.lo; s < range.hi; s++) assert_int_equal(taken[s]++, 0);
      }
    for (int64_t s = 0; s < layout->batch; s++) assert_int_equal(taken[s], 1);
  }
}

static void every_sample_is_worked_on_once(void **state) {
  (void)state;
  static const int32_t worlds[] = {1, 2, 3, 4, 6, 8, 12, 24};
  static const double cost[M] = {5, 1, 2.5};
  int layouts = 0;
  for (int w = 0; w < 8; w++)
    for (int e = 1; e <= worlds[w]; e++) {
      if (worlds[w] % e != 0) continue;
      for (int placement = 0; placement < 2; placement++)
        for (int micro = 1; micro <= 3; micro++)
          for (int times = 1; times <= 7; times += 3) {
            int64_t parts = placement == 0 ? worlds[w] : worlds[w] / e;
            (void)load(e, placement == 1, parts * micro * times, micro, NULL);
            assert_ok(train_settings_check(config, worlds[w]));
            train_layout layout = make(worlds[w], worlds[w] - 1, cost);
            expect_whole(&layout);
            layouts++;
            for (int64_t batch = 1; batch < 40; batch += 6) { /* of an evaluation: any size */
              train_layout other = train_layout_with_batch(&layout, batch, 1);
              expect_whole(&other);
            }
          }
    }
  assert_true(layouts > 400);
}

static void shared_samples_are_spread_evenly(void **state) {
  (void)state;
  (void)load(2, false, 32, 2, NULL);
  train_layout layout = make(4, 3, NULL);
  assert_int_equal(layout.groups, 2);
  assert_int_equal(layout.group, 1);
  assert_int_equal(layout.slot, 1);
  assert_int_equal(layout.block, 8);
  data_range range = train_layout_range(&layout, 3, 1, 1);
  assert_int_equal(range.lo, 28);
  assert_int_equal(range.hi, 32);
  for (int32_t rank = 0; rank < 4; rank++)
    for (int32_t m = 0; m < M; m++) {
      assert_true(train_layout_holds(&layout, rank, m));
      assert_int_equal(train_layout_most_samples(&layout, rank, m), 4);
    }
}

/* Slots of each modality as "first+count". */
static void expect_slots(int e, const double *cost, const int *ranks, const char *expected) {
  char text[128] = "";
  (void)load(e, true, 24, 1, ranks);
  train_layout layout = make(2 * e, 0, cost);
  for (int32_t m = 0; m < M; m++)
    snprintf(text + strlen(text), sizeof text - strlen(text), "%s%d+%d", m ? " " : "", layout.slot_first[m],
             layout.slot_count[m]);
  assert_string_equal(text, expected);
  expect_whole(&layout);
}

static void automatic_placement_follows_the_cost(void **state) {
  (void)state;
  expect_slots(3, (const double[]){1, 1, 1}, NULL, "0+1 1+1 2+1");
  expect_slots(4, (const double[]){1, 1, 2}, NULL, "0+1 1+1 2+2");
  expect_slots(8, (const double[]){10, 1, 1}, NULL, "0+6 6+1 7+1");
  expect_slots(12, (const double[]){3, 6, 3}, NULL, "0+3 3+6 9+3");
  expect_slots(2, (const double[]){3, 2, 2}, NULL, "0+1 1+1 1+1"); /* the costliest alone */
  expect_slots(2, (const double[]){1, 5, 1}, NULL, "1+1 0+1 1+1");
  expect_slots(1, (const double[]){1, 5, 1}, NULL, "0+1 0+1 0+1");
  expect_slots(4, (const double[]){0, 0, 0}, NULL, "0+2 2+1 3+1"); /* a set without tokens */
}

static void settings_place_by_hand(void **state) {
  (void)state;
  expect_slots(4, NULL, (const int[]){1, 2, 1}, "0+1 1+2 3+1");
  expect_slots(6, NULL, (const int[]){3, 1, 2}, "0+3 3+1 4+2");
  train_layout layout;
  (void)load(4, true, 24, 1, (const int[]){1, 1, 1});
  assert_error(train_layout_make(config, 8, 0, NULL, &layout), CORE_ERR_CONFIG, "add up to the 4");
  (void)load(4, true, 24, 1, (const int[]){2, 2, 0});
  assert_error(train_layout_make(config, 8, 0, NULL, &layout), CORE_ERR_CONFIG, "'speech' has none");
}

static void a_layout_describes_itself(void **state) {
  (void)state;
  char text[256];
  const train_settings *s = load(4, true, 24, 1, (const int[]){1, 2, 1});
  train_layout layout = make(8, 0, NULL);
  train_layout_describe(&layout, s, text, sizeof text);
  assert_string_equal(
      text,
      "8 ranks, 2 expert groups of 4, partitioned: image on slot 0, text on slots 1-2, speech on slot 3");
  s = load(1, false, 24, 1, NULL);
  layout = make(1, 0, NULL);
  train_layout_describe(&layout, s, text, sizeof text);
  assert_string_equal(text, "1 rank, 1 expert group of 1, shared");
  for (int64_t capacity = 1; capacity < 40; capacity++) {
    memset(text, '#', sizeof text);
    train_layout_describe(&layout, s, text, capacity);
    assert_true(strlen(text) < (size_t)capacity);
    assert_int_equal(text[capacity], '#');
  }
}

#define TEST(name) cmocka_unit_test_teardown(name, forget)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(every_sample_is_worked_on_once),
      TEST(shared_samples_are_spread_evenly),
      TEST(automatic_placement_follows_the_cost),
      TEST(settings_place_by_hand),
      TEST(a_layout_describes_itself),
  };
  return cmocka_run_group_tests_name("trainer, layout", tests, NULL, NULL);
}
