/* Once a run is going, a step allocates nothing: everything was planned when the session was opened. The
 * linker sends every call of our objects, on every thread, through the wrappers below. Steps 3 to 6 are
 * watched. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/test_set.h"
#include "trainer/metrics.h"
#include "trainer/session.h"

enum { FIRST_WATCHED = 3, STEPS = 6 };

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_posix_memalign(void **out, size_t alignment, size_t bytes);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes);
char *__wrap_strdup(const char *text);

static atomic_long calls;
static _Atomic(void *) last_caller; /* for the message: addr2line tells where */

#define COUNT()                                              \
  do {                                                       \
    atomic_fetch_add(&calls, 1);                             \
    atomic_store(&last_caller, __builtin_return_address(0)); \
  } while (0)

void *__wrap_malloc(size_t bytes) {
  COUNT();
  return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  COUNT();
  return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
  COUNT();
  return __real_realloc(old, bytes);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
  COUNT();
  return __real_aligned_alloc(alignment, bytes);
}

int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes) {
  COUNT();
  return __real_posix_memalign(out, alignment, bytes);
}

char *__wrap_strdup(const char *text) {
  COUNT();
  return __real_strdup(text);
}

static const char base[] =
    "run: {directory: unused, seed: 7, steps: 20, threads: 2, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  shuffle: 40\n"
    "  modalities:\n"
    "    - {name: image, length: 8, local: 0.05, global: 0.1, experts: 3}\n"
    "    - {name: text, length: 12, connector: mlp, hidden: 24, global: 0.05, experts: 4}\n"
    "    - {name: speech, positions: rope, length: 12, normalize: rms, local: 0.02}\n"
    "model: {width: 32, layers: 3, heads: 4, kv_heads: 2, hidden: 48, embedding: 16,\n"
    "        moe: {layers: every 2, experts: 4, choose: 2, group_samples: 2, buffer: 0.4}}\n"
    "optimizer: {batch: 16, rate: 0.01, warmup: 2, clip: 0.5}\n";

typedef struct step_case {
  const char *set[5];
  int32_t experts; /* expert-parallel size; cases that the ranks do not allow are left out */
} step_case;

static const step_case cases[] = {
    {{NULL}, 1},
    {{"model.moe.dispatch=capacity", NULL}, 1},
    {{"optimizer.accumulate=2", NULL}, 1},
    {{"model.dense=true", NULL}, 1},
    {{NULL}, 2},
    {{"model.moe.dispatch=capacity", NULL}, 2},
    {{"parallel.placement=partitioned", "optimizer.accumulate=2", NULL}, 2},
    {{"parallel.placement=partitioned", "model.moe.dispatch=capacity", NULL}, 2},
    {{"model.moe.buffer=0.05", NULL}, 2}, /* many rounds */
    {{"model.moe.added=[1, 2]", "model.moe.calibration=add", "objective.balance=0.1",
      "objective.balance_scope=local", NULL},
     2},
};

static comm_world *job;
static int failures;

static int64_t rows(int64_t sample, int32_t m) {
  static const int64_t base_rows[3] = {4, 7, 9};
  return sample % 11 == (int64_t)m + 3 ? 0 : base_rows[m] - sample % 4;
}

/* Calls before the watched steps, and in each of them. */
typedef struct watch {
  long before, in_step[STEPS];
} watch;

static core_status run_steps(train_session *session, data_stream *stream, train_metrics *metrics,
                             watch *seen) {
  seen->before = atomic_load(&calls);
  for (int step = 0; step < STEPS; step++) {
    long start = atomic_load(&calls);
    data_batch *batch = NULL;
    train_report report;
    TRY(data_stream_get(stream, &batch));
    TRY(train_stepper_run(&session->stepper, batch, &report));
    data_position position = batch->after;
    data_stream_put(stream, batch);
    session->env.step++;
    if (metrics) TRY(train_metrics_step(metrics, &report, &session->stepper.contrastive, &position));
    seen->in_step[step] = atomic_load(&calls) - start;
  }
  return CORE_OK;
}

static core_status run_session(const char *root, train_session *session, watch *seen) {
  data_stream *stream = NULL;
  train_metrics *metrics = NULL;
  data_position start = {0, 0, 0};
  TRY(train_session_standardise(session));
  if (comm_rank(comm_world_group(job)) == 0) TRY(train_metrics_open(root, 0, session->model, &metrics));
  TRY(train_session_stream(session, session->training, &session->env.layout, &start, true, &stream));
  core_status status = run_steps(session, stream, metrics, seen);
  data_stream_close(stream);
  train_metrics_close(metrics);
  return status;
}

static core_status run_case(const char *root, const step_case *c) {
  const char *set[8];
  char experts[40];
  int32_t count = 0;
  core_config *config = NULL;
  train_session *session = NULL;
  watch seen = {0};
  snprintf(experts, sizeof experts, "parallel.experts=%d", c->experts);
  for (int i = 0; c->set[i]; i++) set[count++] = c->set[i];
  set[count++] = experts;
  TRY(core_config_load(train_settings_spec(), "the test", base, set, count, &config));
  train_session_options options = {.config = config,
                                   .comm = job,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train"};
  TRY(train_session_open(&options, &session));
  TRY(run_session(root, session, &seen));
  train_session_close(session);
  core_config_destroy(config);
  printf("rank %d, experts over %d, %s %s: calls per step", comm_rank(comm_world_group(job)), c->experts,
         c->set[0] ? c->set[0] : "dropless", c->set[0] && c->set[1] ? c->set[1] : "");
  for (int step = 0; step < STEPS; step++) {
    printf(" %ld", seen.in_step[step]);
    failures += step + 1 >= FIRST_WATCHED && seen.in_step[step] != 0;
  }
  printf("%s\n", failures ? "  FAILED" : "");
  if (failures) printf("the last caller is at %p\n", atomic_load(&last_caller));
  failures += seen.before == 0; /* the wrappers are in use */
  return CORE_OK;
}

static core_status run_all(char *root, size_t capacity) {
  comm_options options = {.deadline = 60};
  TRY(comm_start(&options, &job));
  test_set_options o = {.modalities = 3,
                        .width = {20, 12, 28},
                        .samples = 64,
                        .shards = 3,
                        .first_id = 1000,
                        .labels = true,
                        .rows = rows};
  TRY(test_set_share(job, &o, root, capacity));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    if (comm_size(comm_world_group(job)) % cases[i].experts == 0) TRY(run_case(root, &cases[i]));
  TRY(comm_barrier(comm_control_group(job)));
  return CORE_OK;
}

int main(void) {
  char root[64] = "/tmp/antiphon-allocations-XXXXXX", text[4096];
  core_status status = run_all(root, sizeof root);
  if (status != CORE_OK) {
    core_error_format(core_error_get(), true, text, sizeof text);
    printf("%s\n", text);
    if (job) comm_fail_stop(job, status);
    return 1;
  }
  if (comm_rank(comm_world_group(job)) == 0) test_remove_tree(root);
  comm_finish(job);
  return failures > 0;
}
