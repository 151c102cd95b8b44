/* What communication and computation do at the same time changes no bit: losses, norm, gradients and values
 * of several steps are the same where gradients are reduced during the backward pass and the rows of experts
 * go in chunks, and where each waits for the other. And all that could go off early did: every bucket of
 * gradients that are final within the pass. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"

enum { STEPS = 3 };

static comm_world *job;
static int failures;
static const char *extra; /* a setting of both sides, such as run.device=cuda */

#define MODALITIES                                                               \
  "run: {directory: unused, seed: 3, steps: 20, threads: 1, deadline: 60}\n"     \
  "data:\n  path: unused\n  modalities:\n    - {name: image, positions: none}\n" \
  "    - {name: text, positions: none}\n    - {name: speech, positions: none}\n" \
  "optimizer: {batch: 8, warmup: 0, clip: 0.5}\n"

static const char tower[] = MODALITIES
    "model: {width: 16, layers: 3, heads: 2, hidden: 24, embedding: 8,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, group_samples: 1}}\n";
static const char decoder[] = MODALITIES
    "model: {kind: decoder, vocabulary: 30, width: 16, layers: 3, heads: 2, hidden: 24,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2}}\n"
    "objective: {importance: 0.01, load: 0.01, z: 0.001}\n";
static const char connector[] = MODALITIES
    "model: {kind: connector, width: 12, hidden: 10, embedding: 8, activation: gelu,\n"
    "        moe: {experts: 4, choose: 2, bias: true}}\n"
    "objective: {directions: ['image:text', 'speech:image'], importance: 0, load: 0, z: 0}\n"
    "schedule: {alternate: cyclic}\n";

typedef struct overlap_case {
  const char *name, *config;
  int32_t ranks; /* fewer do not run it */
  const char *set[6];
} overlap_case;

static const overlap_case cases[] = {
    {"tower", tower, 1, {NULL}},
    {"tower, not sharded, recomputed", tower, 1, {"parallel.shard_optimizer=false", "model.recompute=true"}},
    {"tower, two micro-batches, experts shared out",
     tower,
     2,
     {"optimizer.accumulate=2", "parallel.experts=2"}},
    {"tower, partitioned", tower, 2, {"parallel.placement=partitioned", "parallel.experts=2"}},
    {"a trunk for each modality",
     tower,
     2,
     {"model.trunks=per_modality", "parallel.placement=partitioned", "parallel.experts=2"}},
    {"tower, upper blocks and adapters alone",
     tower,
     1,
     {"optimizer.frozen=[connector.*,blocks.0.*]", "model.lora=[{parameters: blocks.*, rank: 2}]"}},
    {"decoder", decoder, 1, {"parallel.shard_optimizer=false"}},
    {"decoder, tied, two micro-batches, no router losses",
     decoder,
     1,
     {"model.tied=true", "optimizer.accumulate=2", "objective.importance=0", "objective.load=0",
      "objective.z=0"}},
    {"tower, rounds, some experts frozen",
     tower,
     2,
     {"parallel.experts=2", "model.moe.experts=8", "model.moe.buffer=0.3",
      "optimizer.frozen=['blocks.*.experts.[15].*']", "model.moe.bias=true"}},
    {"tower, unequal counts, capacity, adapters that drop inputs",
     tower,
     2,
     {"parallel.experts=2", "model.moe.layer_experts=[7, 3]", "model.moe.dispatch=capacity",
      "model.lora=[{parameters: blocks.*.experts.*, rank: 2, dropout: 0.3}]", "optimizer.accumulate=2"}},
    {"decoder, rounds, recomputed",
     decoder,
     2,
     {"parallel.experts=2", "model.moe.experts=6", "model.moe.buffer=0.3", "model.recompute=true"}},
    {"connector, alternating", connector, 1, {NULL}},
};

/* ---- one side ---- */

typedef struct outcome {
  test_session test;
  train_report report[STEPS];
  core_real *gradient, *value; /* after the last step, on the host */
  int32_t buckets, within;     /* of the last step; of them, final within the backward pass */
  int64_t chunks, rounds;      /* most of a layer, of the last forward pass */
} outcome;

static void count_parts(outcome *out) {
  const train_model *model = out->test.session->model;
  const train_reduction *r = &out->test.session->stepper.reduction;
  out->buckets = r->count;
  out->within = 0;
  out->chunks = out->rounds = 1;
  for (int32_t i = 0; i < r->count; i++) out->within += r->bucket[i].point < train_model_points(model) - 1;
  for (int64_t l = 0; l < model->L; l++) {
    const train_moe *moe = &model->block[l].moe;
    if (!model->block[l].has_moe) continue;
    if (train_dispatch_chunks(model, moe) > out->chunks) out->chunks = train_dispatch_chunks(model, moe);
    if (moe->dispatch.rounds > out->rounds) out->rounds = moe->dispatch.rounds;
  }
}

static void run(const char *root, const overlap_case *c, bool overlaps, outcome *out) {
  const char *set[12];
  int n = 0;
  for (; n < 6 && c->set[n]; n++) set[n] = c->set[n];
  if (extra) set[n++] = extra;
  set[n++] = overlaps ? "parallel.overlap=always" : "parallel.overlap=never";
  set[n++] = overlaps ? "parallel.chunks=3" : "parallel.chunks=1";
  set[n++] = "parallel.bucket=0.002";
  set[n] = NULL;
  test_session_open(job, c->config, set, root, &out->test);
  train_session *session = out->test.session;
  for (int step = 0; step < STEPS; step++) {
    data_batch *batch = NULL;
    test_device_must(data_stream_get(out->test.stream, &batch));
    test_device_must(train_stepper_run(&session->stepper, batch, &out->report[step]));
    data_stream_put(out->test.stream, batch);
    session->env.step++;
  }
  count_parts(out);
  test_device_must(train_optimizer_gather(session->model));
  const train_parameters *p = &session->model->parameters;
  const core_device *device = session->env.ops->device;
  out->gradient = test_fetch(device, core_tensor_1(p->gradient, CORE_REAL_DTYPE, p->gradient_total));
  out->value = test_fetch(device, core_tensor_1(p->value, CORE_REAL_DTYPE, p->total));
}

static void release(outcome *out) {
  test_session_close(&out->test);
  free(out->gradient);
  free(out->value);
}

/* ---- comparing ---- */

static void expect(bool held, const char *what, const char *where) {
  if (held) return;
  failures++;
  printf("FAILED on rank %d: %s: %s\n", comm_rank(comm_world_group(job)), where, what);
}

static void compare(const overlap_case *c, const outcome *early, const outcome *late) {
  const train_parameters *p = &early->test.session->model->parameters;
  for (int step = 0; step < STEPS; step++) {
    expect(early->report[step].loss == late->report[step].loss, "the loss differs", c->name);
    expect(early->report[step].norm == late->report[step].norm, "the norm differs", c->name);
  }
  for (int32_t i = 0; i < p->count; i++) {
    const train_parameter *one = &p->list[i];
    char where[256];
    size_t bytes = (size_t)one->count * sizeof(core_real);
    snprintf(where, sizeof where, "%s: %s", c->name, one->name);
    expect(memcmp(early->value + one->first, late->value + one->first, bytes) == 0, "the values differ",
           where);
    if (one->active)
      expect(memcmp(early->gradient + one->gradient_first, late->gradient + one->gradient_first, bytes) == 0,
             "the gradients differ", where);
  }
}

static void run_case(const char *root, const overlap_case *c) {
  outcome early, late;
  run(root, c, true, &early);
  run(root, c, false, &late);
  compare(c, &early, &late);
  const train_session *a = early.test.session, *b = late.test.session;
  expect(a->stepper.reduction.ahead == early.within, "not all that was final within the pass went off early",
         c->name);
  expect((early.within > 2) == (c->config != connector), "another number of early buckets", c->name);
  expect(b->stepper.reduction.ahead == 0, "a bucket went off early", c->name);
  bool nccl = strcmp(comm_device_transport_name(comm_world_group(job)), "nccl") == 0;
  if (nccl) expect(early.buckets == late.buckets, "NCCL adds up other ranges", c->name);
  int64_t chunks = a->env.layout.expert_ranks == 1 ? 1 : a->env.settings->model.moe.experts > 4 ? 3 : 2;
  if (a->model->moe_layers > 0 && !a->env.settings->model.moe.layer_experts_count)
    expect(early.chunks == chunks, "another number of chunks", c->name);
  expect(late.chunks == 1, "rows that ought to travel at once went in chunks", c->name);
  expect(!strstr(c->name, "rounds") || early.rounds > 1, "one round where several were meant", c->name);
  if (comm_rank(comm_world_group(job)) == 0)
    printf("%s: %d buckets, %d of them early, %lld chunks in %lld rounds\n", c->name, early.buckets,
           early.within, (long long)early.chunks, (long long)early.rounds);
  release(&early);
  release(&late);
}

/* With an expert on each rank and a capacity that both fill, rows travel in equal pieces; the same experts,
 * all on each rank, say where they ought to have gone. Without a capacity, ranks with more tokens send more.
 */
static void check_equal_pieces(const char *root) {
#define FILLED "model.moe.experts=2", "model.moe.dispatch=capacity", "model.moe.capacity=0.5"
  static const overlap_case sides[3] = {
      {"equal pieces", tower, 2, {"parallel.experts=2", FILLED}},
      {"nothing travels", tower, 2, {"parallel.experts=1", FILLED}},
      {"unequal pieces",
       tower,
       2,
       {"parallel.experts=2", "model.moe.experts=2", "parallel.placement=partitioned"}}};
#undef FILLED
  outcome out[3];
  for (int i = 0; i < 3; i++) {
    run(root, &sides[i], true, &out[i]);
    const train_model *model = out[i].test.session->model;
    for (int64_t l = 0; l < model->L; l++)
      if (model->block[l].has_moe)
        expect(train_dispatch_equal(model, &model->block[l].moe) == (i == 0), "another way of travelling",
               sides[i].name);
  }
  for (int step = 0; step < STEPS; step++) {
    const train_report *a = &out[0].report[step], *b = &out[1].report[step];
    expect(fabs(a->loss - b->loss) < 1e-5 * fabs(b->loss), "the loss is another", "equal pieces");
    expect(fabs(a->norm - b->norm) < 1e-4 * b->norm, "the norm is another", "equal pieces");
  }
  for (int i = 0; i < 3; i++) release(&out[i]);
}

static int64_t rows_of(int64_t sample, int32_t m) {
  return 2 + (sample + m) % 3;
}

/* test_overlap [key=value] */
int main(int argc, char **argv) {
  char root[256] = "/tmp/antiphon-overlap-XXXXXX";
  comm_options options = {.deadline = 60};
  test_device_must(comm_start(&options, &job));
  extra = argc > 1 ? argv[1] : NULL;
  int missing = test_device_missing(extra, comm_local_rank(job));
  if (missing) return missing;
  bool first = comm_rank(comm_world_group(job)) == 0;
  test_set_options o = {.modalities = 3,
                        .width = {9, 7, 11},
                        .samples = 40,
                        .shards = 1,
                        .vocabulary = 30,
                        .first_id = 1,
                        .rows = rows_of};
  test_device_must(test_set_share(job, &o, root, sizeof root));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    if (comm_size(comm_world_group(job)) >= cases[i].ranks) run_case(root, &cases[i]);
  if (comm_size(comm_world_group(job)) > 1) check_equal_pieces(root);
  test_device_must(comm_barrier(comm_world_group(job)));
  if (first) test_remove_tree(root);
  comm_finish(job);
  return failures > 0;
}
