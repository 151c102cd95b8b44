/* Contract cases of the contrastive rows and of cross entropy. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"

enum { COLUMNS = 600 };

typedef struct masks {
  int64_t own[COLUMNS];
  uint8_t valid[COLUMNS];
  int32_t label[COLUMNS];
  uint64_t id[COLUMNS];
} masks;

/* A block of T rows of a batch of T + K columns: labels collide, ids collide, every seventh is invalid. */
static kern_contrastive make_masks(const battery *b, int64_t columns, masks *m) {
  for (int64_t j = 0; j < columns; j++) {
    m->own[j] = (j + b->s.k) % columns;
    m->valid[j] = j % 7 != 3;
    m->label[j] = j % 4 == 0 ? -1 : (int32_t)(j % 5);
    m->id[j] = (uint64_t)(j % 50);
  }
  return (kern_contrastive){.scale = 7, .own = m->own, .valid = m->valid, .label = m->label, .id = m->id};
}

static int open_to(const masks *m, int64_t own, int64_t j) {
  if (j == own) return 1;
  return m->valid[j] && m->id[j] != m->id[own] && !(m->label[j] >= 0 && m->label[j] == m->label[own]);
}

static void case_contrastive_fwd(battery *b) {
  const int64_t n = b->s.t, columns = n + b->s.k;
  masks *m = calloc(1, sizeof *m);
  const kern_contrastive rows = make_masks(b, columns, m);
  item *cosine = ADD(b, "cosine", TOL_EXACT, 0.3, n, columns);
  item *lse = ADD(b, "lse", TOL_SUM, 1, n), *positive = ADD(b, "positive", TOL_ROUND, 1, n);
  battery_expect_ok(
      b, b->ops->contrastive_fwd(b->context, &rows, cosine->tensor, lse->tensor, positive->tensor));
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int64_t j = 0; j < columns; j++)
      if (open_to(m, m->own[i], j)) sum += exp(7 * cosine->ref[i * columns + j]);
    lse->ref[i] = m->valid[m->own[i]] ? log(sum) : 0;
    positive->ref[i] = m->valid[m->own[i]] ? 7 * cosine->ref[i * columns + m->own[i]] : 0;
  }
  free(m);
}

static void case_contrastive_bwd(battery *b) {
  const int64_t n = b->s.t, columns = n + b->s.k;
  masks *m = calloc(1, sizeof *m);
  const kern_contrastive rows = make_masks(b, columns, m);
  item *cosine = ADD(b, "cosine", TOL_CHAIN, 0.3, n, columns);
  item *lse_row = ADD(b, "lse_row", TOL_EXACT, 1, n),
       *lse_column = ADD(b, "lse_column", TOL_EXACT, 1, columns);
  double got = 1, want = 1, size = 1;
  battery_expect_ok(b, b->ops->contrastive_bwd(b->context, &rows, 0.5, lse_row->tensor, lse_column->tensor,
                                               cosine->tensor, &got));
  for (int64_t i = 0; i < n * columns; i++) {
    const int64_t row = i / columns, j = i % columns, own = m->own[row];
    const double c = cosine->ref[i], on = m->valid[own] && open_to(m, own, j);
    const double along = on * exp(7 * c - lse_row->ref[row]), across = on * exp(7 * c - lse_column->ref[j]);
    const double positive = m->valid[own] && j == own;
    cosine->ref[i] = 0.5 * 7 * (along + across - 2 * positive);
    want += 0.5 * c * (along - positive);
    size += 0.5 * fabs(c) * (along + positive);
  }
  assert_true(fabs(got - want) <= 1e-5 * size);
  free(m);
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

const battery_case battery_loss[] = {
    {"contrastive_fwd", case_contrastive_fwd, 1, 1},
    {"contrastive_bwd", case_contrastive_bwd, 1, 1},
    {"cross_entropy", case_cross_entropy, 1, 1},
};
const int battery_loss_count = sizeof battery_loss / sizeof *battery_loss;
