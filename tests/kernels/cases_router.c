/* Contract cases of the router. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"
#include "core/random.h"

enum { EXPERTS = 64 };

/* K is never more than E. */
static int64_t choices(const battery *b) {
  return b->s.k < b->s.e ? b->s.k : b->s.e;
}

static void ref_softmax(const double *x, int64_t n, double *p) {
  double most = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; i++) most = fmax(most, x[i]);
  for (int64_t i = 0; i < n; i++) sum += exp(x[i] - most);
  for (int64_t i = 0; i < n; i++) p[i] = exp(x[i] - most) / sum;
}

/* K times the largest of what is left; ties to the lower index. */
static void ref_choose(const double *x, int64_t n, int64_t k, double *choice) {
  char taken[EXPERTS] = {0};
  for (int64_t rank = 0; rank < k; rank++) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; e++)
      if (!taken[e] && (best < 0 || x[e] > x[best])) best = e;
    taken[best] = 1;
    choice[rank] = (double)best;
  }
}

static void case_router_logits(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, e = b->s.e;
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 1, t, c), *w = ADD(b, "weight", TOL_EXACT, 1, e, c);
  item *bias = ADD(b, "bias", TOL_EXACT, 1, e), *logits = ADD(b, "logits", TOL_SUM, 1, t, e);
  const core_tensor none = {0};
  battery_expect_ok(b, b->ops->router_logits(b->context, x->tensor, w->tensor,
                                             b->s.variant ? bias->tensor : none, logits->tensor));
  for (int64_t i = 0; i < t * e; i++) {
    logits->ref[i] = b->s.variant ? bias->ref[i % e] : 0;
    for (int64_t j = 0; j < c; j++) logits->ref[i] += x->ref[i / e * c + j] * w->ref[i % e * c + j];
  }
}

/* Variant 1 has no bias, in variant 2 the weight is frozen. */
static void case_router_logits_bwd(battery *b) {
  const int64_t t = b->s.t, c = b->s.c, e = b->s.e;
  item *d = ADD(b, "dlogits", TOL_EXACT, 1, t, e), *x = ADD_ACTIVE(b, "x", TOL_EXACT, 1, t, c);
  item *w = ADD(b, "weight", TOL_EXACT, 1, e, c), *dx = ADD_ACTIVE(b, "dx", TOL_SUM, 1, t, c);
  item *dw = ADD(b, "dweight", TOL_SUM, 1, e, c), *dbias = ADD(b, "dbias", TOL_SUM, 1, e);
  battery_expect_ok(
      b, b->ops->router_logits_bwd(b->context, d->tensor, x->tensor, w->tensor, b->s.write, dx->tensor,
                                   b->s.variant == 2 ? (core_tensor){0} : dw->tensor,
                                   b->s.variant == 1 ? (core_tensor){0} : dbias->tensor));
  for (int64_t i = 0; b->s.write == KERN_SET && i < t * c; i++) dx->ref[i] = 0;
  for (int64_t at = 0; at < t * e; at++) {
    const int64_t row = at / e, expert = at % e;
    if (b->s.variant != 1) dbias->ref[expert] += d->ref[at];
    for (int64_t j = 0; j < c; j++) {
      dx->ref[row * c + j] += d->ref[at] * w->ref[expert * c + j];
      if (b->s.variant != 2) dw->ref[expert * c + j] += d->ref[at] * x->ref[row * c + j];
    }
  }
}

static void case_router_noise(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  item *logits = ADD(b, "logits", TOL_EXACT, 1, t, e), *noisy = ADD(b, "noisy", TOL_ROUND, 1, t, e);
  item *key = battery_add(b, "key", CORE_UINT64, TOL_EXACT, 0, (const int64_t[]){t}, 1);
  for (int64_t i = 0; i < t; i++) key->ref[i] = (double)(i * i + 5);
  battery_upload(b, key);
  battery_expect_ok(b,
                    b->ops->router_noise(b->context, logits->tensor, 3, 4, key->tensor, 0.25, noisy->tensor));
  for (int64_t i = 0; i < t * e; i++)
    noisy->ref[i] =
        logits->ref[i] +
        0.25 * core_random_normal(3, 4, (uint64_t)key->ref[i / e] * (uint64_t)e + (uint64_t)(i % e));
}

/* Every third row has ties. */
static void case_router_choose(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  const kern_gate form = (kern_gate)b->s.variant;
  item *logits = ADD(b, "logits", TOL_EXACT, 2, t, e), *prob = ADD(b, "prob", TOL_ROUND, 1, t, e);
  item *choice = ADD_INT(b, "choice", t, k), *gate = ADD(b, "gate", TOL_ROUND, 1, t, k);
  for (int64_t i = 0; i < t * e; i++)
    if (i / e % 3 == 0) logits->ref[i] = (double)(i * 5 % 3);
  battery_upload(b, logits);
  battery_expect_ok(
      b, b->ops->router_choose(b->context, form, logits->tensor, prob->tensor, choice->tensor, gate->tensor));
  for (int64_t row = 0; row < t; row++) {
    double of_chosen[CORE_MAX_CHOICES];
    ref_softmax(logits->ref + row * e, e, prob->ref + row * e);
    ref_choose(logits->ref + row * e, e, k, choice->ref + row * k);
    for (int64_t i = 0; i < k; i++) of_chosen[i] = logits->ref[row * e + (int64_t)choice->ref[row * k + i]];
    ref_softmax(of_chosen, k, gate->ref + row * k);
    for (int64_t i = 0; form == KERN_GATE_SOFTMAX && i < k; i++)
      gate->ref[row * k + i] = prob->ref[row * e + (int64_t)choice->ref[row * k + i]];
  }
}

static void case_softmax(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  item *logits = ADD(b, "logits", TOL_EXACT, 2, t, e), *prob = ADD(b, "prob", TOL_ROUND, 1, t, e);
  battery_expect_ok(b, b->ops->softmax_fwd(b->context, logits->tensor, prob->tensor));
  for (int64_t row = 0; row < t; row++) ref_softmax(logits->ref + row * e, e, prob->ref + row * e);
}

/* By the full Jacobian of the gates. */
static void case_router_gate_bwd(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  const kern_gate form = (kern_gate)b->s.variant;
  item *prob = ADD(b, "prob", TOL_EXACT, 0, t, e), *gate = ADD(b, "gate", TOL_EXACT, 0, t, k);
  item *dgate = ADD(b, "dgate", TOL_EXACT, 1, t, k), *dlogits = ADD(b, "dlogits", TOL_SUM, 1, t, e);
  item *choice = ADD_INT(b, "choice", t, k);
  for (int64_t row = 0; row < t; row++) {
    double x[EXPERTS], of_chosen[CORE_MAX_CHOICES];
    for (int64_t i = 0; i < e; i++) x[i] = core_random_normal(1, (uint64_t)row, (uint64_t)i);
    ref_softmax(x, e, prob->ref + row * e);
    ref_choose(x, e, k, choice->ref + row * k);
    for (int64_t i = 0; i < k; i++) of_chosen[i] = x[(int64_t)choice->ref[row * k + i]];
    ref_softmax(of_chosen, k, gate->ref + row * k);
  }
  battery_upload(b, prob), battery_upload(b, gate), battery_upload(b, choice);
  battery_expect_ok(b, b->ops->router_gate_bwd(b->context, form, dgate->tensor, prob->tensor, choice->tensor,
                                               gate->tensor, b->s.write, dlogits->tensor));
  for (int64_t i = 0; b->s.write == KERN_SET && i < t * e; i++) dlogits->ref[i] = 0;
  for (int64_t at = 0; at < t * k; at++)
    for (int64_t j = 0; j < e; j++) {
      const int64_t row = at / k, own = (int64_t)choice->ref[at];
      double share = form == KERN_GATE_SOFTMAX ? prob->ref[row * e + j] : 0;
      for (int64_t i = 0; form == KERN_GATE_RENORMALISED && i < k; i++)
        if ((int64_t)choice->ref[row * k + i] == j) share = gate->ref[row * k + i];
      const double value = form == KERN_GATE_SOFTMAX ? prob->ref[row * e + own] : gate->ref[at];
      dlogits->ref[row * e + j] += dgate->ref[at] * value * ((own == j) - share);
    }
}

/* What the sums' cases share: variant 0 has noise, 1 has none (noisy is logits), 2 has sigma 0. */
typedef struct sums_case {
  item *logits, *prob, *noisy, *choice;
  double sigma;
  int64_t k;
} sums_case;

static sums_case make_sums(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  sums_case s = {.sigma = b->s.variant == 2 ? 0 : 0.5, .k = k};
  s.logits = ADD(b, "logits", TOL_EXACT, 1, t, e), s.prob = ADD(b, "prob", TOL_EXACT, 0, t, e);
  s.noisy = b->s.variant == 1 ? s.logits : ADD(b, "noisy", TOL_EXACT, 1, t, e);
  s.choice = ADD_INT(b, "choice", t, k);
  for (int64_t row = 0; row < t; row++) {
    ref_softmax(s.logits->ref + row * e, e, s.prob->ref + row * e);
    ref_choose(s.noisy->ref + row * e, e, k, s.choice->ref + row * k);
  }
  battery_upload(b, s.prob), battery_upload(b, s.choice);
  return s;
}

/* One row's logsumexp and entropy; its distances (threshold - logit) / sigma into far. */
static double ref_measures(const sums_case *s, int64_t row, int64_t e, double *entropy, double *far) {
  const double *l = s->logits->ref + row * e;
  const double threshold = s->noisy->ref[row * e + (int64_t)s->choice->ref[row * s->k + s->k - 1]];
  double sum = 0;
  *entropy = 0;
  for (int64_t i = 0; i < e; i++) sum += exp(l[i]);
  for (int64_t i = 0; i < e; i++) {
    *entropy -= exp(l[i]) / sum * (l[i] - log(sum));
    far[i] = (threshold - l[i]) / s->sigma;
  }
  return log(sum);
}

/* Sums start from random numbers, to see that they are added to. */
static void case_router_sums(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  const sums_case s = make_sums(b);
  item *sums = battery_add(b, "sums", CORE_FLOAT64, TOL_SUM, 1, (const int64_t[]){3 + 2 * e}, 1);
  battery_expect_ok(b, b->ops->router_sums(b->context, s.logits->tensor, s.prob->tensor, s.noisy->tensor,
                                           s.choice->tensor, s.sigma, sums->tensor));
  for (int64_t row = 0; row < t; row++) {
    double entropy, far[EXPERTS];
    const double lse = ref_measures(&s, row, e, &entropy, far);
    sums->ref[0] += 1;
    sums->ref[1] += lse * lse;
    sums->ref[2] += entropy;
    for (int64_t i = 0; i < e; i++) {
      sums->ref[3 + i] += exp(s.logits->ref[row * e + i] - lse);
      if (b->s.variant == 0) sums->ref[3 + e + i] += 0.5 * erfc(far[i] / sqrt(2.0));
    }
  }
}

/* By the full Jacobians of each row's sums. */
static void case_router_sums_bwd(battery *b) {
  const int64_t t = b->s.t, e = b->s.e;
  const sums_case s = make_sums(b);
  item *weights = battery_add(b, "weights", CORE_FLOAT64, TOL_EXACT, 1, (const int64_t[]){3 + 2 * e}, 1);
  item *dlogits = ADD(b, "dlogits", TOL_CHAIN, 1, t, e);
  battery_expect_ok(b, b->ops->router_sums_bwd(b->context, weights->tensor, s.logits->tensor, s.prob->tensor,
                                               s.noisy->tensor, s.choice->tensor, s.sigma, dlogits->tensor));
  const double *w = weights->ref;
  for (int64_t row = 0; row < t; row++) {
    double entropy, far[EXPERTS], *to = dlogits->ref + row * e;
    const double lse = ref_measures(&s, row, e, &entropy, far);
    const int64_t last = (int64_t)s.choice->ref[row * s.k + s.k - 1];
    for (int64_t i = 0; i < e; i++) {
      const double log_p = s.logits->ref[row * e + i] - lse, p = exp(log_p);
      to[i] += w[1] * 2 * lse * p - w[2] * p * (log_p + entropy);
      for (int64_t j = 0; j < e; j++)
        to[j] += w[3 + i] * p * ((i == j) - exp(s.logits->ref[row * e + j] - lse));
      if (b->s.variant != 0) continue;
      const double slope = w[3 + e + i] * exp(-far[i] * far[i] / 2) / sqrt(2 * M_PI) / s.sigma;
      to[i] += slope;
      to[last] -= slope;
    }
  }
}

/* Counts start from what is there. */
static void case_router_count(battery *b) {
  const int64_t t = b->s.t, e = b->s.e, k = choices(b);
  item *choice = ADD_INT(b, "choice", t, k), *slot = ADD_INT(b, "slot", t, k);
  item *count = battery_add(b, "count", CORE_INT64, TOL_EXACT, 100, (const int64_t[]){2 * e + 2}, 1);
  for (int64_t i = 0; i < t * k; i++) {
    choice->ref[i] = (double)((i / k * 3 + i % k) % e);
    slot->ref[i] = battery_pick(b, 3) == 0 ? (double)i : -1;
  }
  battery_upload(b, choice), battery_upload(b, slot);
  battery_expect_ok(b, b->ops->router_count(b->context, choice->tensor, slot->tensor, count->tensor));
  for (int64_t row = 0; row < t; row++) {
    int kept = 0;
    for (int64_t i = row * k; i < (row + 1) * k; i++) {
      count->ref[(int64_t)choice->ref[i]] += 1;
      if (slot->ref[i] >= 0) count->ref[e + (int64_t)choice->ref[i]] += 1, kept = 1;
    }
    count->ref[2 * e] += kept;
    count->ref[2 * e + 1] += 1;
  }
}

const battery_case battery_router[] = {
    {"router_logits", case_router_logits, 1, 2}, {"router_logits_bwd", case_router_logits_bwd, 2, 3},
    {"router_noise", case_router_noise, 1, 1},   {"softmax_fwd", case_softmax, 1, 1},
    {"router_choose", case_router_choose, 1, 2}, {"router_gate_bwd", case_router_gate_bwd, 2, 2},
    {"router_sums", case_router_sums, 1, 3},     {"router_sums_bwd", case_router_sums_bwd, 1, 3},
    {"router_count", case_router_count, 1, 1},
};
const int battery_router_count = sizeof battery_router / sizeof *battery_router;
