/* Times every op of a pre-norm transformer layer with a mixture-of-experts feed-forward, forward and
 * backward, and prints it beside the layer's own matrix products: what the products leave over is the ops'
 * overhead.
 *
 *   bench_kernels [width [tokens [head width [threads [experts [type]]]]]]      default 256 2000 64 1 8
 * float32
 *
 * type: float32; bfloat16, for Active tensors and the optimizer's copy; widened, as on a processor that does
 * not multiply bfloat16. The latter two run in turn with float32 and are compared with it.
 * Segments are 7 to 20 tokens; top-1 routing in expert order; F is 8/3 of the width, in whole vectors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h> /* memset */

#include "core/clock.h"           /* core_clock_now */
#include "core/random.h"          /* core_random_normal */
#include "kernels/cpu/cpu_impl.h" /* kern_context: bfloat_units */
#include "kernels/kernels.h"

typedef struct bench {
  const kern_ops *ops;
  kern_context *context;
  core_dtype active;
  int64_t t, c, f, experts, width, parameters;
  int64_t *offset, *row;
  kern_attention attention;
  core_tensor x, dx, y, weight, dweight, inv, qkv, dqkv, out, dout, lse;
  core_tensor w_qkv, dw_qkv, w_out, dw_out, rows, drows, w_up, dw_up, hidden, dhidden, act, dact, w_down,
      dw_down;
  core_tensor w_router, dw_router, logits, noisy, prob, dlogits, choice, gate, dgate, slot, index, key;
  core_tensor p, g, m, v, copy;
  core_tensor sums, squares;
} bench;

static core_tensor make(core_dtype dtype, int64_t rows, int64_t columns) {
  core_tensor tensor = core_tensor_2(NULL, dtype, rows, columns);
  if (kern_cpu()->device->allocate(core_tensor_bytes(&tensor) + 64, &tensor.data) != CORE_OK) exit(1);
  for (int64_t i = 0; i < rows * columns; i++) {
    const double value = 0.05 * (double)((i * 7919) % 41 - 20);
    if (dtype == CORE_REAL_DTYPE) ((core_real *)tensor.data)[i] = (core_real)value;
    if (dtype == CORE_BFLOAT16) ((uint16_t *)tensor.data)[i] = core_bfloat_from_float((float)value);
  }
  return tensor;
}
static core_tensor real(int64_t rows, int64_t columns) {
  return make(CORE_REAL_DTYPE, rows, columns);
}
static core_tensor active(const bench *b, int64_t rows, int64_t columns) {
  return make(b->active, rows, columns);
}
static core_tensor zeros(int64_t count) {
  core_tensor tensor = core_tensor_1(NULL, CORE_FLOAT64, count);
  if (kern_cpu()->device->allocate(core_tensor_bytes(&tensor), &tensor.data) != CORE_OK) exit(1);
  memset(tensor.data, 0, core_tensor_bytes(&tensor));
  return tensor;
}
static core_tensor stack(core_dtype dtype, int64_t n, int64_t rows, int64_t columns) {
  core_tensor tensor = make(dtype, n * rows, columns);
  return core_tensor_3(tensor.data, tensor.dtype, n, rows, columns);
}

static void bench_segments(bench *b) {
  b->offset = calloc((size_t)b->t + 1, sizeof *b->offset);
  int64_t count = 0;
  while (b->offset[count] < b->t) {
    int64_t next = b->offset[count] + 7 + (int64_t)core_random_below(1, 2, (uint64_t)count, 14);
    b->offset[++count] = next < b->t ? next : b->t;
  }
  b->attention.segments = (kern_segments){.offset = b->offset, .count = count};
  b->row = calloc((size_t)b->experts + 1, sizeof *b->row);
  for (int64_t e = 0; e <= b->experts; e++) b->row[e] = b->t * e / b->experts;
}

static void bench_tensors(bench *b) {
  const int64_t t = b->t, c = b->c, f = b->f, e = b->experts;
  b->x = active(b, t, c), b->dx = active(b, t, c), b->y = active(b, t, c);
  b->weight = real(1, c), b->dweight = real(1, c), b->inv = real(t, 1);
  b->weight.shape[0] = b->dweight.shape[0] = c, b->weight.shape[1] = b->dweight.shape[1] = 1;
  b->qkv = active(b, t, 3 * c), b->dqkv = active(b, t, 3 * c);
  b->out = active(b, t, c), b->dout = active(b, t, c), b->lse = real(t, b->attention.heads);
  b->w_qkv = active(b, 3 * c, c), b->dw_qkv = real(3 * c, c);
  b->w_out = active(b, c, c), b->dw_out = real(c, c);
  b->rows = active(b, t, c), b->drows = active(b, t, c);
  b->hidden = active(b, t, 2 * f), b->dhidden = active(b, t, 2 * f);
  b->act = active(b, t, f), b->dact = active(b, t, f);
  b->w_up = stack(b->active, e, 2 * f, c), b->dw_up = stack(CORE_REAL_DTYPE, e, 2 * f, c);
  b->w_down = stack(b->active, e, c, f), b->dw_down = stack(CORE_REAL_DTYPE, e, c, f);
  b->w_router = real(e, c), b->dw_router = real(e, c), b->logits = real(t, e), b->noisy = real(t, e);
  b->prob = real(t, e), b->dlogits = real(t, e), b->gate = real(t, 1), b->dgate = real(t, 1);
  b->choice = make(CORE_INT32, t, 1), b->slot = make(CORE_INT32, t, 1), b->key = make(CORE_UINT64, t, 1);
  b->index = make(CORE_INT32, t, 1);
  for (int64_t i = 0; i < t; i++) {
    const int64_t turned = i * 7 % t; /* 7 does not divide the default token counts: a permutation */
    ((int32_t *)b->slot.data)[i] = (int32_t)turned;
    ((int32_t *)b->index.data)[turned] = (int32_t)i;
    ((int32_t *)b->choice.data)[i] = (int32_t)(i % e);
    ((uint64_t *)b->key.data)[i] = (uint64_t)i;
  }
  b->parameters = 4 * c * c + e * 3 * c * f;
  b->p = real(b->parameters, 1), b->g = real(b->parameters, 1);
  b->m = real(b->parameters, 1), b->v = real(b->parameters, 1);
  if (b->active == CORE_BFLOAT16) b->copy = active(b, b->parameters, 1);
  for (int64_t i = 0; i < b->parameters; i++) ((core_real *)b->v.data)[i] = 1;
  b->sums = zeros(kern_router_sums_count(e)), b->squares = zeros(1);
}

/* One line of the table: an op as the layer calls it. */
#define RUN(name, call)                     \
  static core_status run_##name(bench *b) { \
    return b->ops->call;                    \
  }
RUN(gemm_qkv, gemm(b->context, KERN_NT, b->x, b->w_qkv, KERN_SET, b->qkv))
RUN(gemm_qkv_dx, gemm(b->context, KERN_NN, b->dqkv, b->w_qkv, KERN_SET, b->dx))
RUN(gemm_qkv_dw, gemm(b->context, KERN_TN, b->dqkv, b->x, KERN_ADD, b->dw_qkv))
RUN(gemm_out, gemm(b->context, KERN_NT, b->out, b->w_out, KERN_ADD, b->y))
RUN(gemm_out_dx, gemm(b->context, KERN_NN, b->y, b->w_out, KERN_SET, b->dout))
RUN(gemm_out_dw, gemm(b->context, KERN_TN, b->y, b->out, KERN_ADD, b->dw_out))
RUN(gemm_up, gemm_grouped(b->context, KERN_NT, b->row, b->rows, b->w_up, KERN_SET, b->hidden))
RUN(gemm_up_dx, gemm_grouped(b->context, KERN_NN, b->row, b->dhidden, b->w_up, KERN_SET, b->drows))
RUN(gemm_up_dw, gemm_grouped(b->context, KERN_TN, b->row, b->dhidden, b->rows, KERN_ADD, b->dw_up))
RUN(gemm_down, gemm_grouped(b->context, KERN_NT, b->row, b->act, b->w_down, KERN_SET, b->rows))
RUN(gemm_down_dx, gemm_grouped(b->context, KERN_NN, b->row, b->drows, b->w_down, KERN_SET, b->dact))
RUN(gemm_down_dw, gemm_grouped(b->context, KERN_TN, b->row, b->drows, b->act, KERN_ADD, b->dw_down))
RUN(rmsnorm_fwd, rmsnorm_fwd(b->context, b->x, b->weight, 1e-6, b->y, b->inv))
RUN(rmsnorm_bwd, rmsnorm_bwd(b->context, b->y, b->x, b->weight, b->inv, KERN_ADD, b->dx, b->dweight))
RUN(attention_fwd, attention_fwd(b->context, &b->attention, b->qkv, b->out, b->lse))
RUN(attention_bwd, attention_bwd(b->context, &b->attention, b->dout, b->qkv, b->out, b->lse, b->dqkv))
RUN(swiglu_fwd, swiglu_fwd(b->context, b->hidden, b->act))
RUN(swiglu_bwd, swiglu_bwd(b->context, b->dact, b->hidden, KERN_SET, b->dhidden))
RUN(router_logits, router_logits(b->context, b->x, b->w_router, (core_tensor){0}, b->logits))
RUN(router_noise, router_noise(b->context, b->logits, 1, 2, b->key, 0.125, b->noisy))
RUN(router_choose, router_choose(b->context, KERN_GATE_SOFTMAX, b->logits, b->prob, b->choice, b->gate))
RUN(router_gate_bwd, router_gate_bwd(b->context, KERN_GATE_SOFTMAX, b->dgate, b->prob, b->choice, b->gate,
                                     KERN_SET, b->dlogits))
RUN(router_logits_bwd, router_logits_bwd(b->context, b->dlogits, b->x, b->w_router, KERN_ADD, b->dx,
                                         b->dw_router, (core_tensor){0}))
RUN(router_sums, router_sums(b->context, b->logits, b->prob, b->noisy, b->choice, 0.125, b->sums))
RUN(router_sums_bwd,
    router_sums_bwd(b->context, b->sums, b->logits, b->prob, b->noisy, b->choice, 0.125, b->dlogits))
RUN(gather_rows, gather_rows(b->context, b->x, b->index, b->rows))
RUN(gather_rows_bwd, combine_fwd(b->context, b->drows, b->slot, (core_tensor){0}, KERN_ADD, b->dx))
RUN(combine_fwd, combine_fwd(b->context, b->rows, b->slot, b->gate, KERN_ADD, b->y))
RUN(combine_bwd, combine_bwd(b->context, b->y, b->rows, b->slot, b->gate, b->drows, b->dgate))
RUN(fill_gradient, fill(b->context, 0, b->g))
RUN(sum_squares, sum_squares(b->context, b->g, b->squares))
static core_status run_adamw(bench *b) {
  const kern_adamw adamw = {0, b->parameters, 1e-6, 0.9, 0.999, 1e-8, 0.1, 0.1, 0.001, 1};
  return b->ops->adamw(b->context, &adamw, 1, b->g, b->p, b->m, b->v, b->copy);
}

typedef struct bench_line {
  const char *name;
  core_status (*run)(bench *b);
  int times;   /* in one layer */
  double flop; /* per token, in units of C^2 (products) */
} bench_line;

#define LINE(name, times, flop) \
  { #name, run_##name, times, flop }
static const bench_line lines[] = {
    LINE(gemm_qkv, 1, 6),        LINE(gemm_qkv_dx, 1, 6),
    LINE(gemm_qkv_dw, 1, 6),     LINE(gemm_out, 1, 2),
    LINE(gemm_out_dx, 1, 2),     LINE(gemm_out_dw, 1, 2),
    LINE(gemm_up, 1, -4),        LINE(gemm_up_dx, 1, -4),
    LINE(gemm_up_dw, 1, -4),     LINE(gemm_down, 1, -2),
    LINE(gemm_down_dx, 1, -2),   LINE(gemm_down_dw, 1, -2),
    LINE(rmsnorm_fwd, 2, 0),     LINE(rmsnorm_bwd, 2, 0),
    LINE(attention_fwd, 1, 0),   LINE(attention_bwd, 1, 0),
    LINE(swiglu_fwd, 1, 0),      LINE(swiglu_bwd, 1, 0),
    LINE(router_logits, 1, 0),   LINE(router_logits_bwd, 1, 0),
    LINE(router_noise, 1, 0),    LINE(router_choose, 1, 0),
    LINE(router_gate_bwd, 1, 0), LINE(router_sums, 1, 0),
    LINE(router_sums_bwd, 1, 0), LINE(gather_rows, 1, 0),
    LINE(gather_rows_bwd, 1, 0), LINE(combine_fwd, 1, 0),
    LINE(combine_bwd, 1, 0),     LINE(fill_gradient, 1, 0),
    LINE(sum_squares, 1, 0),     LINE(adamw, 1, 0),
};
enum { LINES = sizeof lines / sizeof *lines, ROUNDS = 9 };

/* Best of rounds that run the whole layer in order, so that caches are as cold as in a step. */
static core_status bench_round(bench *b, double best[LINES]) {
  for (int i = 0; i < LINES; i++) {
    const double begin = core_clock_now();
    TRY(lines[i].run(b));
    const double took = core_clock_now() - begin;
    if (took < best[i]) best[i] = took;
  }
  return CORE_OK;
}

static double sum_of(const double best[LINES], bool products) {
  double sum = 0;
  for (int i = 0; i < LINES; i++)
    if ((lines[i].flop != 0) == products) sum += best[i] * lines[i].times;
  return sum;
}

/* beside: the same in float32, or NULL. */
static void bench_print(const bench *b, const double best[LINES], const double *beside) {
  const double gemm = sum_of(best, true), other = sum_of(best, false), tokens = (double)b->t * 1e-6;
  printf("%-17s %5s %12s %9s %9s%s\n", "op", "times", "us/token", "GFLOP/s", "% of GEMM",
         beside ? "  / float32" : "");
  for (int i = 0; i < LINES; i++) {
    const double unit =
        lines[i].flop > 0 ? lines[i].flop * (double)(b->c * b->c) : -lines[i].flop * (double)(b->c * b->f);
    const double total = best[i] * lines[i].times;
    printf("%-17s %5d %12.4f %9.1f %9.2f", lines[i].name, lines[i].times, total / tokens,
           unit * (double)b->t / best[i] * 1e-9, 100 * total / gemm);
    if (beside) printf("  %9.2f", best[i] / beside[i]);
    printf("\n");
  }
  printf("layer: products %.3f us/token, other ops %.3f us/token: %.3f x the products\n", gemm / tokens,
         other / tokens, 1 + other / gemm);
  if (beside)
    printf("beside float32: products %.3f x, other ops %.3f x, all %.3f x\n", gemm / sum_of(beside, true),
           other / sum_of(beside, false), (gemm + other) / (sum_of(beside, true) + sum_of(beside, false)));
}

static core_status bench_open(bench *b, int32_t threads) {
  bench_segments(b);
  bench_tensors(b);
  const kern_limits limits = {.rows = b->t,
                              .width = 6 * b->c,
                              .experts = b->experts,
                              .sequence = 64,
                              .segments = b->attention.segments.count,
                              .heads = b->attention.heads,
                              .updates = 1,
                              .threads = threads};
  TRY(b->ops->context_create(&limits, &b->context));
  return CORE_OK;
}

static bench bench_of(int argc, char **argv) {
  bench b = {.ops = kern_cpu(), .active = CORE_REAL_DTYPE, .c = 256, .t = 2000, .experts = 8};
  if (argc > 1) b.c = atoll(argv[1]);
  if (argc > 2) b.t = atoll(argv[2]);
  const int64_t head = argc > 3 ? atoll(argv[3]) : 64;
  if (argc > 5) b.experts = atoll(argv[5]);
  b.f = (b.c * 8 / 3 + 15) / 16 * 16;
  b.attention = (kern_attention){.heads = (int32_t)(b.c / head),
                                 .kv_heads = (int32_t)(b.c / head),
                                 .head_width = (int32_t)head,
                                 .mask = KERN_BIDIRECTIONAL,
                                 .scale = 0.125};
  return b;
}

static core_status bench_main(int argc, char **argv) {
  const int32_t threads = argc > 4 ? atoi(argv[4]) : 1;
  const char *type = argc > 6 ? argv[6] : "float32";
  const bool brief = strcmp(type, "bfloat16") == 0, widened = strcmp(type, "widened") == 0;
  CHECK(brief || widened || strcmp(type, "float32") == 0, CORE_ERR_USAGE,
        "type is \"%s\", expected float32, bfloat16 or widened", type);
  bench real_run = bench_of(argc, argv), run = real_run;
  double real_best[LINES], best[LINES];
  for (int i = 0; i < LINES; i++) real_best[i] = best[i] = 1e9;
  TRY(bench_open(&real_run, threads));
  if (brief || widened) {
    run.active = CORE_BFLOAT16;
    TRY(bench_open(&run, threads));
    if (widened) run.context->bfloat_units = false;
  }
  for (int round = 0; round < ROUNDS; round++) {
    TRY(bench_round(&real_run, real_best));
    if (run.context) TRY(bench_round(&run, best));
  }
  bench_print(run.context ? &run : &real_run, run.context ? best : real_best, run.context ? real_best : NULL);
  real_run.ops->context_destroy(run.context);
  real_run.ops->context_destroy(real_run.context);
  return CORE_OK;
}

int main(int argc, char **argv) {
  if (bench_main(argc, argv) == CORE_OK) return 0;
  char text[1024];
  core_error_format(core_error_get(), true, text, sizeof text);
  fprintf(stderr, "%s\n", text);
  return 1;
}
