/* Objectives: functions of the tower's outputs and of the router's sums, with their derivatives. All
 * normalised by global counts, so that gradients are only summed over ranks and micro-batches. */
#ifndef TRAIN_OBJECTIVE_H
#define TRAIN_OBJECTIVE_H

#include "trainer/env.h"
#include "trainer/model/tower.h"

enum { TRAIN_MAX_PAIRS = CORE_MAX_MODALITIES * (CORE_MAX_MODALITIES - 1) / 2 + 256 };

/* Contrastive loss over the global batch (METHODS section 1; Radford et al. 2021):
 *   L = 1/P sum over pairs (a, b) of 1/n sum over samples j that have both of
 *       1/2 (lse_k s<a_j, b_k> - s<a_j, b_j>) + 1/2 (lse_k s<a_k, b_j> - s<a_j, b_j>)
 * s = 1 / temperature. Samples of equal label or id are masked from both softmaxes. An empty pair counts 0.
 */
typedef struct train_contrastive {
  train_env *env;
  int32_t pairs;
  int32_t first[TRAIN_MAX_PAIRS], second[TRAIN_MAX_PAIRS]; /* modalities */
  int64_t B, Z, block;                       /* global batch, width, rows of a block of logits */
  core_tensor z[CORE_MAX_MODALITIES];        /* [B, Z] of all ranks */
  core_tensor gradient[CORE_MAX_MODALITIES]; /* [B, Z], own rows */
  train_mirror lse, positive;                /* [2 pairs, B] per direction */
  core_tensor cosine;                        /* [block, B] */
  train_mirror valid;                        /* uint8 [pairs, B] */
  train_mirror label, id;                    /* int32 [B], uint64 [B] */
  train_mirror d_scale;                      /* float64 [1], this rank's part of dL/ds */
  int64_t count[TRAIN_MAX_PAIRS];            /* samples that have both, global */
  double loss[TRAIN_MAX_PAIRS];              /* this rank's part of sum (..), not yet divided */
  int32_t averaged;                          /* P above: pairs whose mean is the loss */
  double factor;                             /* of the gradients */
  comm_piece *send, *recv;
} train_contrastive;

CORE_NODISCARD core_status train_contrastive_make(train_env *env, int64_t width, train_contrastive *out);
CORE_NODISCARD core_status train_contrastive_plan(train_contrastive *loss, const train_arenas *arenas);
/* The same for the rows of one modality: [n, Z] of this rank's samples in `micro`. */
CORE_NODISCARD core_status train_contrastive_put_rows(train_contrastive *loss, int32_t m, int64_t micro,
                                                      core_tensor rows);
CORE_NODISCARD core_status train_contrastive_get_rows(const train_contrastive *loss, int32_t m, int64_t micro,
                                                      core_tensor rows);
/* Takes the embeddings of a forward pass of micro-batch `micro`; gives their gradients for its backward pass.
 */
CORE_NODISCARD core_status train_contrastive_put(train_contrastive *loss, const train_model *model,
                                                 int64_t micro);
CORE_NODISCARD core_status train_contrastive_get(const train_contrastive *loss, train_model *model,
                                                 int64_t micro);
/* Loss parts, gradients of own rows and of the scale, from all put embeddings; d_scale is on the host
 * afterwards. Collective over the world. */
CORE_NODISCARD core_status train_contrastive_evaluate(train_contrastive *loss, const data_batch *batch,
                                                      double scale);
/* The same for one pair; the others' losses and counts stay. */
CORE_NODISCARD core_status train_contrastive_evaluate_pair(train_contrastive *loss, const data_batch *batch,
                                                           double scale, int32_t pair);
/* The loss from parts that have been summed over ranks. */
double train_contrastive_total(const train_contrastive *loss, const double *summed);

/* Router losses (METHODS section 1), per MoE layer, summed over layers:
 *   importance CV^2(sum p_e), load CV^2(sum (1 - Phi)), z mean lse^2: all modalities together;
 *   local mean H(p), global max(0, log S_m - H(mean p)): per modality;
 * and the balance loss (METHODS sections 3 and 4; Lepikhin et al. 2021; Fedus et al. 2022), mean over layers:
 *   E sum_e me_e ce_e, me the mean probability and ce the share of the choices, which is held constant; over
 * the global batch, or the mean over its groups of samples. */
typedef struct train_router_loss {
  double importance, load, z, local, global; /* weighted, summed over layers and modalities */
  double balance;                            /* weighted */
} train_router_loss;
double train_router_loss_total(const train_router_loss *loss);

typedef struct train_router_objective {
  const train_env *env;
  train_mirror weights; /* float64 [layers M, 3 + 2 E], for train_model_backward */
  int32_t layers;
} train_router_objective;

CORE_NODISCARD core_status train_router_plan(train_router_objective *objective, const train_env *env,
                                             int32_t layers, const train_arenas *arenas);
/* Losses and their derivatives from sums over all ranks and micro-batches (on the host). Local. */
CORE_NODISCARD core_status train_router_evaluate(train_router_objective *objective,
                                                 const train_moe_sums *sums, train_router_loss *out);
/* H of a distribution given by unnormalised values; natural log. */
double train_entropy(const double *values, int64_t count);
/* CV^2 = population variance / mean^2; 0 where the mean is not positive. */
double train_squared_variation(const double *values, int64_t count);

#endif
