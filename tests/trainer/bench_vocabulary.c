/* A decoder's head and loss against the products that no implementation can do without: logits, the gradient
 * of the rows, the gradient of the table. Memory of the logits beside what whole rows would take.
 *
 *   bench_vocabulary [vocabulary [width [samples]]]
 *
 * Prints one line of JSON; times are the shortest of several rounds, run one after the other. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/clock.h"
#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"

enum { ROUNDS = 5 };

static comm_world *world;

static int64_t one_row(int64_t s, int32_t m) {
  (void)s, (void)m;
  return 1;
}

static const char config[] =
    "run: {directory: unused, deadline: 60}\n"
    "data: {path: unused, shuffle: 0, modalities: [{name: image, positions: none}]}\n"
    "model: {kind: decoder, layers: 1, heads: 4, moe: {layers: none}}\n"
    "objective: {importance: 0, load: 0, z: 0}\n";

/* Forward and backward of the head. */
static double run_head(train_model *model) {
  double begin = core_clock_now();
  core_tensor rows = train_rows(model->final_norm[0].out, model->items.tokens);
  test_device_must(train_decoder_predict(model, rows, TRAIN_MODE_TRAIN));
  test_device_must(train_decoder_predict_backward(model, train_rows(model->d_norm, model->items.tokens)));
  test_device_must(model->env->ops->device->stream_wait(NULL));
  return core_clock_now() - begin;
}

/* The three products, of the same blocks of rows. */
static double run_products(train_model *model) {
  const train_env *env = model->env;
  train_decoder *d = &model->decoder;
  double begin = core_clock_now();
  core_tensor table = train_parameter_matrix(&model->parameters, d->output);
  core_tensor gradient = train_parameter_gradient(&model->parameters, d->output);
  for (int64_t first = 0, n; first < d->predicted; first += n) {
    n = d->predicted - first < d->logits.shape[0] ? d->predicted - first : d->logits.shape[0];
    core_tensor hidden = train_slice(d->hidden, first, n), logits = train_rows(d->logits, n);
    test_device_must(env->ops->gemm(env->kern, KERN_NT, hidden, table, KERN_SET, logits));
    test_device_must(env->ops->gemm(env->kern, KERN_TN, logits, hidden, KERN_ADD, gradient));
    test_device_must(
        env->ops->gemm(env->kern, KERN_NN, logits, table, KERN_SET, train_slice(d->d_hidden, first, n)));
  }
  test_device_must(env->ops->device->stream_wait(NULL));
  return core_clock_now() - begin;
}

static void measure(train_model *model) {
  train_decoder *d = &model->decoder;
  double head = 1e30, products = 1e30;
  for (int i = 0; i < ROUNDS; i++) {
    double a = run_head(model), b = run_products(model);
    head = a < head ? a : head;
    products = b < products ? b : products;
  }
  printf(
      "{\"vocabulary\": %lld, \"width\": %lld, \"predictions\": %lld, \"head_ms\": %.1f, \"products_ms\": "
      "%.1f, "
      "\"ratio\": %.3f, \"logits_MiB\": %.1f, \"whole_MiB\": %.1f}\n",
      (long long)d->V, (long long)model->C, (long long)d->predicted, 1e3 * head, 1e3 * products,
      head / products, (double)core_tensor_bytes(&d->logits) / 1048576,
      (double)(d->predicted * d->V * 4) / 1048576);
}

int main(int argc, char **argv) {
  char root[] = "/tmp/antiphon-vocabulary-XXXXXX", directory[64], set[3][64];
  int64_t V = argc > 1 ? atoll(argv[1]) : 32000, C = argc > 2 ? atoll(argv[2]) : 512;
  int64_t samples = argc > 3 ? atoll(argv[3]) : 512;
  comm_options options = {.deadline = 60};
  test_device_must(comm_start(&options, &world));
  if (!mkdtemp(root)) return 1;
  snprintf(directory, sizeof directory, "%s/train", root);
  test_set_options o = {.directory = directory,
                        .modalities = 1,
                        .width = {4},
                        .samples = samples,
                        .shards = 1,
                        .first_id = 1,
                        .rows = one_row,
                        .vocabulary = (int32_t)V};
  test_device_must(test_set_write(&o));
  snprintf(set[0], sizeof set[0], "model.vocabulary=%lld", (long long)V);
  snprintf(set[1], sizeof set[1], "model.width=%lld", (long long)C);
  snprintf(set[2], sizeof set[2], "optimizer.batch=%lld", (long long)samples);
  const char *const overrides[] = {set[0], set[1], set[2], NULL};
  test_session t;
  data_batch *batch = NULL;
  test_session_open(world, config, overrides, root, &t);
  test_device_must(data_stream_get(t.stream, &batch));
  test_device_must(train_model_take(t.session->model, batch, 0, -1));
  test_device_must(train_model_forward(t.session->model, TRAIN_MODE_TRAIN));
  measure(t.session->model);
  data_stream_put(t.stream, batch);
  test_session_close(&t);
  test_remove_tree(root);
  comm_finish(world);
  return 0;
}
