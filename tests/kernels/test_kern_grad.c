/* Gradients: every backward op against central differences of its forward op. The double build judges; the
 * float build runs the same code with a step and a bar that its rounding allows. Routing is frozen: a step is
 * far smaller than the gaps between the logits of the chosen data. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "core/random.h"
#include "kernels/kernels.h"

#ifdef ANTIPHON_DOUBLE
static const double step = 1e-5, bar = 1e-7;
#else
static const double step = 1e-2, bar = 2e-2;
#endif

enum { POOL = 1 << 14, INPUTS = 4, T = 7, C = 6, E = 5, K = 2 };

/* Inputs with their gradients, and a loss = <seed, output> (or the op's own loss). */
typedef struct grad {
  const kern_ops *ops;
  kern_context *context;
  int32_t inputs;
  core_tensor value[INPUTS], gradient[INPUTS];
  core_tensor seed, out, aux; /* of the op's output; aux: what forward keeps for backward */
  int variant;
  int64_t used;
  uint64_t stream;
  core_real pool[POOL];
} grad;

typedef struct grad_case {
  const char *name;
  void (*setup)(grad *g);
  double (*loss)(grad *g);
  void (*backward)(grad *g);
  int variants;
} grad_case;

static void must(core_status status) {
  if (status != CORE_OK) fail_msg("%s", core_error_get()->message);
}

static core_tensor take(grad *g, int64_t rows, int64_t columns, double scale) {
  core_tensor tensor = core_tensor_2(g->pool + g->used, CORE_REAL_DTYPE, rows, columns);
  assert_true(g->used + rows * columns <= POOL);
  g->used += rows * columns;
  g->stream++;
  for (int64_t i = 0; i < rows * columns; i++)
    ((core_real *)tensor.data)[i] = (core_real)(scale * core_random_normal(1, g->stream, (uint64_t)i));
  return tensor;
}
static core_real *values(core_tensor tensor) {
  return tensor.data;
}
static core_tensor cube(core_tensor t, int64_t n) {
  return core_tensor_3(t.data, t.dtype, n, t.shape[0] / n, t.shape[1]);
}
static core_tensor flat(core_tensor t) {
  return core_tensor_1(t.data, t.dtype, core_tensor_count(&t));
}

/* An input with a gradient that starts from 0.5, since gradients accumulate. */
static void input(grad *g, int64_t rows, int64_t columns) {
  g->value[g->inputs] = take(g, rows, columns, 1);
  g->gradient[g->inputs] = take(g, rows, columns, 0);
  for (int64_t i = 0; i < rows * columns; i++) values(g->gradient[g->inputs])[i] = (core_real)0.5;
  g->inputs++;
}
static void output(grad *g, int64_t rows, int64_t columns) {
  g->seed = take(g, rows, columns, 1);
  g->out = take(g, rows, columns, 1);
}
static double dot(core_tensor a, core_tensor b) {
  double sum = 0;
  for (int64_t i = 0; i < core_tensor_count(&a); i++) sum += (double)values(a)[i] * (double)values(b)[i];
  return sum;
}

/* --- products --- */
static void gemm_setup(grad *g) {
  input(g, g->variant == KERN_TN ? 3 : 4, g->variant == KERN_TN ? 4 : 3);
  input(g, g->variant == KERN_NT ? 5 : 3, g->variant == KERN_NT ? 3 : 5);
  output(g, 4, 5);
}
static double gemm_loss(grad *g) {
  must(g->ops->gemm(g->context, (kern_form)g->variant, g->value[0], g->value[1], KERN_SET, g->out));
  return dot(g->seed, g->out);
}
static void gemm_backward(grad *g) {
  const core_tensor a = g->value[0], b = g->value[1], d = g->seed, da = g->gradient[0], db = g->gradient[1];
  if (g->variant == KERN_NT) {
    must(g->ops->gemm(g->context, KERN_NN, d, b, KERN_ADD, da));
    must(g->ops->gemm(g->context, KERN_TN, d, a, KERN_ADD, db));
  } else if (g->variant == KERN_NN) {
    must(g->ops->gemm(g->context, KERN_NT, d, b, KERN_ADD, da));
    must(g->ops->gemm(g->context, KERN_TN, a, d, KERN_ADD, db));
  } else {
    must(g->ops->gemm(g->context, KERN_NT, b, d, KERN_ADD, da));
    must(g->ops->gemm(g->context, KERN_NN, a, d, KERN_ADD, db));
  }
}

static const int64_t group_row[] = {0, 3, 3, T};
static void grouped_setup(grad *g) {
  input(g, T, C);
  input(g, 3 * 4, C);
  output(g, T, 4);
}
static double grouped_loss(grad *g) {
  must(g->ops->gemm_grouped(g->context, KERN_NT, group_row, g->value[0], cube(g->value[1], 3), KERN_SET,
                            g->out));
  return dot(g->seed, g->out);
}
static void grouped_backward(grad *g) {
  must(g->ops->gemm_grouped(g->context, KERN_NN, group_row, g->seed, cube(g->value[1], 3), KERN_ADD,
                            g->gradient[0]));
  must(g->ops->gemm_grouped(g->context, KERN_TN, group_row, g->seed, g->value[0], KERN_ADD,
                            cube(g->gradient[1], 3)));
}

/* --- activations, bias --- */
static void bias_setup(grad *g) {
  input(g, 1, C);
  output(g, T, C);
}
static double bias_loss(grad *g) {
  must(g->ops->fill(g->context, 0, g->out));
  must(g->ops->bias_fwd(g->context, flat(g->value[0]), g->out));
  return dot(g->seed, g->out);
}
static void bias_backward(grad *g) {
  must(g->ops->bias_bwd(g->context, g->seed, flat(g->gradient[0])));
}

static void bias_grouped_setup(grad *g) {
  input(g, 3, C);
  output(g, T, C);
}
static double bias_grouped_loss(grad *g) {
  must(g->ops->fill(g->context, 0, g->out));
  must(g->ops->bias_grouped_fwd(g->context, group_row, g->value[0], g->out));
  return dot(g->seed, g->out);
}
static void bias_grouped_backward(grad *g) {
  must(g->ops->bias_grouped_bwd(g->context, group_row, g->seed, g->gradient[0]));
}

static void gelu_setup(grad *g) {
  input(g, T, C);
  output(g, T, C);
}
static double gelu_loss(grad *g) {
  must(g->ops->gelu_fwd(g->context, (kern_gelu)g->variant, g->value[0], g->out));
  return dot(g->seed, g->out);
}
static void gelu_backward(grad *g) {
  must(g->ops->gelu_bwd(g->context, (kern_gelu)g->variant, g->seed, g->value[0], KERN_ADD, g->gradient[0]));
}

static void swiglu_setup(grad *g) {
  input(g, T, 2 * C);
  output(g, T, C);
}
static double swiglu_loss(grad *g) {
  must(g->ops->swiglu_fwd(g->context, g->value[0], g->out));
  return dot(g->seed, g->out);
}
static void swiglu_backward(grad *g) {
  must(g->ops->swiglu_bwd(g->context, g->seed, g->value[0], KERN_ADD, g->gradient[0]));
}

/* --- norms --- */
static void rmsnorm_setup(grad *g) {
  input(g, T, C);
  input(g, 1, C);
  output(g, T, C);
  g->aux = take(g, T, 2, 0);
}
static double rmsnorm_loss(grad *g) {
  const core_tensor inv = core_tensor_1(g->aux.data, CORE_REAL_DTYPE, T);
  must(g->ops->rmsnorm_fwd(g->context, g->value[0], flat(g->value[1]), 1e-2, g->out, inv));
  return dot(g->seed, g->out);
}
static void rmsnorm_backward(grad *g) {
  const core_tensor inv = core_tensor_1(g->aux.data, CORE_REAL_DTYPE, T);
  must(g->ops->rmsnorm_bwd(g->context, g->seed, g->value[0], flat(g->value[1]), inv, KERN_ADD, g->gradient[0],
                           flat(g->gradient[1])));
}
static void layernorm_setup(grad *g) {
  rmsnorm_setup(g);
  input(g, 1, C);
}
static double layernorm_loss(grad *g) {
  must(g->ops->layernorm_fwd(g->context, g->value[0], flat(g->value[1]), flat(g->value[2]), 1e-2, g->out,
                             g->aux));
  return dot(g->seed, g->out);
}
static void layernorm_backward(grad *g) {
  must(g->ops->layernorm_bwd(g->context, g->seed, g->value[0], flat(g->value[1]), g->aux, KERN_ADD,
                             g->gradient[0], flat(g->gradient[1]), flat(g->gradient[2])));
}
static void l2norm_setup(grad *g) {
  input(g, T, C);
  output(g, T, C);
  g->aux = flat(take(g, T, 1, 0));
}
static double l2norm_loss(grad *g) {
  must(g->ops->l2norm_fwd(g->context, g->value[0], g->out, g->aux));
  return dot(g->seed, g->out);
}
static void l2norm_backward(grad *g) {
  must(g->ops->l2norm_bwd(g->context, g->seed, g->out, g->aux, KERN_ADD, g->gradient[0]));
}

/* --- sequences --- */
static const int64_t segment_offset[] = {0, 4, 4, 5, T};
static const kern_segments segments = {.offset = segment_offset, .count = 4};
static int32_t positions[T] = {0, 1, 2, 3, 9, 40, 41};

static core_tensor rope_frequency(void) {
  static core_real frequency[2] = {1, (core_real)0.1};
  return core_tensor_1(frequency, CORE_REAL_DTYPE, 2);
}
static void rope_setup(grad *g) {
  input(g, T, 10);
  output(g, T, 10);
}
static double rope_loss(grad *g) {
  memcpy(g->out.data, g->value[0].data, core_tensor_bytes(&g->out));
  must(g->ops->rope(g->context, KERN_ROTATE, 2, core_tensor_1(positions, CORE_INT32, T), rope_frequency(),
                    g->out));
  return dot(g->seed, g->out);
}
static void rope_backward(grad *g) {
  memcpy(g->out.data, g->seed.data, core_tensor_bytes(&g->out));
  must(g->ops->rope(g->context, KERN_ROTATE_BACK, 2, core_tensor_1(positions, CORE_INT32, T),
                    rope_frequency(), g->out));
  must(g->ops->axpy(g->context, 1, g->out, g->gradient[0]));
}

static kern_attention attention_of(const grad *g) {
  const int32_t heads = g->variant & 2 ? 4 : 2;
  return (kern_attention){segments, heads, 2, 3, g->variant & 1 ? KERN_CAUSAL : KERN_BIDIRECTIONAL, 0.6};
}
static void attention_setup(grad *g) {
  const kern_attention a = attention_of(g);
  input(g, T, (a.heads + 4) * 3);
  output(g, T, a.heads * 3);
  g->aux = take(g, T, a.heads, 0);
}
static double attention_loss(grad *g) {
  const kern_attention a = attention_of(g);
  must(g->ops->attention_fwd(g->context, &a, g->value[0], g->out, g->aux));
  return dot(g->seed, g->out);
}
static void attention_backward(grad *g) {
  const kern_attention a = attention_of(g);
  const core_tensor dqkv = take(g, g->value[0].shape[0], g->value[0].shape[1], 1);
  must(g->ops->attention_bwd(g->context, &a, g->seed, g->value[0], g->out, g->aux, dqkv));
  must(g->ops->axpy(g->context, 1, dqkv, g->gradient[0]));
}

/* T queries to C + 4 keys: segments with none of both, with more of either, and keys that nobody asks. */
static kern_cross cross_of(const grad *g) {
  static const int64_t query[] = {0, 3, 3, 6, 7}, key[] = {0, 1, 3, 8, 10};
  const int32_t heads = g->variant ? 4 : 2;
  return (kern_cross){.attention = {{.offset = query, .count = 4}, heads, 2, 3, KERN_BIDIRECTIONAL, 0.6},
                      .keys = {.offset = key, .count = 4},
                      .q = g->value[0],
                      .kv = g->value[1],
                      .out = g->out,
                      .lse = g->aux};
}
static void cross_setup(grad *g) {
  const int32_t heads = g->variant ? 4 : 2;
  input(g, T, heads * 3);
  input(g, C + 4, 4 * 3);
  output(g, T, heads * 3);
  g->aux = take(g, T, heads, 0);
}
static double cross_loss(grad *g) {
  const kern_cross cross = cross_of(g);
  must(g->ops->attention_cross_fwd(g->context, &cross));
  return dot(g->seed, g->out);
}
static void cross_backward(grad *g) {
  const kern_cross cross = cross_of(g);
  const core_tensor dq = take(g, T, cross.q.shape[1], 1), dkv = take(g, C + 4, 4 * 3, 1);
  must(g->ops->attention_cross_bwd(g->context, &cross, g->seed, dq, dkv));
  must(g->ops->axpy(g->context, 1, dq, g->gradient[0]));
  must(g->ops->axpy(g->context, 1, dkv, g->gradient[1]));
}

static void segment_mean_setup(grad *g) {
  input(g, T, C);
  output(g, 4, C);
}
static double segment_mean_loss(grad *g) {
  must(g->ops->segment_mean_fwd(g->context, segments, g->value[0], g->out));
  return dot(g->seed, g->out);
}
static void segment_mean_backward(grad *g) {
  must(g->ops->segment_mean_bwd(g->context, segments, g->seed, KERN_ADD, g->gradient[0]));
}
static void position_setup(grad *g) {
  input(g, 5, C);
  output(g, T, C);
}
static double position_loss(grad *g) {
  must(g->ops->fill(g->context, 0, g->out));
  must(g->ops->position_fwd(g->context, segments, g->value[0], g->out));
  return dot(g->seed, g->out);
}
static void position_backward(grad *g) {
  must(g->ops->position_bwd(g->context, segments, g->seed, g->gradient[0]));
}

/* --- router --- */
static int32_t chosen[T * K];
static core_tensor choice_of(void) {
  return core_tensor_2(chosen, CORE_INT32, T, K);
}

/* Logits whose order a step cannot change, before noise of a tenth. */
static void spread_logits(grad *g) {
  for (int64_t i = 0; i < T * E; i++)
    values(g->value[0])[i] =
        (core_real)(0.5 * (double)((i % E * 2 + i / E * 3) % E) - 1) + values(g->value[0])[i] / 20;
}

/* Gates as a function of the logits; aux keeps the probabilities. */
static void gate_setup(grad *g) {
  input(g, T, E);
  spread_logits(g);
  output(g, T, K);
  g->aux = take(g, T, E, 0);
}
static double gate_loss(grad *g) {
  must(g->ops->router_choose(g->context, (kern_gate)g->variant, g->value[0], g->aux, choice_of(), g->out));
  return dot(g->seed, g->out);
}
static void gate_backward(grad *g) {
  must(g->ops->router_gate_bwd(g->context, (kern_gate)g->variant, g->seed, g->aux, choice_of(), g->out,
                               KERN_ADD, g->gradient[0]));
}

/* Logits from x, with and without a bias. */
static void logits_setup(grad *g) {
  input(g, T, C);
  input(g, E, C);
  if (g->variant) input(g, 1, E);
  output(g, T, E);
}
static core_tensor bias_or_none(const grad *g, const core_tensor *of) {
  return g->variant ? flat(of[2]) : (core_tensor){0};
}
static double logits_loss(grad *g) {
  must(g->ops->router_logits(g->context, g->value[0], g->value[1], bias_or_none(g, g->value), g->out));
  return dot(g->seed, g->out);
}
static void logits_backward(grad *g) {
  must(g->ops->router_logits_bwd(g->context, g->seed, g->value[0], g->value[1], KERN_ADD, g->gradient[0],
                                 g->gradient[1], bias_or_none(g, g->gradient)));
}

/* Each term alone (variants 0-3), then all together. seed keeps the noise, out the noisy logits. */
enum { SUMS = 3 + 2 * E };
static void sums_weights(const grad *g, double weights[SUMS]) {
  const int v = g->variant;
  weights[0] = 0;
  weights[1] = v == 0 || v == 4 ? 0.7 : 0;
  weights[2] = v == 1 || v == 4 ? -0.9 : 0;
  for (int e = 0; e < E; e++) {
    weights[3 + e] = v == 2 || v == 4 ? 0.3 * e - 0.5 : 0;
    weights[3 + E + e] = v == 3 || v == 4 ? 0.7 - 0.4 * e : 0;
  }
}
static void sums_setup(grad *g) {
  input(g, T, E);
  spread_logits(g);
  output(g, T, E);
  g->aux = take(g, T, E, 0);
}
static double sums_loss(grad *g) {
  double weights[SUMS], sums[SUMS] = {0}, loss = 0;
  const core_tensor gate = take(g, T, K, 0);
  g->used -= T * K;
  sums_weights(g, weights);
  memcpy(g->out.data, g->value[0].data, core_tensor_bytes(&g->out));
  must(g->ops->axpy(g->context, 0.1, g->seed, g->out));
  must(g->ops->router_choose(g->context, KERN_GATE_SOFTMAX, g->out, g->aux, choice_of(), gate));
  must(g->ops->softmax_fwd(g->context, g->value[0], g->aux));
  must(g->ops->router_sums(g->context, g->value[0], g->aux, g->out, choice_of(), 0.4,
                           core_tensor_1(sums, CORE_FLOAT64, SUMS)));
  for (int i = 0; i < SUMS; i++) loss += weights[i] * sums[i];
  return loss;
}
static void sums_backward(grad *g) {
  double weights[SUMS];
  sums_weights(g, weights);
  must(g->ops->router_sums_bwd(g->context, core_tensor_1(weights, CORE_FLOAT64, SUMS), g->value[0], g->aux,
                               g->out, choice_of(), 0.4, g->gradient[0]));
}

/* Gates of a choice that stays, as a function of the logits and of a correction; aux keeps the probabilities.
 * variant: form + 2 kind. The gradient by the probabilities goes on through the softmax. */
static void calibrated_setup(grad *g) {
  input(g, T, E);
  input(g, T, E);
  spread_logits(g);
  for (int64_t i = 0; i < T * E; i++) values(g->value[1])[i] /= 40; /* no weight near the bound */
  output(g, T, K);
  g->aux = take(g, T, E, 0);
  for (int i = 0; i < T * K; i++) chosen[i] = (i / K + 2 * (i % K)) % E;
}
static double calibrated_loss(grad *g) {
  must(g->ops->softmax_fwd(g->context, g->value[0], g->aux));
  must(g->ops->router_gate_fwd(g->context, (kern_gate)(g->variant % 2), (kern_calibration)(g->variant / 2),
                               g->aux, g->value[1], choice_of(), g->out));
  return dot(g->seed, g->out);
}
static void calibrated_backward(grad *g) {
  const core_tensor dprob = take(g, T, E, 0), dcorrection = take(g, T, E, 0);
  must(g->ops->router_calibrated_bwd(g->context, (kern_gate)(g->variant % 2),
                                     (kern_calibration)(g->variant / 2), g->seed, g->aux, g->value[1],
                                     choice_of(), dprob, dcorrection));
  must(g->ops->softmax_bwd(g->context, dprob, g->aux, KERN_ADD, g->gradient[0]));
  must(g->ops->axpy(g->context, 1, dcorrection, g->gradient[1]));
  g->used -= 2 * T * E;
}

/* A weighted sum of the probabilities' sums of two groups. */
enum { GROUPS = 2 };
static int32_t groups[T] = {0, 1, 1, 0, 0, 1, 0};
static double balance_weights[GROUPS * E] = {0.3, -0.7, 1.1, 0, 0.4, -0.2, 0.9, 0.5, -1.3, 0.1};
static void balance_setup(grad *g) {
  input(g, T, E);
  output(g, T, E);
  g->aux = take(g, T, E, 0);
  for (int i = 0; i < T * K; i++) chosen[i] = i % E;
}
static double balance_loss(grad *g) {
  double sums[GROUPS * (1 + 2 * E)] = {0}, loss = 0;
  must(g->ops->softmax_fwd(g->context, g->value[0], g->aux));
  must(g->ops->router_balance(g->context, g->aux, choice_of(), core_tensor_1(groups, CORE_INT32, T), 1,
                              core_tensor_2(sums, CORE_FLOAT64, GROUPS, 1 + 2 * E)));
  for (int i = 0; i < GROUPS * E; i++) loss += balance_weights[i] * sums[i / E * (1 + 2 * E) + 1 + i % E];
  return loss;
}
static void balance_backward(grad *g) {
  must(g->ops->router_balance_bwd(g->context, core_tensor_2(balance_weights, CORE_FLOAT64, GROUPS, E),
                                  core_tensor_1(groups, CORE_INT32, T), g->aux, g->gradient[0]));
}

/* --- permutation --- */
static int32_t slots[T * K] = {3, 0, -1, 5, 7, 1, 2, -1, -1, -1, 4, 8, 6, 9};
static core_tensor slot_of(void) {
  return core_tensor_2(slots, CORE_INT32, T, K);
}
static void combine_setup(grad *g) {
  input(g, 11, C);
  input(g, T, K);
  output(g, T, C);
}
static double combine_loss(grad *g) {
  must(g->ops->combine_fwd(g->context, g->value[0], slot_of(), g->value[1], KERN_SET, g->out));
  return dot(g->seed, g->out);
}
static void combine_backward(grad *g) {
  const core_tensor dx = take(g, 11, C, 0), dweight = take(g, T, K, 1);
  must(g->ops->combine_bwd(g->context, g->seed, g->value[0], slot_of(), g->value[1], dx, dweight));
  must(g->ops->axpy(g->context, 1, dx, g->gradient[0]));
  must(g->ops->axpy(g->context, 1, dweight, g->gradient[1]));
}

/* Every row of x is named twice or not at all: its gradient is the combine of the copies' gradients. */
static int32_t gather_index[10] = {4, 0, 2, 2, 5, 0, 4, 6, 6, 5};
static int32_t gather_slot[T * 2] = {1, 5, -1, -1, 2, 3, -1, -1, 0, 6, 4, 9, 7, 8};
static void gather_setup(grad *g) {
  input(g, T, C);
  output(g, 10, C);
}
static double gather_loss(grad *g) {
  must(g->ops->gather_rows(g->context, g->value[0], core_tensor_1(gather_index, CORE_INT32, 10), g->out));
  return dot(g->seed, g->out);
}
static void gather_backward(grad *g) {
  must(g->ops->combine_fwd(g->context, g->seed, core_tensor_2(gather_slot, CORE_INT32, T, 2),
                           (core_tensor){0}, KERN_ADD, g->gradient[0]));
}

/* --- losses --- */
/* The full symmetric loss over q[T,C], k[T,C] and the scale, by row blocks of both directions. */
static uint8_t valid[T] = {1, 1, 0, 1, 1, 1, 1};
static int32_t label[T] = {-1, 3, 3, 3, -1, 2, 2};
static uint64_t ids[T] = {9, 8, 7, 6, 9, 5, 4};
static const double contrastive_weight = 0.2;
typedef struct direction {
  core_tensor rows, columns, cosine, lse, positive;
} direction;

static void contrastive_setup(grad *g) {
  input(g, T, C);
  input(g, T, C);
  input(g, 1, 1);
  for (int64_t i = 0; i < T * C; i++) values(g->value[0])[i] *= (core_real)0.5;
  values(g->value[2])[0] = (core_real)1.7;
  g->aux = take(g, 2 * T, T, 0);
  g->out = take(g, 4, T, 0);
}
static direction direction_of(const grad *g, int way) {
  return (direction){g->value[way], g->value[1 - way],
                     core_tensor_2(values(g->aux) + way * T * T, CORE_REAL_DTYPE, T, T),
                     core_tensor_1(values(g->out) + way * T, CORE_REAL_DTYPE, T),
                     core_tensor_1(values(g->out) + (2 + way) * T, CORE_REAL_DTYPE, T)};
}
static kern_contrastive contrastive_of(const grad *g) {
  return (kern_contrastive){.scale = (double)values(g->value[2])[0],
                            .valid = core_tensor_1(valid, CORE_UINT8, T),
                            .label = core_tensor_1(label, CORE_INT32, T),
                            .id = core_tensor_1(ids, CORE_UINT64, T)};
}
static double contrastive_loss(grad *g) {
  const kern_contrastive c = contrastive_of(g);
  double loss = 0;
  for (int way = 0; way < 2; way++) {
    const direction d = direction_of(g, way);
    must(g->ops->gemm(g->context, KERN_NT, d.rows, d.columns, KERN_SET, d.cosine));
    must(g->ops->contrastive_fwd(g->context, &c, d.cosine, d.lse, d.positive));
    for (int64_t i = 0; i < T; i++) loss += (double)values(d.lse)[i] - (double)values(d.positive)[i];
  }
  return contrastive_weight * loss;
}
/* The first direction's blocks give dq (its own rows), the second's give dk. */
static void contrastive_backward(grad *g) {
  double dscale = 0;
  for (int way = 0; way < 2; way++) {
    const direction d = direction_of(g, way), opposite = direction_of(g, 1 - way);
    for (int64_t begin = 0; begin < T; begin += 4) {
      const int64_t n = T - begin < 4 ? T - begin : 4;
      kern_contrastive c = contrastive_of(g);
      c.first = begin;
      const core_tensor cosine = core_tensor_2(values(d.cosine) + begin * T, CORE_REAL_DTYPE, n, T);
      const core_tensor lse = core_tensor_1(values(d.lse) + begin, CORE_REAL_DTYPE, n);
      must(g->ops->contrastive_bwd(g->context, &c, contrastive_weight, lse, opposite.lse, cosine,
                                   core_tensor_1(&dscale, CORE_FLOAT64, 1)));
    }
    must(g->ops->gemm(g->context, KERN_NN, d.cosine, d.columns, KERN_ADD, g->gradient[way]));
  }
  values(g->gradient[2])[0] += (core_real)dscale;
}

static int32_t targets[T] = {2, -1, 0, 5, 5, 1, -1};
static void cross_entropy_setup(grad *g) {
  input(g, T, C);
  g->out = take(g, 2, T, 0);
}
static core_tensor out_row(const grad *g, int64_t row) {
  return core_tensor_1(values(g->out) + row * T, CORE_REAL_DTYPE, T);
}
/* In two parts of the columns. */
static core_tensor columns_of(grad *g, int64_t from, int64_t to) {
  const core_tensor part = take(g, T, to - from, 0);
  for (int64_t i = 0; i < T * (to - from); i++)
    values(part)[i] = values(g->value[0])[i / (to - from) * C + from + i % (to - from)];
  return part;
}
static double cross_entropy_loss(grad *g) {
  const core_tensor target = core_tensor_1(targets, CORE_INT32, T);
  double loss = 0;
  for (int64_t i = 0; i < T; i++) values(g->out)[i] = -INFINITY, values(g->out)[T + i] = 0;
  const int64_t kept = g->used;
  must(
      g->ops->cross_entropy_fwd(g->context, columns_of(g, 0, 2), 0, C, target, out_row(g, 0), out_row(g, 1)));
  must(
      g->ops->cross_entropy_fwd(g->context, columns_of(g, 2, C), 2, C, target, out_row(g, 0), out_row(g, 1)));
  g->used = kept;
  for (int64_t i = 0; i < T; i++)
    if (targets[i] >= 0) loss += 0.3 * ((double)values(g->out)[i] - (double)values(g->out)[T + i]);
  return loss;
}
static void cross_entropy_backward(grad *g) {
  const core_tensor logits = take(g, T, C, 0);
  memcpy(logits.data, g->value[0].data, core_tensor_bytes(&logits));
  must(g->ops->cross_entropy_bwd(g->context, 0.3, out_row(g, 0), 0, C, core_tensor_1(targets, CORE_INT32, T),
                                 logits, logits));
  must(g->ops->axpy(g->context, 1, logits, g->gradient[0]));
}

/* Looked up by combine: the loss is a weighted sum of the rows. */
static void embedding_setup(grad *g) {
  input(g, T, C);
  g->out = take(g, T, C, 1);
}
static int32_t looked_up[T] = {4, 1, 4, -1, 0, 1, 4};
static double embedding_loss(grad *g) {
  const int64_t kept = g->used;
  const core_tensor y = take(g, T, C, 0);
  double sum = 0;
  must(g->ops->combine_fwd(g->context, g->value[0], core_tensor_2(looked_up, CORE_INT32, T, 1),
                           (core_tensor){0}, KERN_SET, y));
  for (int64_t i = 0; i < T * C; i++) sum += (double)values(y)[i] * (double)values(g->out)[i];
  g->used = kept;
  return sum;
}
static void embedding_backward(grad *g) {
  int32_t row[] = {4, 1, 5, 0, 2, 6}, entry[] = {0, 1, 4};
  int64_t offset[] = {0, 1, 3, 6};
  const kern_segments entries = {offset, core_tensor_1(offset, CORE_INT64, 4), 3};
  must(g->ops->embedding_bwd(g->context, entries, core_tensor_1(row, CORE_INT32, 6),
                             core_tensor_1(entry, CORE_INT32, 3), g->out, g->gradient[0]));
}

static void regression_setup(grad *g) {
  input(g, T, C);
  g->out = take(g, T, C, 1);
  g->aux = take(g, T, 1, 0);
}
static double regression_loss(grad *g) {
  const core_tensor loss = flat(g->aux);
  must(g->ops->regression(g->context, (kern_regression)g->variant, 0.3, g->value[0], g->out,
                          core_tensor_1(valid, CORE_UINT8, T), loss, (core_tensor){0}));
  double sum = 0;
  for (int64_t i = 0; i < T; i++) sum += 0.3 * (double)values(loss)[i];
  return sum;
}
static void regression_backward(grad *g) {
  const core_tensor d = take(g, T, C, 0);
  must(g->ops->regression(g->context, (kern_regression)g->variant, 0.3, g->value[0], g->out,
                          core_tensor_1(valid, CORE_UINT8, T), flat(g->aux), d));
  must(g->ops->axpy(g->context, 1, d, g->gradient[0]));
}

#define CASE(name, variants) \
  { #name, name##_setup, name##_loss, name##_backward, variants }
static const grad_case cases[] = {
    CASE(gemm, 3),       CASE(grouped, 1),      CASE(bias, 1),        CASE(gelu, 2),
    CASE(swiglu, 1),     CASE(rmsnorm, 1),      CASE(layernorm, 1),   CASE(l2norm, 1),
    CASE(rope, 1),       CASE(attention, 4),    CASE(cross, 2),       CASE(segment_mean, 1),
    CASE(position, 1),   CASE(gate, 2),         CASE(logits, 2),      CASE(sums, 5),
    CASE(combine, 1),    CASE(gather, 1),       CASE(contrastive, 1), CASE(cross_entropy, 1),
    CASE(regression, 2), CASE(bias_grouped, 1), CASE(embedding, 1),   CASE(calibrated, 4),
    CASE(balance, 1),
};

/* Each element of each input: (L(x + h) - L(x - h)) / 2h. */
static void check_input(grad *g, const grad_case *c, int32_t which) {
  core_real *x = values(g->value[which]);
  double error = 0, norm = 0;
  for (int64_t i = 0; i < core_tensor_count(&g->value[which]); i++) {
    const core_real kept = x[i], up = (core_real)((double)kept + step),
                    down = (core_real)((double)kept - step);
    x[i] = up;
    const double above = c->loss(g);
    x[i] = down;
    const double below = c->loss(g);
    x[i] = kept;
    const double numeric = (above - below) / ((double)up - (double)down);
    const double analytic = (double)values(g->gradient[which])[i] - 0.5;
    error += (numeric - analytic) * (numeric - analytic);
    norm += numeric * numeric;
  }
  assert_true(norm > 0);
  if (!(sqrt(error) <= bar * sqrt(norm)))
    fail_msg("%s, variant %d, input %d: relative error %.3g above %.3g", c->name, g->variant, which,
             sqrt(error / norm), bar);
}

static void backward_matches_central_differences(void **state) {
  (void)state;
  const kern_limits limits = {.rows = 64, .width = 64, .experts = 8, .sequence = 8, .heads = 4, .threads = 2};
  grad *g = calloc(1, sizeof *g);
  assert_non_null(g);
  kern_context *context;
  must(kern_cpu()->context_create(&limits, &context));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    for (int variant = 0; variant < cases[i].variants; variant++) {
      memset(g, 0, sizeof *g);
      g->ops = kern_cpu(), g->context = context, g->variant = variant;
      cases[i].setup(g);
      (void)cases[i].loss(g);
      cases[i].backward(g);
      for (int32_t which = 0; which < g->inputs; which++) check_input(g, &cases[i], which);
    }
  kern_cpu()->context_destroy(context);
  free(g);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(backward_matches_central_differences)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
