/* antiphon bench step: the time of a whole training step against the time of its own matrix products alone.
 * The products of one step are recorded (forms and sizes), then repeated on buffers of their own, each by the
 * fastest library at hand: oneDNN, and OpenBLAS where it is installed. */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"
#include "launcher/bench.h"
#include "trainer/session.h"

enum { STEPS = 9, WARM_UP = 2, REPEATS = 3, SAMPLES = 512 };

static const char configuration[] =
    "run: {directory: unused, device: cpu}\n"
    "data:\n"
    "  path: unused\n"
    "  modalities:\n"
    "    - {name: image, length: 8}\n"
    "    - {name: text, length: 12}\n"
    "model: {width: 256, layers: 4, heads: 4, moe: {layers: every 2, experts: 8, noise: 1}}\n"
    "optimizer: {batch: 128}\n";

/* ---- made-up latents ---- */

static core_status write_modality(const char *directory, const char *name, int64_t width, int64_t tokens) {
  data_writer *writer = NULL;
  data_writer_options options = {
      .directory = directory, .modality = name, .encoder = "random", .dtype = CORE_FLOAT32, .width = width};
  float *latent = malloc((size_t)(width * tokens) * sizeof *latent);
  CHECK(latent, CORE_ERR_MEMORY, "no memory for latents");
  core_status status = data_writer_open(&options, &writer);
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, core_hash_text(name), 0);
  for (int64_t s = 0; s < SAMPLES && status == CORE_OK; s++) {
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

static core_status write_set(const char *root, int64_t width) {
  char split[1100];
  snprintf(split, sizeof split, "%s/train", root);
  TRY(write_modality(split, "image", width, 8));
  TRY(write_modality(split, "text", width, 12));
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

/* ---- the record of a step's products ---- */

typedef struct product {
  kern_form form;
  int64_t m, n, k, groups; /* of one group on average when grouped */
  int64_t row[CORE_MAX_EXPERTS + 1];
} product;

/* The table's functions carry no context of ours, so the record is a file-level variable; one thread runs a
 * bench. */
static struct {
  const kern_ops *ops;
  product *list;
  int32_t count, capacity;
} record;

static void note(kern_form form, core_tensor a, core_tensor c, int64_t groups, const int64_t *row) {
  if (record.count == record.capacity) return;
  product *p = &record.list[record.count++];
  int32_t last = c.rank - 1;
  *p = (product){.form = form, .m = c.shape[last - 1], .n = c.shape[last], .groups = groups};
  p->k = form == KERN_TN ? a.shape[0] : a.shape[1];
  for (int64_t g = 0; g <= groups && groups > 0; g++) p->row[g] = row[g];
}

static core_status recorded_gemm(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                                 kern_write write, core_tensor c) {
  note(form, a, c, 0, NULL);
  return record.ops->gemm(context, form, a, b, write, c);
}

static core_status recorded_grouped(kern_context *context, kern_form form, const int64_t *row, core_tensor a,
                                    core_tensor b, kern_write write, core_tensor c) {
  note(form, a, c, form == KERN_TN ? c.shape[0] : b.shape[0], row);
  return record.ops->gemm_grouped(context, form, row, a, b, write, c);
}

/* ---- repeating it ---- */

typedef void (*blas_gemm)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                          int lda, const float *b, int ldb, float beta, float *c, int ldc);

typedef struct replay {
  train_env *env;
  blas_gemm blas; /* NULL: not there */
  core_real *a, *b, *c;
} replay;

static core_status by_table(const replay *r, const product *p, int64_t m, int64_t k) {
  core_tensor a = p->form == KERN_TN ? core_tensor_2(r->a, CORE_REAL_DTYPE, k, m)
                                     : core_tensor_2(r->a, CORE_REAL_DTYPE, m, k);
  core_tensor b = p->form == KERN_NT ? core_tensor_2(r->b, CORE_REAL_DTYPE, p->n, k)
                                     : core_tensor_2(r->b, CORE_REAL_DTYPE, k, p->n);
  kern_write write = p->form == KERN_TN ? KERN_ADD : KERN_SET;
  KERN(r->env, gemm, p->form, a, b, write, core_tensor_2(r->c, CORE_REAL_DTYPE, m, p->n));
  return CORE_OK;
}

static core_status by_blas(const replay *r, const product *p, int64_t m, int64_t k) {
  enum { ROW_MAJOR = 101, NO = 111, YES = 112 };
  bool ta = p->form == KERN_TN, tb = p->form == KERN_NT;
#ifndef ANTIPHON_DOUBLE
  if (m > 0 && k > 0)
    r->blas(ROW_MAJOR, ta ? YES : NO, tb ? YES : NO, (int)m, (int)p->n, (int)k, 1, r->a, (int)(ta ? m : k),
            r->b, (int)(tb ? k : p->n), ta ? 1 : 0, r->c, (int)p->n);
#else
  (void)ta, (void)tb, (void)r, (void)p, (void)m, (void)k;
#endif
  return CORE_OK;
}

typedef core_status (*multiply)(const replay *, const product *, int64_t, int64_t);

/* Shortest of a few times of one recorded product, all its groups. */
static core_status time_product(const replay *r, const product *p, multiply with, double *best) {
  *best = INFINITY;
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    double start = core_clock_now();
    if (p->groups == 0) TRY(with(r, p, p->m, p->k));
    for (int64_t g = 0; g < p->groups; g++) {
      int64_t rows = p->row[g + 1] - p->row[g];
      TRY(p->form == KERN_TN ? with(r, p, p->m, rows) : with(r, p, rows, p->k));
    }
    double seconds = core_clock_now() - start;
    if (seconds < *best) *best = seconds;
  }
  return CORE_OK;
}

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

static core_status time_products(replay *r, double *seconds, double *flops) {
  int64_t size[3] = {1, 1, 1};
  *seconds = *flops = 0;
  for (int32_t i = 0; i < record.count; i++) {
    const product *p = &record.list[i];
    size[0] = most(size[0], p->m * p->k);
    size[1] = most(size[1], p->n * p->k);
    size[2] = most(size[2], p->m * p->n);
  }
  core_real **buffers[3] = {&r->a, &r->b, &r->c};
  for (int i = 0; i < 3; i++) {
    *buffers[i] = calloc((size_t)size[i], sizeof(core_real));
    CHECK(*buffers[i], CORE_ERR_MEMORY, "no memory for the matrices");
    for (int64_t j = 0; j < size[i]; j++) (*buffers[i])[j] = (core_real)(1e-3 * (double)(j % 97));
  }
  for (int32_t i = 0; i < record.count; i++) {
    double best, other = INFINITY;
    TRY(time_product(r, &record.list[i], by_table, &best));
    if (r->blas) TRY(time_product(r, &record.list[i], by_blas, &other));
    *seconds += fmin(best, other);
    *flops += 2.0 * (double)record.list[i].m * (double)record.list[i].n * (double)record.list[i].k;
  }
  return CORE_OK;
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

static core_status record_step(train_session *session, const data_batch *batch) {
  kern_ops recording = *session->env.ops;
  train_report report = {0};
  record.ops = session->env.ops;
  record.count = 0;
  record.capacity = 65536;
  record.list = calloc((size_t)record.capacity, sizeof *record.list);
  CHECK(record.list, CORE_ERR_MEMORY, "no memory for the record");
  recording.gemm = recorded_gemm;
  recording.gemm_grouped = recorded_grouped;
  session->env.ops = &recording;
  core_status status = train_stepper_run(&session->stepper, batch, &report);
  session->env.ops = record.ops;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static void print_result(const train_session *session, const train_report *report, const double step[2],
                         double gemm, double flops, const char *library) {
  int64_t tokens = 0;
  for (int32_t m = 0; m < session->env.layout.modalities; m++) tokens += report->tokens[m];
  printf("width %lld, %lld layers, %lld experts, top %lld, %s; %lld tokens a step; %d ranks of %d threads\n",
         (long long)session->model->C, (long long)session->model->L,
         (long long)session->env.settings->model.moe.experts,
         (long long)session->env.settings->model.moe.choose,
         session->env.settings->model.moe.dispatch == TRAIN_CAPACITY ? "capacity" : "dropless",
         (long long)tokens, session->env.layout.ranks, session->env.ops->context_threads(session->env.kern));
  printf("step %.2f ms (shortest of %d; median %.2f), %.1f k tokens/s\n", 1e3 * step[0], STEPS, 1e3 * step[1],
         (double)tokens / step[0] / 1e3);
  printf("its matrix products alone %.2f ms, %.1f GFLOP/s a rank (%s)\n", 1e3 * gemm, flops / gemm / 1e9,
         library);
  printf("step / products = %.3f\n", step[0] / gemm);
  printf("last step, rank 0:");
  for (int i = 0; i < TRAIN_PHASE_COUNT; i++)
    if (report->seconds[i] > 0)
      printf(" %s %.2f ms", train_phase_name((train_phase)i), 1e3 * report->seconds[i]);
  printf("\n");
}

static core_status measure(train_session *session, data_stream *stream) {
  data_batch *batch = NULL;
  train_report report = {0};
  double step = 0, median = 0, gemm = 0, flops = 0;
  TRY(comm_agree(session->env.control, data_stream_get(stream, &batch)));
  void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
  replay r = {.env = &session->env,
              .blas = library ? (blas_gemm)(uintptr_t)dlsym(library, "cblas_sgemm") : NULL};
  core_status status = time_steps(session, batch, &step, &median, &report);
  if (status == CORE_OK) status = record_step(session, batch);
  if (status == CORE_OK) status = time_products(&r, &gemm, &flops);
  if (status == CORE_OK) status = comm_all_reduce(session->env.world, COMM_MAX, CORE_FLOAT64, &gemm, 1);
  if (status == CORE_OK && comm_rank(session->env.world) == 0)
    print_result(session, &report, (double[2]){step, median}, gemm, flops,
                 r.blas ? "the faster of oneDNN and OpenBLAS for each" : "oneDNN");
  free(r.a);
  free(r.b);
  free(r.c);
  free(record.list);
  record.list = NULL;
  if (library) dlclose(library);
  data_stream_put(stream, batch);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status with_session(comm_world *world, const core_config *config, const char *root) {
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
  if (status == CORE_OK) status = measure(session, stream);
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
    if (status == CORE_OK) status = write_set(root, settings->model.width);
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
  if (status == CORE_OK) status = with_session(world, config, root);
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
