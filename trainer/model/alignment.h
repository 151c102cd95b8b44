/* The connector between latent spaces (METHODS section 2; Lei et al. 2024, Alt-MoE / M3-JEPA). For direction
 * a -> b, on standardised latents h_a, h_b:
 *
 *   z = GELU(W_a (h_a + u_ab) + c_a)                         in-adapter, direction embedding u
 *   two views v in {prediction, contrast}:  s_v = z + t_v ;  y_v = MoE(s_v) ;  o_v = s_v + GELU(LN_v(y_v))
 *   predicted latent  V_b mean(o_prediction)                 target  mean(h_b)
 *   query             C_ab mean(o_contrast)                  key     K_b mean(h_b)        both L2-normalised
 *
 * Means are over an item's tokens; a linear map of the mean is the mean of the map. Both views of all tokens
 * go through the block together: rows [0, T) and [T, 2 T). The block is a mixture of experts, or with
 * model.dense one feed-forward of the chosen experts' width (dense_match active) or of all experts' (total).
 * It is shared by all directions, or with model.per_direction each has its own, with its norms and view
 * embeddings.
 *
 * W, c, u, K lie with the ranks that hold their modality; all else on every rank. Only the parameters of the
 * active direction take part in a step: train_model_activate. */
#ifndef TRAIN_ALIGNMENT_H
#define TRAIN_ALIGNMENT_H

#include "trainer/mirror.h"
#include "trainer/parameter.h"

struct train_model;
struct data_batch;

enum { TRAIN_VIEW_PREDICTION, TRAIN_VIEW_CONTRAST, TRAIN_VIEWS };

typedef struct train_direction {
  int32_t from, toward;
  int32_t embedding;         /* u [D_from]; -1 where `from` is not held */
  int32_t query, query_bias; /* C [Z, H], [Z] */
  int32_t block;             /* which connector */
} train_direction;

/* What one connector has beside its block. */
typedef struct train_connector_part {
  int32_t view[TRAIN_VIEWS];                         /* t [H] */
  int32_t norm[TRAIN_VIEWS], norm_bias[TRAIN_VIEWS]; /* LN */
} train_connector_part;

typedef struct train_alignment {
  int32_t directions, parts;
  train_direction *direction; /* [directions] */
  train_connector_part *part; /* [parts] */
  int32_t active;             /* direction of the current items */
  int32_t adapter[CORE_MAX_MODALITIES], adapter_bias[CORE_MAX_MODALITIES]; /* W [H, D], c [H]; -1 not held */
  int32_t target[CORE_MAX_MODALITIES],
      target_bias[CORE_MAX_MODALITIES];                            /* V [D, H], [D]; -1 never toward it */
  int32_t key[CORE_MAX_MODALITIES], key_bias[CORE_MAX_MODALITIES]; /* K [Z, D], [Z]; -1 not held */
  core_tensor input[2];          /* standardised latents of from (+ u) and of toward: active [T, D] */
  core_tensor before;            /* [T, H] before GELU */
  core_tensor x, y, norm, gated; /* [2 T, H]: views, block's output, its norm, GELU of it */
  core_tensor output;            /* [2 T, H] */
  core_tensor stat[TRAIN_VIEWS]; /* [T, 2] */
  core_tensor pooled;            /* [2 S, H] */
  core_tensor predicted;         /* [S, D_toward] core_real */
  core_tensor raw, query_rows, query_norm; /* [S, Z], [S, Z], [S] core_real */
  core_tensor mean;                        /* [S, D_toward] active: mean latents of toward */
  core_tensor target_rows;                 /* the same as core_real */
  core_tensor key_raw, key_rows, key_norm; /* [S, Z], [S, Z], [S] core_real */
  /* gradients: of the outputs, filled by the objective; on their way down, active */
  core_tensor d_predicted;                /* [S, D_toward] active */
  core_tensor d_query, d_key;             /* [S, Z] core_real */
  core_tensor d_raw, d_pooled;            /* [S, Z], [2 S, H] */
  core_tensor d_output, d_norm, d_y, d_x; /* [2 T, H] */
  core_tensor d_sum, d_sum_active;        /* [1, H] core_real, active: columns of d_before */
} train_alignment;

core_status train_alignment_declare(struct train_model *model);
core_status train_alignment_plan(struct train_model *model, const train_arenas *arenas);
void train_alignment_free(train_alignment *alignment);
/* Items of direction d of a micro-batch: the tokens of `from` in two views, and the latents of `toward`. */
core_status train_alignment_take(struct train_model *model, const struct data_batch *batch, int64_t micro,
                                 int32_t d);
/* items -> predicted, query_rows where `from` is held; target_rows, key_rows where `toward` is. mode:
 * train_mode. Collective over the expert group. */
core_status train_alignment_forward(struct train_model *model, int mode);
/* d_predicted, d_query, d_key -> parameter gradients. Collective over the expert group. */
core_status train_alignment_backward(struct train_model *model);
/* Marks the parameters of direction d (-1: of all directions) as active. */
void train_alignment_activate(struct train_model *model, int32_t d);

#endif
