/* The trainer against PyTorch: losses, router sums, counts, every gradient, the norm, two AdamW steps,
 * on every layout that this number of ranks allows. See make_golden.py, make_decoder.py, make_mixture.py and
 * make_resampler.py for the other side. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "golden_case.h"
#include "tests/support/test_device.h"
#include "trainer/session.h"

#define FOLDER ANTIPHON_SOURCE_DIR "/tests/golden"

/* Relative errors allowed. Float: a number is a sum of some hundred terms and a gradient passes three layers
 * both ways, so some hundred roundings of 6e-8 come together; they cancel in part. Double: the same with
 * 1.1e-16. The largest errors met are printed; those of gradients, embeddings and numbers are at most a tenth
 * of this, which leaves room for another order of sums. Updates may print more: a small change of a large
 * value is rounded when the value is stored, which compare_updates allows for beside it. */
#ifdef ANTIPHON_DOUBLE
static const double loss_error = 1e-13, tensor_error = 1e-13, rounding = 0x1p-53;
#else
static const double loss_error = 5e-6, tensor_error = 5e-5, rounding = 0x1p-24;
#endif

typedef struct variant {
  int32_t ranks;
  const char *set[4]; /* overrides of the configuration */
} variant;

/* A small buffer makes the experts take their rows in several rounds. */
static const variant variants[] = {
    {1, {NULL}},
    {1, {"optimizer.accumulate=2"}},
    {1, {"run.threads=2"}},
    {2, {NULL}},
    {2, {"optimizer.accumulate=2"}},
    {2, {"parallel.experts=2"}},
    {2, {"parallel.experts=2", "optimizer.accumulate=2"}},
    {2, {"parallel.experts=2", "model.moe.buffer=0.3"}},
    {2, {"parallel.experts=2", "parallel.placement=partitioned"}},
    {2, {"parallel.experts=2", "parallel.placement=partitioned", "optimizer.accumulate=2"}},
    {4, {"parallel.experts=2"}},
    {4, {"parallel.experts=4"}},
    {4, {"parallel.experts=2", "parallel.placement=partitioned"}},
    {4, {"parallel.experts=4", "parallel.placement=partitioned", "model.moe.buffer=0.5"}},
};

static bool is_partitioned(const variant *v) {
  for (int i = 0; i < 4 && v->set[i]; i++)
    if (strstr(v->set[i], "partitioned")) return true;
  return false;
}

static comm_world *world;
static const char *extra; /* one more override, for all variants */

/* What is compared, and how it went. Nothing here leaves the test in the middle: other ranks would wait. */
typedef struct check {
  const golden_case *golden;
  char title[256];
  int64_t failures;
  double worst_number, worst_embedding, worst_gradient, worst_update;
} check;

#define WRONG(check, ...)                                                                 \
  do {                                                                                    \
    fprintf(stderr, "rank %d, %s: ", comm_rank(comm_world_group(world)), (check)->title); \
    fprintf(stderr, __VA_ARGS__);                                                         \
    fputc('\n', stderr);                                                                  \
    (check)->failures++;                                                                  \
  } while (0)

/* Errors inside a step are hard faults: they end the job. */
static void must(core_status status) {
  if (status != CORE_OK) comm_fail_stop(world, status);
}

/* smallest: what errors are measured against where `want` is smaller. */
static void compare_scaled(check *c, const char *what, double got, double want, double smallest) {
  double error = fabs(got - want) / fmax(fabs(want), smallest);
  if (error > c->worst_number) c->worst_number = error;
  if (!(error <= loss_error)) WRONG(c, "%s is %.17g, expected %.17g (error %.2g)", what, got, want, error);
}

static void compare_number(check *c, const char *what, double got, double want) {
  compare_scaled(c, what, got, want, 1e-3);
}

static void compare_numbers(check *c, const char *what, const double *got, const double *want, int64_t count,
                            double smallest) {
  for (int64_t i = 0; i < count; i++) {
    char name[64];
    snprintf(name, sizeof name, "%s %lld", what, (long long)i);
    compare_scaled(c, name, got[i], want[i], smallest);
  }
}

static void compare_counts(check *c, const int64_t *got) {
  for (int64_t i = 0; i < c->golden->count_count; i++)
    if (got[i] != c->golden->counts[i])
      WRONG(c, "router count %lld is %lld, expected %lld", (long long)i, (long long)got[i],
            (long long)c->golden->counts[i]);
}

/* L2 norm of got - want, which may be off by tensor_error of want's norm and `floor`. */
static double compare_tensor(check *c, const char *what, const char *name, const double *got,
                             const double *want, int64_t count, double floor) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < count; i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  difference = sqrt(difference);
  size = sqrt(size);
  if (!(difference <= tensor_error * size + floor))
    WRONG(c, "%s of %s is off by %.3g of %.3g", what, name, difference, size);
  return size > 0 ? difference / size : 0;
}

/* ---- parameters ---- */

static int64_t find(check *c, const train_parameter *p) {
  int64_t i = golden_find(c->golden, p->name);
  if (i < 0) WRONG(c, "there is no parameter %s", p->name);
  if (i >= 0 && c->golden->size[i] != p->count) {
    WRONG(c, "%s has %lld numbers, expected %lld", p->name, (long long)p->count,
          (long long)c->golden->size[i]);
    i = -1;
  }
  return i;
}

/* Sets this rank's parameters; all ranks together must hold every one. */
static void load(check *c, train_model *model) {
  const golden_case *golden = c->golden;
  train_parameters *set = &model->parameters;
  core_tensor all = core_tensor_1(set->value, CORE_REAL_DTYPE, set->total);
  core_real *values = test_fetch(model->env->ops->device, all);
  int32_t *held = calloc((size_t)golden->parameters, sizeof *held);
  assert_non_null(held);
  for (int32_t n = 0; n < set->count; n++) {
    int64_t i = find(c, &set->list[n]);
    for (int64_t j = 0; i >= 0 && j < golden->size[i]; j++)
      values[set->list[n].first + j] = (core_real)golden->value[golden->first[i] + j];
    if (i >= 0) held[i] = 1;
  }
  test_store(model->env->ops->device, all, values);
  free(values);
  must(comm_all_reduce(comm_world_group(world), COMM_MAX, CORE_INT32, held, golden->parameters));
  for (int64_t i = 0; i < golden->parameters; i++)
    if (!held[i]) WRONG(c, "no rank holds %.*s", GOLDEN_NAME, golden->name[i]);
  free(held);
}

static void compare_gradients(check *c, train_model *model) {
  const train_parameters *set = &model->parameters;
  must(train_optimizer_gather(model));
  core_real *gradient =
      test_fetch(model->env->ops->device, core_tensor_1(set->gradient, CORE_REAL_DTYPE, set->gradient_total));
  for (int32_t n = 0; n < set->count; n++) {
    const train_parameter *p = &set->list[n];
    int64_t i = golden_find(c->golden, p->name);
    if (i < 0 || p->frozen) continue;
    double *got = calloc((size_t)p->count, sizeof *got);
    assert_non_null(got);
    for (int64_t j = 0; j < p->count; j++) got[j] = (double)gradient[p->gradient_first + j];
    double error = compare_tensor(c, "the gradient", p->name, got, c->golden->gradient + c->golden->first[i],
                                  p->count, 0);
    c->worst_gradient = fmax(c->worst_gradient, error);
    free(got);
  }
  free(gradient);
}

/* What `steps` steps have added; each rounds the values once more. */
static void compare_updates(check *c, const train_model *model, const double *want, int steps) {
  const train_parameters *set = &model->parameters;
  core_real *value =
      test_fetch(model->env->ops->device, core_tensor_1(set->value, CORE_REAL_DTYPE, set->total));
  for (int32_t n = 0; n < set->count; n++) {
    const train_parameter *p = &set->list[n];
    int64_t i = golden_find(c->golden, p->name);
    if (i < 0) continue;
    double *got = calloc((size_t)p->count, sizeof *got), size = 0;
    assert_non_null(got);
    for (int64_t j = 0; j < p->count; j++) {
      double before = (double)c->golden->value[c->golden->first[i] + j];
      got[j] = (double)value[p->first + j] - before;
      size += before * before;
    }
    double error = compare_tensor(c, "the update", p->name, got, want + c->golden->first[i], p->count,
                                  steps * rounding * sqrt(size));
    c->worst_update = fmax(c->worst_update, error);
    free(got);
  }
  free(value);
}

/* ---- a step ---- */

static bool is_connector(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_CONNECTOR;
}

static bool is_decoder(const train_model *model) {
  return model->env->settings->model.kind == TRAIN_KIND_DECODER;
}

static void compare_report(check *c, const train_report *report, const train_stepper *stepper) {
  const golden_scalars *want = &c->golden->scalar;
  const train_router_loss *router = &report->router;
  compare_number(c, "loss", report->loss, want->loss);
  compare_number(c, "contrastive loss", report->contrastive, want->contrastive);
  compare_number(c, "importance loss", router->importance, want->importance);
  compare_number(c, "load loss", router->load, want->load);
  compare_number(c, "z loss", router->z, want->z);
  compare_number(c, "local loss", router->local, want->local);
  compare_number(c, "global loss", router->global, want->global);
  compare_number(c, "balance loss", router->balance, c->golden->balance);
  compare_number(c, "scale", report->scale, want->scale);
  compare_number(c, "norm", report->norm, want->norm);
  if (is_decoder(stepper->model)) {
    compare_number(c, "next-token loss", report->next_token, c->golden->pair[0]);
    return;
  }
  const train_contrastive *contrastive =
      is_connector(stepper->model) ? &stepper->alignment.contrastive : &stepper->contrastive;
  if (contrastive->pairs != c->golden->pair_count)
    WRONG(c, "%d pairs, expected %lld", contrastive->pairs, (long long)c->golden->pair_count);
  else
    compare_numbers(c, "loss of pair", report->pair, c->golden->pair, c->golden->pair_count, 1e-3);
}

static void compare_sums(check *c, const train_moe_sums *sums) {
  int64_t cells = (int64_t)sums->layers * sums->modalities;
  if (cells * train_moe_value_stride(sums) != c->golden->sum_count) {
    WRONG(c, "%d MoE layers are not as many as expected", sums->layers);
  } else if (cells > 0) {
    /* of terms of about one; an expert's load may be the sum of far tails alone */
    compare_numbers(c, "router sum", sums->value.host, c->golden->sums, c->golden->sum_count, 1);
    compare_counts(c, sums->count.host);
  }
}

/* This rank's vectors of one modality: [count, Z] from sample `first` on. Zeros are expected where it is
 * absent; a connector's query or key of nothing is its bias. */
static void compare_vectors(check *c, const train_model *model, int32_t m, core_tensor vectors, int64_t first,
                            int64_t count, int64_t batch) {
  int64_t Z = model->Z;
  if (count == 0) return; /* perhaps not held */
  core_real *z = test_fetch(model->env->ops->device, vectors);
  for (int64_t i = 0; i < count; i++) {
    double got[256], size = 0;
    char name[64];
    const double *want = c->golden->embedding + (m * batch + first + i) * Z;
    for (int64_t d = 0; d < Z; d++) {
      got[d] = (double)z[i * Z + d];
      size += fabs(want[d]);
    }
    if (is_connector(model) && size == 0) continue;
    snprintf(name, sizeof name, "modality %d of sample %lld", m, (long long)(first + i));
    double error = compare_tensor(c, "the embedding", name, got, want, Z, 0);
    c->worst_embedding = fmax(c->worst_embedding, error);
  }
  free(z);
}

/* Embeddings of an evaluation: noise off, dropless, whatever training uses. */
static void compare_embeddings(check *c, const train_model *model, int64_t batch) {
  const train_items *items = &model->items;
  const train_alignment *a = &model->alignment;
  if (is_connector(model)) {
    int32_t from = a->direction[0].from, toward = a->direction[0].toward;
    compare_vectors(c, model, from, a->query_rows, items->sample_first[from], items->part_count[from], batch);
    compare_vectors(c, model, toward, a->key_rows, items->sample_first[toward], items->part_count[toward],
                    batch);
    return;
  }
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    compare_vectors(c, model, m, model->head[m].z, items->sample_first[m], items->part_count[m], batch);
}

/* The loss of each token of each response, in the order of the samples that this rank has. */
static void compare_tokens(check *c, const train_model *model, const data_text_part *text, int64_t batch) {
  const train_decoder *d = &model->decoder;
  const int64_t *offset = model->items.offset.host, most = c->golden->embedding_count / batch;
  core_real *lse = test_fetch(model->env->ops->device, train_rows(d->lse.device, d->predicted));
  core_real *positive = test_fetch(model->env->ops->device, train_rows(d->positive.device, d->predicted));
  int64_t next = 0;
  for (int64_t i = 0; i < text->hi - text->lo; i++) {
    int64_t targets = text->target_offset[i + 1] - text->target_offset[i];
    bool given = offset[i + 1] - offset[i] == targets; /* nothing before: the first token is not predicted */
    const double *want = c->golden->embedding + (text->lo + i) * most;
    for (int64_t t = 0; t < targets; t++) {
      char name[64];
      snprintf(name, sizeof name, "token %lld of sample %lld", (long long)t, (long long)(text->lo + i));
      bool first = given && t == 0;
      compare_scaled(c, name, first ? 0 : (double)lse[next] - (double)positive[next], want[t], 1);
      next += !first;
    }
  }
  if (next != d->predicted)
    WRONG(c, "%lld predictions, expected %lld", (long long)d->predicted, (long long)next);
  free(lse);
  free(positive);
}

static void compare_evaluation(check *c, train_session *session, const data_batch *batch) {
  train_model *model = session->model;
  int64_t M = session->env.layout.modalities;
  for (int64_t micro = 0; is_decoder(model) && micro < session->env.layout.micro_batches; micro++) {
    must(train_model_take(model, batch, micro, -1));
    must(train_model_forward(model, TRAIN_MODE_EVALUATE));
    compare_tokens(c, model, &batch->text[micro], batch->samples);
  }
  if (is_decoder(model)) return;
  if (c->golden->embedding_count != M * batch->samples * model->Z || model->Z > 256) {
    WRONG(c, "embeddings are %lld wide", (long long)model->Z);
    return;
  }
  for (int64_t micro = 0; micro < session->env.layout.micro_batches; micro++) {
    must(train_model_take(model, batch, micro, is_connector(model) ? 0 : -1));
    must(train_model_forward(model, TRAIN_MODE_EVALUATE));
    compare_embeddings(c, model, batch->samples);
  }
}

static void compare_step(check *c, train_session *session, const data_batch *batch) {
  train_report report = {0};
  load(c, session->model);
  session->env.step = 0;
  compare_evaluation(c, session, batch);
  must(train_stepper_gradients(&session->stepper, batch, &report));
  compare_report(c, &report, &session->stepper);
  if (!is_connector(session->model)) compare_sums(c, &session->model->sums);
  compare_gradients(c, session->model);

  must(train_stepper_run(&session->stepper, batch, &report));
  compare_report(c, &report, &session->stepper);
  compare_number(c, "clip", report.clip, c->golden->scalar.clip);
  compare_number(c, "rate", report.rate, c->golden->scalar.rate);
  compare_updates(c, session->model, c->golden->update, 1);

  session->env.step = 1;
  must(train_stepper_run(&session->stepper, batch, &report));
  compare_updates(c, session->model, c->golden->update_two, 2);
  compare_number(c, "loss after the step", report.loss, c->golden->scalar.loss_after);
}

static bool is_of_decoder(const golden_case *golden) {
  return strstr(golden->config, "\"kind\": \"decoder\"") != NULL;
}

static void run_variant(check *c, const variant *v) {
  core_config *config = NULL;
  train_session *session = NULL;
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  data_position start = {.consumed = c->golden->consumed};
  const char *set[5];
  int32_t overrides = 0;
  while (overrides < 4 && v->set[overrides]) {
    set[overrides] = v->set[overrides];
    overrides++;
  }
  if (extra) set[overrides++] = extra;
  must(core_config_load(train_settings_spec(), "golden.h5", c->golden->config, set, overrides, &config));
  train_session_options options = {.config = config,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = is_of_decoder(c->golden) ? FOLDER "/decoder" : FOLDER,
                                   .training_split = "train"};
  must(train_session_open(&options, &session));
  must(train_session_standardise(session));
  must(train_session_stream(session, session->training, &session->env.layout, &start, true, &stream));
  must(data_stream_get(stream, &batch));
  compare_step(c, session, batch);
  data_stream_put(stream, batch);
  data_stream_close(stream);
  train_session_close(session);
  core_config_destroy(config);
}

/* name of the case; file: where it lies. */
static void agree(const char *file, const char *name) {
  golden_case *golden = golden_read(file, name);
  comm_group *all = comm_world_group(world);
  int64_t failures = 0;
  for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
    const variant *v = &variants[i];
    if (v->ranks != comm_size(all) || (is_of_decoder(golden) && is_partitioned(v))) continue;
    check c = {.golden = golden};
    int length = snprintf(c.title, sizeof c.title, "%s", name);
    for (int32_t s = 0; s < 4 && v->set[s]; s++)
      length += snprintf(c.title + length, sizeof c.title - (size_t)length, " %s", v->set[s]);
    run_variant(&c, v);
    must(comm_all_reduce(all, COMM_SUM, CORE_INT64, &c.failures, 1));
    if (comm_rank(all) == 0)
      printf("%-80s largest errors: numbers %.1e embeddings %.1e gradients %.1e updates %.1e\n", c.title,
             c.worst_number, c.worst_embedding, c.worst_gradient, c.worst_update);
    failures += c.failures;
  }
  golden_free(golden);
  assert_int_equal(failures, 0);
}

/* *state: name of the case. */
static void agrees_with_pytorch(void **state) {
  agree(FOLDER "/golden.h5", *state);
}

static void decoder_agrees_with_pytorch(void **state) {
  agree(FOLDER "/decoder.h5", *state);
}

static void adapted_decoder_agrees_with_pytorch(void **state) {
  agree(FOLDER "/lora.h5", *state);
}

static void mixture_agrees_with_pytorch(void **state) {
  agree(FOLDER "/mixture.h5", *state);
}

static void resampler_agrees_with_pytorch(void **state) {
  agree(FOLDER "/resampler.h5", *state);
}

#define RESAMPLER(name) \
  { name, resampler_agrees_with_pytorch, NULL, NULL, name }
#define MIXTURE(name) \
  { name, mixture_agrees_with_pytorch, NULL, NULL, name }
#define DECODER(name) \
  { name, decoder_agrees_with_pytorch, NULL, NULL, name }
#define CASE(name) \
  { name, agrees_with_pytorch, NULL, NULL, name }

/* test_golden [key=value] */
int main(int argc, char **argv) {
  if (argc > 1) extra = argv[1];
  const struct CMUnitTest tests[] = {CASE("dropless"),
                                     CASE("priority"),
                                     CASE("order"),
                                     CASE("entropy"),
                                     CASE("noise"),
                                     CASE("absent"),
                                     CASE("towers"),
                                     CASE("partition"),
                                     CASE("dense"),
                                     CASE("joint"),
                                     CASE("alternating"),
                                     CASE("connector"),
                                     CASE("mlp"),
                                     DECODER("spliced"),
                                     DECODER("tied"),
                                     DECODER("noisy"),
                                     DECODER("plain"),
                                     MIXTURE("unequal"),
                                     MIXTURE("by_input"),
                                     MIXTURE("by_weight"),
                                     MIXTURE("drawn"),
                                     RESAMPLER("resampled_tower"),
                                     RESAMPLER("resampled"),
                                     {"lora", adapted_decoder_agrees_with_pytorch, NULL, NULL, "lora"}};
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = test_device_missing(extra, comm_local_rank(world));
  if (failed == 0) failed = cmocka_run_group_tests(tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
