/* Layout invariance: the law that loss, gradients, norm, routed counts and consumed samples of a step do not
 * depend on ranks, expert-parallel size, placement or accumulation.
 *
 * Every rank first computes the reference by itself, in a world of one process, and then takes part in the
 * same steps on the layout under test. Integers must agree exactly, except for near-ties, which are counted
 * in the reference, printed, and must be rare (a case with more than one in a thousand tokens is a bad case
 * and fails). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_set.h"
#include "trainer/session.h"

enum { STEPS = 3, SAMPLES = 64, MOST_MODALITIES = 3 };

/* How far layouts may be apart, relative to the size of the tensor or number; what is a near-tie: a gap
 * between logits below this share of their spread; and which share of the tokens may be near-ties. */
typedef struct tolerances {
  double loss, gradient, parameter, tie, ties;
  double moved; /* how far the values of a tensor may be apart whatever its size */
} tolerances;
#ifdef ANTIPHON_DOUBLE
static const tolerances in_real = {1e-12, 1e-9, 1e-6, 1e-5, 1e-3, 1e-9};
#else
/* Sums of a few thousand terms in another order. */
static const tolerances in_real = {2e-6, 2e-4, 2e-2, 1e-5, 1e-3, 2e-5};
#endif
/* A product of other row counts may round the last bit of an activation the other way: 2^-8 of it. Adam's
 * first steps move an element by the whole rate whatever the size of its gradient; one whose gradient is all
 * rounding may go the other way, by twice the rate of 0.01. */
static const tolerances in_bfloat = {5e-4, 3e-2, 3e-2, 4e-3, 2e-2, 2e-2};
static tolerances allowed;
/* That are compared. In bfloat16 one: the last bit that a product rounds the other way becomes a whole rate
 * in Adam's first step and another expert for a nearly tied token in the second. What follows the gradients
 * (clipping, the optimizer, its sharding) is float32 there as well, and its three steps are compared. */
static int steps = STEPS;
static bool few; /* cross a part of the layouts: a backend that is emulated takes its time */
static const char *extra[4],
    *precision = "run.precision=float32"; /* settings of the layouts; of both sides */

static comm_world *job, *alone; /* all ranks; this process by itself */
static int failures;

static const char base[] =
    "run: {directory: unused, seed: 7, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 40\n"
    "  modalities:\n"
    "    - {name: image, length: 8, local: 0.05, global: 0.1, experts: 3}\n"
    "    - {name: text, length: 12, connector: mlp, hidden: 24, global: 0.05, experts: 4}\n"
    "    - {name: speech, positions: rope, length: 12, normalize: rms, local: 0.02}\n"
    "model: {width: 32, layers: 3, heads: 4, kv_heads: 2, hidden: 48, embedding: 16,\n"
    "        moe: {layers: every 2, experts: 4, choose: 1, group_samples: 2, buffer: 0.4}}\n"
    "optimizer: {batch: 16, rate: 0.01, warmup: 2, clip: 0.5}\n";

static const char connector_base[] =
    "run: {directory: unused, seed: 7, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 40\n"
    "  modalities:\n"
    "    - {name: image, positions: none}\n"
    "    - {name: text, positions: none}\n"
    "    - {name: speech, positions: none, normalize: rms}\n"
    "model: {kind: connector, width: 32, hidden: 40, embedding: 16, activation: gelu,\n"
    "        moe: {experts: 4, choose: 2, bias: true, dropout: 0.1, noise: 0, buffer: 0.4}}\n"
    "objective: {directions: ['image:text', 'text:speech', 'speech:image'], temperature: 0.1,\n"
    "            importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 16, rate: 0.01, warmup: 2, clip: 0.5}\n";

static const char decoder_base[] =
    "run: {directory: unused, seed: 7, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 40\n"
    "  modalities:\n"
    "    - {name: image, positions: none}\n"
    "    - {name: text, length: 12, connector: mlp, hidden: 24}\n"
    "    - {name: speech, positions: none, normalize: rms}\n"
    "model: {kind: decoder, vocabulary: 50, width: 32, layers: 3, heads: 4, kv_heads: 2, hidden: 48,\n"
    "        qkv_bias: true, moe: {layers: every 2, experts: 4, choose: 2, gate: renormalised, buffer: "
    "0.4}}\n"
    "objective: {importance: 0.01, load: 0.01, z: 0.001}\n"
    "optimizer: {batch: 16, rate: 0.01, warmup: 2, clip: 0.5}\n";

typedef struct layout_case {
  const char *base, *name;
  const char *data;        /* which set */
  const char *settings[8]; /* --set of the case, kept over all layouts */
  bool hot;                /* the router is made to send everything to expert 0 */
} layout_case;

static const layout_case cases[] = {
    {base, "dropless top-1", "plain", {NULL}, false},
    {base,
     "dropless top-2 renormalised",
     "plain",
     {"model.moe.choose=2", "model.moe.gate=renormalised", "model.activation=gelu", NULL},
     false},
    {base,
     "capacity by gate",
     "plain",
     {"model.moe.dispatch=capacity", "model.moe.capacity=1.05", "model.moe.choose=2", NULL},
     false},
    {base,
     "capacity by order",
     "plain",
     {"model.moe.dispatch=capacity", "model.moe.capacity=0.7", "model.moe.priority=order",
      "model.moe.noise=0", NULL},
     false},
    {base, "hot expert", "plain", {"model.moe.noise=0", NULL}, true},
    {base, "ranks without tokens, a batch without speech", "holes", {NULL}, false},
    {base, "capacity with holes", "holes", {"model.moe.dispatch=capacity", NULL}, false},
    {base, "biases and dropout", "plain", {"model.moe.bias=true", "model.moe.dropout=0.2", NULL}, false},
    {base, "dense", "plain", {"model.dense=true", NULL}, false},
    {base, "a trunk for each modality", "plain", {"model.trunks=per_modality", NULL}, false},
    {base,
     "a trunk for each modality, holes",
     "holes",
     {"model.trunks=per_modality", "model.moe.choose=2", "model.activation=gelu", NULL},
     false},
    {base,
     "experts divided among modalities",
     "plain",
     {"model.moe.partition=modality", "model.moe.experts=12", "model.moe.choose=2", NULL},
     false},
    {base,
     "experts divided among modalities, capacity, biases, holes",
     "holes",
     {"model.moe.partition=modality", "model.moe.experts=12", "model.moe.dispatch=capacity",
      "model.moe.bias=true", NULL},
     false},
    {base,
     "unequal counts",
     "plain",
     {"model.moe.layer_experts=[3, 5]", "model.moe.choose=2", "model.moe.bias=true", NULL},
     false},
    {base,
     "unequal counts, added experts, capacity, holes",
     "holes",
     {"model.moe.layer_experts=[5, 3]", "model.moe.added=[2, 0]", "model.moe.added_bias=true",
      "model.moe.dispatch=capacity", NULL},
     false},
    /* groups of four samples straddle ranks and micro-batches; one group has no tokens */
    {base,
     "balance of groups, added experts, calibration by the input, holes",
     "holes",
     {"model.moe.added=[1, 2]", "model.moe.calibration=multiply", "model.moe.calibration_renormalize=false",
      "objective.balance=0.5", "objective.balance_scope=local", "model.moe.group_samples=4", NULL},
     false},
    {base,
     "second choices drawn, balance of the batch",
     "plain",
     {"model.moe.choose=2", "model.moe.noise=0", "model.moe.second_noise=gumbel", "objective.balance=0.5",
      "model.moe.gate=renormalised", NULL},
     false},
    {base,
     "resampler, adapters with dropout, holes",
     "holes",
     {"data.modalities.text.connector=resampler", "data.modalities.text.positions=none",
      "data.modalities.text.queries=3", "data.modalities.text.depth=2",
      "model.lora=[{parameters: connector.text.*, rank: 2, dropout: 0.2}]", NULL},
     false},
    {base,
     "resampler, positions by rotation, capacity",
     "plain",
     {"data.modalities.speech.connector=resampler", "data.modalities.speech.queries=13",
      "data.modalities.speech.depth=1", "model.moe.dispatch=capacity", NULL},
     false},
    {decoder_base,
     "decoder, resampler, homogeneous batches",
     "holes",
     {"data.modalities.speech.connector=resampler", "data.modalities.speech.queries=6",
      "data.modalities.speech.depth=2", "data.batches=homogeneous", "model.recompute=true", NULL},
     false},
    {connector_base, "connector, joint", "plain", {NULL}, false},
    {connector_base, "connector, alternating, holes", "holes", {"schedule.alternate=cyclic", NULL}, false},
    {connector_base,
     "connector, one for each direction, smooth differences",
     "plain",
     {"model.per_direction=true", "objective.regression=smooth_l1", NULL},
     false},
    {connector_base, "connector, dense", "plain", {"model.dense=true", NULL}, false},
    {decoder_base, "decoder, router losses", "plain", {NULL}, false},
    {decoder_base, "decoder, homogeneous batches", "holes", {"data.batches=homogeneous", NULL}, false},
    /* with a larger epsilon Adam makes no whole steps of gradients that are rounding, which three steps show
     */
    {decoder_base,
     "decoder, unequal counts, added experts, some frozen",
     "plain",
     {"model.moe.layer_experts=[3, 5]", "model.moe.added=[0, 2]", "model.moe.bias=true",
      "optimizer.frozen=['blocks.*.router.weight', 'blocks.2.experts.[023].*', 'blocks.0.experts.1.*']",
      "optimizer.epsilon=1.0e-4", NULL},
     false},
    {decoder_base,
     "decoder, calibration of probabilities, balance of groups",
     "holes",
     {"model.moe.added=[1, 0]", "model.moe.calibration=add", "objective.balance=0.5",
      "objective.balance_scope=local", "objective.balance_shares=all", NULL},
     false},
    {decoder_base,
     "decoder, tied, holes, no router losses",
     "holes",
     {"model.tied=true", "objective.importance=0", "objective.load=0", "objective.z=0", "model.moe.noise=0",
      NULL},
     false},
    {decoder_base,
     "decoder, some experts, norms and a connector frozen",
     "plain",
     {"optimizer.frozen=[blocks.*.experts.1.*,blocks.*.experts.2.in.*,'*norm*',connector.text.*,"
      "blocks.1.attention.*]",
      "model.moe.bias=true", NULL},
     false},
    {base,
     "only the upper blocks trained",
     "plain",
     {"optimizer.frozen=[connector.*,blocks.0.*,blocks.1.attention.*,'*.router.*']", NULL},
     false},
    {decoder_base,
     "decoder, adapters with dropout, all else but router and connectors frozen",
     "plain",
     {"model.lora=[{parameters: blocks.*.attention.*, rank: 4, alpha: 8, dropout: 0.3},"
      " {parameters: blocks.*.experts.*, rank: 3, dropout: 0.2},"
      " {parameters: blocks.1.feed_forward.*, rank: 2}, {parameters: connector.text.*, rank: 2, dropout: "
      "0.1}]",
      "optimizer.frozen=[embedding.*,output.*,'*norm*','*.bias']", "model.recompute=true", NULL},
     false},
    {base,
     "adapters, capacity, holes",
     "holes",
     {"model.lora=[{parameters: blocks.*, rank: 4, dropout: 0.2}, {parameters: connector.*, rank: 2}]",
      "model.moe.dispatch=capacity", "model.moe.choose=2", NULL},
     false},
    {base,
     "adapters with dropout in a trunk for each modality",
     "plain",
     {"model.lora=[{parameters: trunk.*.attention.*, rank: 2, dropout: 0.3}]", "model.trunks=per_modality",
      NULL},
     false},
    {connector_base,
     "connector, adapted experts",
     "plain",
     {"model.lora=[{parameters: blocks.*, rank: 4, dropout: 0.2}]", NULL},
     false},
    {decoder_base,
     "decoder, dense, llama3",
     "plain",
     {"model.dense=true", "model.rope_scaling.kind=llama3", "model.rope_scaling.factor=8",
      "model.rope_scaling.length=16", NULL},
     false},
};

static int64_t plain_rows(int64_t sample, int32_t m) {
  static const int64_t base_rows[3] = {4, 7, 9};
  return sample % 11 == (int64_t)m + 3 ? 0 : base_rows[m] - sample % 4;
}

/* Runs of samples that have nothing at all, and long runs without speech. */
static int64_t hole_rows(int64_t sample, int32_t m) {
  if (sample % 16 < 8 || (m == 2 && sample < 48)) return 0;
  return plain_rows(sample, m);
}

/* ---- one side: a session and its steps ---- */

typedef struct outcome {
  train_session *session;
  core_config *config;
  train_report report[STEPS];
  uint64_t id[STEPS][16];
  int64_t *counts[STEPS];      /* routed counts of all layers and modalities */
  core_real *gradient, *value; /* after the last step, all local parameters, on the host */
  int64_t near_ties, tokens;
} outcome;

static int64_t count_size(const train_session *session) {
  const train_moe_sums *sums = &session->model->sums;
  return (int64_t)sums->layers * sums->modalities * train_moe_count_stride(sums);
}

static void *fetch(const train_env *env, core_tensor tensor) {
  return test_fetch(env->ops->device, tensor);
}

/* All logits of one expert lifted: every token chooses it. Depends on names only, so it is the same on every
 * layout. */
static core_status heat_router(train_session *session) {
  train_model *model = session->model;
  const core_device *device = session->env.ops->device;
  for (int64_t l = 0; l < model->L; l++) {
    if (!model->block[l].has_moe) continue;
    core_tensor weight = train_parameter_value(&model->parameters, model->block[l].moe.router);
    core_tensor norm = train_parameter_value(&model->parameters, model->block[l].forward_norm.weight);
    core_real scale[64];
    for (int64_t c = 0; c < model->C; c++) scale[c] = c == 0 ? (core_real)0.01 : 1;
    TRY(device->fill(weight.data, 0, core_tensor_bytes(&weight), NULL));
    TRY(device->copy(norm.data, scale, core_tensor_bytes(&norm), NULL));
  }
  return CORE_OK;
}

static core_status collect_counts(outcome *o, int step) {
  int64_t size = count_size(o->session);
  o->counts[step] = calloc((size_t)size + 1, sizeof(int64_t));
  CHECK(o->counts[step], CORE_ERR_MEMORY, "no memory");
  if (size > 0) memcpy(o->counts[step], o->session->model->sums.count.host, (size_t)size * sizeof(int64_t));
  return CORE_OK;
}

/* Tokens whose K-th and next logit are nearly tied, in the last micro-batch. A block that this rank has not
 * run (another direction's connector) has no choices, whatever its memory holds. */
static void count_near_ties(outcome *o) {
  const train_model *model = o->session->model;
  for (int64_t l = 0; l < model->L; l++) {
    const train_moe *moe = &model->block[l].moe;
    if (!model->block[l].has_moe) continue;
    core_real *logits = fetch(&o->session->env, moe->noise ? moe->noisy : moe->logits);
    int32_t *choice = fetch(&o->session->env, moe->choice);
    int64_t E = moe->logits.shape[1], K = moe->choice.shape[1];
    for (int64_t t = 0; t < model->items.tokens; t++) {
      int32_t kth = choice[t * K + K - 1];
      if (kth < 0 || kth >= E) break;
      double last = logits[t * E + kth], next = -INFINITY, low = INFINITY, high = -INFINITY;
      const double forbidden = -1e8; /* experts of another modality */
      for (int64_t e = 0; e < E; e++) {
        double value = logits[t * E + e];
        bool chosen = false;
        for (int64_t k = 0; k < K; k++) chosen = chosen || choice[t * K + k] == e;
        if (value < forbidden) continue;
        if (!chosen && value > next) next = value;
        low = fmin(low, value);
        high = fmax(high, value);
      }
      o->tokens++;
      double gap = last - next; /* an exact tie is decided by the index, on every layout alike */
      o->near_ties += E > K && gap > 0 && gap < allowed.tie * (high - low);
    }
    free(logits);
    free(choice);
  }
}

static core_status run_steps(outcome *o, data_stream *stream) {
  for (int step = 0; step < steps; step++) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    memcpy(o->id[step], batch->id, sizeof o->id[step]);
    memset(o->session->env.seconds, 0, sizeof o->session->env.seconds);
    TRY(train_stepper_run(&o->session->stepper, batch, &o->report[step]));
    TRY(collect_counts(o, step));
    count_near_ties(o);
    data_stream_put(stream, batch);
    o->session->env.step++;
  }
  const train_parameters *set = &o->session->model->parameters;
  TRY(train_optimizer_gather(o->session->model));
  o->gradient = fetch(&o->session->env, core_tensor_1(set->gradient, CORE_REAL_DTYPE, set->gradient_total));
  o->value = fetch(&o->session->env, core_tensor_1(set->value, CORE_REAL_DTYPE, set->total));
  return CORE_OK;
}

static core_status run_side(comm_world *world, const char *root, const layout_case *c,
                            const char *const *layout, outcome *o) {
  const char *set[24];
  char path[600];
  int32_t count = 0;
  memset(o, 0, sizeof *o);
  for (int i = 0; c->settings[i]; i++) set[count++] = c->settings[i];
  for (int i = 0; layout[i]; i++) set[count++] = layout[i];
  for (int i = 0; world == job && extra[i]; i++) set[count++] = extra[i];
  set[count++] = precision;
  snprintf(path, sizeof path, "%s/%s", root, c->data);
  TRY(core_config_load(train_settings_spec(), "the harness", c->base, set, count, &o->config));
  train_session_options options = {.config = o->config,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = path,
                                   .training_split = "train"};
  TRY(train_session_open(&options, &o->session));
  TRY(train_session_standardise(o->session));
  if (c->hot) TRY(heat_router(o->session));
  data_stream *stream = NULL;
  data_position start = {0, 0, 0};
  TRY(train_session_stream(o->session, o->session->training, &o->session->env.layout, &start, true, &stream));
  core_status status = run_steps(o, stream);
  data_stream_close(stream);
  return status;
}

static void free_side(outcome *o) {
  train_session_close(o->session);
  core_config_destroy(o->config);
  for (int i = 0; i < STEPS; i++) free(o->counts[i]);
  free(o->gradient);
  free(o->value);
}

/* ---- comparing ---- */

static void complain(const char *what, const char *where, double got, double expected) {
  failures++;
  printf("FAILED on rank %d: %s, %s: %.9g, expected %.9g\n", comm_rank(comm_world_group(job)), where, what,
         got, expected);
}

static tolerances largest; /* differences seen on this rank */

static void expect_close(const char *what, const char *where, double got, double expected, double tolerance) {
  double size = fabs(expected) > 1e-3 ? fabs(expected) : 1e-3;
  if (tolerance == allowed.loss) largest.loss = fmax(largest.loss, fabs(got - expected) / size);
  if (!(fabs(got - expected) <= tolerance * size)) complain(what, where, got, expected);
}

static double distance(const core_real *a, const core_real *b, int64_t n, double *size) {
  double difference = 0;
  *size = 0;
  for (int64_t i = 0; i < n; i++) {
    difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    *size += (double)b[i] * (double)b[i];
  }
  *size = sqrt(*size);
  return sqrt(difference);
}

/* The same for values, whose gradients are g, of the elements with more gradient than `doubt`. */
static double distance_moved(const core_real *a, const core_real *b, const core_real *g, int64_t n,
                             double doubt, double *size) {
  double difference = 0;
  *size = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(fabs((double)g[i]) > doubt)) continue;
    difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    *size += (double)b[i] * (double)b[i];
  }
  *size = sqrt(*size);
  return sqrt(difference);
}

static const train_parameter *find(const train_parameters *set, const char *name) {
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) return &set->list[i];
  return NULL;
}

/* Every parameter that this rank holds, against the reference's of the same name. flipped: choices that fell
 * the other way at a near-tie, each of which gives a token of a few dozen to another expert. After one step,
 * which Adam makes of the signs of the gradients, values are compared where these are no rounding: that of a
 * key's bias is nothing else, since it adds the same to all that a query is compared with. */
static void compare_tensors(const outcome *got, const outcome *expected, int64_t flipped, const char *where) {
  const train_parameters *a = &got->session->model->parameters, *b = &expected->session->model->parameters;
  double norm = expected->report[steps - 1].norm, size, apart = allowed.gradient + 0.1 * (double)flipped;
  for (int32_t i = 0; i < a->count; i++) {
    const train_parameter *p = &a->list[i], *q = find(b, p->name);
    char what[CORE_NAME + 32];
    if (!p->active) continue; /* an alternating connector's: as it was */
    if (!q || q->count != p->count) {
      complain(p->name, where, (double)p->count, q ? (double)q->count : -1);
      continue;
    }
    snprintf(what, sizeof what, "gradient of %s", p->name);
    double d =
        distance(got->gradient + p->gradient_first, expected->gradient + q->gradient_first, p->count, &size);
    largest.gradient = fmax(largest.gradient, d / (size + 0.01 * norm));
    if (!(d <= apart * (size + 0.01 * norm))) complain(what, where, d, size);
    snprintf(what, sizeof what, "value of %s after %d steps", p->name, steps);
    d = distance_moved(got->value + p->first, expected->value + q->first,
                       expected->gradient + q->gradient_first, p->count,
                       steps == 1 ? 0.01 * allowed.gradient * norm : -1, &size);
    largest.parameter = fmax(largest.parameter, d / (size + 1e-3));
    if (!(d <= allowed.parameter * size + allowed.moved)) complain(what, where, d, size);
  }
}

/* Returns how many choices fell the other way. */
static int64_t compare_counts(const outcome *got, const outcome *expected, const char *where) {
  int64_t moved = 0;
  for (int step = 0; step < steps; step++) {
    int64_t different = 0;
    for (int64_t i = 0; i < count_size(expected->session); i++)
      different += llabs(got->counts[step][i] - expected->counts[step][i]);
    /* a near-tie that falls the other way moves two counts before and two after drops */
    if (different > 4 * expected->near_ties) complain("routed counts", where, (double)different, 0);
    if (memcmp(got->id[step], expected->id[step], sizeof got->id[step]) != 0)
      complain("consumed samples", where, (double)got->id[step][0], (double)expected->id[step][0]);
    moved += different;
  }
  return (moved + 3) / 4;
}

static void compare(const outcome *got, const outcome *expected, const char *where) {
  for (int step = 0; step < steps; step++) {
    const train_report *a = &got->report[step], *b = &expected->report[step];
    double grown = step == 0 ? 1 : 50; /* later steps start from parameters that differ in the last bits */
    expect_close("loss", where, a->loss, b->loss, allowed.loss * grown);
    expect_close("contrastive loss", where, a->contrastive, b->contrastive, allowed.loss * grown);
    expect_close("importance loss", where, a->router.importance, b->router.importance, allowed.loss * grown);
    expect_close("load loss", where, a->router.load, b->router.load, allowed.loss * grown);
    expect_close("z loss", where, a->router.z, b->router.z, allowed.loss * grown);
    expect_close("local loss", where, a->router.local, b->router.local, allowed.loss * grown);
    expect_close("global loss", where, a->router.global, b->router.global, allowed.loss * grown);
    expect_close("balance loss", where, a->router.balance, b->router.balance, allowed.loss * grown);
    expect_close("gradient norm", where, a->norm, b->norm, 10 * allowed.loss * grown);
    for (int m = 0; m < MOST_MODALITIES; m++)
      if (a->tokens[m] != b->tokens[m] || a->items[m] != b->items[m])
        complain("tokens", where, (double)a->tokens[m], (double)b->tokens[m]);
  }
  int64_t flipped = compare_counts(got, expected, where);
  if (flipped > 0 && comm_rank(comm_world_group(job)) == 0)
    printf("%s: %lld choices fell the other way at a near-tie\n", where, (long long)flipped);
  compare_tensors(got, expected, flipped, where);
}

/* ---- crossing ---- */

/* How a layout is computed must not matter either: the `way` crosses a sharded optimizer with recomputation,
 * with reductions of gradients, in small buckets, during the backward pass and with chunks of a dispatch. */
static core_status cross(const char *root, const layout_case *c, const outcome *reference, int e,
                         bool partitioned, int accumulate, int way) {
  char experts[40], micro[40], where[256];
  bool sharded = way & 1, recomputed = way & 2;
  int32_t ranks = comm_size(comm_world_group(job));
  outcome got;
  snprintf(experts, sizeof experts, "parallel.experts=%d", e);
  snprintf(micro, sizeof micro, "optimizer.accumulate=%d", accumulate);
  const char *layout[] = {experts,
                          micro,
                          partitioned ? "parallel.placement=partitioned" : "parallel.placement=shared",
                          sharded ? "parallel.shard_optimizer=true" : "parallel.shard_optimizer=false",
                          recomputed ? "model.recompute=true" : "model.recompute=false",
                          recomputed ? "parallel.overlap=always" : "parallel.overlap=auto",
                          recomputed ? "parallel.chunks=2" : "parallel.chunks=1",
                          "parallel.bucket=0.005",
                          NULL};
  snprintf(where, sizeof where, "%s: %d ranks, expert-parallel %d, %s, %d micro-batches%s%s", c->name, ranks,
           e, partitioned ? "partitioned" : "shared", accumulate, sharded ? ", sharded" : "",
           recomputed ? ", recomputed, overlapped" : "");
  TRY(run_side(job, root, c, layout, &got));
  int before = failures;
  compare(&got, reference, where);
  int64_t rounds = 1;
  for (int64_t l = 0; l < got.session->model->L; l++)
    if (got.session->model->block[l].has_moe && got.session->model->block[l].moe.dispatch.rounds > rounds)
      rounds = got.session->model->block[l].moe.dispatch.rounds;
  if (c->hot && e > 1 && rounds < 2) complain("rounds of a hot expert", where, (double)rounds, 2);
  free_side(&got);
  int64_t total = failures - before;
  TRY(comm_all_reduce(comm_control_group(job), COMM_SUM, CORE_INT64, &total, 1));
  if (comm_rank(comm_world_group(job)) == 0) printf("%-138s %s\n", where, total == 0 ? "ok" : "FAILED");
  fflush(stdout);
  return CORE_OK;
}

/* Of the ways: in `few`, the plainest and the one with everything; with four ranks the one for all experts on
 * as many ranks, the other for two groups of two (two ranks cross the rest). */
static bool crosses(int32_t ranks, int e, int way) {
  if (!few) return true;
  if (ranks > 2) return (e == ranks && way % 4 == 0) || (e == 2 && way % 4 == 3);
  return way % 4 == 0 || way % 4 == 3;
}

static core_status run_case(const char *root, const layout_case *c) {
  const char *none[] = {"parallel.shard_optimizer=false", "run.device=cpu", NULL};
  int way = 0;
  int32_t ranks = comm_size(comm_world_group(job));
  outcome reference;
  TRY(run_side(alone, root, c, none, &reference));
  if (comm_rank(comm_world_group(job)) == 0)
    printf("%s: %lld near-ties in %lld routed tokens\n", c->name, (long long)reference.near_ties,
           (long long)reference.tokens);
  if ((double)reference.near_ties > allowed.ties * (double)reference.tokens)
    complain("near-ties: a bad case", c->name, (double)reference.near_ties, 0);
  for (int e = 1; e <= ranks; e *= 2)
    for (int partitioned = 0; partitioned < (c->base == decoder_base ? 1 : 2); partitioned++)
      for (int accumulate = 1; accumulate <= 2; accumulate++, way++)
        if (crosses(ranks, e, way)) TRY(cross(root, c, &reference, e, partitioned, accumulate, way));
  free_side(&reference);
  return CORE_OK;
}

static core_status write_sets(const char *root) {
  char path[600];
  test_set_options o = {.modalities = 3,
                        .width = {20, 12, 28},
                        .samples = SAMPLES,
                        .shards = 3,
                        .labels = true,
                        .vocabulary = 50};
  o.directory = path;
  o.first_id = 1000;
  o.rows = plain_rows;
  snprintf(path, sizeof path, "%s/plain/train", root);
  TRY(test_set_write(&o));
  o.rows = hole_rows;
  snprintf(path, sizeof path, "%s/holes/train", root);
  TRY(test_set_write(&o));
  return CORE_OK;
}

static core_status start(void) {
  comm_options options = {.deadline = 60}, own = {.deadline = 60, .alone = true};
  TRY(comm_start(&options, &job));
  TRY(comm_start(&own, &alone));
  return CORE_OK;
}

static core_status run_all(char *root, size_t capacity) {
  core_status status = CORE_OK;
  if (comm_rank(comm_world_group(job)) == 0) {
    if (!mkdtemp(root)) status = CORE_ERR_IO;
    if (status == CORE_OK) status = write_sets(root);
  }
  TRY(comm_agree(comm_control_group(job), status));
  TRY(comm_broadcast(comm_control_group(job), 0, root, capacity));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) TRY(run_case(root, &cases[i]));
  TRY(comm_barrier(comm_control_group(job)));
  return CORE_OK;
}

/* test_layout [few] [key=value]...: settings of the side under test, such as run.device=cuda; run.precision
 * is that of both. The reference is always on the CPU. */
int main(int argc, char **argv) {
  allowed = in_real;
  for (int i = 1, n = 0; i < argc && n < 3; i++) {
    if (strcmp(argv[i], "few") == 0)
      few = true;
    else if (strncmp(argv[i], "run.precision=", 14) == 0)
      precision = argv[i];
    else
      extra[n++] = argv[i];
  }
  if (strcmp(precision, "run.precision=bfloat16") == 0) {
    allowed = in_bfloat;
    steps = 1;
  }
  char root[256] = "/tmp/antiphon-layout-XXXXXX", text[4096];
  core_status status = start();
  int missing = status == CORE_OK ? test_device_missing(extra[0], comm_local_rank(job)) : 0;
  if (status == CORE_OK && missing == 0) status = run_all(root, sizeof root);
  if (status != CORE_OK) {
    core_error_format(core_error_get(), true, text, sizeof text);
    printf("%s\n", text);
    if (job) comm_fail_stop(job, status);
    return 1;
  }
  bool first = comm_rank(comm_world_group(job)) == 0 && missing == 0;
  if (first)
    printf(
        "largest differences on rank 0: loss of the first step %.1e, gradients of the last %.1e, values "
        "%.1e\n",
        largest.loss, largest.gradient, largest.parameter);
  if (first) test_remove_tree(root);
  comm_finish(alone);
  comm_finish(job);
  return missing ? missing : failures > 0;
}
