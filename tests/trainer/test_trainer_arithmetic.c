/* What a model costs: against numbers worked out from its dimensions, against what a session declares, and
 * the ready configurations of experiments/limoe against what is published. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/arithmetic.h"

enum { WIDTH = 20, ROWS = 5 };

static const char tower[] =
    "run: {directory: unused, threads: 1}\n"
    "data: {path: nowhere, modalities: [{name: image, length: 6}, {name: text, connector: mlp, hidden: 7,\n"
    "       positions: none}]}\n"
    "model: {width: 12, layers: 3, heads: 2, kv_heads: 1, hidden: 10, embedding: 8,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, hidden: 9}}\n"
    "optimizer: {batch: 8}\n";
static const char resampled[] =
    "run: {directory: unused, threads: 1}\n"
    "data: {path: nowhere, modalities: [{name: image, length: 6}, {name: text, connector: resampler, hidden: "
    "8,\n"
    "       queries: 3, depth: 2, positions: none}]}\n"
    "model: {width: 12, layers: 3, heads: 2, kv_heads: 1, hidden: 10, embedding: 8,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, hidden: 9}}\n"
    "optimizer: {batch: 8}\n";
static const char connector[] =
    "run: {directory: unused, threads: 1}\n"
    "data: {path: nowhere, modalities: [{name: image, positions: none}, {name: text, positions: none}]}\n"
    "model: {kind: connector, width: 12, hidden: 10, embedding: 8, activation: gelu,\n"
    "        moe: {experts: 4, choose: 2, bias: true, hidden: 9}}\n"
    "objective: {directions: ['image:text', 'text:image'], importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 8}\n";

static train_arithmetic cost(const char *text, const char *set, bool latents) {
  const int64_t width[2] = {latents ? WIDTH : 0, latents ? WIDTH + 1 : 0};
  const double tokens[2] = {latents ? ROWS : 0, latents ? ROWS : 0};
  core_config *config = NULL;
  train_arithmetic out;
  assert_ok(core_config_load(train_settings_spec(), "a.yaml", text, set ? &set : NULL, set != NULL, &config));
  assert_ok(train_settings_check(config, 1));
  assert_ok(train_arithmetic_make(core_config_data(config), width, tokens, &out));
  core_config_destroy(config);
  return out;
}

/* C 12, attention of 2 heads and 1 for keys, of 6 each: 24 x 12 and 12 x 12; experts 18 x 12 and 12 x 9. */
enum {
  ATTENTION = 24 * 12 + 12 * 12,
  EXPERT = 18 * 12 + 12 * 9,
  DENSE = 20 * 12 + 12 * 10, /* of the one layer that is no mixture */
  ROUTER = 4 * 12,
  IMAGE = 12 * WIDTH,
  TEXT = 7 * (WIDTH + 1) + 12 * 7,
  HEAD = 8 * 12,
  NORMS = 2 * 12 * 3 + 12,
  IMAGE_REST = 12 + 6 * 12, /* bias, positions */
  TEXT_REST = 7 + 12
};

static void a_mixture_by_hand(void **state) {
  (void)state;
  train_arithmetic a = cost(tower, NULL, true);
  int64_t trunk = 3 * ATTENTION + DENSE + 2 * ROUTER + NORMS + 1;
  assert_int_equal(a.experts, 2 * 4 * EXPERT);
  assert_int_equal(a.parameters, trunk + 8 * EXPERT + IMAGE + IMAGE_REST + TEXT + TEXT_REST + 2 * HEAD);
  assert_int_equal(a.paths, 2);
  assert_string_equal(a.path[0].name, "image");
  assert_int_equal(a.path[0].parameters, trunk + 4 * EXPERT + IMAGE + IMAGE_REST + HEAD);
  assert_int_equal(a.path[1].parameters, trunk + 4 * EXPERT + TEXT + TEXT_REST + HEAD);
  int64_t products = 3 * ATTENTION + DENSE + 2 * ROUTER + 4 * EXPERT;
  assert_true(a.path[0].token == 2.0 * (double)(products + IMAGE));
  assert_true(a.path[1].token == 2.0 * (double)(products + TEXT));
  assert_true(a.path[0].attention == 4.0 * ROWS * 12 * 3); /* scores and mixtures of 5 tokens, 3 layers */
  assert_true(a.path[0].item == 2.0 * HEAD);
  assert_true(train_path_item(&a.path[0]) == ROWS * (a.path[0].token + a.path[0].attention) + 2.0 * HEAD);
  train_arithmetic_free(&a);
}

/* The baselines differ from the mixture in the router alone, by the token. */
static void baselines_cost_as_much_per_token(void **state) {
  (void)state;
  train_arithmetic mixture = cost(tower, NULL, true), dense = cost(tower, "model.dense=true", true),
                   own = cost(tower, "model.trunks=per_modality", true),
                   divided = cost(tower, "model.moe.partition=modality", true),
                   total = cost(tower, "model.dense_match=total", true);
  for (int m = 0; m < 2; m++) {
    assert_true(dense.path[m].token == mixture.path[m].token - 2.0 * 2 * ROUTER);
    assert_true(own.path[m].token == dense.path[m].token);
    assert_true(divided.path[m].token == mixture.path[m].token);
    assert_true(own.path[m].attention == mixture.path[m].attention);
    assert_int_equal(own.path[m].parameters, dense.path[m].parameters);
  }
  int64_t trunk = 3 * ATTENTION + DENSE + 4 * EXPERT + NORMS;
  assert_int_equal(own.parameters, dense.parameters + trunk);
  assert_int_equal(own.experts, 0);
  assert_int_equal(divided.parameters, mixture.parameters);
  assert_int_equal(total.parameters, mixture.parameters); /* model.dense alone makes it dense */
  train_arithmetic *all[] = {&mixture, &dense, &own, &divided, &total};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) train_arithmetic_free(all[i]);
}

static void a_connector_by_hand(void **state) {
  (void)state;
  train_arithmetic a = cost(connector, NULL, true);
  int64_t expert = 9 * 12 + 9 + 12 * 9 + 12, block = 4 * 12 + 4 + 2 * (12 + 24); /* router, views and norms */
  int64_t adapter = 12 * WIDTH + 12 + WIDTH /* u */,
          toward = (WIDTH + 1) * 12 + WIDTH + 1 + 8 * (WIDTH + 1) + 8;
  assert_int_equal(a.experts, 4 * expert);
  assert_int_equal(a.paths, 2);
  assert_string_equal(a.path[0].name, "image:text");
  assert_int_equal(a.path[0].parameters, block + 2 * expert + adapter + toward + 8 * 12 + 8);
  assert_true(a.path[0].token == 2.0 * (12 * WIDTH) + 2 * 2.0 * (4 * 12 + 2 * 2 * 9 * 12));
  assert_true(a.path[0].item == 2.0 * ((WIDTH + 1) * 12 + 8 * (WIDTH + 1) + 8 * 12));
  train_arithmetic_free(&a);
}

/* W 8: of a row of queries 3 + 1 and 1 + 1 matrices of the attentions and 4 + 4 of the feed-forward; of a
 * latent one of 16 rows. */
static void a_resampler_by_hand(void **state) {
  (void)state;
  train_arithmetic plain = cost(tower, NULL, true), a = cost(resampled, NULL, true);
  train_arithmetic unknown = cost(resampled, NULL, false);
  int64_t row = 14 * 8 * 8, latent = 2 * 8 * (WIDTH + 1), rest = 24 + 8 + 8 + 16 + 8 + 32 + 8 + 6 * 8;
  int64_t all = 2 * (row + latent + rest) + 12 * 8 + 12 + 3 * 8;
  assert_int_equal(a.parameters, plain.parameters - TEXT - TEXT_REST + all);
  assert_int_equal(a.path[1].parameters, plain.path[1].parameters - TEXT - TEXT_REST + all);
  assert_true(a.path[1].tokens == 3);
  assert_true(a.path[1].token == plain.path[1].token + 2.0 * (double)(2 * row + 12 * 8 - TEXT));
  assert_true(a.path[1].attention == 4.0 * 3 * 12 * 3 + 4.0 * 8 * 2 * (3 + ROWS));
  assert_true(a.path[1].item == 2.0 * HEAD + 2.0 * 2 * ROWS * (double)latent);
  assert_true(a.path[0].token == plain.path[0].token && a.path[0].item == plain.path[0].item);
  assert_int_equal(unknown.parameters, a.parameters - all - IMAGE - IMAGE_REST);
  assert_true(unknown.path[1].tokens == 0 && unknown.path[1].item == 2.0 * HEAD);
  train_arithmetic *const list[] = {&plain, &a, &unknown};
  for (int i = 0; i < 3; i++) train_arithmetic_free(list[i]);
}

static void unknown_widths_are_left_out(void **state) {
  (void)state;
  train_arithmetic with = cost(tower, NULL, true), without = cost(tower, NULL, false);
  assert_int_equal(without.parameters, with.parameters - IMAGE - IMAGE_REST - TEXT - TEXT_REST);
  assert_true(without.path[0].token == with.path[0].token - 2.0 * IMAGE);
  assert_true(without.path[0].attention == 0);
  train_arithmetic_free(&with);
  train_arithmetic_free(&without);
  core_config *config = NULL;
  const int64_t width[2] = {0, 0};
  const double tokens[2] = {0, 0};
  assert_ok(core_config_load(train_settings_spec(), "a.yaml", connector, NULL, 0, &config));
  assert_error(train_arithmetic_make(core_config_data(config), width, tokens, &with), CORE_ERR_ARGUMENT,
               "the width of 'image' is not known");
  core_config_destroy(config);
}

static int64_t rows_of(int64_t sample, int32_t m) {
  (void)sample, (void)m;
  return ROWS;
}

/* What is counted is what a run declares. */
static void agrees_with_a_session(void **state) {
  comm_world *world = *state;
  char root[64] = "/tmp/antiphon-arithmetic-XXXXXX", path[80];
  assert_non_null(mkdtemp(root));
  snprintf(path, sizeof path, "%s/train", root);
  test_set_options o = {.modalities = 2, .width = {WIDTH, WIDTH + 1}, .samples = 16, .shards = 1};
  o.directory = path;
  o.first_id = 1;
  o.rows = rows_of;
  assert_ok(test_set_write(&o));
  static const char *const sets[][2] = {{NULL, NULL},
                                        {"model.dense=true", NULL},
                                        {"model.trunks=per_modality", NULL},
                                        {"model.moe.partition=modality", NULL}};
  for (size_t i = 0; i < 2 * sizeof sets / sizeof *sets; i++) {
    const char *text = i % 2 ? connector : tower;
    if (i % 2 && i > 3) continue; /* a tower's baselines */
    test_session t;
    train_counts counts;
    train_arithmetic a;
    test_session_open(world, text, sets[i / 2], root, &t);
    assert_ok(train_session_counts(t.session, &counts));
    assert_ok(train_session_arithmetic(t.session, &a));
    assert_int_equal(a.parameters, counts.total);
    assert_true(a.path[0].tokens == ROWS);
    if (i % 2 == 0) { /* active: the trunk that a token passes, with all connectors and heads */
      int64_t other = a.path[1].parameters - a.path[0].parameters;
      int64_t text_own = TEXT + TEXT_REST + HEAD;
      assert_int_equal(counts.active, a.path[0].parameters + text_own);
      assert_int_equal(other, text_own - IMAGE - IMAGE_REST - HEAD);
    }
    train_arithmetic_free(&a);
    test_session_close(&t);
  }
  test_remove_tree(root);
}

/* ---- the ready configurations ---- */

typedef struct ready {
  const char *name;
  int64_t layers, width, hidden, mixtures, experts, image; /* image: tokens of an image */
  double table;                /* of embedded text pieces, that the paper counts */
  double total, active, digit; /* reported, in 1e9, and half of the last digit of the report; 0: none */
  double active_digit;
} ready;

/* Trunks: vmoe's S, B, L and H. Counts: H/14 in the paper (5.6 B and 675 M); B/16 and L/16 in MoE-ViE,
 * table 3. */
static const ready list[] = {
    {"s32", 8, 512, 2048, 8, 8, 49, 0, 0, 0, 0, 0},
    {"b32", 12, 768, 3072, 12, 8, 49, 0, 0, 0, 0, 0},
    {"b16", 12, 768, 3072, 12, 8, 196, 0, 0.5, 0.1, 0.05, 0.05},
    {"l16", 24, 1024, 4096, 24, 8, 196, 0, 1.7, 0.3, 0.05, 0.05},
    {"h14", 32, 1280, 5120, 12, 32, 256, 32000.0 * 1280, 5.6, 0.675, 0.055, 0.0051},
};

static const char *const any_build = "run.precision=float32"; /* in double there is no bfloat16 */

/* Every baseline is one key away. */
static void expect_baselines(const char *path) {
  static const char *const keys[] = {"model.dense=true", "model.trunks=per_modality",
                                     "model.moe.partition=modality"};
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
    core_config *config = NULL;
    const char *set[2] = {keys[i], any_build};
    assert_ok(core_config_load(train_settings_spec(), path, NULL, set, 2, &config));
    assert_ok(train_settings_check(config, 32));
    core_config_destroy(config);
  }
}

static void ready_configurations_have_the_published_sizes(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    const ready *r = &list[i];
    char path[512];
    core_config *config = NULL;
    train_arithmetic a;
    const int64_t width[2] = {0, 0};
    const double tokens[2] = {(double)r->image, 16};
    snprintf(path, sizeof path, ANTIPHON_SOURCE_DIR "/experiments/limoe/%s.yaml", r->name);
    assert_ok(core_config_load(train_settings_spec(), path, NULL, &any_build, 1, &config));
    const train_settings *s = core_config_data(config);
    assert_ok(train_settings_check(config, (int32_t)s->parallel.experts));
    assert_ok(train_settings_check(config, 32));
    assert_int_equal(s->data.modalities[0].length, r->image);
    assert_ok(train_arithmetic_make(s, width, tokens, &a));
    int64_t C = r->width, mlp = 2 * C * r->hidden;
    int64_t shared = r->layers * (4 * C * C + 2 * C) + C + (r->layers - r->mixtures) * mlp +
                     r->mixtures * r->experts * C + 1; /* norms, routers, the temperature */
    int64_t experts = r->mixtures * r->experts * mlp, heads = 2 * C * C;
    assert_int_equal(a.experts, experts);
    assert_int_equal(a.parameters, shared + experts + heads);
    assert_int_equal(a.path[1].parameters, shared + r->mixtures * mlp + heads / 2);
    double total = (double)(shared + experts) + r->table,
           active = (double)(shared + r->mixtures * mlp) + r->table;
    printf("%s: trunk %lld, active %lld\n", r->name, (long long)(shared + experts),
           (long long)(shared + r->mixtures * mlp));
    if (r->total > 0) {
      assert_true(fabs(total / 1e9 - r->total) <= r->digit);
      assert_true(fabs(active / 1e9 - r->active) <= r->active_digit);
    }
    train_arithmetic_free(&a);
    core_config_destroy(config);
    expect_baselines(path);
  }
}

int main(void) {
  comm_options options = {.deadline = 60, .alone = true};
  comm_world *world = NULL;
  if (comm_start(&options, &world) != CORE_OK) return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_mixture_by_hand),
      cmocka_unit_test(baselines_cost_as_much_per_token),
      cmocka_unit_test(a_connector_by_hand),
      cmocka_unit_test(a_resampler_by_hand),
      cmocka_unit_test(unknown_widths_are_left_out),
      cmocka_unit_test_prestate(agrees_with_a_session, world),
      cmocka_unit_test(ready_configurations_have_the_published_sizes),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
