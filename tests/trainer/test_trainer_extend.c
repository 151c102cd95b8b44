/* Extensions: the figure d by hand, which layers a rule takes, and what a copied expert changes (METHODS
 * section 5, claim M11). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/extend.h"

static comm_world *world;
static char root[64];

/* ---- d ---- */

static void d_by_hand(void **state) {
  (void)state;
  static const int64_t before[] = {3, 1}, after[] = {10, 30};       /* 2 (.75 - .25), 2 (.25 - .75) */
  static const int64_t even[] = {5, 5, 5, 5}, one[] = {4, 0, 0, 0}; /* 4 (.25 - 1), three times 4 .25 */
  static const int64_t none[] = {0, 0};
  assert_true(train_extension_deviation(2, before, after) == 1);
  assert_true(fabs(train_extension_deviation(4, even, one) - sqrt(3)) < 1e-15);
  assert_true(train_extension_deviation(2, before, before) == 0);
  assert_true(train_extension_deviation(2, before, none) == 0);
}

/* ---- the choice ---- */

enum { MOST = 100 };

/* Layers of two experts, two classes of tokens. */
typedef struct made {
  train_measurement m;
  int64_t experts[MOST], added[MOST], block[MOST], count[MOST * 2 * 2];
} made;

static void make(made *x, int32_t layers) {
  memset(x, 0, sizeof *x);
  x->m = (train_measurement){.layers = layers,
                             .classes = 2,
                             .class = {"image", "vocabulary"},
                             .most = 2,
                             .experts = x->experts,
                             .added = x->added,
                             .block = x->block,
                             .count = x->count};
  for (int32_t j = 0; j < layers; j++) {
    x->experts[j] = 2;
    x->block[j] = 2 * j;
    for (int c = 0; c < 2; c++) x->count[(j * 2 + c) * 2] = x->count[(j * 2 + c) * 2 + 1] = 50;
  }
}

/* `by` tokens of a class choose the first expert instead of the second. */
static void move(made *x, int32_t layer, int32_t class, int64_t by) {
  x->count[(layer * 2 + class) * 2] += by;
  x->count[(layer * 2 + class) * 2 + 1] -= by;
}

/* The layers that are chosen, as "1 3 ". */
static const char *chosen(const char *rule, const char *share, const made *before, const made *after) {
  static char text[4 * MOST];
  size_t used = 0;
  train_extension_choice choice;
  const train_extend_settings how = {.layers = (char *)(uintptr_t)rule, .share = (char *)(uintptr_t)share};
  text[0] = '\0';
  assert_ok(train_extension_choose(&how, 5, &before->m, after ? &after->m : NULL, &choice));
  for (int32_t j = 0; j < choice.layers; j++)
    if (choice.layer[j].chosen) used += (size_t)snprintf(text + used, sizeof text - used, "%d ", j);
  free(choice.layer);
  return text;
}

static int count_words(const char *text) {
  int count = 0;
  for (; *text; text++) count += *text == ' ';
  return count;
}

static void shares_are_exact_and_ties_go_to_the_lower_layer(void **state) {
  (void)state;
  made before, after;
  make(&before, 10);
  make(&after, 10);
  assert_string_equal(chosen("d", "0.3", &before, &after), "0 1 2 "); /* all equal: 0 */
  move(&after, 7, 0, 10);
  move(&after, 4, 1, -10); /* as far, the other way */
  move(&after, 2, 0, 5);
  assert_string_equal(chosen("d", "0.3", &before, &after), "2 4 7 ");
  assert_string_equal(chosen("d", "0.199", &before, &after), "4 ");
  assert_string_equal(chosen("d", "0.2", &before, &after), "4 7 ");
  assert_string_equal(chosen("lowest", "0.3", &before, &after), "0 1 3 ");
  make(&before, MOST);
  assert_int_equal(count_words(chosen("d", "0.29", &before, &before)),
                   29); /* 0.29 100 is below 29 in binary */
  assert_int_equal(count_words(chosen("random", "0.57", &before, NULL)), 57);
}

static void rules_are_of_the_mixtures(void **state) {
  (void)state;
  made before, after;
  make(&before, 5);
  assert_string_equal(chosen("all", "0", &before, NULL), "0 1 2 3 4 ");
  assert_string_equal(chosen("first half", "0", &before, NULL), "0 1 ");
  assert_string_equal(chosen("second half", "0", &before, NULL), "3 4 ");
  assert_string_equal(chosen("every 2", "0", &before, NULL), "0 2 4 ");
  assert_string_equal(chosen("1,3", "0", &before, NULL), "1 3 ");
  make(&after, 5);
  static char d[] = "d", bad[] = "every 0", small[] = "0.199";
  train_extension_choice choice;
  train_extend_settings how = {.layers = d, .share = small};
  assert_error(train_extension_choose(&how, 1, &before.m, &after.m, &choice), CORE_ERR_ARGUMENT,
               "extend.share 0.199 of 5 MoE layers by the rule 'd' is no layer");
  free(choice.layer);
  how.layers = bad;
  assert_error(train_extension_choose(&how, 1, &before.m, &after.m, &choice), CORE_ERR_ARGUMENT,
               "numbers below 5");
  free(choice.layer);
}

/* The most chosen expert, ties to the lower one; of some classes alone; and why. */
static void sources_follow_the_counted_classes(void **state) {
  (void)state;
  made before, after;
  static char d[] = "d", half[] = "0.5", image[] = "image", sound[] = "sound", *classes[] = {image};
  char why[256];
  make(&before, 2);
  make(&after, 2);
  move(&before, 1, 0, -20);
  move(&before, 1, 1, 30);
  move(&after, 0, 1, 40);
  train_extension_choice all, some;
  train_extend_settings how = {.layers = d, .share = half};
  assert_ok(train_extension_choose(&how, 1, &before.m, &after.m, &all));
  how.classes = classes;
  how.classes_count = 1;
  assert_ok(train_extension_choose(&how, 1, &before.m, &after.m, &some));
  assert_int_equal(all.layer[0].source, 0);
  assert_int_equal(all.layer[1].source, 0);
  assert_int_equal(some.layer[1].source, 1);
  assert_true(all.layer[0].chosen && !all.layer[1].chosen && some.layer[1].chosen && !some.layer[0].chosen);
  assert_true(fabs(all.layer[0].d - 0.4) < 1e-15 && some.layer[0].d == 0);
  assert_true(fabs(some.layer[1].share - 0.7) < 1e-15);
  train_extension_why(&how, &some, 0, why, sizeof why);
  assert_string_equal(why, "place 2 by d of 2, the first 1 are chosen (least chosen d 0.4)");
  free(all.layer);
  free(some.layer);
  classes[0] = sound;
  assert_error(train_extension_choose(&how, 1, &before.m, &after.m, &some), CORE_ERR_ARGUMENT,
               "names 'sound'");
  free(some.layer);
}

/* ---- what a copy changes ---- */

static const char config[] =
    "run: {directory: unused, seed: 3, steps: 60, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 0\n"
    "  modalities: [{name: image, positions: none}, {name: text, positions: none}]\n"
    "model: {kind: decoder, vocabulary: 50, width: 16, layers: 1, heads: 2, hidden: 24,\n"
    "        moe: {layers: all, layer_experts: [3], choose: 2, gate: renormalised, noise: 0}}\n"
    "objective: {importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 16, rate: 0.01, warmup: 0}\n";

static int64_t rows_of(int64_t sample, int32_t m) {
  return 2 + (sample + m) % 4;
}

static int make_set(void **state) {
  (void)state;
  char directory[80];
  snprintf(root, sizeof root, "/tmp/antiphon-extend-XXXXXX");
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

static core_tensor value_of(const train_session *session, const char *name) {
  const train_parameters *set = &session->model->parameters;
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) return train_parameter_value(set, i);
  return train_none();
}

/* The old model's values, larger in the experts so that their outputs matter; the new expert and its column
 * are copies of `source`. */
static void extend(const train_session *old, const train_session *new, int source) {
  const train_parameters *set = &new->model->parameters;
  char name[CORE_NAME];
  for (int32_t i = 0; i < old->model->parameters.count; i++) {
    core_tensor value = train_parameter_value(&old->model->parameters, i);
    core_real *number = value.data;
    for (int64_t k = 0;
         strstr(old->model->parameters.list[i].name, ".experts.") && k < core_tensor_count(&value); k++)
      number[k] *= 10;
  }
  for (int32_t i = 0; i < set->count; i++) {
    int used = 0, expert = 0;
    core_tensor to = train_parameter_value(set, i), from;
    snprintf(name, sizeof name, "%s", set->list[i].name);
    if (sscanf(name, "blocks.0.experts.%d.%n", &expert, &used) == 1 && expert == 3)
      snprintf(name, sizeof name, "blocks.0.experts.%d.%s", source, set->list[i].name + used);
    from = value_of(old, strstr(name, "router.added") ? "blocks.0.router.weight" : name);
    assert_non_null(from.data);
    if (strstr(name, "router.added")) from = train_slice(from, source, 1);
    memcpy(to.data, from.data, core_tensor_bytes(&to));
  }
}

static void forward(test_session *t) {
  data_batch *batch = NULL;
  assert_ok(data_stream_get(t->stream, &batch));
  assert_ok(train_model_take(t->session->model, batch, 0, -1));
  assert_ok(train_model_forward(t->session->model, TRAIN_MODE_EVALUATE));
  data_stream_put(t->stream, batch);
}

/* Whether row t of the layer's output moved by more than products of other sizes do. */
static bool changed(const train_model *old, const train_model *new, int64_t t) {
  const core_real *a = (const core_real *)old->block[0].output.data + t * old->C;
  const core_real *b = (const core_real *)new->block[0].output.data + t *new->C;
  double size = 0, difference = 0;
  for (int64_t i = 0; i < old->C; i++) {
    size = fmax(size, fabs((double)a[i]));
    difference = fmax(difference, fabs((double)a[i] - (double)b[i]));
  }
  return difference > 1e-5 * size;
}

/* M11: where the source is a token's first choice its twin displaces the runner-up; where it is the second,
 * the twin loses the tie. So exactly the former change, and none at K = 1. */
static void compare(const char *choose, int source) {
  const char *const before[] = {choose, NULL};
  const char *const after[] = {choose, "model.moe.layer_experts=[4]", "model.moe.added=[1]", NULL};
  test_session old, new;
  test_session_open(world, config, before, root, &old);
  test_session_open(world, config, after, root, &new);
  extend(old.session, new.session, source);
  forward(&old);
  forward(&new);
  const train_model *model = old.session->model, *extended = new.session->model;
  const train_moe *moe = &model->block[0].moe;
  const core_real *l = moe->logits.data, *m = extended->block[0].moe.logits.data;
  int64_t T = model->items.tokens, K = moe->choice.shape[1], first = 0;
  assert_true(T > 100 && extended->items.tokens == T);
  for (int64_t t = 0; t < T; t++) {
    bool leads = ((const int32_t *)moe->choice.data)[t * K] == source;
    assert_memory_equal(l + t * 3, m + t * 4, 3 * sizeof *l); /* another column changes no bit of theirs */
    assert_true(m[t * 4 + 3] == l[t * 3 + source]);
    if (changed(model, extended, t) != (leads && K == 2))
      fail_msg("token %lld, K = %lld: %s", (long long)t, (long long)K, leads ? "first choice" : "not first");
    first += leads;
  }
  assert_true(first > 0 && first < T);
  test_session_close(&new);
  test_session_close(&old);
}

static void a_copy_changes_where_its_source_leads(void **state) {
  (void)state;
  for (int source = 0; source < 3; source++) {
    compare("model.moe.choose=2", source);
    compare("model.moe.choose=1", source);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(d_by_hand), cmocka_unit_test(shares_are_exact_and_ties_go_to_the_lower_layer),
      cmocka_unit_test(rules_are_of_the_mixtures), cmocka_unit_test(sources_follow_the_counted_classes),
      cmocka_unit_test_setup_teardown(a_copy_changes_where_its_source_leads, make_set, remove_set)};
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("trainer, extension", tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
