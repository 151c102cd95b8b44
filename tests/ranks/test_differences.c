/* Whole models against central differences (double build): the loss that a step reports, moved by one
 * parameter at a time, against the gradient of the same step. Covers a tower and a connector with everything
 * that has a gradient, on several ranks: the parameter is moved on every rank that holds it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/random.h"
#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"

enum { SAMPLES = 24, DRAWS = 3 };

static comm_world *job;
static int failures, compared;

static const char tower[] =
    "run: {directory: unused, seed: 3, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, length: 8, local: 0.05, global: 0.1, experts: 3}\n"
    "    - {name: text, length: 12, connector: mlp, hidden: 12, global: 0.05, experts: 4}\n"
    "    - {name: speech, positions: rope, length: 12, local: 0.02}\n"
    "model: {width: 12, layers: 3, heads: 2, hidden: 10, embedding: 8,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, bias: true, dropout: 0.2}}\n"
    "optimizer: {batch: 8}\n";

static const char connector[] =
    "run: {directory: unused, seed: 3, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, positions: none}\n"
    "    - {name: text, positions: none}\n"
    "    - {name: speech, positions: none}\n"
    "model: {kind: connector, width: 12, hidden: 10, embedding: 8, activation: gelu,\n"
    "        moe: {experts: 4, choose: 2, bias: true, dropout: 0.2}}\n"
    "objective: {directions: ['image:text', 'speech:image', 'text:speech'], temperature: 0.3,\n"
    "            importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 8}\n";

static const char decoder[] =
    "run: {directory: unused, seed: 3, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, positions: none}\n"
    "    - {name: text, length: 12, connector: mlp, hidden: 12, global: 0.05, experts: 4}\n"
    "    - {name: speech, positions: none, local: 0.02}\n"
    "model: {kind: decoder, vocabulary: 40, width: 12, layers: 3, heads: 4, kv_heads: 2, head_width: 4,\n"
    "        hidden: 10, qkv_bias: true, moe: {layers: every 2, experts: 4, choose: 2, bias: true}}\n"
    "optimizer: {batch: 8}\n";

static const struct {
  const char *name, *config;
  const char *set[7];
  const char *sized; /* a parameter that must have so many rows; NULL: none */
  int64_t rows;
} cases[] = {
    {"tower", tower, {NULL}, NULL, 0},
    {"tower, capacity, renormalised",
     tower,
     {"model.moe.dispatch=capacity", "model.moe.gate=renormalised", "model.moe.group_samples=2", NULL},
     NULL,
     0},
    {"tower, dense, gelu",
     tower,
     {"model.dense=true", "model.activation=gelu", NULL},
     "blocks.0.feed_forward.in.weight",
     2 * 10},
    {"tower, a trunk for each modality",
     tower,
     {"model.trunks=per_modality", NULL},
     "trunk.speech.blocks.2.feed_forward.in.weight",
     2 * 2 * 10},
    {"tower, experts divided among modalities",
     tower,
     {"model.moe.partition=modality", "model.moe.experts=12", NULL},
     NULL,
     0},
    {"tower, recomputed, accumulated",
     tower,
     {"model.recompute=true", "optimizer.accumulate=2", NULL},
     NULL,
     0},
    {"tower, unequal counts, added experts",
     tower,
     {"model.moe.layer_experts=[3, 5]", "model.moe.added=[1, 2]", NULL},
     "blocks.2.router.added.weight",
     2},
    {"tower, calibration of probabilities, balance of groups",
     tower,
     {"model.moe.added=[1, 2]", "model.moe.calibration=add", "objective.balance=0.7",
      "objective.balance_scope=local", "model.moe.group_samples=2", NULL},
     "blocks.2.calibration.in.weight",
     16},
    {"tower, second choices drawn, balance of the batch",
     tower,
     {"model.moe.noise=0", "model.moe.second_noise=gumbel", "objective.balance=0.7", NULL},
     NULL,
     0},
    {"decoder", decoder, {NULL}, "output.weight", 40},
    {"decoder, calibration by the input, weights not divided, balance of all choices",
     decoder,
     {"model.moe.added=[2, 1]", "model.moe.calibration=multiply", "model.moe.calibration_renormalize=false",
      "objective.balance=0.7", "objective.balance_shares=all", "optimizer.accumulate=2"},
     "blocks.0.calibration.out.weight",
     4},
    {"decoder, unequal counts, bias of added experts alone, recomputed",
     decoder,
     {"model.moe.layer_experts=[5, 3]", "model.moe.added=[2, 0]", "model.moe.added_bias=true",
      "model.moe.bias=false", "model.recompute=true", NULL},
     "blocks.0.router.added.bias",
     2},
    {"decoder, tied, linear positions, recomputed, accumulated",
     decoder,
     {"model.tied=true", "model.rope_scaling.kind=linear", "model.rope_scaling.factor=4",
      "model.recompute=true", "optimizer.accumulate=2"},
     NULL,
     0},
    {"decoder, adapters with dropout",
     decoder,
     {"model.lora=[{parameters: blocks.*, rank: 3, alpha: 12, dropout: 0.3},"
      " {parameters: connector.text.*, rank: 2, dropout: 0.2}]",
      "model.recompute=true", NULL},
     "blocks.2.experts.1.in.lora_b.weight",
     2 * 10},
    {"tower, adapters, frozen norms and embeddings, accumulated",
     tower,
     {"model.lora=[{parameters: blocks.*.experts.*, rank: 3, dropout: 0.2}]",
      "optimizer.frozen=['*norm*','*position*']", "optimizer.accumulate=2", NULL},
     NULL,
     0},
    {"tower, resampler, recomputed",
     tower,
     {"data.modalities.text.connector=resampler", "data.modalities.text.positions=none",
      "data.modalities.text.queries=3", "data.modalities.text.depth=2", "model.recompute=true", NULL},
     "connector.text.query",
     3},
    {"decoder, resampler with adapters and dropout, accumulated",
     decoder,
     {"data.modalities.text.connector=resampler", "data.modalities.text.positions=none",
      "data.modalities.text.queries=2", "data.modalities.text.depth=1",
      "model.lora=[{parameters: connector.text.layers.*, rank: 2, dropout: 0.2}]", "optimizer.accumulate=2"},
     "connector.text.layers.0.cross.kv.lora_b.weight",
     2 * 12},
    {"connector, joint", connector, {NULL}, NULL, 0},
    {"connector, one direction, smooth differences",
     connector,
     {"schedule.alternate=cyclic", "objective.regression=smooth_l1", "objective.alpha=0.3", NULL},
     NULL,
     0},
    {"connector, accumulated",
     connector,
     {"optimizer.accumulate=2", "model.activation=swiglu", NULL},
     NULL,
     0},
    {"connector, dense", connector, {"model.dense=true", NULL}, "blocks.0.feed_forward.in.weight", 2 * 10},
    {"connectors, dense, as wide as all experts",
     connector,
     {"model.dense=true", "model.dense_match=total", "model.per_direction=true", NULL},
     "blocks.2.feed_forward.in.weight",
     4 * 10},
    {"connector, one for each direction", connector, {"model.per_direction=true", NULL}, NULL, 0},
};

static int64_t rows_of(int64_t sample, int32_t m) {
  return (sample + m) % 5 == 0 ? 0 : 2 + (sample * 3 + m) % 4;
}

/* Adds `move` to element `at` of the parameter of this name, wherever it is held. */
static void move_value(train_session *session, const char *name, int64_t at, double move) {
  const train_parameters *set = &session->model->parameters;
  for (int32_t i = 0; i < set->count; i++) {
    if (strcmp(set->list[i].name, name) != 0) continue;
    core_tensor one = core_tensor_1(set->value + set->list[i].first + at, CORE_REAL_DTYPE, 1);
    core_real *value = test_fetch(session->env.ops->device, one);
    *value += (core_real)move;
    test_store(session->env.ops->device, one, value);
    free(value);
  }
}

/* An adapter begins with B = 0, where A has no gradient: away from there. */
static void move_adapters(train_session *session) {
  const train_parameters *set = &session->model->parameters;
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    for (int64_t at = 0; strstr(p->name, ".lora_b.") && at < p->count; at++)
      move_value(session, p->name, at, 0.2 * core_random_normal(5, core_hash_text(p->name), (uint64_t)at));
  }
}

static double loss_of(train_session *session, const data_batch *batch) {
  train_report report = {0};
  test_device_must(train_stepper_gradients(&session->stepper, batch, &report));
  return report.loss;
}

/* Gradient of one element, from the ranks that hold it; they agree. */
static double gradient_of(const train_session *session, const double *gradient, const char *name,
                          int64_t at) {
  const train_parameters *set = &session->model->parameters;
  double sum[2] = {0, 0};
  for (int32_t i = 0; i < set->count; i++)
    if (strcmp(set->list[i].name, name) == 0) {
      sum[0] = gradient[set->list[i].gradient_first + at];
      sum[1] = 1;
    }
  test_device_must(comm_all_reduce(session->env.world, COMM_SUM, CORE_FLOAT64, sum, 2));
  return sum[0] / sum[1];
}

static void compare_element(train_session *session, const data_batch *batch, const double *gradient,
                            const char *what, const char *name, int64_t at, double size) {
  const double h = 2e-6;
  double analytic = gradient_of(session, gradient, name, at);
  move_value(session, name, at, h);
  double up = loss_of(session, batch);
  move_value(session, name, at, -2 * h);
  double down = loss_of(session, batch);
  move_value(session, name, at, h);
  double numeric = (up - down) / (2 * h), error = fabs(numeric - analytic);
  compared++;
  if (error <= 2e-7 * size + 2e-5 * fabs(analytic)) return;
  failures++;
  if (comm_rank(session->env.world) == 0)
    printf("FAILED %s: %s[%lld]: gradient %.10g, differences %.10g\n", what, name, (long long)at, analytic,
           numeric);
}

/* Names of all parameters, on every rank in one order: experts lie on different ones. */
static void compare_all(train_session *session, const data_batch *batch, const char *what) {
  const train_parameters *set = &session->model->parameters;
  comm_group *world = session->env.world;
  double before = loss_of(session, batch);
  test_device_must(train_optimizer_gather(session->model));
  double *gradient = test_fetch(session->env.ops->device,
                                core_tensor_1(set->gradient, CORE_REAL_DTYPE, set->gradient_total));
  for (int32_t rank = 0; rank < comm_size(world); rank++) {
    int64_t count = set->count;
    test_device_must(comm_broadcast(world, rank, &count, sizeof count));
    for (int64_t i = 0; i < count; i++) {
      train_parameter p = rank == comm_rank(world) ? set->list[i] : (train_parameter){0};
      test_device_must(comm_broadcast(world, rank, &p, sizeof p));
      if (!p.active) continue;
      for (int draw = 0; draw < DRAWS; draw++)
        compare_element(
            session, batch, gradient, what, p.name,
            (int64_t)core_random_below(9, core_hash_text(p.name), (uint64_t)draw, (uint64_t)p.count),
            fabs(before) + 1);
    }
  }
  free(gradient);
}

static void run_case(const char *root, size_t which, const char *layout) {
  const char *set[8] = {NULL};
  int32_t count = 0;
  for (int i = 0; cases[which].set[i]; i++) set[count++] = cases[which].set[i];
  set[count] = layout;
  test_session t;
  data_batch *batch = NULL;
  test_session_open(job, cases[which].config, set, root, &t);
  test_device_must(data_stream_get(t.stream, &batch));
  int had = failures, did = compared;
  for (int32_t i = 0; cases[which].sized && i < t.session->model->parameters.count; i++) {
    const train_parameter *p = &t.session->model->parameters.list[i];
    if (strcmp(p->name, cases[which].sized) == 0 && p->shape[0] != cases[which].rows) {
      failures++;
      printf("FAILED %s: %s has %lld rows\n", cases[which].name, p->name, (long long)p->shape[0]);
    }
  }
  move_adapters(t.session);
  compare_all(t.session, batch, cases[which].name);
  if (comm_rank(comm_world_group(job)) == 0)
    printf("%-50s %-24s %4d elements %s\n", cases[which].name, layout ? layout : "", compared - did,
           failures == had ? "ok" : "FAILED");
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

int main(void) {
  char root[256] = "/tmp/antiphon-differences-XXXXXX";
  comm_options options = {.deadline = 60};
  test_device_must(comm_start(&options, &job));
  int32_t ranks = comm_size(comm_world_group(job));
  bool first = comm_rank(comm_world_group(job)) == 0;
  test_set_options o = {.modalities = 3,
                        .width = {9, 7, 11},
                        .samples = SAMPLES,
                        .shards = 1,
                        .labels = true,
                        .first_id = 1,
                        .rows = rows_of,
                        .vocabulary = 40};
  test_device_must(test_set_share(job, &o, root, sizeof root));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    run_case(root, i, NULL);
    if (ranks > 1) run_case(root, i, "parallel.experts=2");
  }
  if (first) test_remove_tree(root);
  comm_finish(job);
  return failures > 0;
}
