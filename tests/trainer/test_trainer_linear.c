/* What is frozen costs nothing: no product makes its gradient, no memory holds it, and no gradient is passed
 * down to where nothing is trained. What is trained beside it gets the gradient that it gets when nothing is
 * frozen, bit for bit. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"

static comm_world *world;
static char root[64];

/* Blocks 0 and 2 are mixtures, 1 is dense. A step has: attention 2, feed-forward 2 products a block; the
 * connectors 1 and 2; the head 1 forward, once more for its backward pass. */
static const char config[] =
    "run: {directory: unused, seed: 3, steps: 60, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities: [{name: image, positions: none}, {name: text, connector: mlp, hidden: 12, length: 16}]\n"
    "model: {kind: decoder, vocabulary: 40, width: 16, layers: 3, heads: 2, hidden: 24, qkv_bias: true,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, noise: 0, bias: true}}\n"
    "objective: {importance: 0.01, load: 0, z: 0.001}\n"
    "optimizer: {batch: 8}\n";
enum { BLOCKS = 3, MAPS = 4 * BLOCKS + 3 };
/* Two layers of seven maps, and one more. */
static const char resampler_text[] =
    "data.modalities.text={connector: resampler, positions: none, queries: 3, depth: 2}";
enum { LAYER = 7, RESAMPLED = 4 * BLOCKS + 1 + 2 * LAYER + 1 };

/* ---- counting ---- */

static struct {
  const kern_ops *ops;
  int64_t forward, inputs, weights;
} counted;

static void count(kern_form form) {
  counted.forward += form == KERN_NT;
  counted.inputs += form == KERN_NN;
  counted.weights += form == KERN_TN;
}

static core_status counting_gemm(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                                 kern_write write, core_tensor c) {
  count(form);
  return counted.ops->gemm(context, form, a, b, write, c);
}

static core_status counting_grouped(kern_context *context, kern_form form, const int64_t *row, core_tensor a,
                                    core_tensor b, kern_write write, core_tensor c) {
  count(form);
  return counted.ops->gemm_grouped(context, form, row, a, b, write, c);
}

/* Opens, and forms the gradients of the first batch with a table that counts. */
static void gradients(const char *const *set, test_session *t) {
  train_report report = {0};
  data_batch *batch = NULL;
  test_session_open(world, config, set, root, t);
  kern_ops counting = *t->session->env.ops;
  counted.ops = t->session->env.ops;
  counted.forward = counted.inputs = counted.weights = 0;
  counting.gemm = counting_gemm;
  counting.gemm_grouped = counting_grouped;
  assert_ok(data_stream_get(t->stream, &batch));
  t->session->env.ops = &counting;
  assert_ok(train_stepper_gradients(&t->session->stepper, batch, &report));
  t->session->env.ops = counted.ops;
  data_stream_put(t->stream, batch);
}

static const train_parameter *find(const train_parameters *set, const char *name) {
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) return &set->list[i];
  fail_msg("no parameter %s", name);
  return NULL;
}

/* Bytes of gradients and moments, as planned; arenas round each array up. */
static int64_t trained_bytes(const test_session *t) {
  const train_parameters *set = &t->session->model->parameters;
  return (set->gradient_total + 2 * set->state_first[TRAIN_SCOPES]) * (int64_t)sizeof(core_real);
}

typedef struct expectation {
  const char *change, *frozen; /* of the configuration, or NULL; patterns */
  int64_t weights, inputs;
} expectation;

static void compare(const expectation *e, const test_session *all) {
  char frozen[256];
  const char *set[] = {frozen, e->change, NULL};
  test_session t;
  snprintf(frozen, sizeof frozen, "optimizer.frozen=[%s]", e->frozen);
  gradients(set, &t);
  assert_int_equal(counted.weights, e->weights);
  assert_int_equal(counted.inputs, e->inputs);
  const train_parameters *some = &t.session->model->parameters, *whole = &all->session->model->parameters;
  int64_t left = 0;
  for (int32_t i = 0; i < some->count; i++) {
    const train_parameter *p = &some->list[i], *q = find(whole, p->name);
    left += p->frozen ? p->count : 0;
    assert_int_equal(p->gradient_first >= 0, !p->frozen);
    if (!p->frozen)
      assert_memory_equal(some->gradient + p->gradient_first, whole->gradient + q->gradient_first,
                          (size_t)p->count * sizeof(core_real));
  }
  assert_true(left > 0);
  int64_t saved = trained_bytes(all) - trained_bytes(&t), arena = 64 * 3 * TRAIN_SCOPES;
  int64_t planned = (int64_t)train_session_memory(all->session).parameters -
                    (int64_t)train_session_memory(t.session).parameters;
  assert_true(llabs(saved - 3 * left * (int64_t)sizeof(core_real)) <= arena);
  assert_true(llabs(planned - saved) <= arena);
  test_session_close(&t);
}

static void frozen_weights_cost_nothing(void **state) {
  (void)state;
  /* every map but the first of a connector passes a gradient on: 15 + the head - 2 */
  static const expectation list[] = {
      {NULL, "blocks.*.attention.*", MAPS - 2 * BLOCKS + 1, MAPS - 1},
      {NULL, "blocks.*.experts.*", MAPS - 4 + 1, MAPS - 1},
      {NULL, "blocks.*", MAPS - 4 * BLOCKS + 1, MAPS - 1},
      {NULL, "'*norm*','*router*',output.weight", MAPS, MAPS - 1},
      /* experts 1 of 0..3: the others are two runs, in each of four products */
      {NULL, "blocks.*.experts.1.*", MAPS + 4 + 1, MAPS - 1},
      {NULL, "blocks.*.experts.0.*,blocks.*.experts.3.*", MAPS + 1, MAPS - 1},
      /* the mlp's second map alone is trained: nothing goes through it */
      {NULL, "connector.text.first.*", MAPS - 1 + 1, MAPS - 2},
      /* nothing below block 2, then not even in it: block 1's 4 and 0's 4, and the connectors' */
      {NULL, "connector.*,embedding.*,blocks.0.*,blocks.1.*", 4 + 1, 4 + 1},
      {NULL, "connector.*,embedding.*,blocks.*", 1, 1},
  };
  test_session all;
  gradients(NULL, &all);
  assert_int_equal(counted.weights, MAPS + 1);
  assert_int_equal(counted.inputs, MAPS - 2 + 1);
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) compare(&list[i], &all);
  test_session_close(&all);
}

/* The keys and values of a resampler pass nothing on: latents are given. */
static void frozen_layers_of_a_resampler_cost_nothing(void **state) {
  (void)state;
  static const expectation list[] = {
      {resampler_text, "connector.text.query", RESAMPLED + 1, RESAMPLED - 3 + 1},
      {resampler_text, "connector.text.query,connector.text.layers.0.*", RESAMPLED - LAYER + 1,
       RESAMPLED - 3 - (LAYER - 1) + 1},
      {resampler_text, "connector.text.query,connector.text.layers.*", RESAMPLED - 2 * LAYER + 1,
       RESAMPLED - 3 - 2 * (LAYER - 1) - 1 + 1},
      {resampler_text, "connector.text.*", RESAMPLED - 2 * LAYER - 1 + 1,
       RESAMPLED - 3 - 2 * (LAYER - 1) - 1 + 1},
  };
  const char *const set[] = {resampler_text, NULL};
  test_session all;
  gradients(set, &all);
  assert_int_equal(counted.weights, RESAMPLED + 1);
  assert_int_equal(counted.inputs, RESAMPLED - 3 + 1);
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) compare(&list[i], &all);
  test_session_close(&all);
}

static void something_must_be_trained(void **state) {
  (void)state;
  static const char *const set[] = {"optimizer.frozen=['*']"};
  core_config *own = NULL;
  train_session *session = NULL;
  assert_ok(core_config_load(train_settings_spec(), "the test", config, set, 1, &own));
  train_session_options options = {.config = own,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train"};
  assert_error(train_session_open(&options, &session), CORE_ERR_CONFIG, "nothing is left to train");
  core_config_destroy(own);
}

static int64_t rows_of(int64_t sample, int32_t m) {
  return 1 + (sample * 3 + m) % 4;
}

static int make_set(void **state) {
  (void)state;
  char path[80];
  snprintf(root, sizeof root, "/tmp/antiphon-linear-XXXXXX");
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
      cmocka_unit_test(frozen_weights_cost_nothing),
      cmocka_unit_test(frozen_layers_of_a_resampler_cost_nothing),
      cmocka_unit_test(something_must_be_trained),
  };
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("trainer, linear maps", tests, make_set, remove_root);
  comm_finish(world);
  return failed;
}
