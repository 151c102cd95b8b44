/* Mixtures where no golden data reach: equal experts are one dense layer, experts that were added leave every
 * bit of the old model as it is, where experts lie. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"

static comm_world *world;
static char root[64];

static const char config[] =
    "run: {directory: unused, seed: 3, steps: 60, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 0\n"
    "  modalities: [{name: image, positions: none}, {name: text, positions: none}]\n"
    "model: {kind: decoder, vocabulary: 50, width: 16, layers: 3, heads: 2, hidden: 24,\n"
    "        moe: {layers: every 2, layer_experts: [3, 5], choose: 2, gate: renormalised, noise: 0}}\n"
    "objective: {importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 8, rate: 0.01, warmup: 0, weight_decay: 0.1}\n";

static int64_t rows_of(int64_t sample, int32_t m) {
  return 2 + (sample + m) % 4;
}

static int make_set(void **state) {
  (void)state;
  char directory[80];
  snprintf(root, sizeof root, "/tmp/antiphon-mixture-XXXXXX");
  if (!mkdtemp(root)) return 1;
  snprintf(directory, sizeof directory, "%s/train", root);
  test_set_options o = {.modalities = 2,
                        .width = {9, 7},
                        .samples = 16,
                        .shards = 1,
                        .directory = directory,
                        .first_id = 1,
                        .rows = rows_of,
                        .vocabulary = 50};
  return test_set_write(&o) == CORE_OK ? 0 : 1;
}

static int remove_set(void **state) {
  (void)state;
  test_remove_tree(root);
  return 0;
}

/* ---- equal experts ---- */

static int32_t find(const train_parameters *set, const char *name) {
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) return i;
  return -1;
}

/* "blocks.2.experts.4.in.weight" -> "blocks.2.feed_forward.in.weight"; any other name stays. */
static void dense_name(const char *name, char out[CORE_NAME]) {
  const char *part = strstr(name, ".experts.");
  const char *rest = part ? strchr(part + 9, '.') : NULL;
  if (rest)
    snprintf(out, CORE_NAME, "%.*s.feed_forward%.60s", (int)(part - name), name, rest);
  else
    snprintf(out, CORE_NAME, "%s", name);
}

/* Every parameter that both have: the dense model's values into the mixture's. */
static void copy_values(const train_session *dense, const train_session *mixture) {
  const train_parameters *from = &dense->model->parameters, *to = &mixture->model->parameters;
  for (int32_t i = 0; i < to->count; i++) {
    char name[CORE_NAME];
    dense_name(to->list[i].name, name);
    int32_t source = find(from, name);
    if (source < 0) continue;
    core_tensor value = train_parameter_value(from, source), own = train_parameter_value(to, i);
    assert_int_equal(core_tensor_count(&value), core_tensor_count(&own));
    memcpy(own.data, value.data, core_tensor_bytes(&value));
  }
}

static train_report step_of(const test_session *t) {
  data_batch *batch = NULL;
  train_report report = {0};
  assert_ok(data_stream_get(t->stream, &batch));
  assert_ok(train_stepper_gradients(&t->session->stepper, batch, &report));
  data_stream_put(t->stream, batch);
  return report;
}

/* |sum over the experts of their gradients - the dense one's| / |the dense one's| */
static double apart(const train_parameters *mixture, const train_parameters *dense, int32_t index) {
  core_tensor expected = train_parameter_gradient(dense, index);
  int64_t n = core_tensor_count(&expected);
  double *sum = calloc((size_t)n, sizeof *sum), difference = 0, size = 0;
  assert_non_null(sum);
  for (int32_t i = 0; i < mixture->count; i++) {
    char name[CORE_NAME];
    dense_name(mixture->list[i].name, name);
    if (strcmp(name, dense->list[index].name) != 0) continue;
    const core_real *part = train_parameter_gradient(mixture, i).data;
    for (int64_t j = 0; j < n; j++) sum[j] += (double)part[j];
  }
  for (int64_t j = 0; j < n; j++) {
    double want = (double)((const core_real *)expected.data)[j];
    difference += (sum[j] - want) * (sum[j] - want);
    size += want * want;
  }
  free(sum);
  assert_true(size > 0);
  return sqrt(difference / size);
}

/* The control `pure`: weights that add up to one over equal experts are no weights. */
static void equal_experts_are_one_dense_layer(void **state) {
  (void)state;
  static const char *const none[] = {"model.moe.layers=none", "model.moe.layer_experts=[]", NULL};
  const double allowed = sizeof(core_real) == 8 ? 1e-12 : 1e-5;
  test_session dense, mixture;
  test_session_open(world, config, none, root, &dense);
  test_session_open(world, config, NULL, root, &mixture);
  copy_values(dense.session, mixture.session);
  train_report want = step_of(&dense), got = step_of(&mixture);
  assert_true(want.loss > 0 && fabs(got.loss - want.loss) <= allowed * want.loss);
  const train_parameters *p = &dense.session->model->parameters;
  for (int32_t i = 0; i < p->count; i++) {
    double distance = apart(&mixture.session->model->parameters, p, i);
    if (!(distance <= 10 * allowed)) fail_msg("gradient of %s is %g apart", p->list[i].name, distance);
  }
  test_session_close(&mixture);
  test_session_close(&dense);
}

/* ---- placement ---- */

/* [s E / e, (s + 1) E / e), rounded down: a rank may hold none. */
static void experts_lie_as_evenly_as_they_can(void **state) {
  (void)state;
  static const struct {
    int64_t experts, ranks, first[5];
  } list[] = {{5, 4, {0, 1, 2, 3, 5}}, {3, 4, {0, 0, 1, 2, 3}}, {3, 2, {0, 1, 3}}, {8, 4, {0, 2, 4, 6, 8}}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    for (int64_t s = 0; s <= list[i].ranks; s++)
      assert_int_equal(train_experts_first(list[i].experts, s, list[i].ranks), list[i].first[s]);
}

/* ---- added experts ---- */

static bool is_new(const char *name) {
  static const char *const parts[] = {".router.added.", ".calibration.", "blocks.0.experts.2.",
                                      "blocks.2.experts.3.", "blocks.2.experts.4."};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    if (strstr(name, parts[i])) return true;
  return false;
}

static void *values_of(const train_parameters *set) {
  size_t bytes = (size_t)set->total * sizeof *set->value;
  void *copy = malloc(bytes);
  assert_non_null(copy);
  memcpy(copy, set->value, bytes);
  return copy;
}

/* Old tensors keep every bit, single columns and experts of a layer among them; every new one moves. */
static void old_tensors_keep_their_bits(void **state) {
  (void)state;
  static const char *const set[] = {
      "model.moe.added=[1, 2]",
      "model.moe.added_bias=true",
      "model.moe.calibration=add",
      "objective.balance=0.01",
      "optimizer.frozen=['embedding.*', 'output.*', 'connector.*', '*norm.weight', 'blocks.*.attention.*', "
      "'blocks.*.feed_forward.*', 'blocks.*.router.weight', 'blocks.0.experts.[01].*', "
      "'blocks.2.experts.[012].*']",
      NULL};
  test_session t;
  test_session_open(world, config, set, root, &t);
  train_session *session = t.session;
  const train_parameters *p = &session->model->parameters;
  core_real *before = values_of(p);
  for (int step = 0; step < 3; step++) {
    data_batch *batch = NULL;
    train_report report = {0};
    assert_ok(data_stream_get(t.stream, &batch));
    assert_ok(train_stepper_run(&session->stepper, batch, &report));
    assert_true(report.router.balance > 0 && !report.skipped);
    data_stream_put(t.stream, batch);
    session->env.step++;
  }
  int moved = 0;
  for (int32_t i = 0; i < p->count; i++) {
    const train_parameter *its = &p->list[i];
    bool same = memcmp(before + its->first, p->value + its->first, (size_t)its->count * sizeof *before) == 0;
    if (same == is_new(its->name)) fail_msg("%s %s", its->name, same ? "did not move" : "moved");
    moved += !same;
  }
  assert_int_equal(moved, 2 * 2 + 2 * 2 + 2 * 3); /* columns and biases, calibrations, experts */
  free(before);
  test_session_close(&t);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_set, remove_set)
  const struct CMUnitTest tests[] = {TEST(equal_experts_are_one_dense_layer),
                                     TEST(experts_lie_as_evenly_as_they_can),
                                     TEST(old_tensors_keep_their_bits)};
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("trainer, mixtures", tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
