/* The CUDA backend beside the CPU's at shapes that the battery's naive references would take too long for:
 * every width at which a kernel changes its form, many experts, long segments, many choices. The CPU is the
 * specification; the battery judges it. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "core/random.h"
#include "kernels/cuda/cuda_grouping_impl.h" /* kern_grouping */
#include "twin.h"

enum { SKIPPED = 77 };

static const core_tensor none;

static session shared;

static void each_type(void (*run)(session *s)) {
  for (int type = 0; type < 2; type++) {
    shared.active = type == 0 ? CORE_FLOAT32 : CORE_BFLOAT16;
    run(&shared);
  }
}

/* --- rows of every width at which the team changes --- */
static void run_norms(session *s) {
  const int64_t widths[] = {128, 512, 516, 520, 1024, 1032, 2048, 2056, 3001, 4096, 8192};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    const int64_t t = 13, c = widths[w];
    twin *x = twin_add_active(s, "x", 2, t, c), *y = twin_add_active(s, "y", 0, t, c),
         *inv = twin_add_real(s, "inv", 0, 1, t);
    twin *weight = twin_add_real(s, "weight", 1, 1, c), *bias = twin_add_real(s, "bias", 1, 1, c);
    twin *dy = twin_add_active(s, "dy", 1, t, c), *dx = twin_add_active(s, "dx", 1, t, c);
    twin *dweight = twin_add_real(s, "dweight", 1, 1, c), *dbias = twin_add_real(s, "dbias", 1, 1, c);
    twin *stat = twin_add_real(s, "stat", 0, t, 2), *z = twin_add_active(s, "z", 0, t, c);
    BOTH(s, rmsnorm_fwd, x->of[side], line(weight->of[side]), 1e-5, y->of[side], line(inv->of[side]));
    BOTH(s, rmsnorm_bwd, dy->of[side], x->of[side], line(weight->of[side]), line(inv->of[side]), KERN_ADD,
         dx->of[side], line(dweight->of[side]));
    BOTH(s, layernorm_fwd, x->of[side], line(weight->of[side]), line(bias->of[side]), 1e-5, z->of[side],
         stat->of[side]);
    BOTH(s, layernorm_bwd, dy->of[side], x->of[side], line(weight->of[side]), stat->of[side], KERN_SET,
         dx->of[side], line(dweight->of[side]), line(dbias->of[side]));
    BOTH(s, bias_bwd, dy->of[side], line(dbias->of[side]));
    twin_finish(s, c);
  }
}
static void norms_match_at_every_width(void **state) {
  (void)state;
  each_type(run_norms);
}

static void run_rows(session *s) {
  const int64_t widths[] = {300, 1100, 2048, 2304, 4096};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    const int64_t t = 9, c = widths[w], k = 3;
    twin *x = twin_add_active(s, "x", 1, t * k, c), *y = twin_add_active(s, "y", 1, t, c);
    twin *weight = twin_add_real(s, "weight", 1, t, k), *dweight = twin_add_real(s, "dweight", 0, t, k);
    twin *slot = twin_add(s, "slot", CORE_INT32, 0, t, k), *dx = twin_add_active(s, "dx", 1, t * k, c);
    for (int64_t i = 0; i < t * k; i++)
      ((int32_t *)slot->of[CPU].data)[i] = i % 5 == 4 ? -1 : (int32_t)(t * k - 1 - i);
    twin_publish(s, slot);
    twin *r = twin_add_real(s, "r", 1, t, c), *unit = twin_add_real(s, "unit", 0, t, c),
         *norm = twin_add_real(s, "norm", 0, 1, t);
    twin *logits = twin_add_real(s, "logits", 2, t, c), *target = twin_add(s, "target", CORE_INT32, 0, 1, t);
    twin *lse = twin_add_real(s, "lse", 0, 1, t), *loss = twin_add_real(s, "loss", 0, 1, t);
    twin *valid = twin_add(s, "valid", CORE_UINT8, 0, 1, t), *key = twin_add(s, "key", CORE_UINT64, 0, 1, t);
    for (int64_t i = 0; i < t; i++) ((uint8_t *)valid->of[CPU].data)[i] = i % 4 != 1;
    for (int64_t i = 0; i < t; i++) ((uint64_t *)key->of[CPU].data)[i] = (uint64_t)(i * 77);
    twin_publish(s, valid), twin_publish(s, key);
    const int64_t row[] = {0, 0, 4, 4, 5, t};
    twin *biases = twin_add_real(s, "biases", 1, 5, c);
    BOTH(s, bias_grouped_fwd, row, biases->of[side], y->of[side]);
    BOTH(s, bias_grouped_bwd, row, y->of[side], biases->of[side]);
    BOTH(s, dropout, 1, 2, 0.25, line(key->of[side]), slot->of[side], x->of[side]);
    BOTH(s, combine_fwd, x->of[side], slot->of[side], weight->of[side], KERN_ADD, y->of[side]);
    BOTH(s, combine_bwd, y->of[side], x->of[side], slot->of[side], weight->of[side], dx->of[side],
         dweight->of[side]);
    BOTH(s, l2norm_fwd, r->of[side], unit->of[side], line(norm->of[side]));
    BOTH(s, l2norm_bwd, logits->of[side], unit->of[side], line(norm->of[side]), KERN_SET, y->of[side]);
    const int64_t columns = logits->of[CPU].shape[1];
    BOTH(s, cross_entropy_fwd, logits->of[side], 0, columns, line(target->of[side]), line(lse->of[side]),
         line(loss->of[side]));
    BOTH(s, cross_entropy_bwd, 0.5, line(lse->of[side]), 0, columns, line(target->of[side]), logits->of[side],
         logits->of[side]);
    BOTH(s, regression, KERN_SMOOTH_L1, 0.5, r->of[side], unit->of[side], line(valid->of[side]),
         line(loss->of[side]), y->of[side]);
    twin_finish(s, c);
  }
}
static void wide_rows_match(void **state) {
  (void)state;
  each_type(run_rows);
}

/* --- the router at every number of experts at which its rows change --- */
static void run_router(session *s) {
  const int64_t experts[] = {8, 16, 20, 32, 64, 100, 128, 256, 300, 1024};
  for (size_t w = 0; w < sizeof experts / sizeof *experts; w++) {
    const int64_t t = 70, e = experts[w], c = 72, k = 8;
    twin *x = twin_add_active(s, "x", 1, t, c), *weight = twin_add_real(s, "weight", 0.3, e, c);
    twin *bias = twin_add_real(s, "bias", 1, 1, e), *logits = twin_add_real(s, "logits", 0, t, e);
    twin *noisy = twin_add_real(s, "noisy", 0, t, e), *prob = twin_add_real(s, "prob", 0, t, e);
    twin *choice = twin_add(s, "choice", CORE_INT32, 0, t, k), *gate = twin_add_real(s, "gate", 0, t, k);
    twin *dgate = twin_add_real(s, "dgate", 1, t, k), *dlogits = twin_add_real(s, "dlogits", 1, t, e);
    twin *sums = twin_add(s, "sums", CORE_FLOAT64, 0, 1, kern_router_sums_count(e));
    twin *dx = twin_add_active(s, "dx", 1, t, c), *dweight = twin_add_real(s, "dweight", 1, e, c);
    twin *key = twin_add(s, "key", CORE_UINT64, 0, 1, t), *dbias = twin_add_real(s, "dbias", 1, 1, e);
    twin *count = twin_add(s, "count", CORE_INT64, 0, 1, 2 * e + 2);
    for (int64_t i = 0; i < t; i++) ((uint64_t *)key->of[CPU].data)[i] = (uint64_t)(i * i * 1000003);
    twin_publish(s, key);
    BOTH(s, router_logits, x->of[side], weight->of[side], line(bias->of[side]), logits->of[side]);
    BOTH(s, router_noise, logits->of[side], 1, 2, line(key->of[side]), 0.25, noisy->of[side]);
    BOTH(s, router_choose, KERN_GATE_RENORMALISED, noisy->of[side], prob->of[side], choice->of[side],
         gate->of[side]);
    BOTH(s, softmax_fwd, logits->of[side], prob->of[side]);
    BOTH(s, router_gate_bwd, KERN_GATE_SOFTMAX, dgate->of[side], prob->of[side], choice->of[side],
         gate->of[side], KERN_ADD, dlogits->of[side]);
    BOTH(s, router_sums, logits->of[side], prob->of[side], noisy->of[side], choice->of[side], 0.25,
         line(sums->of[side]));
    BOTH(s, router_sums_bwd, line(sums->of[side]), logits->of[side], prob->of[side], noisy->of[side],
         choice->of[side], 0.25, dlogits->of[side]);
    BOTH(s, router_count, choice->of[side], choice->of[side], line(count->of[side]));
    BOTH(s, router_logits_bwd, dlogits->of[side], x->of[side], weight->of[side], KERN_ADD, dx->of[side],
         dweight->of[side], line(dbias->of[side]));
    twin_finish(s, e);
  }
}
static void router_matches_at_every_number_of_experts(void **state) {
  (void)state;
  each_type(run_router);
}

/* What follows the choice, likewise. */
static void run_gates(session *s) {
  const int64_t experts[] = {8, 16, 20, 32, 64, 100, 128, 256, 300, 1024};
  for (size_t w = 0; w < sizeof experts / sizeof *experts; w++) {
    const int64_t t = 70, e = experts[w], k = 8, groups = 3;
    twin *logits = twin_add_real(s, "logits", 1, t, e), *prob = twin_add_real(s, "prob", 0, t, e);
    twin *choice = twin_add(s, "choice", CORE_INT32, 0, t, k), *gate = twin_add_real(s, "gate", 0, t, k);
    twin *correction = twin_add_real(s, "correction", 0.3, t, e), *dgate = twin_add_real(s, "dgate", 1, t, k);
    twin *dprob = twin_add_real(s, "dprob", 1, t, e), *dlogits = twin_add_real(s, "dlogits", 1, t, e);
    twin *dcorrection = twin_add_real(s, "dcorrection", 1, t, e),
         *two = twin_add(s, "two", CORE_INT32, 0, t, 2);
    twin *key = twin_add(s, "key", CORE_UINT64, 0, 1, t), *group = twin_add(s, "group", CORE_INT32, 0, 1, t);
    twin *sums = twin_add(s, "sums", CORE_FLOAT64, 0, groups, 1 + 2 * e);
    twin *weights = twin_add(s, "weights", CORE_FLOAT64, 0, groups, e);
    for (int64_t i = 0; i < t; i++) {
      ((uint64_t *)key->of[CPU].data)[i] = (uint64_t)(i * i * 1000003);
      ((int32_t *)group->of[CPU].data)[i] = (int32_t)(i * 7 % groups);
    }
    for (int64_t i = 0; i < groups * e; i++) ((double *)weights->of[CPU].data)[i] = (double)(i % 5) - 1.5;
    twin_publish(s, key), twin_publish(s, group), twin_publish(s, weights);
    BOTH(s, router_choose, KERN_GATE_SOFTMAX, logits->of[side], prob->of[side], choice->of[side],
         gate->of[side]);
    BOTH(s, router_gate_fwd, KERN_GATE_RENORMALISED, KERN_CALIBRATE_MULTIPLY, prob->of[side],
         correction->of[side], choice->of[side], gate->of[side]);
    BOTH(s, router_calibrated_bwd, KERN_GATE_SOFTMAX, KERN_CALIBRATE_MULTIPLY, dgate->of[side],
         prob->of[side], correction->of[side], choice->of[side], dprob->of[side], dcorrection->of[side]);
    BOTH(s, softmax_bwd, dprob->of[side], prob->of[side], KERN_ADD, dlogits->of[side]);
    BOTH(s, router_second, logits->of[side], 1, 2, line(key->of[side]), two->of[side]);
    BOTH(s, router_balance, prob->of[side], choice->of[side], line(group->of[side]), k, sums->of[side]);
    BOTH(s, router_balance_bwd, weights->of[side], line(group->of[side]), prob->of[side], dlogits->of[side]);
    twin_finish(s, e);
  }
}
static void gates_match_at_every_number_of_experts(void **state) {
  (void)state;
  each_type(run_gates);
}

/* Enough pairs that a stretch grows beyond its least length, and experts that nobody chooses. */
static void dispatch_plans_are_the_same(void **state) {
  (void)state;
  session *s = &shared;
  const int64_t t = 40000, k = 8, experts = 900;
  int64_t counts[SIDES][CORE_MAX_EXPERTS];
  twin *choice = twin_add(s, "choice", CORE_INT32, 0, t, k), *slot = twin_add(s, "slot", CORE_INT32, 0, t, k);
  twin *index = twin_add(s, "index", CORE_INT32, 0, 1, t * k);
  for (int64_t i = 0; i < t * k; i++)
    ((int32_t *)choice->of[CPU].data)[i] = (int32_t)(core_random_below(1, 2, (uint64_t)i, 30) * 30);
  twin_publish(s, choice);
  BOTH(s, dispatch_plan, choice->of[side], none, experts, counts[side], slot->of[side],
       line(index->of[side]));
  assert_memory_equal(counts[CPU], counts[CUDA], (size_t)experts * sizeof(int64_t));
  twin_finish(s, experts);
}

/* --- segments --- */
typedef struct packed {
  int64_t offset[64], count;
  core_tensor device[SIDES];
} packed;

static kern_segments segments_of(const packed *p, int side) {
  return (kern_segments){.offset = p->offset, .device_offset = p->device[side], .count = p->count};
}

/* Lengths with a long one and an empty one among short ones. */
static int64_t pack(session *s, packed *p) {
  const int64_t lengths[] = {1, 0, 31, 33, 5, 200, 4, 4, 64, 17};
  p->count = sizeof lengths / sizeof *lengths;
  p->offset[0] = 0;
  for (int64_t i = 0; i < p->count; i++) p->offset[i + 1] = p->offset[i] + lengths[i];
  twin *offset = twin_add(s, "offset", CORE_INT64, 0, 1, p->count + 1);
  memcpy(offset->of[CPU].data, p->offset, (size_t)(p->count + 1) * sizeof(int64_t));
  twin_publish(s, offset);
  for (int side = 0; side < SIDES; side++) p->device[side] = line(offset->of[side]);
  return p->offset[p->count];
}

static void run_attention(session *s) {
  const int32_t widths[] = {24, 32, 64, 80, 128, 160, 256};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
    for (int mask = 0; mask < 2; mask++) {
      packed p;
      const int32_t heads = 4, kv = w % 2 == 0 ? 2 : 4, a = widths[w];
      const int64_t t = pack(s, &p), row = (heads + 2 * kv) * a;
      twin *qkv = twin_add_active(s, "qkv", 1, t, row), *out = twin_add_active(s, "out", 0, t, heads * a);
      twin *lse = twin_add_real(s, "lse", 0, t, heads), *dout = twin_add_active(s, "dout", 1, t, heads * a);
      twin *dqkv = twin_add_active(s, "dqkv", 1, t, row);
      for (int side = 0; side < SIDES; side++) {
        const kern_attention at = {segments_of(&p, side), heads, kv, a, (kern_mask)mask, 1 / sqrt(a)};
        twin_expect_ok(
            s->ops[side]->attention_fwd(s->context[side], &at, qkv->of[side], out->of[side], lse->of[side]));
      }
      for (int side = 0; side < SIDES; side++) {
        const kern_attention at = {segments_of(&p, side), heads, kv, a, (kern_mask)mask, 1 / sqrt(a)};
        twin_expect_ok(s->ops[side]->attention_bwd(s->context[side], &at, dout->of[side], qkv->of[side],
                                                   out->of[side], lse->of[side], dqkv->of[side]));
      }
      /* delta comes from the rounded output, which the CPU does without */
      s->bar = s->active == CORE_BFLOAT16 ? 1e-5 : 0;
      twin_finish(s, a);
    }
}
static void attention_matches_at_every_head_width(void **state) {
  (void)state;
  each_type(run_attention);
}

/* 50 queries an item, of which one is absent. */
static int64_t pack_queries(session *s, packed *p, int64_t each) {
  p->offset[0] = 0;
  for (int64_t i = 0; i < p->count; i++) p->offset[i + 1] = p->offset[i] + (i == 1 ? 0 : each);
  twin *offset = twin_add(s, "queries", CORE_INT64, 0, 1, p->count + 1);
  memcpy(offset->of[CPU].data, p->offset, (size_t)(p->count + 1) * sizeof(int64_t));
  twin_publish(s, offset);
  for (int side = 0; side < SIDES; side++) p->device[side] = line(offset->of[side]);
  return p->offset[p->count];
}

static void run_cross(session *s) {
  const int32_t widths[] = {24, 64, 80, 160};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    packed keys, queries;
    const int32_t heads = 4, kv = w % 2 == 0 ? 2 : 4, a = widths[w];
    const int64_t r = pack(s, &keys);
    queries.count = keys.count;
    const int64_t t = pack_queries(s, &queries, w == 1 ? 50 : 7);
    twin *q = twin_add_active(s, "q", 1, t, heads * a), *source = twin_add_active(s, "kv", 1, r, 2 * kv * a);
    twin *out = twin_add_active(s, "out", 0, t, heads * a), *lse = twin_add_real(s, "lse", 0, t, heads);
    twin *dout = twin_add_active(s, "dout", 1, t, heads * a), *dq = twin_add_active(s, "dq", 1, t, heads * a);
    twin *dkv = twin_add_active(s, "dkv", 1, r, 2 * kv * a);
    for (int pass = 0; pass < 2; pass++)
      for (int side = 0; side < SIDES; side++) {
        const kern_attention at = {segments_of(&queries, side), heads,      kv, a,
                                   KERN_BIDIRECTIONAL,          1 / sqrt(a)};
        const kern_cross cross = {
            at, segments_of(&keys, side), q->of[side], source->of[side], out->of[side], lse->of[side]};
        twin_expect_ok(pass == 0 ? s->ops[side]->attention_cross_fwd(s->context[side], &cross)
                                 : s->ops[side]->attention_cross_bwd(s->context[side], &cross, dout->of[side],
                                                                     dq->of[side], dkv->of[side]));
      }
    s->bar = s->active == CORE_BFLOAT16 ? 1e-5 : 0; /* as above */
    twin_finish(s, a);
  }
}
static void attention_between_tensors_matches(void **state) {
  (void)state;
  each_type(run_cross);
}

/* Many short segments, so that gradients of positions are summed in stretches. */
static void run_positions(session *s) {
  const int64_t count = 400, c = 40, longest = 6;
  int64_t offset[401] = {0};
  for (int64_t i = 0; i < count; i++) offset[i + 1] = offset[i] + i * 7 % (longest + 1);
  const int64_t t = offset[count];
  twin *at = twin_add(s, "offset", CORE_INT64, 0, 1, count + 1);
  memcpy(at->of[CPU].data, offset, sizeof offset);
  twin_publish(s, at);
  twin *table = twin_add_real(s, "table", 1, longest + 2, c), *x = twin_add_active(s, "x", 1, t, c);
  twin *dtable = twin_add_real(s, "dtable", 1, longest + 2, c), *y = twin_add_active(s, "y", 0, count, c);
  for (int side = 0; side < SIDES; side++) {
    const kern_segments segments = {offset, line(at->of[side]), count};
    twin_expect_ok(s->ops[side]->position_fwd(s->context[side], segments, table->of[side], x->of[side]));
    twin_expect_ok(s->ops[side]->segment_mean_fwd(s->context[side], segments, x->of[side], y->of[side]));
    twin_expect_ok(s->ops[side]->position_bwd(s->context[side], segments, x->of[side], dtable->of[side]));
    twin_expect_ok(
        s->ops[side]->segment_mean_bwd(s->context[side], segments, y->of[side], KERN_ADD, x->of[side]));
  }
  twin_finish(s, c);
}
static void positions_of_many_segments_match(void **state) {
  (void)state;
  each_type(run_positions);
}

/* --- grouped products in every form --- */
static void group_rows(int64_t *row, int64_t groups, int64_t rows, int skew) {
  row[0] = 0;
  for (int64_t g = 0; g < groups; g++)
    row[g + 1] = row[g] + (skew == 0 ? rows / groups : skew == 1 ? (g * 5) % 14 : g == 2 ? rows : 0);
}

static void run_groups(session *s) {
  for (int form = KERN_NN; form <= KERN_TN; form++)
    for (int skew = 0; skew < 3; skew++)
      for (int grouping = 0; grouping < KERN_GROUPING_COUNT; grouping++) {
        const int64_t groups = 8, n = 48, k = 32;
        int64_t row[9];
        group_rows(row, groups, 64, skew);
        const int64_t rows = row[groups], wide = form == KERN_NT ? k : n;
        twin *a = twin_add_active(s, "a", 1, rows, wide);
        twin *b =
            form == KERN_TN ? twin_add_active(s, "b", 1, rows, k) : twin_add_active(s, "b", 1, groups * n, k);
        twin *c = form == KERN_TN ? twin_add_real(s, "c", 1, groups * n, k)
                                  : twin_add_active(s, "c", 1, rows, n + k - wide);
        kern_cuda_set_grouping_priv(s->context[CUDA], (kern_grouping)grouping);
        for (int write = 0; write < 2; write++)
          BOTH(s, gemm_grouped, (kern_form)form, row, a->of[side],
               form == KERN_TN ? b->of[side] : stack(b->of[side], groups), (kern_write)write,
               form == KERN_TN ? stack(c->of[side], groups) : c->of[side]);
        twin_finish(s, grouping);
      }
  kern_cuda_set_grouping_priv(s->context[CUDA], KERN_GROUPING_STREAMS);
}
static void grouped_products_match_in_every_form(void **state) {
  (void)state;
  each_type(run_groups);
}

/* --- lists and flat arrays --- */
static void run_updates(session *s) {
  enum { RANGES = 40 };
  const int64_t n = 300000;
  kern_adamw list[RANGES];
  for (int64_t i = 0, at = 0; i < RANGES; i++) {
    list[i] = (kern_adamw){.first = at,
                           .count = i * i * i % 9001,
                           .rate = 0.01 * (double)(i + 1),
                           .beta1 = 0.9,
                           .beta2 = 0.95,
                           .epsilon = 1e-8,
                           .decay = 0.1,
                           .correction1 = 0.2,
                           .correction2 = 0.1,
                           .gradient_scale = 0.5};
    at += list[i].count + (i % 3 == 0 ? 1 : 0); /* gaps are left alone, and odd beginnings */
    assert_true(at <= n);
  }
  twin *g = twin_add_real(s, "gradient", 1, 1, n), *p = twin_add_real(s, "parameter", 1, 1, n),
       *m = twin_add_real(s, "m", 0.1, 1, n);
  twin *v = twin_add_real(s, "v", 0, 1, n), *copy = twin_add(s, "copy", CORE_BFLOAT16, 1, 1, n);
  twin *sum = twin_add(s, "sum", CORE_FLOAT64, 0, 1, 1);
  /* More lists than the ring has slots, each with rates of its own. */
  for (int step = 0; step < 9; step++) {
    for (int i = 0; i < RANGES; i++) list[i].rate *= step % 2 == 0 ? 3 : 0.25;
    BOTH(s, adamw, list, RANGES, g->of[side], p->of[side], m->of[side], v->of[side],
         step % 2 == 0 ? copy->of[side] : none);
  }
  BOTH(s, sum_squares, p->of[side], line(sum->of[side]));
  BOTH(s, cast, p->of[side], copy->of[side]);
  twin_finish(s, n);
}
static void updates_of_many_ranges_match(void **state) {
  (void)state;
  shared.active = CORE_FLOAT32;
  run_updates(&shared);
}

static int open_session(void **state) {
  (void)state;
  const kern_limits limits = {.rows = 4096,
                              .width = 8192,
                              .experts = CORE_MAX_EXPERTS,
                              .sequence = 512,
                              .segments = 1024,
                              .heads = 8,
                              .updates = 64,
                              .threads = 2};
  shared.ops[CPU] = kern_cpu();
  for (int side = 0; side < SIDES; side++)
    twin_expect_ok(shared.ops[side]->context_create(&limits, &shared.context[side]));
  return 0;
}
static int close_session(void **state) {
  (void)state;
  for (int side = 0; side < SIDES; side++) shared.ops[side]->context_destroy(shared.context[side]);
  return 0;
}

int main(void) {
  if (kern_cuda(0, &shared.ops[CUDA]) != CORE_OK) {
    printf("skipped: no CUDA device: %s\n", core_error_get()->message);
    return SKIPPED;
  }
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(norms_match_at_every_width),
      cmocka_unit_test(wide_rows_match),
      cmocka_unit_test(router_matches_at_every_number_of_experts),
      cmocka_unit_test(gates_match_at_every_number_of_experts),
      cmocka_unit_test(dispatch_plans_are_the_same),
      cmocka_unit_test(attention_matches_at_every_head_width),
      cmocka_unit_test(attention_between_tensors_matches),
      cmocka_unit_test(positions_of_many_segments_match),
      cmocka_unit_test(grouped_products_match_in_every_form),
      cmocka_unit_test(updates_of_many_ranges_match),
  };
  return cmocka_run_group_tests(tests, open_session, close_session);
}
