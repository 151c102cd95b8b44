/* Contract cases of what follows the router's choice: gates with a calibration, a drawn second choice, sums
 * by group for a balance loss. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"
#include "core/random.h"

/* K is never more than E. */
static int64_t choices(const battery *b) {
  return b->s.k < b->s.e ? b->s.k : b->s.e;
}

static item *add_probabilities(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  item *prob = ADD(b, "prob", TOL_EXACT, 1, t, e);
  for (int64_t row = 0; row < t; row++) {
    double *p = prob->ref + row * e, sum = 0;
    for (int64_t i = 0; i < e; i++) sum += p[i] = exp(p[i]);
    for (int64_t i = 0; i < e; i++) p[i] /= sum;
  }
  battery_upload(b, prob);
  return prob;
}

/* K different experts a row, not in their order. */
static item *add_choice(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  item *choice = ADD_INT(b, "choice", t, k);
  for (int64_t i = 0; i < t * k; i++) choice->ref[i] = (double)((i / k * 5 + (k - i % k)) % e);
  battery_upload(b, choice);
  return choice;
}

/* Large enough that some corrected weights fall below the bound. */
static item *add_correction(battery *b) {
  return ADD(b, "correction", TOL_EXACT, b->s.variant / 2 == 2 ? 1.5 : 0.2, b->s.t, b->s.e);
}

/* variant: form + 2 kind, kind 0 none, 1 added, 2 multiplied. The corrected weight before the bound. */
static double raw_weight(const battery *b, const item *prob, const item *correction, int64_t at) {
  const int kind = b->s.variant / 2;
  return kind == 0   ? prob->ref[at]
         : kind == 1 ? prob->ref[at] + correction->ref[at]
                     : prob->ref[at] * (1 + correction->ref[at]);
}

/* Weights of a row's chosen; returns what they are divided by. */
static double ref_weights(const battery *b, const item *prob, const item *correction, const item *choice,
                          int64_t row, double *weight) {
  const int64_t e = b->s.e, k = choices(b);
  double sum = 0;
  for (int64_t i = 0; i < k; i++) {
    const double raw = raw_weight(b, prob, correction, row * e + (int64_t)choice->ref[row * k + i]);
    weight[i] = b->s.variant / 2 > 0 ? fmax(raw, 1e-6) : raw;
    sum += weight[i];
  }
  return b->s.variant % 2 == KERN_GATE_RENORMALISED ? sum : 1;
}

static kern_calibration kind_of(const battery *b) {
  return b->s.variant / 2 == 2 ? KERN_CALIBRATE_MULTIPLY : KERN_CALIBRATE_ADD;
}

static void case_router_gate_fwd(battery *b) {
  const int64_t t = b->s.t, k = choices(b);
  item *prob = add_probabilities(b), *correction = add_correction(b), *choice = add_choice(b);
  item *gate = ADD(b, "gate", TOL_ROUND, 1, t, k);
  battery_expect_ok(
      b, b->ops->router_gate_fwd(b->context, (kern_gate)(b->s.variant % 2), kind_of(b), prob->tensor,
                                 b->s.variant < 2 ? (core_tensor){0} : correction->tensor, choice->tensor,
                                 gate->tensor));
  for (int64_t row = 0; row < t; row++) {
    double weight[CORE_MAX_CHOICES];
    const double sum = ref_weights(b, prob, correction, choice, row, weight);
    for (int64_t i = 0; i < k; i++) gate->ref[row * k + i] = weight[i] / sum;
  }
}

/* By the full Jacobian of the row's gates. Variants as above, from 2. */
static void case_router_calibrated_bwd(battery *b) {
  b->s.variant += 2;
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  item *prob = add_probabilities(b), *correction = add_correction(b), *choice = add_choice(b);
  item *dgate = ADD(b, "dgate", TOL_EXACT, 1e-3, t, k); /* a sum at the bound divides by a millionth */
  item *dprob = ADD(b, "dprob", TOL_CHAIN, 1, t, e), *dcorrection = ADD(b, "dcorrection", TOL_CHAIN, 1, t, e);
  const bool divided = b->s.variant % 2 == KERN_GATE_RENORMALISED, adds = kind_of(b) == KERN_CALIBRATE_ADD;
  battery_expect_ok(b, b->ops->router_calibrated_bwd(b->context, (kern_gate)(b->s.variant % 2), kind_of(b),
                                                     dgate->tensor, prob->tensor, correction->tensor,
                                                     choice->tensor, dprob->tensor, dcorrection->tensor));
  for (int64_t i = 0; i < t * e; i++) dprob->ref[i] = dcorrection->ref[i] = 0;
  for (int64_t row = 0; row < t; row++) {
    double weight[CORE_MAX_CHOICES];
    const double sum = ref_weights(b, prob, correction, choice, row, weight);
    for (int64_t i = 0; i < k; i++) {
      const int64_t at = row * e + (int64_t)choice->ref[row * k + i];
      double d = 0;
      for (int64_t j = 0; j < k; j++)
        d += dgate->ref[row * k + j] * ((i == j) - (divided ? weight[j] / sum : 0)) / sum;
      if (raw_weight(b, prob, correction, at) < 1e-6) continue;
      dprob->ref[at] = adds ? d : d * (1 + correction->ref[at]);
      dcorrection->ref[at] = adds ? d : d * prob->ref[at];
    }
  }
  b->s.variant -= 2;
}

static void case_softmax_bwd(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  item *prob = add_probabilities(b), *d = ADD(b, "dprob", TOL_EXACT, 1, t, e);
  item *dlogits = ADD(b, "dlogits", TOL_SUM, 1, t, e);
  battery_expect_ok(b, b->ops->softmax_bwd(b->context, d->tensor, prob->tensor, b->s.write, dlogits->tensor));
  for (int64_t at = 0; at < t * e; at++) {
    double sum = 0;
    for (int64_t j = 0; j < e; j++) sum += d->ref[at / e * e + j] * prob->ref[at / e * e + j];
    dlogits->ref[at] = (b->s.write == KERN_ADD ? dlogits->ref[at] : 0) + prob->ref[at] * (d->ref[at] - sum);
  }
}

/* The first choices stay; a row of one value everywhere shows the noise alone. */
static void case_router_second(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  if (e < 2) return;
  item *logits = ADD(b, "logits", TOL_EXACT, 1, t, e), *choice = ADD_INT(b, "choice", t, 2);
  item *key = battery_add(b, "key", CORE_UINT64, TOL_EXACT, 0, (const int64_t[]){t}, 1);
  for (int64_t i = 0; i < t; i++) {
    key->ref[i] = (double)(i * i + 5);
    choice->ref[2 * i] = choice->ref[2 * i + 1] = (double)(i * 3 % e);
    for (int64_t j = 0; i % 4 == 0 && j < e; j++) logits->ref[i * e + j] = -3;
  }
  battery_upload(b, key), battery_upload(b, choice), battery_upload(b, logits);
  battery_expect_ok(b, b->ops->router_second(b->context, logits->tensor, 3, 4, key->tensor, choice->tensor));
  for (int64_t row = 0; row < t; row++) {
    double most = -INFINITY;
    for (int64_t i = 0; i < e; i++) {
      const uint64_t index = (uint64_t)key->ref[row] * (uint64_t)e + (uint64_t)i;
      const double value = logits->ref[row * e + i] - log(-log(core_random_uniform(3, 4, index)));
      if (i == (int64_t)choice->ref[2 * row] || value <= most) continue;
      most = value;
      choice->ref[2 * row + 1] = (double)i;
    }
  }
}

enum { GROUPS = 5 };

/* Groups lie mixed; the last but one is empty. */
static item *add_groups(battery *b) {
  item *group = ADD_INT(b, "group", b->s.t);
  for (int64_t i = 0; i < b->s.t; i++) {
    const int64_t its = i * 7 / 3 % (GROUPS - 1);
    group->ref[i] = (double)(its == GROUPS - 2 ? GROUPS - 1 : its);
  }
  battery_upload(b, group);
  return group;
}

/* Variant 0 counts first choices, 1 all; sums start from random numbers. Variant 2 has one group. */
static void case_router_balance(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b), columns = b->s.variant == 0 ? 1 : k;
  const int64_t groups = b->s.variant == 2 ? 1 : GROUPS;
  item *prob = add_probabilities(b), *choice = add_choice(b), *group = add_groups(b);
  item *sums = battery_add(b, "sums", CORE_FLOAT64, TOL_DOUBLE, 1, (const int64_t[]){groups, 1 + 2 * e}, 2);
  for (int64_t i = 0; groups == 1 && i < t; i++) group->ref[i] = 0;
  battery_upload(b, group);
  battery_expect_ok(b, b->ops->router_balance(b->context, prob->tensor, choice->tensor, group->tensor,
                                              columns, sums->tensor));
  for (int64_t row = 0; row < t; row++) {
    double *of = sums->ref + (int64_t)group->ref[row] * (1 + 2 * e);
    of[0] += 1;
    for (int64_t i = 0; i < e; i++) of[1 + i] += prob->ref[row * e + i];
    for (int64_t i = 0; i < columns; i++) of[1 + e + (int64_t)choice->ref[row * k + i]] += 1;
  }
}

static void case_router_balance_bwd(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  item *prob = add_probabilities(b), *group = add_groups(b), *dlogits = ADD(b, "dlogits", TOL_SUM, 1, t, e);
  item *weights = battery_add(b, "weights", CORE_FLOAT64, TOL_EXACT, 1, (const int64_t[]){GROUPS, e}, 2);
  battery_expect_ok(b, b->ops->router_balance_bwd(b->context, weights->tensor, group->tensor, prob->tensor,
                                                  dlogits->tensor));
  for (int64_t at = 0; at < t * e; at++) {
    const double *w = weights->ref + (int64_t)group->ref[at / e] * e, *p = prob->ref + at / e * e;
    for (int64_t j = 0; j < e; j++) dlogits->ref[at] += w[j] * p[j] * ((j == at % e) - p[at % e]);
  }
}

const battery_case battery_gates[] = {
    {"router_gate_fwd", case_router_gate_fwd, 1, 6},
    {"router_calibrated_bwd", case_router_calibrated_bwd, 1, 4},
    {"softmax_bwd", case_softmax_bwd, 2, 1},
    {"router_second", case_router_second, 1, 1},
    {"router_balance", case_router_balance, 1, 3},
    {"router_balance_bwd", case_router_balance_bwd, 1, 1},
};
const int battery_gates_count = sizeof battery_gates / sizeof *battery_gates;
