#include "tests/kernels/bench_kern_products.h"

#include <math.h>
#include <stdio.h>

#include "core/clock.h"
#include "kernels/cuda/cuda_grouping_impl.h" /* kern_grouping */

enum { WARM_UP = 3, SQUARE = 8, SKEWS = 3 };

typedef struct products {
  const kern_ops *ops;
  kern_context *context;
  core_dtype active;
  int64_t t, c, e, times;
  int64_t row[CORE_MAX_EXPERTS + 1];
  double best;                     /* FLOP/s */
  core_tensor wide, narrow, out;   /* Active [T,2C], [T,C], [T,2C] */
  core_tensor weights, gradients;  /* [E C,C], at least [2C,C]; Active and Real */
  core_tensor left, right, square; /* Active [8C,8C] */
  /* the product at hand */
  kern_form form;
  core_tensor a, b, result;
} products;

/* Seconds a call, after calls that warm up. */
static core_status time_calls(products *p, core_status (*run)(products *p), double *seconds) {
  for (int i = 0; i < WARM_UP; i++) TRY(run(p));
  TRY(p->ops->device->stream_wait(NULL));
  const double begin = core_clock_now();
  for (int64_t i = 0; i < p->times; i++) TRY(run(p));
  TRY(p->ops->device->stream_wait(NULL));
  *seconds = (core_clock_now() - begin) / (double)p->times;
  return CORE_OK;
}

static core_tensor part(core_tensor t, int64_t first, int64_t rows, int64_t columns) {
  const size_t skipped = (size_t)(first * columns) * core_dtype_size(t.dtype);
  return core_tensor_2((char *)t.data + skipped, t.dtype, rows, columns);
}

static const char *const form_names[] = {[KERN_NN] = "NN", [KERN_NT] = "NT", [KERN_TN] = "TN"};

/* ---- plain ---- */

static core_status run_plain(products *p) {
  return p->ops->gemm(p->context, p->form, p->a, p->b, KERN_SET, p->result);
}

static core_status time_plain(products *p, const char *name, kern_form form, double flops, double *rate) {
  double seconds = 0;
  p->form = form;
  TRY(time_calls(p, run_plain, &seconds));
  *rate = flops / seconds;
  p->best = fmax(p->best, *rate);
  printf("{\"op\": \"%s\", \"form\": \"%s\", \"type\": \"%s\", \"TFLOP/s\": %.2f}\n", name, form_names[form],
         core_dtype_text(p->active), *rate * 1e-12);
  return CORE_OK;
}

/* The products of a feed-forward, and one that is as large as any. */
static core_status time_all_plain(products *p) {
  const int64_t t = p->t, c = p->c, s = SQUARE * c;
  const double flops = 4.0 * (double)t * (double)c * (double)c;
  double rate[3] = {0}, most = 0;
  p->a = p->left, p->b = p->right, p->result = p->square;
  TRY(time_plain(p, "gemm_square", KERN_NT, 2.0 * pow((double)s, 3), &most));
  p->a = part(p->narrow, 0, t, c), p->b = part(p->weights, 0, 2 * c, c), p->result = p->out;
  TRY(time_plain(p, "gemm", KERN_NT, flops, &rate[0]));
  p->a = p->wide, p->result = part(p->out, 0, t, c);
  TRY(time_plain(p, "gemm", KERN_NN, flops, &rate[1]));
  p->b = part(p->narrow, 0, t, c), p->result = part(p->gradients, 0, 2 * c, c);
  TRY(time_plain(p, "gemm", KERN_TN, flops, &rate[2]));
  printf("{\"op\": \"gemm_shares\", \"type\": \"%s\", \"of_best\": [%.3f, %.3f, %.3f, %.3f]}\n",
         core_dtype_text(p->active), most / p->best, rate[0] / p->best, rate[1] / p->best, rate[2] / p->best);
  return CORE_OK;
}

/* ---- grouped ---- */

/* Rows of the groups: equal; between half and one and a half of that; half of all in two groups, none in a
 * quarter of them. */
static void set_groups(products *p, int skew) {
  const int64_t fair = p->t / p->e;
  p->row[0] = 0;
  for (int64_t g = 0; g < p->e; g++) {
    const int64_t mild = fair / 2 + g * 37 % (fair + 1), extreme = g % 4 == 3 ? 0 : fair / 2;
    p->row[g + 1] = p->row[g] + (skew == 0 ? fair : skew == 1 ? mild : g < 2 ? p->t / 4 : extreme);
  }
  for (int64_t g = 0; g <= p->e; g++) p->row[g] = p->row[g] < p->t ? p->row[g] : p->t;
}

/* As training does: activations are set, gradients of weights added up. */
static core_status run_loop(products *p) {
  const int64_t c = p->c;
  for (int64_t g = 0; g < p->e; g++) {
    const int64_t first = p->row[g], n = p->row[g + 1] - first;
    if (n == 0) continue;
    const core_tensor a = part(p->narrow, first, n, c);
    if (p->form == KERN_TN)
      TRY(p->ops->gemm(p->context, KERN_TN, a, part(p->wide, first, n, c), KERN_ADD,
                       part(p->gradients, g * c, c, c)));
    else
      TRY(p->ops->gemm(p->context, p->form, a, part(p->weights, g * c, c, c), KERN_SET,
                       part(p->out, first, n, c)));
  }
  return CORE_OK;
}

static core_status run_grouped(products *p) {
  const int64_t rows = p->row[p->e], c = p->c;
  const core_tensor stack = p->form == KERN_TN ? p->gradients : p->weights;
  const core_tensor cube = core_tensor_3(stack.data, stack.dtype, p->e, c, c),
                    a = part(p->narrow, 0, rows, c);
  if (p->form == KERN_TN)
    return p->ops->gemm_grouped(p->context, KERN_TN, p->row, a, part(p->wide, 0, rows, c), KERN_ADD, cube);
  return p->ops->gemm_grouped(p->context, p->form, p->row, a, cube, KERN_SET, part(p->out, 0, rows, c));
}

static core_status time_grouped(products *p, int skew, const char *by, core_status (*run)(products *p),
                                double *loop) {
  static const char *const skews[SKEWS] = {"equal", "mild", "extreme"};
  double seconds = 0;
  TRY(time_calls(p, run, &seconds));
  const double rate = 2.0 * (double)p->row[p->e] * (double)p->c * (double)p->c / seconds;
  if (run == run_loop) *loop = rate;
  printf(
      "{\"op\": \"gemm_grouped\", \"form\": \"%s\", \"type\": \"%s\", \"groups\": %lld, \"skew\": \"%s\", "
      "\"by\": \"%s\", \"TFLOP/s\": %.2f, \"of_loop\": %.3f, \"of_best\": %.3f}\n",
      form_names[p->form], core_dtype_text(p->active), (long long)p->e, skews[skew], by, rate * 1e-12,
      rate / *loop, rate / p->best);
  return CORE_OK;
}

static core_status time_all_grouped(products *p) {
  static const char *const names[KERN_GROUPING_COUNT] = {"streams", "grouped", "strided"};
  for (int form = KERN_NN; form <= KERN_TN; form++)
    for (int skew = 0; skew < SKEWS; skew++) {
      double loop = 0;
      p->form = (kern_form)form;
      set_groups(p, skew);
      TRY(time_grouped(p, skew, "loop", run_loop, &loop));
      for (int grouping = 0; grouping < KERN_GROUPING_COUNT; grouping++) {
        if (grouping == KERN_GROUPING_GROUPED && form == KERN_TN) continue; /* they would be streams */
        if (grouping == KERN_GROUPING_STRIDED && skew != 0) continue;
        kern_cuda_set_grouping_priv(p->context, (kern_grouping)grouping);
        TRY(time_grouped(p, skew, names[grouping], run_grouped, &loop));
      }
    }
  kern_cuda_set_grouping_priv(p->context, KERN_GROUPING_STREAMS);
  return CORE_OK;
}

/* ---- all ---- */

core_status bench_products(const kern_ops *ops, kern_context *context, core_dtype active, bench_sizes sizes) {
  const int64_t t = sizes.rows, c = sizes.width, stack = (sizes.groups < 2 ? 2 : sizes.groups) * c;
  products p = {.ops = ops, .context = context, .active = active, .t = t, .c = c, .e = sizes.groups};
  p.times = sizes.times;
  p.wide = bench_normals(ops, active, t, 2 * c), p.narrow = bench_normals(ops, active, t, c);
  p.out = bench_normals(ops, active, t, 2 * c), p.weights = bench_normals(ops, active, stack, c);
  p.gradients = bench_normals(ops, CORE_FLOAT32, stack, c);
  p.left = bench_normals(ops, active, SQUARE * c, SQUARE * c);
  p.right = bench_normals(ops, active, SQUARE * c, SQUARE * c);
  p.square = bench_normals(ops, active, SQUARE * c, SQUARE * c);
  core_status status = time_all_plain(&p);
  if (status == CORE_OK) status = time_all_grouped(&p);
  core_tensor *const all[] = {&p.wide,      &p.narrow, &p.out,   &p.weights,
                              &p.gradients, &p.left,   &p.right, &p.square};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) ops->device->release(all[i]->data);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}
