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

/* Of one tensor with itself, or of the queries of one with the keys and values of another. */
typedef struct attention_case {
  kern_attention attention;
  kern_segments keys;
  int64_t key_column; /* of the first key head in a row of source */
  int64_t offset[1024], key_offset[1024];
  item *query, *source, *out, *lse, *dout, *dquery, *dsource;
} attention_case;

/* Where a head of query i of segment s, of its key j and of its value j begin. */
static int64_t query_at(const attention_case *a, int64_t s, int64_t i, int64_t h) {
  return (a->offset[s] + i) * a->query->tensor.shape[1] + h * a->attention.head_width;
}
static int64_t key_at(const attention_case *a, int64_t s, int64_t j, int64_t h) {
  const int64_t g = h / (a->attention.heads / a->attention.kv_heads);
  return (a->keys.offset[s] + j) * a->source->tensor.shape[1] + a->key_column + g * a->attention.head_width;
}
static int64_t value_at(const attention_case *a, int64_t s, int64_t j, int64_t h) {
  return key_at(a, s, j, h) + a->attention.kv_heads * a->attention.head_width;
}
static int64_t out_at(const attention_case *a, int64_t s, int64_t i, int64_t h) {
  return ((a->offset[s] + i) * a->attention.heads + h) * a->attention.head_width;
}

/* One query of one head: probabilities into p[keys], its logsumexp returned. */
static double ref_probabilities(const attention_case *a, int64_t s, int64_t i, int64_t h, double *p) {
  const kern_attention *at = &a->attention;
  const double *q = a->query->ref + query_at(a, s, i, h);
  const int64_t length = a->keys.offset[s + 1] - a->keys.offset[s];
  double sum = 0;
  for (int64_t j = 0; j < length; j++) {
    const double *k = a->source->ref + key_at(a, s, j, h);
    double dot = 0;
    for (int64_t d = 0; d < at->head_width; d++) dot += q[d] * k[d];
    p[j] = at->mask == KERN_CAUSAL && j > i ? 0 : exp(at->scale * dot);
    sum += p[j];
  }
  for (int64_t j = 0; j < length; j++) p[j] /= sum;
  return log(sum);
}

static void ref_forward(const attention_case *a, int64_t s, int64_t i, int64_t h) {
  const int64_t length = a->keys.offset[s + 1] - a->keys.offset[s];
  double *p = malloc((size_t)length * sizeof *p), *out = a->out->ref + out_at(a, s, i, h);
  a->lse->ref[(a->offset[s] + i) * a->attention.heads + h] = ref_probabilities(a, s, i, h, p);
  for (int64_t d = 0; d < a->attention.head_width; d++) {
    out[d] = 0;
    for (int64_t j = 0; j < length; j++) out[d] += p[j] * a->source->ref[value_at(a, s, j, h) + d];
  }
  free(p);
}

static void ref_backward(const attention_case *a, int64_t s, int64_t i, int64_t h) {
  const int64_t width = a->attention.head_width, q = query_at(a, s, i, h);
  const int64_t length = a->keys.offset[s + 1] - a->keys.offset[s];
  const double *dout = a->dout->ref + out_at(a, s, i, h), *out = a->out->ref + out_at(a, s, i, h);
  double *p = malloc((size_t)length * sizeof *p), delta = 0;
  ref_probabilities(a, s, i, h, p);
  for (int64_t d = 0; d < width; d++) delta += dout[d] * out[d];
  for (int64_t j = 0; j < length; j++) {
    const int64_t k = key_at(a, s, j, h), v = value_at(a, s, j, h);
    double dp = 0;
    for (int64_t d = 0; d < width; d++) dp += dout[d] * a->source->ref[v + d];
    const double ds = p[j] * (dp - delta) * a->attention.scale;
    for (int64_t d = 0; d < width; d++) {
      a->dquery->ref[q + d] += ds * a->source->ref[k + d];
      a->dsource->ref[k + d] += ds * a->query->ref[q + d];
      a->dsource->ref[v + d] += p[j] * dout[d];
    }
  }
  free(p);
}

static void ref_each(const attention_case *a,
                     void (*run)(const attention_case *, int64_t, int64_t, int64_t)) {
  for (int64_t s = 0; s < a->attention.segments.count; s++)
    for (int64_t i = 0; i < a->offset[s + 1] - a->offset[s]; i++)
      for (int64_t h = 0; h < a->attention.heads; h++) run(a, s, i, h);
}

static void ref_both(const attention_case *a) {
  ref_each(a, ref_forward);
  memset(a->dquery->ref, 0, (size_t)a->dquery->count * sizeof(double));
  memset(a->dsource->ref, 0, (size_t)a->dsource->count * sizeof(double));
  ref_each(a, ref_backward);
}

/* Variants: mask in bit 0, grouped heads in bit 1. */
static attention_case *make_attention(battery *b, int causal, double dout) {
  attention_case *a = calloc(1, sizeof *a);
  const int64_t t = b->s.t, width = b->s.c, group = b->s.variant & 2 ? 3 : 1, heads = 2 * group;
  a->attention = (kern_attention){.segments = battery_segments(b, t, a->offset),
                                  .heads = (int32_t)heads,
                                  .kv_heads = 2,
                                  .head_width = (int32_t)width,
                                  .mask = causal ? KERN_CAUSAL : KERN_BIDIRECTIONAL,
                                  .scale = 1 / sqrt((double)width)};
  a->keys = a->attention.segments;
  a->out = ADD_ACTIVE(b, "out", TOL_SUM, 1, t, heads * width);
  a->dout = ADD_ACTIVE(b, "dout", TOL_EXACT, dout, t, heads * width);
  a->lse = ADD(b, "lse", TOL_SUM, 1, t, heads);
  a->out->rounded_inside = true;
  return a;
}

static void case_attention(battery *b) {
  attention_case *a = make_attention(b, b->s.variant & 1, 1);
  const int64_t t = b->s.t, row = ((int64_t)a->attention.heads + 4) * b->s.c;
  a->key_column = a->attention.heads * b->s.c;
  a->query = a->source = ADD_ACTIVE(b, "qkv", TOL_EXACT, 1, t, row);
  a->dquery = a->dsource = ADD_ACTIVE(b, "dqkv", TOL_CHAIN, 1, t, row);
  a->dquery->rounded_inside = true;
  battery_expect_ok(
      b, b->ops->attention_fwd(b->context, &a->attention, a->query->tensor, a->out->tensor, a->lse->tensor));
  for (int time = 0; time < 2; time++) /* dqkv is set */
    battery_expect_ok(b, b->ops->attention_bwd(b->context, &a->attention, a->dout->tensor, a->query->tensor,
                                               a->out->tensor, a->lse->tensor, a->dquery->tensor));
  ref_both(a);
  free(a);
}

/* As many segments as the queries have, each with keys where it has queries; some have keys alone. Long ones
 * and short ones, whatever the number of queries. */
static void cut_keys(battery *b, attention_case *a) {
  const int64_t count = a->attention.segments.count;
  for (int64_t s = 0; s < count; s++) {
    const int64_t least = a->offset[s + 1] > a->offset[s];
    a->key_offset[s + 1] = a->key_offset[s] + least + battery_pick(b, s % 3 == 0 ? 3 : s % 3 == 1 ? 9 : 40);
  }
  item *it = battery_add(b, "keys", CORE_INT64, TOL_EXACT, 0, (const int64_t[]){count + 1}, 1);
  for (int64_t s = 0; s <= count; s++) it->ref[s] = (double)a->key_offset[s];
  battery_upload(b, it);
  a->keys = (kern_segments){.offset = a->key_offset, .device_offset = it->tensor, .count = count};
}

/* Variant 2: grouped heads; 1 is 0 once more, with other lengths. A device takes <dout, out> from the rounded
 * out; at one query of one column nothing averages that, so that gradients are drawn small beside the 0.01.
 */
static void case_attention_cross(battery *b) {
  attention_case *a = make_attention(b, 0, 0.25);
  const int64_t t = b->s.t, row = a->attention.heads * b->s.c;
  cut_keys(b, a);
  const int64_t r = a->key_offset[a->keys.count];
  a->query = ADD_ACTIVE(b, "q", TOL_EXACT, 1, t, row);
  a->source = ADD_ACTIVE(b, "kv", TOL_EXACT, 1, r, 4 * b->s.c);
  a->dquery = ADD_ACTIVE(b, "dq", TOL_CHAIN, 1, t, row);
  a->dsource = ADD_ACTIVE(b, "dkv", TOL_CHAIN, 1, r, 4 * b->s.c);
  a->dquery->rounded_inside = a->dsource->rounded_inside = true;
  const kern_cross cross = {.attention = a->attention,
                            .keys = a->keys,
                            .q = a->query->tensor,
                            .kv = a->source->tensor,
                            .out = a->out->tensor,
                            .lse = a->lse->tensor};
  battery_expect_ok(b, b->ops->attention_cross_fwd(b->context, &cross));
  for (int time = 0; time < 2; time++) /* dq and dkv are set */
    battery_expect_ok(b, b->ops->attention_cross_bwd(b->context, &cross, a->dout->tensor, a->dquery->tensor,
                                                     a->dsource->tensor));
  ref_both(a);
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
    {"attention_cross", case_attention_cross, 1, 3},
    {"attention_cached", case_attention_cached, 1, 2},
    {"segment_mean", case_segment_mean, 2, 1},
    {"position", case_position, 1, 1},
};
const int battery_sequence_count = sizeof battery_sequence / sizeof *battery_sequence;
