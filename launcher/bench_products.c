#include "launcher/bench_products.h"

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

#include "core/clock.h"

enum { CAPACITY = 65536, REPEATS = 3, CEILING_REPEATS = 8 };

typedef struct product {
  kern_form form;
  core_dtype dtype, result; /* of a and b, of c */
  int64_t m, n, k, groups;  /* of one group on average when grouped; 0: not grouped */
  int64_t first;            /* of its row limits in the record */
} product;

static struct {
  const kern_ops *ops;
  product *list;
  int64_t *row; /* [CAPACITY * 8] */
  int64_t count, rows;
} record;

static void note(kern_form form, core_tensor a, core_tensor c, int64_t groups, const int64_t *row) {
  if (record.count == CAPACITY || record.rows + groups + 1 > (int64_t)CAPACITY * 8) return;
  product *p = &record.list[record.count++];
  int32_t last = c.rank - 1;
  *p = (product){.form = form,
                 .dtype = a.dtype,
                 .result = c.dtype,
                 .m = c.shape[last - 1],
                 .n = c.shape[last],
                 .groups = groups,
                 .first = record.rows};
  p->k = form == KERN_TN ? a.shape[0] : a.shape[1];
  for (int64_t g = 0; g <= groups && groups > 0; g++) record.row[record.rows++] = row[g];
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

static void forget(void) {
  free(record.list);
  free(record.row);
  record.list = NULL;
  record.row = NULL;
  record.count = record.rows = 0;
}

core_status launch_products_record(train_session *session, const data_batch *batch) {
  kern_ops recording = *session->env.ops;
  train_report report = {0};
  forget();
  record.ops = session->env.ops;
  record.list = calloc(CAPACITY, sizeof *record.list);
  record.row = calloc((size_t)CAPACITY * 8, sizeof *record.row);
  CHECK(record.list && record.row, CORE_ERR_MEMORY, "no memory for the record");
  recording.gemm = recorded_gemm;
  recording.gemm_grouped = recorded_grouped;
  session->env.ops = &recording;
  core_status status = train_stepper_run(&session->stepper, batch, &report);
  session->env.ops = record.ops;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- repeating ---- */

typedef void (*blas_gemm)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                          int lda, const float *b, int ldb, float beta, float *c, int ldc);

typedef struct replay {
  train_env *env;
  blas_gemm blas;      /* NULL: not there */
  void *a, *b, *c;     /* of the device */
  const int64_t *rows; /* of the product at hand */
} replay;

static core_status by_table(const replay *r, const product *p, int64_t m, int64_t k) {
  core_tensor a =
      p->form == KERN_TN ? core_tensor_2(r->a, p->dtype, k, m) : core_tensor_2(r->a, p->dtype, m, k);
  core_tensor b =
      p->form == KERN_NT ? core_tensor_2(r->b, p->dtype, p->n, k) : core_tensor_2(r->b, p->dtype, k, p->n);
  kern_write write = p->form == KERN_TN ? KERN_ADD : KERN_SET;
  KERN(r->env, gemm, p->form, a, b, write, core_tensor_2(r->c, p->result, m, p->n));
  return CORE_OK;
}

/* float32 on the host alone. */
static core_status by_blas(const replay *r, const product *p, int64_t m, int64_t k) {
  enum { ROW_MAJOR = 101, NO = 111, YES = 112 };
  bool ta = p->form == KERN_TN, tb = p->form == KERN_NT;
  if (m > 0 && k > 0)
    r->blas(ROW_MAJOR, ta ? YES : NO, tb ? YES : NO, (int)m, (int)p->n, (int)k, 1, r->a, (int)(ta ? m : k),
            r->b, (int)(tb ? k : p->n), ta ? 1 : 0, r->c, (int)p->n);
  return CORE_OK;
}

typedef core_status (*multiply)(const replay *, const product *, int64_t, int64_t);

/* Shortest of a few times of one recorded product, all its groups. */
static core_status time_product(const replay *r, const product *p, multiply with, double *best) {
  const core_device *device = r->env->ops->device;
  *best = INFINITY;
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    TRY(device->stream_wait(NULL));
    double start = core_clock_now();
    if (p->groups == 0) TRY(with(r, p, p->m, p->k));
    for (int64_t g = 0; g < p->groups; g++) {
      int64_t rows = r->rows[g + 1] - r->rows[g];
      TRY(p->form == KERN_TN ? with(r, p, p->m, rows) : with(r, p, rows, p->k));
    }
    TRY(device->stream_wait(NULL));
    double seconds = core_clock_now() - start;
    if (seconds < *best) *best = seconds;
  }
  return CORE_OK;
}

static double flops_of(const product *p, const int64_t *rows) {
  double each = 2.0 * (double)p->n * (double)(p->form == KERN_TN ? p->m : p->k);
  if (p->groups == 0) return 2.0 * (double)p->m * (double)p->n * (double)p->k;
  return each * (double)(rows[p->groups] - rows[0]);
}

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* Buffers for products of up to these many numbers, four bytes each, of small values. */
static core_status take_buffers(replay *r, const int64_t size[3]) {
  const core_device *device = r->env->ops->device;
  void **buffers[3] = {&r->a, &r->b, &r->c};
  for (int i = 0; i < 3; i++) {
    size_t bytes = (size_t)size[i] * 4;
    float *host = malloc(bytes);
    CHECK(host, CORE_ERR_MEMORY, "no memory for the matrices");
    for (int64_t j = 0; j < size[i]; j++) host[j] = (float)(1e-3 * (double)(j % 97));
    core_status status = device->allocate(bytes, buffers[i]);
    if (status == CORE_OK) status = device->copy(*buffers[i], host, bytes, NULL);
    free(host);
    TRY(status);
  }
  return CORE_OK;
}

static void give_buffers(replay *r) {
  const core_device *device = r->env->ops->device;
  device->release(r->a);
  device->release(r->b);
  device->release(r->c);
}

static core_status time_all(replay *r, launch_products *out) {
  int64_t size[3] = {1, 1, 1};
  for (int64_t i = 0; i < record.count; i++) {
    const product *p = &record.list[i];
    size[0] = most(size[0], p->m * p->k);
    size[1] = most(size[1], p->n * p->k);
    size[2] = most(size[2], p->m * p->n);
  }
  TRY(take_buffers(r, size));
  for (int64_t i = 0; i < record.count; i++) {
    const product *p = &record.list[i];
    double best, other = INFINITY;
    r->rows = record.row + p->first;
    TRY(time_product(r, p, by_table, &best));
    if (r->blas && p->dtype == CORE_FLOAT32) TRY(time_product(r, p, by_blas, &other));
    out->seconds += fmin(best, other);
    out->flops += flops_of(p, r->rows);
    out->forward += p->form == KERN_NT;
    out->input_gradients += p->form == KERN_NN;
    out->weight_gradients += p->form == KERN_TN;
  }
  return CORE_OK;
}

core_status launch_products_time(train_session *session, launch_products *out) {
  const core_device *device = session->env.ops->device;
  void *library = device->host_access ? dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL) : NULL;
  replay r = {.env = &session->env,
              .blas = library ? (blas_gemm)(uintptr_t)dlsym(library, "cblas_sgemm") : NULL};
  *out = (launch_products){.library = !device->host_access ? session->env.ops->name
                                      : r.blas             ? "the faster of oneDNN and OpenBLAS for each"
                                                           : "oneDNN"};
  core_status status = time_all(&r, out);
  give_buffers(&r);
  forget();
  if (library) dlclose(library);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status launch_products_ceiling(train_session *session, double *flops_per_second) {
  const train_env *env = &session->env;
  int64_t n = env->ops->device->host_access ? 1536 : 8192;
  product square = {.form = KERN_NT, .dtype = env->active, .result = env->active, .m = n, .n = n, .k = n};
  replay r = {.env = &session->env};
  double best = INFINITY;
  core_status status = take_buffers(&r, (const int64_t[3]){n * n, n * n, n * n});
  for (int i = 0; i < CEILING_REPEATS && status == CORE_OK; i++) {
    double seconds;
    status = time_product(&r, &square, by_table, &seconds);
    best = fmin(best, seconds);
  }
  give_buffers(&r);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  *flops_per_second = flops_of(&square, NULL) / best;
  return CORE_OK;
}
