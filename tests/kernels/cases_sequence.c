/* Contract cases of packed sequences: rotary positions, attention, segment means, learned positions. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h> /* assert_* */

#include "battery.h"

static void case_rope(battery *b) {
  const int64_t t = b->s.t, heads = b->s.k, half = (b->s.c + 1) / 2, width = heads * 2 * half + 3;
  item *x = ADD_ACTIVE(b, "x", TOL_ROUND, 1, t, width),
       *frequency = ADD(b, "inverse_frequency", TOL_EXACT, 0, half);
  item *position = ADD_INT(b, "position", t);
  for (int64_t i = 0; i < half; i++) frequency->ref[i] = pow(10000, -(double)i / (double)half);
  for (int64_t i = 0; i < t; i++) position->ref[i] = (double)battery_pick(b, 3000);
  battery_upload(b, frequency);
  battery_upload(b, position);
  const kern_rotation way = b->s.variant == 0 ? KERN_ROTATE : KERN_ROTATE_BACK;
  battery_expect_ok(
      b, b->ops->rope(b->context, way, (int32_t)heads, position->tensor, frequency->tensor, x->tensor));
  for (int64_t row = 0; row < t; row++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < half; i++) {
        /* The angle is a product of core_reals: at 3000 its rounding is part of the contract. */
        const double angle = (double)((core_real)position->ref[row] * (core_real)frequency->ref[i]);
        const double s = way == KERN_ROTATE ? sin(angle) : -sin(angle), c = cos(angle);
        double *a = &x->ref[row * width + h * 2 * half + i], *d = a + half;
        const double first = *a, second = *d;
        *a = first * c - second * s;
        *d = second * c + first * s;
      }
}

typedef struct attention_case {
  kern_attention attention;
  int64_t row, offset[1024];
  item *qkv, *out, *lse, *dout, *dqkv;
} attention_case;

/* One query of one head: probabilities into p[length], its logsumexp returned. */
static double ref_probabilities(const attention_case *a, int64_t begin, int64_t length, int64_t i, int64_t h,
                                double *p) {
  const kern_attention *at = &a->attention;
  const int64_t width = at->head_width, g = h / (at->heads / at->kv_heads);
  const double *q = a->qkv->ref + (begin + i) * a->row + h * width;
  double sum = 0;
  for (int64_t j = 0; j < length; j++) {
    const double *k = a->qkv->ref + (begin + j) * a->row + (at->heads + g) * width;
    double dot = 0;
    for (int64_t d = 0; d < width; d++) dot += q[d] * k[d];
    p[j] = at->mask == KERN_CAUSAL && j > i ? 0 : exp(at->scale * dot);
    sum += p[j];
  }
  for (int64_t j = 0; j < length; j++) p[j] /= sum;
  return log(sum);
}

static void ref_forward(const attention_case *a, int64_t begin, int64_t length, int64_t i, int64_t h) {
  const kern_attention *at = &a->attention;
  const int64_t width = at->head_width, g = h / (at->heads / at->kv_heads);
  double *p = malloc((size_t)length * sizeof *p),
         *out = a->out->ref + (begin + i) * at->heads * width + h * width;
  a->lse->ref[(begin + i) * at->heads + h] = ref_probabilities(a, begin, length, i, h, p);
  for (int64_t d = 0; d < width; d++) {
    out[d] = 0;
    for (int64_t j = 0; j < length; j++)
      out[d] += p[j] * a->qkv->ref[(begin + j) * a->row + (at->heads + at->kv_heads + g) * width + d];
  }
  free(p);
}

static void ref_backward(const attention_case *a, int64_t begin, int64_t length, int64_t i, int64_t h) {
  const kern_attention *at = &a->attention;
  const int64_t width = at->head_width, g = h / (at->heads / at->kv_heads), out_row = at->heads * width;
  const int64_t q = (begin + i) * a->row + h * width;
  const double *dout = a->dout->ref + (begin + i) * out_row + h * width;
  const double *out = a->out->ref + (begin + i) * out_row + h * width;
  double *p = malloc((size_t)length * sizeof *p), delta = 0;
  ref_probabilities(a, begin, length, i, h, p);
  for (int64_t d = 0; d < width; d++) delta += dout[d] * out[d];
  for (int64_t j = 0; j < length; j++) {
    const int64_t k = (begin + j) * a->row + (at->heads + g) * width, v = k + at->kv_heads * width;
    double dp = 0;
    for (int64_t d = 0; d < width; d++) dp += dout[d] * a->qkv->ref[v + d];
    const double ds = p[j] * (dp - delta) * at->scale;
    for (int64_t d = 0; d < width; d++) {
      a->dqkv->ref[q + d] += ds * a->qkv->ref[k + d];
      a->dqkv->ref[k + d] += ds * a->qkv->ref[q + d];
      a->dqkv->ref[v + d] += p[j] * dout[d];
    }
  }
  free(p);
}

static void ref_each(const attention_case *a,
                     void (*run)(const attention_case *, int64_t, int64_t, int64_t, int64_t)) {
  for (int64_t s = 0; s < a->attention.segments.count; s++) {
    const int64_t begin = a->offset[s], length = a->offset[s + 1] - begin;
    for (int64_t i = 0; i < length; i++)
      for (int64_t h = 0; h < a->attention.heads; h++) run(a, begin, length, i, h);
  }
}

/* Variants: mask in bit 0, grouped heads in bit 1. */
static void case_attention(battery *b) {
  attention_case *a = calloc(1, sizeof *a);
  const int64_t t = b->s.t, width = b->s.c, group = b->s.variant & 2 ? 3 : 1, heads = 2 * group;
  a->attention = (kern_attention){.segments = battery_segments(b, t, a->offset),
                                  .heads = (int32_t)heads,
                                  .kv_heads = 2,
                                  .head_width = (int32_t)width,
                                  .mask = b->s.variant & 1 ? KERN_CAUSAL : KERN_BIDIRECTIONAL,
                                  .scale = 1 / sqrt((double)width)};
  a->row = (heads + 4) * width;
  a->qkv = ADD_ACTIVE(b, "qkv", TOL_EXACT, 1, t, a->row);
  a->dqkv = ADD_ACTIVE(b, "dqkv", TOL_CHAIN, 1, t, a->row);
  a->out = ADD_ACTIVE(b, "out", TOL_SUM, 1, t, heads * width);
  a->dout = ADD_ACTIVE(b, "dout", TOL_EXACT, 1, t, heads * width);
  a->lse = ADD(b, "lse", TOL_SUM, 1, t, heads);
  a->out->rounded_inside = a->dqkv->rounded_inside = true;
  battery_expect_ok(
      b, b->ops->attention_fwd(b->context, &a->attention, a->qkv->tensor, a->out->tensor, a->lse->tensor));
  for (int time = 0; time < 2; time++) /* dqkv is set */
    battery_expect_ok(b, b->ops->attention_bwd(b->context, &a->attention, a->dout->tensor, a->qkv->tensor,
                                               a->out->tensor, a->lse->tensor, a->dqkv->tensor));
  ref_each(a, ref_forward);
  memset(a->dqkv->ref, 0, (size_t)a->dqkv->count * sizeof(double));
  ref_each(a, ref_backward);
  free(a);
}

/* Rows of any place and length in a cache; one keeps nothing. Variant 1: grouped heads. */
static void case_attention_cached(battery *b) {
  const int64_t n = b->s.t, A = b->s.c, group = b->s.variant ? 3 : 1, H = 2 * group, R = 2 * n + 5;
  const int64_t row = (H + 4) * A;
  const kern_attention attention = {
      .heads = (int32_t)H, .kv_heads = 2, .head_width = (int32_t)A, .scale = 1 / sqrt((double)A)};
  item *qkv = ADD_ACTIVE(b, "qkv", TOL_EXACT, 1, n, row),
       *cache = ADD_ACTIVE(b, "cache", TOL_EXACT, 1, R, row);
  item *first = ADD_INT(b, "first", n), *length = ADD_INT(b, "length", n),
       *out = ADD_ACTIVE(b, "out", TOL_SUM, 1, n, H * A);
  for (int64_t i = 0; i < n; i++) {
    length->ref[i] = i % 5 == 3 ? 0 : (double)(1 + battery_pick(b, R < 40 ? R : 40));
    first->ref[i] = (double)battery_pick(b, R - (int64_t)length->ref[i] + 1);
  }
  battery_upload(b, first), battery_upload(b, length);
  battery_expect_ok(b, b->ops->attention_cached(b->context, &attention, first->tensor, length->tensor,
                                                qkv->tensor, cache->tensor, out->tensor));
  for (int64_t i = 0; i < n * H; i++) {
    const int64_t h = i % H, k = (H + h / group) * A, v = k + 2 * A, from = (int64_t)first->ref[i / H];
    const double *q = qkv->ref + i / H * row + h * A;
    double p[64], sum = 0;
    for (int64_t j = 0; j < (int64_t)length->ref[i / H]; j++) {
      double dot = 0;
      for (int64_t a = 0; a < A; a++) dot += q[a] * cache->ref[(from + j) * row + k + a];
      sum += p[j] = exp(attention.scale * dot);
    }
    for (int64_t a = 0; a < A; a++) {
      out->ref[i * A + a] = 0;
      for (int64_t j = 0; j < (int64_t)length->ref[i / H]; j++)
        out->ref[i * A + a] += p[j] / sum * cache->ref[(from + j) * row + v + a];
    }
  }
}

static void case_segment_mean(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  int64_t offset[1024];
  const kern_segments segments = battery_segments(b, t, offset);
  item *x = ADD_ACTIVE(b, "x", TOL_EXACT, 1, t, c), *y = ADD_ACTIVE(b, "y", TOL_SUM, 1, segments.count, c);
  item *dy = ADD_ACTIVE(b, "dy", TOL_EXACT, 1, segments.count, c);
  item *dx = ADD_ACTIVE(b, "dx", TOL_ROUND, 1, t, c);
  battery_expect_ok(b, b->ops->segment_mean_fwd(b->context, segments, x->tensor, y->tensor));
  battery_expect_ok(b, b->ops->segment_mean_bwd(b->context, segments, dy->tensor, b->s.write, dx->tensor));
  memset(y->ref, 0, (size_t)y->count * sizeof(double));
  for (int64_t s = 0; s < segments.count; s++)
    for (int64_t row = offset[s]; row < offset[s + 1]; row++)
      for (int64_t i = 0; i < c; i++) {
        const double share = 1 / (double)(offset[s + 1] - offset[s]);
        double *d = &dx->ref[row * c + i];
        y->ref[s * c + i] += share * x->ref[row * c + i];
        *d = (b->s.write == KERN_ADD ? *d : 0) + share * dy->ref[s * c + i];
      }
}

static void case_position(battery *b) {
  const int64_t t = b->s.t, c = b->s.c;
  int64_t offset[1024], longest = 0;
  const kern_segments segments = battery_segments(b, t, offset);
  for (int64_t s = 0; s < segments.count; s++)
    longest = offset[s + 1] - offset[s] > longest ? offset[s + 1] - offset[s] : longest;
  item *table = ADD(b, "table", TOL_EXACT, 1, longest + 1, c), *x = ADD_ACTIVE(b, "x", TOL_ROUND, 1, t, c);
  item *dx = ADD_ACTIVE(b, "dx", TOL_EXACT, 1, t, c), *dtable = ADD(b, "dtable", TOL_SUM, 1, longest + 1, c);
  battery_expect_ok(b, b->ops->position_fwd(b->context, segments, table->tensor, x->tensor));
  for (int time = 0; time < 2; time++)
    battery_expect_ok(b, b->ops->position_bwd(b->context, segments, dx->tensor, dtable->tensor));
  for (int64_t s = 0; s < segments.count; s++)
    for (int64_t at = offset[s] * c; at < offset[s + 1] * c; at++) {
      x->ref[at] += table->ref[at - offset[s] * c];
      dtable->ref[at - offset[s] * c] += 2 * dx->ref[at];
    }
}

const battery_case battery_sequence[] = {
    {"rope", case_rope, 1, 2},
    {"attention", case_attention, 1, 4},
    {"attention_cached", case_attention_cached, 1, 2},
    {"segment_mean", case_segment_mean, 2, 1},
    {"position", case_position, 1, 1},
};
const int battery_sequence_count = sizeof battery_sequence / sizeof *battery_sequence;
