/* antiphon bench step: the time of a whole training step against the time of its own matrix products alone.
 * The products of one step are recorded (forms and sizes), then repeated on buffers of their own, each by the
 * fastest library at hand: oneDNN, and OpenBLAS where it is installed; on a GPU its own. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"
#include "launcher/bench.h"
#include "launcher/bench_products.h"
#include "trainer/session.h"

enum { STEPS = 9, WARM_UP = 2, SAMPLES = 512 };

static const char configuration[] =
    "run: {directory: unused}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, length: 8}\n"
    "    - {name: text, length: 12}\n"
    "model: {width: 256, layers: 4, heads: 4, moe: {layers: every 2, experts: 8, noise: 1}}\n"
    "optimizer: {batch: 128}\n";

/* ---- made-up latents ---- */

static core_status write_modality(const char *directory, const char *name, int64_t width, int64_t tokens,
                                  int64_t samples) {
  data_writer *writer = NULL;
  data_writer_options options = {
      .directory = directory, .modality = name, .encoder = "random", .dtype = CORE_FLOAT16, .width = width};
  float *latent = malloc((size_t)(width * tokens) * sizeof *latent);
  CHECK(latent, CORE_ERR_MEMORY, "no memory for latents");
  core_status status = data_writer_open(&options, &writer);
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, core_hash_text(name), 0);
  for (int64_t s = 0; s < samples && status == CORE_OK; s++) {
    for (int64_t i = 0; i < width * tokens; i++)
      latent[i] = (float)core_random_normal(1, stream, (uint64_t)(s * width * tokens + i));
    data_sample sample = {.id = (uint64_t)s, .latent = latent, .rows = tokens, .label = -1};
    status = data_writer_add(writer, &sample);
  }
  free(latent);
  if (status != CORE_OK) {
    data_writer_abandon(writer);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  TRY(data_writer_close(writer));
  return CORE_OK;
}

/* Enough samples that a batch holds none twice. */
static core_status write_set(const char *root, int64_t width, int64_t batch) {
  int64_t samples = batch > SAMPLES ? batch : SAMPLES;
  char split[1100];
  snprintf(split, sizeof split, "%s/train", root);
  TRY(write_modality(split, "image", width, 8, samples));
  TRY(write_modality(split, "text", width, 12, samples));
  return CORE_OK;
}

static void remove_set(const char *root) {
  static const char *const names[] = {"train/image-00000.h5", "train/text-00000.h5"};
  char path[1100];
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "%s/%s", root, names[i]);
    (void)unlink(path);
  }
  snprintf(path, sizeof path, "%s/train", root);
  (void)rmdir(path);
  (void)rmdir(root);
}

/* ---- measuring ---- */

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Times of a step, each on the slowest rank: the shortest and the median. */
static core_status time_steps(train_session *session, const data_batch *batch, double *shortest,
                              double *median, train_report *report) {
  double seconds[STEPS];
  for (int i = 0; i < WARM_UP + STEPS; i++) {
    memset(session->env.seconds, 0, sizeof session->env.seconds);
    TRY(comm_barrier(session->env.world));
    double start = core_clock_now();
    TRY(train_stepper_run(&session->stepper, batch, report));
    TRY(session->env.ops->device->stream_wait(NULL));
    if (i >= WARM_UP) seconds[i - WARM_UP] = core_clock_now() - start;
    session->env.step++;
  }
  memcpy(report->seconds, session->env.seconds, sizeof report->seconds);
  TRY(comm_all_reduce(session->env.world, COMM_MAX, CORE_FLOAT64, seconds, STEPS));
  qsort(seconds, STEPS, sizeof *seconds, by_value);
  *shortest = seconds[0];
  *median = seconds[STEPS / 2];
  return CORE_OK;
}

/* What is printed, and what goes into the JSON line. */
typedef struct figures {
  double shortest, median;  /* seconds of a step on the slowest rank */
  launch_products products; /* of the slowest rank; flops of all */
  double ceiling;           /* FLOP/s of one rank in a large product */
  int64_t tokens, active;   /* of a step; parameters that a token passes */
} figures;

static const char *precision_of(const train_session *session) {
  return core_dtype_text(session->env.active);
}

static void print_result(const train_session *session, const train_report *report, const figures *f) {
  const train_settings *s = session->env.settings;
  double ranks = session->env.layout.ranks, peak = f->ceiling * ranks;
  printf(
      "width %lld, %lld layers, %lld experts, top %lld, %s, %s; %lld tokens a step; %d ranks of %d threads "
      "on "
      "%s\n",
      (long long)session->model->C, (long long)session->model->L, (long long)train_settings_most_experts(s),
      (long long)s->model.moe.choose, s->model.moe.dispatch == TRAIN_CAPACITY ? "capacity" : "dropless",
      precision_of(session), (long long)f->tokens, session->env.layout.ranks,
      session->env.ops->context_threads(session->env.kern), session->env.ops->device->name);
  printf("step %.2f ms (shortest of %d; median %.2f), %.1f k tokens/s\n", 1e3 * f->shortest, STEPS,
         1e3 * f->median, (double)f->tokens / f->shortest / 1e3);
  printf("its matrix products alone %.2f ms, %.1f GFLOP/s a rank (%s); a large product reaches %.1f\n",
         1e3 * f->products.seconds, f->products.flops / ranks / f->products.seconds / 1e9,
         f->products.library, f->ceiling / 1e9);
  printf("of rank 0: %lld forward, %lld gradients by inputs, %lld gradients by weights (grouped ones once)\n",
         (long long)f->products.forward, (long long)f->products.input_gradients,
         (long long)f->products.weight_gradients);
  printf("step / products = %.3f\n", f->shortest / f->products.seconds);
  printf("share of the ceiling: products %.3f, 6 x active parameters x tokens %.3f\n",
         f->products.flops / f->shortest / peak,
         6.0 * (double)f->active * (double)f->tokens / f->shortest / peak);
  printf("last step, rank 0:");
  for (int i = 0; i < TRAIN_PHASE_COUNT; i++)
    if (report->seconds[i] > 0)
      printf(" %s %.2f ms", train_phase_name((train_phase)i), 1e3 * report->seconds[i]);
  printf("\n");
}

/* One line, for files of measurements. */
static void print_json(const train_session *session, const figures *f) {
  const train_settings *s = session->env.settings;
  double ranks = session->env.layout.ranks, peak = f->ceiling * ranks;
  printf(
      "{\"bench\": \"step\", \"device\": \"%s\", \"precision\": \"%s\", \"width\": %lld, \"layers\": %lld, "
      "\"experts\": %lld, \"choose\": %lld, \"tokens\": %lld, \"ranks\": %d, \"threads\": %d, "
      "\"expert_ranks\": %d, \"chunks\": %lld, \"early_reductions\": %d, ",
      session->env.ops->device->name, precision_of(session), (long long)session->model->C,
      (long long)session->model->L, (long long)train_settings_most_experts(s), (long long)s->model.moe.choose,
      (long long)f->tokens, session->env.layout.ranks, session->env.ops->context_threads(session->env.kern),
      session->env.layout.expert_ranks, (long long)s->parallel.chunks, session->stepper.reduction.ahead);
  printf(
      "\"step_seconds\": %.6g, \"median_seconds\": %.6g, \"tokens_per_second\": %.6g, "
      "\"forward_products\": %lld, \"input_gradient_products\": %lld, \"weight_gradient_products\": %lld, "
      "\"products_seconds\": %.6g, \"products_flops\": %.6g, \"ceiling_flops_per_second\": %.6g, "
      "\"active_parameters\": %lld, \"step_over_products\": %.4f, \"products_share\": %.4f, "
      "\"active_share\": %.4f}\n",
      f->shortest, f->median, (double)f->tokens / f->shortest, (long long)f->products.forward,
      (long long)f->products.input_gradients, (long long)f->products.weight_gradients, f->products.seconds,
      f->products.flops, f->ceiling, (long long)f->active, f->shortest / f->products.seconds,
      f->products.flops / f->shortest / peak,
      6.0 * (double)f->active * (double)f->tokens / f->shortest / peak);
}

static core_status measure_batch(train_session *session, const data_batch *batch, train_report *report,
                                 figures *f) {
  comm_group *world = session->env.world;
  train_counts counts;
  TRY(time_steps(session, batch, &f->shortest, &f->median, report));
  TRY(launch_products_record(session, batch));
  TRY(launch_products_time(session, &f->products));
  TRY(launch_products_ceiling(session, &f->ceiling));
  TRY(comm_all_reduce(world, COMM_MAX, CORE_FLOAT64, &f->products.seconds, 1));
  TRY(comm_all_reduce(world, COMM_SUM, CORE_FLOAT64, &f->products.flops, 1));
  TRY(train_session_counts(session, &counts));
  f->active = counts.active;
  for (int32_t m = 0; m < session->env.layout.modalities; m++) f->tokens += report->tokens[m];
  return CORE_OK;
}

static core_status measure(train_session *session, data_stream *stream, bool json) {
  data_batch *batch = NULL;
  train_report report = {0};
  figures f = {0};
  TRY(comm_agree(session->env.control, data_stream_get(stream, &batch)));
  core_status status = measure_batch(session, batch, &report, &f);
  data_stream_put(stream, batch);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  if (comm_rank(session->env.world) != 0) return CORE_OK;
  if (json)
    print_json(session, &f);
  else
    print_result(session, &report, &f);
  return CORE_OK;
}

static core_status with_session(comm_world *world, const core_config *config, const char *root, bool json) {
  train_session *session = NULL;
  data_stream *stream = NULL;
  data_position start = {0, 0, 0};
  train_session_options options = {.config = config,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = root,
                                   .training_split = "train"};
  TRY(train_session_open(&options, &session));
  core_status status = train_session_standardise(session);
  if (status == CORE_OK)
    status = train_session_stream(session, session->training, &session->env.layout, &start, true, &stream);
  if (status == CORE_OK) status = measure(session, stream, json);
  data_stream_close(stream);
  train_session_close(session);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status make_set(comm_world *world, const train_settings *settings, char *root, size_t capacity) {
  const char *base = getenv("TMPDIR");
  core_status status = CORE_OK;
  if (comm_rank(comm_world_group(world)) == 0) {
    snprintf(root, capacity, "%s/antiphon-bench-XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(root))
      status =
          core_error_begin(CORE_ERR_IO, __func__, __FILE__, __LINE__, "cannot make the directory %s", root);
    if (status == CORE_OK) status = write_set(root, settings->model.width, settings->optimizer.batch);
  }
  TRY(comm_agree(comm_control_group(world), status));
  TRY(comm_broadcast(comm_world_group(world), 0, root, capacity));
  return CORE_OK;
}

core_status launch_bench_step(comm_world *world, const launch_arguments *arguments) {
  core_config *config = NULL;
  char root[1024] = "";
  TRY(launch_config(world, "the benchmark", configuration, arguments, &config));
  core_status status = make_set(world, core_config_data(config), root, sizeof root);
  if (status == CORE_OK) status = with_session(world, config, root, arguments->json);
  core_error saved;
  core_error_save(&saved);
  if (comm_rank(comm_world_group(world)) == 0 && root[0]) remove_set(root);
  core_config_destroy(config);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
