/* Zero-shot classification: the interval against its defining equation, and the classes that it finds against
 * a plain computation from the same vectors. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/state.h"
#include "trainer/item_vectors.h"
#include "trainer/zero_shot.h"

/* Wilson 1927: the ends p of the interval satisfy (h / n - p)^2 = z^2 p (1 - p) / n. */
static void the_interval_solves_its_equation(void **state) {
  (void)state;
  static const int64_t cases[][2] = {{8, 10}, {1, 3}, {500, 1000}, {37, 40}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    double interval[2], n = (double)cases[i][1], share = (double)cases[i][0] / n;
    assert_true(train_zero_shot_share(cases[i][0], cases[i][1], interval) == share);
    assert_true(interval[0] < share && share < interval[1]);
    for (int e = 0; e < 2; e++) {
      double p = interval[e], z = (share - p) / sqrt(p * (1 - p) / n);
      assert_true(fabs(fabs(z) - 1.959963984540054) < 1e-9);
    }
  }
}

static void the_interval_at_the_ends(void **state) {
  (void)state;
  double interval[2];
  assert_true(train_zero_shot_share(0, 20, interval) == 0 && interval[0] == 0);
  assert_true(fabs(interval[1] - 3.8414588206941245 / (20 + 3.8414588206941245)) < 1e-12);
  assert_true(train_zero_shot_share(20, 20, interval) == 1 && interval[1] == 1 && interval[0] > 0.8);
  assert_true(train_zero_shot_share(0, 0, interval) == 0 && interval[0] == 0 && interval[1] == 1);
}

static const char config_text[] =
    "run: {directory: unused, seed: 5, threads: 1}\n"
    "data: {path: nowhere, modalities: [{name: image, length: 8}, {name: text, length: 8}]}\n"
    "model: {width: 16, layers: 2, heads: 2, hidden: 24, embedding: 6, moe: {experts: 4, layers: all}}\n"
    "optimizer: {batch: 8}\n"
    "evaluate: {batch: 7}\n";

enum { ITEMS = 208, PROMPTS = 40 };

static int64_t rows_of(int64_t sample, int32_t m) {
  (void)m;
  return sample % 9 == 4 ? 0 : 1 + sample % 3;
}

static core_status write_split(const char *root, const char *split, int32_t m, int64_t samples) {
  char path[200];
  data_writer *writer = NULL;
  snprintf(path, sizeof path, "%s/%s", root, split);
  data_writer_options options = {.directory = path,
                                 .modality = test_modality_names[m],
                                 .encoder = "test",
                                 .dtype = CORE_FLOAT32,
                                 .width = 5};
  TRY(data_writer_open(&options, &writer));
  for (int64_t s = 0; s < samples; s++) {
    float latent[3 * 5];
    for (int i = 0; i < 15; i++) latent[i] = (float)(4 * sin((double)(s * s * 37 + i * i * 11 + m * 5)));
    /* eight classes with gaps between their numbers, and with 1 to 10 prompts; some items have no label */
    int64_t class = m == 1 && s >= 16 ? s % 3 : s % 8;
    data_sample sample = {.id = (uint64_t)(s + 1),
                          .latent = latent,
                          .rows = rows_of(s, m),
                          .label = m == 0 && s % 13 == 5 ? -1 : (int32_t)(10 * class + 3)};
    TRY(data_writer_add(writer, &sample));
  }
  TRY(data_writer_close(writer));
  return CORE_OK;
}

/* Top-1 and top-5 by definition, in double, from the vectors. */
static void expect_by_hand(train_session *session, const train_zero_shot *got) {
  train_item_vectors items, prompts;
  assert_ok(train_item_vectors_make(session, &session->part[0], -1, &items));
  assert_ok(train_item_vectors_make(session, &session->part[1], -1, &prompts));
  const core_real *x = items.z.data, *p = prompts.z.data;
  int64_t Z = session->model->Z, judged = 0, hits[2] = {0, 0};
  double centre[8][6] = {{0}};
  for (int64_t i = 0; i < prompts.samples; i++)
    for (int64_t z = 0; z < Z; z++) centre[prompts.label[i] / 10][z] += (double)p[i * Z + z];
  for (int64_t i = 0; i < items.samples; i++) {
    double score[8];
    int64_t own = items.label[i] / 10, better = 0;
    if (items.label[i] < 0 || !items.present[i]) continue;
    for (int c = 0; c < 8; c++) {
      double square = 0, product = 0;
      for (int64_t z = 0; z < Z; z++) {
        square += centre[c][z] * centre[c][z];
        product += centre[c][z] * (double)x[i * Z + z];
      }
      score[c] = product / sqrt(square);
    }
    for (int c = 0; c < 8; c++) better += score[c] > score[own];
    judged++;
    hits[0] += better < 1;
    hits[1] += better < 5;
  }
  assert_int_equal(got->items, judged);
  assert_int_equal(got->hits[0], hits[0]);
  assert_int_equal(got->hits[1], hits[1]);
  assert_true(hits[0] > 0 && hits[1] > hits[0] && hits[1] < judged); /* a case that tells */
  train_item_vectors_free(&items);
  train_item_vectors_free(&prompts);
}

static void classes_are_those_of_the_definition(void **state) {
  char root[64] = "/tmp/antiphon-zero-shot-XXXXXX";
  const int64_t width[2] = {5, 5};
  core_config *config = NULL;
  train_session *session = NULL;
  train_zero_shot result;
  assert_non_null(mkdtemp(root));
  assert_ok(write_split(root, "items", 0, ITEMS));
  assert_ok(write_split(root, "prompts", 1, PROMPTS));
  assert_ok(core_config_load(train_settings_spec(), "z.yaml", config_text, NULL, 0, &config));
  train_session_options options = {.config = config,
                                   .comm = *state,
                                   .purpose = TRAIN_PURPOSE_EVALUATE,
                                   .part = {{root, "items", 0}, {root, "prompts", 1}},
                                   .part_count = 2,
                                   .width = width};
  assert_ok(train_session_open(&options, &session));
  for (int m = 0; m < 2; m++)
    for (int i = 0; i < 5; i++) {
      ((core_real *)session->model->connector[m].shift.host)[i] = 0;
      ((core_real *)session->model->connector[m].scale.host)[i] = 1;
    }
  assert_ok(train_state_loaded(session->model));
  assert_ok(train_zero_shot_run(session, &result));
  assert_int_equal(result.prompts, PROMPTS);
  assert_int_equal(result.classes, 8);
  assert_int_equal(result.unlabelled, 16);
  assert_int_equal(result.items + result.absent + result.unlabelled, ITEMS);
  expect_by_hand(session, &result);
  train_session_close(session);
  core_config_destroy(config);
  test_remove_tree(root);
}

int main(void) {
  comm_options options = {.deadline = 60, .alone = true};
  comm_world *world = NULL;
  if (comm_start(&options, &world) != CORE_OK) return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_interval_solves_its_equation),
      cmocka_unit_test(the_interval_at_the_ends),
      cmocka_unit_test_prestate(classes_are_those_of_the_definition, world),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
