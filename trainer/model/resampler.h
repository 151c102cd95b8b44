/* The resampler, a connector (METHODS section 3; Li et al. 2023, "BLIP-2", the Q-Former; Li et al. 2024): Q
 * learned queries read an item's latents, however many, and become its Q rows of the trunk's sequence,
 *
 *   x = queries [Q, W]; for each of `depth` layers, LN with its own weight and bias each time:
 *     x += O_s attention of the item's queries to one another (qkv = LN(x) W_s^T + b_s) + o_s
 *     x += O_c attention of the queries (q = LN(x) W_q^T + b_q) to the latents ([k | v] = s W_kv^T + b_kv) +
 * o_c x += W_2 GELU(W_1 LN(x) + b_1) + b_2                                  hidden width 4 W rows = x W^T + b
 * [Q, C]
 *
 * with s the standardised latents. Nothing is masked or rotated: the latents are a set, whose order is what
 * their encoder wrote into them; the queries have an order of their own. An item without latents has no rows.
 * Matrices start at N(0, 1/sqrt(fan in)), those that add to x divided by sqrt(3 depth), so that it keeps its
 * size; queries at N(0, 0.02), since equal queries would stay equal for ever; biases at 0.
 *
 * With model.recompute layers keep their inputs and compute the rest again. */
#ifndef TRAIN_RESAMPLER_H
#define TRAIN_RESAMPLER_H

#include "trainer/mirror.h"
#include "trainer/model/linear.h"

struct train_model;
struct data_part;
struct train_model_limits;

typedef struct train_layer_norm {
  int32_t weight, bias;  /* parameters [W] */
  core_tensor out, stat; /* [R, W], [R, 2] */
} train_layer_norm;

/* R rows of queries, T of latents. */
typedef struct train_resampler_layer {
  train_layer_norm self_norm, cross_norm, forward_norm;
  train_linear qkv, self_out;                          /* [3 W, W], [W, W] */
  train_linear q, kv, cross_out;                       /* [W, W], [2 W, D], [W, W] */
  train_linear in, out;                                /* [4 W, W], [W, 4 W] */
  core_tensor input;                                   /* [R, W] residual stream: what enters, */
  core_tensor attended, read;                          /* after self-attention, after cross-attention */
  core_tensor qkv_rows, self_mixed, self_lse;          /* [R, 3 W], [R, W], [R, H] */
  core_tensor q_rows, kv_rows, cross_mixed, cross_lse; /* [R, W], [T, 2 W], [R, W], [R, H] */
  core_tensor hidden, active;                          /* [R, 4 W] */
} train_resampler_layer;

typedef struct train_resampler {
  int64_t Q, W, H, depth;
  int32_t query;                         /* parameter [Q, W] */
  train_resampler_layer *layer;          /* [depth] */
  train_linear map;                      /* [C, W] */
  core_tensor output;                    /* [R, W] of the last layer */
  train_mirror latent_offset;            /* int64 [items + 1] rows of latents */
  train_mirror latent_key;               /* uint64 [T] their global places */
  core_tensor d_stream, d_norm, d_mixed; /* [R, W] */
  core_tensor d_wide, d_kv;              /* [R, 4 W], [T, 2 W] */
} train_resampler;

/* Parameters of modality m's resampler, which train_resampler_free releases; D: width of its latents. */
CORE_NODISCARD core_status train_resampler_declare(struct train_model *model, int32_t m, int64_t D,
                                                   train_resampler **out);
/* Two passes, as core_arena. */
CORE_NODISCARD core_status train_resampler_plan(struct train_model *model, int32_t m,
                                                const train_arenas *arenas);
/* Where the latents of a part lie, on the device; offset: int64 [items + 1], set to where the queries do.
 * Local. */
CORE_NODISCARD core_status train_resampler_take(struct train_model *model, int32_t m,
                                                const struct data_part *part, int64_t *offset);
/* latents: [T, D] active, standardised; rows: keys of x's; x: [R, C] active, set. Local. */
CORE_NODISCARD core_status train_resampler_forward(struct train_model *model, int32_t m, core_tensor latents,
                                                   train_linear_rows rows, core_tensor x);
/* dx: [R, C] active. Gradients of trained parameters accumulate; goes no further down than the lowest. */
CORE_NODISCARD core_status train_resampler_backward(struct train_model *model, int32_t m, core_tensor latents,
                                                    train_linear_rows rows, core_tensor dx);
/* Makes what kernels are opened for large enough for modality m's resampler, where it has one. */
void train_resampler_limits(const struct train_model *model, int32_t m,
                            const struct train_model_limits *limits, kern_limits *out);
/* FLOPs of the forward pass: of a row of queries in attention, given the mean latents of an item. */
double train_resampler_attention(const train_resampler *resampler, double latents);
void train_resampler_free(train_resampler *resampler); /* NULL is allowed */

#endif
