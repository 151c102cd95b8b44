/* The active set of an alternating connector is exact: after a step of direction a -> b, every parameter,
 * gradient, moment and step count outside {experts, gate, norms, view embeddings, W_a, c_a, u_ab, V_b, C_ab,
 * K_b} has its old bits, and everything inside has been updated. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"

enum { STEPS = 7 };

static comm_world *job;
static int failures;

static const char config_text[] =
    "run: {directory: unused, seed: 3, steps: 20, threads: 1, deadline: 60}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, positions: none}\n"
    "    - {name: text, positions: none}\n"
    "    - {name: speech, positions: none}\n"
    "model: {kind: connector, width: 12, hidden: 10, embedding: 8, activation: gelu,\n"
    "        moe: {experts: 4, choose: 2, bias: true}}\n"
    "objective: {directions: ['image:text', 'speech:image'], importance: 0, load: 0, z: 0}\n"
    "schedule: {alternate: block, steps: [1, 2]}\n"
    "optimizer: {batch: 8, warmup: 0, weight_decay: 0.1}\n";

/* What a step of each direction changes, by the beginnings of names. */
static const char *const active_names[2][8] = {{"blocks.", "adapter.image.", "direction.image-text",
                                                "prediction.text.", "query.image-text.", "key.text."},
                                               {"blocks.", "adapter.speech.", "direction.speech-image",
                                                "prediction.image.", "query.speech-image.", "key.image."}};

static bool is_active(const char *name, int direction) {
  for (int i = 0; i < 6; i++)
    if (strncmp(name, active_names[direction][i], strlen(active_names[direction][i])) == 0) return true;
  return false;
}

typedef struct copy {
  core_real *value, *gradient, *m, *v;
  int64_t *steps;
} copy;

static copy take(const train_session *session) {
  const train_parameters *set = &session->model->parameters;
  const core_device *device = session->env.ops->device;
  int64_t state = set->state_first[TRAIN_SCOPES];
  copy c = {test_fetch(device, core_tensor_1(set->value, CORE_REAL_DTYPE, set->total)),
            test_fetch(device, core_tensor_1(set->gradient, CORE_REAL_DTYPE, set->gradient_total)),
            test_fetch(device, core_tensor_1(set->m, CORE_REAL_DTYPE, state)),
            test_fetch(device, core_tensor_1(set->v, CORE_REAL_DTYPE, state)),
            calloc((size_t)set->count, sizeof(int64_t))};
  for (int32_t i = 0; i < set->count; i++) c.steps[i] = set->list[i].steps;
  return c;
}

static void give(copy *c) {
  free(c->value);
  free(c->gradient);
  free(c->m);
  free(c->v);
  free(c->steps);
}

static void expect(bool held, const char *what, const char *name, int step) {
  if (held) return;
  failures++;
  printf("FAILED on rank %d: step %d: %s: %s\n", comm_rank(comm_world_group(job)), step, name, what);
}

static bool same(const core_real *a, const core_real *b, int64_t first, int64_t count) {
  return memcmp(a + first, b + first, (size_t)count * sizeof *a) == 0;
}

static void compare(const train_session *session, const copy *old, const copy *now, int direction, int step) {
  const train_parameters *set = &session->model->parameters;
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    int32_t scope = train_scope_number(p);
    train_span own = train_gradient_within(p, set->update[scope]);
    int64_t state = set->state_first[scope] + own.first - set->update[scope].first;
    bool active = is_active(p->name, direction);
    bool values = same(old->value, now->value, p->first, p->count);
    bool moments =
        own.count == 0 || (same(old->m, now->m, state, own.count) && same(old->v, now->v, state, own.count));
    expect(now->steps[i] == old->steps[i] + active, "its count of steps is wrong", p->name, step);
    if (!active) {
      expect(values, "its values changed", p->name, step);
      expect(moments, "its moments changed", p->name, step);
      expect(same(old->gradient, now->gradient, p->gradient_first, p->count), "its gradient was touched",
             p->name, step);
    } else if (p->decay) { /* at least decay moves it, also an expert that got no token */
      expect(!values, "its values did not change", p->name, step);
    }
  }
}

static int64_t rows_of(int64_t sample, int32_t m) {
  return 2 + (sample + m) % 3;
}

static void run(const char *root, const char *layout) {
  static const int expected[STEPS] = {0, 1, 1, 0, 1, 1, 0};
  const char *set[] = {layout, NULL};
  test_session t;
  test_session_open(job, config_text, set, root, &t);
  for (int step = 0; step < STEPS; step++) {
    data_batch *batch = NULL;
    train_report report = {0};
    copy old = take(t.session);
    test_device_must(data_stream_get(t.stream, &batch));
    test_device_must(train_stepper_run(&t.session->stepper, batch, &report));
    data_stream_put(t.stream, batch);
    t.session->env.step++;
    copy now = take(t.session);
    expect(report.direction == expected[step], "another direction was trained", "schedule", step);
    compare(t.session, &old, &now, expected[step], step);
    give(&old);
    give(&now);
  }
  test_session_close(&t);
}

int main(void) {
  char root[256] = "/tmp/antiphon-active-XXXXXX";
  comm_options options = {.deadline = 60};
  test_device_must(comm_start(&options, &job));
  bool first = comm_rank(comm_world_group(job)) == 0;
  test_set_options o = {
      .modalities = 3, .width = {9, 7, 11}, .samples = 40, .shards = 1, .first_id = 1, .rows = rows_of};
  test_device_must(test_set_share(job, &o, root, sizeof root));
  run(root, NULL);
  run(root, "parallel.shard_optimizer=false");
  if (comm_size(comm_world_group(job)) > 1) run(root, "parallel.experts=2");
  if (comm_size(comm_world_group(job)) > 1) run(root, "parallel.placement=partitioned");
  test_device_must(comm_barrier(comm_world_group(job)));
  if (first) test_remove_tree(root);
  comm_finish(job);
  return failures > 0;
}
