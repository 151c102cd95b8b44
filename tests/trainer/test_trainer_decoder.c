/* A decoder's parts where no golden data reach: sequences laid out by hand, a vocabulary of several parts and
 * predictions of several blocks against a plain softmax, tokens that are refused, and that it learns. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/generate.h"

static comm_world *world;
static char root[64];

static const char config[] =
    "run: {directory: unused, seed: 3, steps: 60, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 0\n"
    "  modalities: [{name: image, positions: none}, {name: text, positions: none}]\n"
    "model: {kind: decoder, vocabulary: 50, width: 16, layers: 2, heads: 2, hidden: 24, moe: {layers: "
    "none}}\n"
    "objective: {importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 8, rate: 0.01, warmup: 1}\n";

/* ---- sets made by hand ---- */

typedef struct sample {
  int64_t rows[2];
  int32_t prompt[8], target[8];
  int64_t prompts, targets;
} sample;

enum { WIDTH = 3 };

/* Samples of modality m; tokens go into the shards of `carrier`. */
static void write_modality(int32_t m, int32_t carrier, const sample *list, int64_t count) {
  data_writer *writer = NULL;
  char directory[80];
  float latent[8 * WIDTH];
  for (int i = 0; i < 8 * WIDTH; i++) latent[i] = (float)(i % 5) - (float)m;
  snprintf(directory, sizeof directory, "%s/train", root);
  data_writer_options options = {.directory = directory,
                                 .modality = test_modality_names[m],
                                 .encoder = "hand",
                                 .dtype = CORE_FLOAT32,
                                 .width = WIDTH};
  assert_ok(data_writer_open(&options, &writer));
  for (int64_t s = 0; s < count; s++) {
    data_sample added = {.id = (uint64_t)s + 1, .latent = latent, .rows = list[s].rows[m], .label = -1};
    if (m == carrier) {
      added.prompt = list[s].prompt, added.prompt_count = list[s].prompts;
      added.target = list[s].target, added.target_count = list[s].targets;
    }
    assert_ok(data_writer_add(writer, &added));
  }
  assert_ok(data_writer_close(writer));
}

static void write_hand(const sample *list, int64_t count) {
  char directory[80];
  snprintf(directory, sizeof directory, "%s/train", root);
  test_remove_tree(directory);
  for (int32_t m = 0; m < 2; m++) write_modality(m, 1, list, count);
}

static void open_with(test_session *t, data_batch **batch, const char *const *set) {
  test_session_open(world, config, set, root, t);
  assert_ok(data_stream_get(t->stream, batch));
}

static int make_root(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/antiphon-decoder-XXXXXX");
  return mkdtemp(root) ? 0 : 1;
}

static int remove_root(void **state) {
  (void)state;
  test_remove_tree(root);
  return 0;
}

/* ---- the sequences ---- */

static void expect_numbers(const train_mirror *mirror, const int32_t *expected, int64_t count) {
  for (int64_t i = 0; i < count; i++) assert_int_equal(((int32_t *)mirror->host)[i], expected[i]);
}

/* Image and text, their places marked or not; the third sample begins with its response. */
static void rows_lie_in_sequence(void **state) {
  (void)state;
  static const sample list[] = {
      {{2, 1}, {7, -2, 9}, {3, 4}, 3, 2}, /* image unmarked: first */
      {{1, 2}, {-2, -1, 5}, {5}, 3, 1},   /* text before image */
      {{0, 0}, {0}, {8, 3, 8}, 0, 3},     /* nothing before: 8 is given */
      {{0, 3}, {-1}, {6, 1}, 1, 2},       /* a mark of what is absent */
  };
  static const char *const set[] = {"optimizer.batch=4", NULL};
  static const int32_t token[] = {-1, -1, 7, -1, 9, 3, 4, -1, -1, -1, 5, 5, 8, 3, 8, -1, -1, -1, 6, 1};
  static const int32_t latent_slot[] = {0,  1,  -1, 3,  -1, -1, -1, 4, 5,  2,
                                        -1, -1, -1, -1, -1, 6,  7,  8, -1, -1};
  static const int32_t order[] = {0, 1, 9, 3, 7, 8, 15, 16, 17, 2, 4, 5, 6, 10, 11, 12, 13, 14, 18, 19};
  static const int32_t predict_row[] = {4, 5, 10, 12, 13, 17, 18}, target[] = {3, 4, 5, 3, 8, 6, 1};
  static const int32_t entry[] = {1, 3, 4, 5, 6, 7, 8, 9},
                       lookup[] = {19, 5, 13, 6, 10, 11, 18, 2, 12, 14, 4};
  static const int64_t offset[] = {0, 7, 12, 15, 20};
  test_session t;
  data_batch *batch = NULL;
  write_hand(list, 4);
  open_with(&t, &batch, set);
  train_model *model = t.session->model;
  const train_decoder *d = &model->decoder;
  assert_int_equal(train_decoder_predictions(model, batch, 0), 7);
  assert_ok(train_model_take(model, batch, 0, -1));
  assert_int_equal(model->items.tokens, 20);
  assert_int_equal(d->latents, 9);
  assert_int_equal(d->texts, 11);
  assert_int_equal(d->predicted, 7);
  assert_int_equal(d->lookups, 8);
  expect_numbers(&d->token, token, 20);
  expect_numbers(&d->latent_slot, latent_slot, 20);
  expect_numbers(&d->order, order, 20);
  expect_numbers(&d->predict_row, predict_row, 7);
  expect_numbers(&d->target, target, 7);
  expect_numbers(&d->lookup_entry, entry, 8);
  expect_numbers(&d->lookup_row, lookup, 11);
  assert_memory_equal(model->items.offset.host, offset, sizeof offset);
  for (int32_t i = 0; i < 20; i++) {
    assert_int_equal(((int32_t *)d->place.host)[order[i]], i);
    assert_int_equal(((int32_t *)model->items.position.host)[i], i < 7    ? i
                                                                 : i < 12 ? i - 7
                                                                 : i < 15 ? i - 12
                                                                          : i - 15);
  }
  int32_t slots = 0;
  for (int64_t i = 0; i < 20; i++) slots += ((int32_t *)d->predict_slot.host)[i] >= 0;
  assert_int_equal(slots, 7);
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

/* Image takes no part: its latents are not there and its marks stand for nothing; text keeps the mark -2. */
static void marks_keep_their_numbers(void **state) {
  (void)state;
  static const sample list[] = {
      {{2, 1}, {7, -2, 9}, {3, 4}, 3, 2},
      {{1, 2}, {-2, -1, 5}, {5}, 3, 1},
      {{0, 0}, {0}, {8, 3, 8}, 0, 3},
      {{0, 3}, {-1}, {6, 1}, 1, 2},
  };
  static const char *const set[] = {"optimizer.batch=4", "data.use=[text]", NULL};
  static const int32_t token[] = {7, -1, 9, 3, 4, -1, -1, 5, 5, 8, 3, 8, -1, -1, -1, 6, 1};
  static const int32_t latent_slot[] = {-1, 0, -1, -1, -1, 1, 2, -1, -1, -1, -1, -1, 3, 4, 5, -1, -1};
  test_session t;
  data_batch *batch = NULL;
  write_hand(list, 4);
  open_with(&t, &batch, set);
  assert_ok(train_model_take(t.session->model, batch, 0, -1));
  assert_int_equal(t.session->model->items.tokens, 17);
  assert_int_equal(t.session->model->decoder.latents, 6);
  expect_numbers(&t.session->model->decoder.token, token, 17);
  expect_numbers(&t.session->model->decoder.latent_slot, latent_slot, 17);
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

/* ---- refusals ---- */

static void refuse_set(const sample *list, int64_t count, core_status code, const char *message) {
  core_config *own = NULL;
  train_session *session = NULL;
  write_hand(list, count);
  assert_ok(core_config_load(train_settings_spec(), "the test", config, NULL, 0, &own));
  train_session_options options = {.config = own,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train"};
  assert_error(train_session_open(&options, &session), code, message);
  core_config_destroy(own);
}

static void bad_tokens_are_refused(void **state) {
  (void)state;
  const sample good = {{1, 1}, {4}, {3}, 1, 1};
  sample list[] = {good, good};
  list[1].target[0] = 50;
  refuse_set(list, 2, CORE_ERR_CORRUPT, "target token 50 of sample 1 is not in a vocabulary of 50");
  list[1].target[0] = -1;
  refuse_set(list, 2, CORE_ERR_CORRUPT, "target token -1 of sample 1");
  list[1] = good;
  list[1].targets = 0;
  refuse_set(list, 2, CORE_ERR_FORMAT, "text-00000.h5: sample 1 has no response");
  list[1] = good;
  list[1].prompt[0] = -3;
  refuse_set(list, 2, CORE_ERR_CORRUPT, "prompt token -3 of sample 1 is neither in a vocabulary of 50 nor");
  list[1] = (sample){{1, 1}, {-1, 3, -1}, {3}, 3, 1};
  refuse_set(list, 2, CORE_ERR_CORRUPT, "the prompt of sample 1 marks the place -1 twice");
}

static void a_set_without_tokens_is_refused(void **state) {
  (void)state;
  const sample good = {{1, 1}, {4}, {3}, 1, 1};
  core_config *own = NULL;
  train_session *session = NULL;
  for (int32_t m = 0; m < 2; m++) write_modality(m, -1, &good, 1);
  assert_ok(core_config_load(train_settings_spec(), "the test", config, NULL, 0, &own));
  train_session_options options = {
      .config = own, .comm = world, .data_path = root, .training_split = "train"};
  assert_error(train_session_open(&options, &session), CORE_ERR_FORMAT,
               "hold \"target_token\", the responses");
  core_config_destroy(own);
}

static void modalities_must_agree_on_tokens(void **state) {
  (void)state;
  const sample one = {{1, 1}, {4}, {3}, 1, 1}, other = {{1, 1}, {4}, {2}, 1, 1};
  data_set *set = NULL;
  const char *names[] = {"image", "text"};
  const data_text_options options = {.vocabulary = 50, .responses = true};
  write_modality(0, 0, &one, 1);
  write_modality(1, 1, &one, 1);
  assert_ok(data_set_open(root, "train", names, 2, &set));
  uint64_t before = data_set_fingerprint(set);
  assert_ok(data_set_take_text(set, &options));
  assert_true(data_set_fingerprint(set) != before);
  assert_int_equal(data_set_text_tokens(set, DATA_TEXT_BOTH), 2);
  assert_int_equal(data_set_longest_text(set, DATA_TEXT_TARGET), 1);
  data_set_close(set);
  char path[100];
  snprintf(path, sizeof path, "%s/train/text-00000.h5", root);
  assert_int_equal(unlink(path), 0);
  write_modality(1, 1, &other, 1);
  assert_ok(data_set_open(root, "train", names, 2, &set));
  assert_error(data_set_take_text(set, &options), CORE_ERR_MISMATCH, "hold different \"target_token\"");
  data_set_close(set);
}

/* ---- a large vocabulary ---- */

static int64_t two_rows(int64_t s, int32_t m) {
  return 1 + (s + m) % 2;
}

static void write_drawn(int32_t vocabulary, int64_t samples) {
  char directory[80];
  snprintf(directory, sizeof directory, "%s/train", root);
  test_set_options o = {.directory = directory,
                        .modalities = 2,
                        .width = {WIDTH, WIDTH},
                        .samples = samples,
                        .shards = 2,
                        .first_id = 1,
                        .rows = two_rows,
                        .vocabulary = vocabulary};
  assert_ok(test_set_write(&o));
}

/* loss and d loss / d logit of prediction i, by a plain softmax over the whole row, in double. */
static double plain_softmax(const core_real *logits, int64_t V, int32_t target, double weight,
                            double *gradient) {
  double most = -INFINITY, sum = 0;
  for (int64_t v = 0; v < V; v++) most = fmax(most, (double)logits[v]);
  for (int64_t v = 0; v < V; v++) sum += exp((double)logits[v] - most);
  for (int64_t v = 0; v < V; v++)
    gradient[v] = weight * (exp((double)logits[v] - most) / sum - (v == target));
  return most + log(sum) - (double)logits[target];
}

static void expect_one_softmax(const char *const *set, int64_t V, int64_t samples, int64_t blocks) {
  enum { C = 16 };
  test_session t;
  data_batch *batch = NULL;
  train_report report = {0};
  write_drawn((int32_t)V, samples);
  open_with(&t, &batch, set);
  train_model *model = t.session->model;
  train_decoder *d = &model->decoder;
  const core_device *device = t.session->env.ops->device;
  assert_ok(train_stepper_gradients(&t.session->stepper, batch, &report));
  int64_t R = d->predicted;
  assert_true(blocks == 1 || R % d->logits.shape[0] != 0); /* the last one is short */
  assert_int_equal((R + d->logits.shape[0] - 1) / d->logits.shape[0], blocks);
  core_real *hidden = test_fetch(device, train_rows(d->hidden, R)),
            *d_hidden = test_fetch(device, train_rows(d->d_hidden, R));
  core_real *table = test_fetch(device, train_parameter_value(&model->parameters, d->output));
  core_real *d_table = test_fetch(device, train_parameter_gradient(&model->parameters, d->output));
  double *expected = calloc((size_t)V * C, sizeof *expected), *gradient = calloc((size_t)V, sizeof *gradient);
  core_real *logits = calloc((size_t)V, sizeof *logits);
  double loss = 0, off = 0, size = 0, off_hidden = 0, size_hidden = 0;
  for (int64_t i = 0; i < R; i++) {
    double own[C] = {0};
    for (int64_t v = 0; v < V; v++) {
      double dot = 0;
      for (int64_t c = 0; c < C; c++) dot += (double)hidden[i * C + c] * (double)table[v * C + c];
      logits[v] = (core_real)dot;
    }
    loss += plain_softmax(logits, V, ((int32_t *)d->target.host)[i], 1.0 / (double)R, gradient);
    for (int64_t v = 0; v < V; v++)
      for (int64_t c = 0; c < C; c++) {
        expected[v * C + c] += gradient[v] * (double)hidden[i * C + c];
        own[c] += gradient[v] * (double)table[v * C + c];
      }
    for (int64_t c = 0; c < C; c++) {
      off_hidden += pow((double)d_hidden[i * C + c] - own[c], 2);
      size_hidden += own[c] * own[c];
    }
  }
  for (int64_t i = 0; i < (int64_t)V * C; i++) {
    off += pow((double)d_table[i] - expected[i], 2);
    size += expected[i] * expected[i];
  }
  assert_int_equal(report.predictions, R);
  assert_true(fabs(report.next_token - loss / (double)R) < 1e-5 * loss / (double)R);
  assert_true(size > 0 && sqrt(off / size) < 1e-4);
  assert_true(size_hidden > 0 && sqrt(off_hidden / size_hidden) < 1e-4);
  free(hidden), free(d_hidden), free(table), free(d_table), free(expected), free(gradient), free(logits);
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

static void blocks_are_one_softmax(void **state) {
  (void)state;
  static const char *const one[] = {"model.vocabulary=700", "optimizer.batch=40", NULL};
  static const char *const wide[] = {"model.vocabulary=70000", "optimizer.batch=70", NULL};
  expect_one_softmax(one, 700, 40, 1);
  remove_root(state), make_root(state);
  expect_one_softmax(wide, 70000, 70, 2);
}

/* ---- learning ---- */

/* The same eight samples again and again are learned by heart: their responses follow from their prompts. */
static void it_learns(void **state) {
  (void)state;
  test_session t;
  data_batch *batch = NULL;
  train_report report = {0};
  double first = 0;
  write_drawn(50, 8);
  open_with(&t, &batch, NULL);
  for (int step = 0; step < 60; step++) {
    assert_ok(train_stepper_run(&t.session->stepper, batch, &report));
    if (step == 0) first = report.next_token;
    t.session->env.step++;
  }
  assert_true(first > 3.5 && report.next_token < 0.3); /* log 50 = 3.9 at first */
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

/* ---- generation ---- */

enum { NEW = 6, PROMPTS = 5 };

typedef struct generated {
  int64_t samples, count[PROMPTS];
  int32_t token[PROMPTS][NEW];
} generated;

static core_status keep(void *context, uint64_t id, const int32_t *token, int64_t count) {
  generated *g = context;
  assert_int_equal(id, g->samples + 1); /* file order */
  g->count[g->samples] = count;
  memcpy(g->token[g->samples++], token, (size_t)count * sizeof *token);
  return CORE_OK;
}

/* A session over the hand-made set that trains and evaluates, with the given values (NULL: its own). */
static train_session *open_both(const char *const *set, int32_t count, core_config **own,
                                const core_real *values) {
  train_session *session = NULL;
  assert_ok(core_config_load(train_settings_spec(), "the test", config, set, count, own));
  train_session_options options = {.config = *own,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train",
                                   .evaluation_split = "train",
                                   .without_responses = values == NULL};
  assert_ok(train_session_open(&options, &session));
  assert_ok(train_session_standardise(session));
  train_parameters *p = &session->model->parameters;
  if (values) memcpy(p->value, values, (size_t)p->total * sizeof *values);
  return session;
}

static generated generate(train_session *session, double temperature, int32_t stop) {
  generated g = {0};
  const train_generate_options options = {NEW, temperature, stop};
  assert_ok(train_generate_run(session, &options, keep, &g));
  assert_int_equal(g.samples, PROMPTS);
  return g;
}

/* Prompt and response go through the model whole: the likeliest token after each row is the one generated. */
static void expect_likeliest(const sample *prompts, const generated *g, const char *const *set, int32_t count,
                             const core_real *values) {
  sample list[PROMPTS];
  core_config *own = NULL;
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  data_position start = {0, 0, 0};
  memcpy(list, prompts, sizeof list);
  for (int i = 0; i < PROMPTS; i++) {
    list[i].targets = g->count[i] > 0 ? g->count[i] : 1;
    memcpy(list[i].target, g->token[i], sizeof g->token[i]);
  }
  write_hand(list, PROMPTS);
  train_session *session = open_both(set, count, &own, values);
  train_model *model = session->model;
  assert_ok(train_session_stream(session, session->evaluation, &session->evaluation_layout, &start, false,
                                 &stream));
  assert_ok(data_stream_get(stream, &batch));
  assert_ok(train_model_take(model, batch, 0, -1));
  assert_ok(train_model_forward(model, TRAIN_MODE_EVALUATE));
  const train_decoder *d = &model->decoder;
  assert_int_equal(d->predicted, (PROMPTS - 1) * NEW);
  core_real logits[(PROMPTS - 1) * NEW * 50];
  assert_ok(train_decoder_logits(model, train_rows(d->hidden, d->predicted),
                                 core_tensor_2(logits, CORE_REAL_DTYPE, d->predicted, d->V)));
  for (int64_t i = 0; i < d->predicted; i++) {
    int64_t best = 0;
    for (int64_t v = 1; v < d->V; v++)
      if (logits[i * d->V + v] > logits[i * d->V + best]) best = v;
    assert_int_equal(best, ((int32_t *)d->target.host)[i]);
  }
  data_stream_put(stream, batch);
  data_stream_close(stream);
  train_session_close(session);
  core_config_destroy(own);
}

static const sample prompts[PROMPTS] = {{{2, 1}, {7, -2, 9}, {0}, 3, 0},
                                        {{1, 2}, {-2, -1, 5}, {0}, 3, 0},
                                        {{0, 0}, {0}, {0}, 0, 0}, /* nothing to continue */
                                        {{0, 3}, {0}, {0}, 0, 0},
                                        {{3, 0}, {8, 8, 8, 4, 1, 30, 2}, {0}, 7, 0}};

/* Large random values: what follows depends on all that lies before. */
static void with_cache_as_without(const char *const *set, int32_t count) {
  core_config *own = NULL;
  write_hand(prompts, PROMPTS);
  train_session *session = open_both(set, count, &own, NULL);
  train_parameters *p = &session->model->parameters;
  for (int64_t i = 0; i < p->total; i++)
    if (p->value[i] != 1) p->value[i] *= 3;
  core_real *values = malloc((size_t)p->total * sizeof *values);
  memcpy(values, p->value, (size_t)p->total * sizeof *values);
  generated g = generate(session, 0, -1), again = generate(session, 1e-9, -1);
  for (int i = 0; i < PROMPTS; i++) assert_int_equal(g.count[i], i == 2 ? 0 : NEW);
  assert_memory_equal(&g, &again, sizeof g); /* cold sampling is greedy; a second run is as the first */
  bool differ = false;
  for (int i = 1; i < PROMPTS; i++)
    differ = differ || (i != 2 && memcmp(g.token[0], g.token[i], sizeof g.token[0]));
  assert_true(differ);
  generated stopped = generate(session, 0, g.token[4][3]);
  int64_t first = 0;
  while (g.token[4][first] != g.token[4][3]) first++;
  assert_int_equal(stopped.count[4], first);
  generated drawn = generate(session, 2, -1), same = generate(session, 2, -1);
  assert_memory_equal(&drawn, &same, sizeof drawn);
  assert_true(memcmp(&drawn, &g, sizeof g) != 0);
  train_session_close(session);
  core_config_destroy(own);
  expect_likeliest(prompts, &g, set, count, values);
  free(values);
}

static void generation_is_the_same_with_kept_rows(void **state) {
  (void)state;
  static const char *const dense[] = {"model.layers=3", "model.qkv_bias=true", "model.kv_heads=1",
                                      "evaluate.batch=5"};
  static const char *const mixture[] = {"model.moe.layers=all", "model.moe.choose=2", "model.moe.experts=4",
                                        "evaluate.batch=5", "model.recompute=true"};
  with_cache_as_without(dense, 4);
  with_cache_as_without(mixture, 5);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_root, remove_root)
  const struct CMUnitTest tests[] = {TEST(rows_lie_in_sequence),
                                     cmocka_unit_test(marks_keep_their_numbers),
                                     TEST(bad_tokens_are_refused),
                                     TEST(a_set_without_tokens_is_refused),
                                     TEST(modalities_must_agree_on_tokens),
                                     TEST(blocks_are_one_softmax),
                                     TEST(it_learns),
                                     TEST(generation_is_the_same_with_kept_rows)};
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("trainer, decoder", tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
