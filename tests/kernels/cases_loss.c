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

/* Columns [from, to) of the logits, as a tensor of their own that the battery does not judge. */
static core_tensor copy_columns(battery *b, const item *logits, int64_t from, int64_t to) {
  const int64_t rows = logits->tensor.shape[0], all = logits->tensor.shape[1], n = to - from;
  core_tensor part = core_tensor_2(NULL, CORE_REAL_DTYPE, rows, n);
  core_real *host = malloc((size_t)(rows * n) * sizeof *host + 1);
  for (int64_t i = 0; i < rows * n; i++) host[i] = (core_real)logits->ref[i / n * all + from + i % n];
  battery_expect_ok(b, b->ops->device->allocate(core_tensor_bytes(&part) + 1, &part.data));
  battery_expect_ok(b, b->ops->device->copy(part.data, host, core_tensor_bytes(&part), NULL));
  free(host);
  return part;
}

/* lse begins at -infinity, positive at 0. */
static void begin_rows(battery *b, const item *lse, const item *positive) {
  battery_expect_ok(b, b->ops->fill(b->context, -INFINITY, lse->tensor));
  battery_expect_ok(b, b->ops->fill(b->context, 0, positive->tensor));
}

/* Whole rows, then (variant 1) in three parts, of which one is empty. The gradient is Active. */
static void case_cross_entropy(battery *b) {
  const int64_t t = b->s.t, v = b->s.c * 7, cut[4] = {0, v / 3, v / 3, v};
  item *logits = ADD(b, "logits", TOL_EXACT, 3, t, v), *target = ADD_INT(b, "target", t);
  item *lse = ADD(b, "lse", TOL_SUM, 1, t), *positive = ADD(b, "positive", TOL_EXACT, 1, t);
  item *dlogits = ADD_ACTIVE(b, "dlogits", TOL_SUM, 1, t, v);
  for (int64_t i = 0; i < t; i++) target->ref[i] = i % 4 == 1 ? -1 : (double)battery_pick(b, v);
  battery_upload(b, target);
  begin_rows(b, lse, positive);
  if (b->s.variant == 0)
    battery_expect_ok(b, b->ops->cross_entropy_fwd(b->context, logits->tensor, 0, v, target->tensor,
                                                   lse->tensor, positive->tensor));
  for (int part = 0; part < 3 && b->s.variant == 1; part++) {
    core_tensor some = copy_columns(b, logits, cut[part], cut[part + 1]);
    battery_expect_ok(b, b->ops->cross_entropy_fwd(b->context, some, cut[part], v, target->tensor,
                                                   lse->tensor, positive->tensor));
    battery_expect_ok(b, b->ops->device->stream_wait(NULL));
    b->ops->device->release(some.data);
  }
  battery_expect_ok(b, b->ops->cross_entropy_bwd(b->context, 0.25, lse->tensor, 0, v, target->tensor,
                                                 logits->tensor, dlogits->tensor));
  for (int64_t i = 0; i < t; i++) {
    const int64_t own = (int64_t)target->ref[i];
    double sum = 0;
    for (int64_t j = 0; j < v; j++) sum += exp(logits->ref[i * v + j]);
    lse->ref[i] = v > 0 ? log(sum) : -INFINITY;
    positive->ref[i] = own < 0 ? 0 : logits->ref[i * v + own];
    for (int64_t j = 0; j < v; j++)
      dlogits->ref[i * v + j] = own < 0 ? 0 : 0.25 * (exp(logits->ref[i * v + j]) / sum - (j == own));
  }
}

/* In place, the last columns only: the target of a row may lie before them. */
static void case_cross_entropy_part(battery *b) {
  const int64_t t = b->s.t, n = b->s.c * 3, first = 5, all = first + n;
  item *logits = ADD(b, "logits", TOL_SUM, 2, t, n), *target = ADD_INT(b, "target", t);
  item *lse = ADD(b, "lse", TOL_EXACT, 1, t);
  for (int64_t i = 0; i < t; i++) {
    target->ref[i] = i % 4 == 1 ? -1 : (double)battery_pick(b, all);
    lse->ref[i] = (double)(core_real)(6 + lse->ref[i]);
  }
  battery_upload(b, target), battery_upload(b, lse);
  battery_expect_ok(b, b->ops->cross_entropy_bwd(b->context, 0.5, lse->tensor, first, all, target->tensor,
                                                 logits->tensor, logits->tensor));
  for (int64_t i = 0; i < t * n; i++) {
    const double own = target->ref[i / n], p = exp(logits->ref[i] - lse->ref[i / n]);
    logits->ref[i] = own < 0 ? 0 : 0.5 * (p - (own == (double)(first + i % n)));
  }
}

/* Entries that nobody looked up stay; one looked up without rows too. */
static void case_embedding(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  int64_t offset[1024];
  const kern_segments segments = battery_segments(b, t, offset);
  item *dx = ADD_ACTIVE(b, "dx", TOL_EXACT, 1, t + 2, c), *row = ADD_INT(b, "row", t);
  item *entry = ADD_INT(b, "entry", segments.count);
  item *dtable = ADD(b, "dtable", TOL_SUM, 1, segments.count + 3, c);
  for (int64_t i = 0; i < t; i++) row->ref[i] = (double)battery_pick(b, t + 2);
  for (int64_t s = 0; s < segments.count; s++) /* distinct, not in order */
    entry->ref[s] = (double)(segments.count - 1 - s + 2);
  battery_upload(b, row), battery_upload(b, entry);
  for (int time = 0; time < 2; time++) {
    battery_expect_ok(b, b->ops->embedding_bwd(b->context, segments, row->tensor, entry->tensor, dx->tensor,
                                               dtable->tensor));
    for (int64_t s = 0; s < segments.count; s++)
      for (int64_t i = offset[s]; i < offset[s + 1]; i++)
        for (int64_t j = 0; j < c; j++)
          dtable->ref[(int64_t)entry->ref[s] * c + j] += dx->ref[(int64_t)row->ref[i] * c + j];
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
    {"cross_entropy", case_cross_entropy, 1, 2},
    {"cross_entropy_part", case_cross_entropy_part, 1, 1},
    {"embedding", case_embedding, 1, 1},
    {"regression", case_regression, 1, 4},
};
const int battery_loss_count = sizeof battery_loss / sizeof *battery_loss;
