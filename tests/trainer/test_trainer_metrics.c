/* metrics.jsonl: every line is JSON whatever the numbers are, and a run that goes on from a checkpoint
 * removes the lines of steps that were lost. The model is made by hand: only its sums and settings are read.
 */
#include <cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/file.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/metrics.h"

enum { M = 2, E = 3, K = 2, LAYERS = 2 };

static train_modality_settings modalities[M];
static train_settings settings;
static train_env env;
static train_model *model;
static train_contrastive *contrastive;
static char directory[64], path[128];

static int set_up(void **state) {
  (void)state;
  static char names[M][8] = {"image", "text"};
  memset(&settings, 0, sizeof settings);
  memset(&env, 0, sizeof env);
  for (int m = 0; m < M; m++) modalities[m] = (train_modality_settings){.name = names[m]};
  settings.data.modalities = modalities;
  settings.data.modalities_count = M;
  settings.model.moe.experts = E;
  env.settings = &settings;
  env.layout.modalities = M;
  model = calloc(1, sizeof *model);
  contrastive = calloc(1, sizeof *contrastive);
  if (!model || !contrastive) return -1;
  model->env = &env;
  model->sums = (train_moe_sums){.layers = LAYERS, .modalities = M, .experts = E, .choices = K};
  model->sums.gate_sum = calloc(LAYERS * M * K, sizeof(double));
  model->sums.value.host = calloc(LAYERS * M * (3 + 2 * E), sizeof(double));
  model->sums.count.host = calloc(LAYERS * M * (2 + 2 * E), sizeof(int64_t));
  contrastive->pairs = 1;
  contrastive->second[0] = 1;
  snprintf(directory, sizeof directory, "/tmp/antiphon-metrics-XXXXXX");
  if (!mkdtemp(directory)) return -1;
  snprintf(path, sizeof path, "%s/metrics.jsonl", directory);
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  free(model->sums.value.host);
  free(model->sums.count.host);
  free(model->sums.gate_sum);
  free(model);
  free(contrastive);
  test_remove_tree(directory);
  return 0;
}

static char *slurp(void) {
  char *text = NULL;
  int64_t count = 0;
  assert_ok(core_file_read_all(path, 1 << 20, &text, &count));
  assert_int_equal(strlen(text), count);
  return text;
}

/* Writes the steps from `first` to `last`, after a resume from `first` - 1. */
static void write_steps(int64_t first, int64_t last, const train_report *like) {
  train_metrics *metrics = NULL;
  assert_ok(train_metrics_open(directory, first - 1, model, &metrics));
  for (int64_t step = first; step <= last; step++) {
    train_report report = *like;
    data_position position = {0, 1, step * 10};
    report.step = step;
    assert_ok(train_metrics_step(metrics, &report, contrastive, &position));
  }
  train_metrics_close(metrics);
}

static const cJSON *get(const cJSON *object, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
  if (!item) fail_msg("the line has no \"%s\"", name);
  return item;
}

static cJSON *only_line(void) {
  char *text = slurp(), *end = strchr(text, '\n');
  assert_non_null(end);
  assert_string_equal(end, "\n");
  const char *rest = NULL;
  cJSON *line = cJSON_ParseWithOpts(text, &rest, 0);
  assert_non_null(line);
  assert_ptr_equal(rest, end);
  free(text);
  return line;
}

static void a_line_says_what_the_step_did(void **state) {
  (void)state;
  train_report report = {.loss = 2.5,
                         .contrastive = 2.25,
                         .pair = {2.25},
                         .router = {.importance = 0.125, .balance = 0.375},
                         .rate = 1e-3,
                         .norm = 3,
                         .clip = 0.5,
                         .tokens = {100, 40},
                         .items = {10, 8},
                         .wall = 2};
  int64_t *count = train_moe_counts(&model->sums, 1, 0);
  double *value = train_moe_values(&model->sums, 1, 0);
  static const int64_t counts[2 * E + 2] = {6, 3, 0, 4, 3, 0, 7, 8}; /* before, after, kept, tokens */
  static const double values[3 + E] = {8, 0, 4, 4, 4, 0};
  memcpy(count, counts, sizeof counts);
  memcpy(value, values, sizeof values);
  train_moe_gates(&model->sums, 1, 0)[0] = 6;
  train_moe_gates(&model->sums, 1, 0)[1] = 1;
  write_steps(1, 1, &report);
  cJSON *line = only_line();
  assert_true(get(line, "step")->valueint == 1 && get(line, "epoch")->valueint == 1 &&
              get(line, "consumed")->valueint == 10);
  assert_true(get(line, "loss")->valuedouble == 2.5 &&
              get(get(line, "pairs"), "image:text")->valuedouble == 2.25);
  assert_true(get(get(line, "router"), "importance")->valuedouble == 0.125);
  assert_true(get(get(line, "router"), "balance")->valuedouble == 0.375);
  assert_true(get(get(line, "tokens_per_second"), "image")->valuedouble == 50);
  assert_true(cJSON_IsFalse(get(line, "skipped")));
  const cJSON *layers = get(line, "layers"), *layer = cJSON_GetArrayItem(layers, 1);
  assert_int_equal(cJSON_GetArraySize(layers), LAYERS);
  assert_true(get(layer, "dead")->valueint == 1);
  assert_true(fabs(get(layer, "max_over_mean")->valuedouble - 4 * 3 / 7.0) < 1e-8);
  assert_true(fabs(get(layer, "importance_cv2")->valuedouble - 0.5) < 1e-8); /* of 4, 4, 0 */
  assert_true(get(layer, "load_cv2")->valuedouble == 0);
  const cJSON *image = get(get(layer, "modalities"), "image");
  assert_true(get(image, "success")->valuedouble == 7.0 / 8);
  assert_true(get(image, "dropped")->valuedouble == 1.0 / 8);
  assert_int_equal(cJSON_GetArraySize(get(image, "gate")), K);
  assert_true(cJSON_GetArrayItem(get(image, "gate"), 0)->valuedouble == 0.75);
  assert_true(cJSON_GetArrayItem(get(image, "gate"), 1)->valuedouble == 0.125);
  assert_true(fabs(get(image, "kept_choices")->valuedouble - 7.0 / 9) < 1e-8);
  assert_true(get(image, "entropy")->valuedouble == 0.5);
  assert_true(fabs(get(image, "effective_experts")->valuedouble - 2) < 1e-8);
  assert_int_equal(cJSON_GetArraySize(get(image, "before")), E);
  assert_true(cJSON_GetArrayItem(get(image, "after"), 0)->valueint == 4);
  cJSON_Delete(line);
}

static void numbers_that_json_lacks_become_null(void **state) {
  (void)state;
  train_report report = {.loss = (double)NAN,
                         .contrastive = (double)INFINITY,
                         .pair = {-(double)INFINITY},
                         .norm = (double)NAN,
                         .skipped = true};
  train_moe_values(&model->sums, 0, 1)[0] = 1;
  train_moe_values(&model->sums, 0, 1)[2] = (double)NAN;
  train_moe_counts(&model->sums, 0, 1)[2 * E + 1] = 1;
  train_moe_gates(&model->sums, 0, 1)[1] = (double)NAN;
  write_steps(1, 1, &report); /* wall = 0: tokens per second are 0 / 0 */
  cJSON *line = only_line();
  assert_true(cJSON_IsNull(get(line, "loss")) && cJSON_IsNull(get(line, "contrastive")));
  assert_true(cJSON_IsNull(get(get(line, "pairs"), "image:text")) &&
              cJSON_IsNull(get(line, "gradient_norm")));
  assert_true(cJSON_IsNull(get(get(line, "tokens_per_second"), "text")));
  assert_true(cJSON_IsTrue(get(line, "skipped")));
  const cJSON *layer = cJSON_GetArrayItem(get(line, "layers"), 0);
  const cJSON *text = get(get(layer, "modalities"), "text");
  assert_true(cJSON_IsNull(get(text, "entropy")) && cJSON_IsNull(cJSON_GetArrayItem(get(text, "gate"), 1)));
  cJSON_Delete(line);
}

static void a_model_without_moe_layers_has_lines_too(void **state) {
  (void)state;
  train_report report = {.loss = 1, .wall = 1};
  model->sums.layers = 0;
  contrastive->pairs = 0;
  write_steps(1, 1, &report);
  cJSON *line = only_line();
  assert_int_equal(cJSON_GetArraySize(get(line, "layers")), 0);
  assert_int_equal(cJSON_GetArraySize(get(line, "pairs")), 0);
  cJSON_Delete(line);
}

static void an_evaluation_is_a_line(void **state) {
  (void)state;
  train_metrics *metrics = NULL;
  train_retrieval *result = calloc(1, sizeof *result);
  assert_non_null(result);
  result->samples = 20;
  result->queries[0][1] = 10;
  result->gallery[1] = 20;
  result->hits[0][1][0] = 4;
  result->hits[0][1][1] = result->hits[0][1][2] = 9;
  assert_ok(train_metrics_open(directory, 0, model, &metrics));
  assert_ok(train_metrics_evaluation(metrics, 5, result));
  train_metrics_close(metrics);
  free(result);
  cJSON *line = only_line();
  const cJSON *evaluation = get(line, "evaluation"),
              *direction = get(get(evaluation, "retrieval"), "image:text");
  assert_true(get(line, "step")->valueint == 5);
  assert_true(get(direction, "r1")->valuedouble == 0.4 && get(direction, "r10")->valuedouble == 0.9);
  assert_null(cJSON_GetObjectItem(get(evaluation, "retrieval"), "text:image")); /* no queries */
  cJSON_Delete(line);
}

/* The steps of the lines, as "1 2 3 ". */
static void expect_steps(const char *expected) {
  char got[256] = "", *text = slurp();
  for (char *line = text, *end; *line; line = end + 1) {
    end = strchr(line, '\n');
    assert_non_null(end); /* no torn line */
    *end = '\0';
    cJSON *object = cJSON_Parse(line);
    assert_non_null(object);
    snprintf(got + strlen(got), sizeof got - strlen(got), "%d ", get(object, "step")->valueint);
    cJSON_Delete(object);
  }
  free(text);
  assert_string_equal(got, expected);
}

static void append(const char *text) {
  FILE *file = fopen(path, "a");
  assert_non_null(file);
  fputs(text, file);
  fclose(file);
}

static void going_on_removes_later_and_torn_lines(void **state) {
  (void)state;
  const train_report report = {.loss = 1, .wall = 1};
  write_steps(1, 12, &report);
  expect_steps("1 2 3 4 5 6 7 8 9 10 11 12 ");
  write_steps(10, 11, &report); /* resumed from the checkpoint of step 9 */
  expect_steps("1 2 3 4 5 6 7 8 9 10 11 ");
  append("{\"step\":12,\"epo");
  write_steps(12, 12, &report);
  expect_steps("1 2 3 4 5 6 7 8 9 10 11 12 ");
  append("{\"step\":3"); /* torn inside a number that would pass for an old step */
  write_steps(13, 12, &report);
  expect_steps("1 2 3 4 5 6 7 8 9 10 11 12 ");
  write_steps(1, 0, &report); /* from the start */
  expect_steps("");
}

static void a_line_is_whole_or_not_there(void **state) {
  (void)state;
  const train_report report = {.loss = 1, .wall = 1};
  data_position position = {0};
  train_metrics *metrics = NULL;
  core_file_fault fault = {.at = 1, .error = 28, .containing = "metrics.jsonl"};
  assert_ok(train_metrics_open(directory, 0, model, &metrics));
  assert_ok(train_metrics_step(metrics, &report, contrastive, &position));
  core_file_inject(&fault);
  assert_error(train_metrics_step(metrics, &report, contrastive, &position), CORE_ERR_IO, path);
  core_file_inject(NULL);
  assert_ok(train_metrics_step(metrics, &report, contrastive, &position));
  train_metrics_close(metrics);
  expect_steps("0 0 ");
  assert_error(train_metrics_open("/nonexistent", 0, model, &metrics), CORE_ERR_NOT_FOUND,
               "/nonexistent/metrics.jsonl");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(a_line_says_what_the_step_did),
      TEST(numbers_that_json_lacks_become_null),
      TEST(a_model_without_moe_layers_has_lines_too),
      TEST(an_evaluation_is_a_line),
      TEST(going_on_removes_later_and_torn_lines),
      TEST(a_line_is_whole_or_not_there),
  };
  return cmocka_run_group_tests_name("trainer, metrics", tests, NULL, NULL);
}
