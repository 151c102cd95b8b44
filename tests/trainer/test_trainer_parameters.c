/* Initial values depend on the seed and on names only; experts of a layer lie one after another. */
#include <math.h>
#include <stdlib.h>
#include <stdio.h>

#include "tests/support/test_unit.h"
#include "checkpoint/checkpoint.h" /* CKPT_CELL */
#include "trainer/parameter.h"

enum { EXPERTS = 4, ROWS = 6, COLUMNS = 10 };

typedef struct model {
  train_parameters set;
  core_arena *arena;
  int32_t first_expert;
} model;

static void add(model *m, const char *name, train_scope scope, train_init init, double value,
                int32_t *index) {
  train_parameter p = {.rank = 2,
                       .shape = {ROWS, COLUMNS, 1, 1},
                       .scope = scope,
                       .modality = 2,
                       .init = init,
                       .init_value = value};
  int32_t unused;
  snprintf(p.name, sizeof p.name, "%s", name);
  assert_ok(train_parameters_add(&m->set, &p, index ? index : &unused));
}

static void add_experts(model *m, int first, int count) {
  for (int e = first; e < first + count; e++) {
    char name[40];
    snprintf(name, sizeof name, "block.1.expert.%d.in", e);
    add(m, name, TRAIN_SCOPE_EXPERT, TRAIN_INIT_NORMAL, 0.02, e == first ? &m->first_expert : NULL);
  }
}

static void finish(model *m, uint64_t seed, bool training) {
  train_parameters_place(&m->set);
  assert_ok(core_arena_create("parameters", NULL, &m->arena));
  train_settings settings = {.run.seed = seed};
  train_env env = {.settings = &settings, .ops = kern_cpu(), .active = CORE_REAL_DTYPE};
  train_parameters_share(&m->set, &env, false);
  assert_ok(train_parameters_plan(&m->set, &env, m->arena, training));
  assert_ok(core_arena_commit(m->arena));
  assert_ok(train_parameters_plan(&m->set, &env, m->arena, training));
  assert_ok(train_parameters_initialise(&m->set, &env));
}

static void destroy(model *m) {
  train_parameters_free(&m->set);
  core_arena_destroy(m->arena);
}

/* All experts and both dense parameters, in one order or the other. */
static model make(uint64_t seed, bool reversed) {
  model m = {0};
  if (!reversed) add(&m, "dense.a", TRAIN_SCOPE_WORLD, TRAIN_INIT_NORMAL, 0.5, NULL);
  if (reversed) add(&m, "head.speech", TRAIN_SCOPE_MODALITY, TRAIN_INIT_NORMAL, 1, NULL);
  add_experts(&m, 0, EXPERTS);
  add(&m, "dense.b", TRAIN_SCOPE_WORLD, TRAIN_INIT_NORMAL, 0.5, NULL);
  if (reversed) add(&m, "dense.a", TRAIN_SCOPE_WORLD, TRAIN_INIT_NORMAL, 0.5, NULL);
  if (!reversed) add(&m, "head.speech", TRAIN_SCOPE_MODALITY, TRAIN_INIT_NORMAL, 1, NULL);
  finish(&m, seed, true);
  return m;
}

static const core_real *values(const model *m, const char *name) {
  for (int32_t i = 0; i < m->set.count; i++)
    if (strcmp(m->set.list[i].name, name) == 0) return train_parameter_value(&m->set, i).data;
  fail_msg("no parameter %s", name);
  return NULL;
}

static bool equal(const model *a, const char *name, const model *b, const char *other) {
  return memcmp(values(a, name), values(b, other), ROWS * COLUMNS * sizeof(core_real)) == 0;
}

static void values_depend_on_seed_and_name_only(void **state) {
  (void)state;
  model a = make(7, false), b = make(7, true), other = make(8, false), part = {0};
  add_experts(&part, 2, 2); /* what a rank with the second half of the experts declares */
  finish(&part, 7, false);
  static const char *const names[] = {"dense.a", "dense.b", "head.speech", "block.1.expert.0.in",
                                      "block.1.expert.3.in"};
  for (int i = 0; i < 5; i++) {
    assert_true(equal(&a, names[i], &b, names[i]));
    assert_false(equal(&a, names[i], &other, names[i]));
  }
  assert_false(equal(&a, "dense.a", &a, "dense.b"));
  assert_true(equal(&a, "block.1.expert.3.in", &part, "block.1.expert.3.in"));
  assert_null(part.set.gradient);
  destroy(&a);
  destroy(&b);
  destroy(&other);
  destroy(&part);
}

static void experts_are_one_block(void **state) {
  (void)state;
  model m = make(7, false);
  core_tensor all = train_parameter_matrices(&m.set, m.first_expert, EXPERTS),
              gradients = train_parameter_gradients(&m.set, m.first_expert, EXPERTS);
  assert_int_equal(all.rank, 3);
  assert_int_equal(all.shape[0], EXPERTS);
  assert_int_equal(all.shape[1], ROWS);
  assert_int_equal(all.shape[2], COLUMNS);
  for (int e = 0; e < EXPERTS; e++) {
    core_tensor one = train_parameter_value(&m.set, m.first_expert + e);
    assert_ptr_equal(one.data, (core_real *)all.data + e * ROWS * COLUMNS);
    assert_ptr_equal(train_parameter_gradient(&m.set, m.first_expert + e).data,
                     (core_real *)gradients.data + e * ROWS * COLUMNS);
  }
  destroy(&m);
}

static void scopes_are_ranges_that_do_not_overlap(void **state) {
  (void)state;
  model m = make(7, true);
  int64_t in_scope = 0;
  for (int32_t i = 0; i < m.set.count; i++) {
    const train_parameter *p = &m.set.list[i];
    int32_t scope = p->scope == TRAIN_SCOPE_MODALITY ? 2 + p->modality : (int32_t)p->scope;
    assert_true(p->first >= m.set.scope_first[scope] && p->first + p->count <= m.set.scope_first[scope + 1]);
    assert_int_equal(p->count, ROWS * COLUMNS);
    in_scope += p->count;
    for (int32_t j = 0; j < i; j++) {
      const train_parameter *q = &m.set.list[j];
      assert_true(p->first + p->count <= q->first || q->first + q->count <= p->first);
    }
  }
  assert_true(m.set.total >= in_scope && m.set.total < in_scope + 16 * (2 + CORE_MAX_MODALITIES));
  for (int64_t i = 0; i < m.set.total; i++) /* gaps too: norms run over whole ranges */
    assert_true(m.set.gradient[i] == 0 && m.set.m[i] == 0 && m.set.v[i] == 0 && isfinite(m.set.value[i]));
  destroy(&m);
}

static void kinds_of_initial_values(void **state) {
  (void)state;
  model m = {0};
  add(&m, "zero", TRAIN_SCOPE_WORLD, TRAIN_INIT_ZERO, 9, NULL);
  add(&m, "one", TRAIN_SCOPE_WORLD, TRAIN_INIT_ONE, 9, NULL);
  add(&m, "constant", TRAIN_SCOPE_WORLD, TRAIN_INIT_CONSTANT, 2.5, NULL);
  for (int i = 0; i < 20; i++) {
    char name[16];
    snprintf(name, sizeof name, "normal%d", i);
    add(&m, name, TRAIN_SCOPE_WORLD, TRAIN_INIT_NORMAL, 3, NULL);
  }
  finish(&m, 1, true);
  double mean = 0, square = 0, n = 20 * ROWS * COLUMNS;
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    assert_true(values(&m, "zero")[i] == 0);
    assert_true(values(&m, "one")[i] == 1);
    assert_true(values(&m, "constant")[i] == (core_real)2.5);
  }
  const core_real *normal = values(&m, "normal0"); /* and the nineteen after it */
  for (int i = 0; i < 20 * ROWS * COLUMNS; i++) {
    mean += (double)normal[i] / n;
    square += (double)normal[i] * (double)normal[i] / n;
  }
  assert_true(fabs(mean) < 4 * 3 / sqrt(n));
  assert_true(fabs(square / 9 - 1) < 4 * sqrt(2 / n));
  destroy(&m);
}

/* Shares of every rank: disjoint, in order, together the whole scope; cut only where a checkpoint may cut;
 * and even, up to one cell. */
static void check_shares(const train_parameters *set, int64_t total, int32_t size) {
  int64_t at = set->scope_first[0];
  for (int32_t r = 0; r < size; r++) {
    train_span share = train_parameters_share_of(set, 0, r, size);
    assert_int_equal(share.first, at);
    assert_true(share.count >= 0);
    at += share.count;
    bool legal = at == set->scope_first[0] + total;
    for (int32_t i = 0; i < set->count; i++) {
      int64_t inside = at - set->list[i].first;
      legal = legal || (inside >= 0 && inside < set->list[i].count && inside % CKPT_CELL == 0);
    }
    assert_true(legal);
    assert_true(llabs(share.count - total / size) <= CKPT_CELL + size);
  }
  assert_int_equal(at, set->scope_first[0] + total);
}

static void shares_cover_their_scope(void **state) {
  (void)state;
  static const int64_t counts[] = {7, 3 * CKPT_CELL + 5, 1, CKPT_CELL, CKPT_CELL - 1, 40, 2 * CKPT_CELL};
  train_parameters set = {0};
  int64_t total = 0;
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++, total += counts[i - 1]) {
    train_parameter p = {.rank = 1, .shape = {counts[i]}};
    int32_t index;
    snprintf(p.name, sizeof p.name, "p%zu", i);
    assert_ok(train_parameters_add(&set, &p, &index));
  }
  train_parameters_place(&set);
  for (int32_t size = 1; size <= 40; size++) check_shares(&set, total, size);
  train_span span = {set.list[1].first + 5, 2 * CKPT_CELL};
  assert_int_equal(train_parameter_within(&set.list[1], span).count, 2 * CKPT_CELL);
  assert_int_equal(train_parameter_within(&set.list[0], span).count, 0);
  assert_int_equal(train_parameter_within(&set.list[2], span).count, 0);
  train_parameters_free(&set);
}

/* Frozen ones take no room among the gradients, whose shares are cut in their own space; runs of active ones
 * are whole in both spaces. */
static void gradients_are_of_the_trained(void **state) {
  (void)state;
  static const int64_t counts[] = {3, 2 * CKPT_CELL, 5, 7, CKPT_CELL + 1};
  train_parameters set = {0};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
    train_parameter p = {.rank = 1, .shape = {counts[i]}};
    int32_t index;
    snprintf(p.name, sizeof p.name, "%s%zu", i == 1 || i == 2 ? "base" : "p", i);
    assert_ok(train_parameters_add(&set, &p, &index));
  }
  train_parameters_freeze(&set, "base*");
  train_parameters_place(&set);
  const int64_t last = CKPT_CELL + 1, want[] = {0, -1, -1, 3, 10};
  assert_true(set.gradient_total >= 10 + last && set.gradient_total < 10 + last + 16);
  for (int32_t i = 0; i < set.count; i++) assert_int_equal(set.list[i].gradient_first, want[i]);
  train_stretch run;
  int32_t from = 0;
  assert_true(train_parameters_next_active(&set, 0, &from, &run));
  assert_int_equal(run.value.count, 3);
  assert_true(train_parameters_next_active(&set, 0, &from, &run));
  assert_int_equal(run.value.first, set.list[3].first);
  assert_int_equal(run.gradient.first, 3);
  assert_int_equal(run.value.count, 7 + last);
  assert_int_equal(run.gradient.count, 7 + last);
  assert_false(train_parameters_next_active(&set, 0, &from, &run));
  train_span low = train_gradients_share_of(&set, 0, 0, 2), high = train_gradients_share_of(&set, 0, 1, 2);
  assert_int_equal(low.first + low.count, high.first);
  assert_int_equal(low.count + high.count, 10 + last);
  assert_true(high.first == 10 || high.first == 10 + CKPT_CELL); /* at an end or a cell of p4 */
  assert_int_equal(train_gradient_within(&set.list[1], (train_span){0, 10}).count, 0);
  assert_null(train_parameter_gradient(&set, 1).data);
  train_parameters_free(&set);
}

static void impossible_shapes_are_refused(void **state) {
  (void)state;
  train_parameters set = {0};
  int32_t index;
  train_parameter p = {.name = "large", .rank = 3, .shape = {1 << 20, 1 << 20, 1 << 20, 1}};
  assert_error(train_parameters_add(&set, &p, &index), CORE_ERR_ARGUMENT, "'large'");
  p.shape[1] = 0;
  assert_error(train_parameters_add(&set, &p, &index), CORE_ERR_ARGUMENT, "has dimension 0");
  p.shape[1] = -4;
  assert_error(train_parameters_add(&set, &p, &index), CORE_ERR_ARGUMENT, "has dimension -4");
  assert_int_equal(set.count, 0);
  train_parameters_free(&set);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(values_depend_on_seed_and_name_only),
      cmocka_unit_test(experts_are_one_block),
      cmocka_unit_test(scopes_are_ranges_that_do_not_overlap),
      cmocka_unit_test(kinds_of_initial_values),
      cmocka_unit_test(shares_cover_their_scope),
      cmocka_unit_test(gradients_are_of_the_trained),
      cmocka_unit_test(impossible_shapes_are_refused),
  };
  return cmocka_run_group_tests_name("trainer, parameters", tests, NULL, NULL);
}
