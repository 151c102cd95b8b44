/* Contract cases of permutation: the plan of a dispatch, and rows moved there and back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"
#include "core/random.h"

enum { EXPERTS = 64 };

/* slot: a random injection of (t, k) into the rows of x, some -1. */
static void deal_slots(battery *b, item *slot, int64_t rows) {
  int64_t *order = malloc((size_t)(rows + 1) * sizeof *order);
  core_random_permutation(5, ++b->stream, rows, order);
  for (int64_t i = 0; i < slot->count; i++) slot->ref[i] = battery_pick(b, 5) == 0 ? -1 : (double)order[i];
  battery_upload(b, slot);
  free(order);
}

/* Variant 1 has no weights. */
static void case_combine_fwd(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, k = b->s.k, rows = t * k + 3;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 1, rows, c), *weight = ADD(b, "weight", TOL_EXACT, 1, t, k);
  item *slot = ADD_INT(b, "slot", t, k), *y = ADD_ACTIVE(b, "y", TOL_ROUND, 1, t, c);
  const core_tensor none = {0};
  deal_slots(b, slot, rows);
  battery_expect_ok(b, b->ops->combine_fwd(b->context, x->tensor, slot->tensor,
                                           b->s.variant ? none : weight->tensor, b->s.write, y->tensor));
  for (int64_t i = 0; i < t * c; i++) {
    if (b->s.write == KERN_SET) y->ref[i] = 0;
    for (int64_t j = i / c * k; j < (i / c + 1) * k; j++)
      if (slot->ref[j] >= 0)
        y->ref[i] += (b->s.variant ? 1 : weight->ref[j]) * x->ref[(int64_t)slot->ref[j] * c + i % c];
  }
}

/* Variant 1 writes dx over x. */
static void case_combine_bwd(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, k = b->s.k, rows = t * k + 3;
  item *x = ADD_ACTIVE(b, "x", b->s.variant ? TOL_ROUND : TOL_EXACT, 1, rows, c);
  item *dx = b->s.variant ? x : ADD_ACTIVE(b, "dx", TOL_ROUND, 1, rows, c);
  item *weight = ADD(b, "weight", TOL_EXACT, 1, t, k), *dweight = ADD(b, "dweight", TOL_SUM, 1, t, k);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, t, c), *slot = ADD_INT(b, "slot", t, k);
  deal_slots(b, slot, rows);
  battery_expect_ok(b, b->ops->combine_bwd(b->context, dy->tensor, x->tensor, slot->tensor, weight->tensor,
                                           dx->tensor, dweight->tensor));
  for (int64_t j = 0; j < t * k; j++) {
    const int64_t at = (int64_t)slot->ref[j] * c;
    double dot = 0;
    for (int64_t i = 0; slot->ref[j] >= 0 && i < c; i++) {
      dot += x->ref[at + i] * dy->ref[j / k * c + i];
      dx->ref[at + i] = weight->ref[j] * dy->ref[j / k * c + i];
    }
    dweight->ref[j] = dot;
  }
}

static void case_gather_rows(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, rows = b->s.e;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 1, rows, c), *y = ADD_ACTIVE(b, "y", TOL_EXACT, 1, t, c);
  item *index = ADD_INT(b, "index", t);
  for (int64_t i = 0; i < t; i++) index->ref[i] = (double)battery_pick(b, rows);
  battery_upload(b, index);
  battery_expect_ok(b, b->ops->gather_rows(b->context, x->tensor, index->tensor, y->tensor));
  for (int64_t i = 0; i < t * c; i++) y->ref[i] = x->ref[(int64_t)index->ref[i / c] * c + i % c];
}

/* Variant 1 keeps everything. Rows of a segment by expert, within it by token and choice. */
static void case_dispatch_plan(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = b->s.k < e ? b->s.k : e, room = t * k + 2;
  item *choice = ADD_INT(b, "choice", t, k), *slot = ADD_INT(b, "slot", t, k),
       *index = ADD_INT(b, "index", room);
  item *keep = battery_add(b, "keep", CORE_UINT8, TOL_EXACT, 0, (const int64_t[]){t, k}, 2);
  const core_tensor none = {0};
  int64_t count[EXPERTS], row = 0;
  for (int64_t i = 0; i < t * k; i++) {
    choice->ref[i] = (double)((i / k * 3 + i % k) % e); /* distinct within a token */
    keep->ref[i] = battery_pick(b, 4) != 0;
  }
  battery_upload(b, choice), battery_upload(b, keep);
  battery_expect_ok(b, b->ops->dispatch_plan(b->context, choice->tensor, b->s.variant ? none : keep->tensor,
                                             e, count, slot->tensor, index->tensor));
  for (int64_t i = 0; i < t * k; i++) slot->ref[i] = -1;
  for (int64_t j = 0; j < e; j++) {
    const int64_t begin = row;
    for (int64_t i = 0; i < t * k; i++) {
      if ((int64_t)choice->ref[i] != j || (!b->s.variant && keep->ref[i] == 0)) continue;
      index->ref[row] = (double)(i / k);
      slot->ref[i] = (double)row++;
    }
    assert_int_equal(count[j], row - begin);
  }
}

/* Rows that no slot names stay. */
static void case_dropout(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, k = b->s.k, rows = t * k + 3, blocks = (c + 3) / 4;
  item *x = ADD_ACTIVE(b, "x", TOL_ROUND, 1, rows, c), *slot = ADD_INT(b, "slot", t, k);
  item *key = battery_add(b, "key", CORE_UINT64, TOL_EXACT, 0, &t, 1);
  for (int64_t i = 0; i < t; i++) key->ref[i] = (double)(i * 3 + 1);
  battery_upload(b, key);
  deal_slots(b, slot, rows);
  battery_expect_ok(b, b->ops->dropout(b->context, 5, 6, 0.3, key->tensor, slot->tensor, x->tensor));
  for (int64_t i = 0; i < t * k; i++)
    for (int64_t j = 0; slot->ref[i] >= 0 && j < c; j++) {
      const uint64_t place = (uint64_t)(((int64_t)key->ref[i / k] * k + i % k) * blocks + j / 4);
      const double word = core_random_at(5, 6, place).word[j % 4];
      double *value = &x->ref[(int64_t)slot->ref[i] * c + j];
      *value = word < 0.3 * 4294967296.0 ? 0 : *value / (1 - 0.3);
    }
}

const battery_case battery_permutation[] = {
    {"dispatch_plan", case_dispatch_plan, 1, 2},
    {"combine_fwd", case_combine_fwd, 2, 2},
    {"combine_bwd", case_combine_bwd, 1, 2},
    {"gather_rows", case_gather_rows, 1, 1},
    {"dropout", case_dropout, 1, 1},
};
const int battery_permutation_count = sizeof battery_permutation / sizeof *battery_permutation;
