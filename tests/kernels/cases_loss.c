/* Contract cases of the contrastive rows and of cross entropy. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"

typedef struct masks {
  item *valid, *label, *id;
  kern_contrastive rows;
} masks;

/* A block of T rows of a batch of T + K columns, from column K on: labels collide, ids collide, every seventh
 * is invalid. Variant 1 has neither labels nor ids. */
static masks make_masks(battery *b, int64_t columns) {
  masks m = {.valid = battery_add(b, "valid", CORE_UINT8, TOL_EXACT, 0, &columns, 1),
             .label = battery_add(b, "label", CORE_INT32, TOL_EXACT, 0, &columns, 1),
             .id = battery_add(b, "id", CORE_UINT64, TOL_EXACT, 0, &columns, 1)};
  for (int64_t j = 0; j < columns; j++) {
    m.valid->ref[j] = j % 7 != 3;
    m.label->ref[j] = b->s.variant || j % 4 == 0 ? -1 : (double)(j % 5);
    m.id->ref[j] = (double)(b->s.variant ? j : j % 50);
  }
  battery_upload(b, m.valid), battery_upload(b, m.label), battery_upload(b, m.id);
  m.rows = (kern_contrastive){.scale = 7, .first = b->s.k, .valid = m.valid->tensor};
  if (!b->s.variant) m.rows.label = m.label->tensor, m.rows.id = m.id->tensor;
  return m;
}

static int open_to(const masks *m, int64_t own, int64_t j) {
  if (j == own) return 1;
  return m->valid->ref[j] != 0 && m->id->ref[j] != m->id->ref[own] &&
         !(m->label->ref[j] >= 0 && m->label->ref[j] == m->label->ref[own]);
}

static void case_contrastive_fwd(battery *b) {
  const int64_t n = b->s.t, columns = n + b->s.k;
  const masks m = make_masks(b, columns);
  item *cosine = ADD(b, "cosine", TOL_EXACT, 0.3, n, columns);
  item *lse = ADD(b, "lse", TOL_SUM, 1, n), *positive = ADD(b, "positive", TOL_ROUND, 1, n);
  battery_expect_ok(
      b, b->ops->contrastive_fwd(b->context, &m.rows, cosine->tensor, lse->tensor, positive->tensor));
  for (int64_t i = 0; i < n; i++) {
    const int64_t own = m.rows.first + i;
    double sum = 0;
    for (int64_t j = 0; j < columns; j++)
      if (open_to(&m, own, j)) sum += exp(7 * cosine->ref[i * columns + j]);
    lse->ref[i] = m.valid->ref[own] != 0 ? log(sum) : 0;
    positive->ref[i] = m.valid->ref[own] != 0 ? 7 * cosine->ref[i * columns + own] : 0;
  }
}

static void case_contrastive_bwd(battery *b) {
  const int64_t n = b->s.t, columns = n + b->s.k;
  const masks m = make_masks(b, columns);
  item *cosine = ADD(b, "cosine", TOL_CHAIN, 0.3, n, columns);
  item *lse_row = ADD(b, "lse_row", TOL_EXACT, 1, n),
       *lse_column = ADD(b, "lse_column", TOL_EXACT, 1, columns);
  item *dscale = battery_add(b, "dscale", CORE_FLOAT64, TOL_SUM, 1, (const int64_t[]){1}, 1);
  battery_expect_ok(b, b->ops->contrastive_bwd(b->context, &m.rows, 0.5, lse_row->tensor, lse_column->tensor,
                                               cosine->tensor, dscale->tensor));
  for (int64_t i = 0; i < n * columns; i++) {
    const int64_t row = i / columns, j = i % columns, own = m.rows.first + row;
    const double c = cosine->ref[i], on = m.valid->ref[own] != 0 && open_to(&m, own, j);
    const double along = on * exp(7 * c - lse_row->ref[row]), across = on * exp(7 * c - lse_column->ref[j]);
    const double positive = m.valid->ref[own] != 0 && j == own;
    cosine->ref[i] = 0.5 * 7 * (along + across - 2 * positive);
    dscale->ref[0] += 0.5 * c * (along - positive);
  }
}

static void case_cross_entropy(battery *b) {
  const int64_t t = b->s.t, v = b->s.c * 7;
  item *logits = ADD(b, "logits", TOL_SUM, 3, t, v), *target = ADD_INT(b, "target", t);
  item *lse = ADD(b, "lse", TOL_SUM, 1, t), *loss = ADD(b, "loss", TOL_SUM, 1, t);
  for (int64_t i = 0; i < t; i++) target->ref[i] = i % 4 == 1 ? -1 : (double)battery_pick(b, v);
  battery_upload(b, target);
  battery_expect_ok(
      b, b->ops->cross_entropy_fwd(b->context, logits->tensor, target->tensor, lse->tensor, loss->tensor));
  battery_expect_ok(b,
                    b->ops->cross_entropy_bwd(b->context, 0.25, lse->tensor, target->tensor, logits->tensor));
  for (int64_t i = 0; i < t; i++) {
    double sum = 0;
    for (int64_t j = 0; j < v; j++) sum += exp(logits->ref[i * v + j]);
    lse->ref[i] = log(sum);
    loss->ref[i] = target->ref[i] < 0 ? 0 : log(sum) - logits->ref[i * v + (int64_t)target->ref[i]];
    for (int64_t j = 0; j < v; j++) {
      const double p = exp(logits->ref[i * v + j]) / sum;
      logits->ref[i * v + j] = target->ref[i] < 0 ? 0 : 0.25 * (p - (j == (int64_t)target->ref[i]));
    }
  }
}

/* Variants: the kind, and from 2 on without a gradient. Every fifth row is not valid. */
static void case_regression(battery *b) {
  const int64_t t = b->s.t, d = b->s.c;
  const kern_regression kind = (kern_regression)(b->s.variant % 2);
  item *p = ADD(b, "prediction", TOL_EXACT, 1, t, d), *y = ADD(b, "target", TOL_EXACT, 1, t, d);
  item *valid = battery_add(b, "valid", CORE_UINT8, TOL_EXACT, 0, &t, 1),
       *loss = ADD(b, "loss", TOL_SUM, 1, t);
  item *dp = ADD_ACTIVE(b, "dprediction", TOL_ROUND, 1, t, d);
  for (int64_t i = 0; i < t; i++) valid->ref[i] = i % 5 != 2;
  battery_upload(b, valid);
  battery_expect_ok(b, b->ops->regression(b->context, kind, 0.75, p->tensor, y->tensor, valid->tensor,
                                          loss->tensor, b->s.variant < 2 ? dp->tensor : (core_tensor){0}));
  for (int64_t i = 0; i < t; i++) loss->ref[i] = 0;
  for (int64_t i = 0; i < t * d; i++) {
    const double e = p->ref[i] - y->ref[i], on = valid->ref[i / d], size = fabs(e);
    const double smooth = size < 1 ? e * e / 2 : size - 0.5, slope = size < 1 ? e : copysign(1, e);
    loss->ref[i / d] += on * (kind == KERN_SQUARED ? e * e : smooth / (double)d);
    if (b->s.variant < 2) dp->ref[i] = 0.75 * on * (kind == KERN_SQUARED ? 2 * e : slope / (double)d);
  }
}

const battery_case battery_loss[] = {
    {"contrastive_fwd", case_contrastive_fwd, 1, 2},
    {"contrastive_bwd", case_contrastive_bwd, 1, 2},
    {"cross_entropy", case_cross_entropy, 1, 1},
    {"regression", case_regression, 1, 4},
};
const int battery_loss_count = sizeof battery_loss / sizeof *battery_loss;
