/* Times the CUDA backend on its device and prints JSON lines.
 *
 *   bench_kern_cuda [rows [width [experts [times]]]]      default 65536 1024 64 20
 *
 * Memory-bound ops: bytes that must move over the time of a call, as a share of a device-to-device copy of
 * the same run ("of_copy"). Products, plain and grouped: bench_kern_products.h. Attention: rows a second and
 * TFLOP/s of its products over segments of 4 to 200 rows. Shapes should be beyond the second cache: tensors
 * are rows x width. Times are wall clock over `times` calls that are enqueued one after another. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"  /* core_clock_now */
#include "core/random.h" /* core_random_normal */
#include "tests/kernels/bench_kern_products.h"

enum { SKIPPED = 77, HEAD = 64, CHOICES = 2, RANGES = 64, KEPT = 256 };

typedef struct bench {
  const kern_ops *ops;
  kern_context *context;
  core_dtype active;
  int64_t t, c, e, times;
  int64_t offset[4096], row[CORE_MAX_EXPERTS + 1];
  double copy_rate;
  kern_attention attention;
  kern_cross cross;
  kern_contrastive contrastive;
  kern_adamw list[RANGES];
  /* Active: [T,C] twice or three times over, [T,2C], [T K, C], and of attention [T,3C] */
  core_tensor x, y, dx, two, dtwo, taken, dtaken, qkv, dqkv, out, dout, means;
  /* Real [T,C], and vectors of T and of C */
  core_tensor real, other, m, v, cosine, one_row, other_row, inv, stat, loss, lse, weight, bias, dweight,
      dbias, frequency, table;
  core_tensor logits, prob, noisy, dprob, gate, dgate, w_router, dw_router;
  core_tensor copy, position, entry, target, choice, slot, group, key, sums, balance, balance_weights, one,
      count, valid, kept, kept_rows;
} bench;

static void expect_ok(core_status status) {
  if (status == CORE_OK) return;
  fprintf(stderr, "%s\n", core_error_get()->message);
  exit(1);
}

static core_tensor make(const bench *b, core_dtype dtype, int64_t rows, int64_t columns) {
  core_tensor tensor = core_tensor_2(NULL, dtype, rows, columns);
  expect_ok(b->ops->device->allocate(core_tensor_bytes(&tensor) + 64, &tensor.data));
  expect_ok(b->ops->device->fill(tensor.data, 0, core_tensor_bytes(&tensor), NULL));
  return tensor;
}

core_tensor bench_normals(const kern_ops *ops, core_dtype dtype, int64_t rows, int64_t columns) {
  core_tensor tensor = core_tensor_2(NULL, dtype, rows, columns);
  expect_ok(ops->device->allocate(core_tensor_bytes(&tensor) + 64, &tensor.data));
  enum { BLOCK = 1 << 14 };
  static unsigned char block[BLOCK * sizeof(float)];
  const size_t size = core_dtype_size(dtype), bytes = core_tensor_bytes(&tensor);
  for (int64_t i = 0; i < BLOCK; i++) {
    const float value = (float)core_random_normal(1, 2, (uint64_t)i);
    const uint16_t brief = core_bfloat_from_float(value);
    memcpy(block + (size_t)i * size, dtype == CORE_BFLOAT16 ? (const void *)&brief : (const void *)&value,
           size);
  }
  for (size_t at = 0; at < bytes; at += BLOCK * size)
    expect_ok(ops->device->copy((char *)tensor.data + at, block,
                                bytes - at < BLOCK * size ? bytes - at : BLOCK * size, NULL));
  return tensor;
}

static core_tensor normals(const bench *b, core_dtype dtype, int64_t rows, int64_t columns) {
  return bench_normals(b->ops, dtype, rows, columns);
}

static core_tensor integers(const bench *b, core_dtype dtype, int64_t rows, int64_t columns,
                            int64_t (*value)(const bench *, int64_t)) {
  const core_tensor tensor = make(b, dtype, rows, columns);
  char *host = malloc(core_tensor_bytes(&tensor) + 8);
  for (int64_t i = 0; i < rows * columns; i++) {
    const int64_t wide = value(b, i);
    const int32_t narrow = (int32_t)wide;
    const uint8_t byte = (uint8_t)wide;
    const size_t size = core_dtype_size(dtype);
    memcpy(host + (size_t)i * size,
           size == 8   ? (const void *)&wide
           : size == 4 ? (const void *)&narrow
                       : (const void *)&byte,
           size);
  }
  expect_ok(b->ops->device->copy(tensor.data, host, core_tensor_bytes(&tensor), NULL));
  free(host);
  return tensor;
}

static core_tensor line(core_tensor t) {
  return core_tensor_1(t.data, t.dtype, t.shape[0] * t.shape[1]);
}
static core_tensor part(core_tensor t, int64_t rows, int64_t columns) {
  return core_tensor_2(t.data, t.dtype, rows, columns);
}

/* Seconds a call, after calls that warm up. */
static double seconds(bench *b, core_status (*run)(bench *b)) {
  for (int i = 0; i < 3; i++) expect_ok(run(b));
  expect_ok(b->ops->device->stream_wait(NULL));
  const double begin = core_clock_now();
  for (int64_t i = 0; i < b->times; i++) expect_ok(run(b));
  expect_ok(b->ops->device->stream_wait(NULL));
  return (core_clock_now() - begin) / (double)b->times;
}

/* --- memory-bound ops: name, bytes in units of an Active and a Real tensor [T,C], of [T,E] and of [T,K] ---
 */
#define OPS(X)                                                                                               \
  X(bias_fwd, 2, 0, 0, 0, (b->context, line(b->bias), b->x))                                                 \
  X(bias_bwd, 1, 0, 0, 0, (b->context, b->x, line(b->dbias)))                                                \
  X(gelu_fwd, 2, 0, 0, 0, (b->context, KERN_GELU_ERF, b->x, b->y))                                           \
  X(gelu_bwd, 3, 0, 0, 0, (b->context, KERN_GELU_TANH, b->y, b->x, KERN_SET, b->dx))                         \
  X(swiglu_fwd, 3, 0, 0, 0, (b->context, b->two, b->y))                                                      \
  X(swiglu_bwd, 5, 0, 0, 0, (b->context, b->y, b->two, KERN_SET, b->dtwo))                                   \
  X(rmsnorm_fwd, 2, 0, 0, 0, (b->context, b->x, line(b->weight), 1e-5, b->y, line(b->inv)))                  \
  X(rmsnorm_bwd, 4, 0, 0, 0,                                                                                 \
    (b->context, b->y, b->x, line(b->weight), line(b->inv), KERN_ADD, b->dx, line(b->dweight)))              \
  X(layernorm_fwd, 2, 0, 0, 0, (b->context, b->x, line(b->weight), line(b->bias), 1e-5, b->y, b->stat))      \
  X(layernorm_bwd, 3, 0, 0, 0,                                                                               \
    (b->context, b->y, b->x, line(b->weight), b->stat, KERN_SET, b->dx, line(b->dweight), line(b->dbias)))   \
  X(rope, 2, 0, 0, 0,                                                                                        \
    (b->context, KERN_ROTATE, (int32_t)(b->c / HEAD), line(b->position), line(b->frequency), b->dx))         \
  X(router_noise, 0, 0, 2, 0, (b->context, b->logits, 1, 2, line(b->key), 0.1, b->noisy))                    \
  X(softmax_fwd, 0, 0, 2, 0, (b->context, b->logits, b->prob))                                               \
  X(router_choose, 0, 0, 2, 2, (b->context, KERN_GATE_SOFTMAX, b->logits, b->prob, b->choice, b->gate))      \
  X(router_gate_bwd, 0, 0, 2, 2,                                                                             \
    (b->context, KERN_GATE_SOFTMAX, b->dgate, b->prob, b->choice, b->gate, KERN_SET, b->noisy))              \
  X(router_sums, 0, 0, 3, 1, (b->context, b->logits, b->prob, b->noisy, b->choice, 0.1, line(b->sums)))      \
  X(router_sums_bwd, 0, 0, 4, 1,                                                                             \
    (b->context, line(b->sums), b->logits, b->prob, b->logits, b->choice, 0, b->noisy))                      \
  X(router_gate_fwd, 0, 0, 0, 3,                                                                             \
    (b->context, KERN_GATE_RENORMALISED, KERN_CALIBRATE_ADD, b->prob, (core_tensor){0}, b->choice, b->gate)) \
  X(router_calibrated_bwd, 0, 0, 4, 2,                                                                       \
    (b->context, KERN_GATE_RENORMALISED, KERN_CALIBRATE_MULTIPLY, b->dgate, b->prob, b->logits, b->choice,   \
     b->noisy, b->dprob))                                                                                    \
  X(router_second, 0, 0, 1, 2, (b->context, b->logits, 1, 2, line(b->key), b->choice))                       \
  X(softmax_bwd, 0, 0, 3, 0, (b->context, b->dprob, b->prob, KERN_SET, b->noisy))                            \
  X(router_balance, 0, 0, 1, 1, (b->context, b->prob, b->choice, line(b->group), 1, b->balance))             \
  X(router_balance_bwd, 0, 0, 3, 0, (b->context, b->balance_weights, line(b->group), b->prob, b->noisy))     \
  X(router_count, 0, 0, 0, 2, (b->context, b->choice, b->slot, line(b->count)))                              \
  X(gather_rows, 2, 0, 0, 0, (b->context, b->x, line(b->position), b->y))                                    \
  X(combine_fwd, 3, 0, 0, 2, (b->context, b->taken, b->slot, b->gate, KERN_SET, b->y))                       \
  X(combine_bwd, 5, 0, 0, 3, (b->context, b->y, b->taken, b->slot, b->gate, b->dtaken, b->dgate))            \
  X(segment_mean_fwd, 1, 0, 0, 0, (b->context, b->attention.segments, b->x, b->means))                       \
  X(segment_mean_bwd, 2, 0, 0, 0, (b->context, b->attention.segments, b->means, KERN_ADD, b->dx))            \
  X(position_fwd, 2, 0, 0, 0, (b->context, b->attention.segments, b->table, b->dx))                          \
  X(position_bwd, 1, 0, 0, 0, (b->context, b->attention.segments, b->x, b->table))                           \
  X(l2norm_fwd, 0, 2, 0, 0, (b->context, b->real, b->other, line(b->inv)))                                   \
  X(l2norm_bwd, 1, 2, 0, 0, (b->context, b->real, b->other, line(b->inv), KERN_SET, b->dx))                  \
  X(contrastive_fwd, 0, 1, 0, 0, (b->context, &b->contrastive, b->cosine, b->one_row, b->other_row))         \
  X(contrastive_bwd, 0, 2, 0, 0,                                                                             \
    (b->context, &b->contrastive, 1e-3, b->one_row, b->other_row, b->cosine, line(b->one)))                  \
  X(attention_cached, 2, 0, 0, 0,                                                                            \
    (b->context, &b->attention, line(b->kept), line(b->kept_rows), part(b->qkv, b->kept.shape[1], 3 * b->c), \
     b->dqkv, part(b->out, b->kept.shape[1], b->c)))                                                         \
  X(cross_entropy_fwd, 0, 1, 0, 0,                                                                           \
    (b->context, b->real, 0, b->c, line(b->target), line(b->inv), line(b->loss)))                            \
  X(cross_entropy_bwd, 0, 2, 0, 0,                                                                           \
    (b->context, 1e-3, line(b->inv), 0, b->c, line(b->target), b->other, b->other))                          \
  X(embedding_bwd, 1, 1, 0, 0,                                                                               \
    (b->context, b->attention.segments, line(b->position), line(b->entry), b->dx, b->other))                 \
  X(standardize, 1, 1, 0, 0, (b->context, b->real, line(b->weight), line(b->bias), b->y))                    \
  X(adamw, 0, 7.5, 0, 0, (b->context, b->list, RANGES, b->real, b->other, b->m, b->v, b->copy))              \
  X(sum_squares, 0, 1, 0, 0, (b->context, b->real, line(b->one)))                                            \
  X(cast, 1, 1, 0, 0, (b->context, b->real, b->y))                                                           \
  X(axpy, 0, 3, 0, 0, (b->context, 0.5, b->real, b->other))                                                  \
  X(scale, 0, 2, 0, 0, (b->context, 0.999, b->other))                                                        \
  X(fill, 1, 0, 0, 0, (b->context, 0, b->y))                                                                 \
  X(bias_grouped_fwd, 2, 0, 0, 0, (b->context, b->row, b->w_router, part(b->x, b->row[b->e], b->c)))         \
  X(bias_grouped_bwd, 1, 0, 0, 0, (b->context, b->row, part(b->x, b->row[b->e], b->c), b->dw_router))        \
  X(dropout, 4, 0, 0, 0, (b->context, 1, 2, 0.1, line(b->key), b->slot, b->taken))                           \
  X(regression, 1, 2, 0, 0,                                                                                  \
    (b->context, KERN_SQUARED, 0.5, b->real, b->other, b->valid, line(b->loss), b->dx))

#define RUN(op, active, real, experts, choices, arguments) \
  static core_status run_##op(bench *b) {                  \
    return b->ops->op arguments;                           \
  }
OPS(RUN)
#undef RUN

static const struct {
  const char *name;
  double active, real, experts, choices; /* tensors that move, by their size */
  core_status (*run)(bench *b);
} memory_ops[] = {
#define ENTRY(op, active, real, experts, choices, arguments) {#op, active, real, experts, choices, run_##op},
    OPS(ENTRY)
#undef ENTRY
};

static core_status run_copy(bench *b) {
  return b->ops->device->copy(b->other.data, b->real.data, core_tensor_bytes(&b->real), NULL);
}

static void time_memory_ops(bench *b) {
  b->copy_rate = 2 * (double)core_tensor_bytes(&b->real) / seconds(b, run_copy);
  printf("{\"op\": \"copy\", \"GB/s\": %.1f}\n", b->copy_rate * 1e-9);
  for (size_t i = 0; i < sizeof memory_ops / sizeof *memory_ops; i++) {
    const double bytes = memory_ops[i].active * (double)core_tensor_bytes(&b->x) +
                         memory_ops[i].real * (double)core_tensor_bytes(&b->real) +
                         memory_ops[i].experts * (double)core_tensor_bytes(&b->logits) +
                         memory_ops[i].choices * (double)core_tensor_bytes(&b->gate);
    const double time = seconds(b, memory_ops[i].run);
    printf(
        "{\"op\": \"%s\", \"type\": \"%s\", \"bytes\": %.0f, \"us\": %.2f, \"GB/s\": %.1f, \"of_copy\": "
        "%.3f}\n",
        memory_ops[i].name, core_dtype_text(b->active), bytes, time * 1e6, bytes / time * 1e-9,
        bytes / time / b->copy_rate);
  }
}

/* --- the router's products, the plan and attention --- */
static core_status run_router_logits(bench *b) {
  return b->ops->router_logits(b->context, b->x, b->w_router, (core_tensor){0}, b->logits);
}
static core_status run_router_logits_bwd(bench *b) {
  return b->ops->router_logits_bwd(b->context, b->logits, b->x, b->w_router, KERN_SET, b->dx, b->dw_router,
                                   (core_tensor){0});
}
static core_status run_dispatch_plan(bench *b) {
  int64_t count[CORE_MAX_EXPERTS];
  core_tensor index = line(b->position);
  index.data = b->dtaken.data, index.shape[0] = b->t * CHOICES;
  return b->ops->dispatch_plan(b->context, b->choice, (core_tensor){0}, b->e, count, b->slot, index);
}
static core_status run_attention_fwd(bench *b) {
  return b->ops->attention_fwd(b->context, &b->attention, b->qkv, b->out, b->lse);
}
static core_status run_attention_bwd(bench *b) {
  return b->ops->attention_bwd(b->context, &b->attention, b->dout, b->qkv, b->out, b->lse, b->dqkv);
}
static core_status run_attention_cross_fwd(bench *b) {
  return b->ops->attention_cross_fwd(b->context, &b->cross);
}
static core_status run_attention_cross_bwd(bench *b) {
  return b->ops->attention_cross_bwd(b->context, &b->cross, b->dout, b->dx, b->dtwo);
}

static void time_one(bench *b, const char *name, core_status (*run)(bench *b), double flops) {
  const double time = seconds(b, run);
  printf("{\"op\": \"%s\", \"type\": \"%s\", \"us\": %.2f, \"Mrows/s\": %.2f, \"TFLOP/s\": %.3f}\n", name,
         core_dtype_text(b->active), time * 1e6, (double)b->t / time * 1e-6, flops / time * 1e-12);
}

static void time_larger_ops(bench *b) {
  const double router = 2.0 * (double)(b->t * b->c * b->e);
  double pairs = 0;
  for (int64_t s = 0; s < b->attention.segments.count; s++)
    pairs += pow((double)(b->offset[s + 1] - b->offset[s]), 2);
  time_one(b, "router_logits", run_router_logits, router);
  time_one(b, "router_logits_bwd", run_router_logits_bwd, 2 * router);
  time_one(b, "dispatch_plan", run_dispatch_plan, 0);
  time_one(b, "attention_fwd", run_attention_fwd, 4 * pairs * (double)b->c);
  time_one(b, "attention_bwd", run_attention_bwd, 10 * pairs * (double)b->c);
  time_one(b, "attention_cross_fwd", run_attention_cross_fwd, 4 * pairs * (double)b->c);
  time_one(b, "attention_cross_bwd", run_attention_cross_bwd, 10 * pairs * (double)b->c);
}

/* --- tensors --- */
static int64_t some_row(const bench *b, int64_t i) {
  return i * 7919 % b->t;
}
static int64_t some_column(const bench *b, int64_t i) {
  return i * 31 % b->c;
}
static int64_t some_expert(const bench *b, int64_t i) {
  return (i / CHOICES * 3 + i % CHOICES) % b->e;
}
static int64_t own_slot(const bench *b, int64_t i) {
  return i / CHOICES + i % CHOICES * b->t;
}
static int64_t itself(const bench *b, int64_t i) {
  (void)b;
  return i;
}
static int64_t offset_of(const bench *b, int64_t i) {
  return b->offset[i];
}
static int64_t kept_first(const bench *b, int64_t i) {
  (void)b;
  return i * KEPT;
}
static int64_t kept_rows(const bench *b, int64_t i) {
  return b->t - i * KEPT < KEPT ? b->t - i * KEPT : KEPT;
}
static int64_t one_of(const bench *b, int64_t i) {
  (void)b, (void)i;
  return 1;
}

/* Segments of 4 to 200 rows; the last takes what is left when there are too many. */
static void make_segments(bench *b) {
  const int64_t most = (int64_t)(sizeof b->offset / sizeof *b->offset) - 1;
  int64_t count = 0, longest = 1;
  while (b->offset[count] < b->t) {
    const int64_t length = count + 1 == most ? b->t : 4 + count * count % 197;
    const int64_t end = b->offset[count] + length < b->t ? b->offset[count] + length : b->t;
    if (end - b->offset[count] > longest) longest = end - b->offset[count];
    b->offset[++count] = end;
  }
  const kern_segments segments = {b->offset, line(integers(b, CORE_INT64, 1, count + 1, offset_of)), count};
  const int32_t heads = (int32_t)(b->c / HEAD);
  b->attention = (kern_attention){segments, heads, heads, HEAD, KERN_BIDIRECTIONAL, 1 / sqrt(HEAD)};
  b->cross = (kern_cross){b->attention, segments, b->x, b->two, b->out, b->lse};
  b->means = normals(b, b->active, count, b->c);
  b->entry = integers(b, CORE_INT32, 1, count, itself);
  b->table = normals(b, CORE_FLOAT32, longest, b->c);
}

static void make_active(bench *b) {
  const int64_t t = b->t, c = b->c;
  core_tensor *const rows[] = {&b->x, &b->y, &b->dx, &b->out, &b->dout};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) *rows[i] = normals(b, b->active, t, c);
  b->two = normals(b, b->active, t, 2 * c), b->dtwo = normals(b, b->active, t, 2 * c);
  b->taken = normals(b, b->active, t * CHOICES, c), b->dtaken = normals(b, b->active, t * CHOICES, c);
  b->qkv = normals(b, b->active, t, 3 * c), b->dqkv = normals(b, b->active, t, 3 * c);
}

static void make_real(bench *b) {
  const int64_t t = b->t, c = b->c, e = b->e;
  core_tensor *const rows[] = {&b->real, &b->other, &b->m, &b->v};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) *rows[i] = normals(b, CORE_FLOAT32, t, c);
  core_tensor *const columns[] = {&b->weight, &b->bias, &b->dweight, &b->dbias};
  for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) *columns[i] = normals(b, CORE_FLOAT32, 1, c);
  core_tensor *const router[] = {&b->logits, &b->prob, &b->noisy, &b->dprob};
  for (size_t i = 0; i < sizeof router / sizeof *router; i++) *router[i] = normals(b, CORE_FLOAT32, t, e);
  b->balance = make(b, CORE_FLOAT64, 1, 1 + 2 * e), b->balance_weights = make(b, CORE_FLOAT64, 1, e);
  b->inv = normals(b, CORE_FLOAT32, 1, t), b->stat = normals(b, CORE_FLOAT32, t, 2);
  b->loss = make(b, CORE_FLOAT32, 1, t), b->lse = make(b, CORE_FLOAT32, t, c / HEAD);
  b->gate = normals(b, CORE_FLOAT32, t, CHOICES), b->dgate = normals(b, CORE_FLOAT32, t, CHOICES);
  b->frequency = normals(b, CORE_FLOAT32, 1, HEAD / 2);
  b->w_router = normals(b, CORE_FLOAT32, e, c), b->dw_router = normals(b, CORE_FLOAT32, e, c);
  b->sums = make(b, CORE_FLOAT64, 1, kern_router_sums_count(e)), b->one = make(b, CORE_FLOAT64, 1, 1);
  b->count = make(b, CORE_INT64, 1, 2 * e + 2), b->copy = make(b, CORE_BFLOAT16, t, c);
}

static int64_t the_only(const bench *b, int64_t i) {
  (void)b, (void)i;
  return 0;
}

static void make_integers(bench *b) {
  b->position = integers(b, CORE_INT32, 1, b->t, some_row);
  b->target = integers(b, CORE_INT32, 1, b->t, some_column);
  b->choice = integers(b, CORE_INT32, b->t, CHOICES, some_expert);
  b->slot = integers(b, CORE_INT32, b->t, CHOICES, own_slot);
  b->group = integers(b, CORE_INT32, 1, b->t, the_only);
  b->key = integers(b, CORE_UINT64, 1, b->t, itself);
  const int64_t queries = (b->t + KEPT - 1) / KEPT; /* together they read every row once */
  b->kept = integers(b, CORE_INT32, 1, queries, kept_first);
  b->kept_rows = integers(b, CORE_INT32, 1, queries, kept_rows);
  b->valid = line(integers(b, CORE_UINT8, 1, b->t, one_of));
}

/* A square of cosines as large as fits, and a list of ranges that cover a flat array. */
static void make_lists(bench *b) {
  int64_t n = (int64_t)sqrt((double)(b->t * b->c));
  if (n > b->t) n = b->t;
  b->cosine = part(b->real, n, n);
  b->one_row = core_tensor_1(b->inv.data, CORE_FLOAT32, n);
  b->other_row = core_tensor_1(b->loss.data, CORE_FLOAT32, n);
  b->contrastive = (kern_contrastive){.scale = 10, .valid = line(integers(b, CORE_UINT8, 1, n, one_of))};
  for (int64_t i = 0; i < RANGES; i++) {
    const int64_t first = b->t * b->c * i / RANGES, end = b->t * b->c * (i + 1) / RANGES;
    b->list[i] = (kern_adamw){first, end - first, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.5, 1};
  }
}

static void run_type(bench *b, core_dtype active) {
  b->active = active;
  make_active(b), make_real(b), make_integers(b), make_segments(b), make_lists(b);
  for (int64_t g = 0; g <= b->e; g++) b->row[g] = b->t * g / b->e;
  time_memory_ops(b);
  time_larger_ops(b);
  expect_ok(bench_products(b->ops, b->context, active,
                           (bench_sizes){.rows = b->t, .width = b->c, .groups = b->e, .times = b->times}));
}

int main(int argc, char **argv) {
  static bench b;
  const int64_t sizes[] = {65536, 1024, 64, 20};
  int64_t *const fields[] = {&b.t, &b.c, &b.e, &b.times};
  for (int i = 0; i < 4; i++) *fields[i] = argc > i + 1 ? atoll(argv[i + 1]) : sizes[i];
  if (b.t < 1 || b.c < HEAD || b.c % HEAD != 0 || b.e < CHOICES || b.e > CORE_MAX_EXPERTS || b.times < 1) {
    fprintf(stderr, "rows %lld, width %lld (a multiple of %d), experts %lld (%d or more), times %lld\n",
            (long long)b.t, (long long)b.c, (int)HEAD, (long long)b.e, (int)CHOICES, (long long)b.times);
    return 2;
  }
  if (kern_cuda(0, &b.ops) != CORE_OK) {
    printf("skipped: no CUDA device: %s\n", core_error_get()->message);
    return SKIPPED;
  }
  const kern_limits limits = {.rows = b.t * CHOICES,
                              .width = 3 * b.c,
                              .experts = b.e,
                              .sequence = b.t,
                              .segments = b.t,
                              .heads = b.c / HEAD,
                              .updates = RANGES};
  expect_ok(b.ops->context_create(&limits, &b.context));
  printf("{\"device\": \"%s\", \"rows\": %lld, \"width\": %lld, \"experts\": %lld}\n", b.ops->device->name,
         (long long)b.t, (long long)b.c, (long long)b.e);
  run_type(&b, CORE_BFLOAT16);
  run_type(&b, CORE_FLOAT32); /* in memory of its own; all of it is given back with the process */
  b.ops->context_destroy(b.context);
  return 0;
}
