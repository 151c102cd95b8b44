/* Adapters: they change nothing at first, nothing but them is trained, what is dropped out is dropped in
 * training alone, and what they cost is what is planned and no more. */
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
    "  modalities: [{name: image, positions: none}, {name: text, connector: mlp, hidden: 12, length: 16}]\n"
    "model: {kind: decoder, vocabulary: 40, width: 16, layers: 3, heads: 2, hidden: 24,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, noise: 0}}\n"
    "objective: {importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 8, rate: 0.01, warmup: 0}\n";

#define ADAPTERS                                                         \
  "model.lora=[{parameters: blocks.*.attention.qkv, rank: 2, alpha: 6}," \
  " {parameters: blocks.*, rank: 3, alpha: 6, dropout: 0.4},"            \
  " {parameters: connector.text.first, rank: 2, alpha: 4, dropout: 0.4}]"
#define BASE "optimizer.frozen=[connector.*,embedding.*,output.*,'*norm*','*.router.*']"

static data_batch *open_with(const char *const *set, test_session *t) {
  data_batch *batch = NULL;
  test_session_open(world, config, set, root, t);
  assert_ok(data_stream_get(t->stream, &batch));
  return batch;
}

static void close_with(test_session *t, data_batch *batch) {
  data_stream_put(t->stream, batch);
  test_session_close(t);
}

static double step(test_session *t, const data_batch *batch) {
  train_report report = {0};
  assert_ok(train_stepper_run(&t->session->stepper, batch, &report));
  t->session->env.step++;
  return report.loss;
}

/* Loss of a forward pass in a mode, at a step. */
static double loss_at(test_session *t, const data_batch *batch, int64_t at, train_mode mode) {
  train_model *model = t->session->model;
  t->session->env.step = at;
  model->decoder.loss = 0;
  assert_ok(train_model_take(model, batch, 0, -1));
  assert_ok(train_model_forward(model, mode));
  return model->decoder.loss;
}

static const train_parameter *find(const train_parameters *set, const char *name) {
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) return &set->list[i];
  fail_msg("no parameter %s", name);
  return NULL;
}

static void an_adapter_begins_as_nothing(void **state) {
  (void)state;
  for (int bfloat = 0; bfloat < (CORE_REAL_DTYPE == CORE_FLOAT32 ? 2 : 1); bfloat++) {
    const char *plain[] = {bfloat ? "run.precision=bfloat16" : NULL, NULL};
    const char *adapted[] = {ADAPTERS, plain[0], NULL};
    test_session a, b;
    data_batch *x = open_with(plain, &a), *y = open_with(adapted, &b);
    double loss = step(&a, x);
    assert_true(loss == step(&b, y));
    assert_true(step(&a, x) != step(&b, y)); /* they are trained apart */
    close_with(&a, x);
    close_with(&b, y);
  }
}

static void begins_uniform(const train_parameters *set) {
  const train_parameter *a = find(set, "blocks.0.experts.1.in.lora_a.weight");
  double bound = 1 / sqrt(16.0), largest = 0, mean = 0;
  assert_int_equal(a->shape[0], 3);
  assert_int_equal(a->shape[1], 16);
  for (int64_t i = 0; i < a->count; i++) {
    double value = (double)set->value[a->first + i];
    largest = fmax(largest, fabs(value));
    mean += value / (double)a->count;
  }
  assert_true(largest <= bound && largest > 0.8 * bound && fabs(mean) < 0.1);
}

/* Every base value keeps its bits, every adapter moves; but B of an expert that no token chose stays 0. */
static void only_adapters_are_trained(void **state) {
  (void)state;
  static const char *const set[] = {ADAPTERS, BASE, NULL};
  test_session t;
  data_batch *batch = open_with(set, &t);
  const train_parameters *p = &t.session->model->parameters;
  begins_uniform(p);
  int64_t total = p->total, adapters = 0;
  core_real *before = malloc((size_t)total * sizeof *before);
  assert_non_null(before);
  memcpy(before, p->value, (size_t)total * sizeof *before);
  for (int i = 0; i < 3; i++) step(&t, batch);
  for (int32_t i = 0; i < p->count; i++) {
    const train_parameter *each = &p->list[i];
    bool adapter = strstr(each->name, ".lora_") != NULL;
    adapters += adapter;
    assert_int_equal(each->frozen, !adapter);
    bool same =
        memcmp(before + each->first, p->value + each->first, (size_t)each->count * sizeof *before) == 0;
    bool idle = strstr(each->name, ".experts.") && strstr(each->name, ".lora_b.");
    if (!idle && same == adapter) fail_msg("%s: %s", each->name, same ? "the same" : "changed");
  }
  /* qkv and out of 3 blocks, in and out of a dense one and of 2 times 4 experts, one of a connector */
  assert_int_equal(adapters, 2 * (6 + 2 + 2 * 4 * 2 + 1));
  free(before);
  close_with(&t, batch);
}

static void inputs_are_dropped_in_training_alone(void **state) {
  (void)state;
  static const char *const set[] = {ADAPTERS, BASE, NULL};
  test_session t;
  data_batch *batch = open_with(set, &t);
  for (int i = 0; i < 3; i++) step(&t, batch);
  double trained = loss_at(&t, batch, 5, TRAIN_MODE_TRAIN);
  assert_true(trained == loss_at(&t, batch, 5, TRAIN_MODE_TRAIN));
  assert_true(trained != loss_at(&t, batch, 6, TRAIN_MODE_TRAIN));
  double evaluated = loss_at(&t, batch, 5, TRAIN_MODE_EVALUATE);
  assert_true(evaluated != trained);
  assert_true(evaluated == loss_at(&t, batch, 6, TRAIN_MODE_EVALUATE));
  close_with(&t, batch);
}

static void refuse(const char *lora, const char *message) {
  core_config *own = NULL;
  train_session *session = NULL;
  assert_ok(core_config_load(train_settings_spec(), "the test", config, &lora, 1, &own));
  train_session_options options = {.config = own,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train"};
  assert_error(train_session_open(&options, &session), CORE_ERR_CONFIG, message);
  core_config_destroy(own);
}

static void bad_patterns_are_refused(void **state) {
  (void)state;
  refuse("model.lora=[{parameters: blocks.*, rank: 2}, {parameters: blocks.*.bias, rank: 2}]",
         "model.lora.1.parameters: no linear map of a block or connector has a name that matches "
         "'blocks.*.bias'");
  refuse("model.lora=[{parameters: blocks.*.experts.2.*, rank: 2}]", "names all of its experts or none");
  refuse("model.lora=[{parameters: blocks.*.attention.*, rank: 17}]",
         "a rank of 17 is no less than 'blocks.0.attention.qkv.weight' itself has, [48, 16]");
}

/* What is planned for adapters beside the plain model's. */
static void adapters_take_what_they_must(void **state) {
  (void)state;
  static const char *const plain[] = {NULL}, *const adapted[] = {ADAPTERS, BASE, NULL};
  test_session a, b;
  data_batch *x = open_with(plain, &a), *y = open_with(adapted, &b);
  const train_parameters *p = &a.session->model->parameters, *q = &b.session->model->parameters;
  int64_t adapters = 0, arena = 64 * 4 * TRAIN_SCOPES;
  for (int32_t i = 0; i < q->count; i++) adapters += q->list[i].frozen ? 0 : q->list[i].count;
  int64_t values = q->total * (int64_t)sizeof(core_real);
  int64_t rest = 3 * adapters * (int64_t)sizeof(core_real);
  int64_t planned = (int64_t)train_session_memory(b.session).parameters;
  assert_true(llabs(q->total - p->total - adapters) <= 16 * TRAIN_SCOPES);
  assert_true(llabs(planned - values - rest) <= arena);
  assert_true(planned < (int64_t)train_session_memory(a.session).parameters / 2);
  /* rows by the largest rank and by the widest map, and a key for each of the experts' rows */
  const train_model *model = b.session->model;
  int64_t rows = model->limits.expert_rows > model->T ? model->limits.expert_rows : model->T;
  int64_t most = rows * ((3 + 24) * (int64_t)sizeof(core_real) + 4) + 2 * model->limits.expert_rows * 8;
  int64_t grown = (int64_t)train_session_memory(b.session).activations -
                  (int64_t)train_session_memory(a.session).activations;
  assert_true(grown > 0 && grown <= most + arena);
  close_with(&a, x);
  close_with(&b, y);
}

static int64_t rows_of(int64_t sample, int32_t m) {
  return 1 + (sample * 3 + m) % 4;
}

static int make_set(void **state) {
  (void)state;
  char path[80];
  snprintf(root, sizeof root, "/tmp/antiphon-lora-XXXXXX");
  if (!mkdtemp(root)) return 1;
  snprintf(path, sizeof path, "%s/train", root);
  test_set_options o = {.modalities = 2,
                        .width = {9, 7},
                        .samples = 24,
                        .shards = 1,
                        .directory = path,
                        .first_id = 1,
                        .rows = rows_of,
                        .vocabulary = 40};
  return test_set_write(&o) == CORE_OK ? 0 : 1;
}

static int remove_root(void **state) {
  (void)state;
  test_remove_tree(root);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(an_adapter_begins_as_nothing),         cmocka_unit_test(only_adapters_are_trained),
      cmocka_unit_test(inputs_are_dropped_in_training_alone), cmocka_unit_test(bad_patterns_are_refused),
      cmocka_unit_test(adapters_take_what_they_must),
  };
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("trainer, adapters", tests, make_set, remove_root);
  comm_finish(world);
  return failed;
}
