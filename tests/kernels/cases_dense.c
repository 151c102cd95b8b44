/* Contract cases of products, biases, activations and norms. References are naive, in double. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"

/* Backward ops run twice from non-zero gradients: what is accumulated must accumulate, what is set must not.
 */
enum { TWICE = 2 };

static void ref_gemm(kern_form form, int64_t m, int64_t n, int64_t k, const double *a, const double *b,
                     kern_write write, double *c) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double sum = write == KERN_ADD ? c[i * n + j] : 0;
      for (int64_t l = 0; l < k; l++)
        sum += a[form == KERN_TN ? l * m + i : i * k + l] * b[form == KERN_NT ? j * k + l : l * n + j];
      c[i * n + j] = sum;
    }
}

/* Variants: the form, and from 3 on a result that is not Active. */
static void case_gemm(battery *b) {
  const kern_form form = (kern_form)(b->s.variant % 3);
  const int64_t m = b->s.t, n = b->s.c, k = b->s.e * 3 - 3; /* one size has an empty inner extent */
  item *x = form == KERN_TN ? ADD_ACTIVE(b, "a", TOL_EXACT, 1, k, m) : ADD_ACTIVE(b, "a", TOL_EXACT, 1, m, k);
  item *y = form == KERN_NT ? ADD_ACTIVE(b, "b", TOL_EXACT, 1, n, k) : ADD_ACTIVE(b, "b", TOL_EXACT, 1, k, n);
  item *z = b->s.variant < 3 ? ADD_ACTIVE(b, "c", TOL_SUM, 1, m, n) : ADD(b, "c", TOL_SUM, 1, m, n);
  for (int time = 0; time < TWICE; time++) {
    battery_expect_ok(b, b->ops->gemm(b->context, form, x->tensor, y->tensor, b->s.write, z->tensor));
    ref_gemm(form, m, n, k, x->ref, y->ref, b->s.write, z->ref);
    battery_settle(b, z);
  }
}

/* Rows dealt to groups unevenly, empty groups among them. Variants as above. */
static void case_gemm_grouped(battery *b) {
  const kern_form form = (kern_form)(b->s.variant % 3);
  const int64_t rows = b->s.t, groups = b->s.e, n = b->s.c, k = b->s.k * 3;
  int64_t row[65] = {0};
  for (int64_t g = 1; g <= groups; g++) row[g] = g % 3 == 0 ? row[g - 1] : rows * g / groups;
  row[groups] = rows;
  item *x = ADD_ACTIVE(b, "a", TOL_EXACT, 1, rows, form == KERN_NT ? k : n);
  item *y = form == KERN_TN ? ADD_ACTIVE(b, "b", TOL_EXACT, 1, rows, k)
                            : ADD_ACTIVE(b, "b", TOL_EXACT, 1, groups, n, k);
  const core_dtype result = b->s.variant < 3 ? b->active : CORE_REAL_DTYPE;
  const int64_t flat[] = {rows, form == KERN_NT ? n : k}, stack[] = {groups, n, k};
  item *z = form == KERN_TN ? battery_add(b, "c", result, TOL_SUM, 1, stack, 3)
                            : battery_add(b, "c", result, TOL_SUM, 1, flat, 2);
  battery_expect_ok(b,
                    b->ops->gemm_grouped(b->context, form, row, x->tensor, y->tensor, b->s.write, z->tensor));
  for (int64_t g = 0; g < groups; g++) {
    const int64_t at = row[g], r = row[g + 1] - at;
    if (form == KERN_NT)
      ref_gemm(form, r, n, k, x->ref + at * k, y->ref + g * n * k, b->s.write, z->ref + at * n);
    if (form == KERN_NN)
      ref_gemm(form, r, k, n, x->ref + at * n, y->ref + g * n * k, b->s.write, z->ref + at * k);
    if (form == KERN_TN)
      ref_gemm(form, n, k, r, x->ref + at * n, y->ref + at * k, b->s.write, z->ref + g * n * k);
  }
}

static void case_bias(battery *b) {
  item *bias = ADD(b, "bias", TOL_EXACT, 1, b->s.c), *x = ADD_ACTIVE(b, "x", TOL_ROUND, 1, b->s.t, b->s.c);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, b->s.t, b->s.c), *dbias = ADD(b, "dbias", TOL_SUM, 1, b->s.c);
  battery_expect_ok(b, b->ops->bias_fwd(b->context, bias->tensor, x->tensor));
  for (int time = 0; time < TWICE; time++)
    battery_expect_ok(b, b->ops->bias_bwd(b->context, dy->tensor, dbias->tensor));
  for (int64_t i = 0; i < x->count; i++) {
    x->ref[i] += bias->ref[i % b->s.c];
    dbias->ref[i % b->s.c] += TWICE * dy->ref[i];
  }
}

/* Rows dealt to groups unevenly, empty groups among them. */
static void case_bias_grouped(battery *b) {
  const int64_t rows = b->s.t, groups = b->s.e, c = b->s.c;
  int64_t row[65] = {0};
  for (int64_t g = 1; g <= groups; g++) row[g] = g % 3 == 0 ? row[g - 1] : rows * g / groups;
  row[groups] = rows;
  item *bias = ADD(b, "bias", TOL_EXACT, 1, groups, c), *x = ADD_ACTIVE(b, "x", TOL_ROUND, 1, rows, c);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, rows, c), *dbias = ADD(b, "dbias", TOL_SUM, 1, groups, c);
  battery_expect_ok(b, b->ops->bias_grouped_fwd(b->context, row, bias->tensor, x->tensor));
  for (int time = 0; time < TWICE; time++)
    battery_expect_ok(b, b->ops->bias_grouped_bwd(b->context, row, dy->tensor, dbias->tensor));
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = row[g] * c; i < row[g + 1] * c; i++) {
      x->ref[i] += bias->ref[g * c + i % c];
      dbias->ref[g * c + i % c] += TWICE * dy->ref[i];
    }
}

static double ref_gelu(int form, double x) {
  if (form == KERN_GELU_ERF) return 0.5 * x * (1 + erf(x / sqrt(2.0)));
  return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
static double ref_gelu_slope(int form, double x) {
  if (form == KERN_GELU_ERF) return 0.5 * (1 + erf(x / sqrt(2.0))) + x * exp(-x * x / 2) / sqrt(2 * M_PI);
  const double t = tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

/* Variants 2 and 3 run in place: y on x, dx on dy. Far down the tail a single element is good to 1e-6. */
static void case_gelu(battery *b) {
  const kern_gelu form = (kern_gelu)(b->s.variant % 2);
  const int in_place = b->s.variant >= 2;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 2, b->s.t, b->s.c),
       *y = ADD_ACTIVE(b, "y", TOL_SUM, 2, b->s.t, b->s.c);
  item *dy = ADD_ACTIVE(b, "dy", in_place ? TOL_SUM : TOL_EXACT, 1, b->s.t, b->s.c);
  item *dx = in_place ? dy : ADD_ACTIVE(b, "dx", TOL_SUM, 1, b->s.t, b->s.c);
  if (in_place) {
    for (int64_t i = 0; i < x->count; i++) y->ref[i] = x->ref[i];
    battery_upload(b, y);
  }
  battery_expect_ok(b, b->ops->gelu_fwd(b->context, form, in_place ? y->tensor : x->tensor, y->tensor));
  const kern_write write = in_place ? KERN_SET : b->s.write;
  battery_expect_ok(b, b->ops->gelu_bwd(b->context, form, dy->tensor, x->tensor, write, dx->tensor));
  for (int64_t i = 0; i < x->count; i++) {
    y->ref[i] = ref_gelu(form, x->ref[i]);
    dx->ref[i] = (write == KERN_ADD ? dx->ref[i] : 0) + dy->ref[i] * ref_gelu_slope(form, x->ref[i]);
  }
}

static void case_swiglu(battery *b) {
  const int64_t f = b->s.c;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 3, b->s.t, 2 * f), *y = ADD_ACTIVE(b, "y", TOL_ROUND, 1, b->s.t, f);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, b->s.t, f);
  item *dx = ADD_ACTIVE(b, "dx", TOL_ROUND, 1, b->s.t, 2 * f);
  battery_expect_ok(b, b->ops->swiglu_fwd(b->context, x->tensor, y->tensor));
  const double keep = b->s.write == KERN_ADD ? 1 : 0;
  for (int time = 0; time < TWICE; time++) {
    battery_expect_ok(b, b->ops->swiglu_bwd(b->context, dy->tensor, x->tensor, b->s.write, dx->tensor));
    for (int64_t i = 0; i < y->count; i++) {
      const int64_t gate = i / f * 2 * f + i % f, up = gate + f;
      const double s = 1 / (1 + exp(-x->ref[gate]));
      y->ref[i] = x->ref[gate] * s * x->ref[up];
      dx->ref[gate] = keep * dx->ref[gate] + dy->ref[i] * x->ref[up] * s * (1 + x->ref[gate] * (1 - s));
      dx->ref[up] = keep * dx->ref[up] + dy->ref[i] * x->ref[gate] * s;
    }
    battery_settle(b, dx);
  }
}

/* A gradient of a parameter, which variant 1 does without: its memory must stay as it is. */
static core_tensor unless_frozen(const battery *b, const item *gradient) {
  return b->s.variant ? (core_tensor){0} : gradient->tensor;
}

/* Gradient of y_i = w_i h_i with h = (x - mean) r; RMSNorm is the case of mean 0. */
static void ref_norm_back(const sizes *s, const double *dy, const double *x, const double *w, double mean,
                          double r, int centred, double *dx, double *dw) {
  double along = 0, level = 0;
  for (int64_t i = 0; i < s->c; i++) {
    along += dy[i] * w[i] * (x[i] - mean) * r / (double)s->c;
    level += centred * dy[i] * w[i] / (double)s->c;
  }
  for (int64_t i = 0; i < s->c; i++) {
    const double h = (x[i] - mean) * r;
    dx[i] = (s->write == KERN_ADD ? dx[i] : 0) + r * (dy[i] * w[i] - level - h * along);
    if (!s->variant) dw[i] += dy[i] * h;
  }
}

static void case_rmsnorm(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 2, t, c), *w = ADD(b, "weight", TOL_EXACT, 1, c);
  item *y = ADD_ACTIVE(b, "y", TOL_ROUND, 1, t, c), *inv = ADD(b, "inv", TOL_ROUND, 1, t);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, t, c), *dx = ADD_ACTIVE(b, "dx", TOL_CHAIN, 1, t, c);
  item *dw = ADD(b, "dweight", TOL_CHAIN, 1, c);
  battery_expect_ok(b, b->ops->rmsnorm_fwd(b->context, x->tensor, w->tensor, 1e-2, y->tensor, inv->tensor));
  for (int64_t row = 0; row < t; row++) {
    double sum = 0;
    for (int64_t i = 0; i < c; i++) sum += x->ref[row * c + i] * x->ref[row * c + i];
    inv->ref[row] = 1 / sqrt(sum / (double)c + 1e-2);
    for (int64_t i = 0; i < c; i++) y->ref[row * c + i] = x->ref[row * c + i] * inv->ref[row] * w->ref[i];
  }
  for (int time = 0; time < TWICE; time++) {
    battery_expect_ok(b, b->ops->rmsnorm_bwd(b->context, dy->tensor, x->tensor, w->tensor, inv->tensor,
                                             b->s.write, dx->tensor, unless_frozen(b, dw)));
    for (int64_t row = 0; row < t; row++)
      ref_norm_back(&b->s, dy->ref + row * c, x->ref + row * c, w->ref, 0, inv->ref[row], 0,
                    dx->ref + row * c, dw->ref);
    battery_settle(b, dx);
  }
}

static void case_layernorm(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 2, t, c), *w = ADD(b, "weight", TOL_EXACT, 1, c);
  item *bias = ADD(b, "bias", TOL_EXACT, 1, c), *y = ADD_ACTIVE(b, "y", TOL_SUM, 1, t, c);
  item *stat = ADD(b, "stat", TOL_SUM, 1, t, 2), *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, t, c);
  item *dx = ADD_ACTIVE(b, "dx", TOL_CHAIN, 1, t, c), *dw = ADD(b, "dweight", TOL_CHAIN, 1, c);
  item *dbias = ADD(b, "dbias", TOL_SUM, 1, c);
  battery_expect_ok(b, b->ops->layernorm_fwd(b->context, x->tensor, w->tensor, bias->tensor, 1e-2, y->tensor,
                                             stat->tensor));
  for (int64_t row = 0; row < t; row++) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < c; i++) mean += x->ref[row * c + i] / (double)c;
    for (int64_t i = 0; i < c; i++) square += pow(x->ref[row * c + i] - mean, 2) / (double)c;
    stat->ref[2 * row] = mean;
    stat->ref[2 * row + 1] = 1 / sqrt(square + 1e-2);
    for (int64_t i = 0; i < c; i++)
      y->ref[row * c + i] = (x->ref[row * c + i] - mean) * stat->ref[2 * row + 1] * w->ref[i] + bias->ref[i];
  }
  for (int time = 0; time < TWICE; time++) {
    battery_expect_ok(
        b, b->ops->layernorm_bwd(b->context, dy->tensor, x->tensor, w->tensor, stat->tensor, b->s.write,
                                 dx->tensor, unless_frozen(b, dw), unless_frozen(b, dbias)));
    for (int64_t row = 0; row < t; row++) {
      ref_norm_back(&b->s, dy->ref + row * c, x->ref + row * c, w->ref, stat->ref[2 * row],
                    stat->ref[2 * row + 1], 1, dx->ref + row * c, dw->ref);
      for (int64_t i = 0; !b->s.variant && i < c; i++) dbias->ref[i] += dy->ref[row * c + i];
    }
    battery_settle(b, dx);
  }
}

/* Row 0 is below the floor, where the map is linear. Only dx is Active. */
static void case_l2norm(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  item *x = ADD(b, "x", TOL_EXACT, 2, t, c), *y = ADD(b, "y", TOL_SUM, 1, t, c),
       *norm = ADD(b, "norm", TOL_SUM, 1, t);
  item *dy = ADD(b, "dy", TOL_EXACT, 1, t, c), *dx = ADD_ACTIVE(b, "dx", TOL_CHAIN, 1, t, c);
  for (int64_t i = 0; t > 2 && i < c; i++) x->ref[i] = dy->ref[i] = i == 0 ? 1e-14 : 0;
  battery_upload(b, x);
  battery_upload(b, dy);
  battery_expect_ok(b, b->ops->l2norm_fwd(b->context, x->tensor, y->tensor, norm->tensor));
  battery_expect_ok(
      b, b->ops->l2norm_bwd(b->context, dy->tensor, y->tensor, norm->tensor, b->s.write, dx->tensor));
  for (int64_t row = 0; row < t; row++) {
    double sum = 0, dot = 0;
    for (int64_t i = 0; i < c; i++) sum += pow(x->ref[row * c + i], 2);
    norm->ref[row] = sqrt(sum);
    const double floored = fmax(sqrt(sum), 1e-12);
    for (int64_t i = 0; i < c; i++) y->ref[row * c + i] = x->ref[row * c + i] / floored;
    for (int64_t i = 0; i < c; i++) dot += y->ref[row * c + i] * dy->ref[row * c + i];
    if (sqrt(sum) < 1e-12) dot = 0;
    for (int64_t i = 0; i < c; i++) {
      double *d = &dx->ref[row * c + i];
      *d = (b->s.write == KERN_ADD ? *d : 0) + (dy->ref[row * c + i] - y->ref[row * c + i] * dot) / floored;
    }
  }
}

const battery_case battery_dense[] = {
    {"gemm", case_gemm, 2, 6},       {"gemm_grouped", case_gemm_grouped, 2, 6},
    {"bias", case_bias, 1, 1},       {"bias_grouped", case_bias_grouped, 1, 1},
    {"gelu", case_gelu, 2, 4},       {"swiglu", case_swiglu, 2, 1},
    {"rmsnorm", case_rmsnorm, 2, 2}, {"layernorm", case_layernorm, 2, 2},
    {"l2norm", case_l2norm, 2, 1},
};
const int battery_dense_count = sizeof battery_dense / sizeof *battery_dense;
