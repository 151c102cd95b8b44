/* Contract cases of flat arrays: sums, changes of type, the optimizer, and what comes from a file. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"

static void case_flat(battery *b) {
  item *x = ADD(b, "x", TOL_EXACT, 1, b->s.t, b->s.c);
  item *a = ADD_ACTIVE(b, "a", TOL_EXACT, 1, b->s.t, b->s.c),
       *y = ADD_ACTIVE(b, "y", TOL_ROUND, 1, b->s.t, b->s.c);
  item *z = ADD(b, "z", TOL_ROUND, 1, b->s.t, b->s.c), *f = ADD_ACTIVE(b, "f", TOL_EXACT, 1, b->s.t, b->s.c);
  item *sum = battery_add(b, "sum of squares", CORE_FLOAT64, TOL_DOUBLE, 1, (const int64_t[]){1}, 1);
  battery_expect_ok(b, b->ops->sum_squares(b->context, x->tensor, sum->tensor));
  battery_expect_ok(b, b->ops->axpy(b->context, -1.5, a->tensor, y->tensor));
  battery_expect_ok(b, b->ops->scale(b->context, 0.3, z->tensor));
  battery_expect_ok(b, b->ops->fill(b->context, 2.5, f->tensor));
  for (int64_t i = 0; i < x->count; i++) {
    sum->ref[0] += x->ref[i] * x->ref[i];
    y->ref[i] -= 1.5 * a->ref[i];
    z->ref[i] *= 0.3;
    f->ref[i] = 2.5;
  }
}

static void ref_adamw(const kern_adamw *a, const double *g, double *p, double *m, double *v) {
  const double d = *g * a->gradient_scale;
  *p *= 1 - a->rate * a->decay;
  *m = a->beta1 * *m + (1 - a->beta1) * d;
  *v = a->beta2 * *v + (1 - a->beta2) * d * d;
  *p -= a->rate / a->correction1 * *m / (sqrt(*v) / sqrt(a->correction2) + a->epsilon);
}

/* Rounding is to nearest even exactly: every third number is half way between two. Variants: from Real, to
 * Real, neither; the shapes differ. */
static void case_cast(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, n = t * c;
  item *x = b->s.variant == 0 ? ADD(b, "x", TOL_EXACT, 1, t, c) : ADD_ACTIVE(b, "x", TOL_EXACT, 1, t, c);
  item *y = b->s.variant == 1 ? ADD(b, "y", TOL_EXACT, 1, n) : ADD_ACTIVE(b, "y", TOL_EXACT, 1, n);
  for (int64_t i = 0; i < n; i += 3) x->ref[i] = (i % 2 ? -1 : 1) * (1 + (double)(2 * (i % 128) + 1) / 256);
  battery_upload(b, x);
  battery_expect_ok(b, b->ops->cast(b->context, x->tensor, y->tensor));
  for (int64_t i = 0; i < n; i++)
    y->ref[i] = y->tensor.dtype == CORE_BFLOAT16
                    ? (double)core_float_from_bfloat(core_bfloat_from_float((float)x->ref[i]))
                    : x->ref[i];
}

/* Three steps with their own corrections, in the order of torch.optim.AdamW, on three ranges of the arrays,
 * an empty one among them; what no range names stays. With bfloat16, also the copy. */
static void case_adamw(battery *b) {
  const int64_t n = b->s.t * b->s.c;
  item *g = ADD(b, "gradient", TOL_EXACT, 1, n), *p = ADD(b, "parameter", TOL_ROUND, 1, n);
  item *m = ADD(b, "m", TOL_ROUND, 0, n), *v = ADD(b, "v", TOL_ROUND, 0, n);
  item *copy = b->active == CORE_BFLOAT16 ? ADD_ACTIVE(b, "copy", TOL_ROUND, 1, n) : NULL;
  for (int step = 1; step <= 3; step++) {
    const double c1 = 1 - pow(0.9, step), c2 = 1 - pow(0.99, step);
    const kern_adamw list[] = {{0, n / 3, 0.01, 0.9, 0.99, 1e-8, 0.1, c1, c2, 0.5},
                               {n / 2, 0, 1, 0.9, 0.99, 1e-8, 0, c1, c2, 1},
                               {n / 2, n - n / 2, 0.03, 0.9, 0.99, 1e-6, 0, c1, c2, 1}};
    battery_expect_ok(b, b->ops->adamw(b->context, list, 3, g->tensor, p->tensor, m->tensor, v->tensor,
                                       copy ? copy->tensor : (core_tensor){0}));
    for (int range = 0; range < 3; range++)
      for (int64_t i = list[range].first; i < list[range].first + list[range].count; i++) {
        ref_adamw(&list[range], &g->ref[i], &p->ref[i], &m->ref[i], &v->ref[i]);
        if (copy) copy->ref[i] = p->ref[i];
      }
  }
}

static void case_standardize(battery *b) {
  const core_dtype dtypes[] = {CORE_REAL_DTYPE, CORE_FLOAT16, CORE_BFLOAT16, CORE_FLOAT32};
  const int64_t shape[] = {b->s.t, b->s.c};
  item *x = battery_add(b, "x", dtypes[b->s.variant], TOL_EXACT, 4, shape, 2);
  item *shift = ADD(b, "shift", TOL_EXACT, 1, b->s.c), *scale = ADD(b, "scale", TOL_EXACT, 1, b->s.c);
  item *y = ADD_ACTIVE(b, "y", TOL_ROUND, 1, b->s.t, b->s.c);
  battery_expect_ok(b, b->ops->standardize(b->context, x->tensor, shift->tensor, scale->tensor, y->tensor));
  for (int64_t i = 0; i < x->count; i++)
    y->ref[i] = (x->ref[i] - shift->ref[i % b->s.c]) * scale->ref[i % b->s.c];
}

const battery_case battery_flat[] = {
    {"flat arrays", case_flat, 1, 1},
    {"cast", case_cast, 1, 3},
    {"adamw", case_adamw, 1, 1},
    {"standardize", case_standardize, 1, 4},
};
const int battery_flat_count = sizeof battery_flat / sizeof *battery_flat;
