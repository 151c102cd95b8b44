/* The objective of a connector (METHODS section 2), for direction a -> b over the global batch:
 *   L = alpha reg(predicted, target) + (1 - alpha) InfoNCE(cos(query, key) / temperature)
 * reg is a row's squared or smooth absolute difference (kern_regression), averaged over the samples that have
 * both modalities; InfoNCE is the contrastive loss of objective.h for the pair, with the same masks.
 * Gradients are exact: every rank has all queries, keys and targets. */
#ifndef TRAIN_ALIGNMENT_LOSS_H
#define TRAIN_ALIGNMENT_LOSS_H

#include "trainer/objective/objective.h"

typedef struct train_alignment_loss {
  train_env *env;
  train_contrastive contrastive;           /* its pairs are the directions */
  core_tensor predicted, target;           /* [B D] core_real, D the width of the modality asked for */
  core_tensor d_predicted;                 /* [B D] active */
  train_mirror rows;                       /* core_real [B]: regression of each sample */
  double regression[TRAIN_MAX_DIRECTIONS]; /* this rank's part of each direction's sum, not yet divided */
} train_alignment_loss;

CORE_NODISCARD core_status train_alignment_loss_make(train_env *env, const train_model *model,
                                                     train_alignment_loss *out);
CORE_NODISCARD core_status train_alignment_loss_plan(train_alignment_loss *loss, const train_model *model,
                                                     const train_arenas *arenas);
/* Takes the outputs of a forward pass of the active direction; gives their gradients for its backward pass.
 */
CORE_NODISCARD core_status train_alignment_loss_put(train_alignment_loss *loss, const train_model *model,
                                                    int64_t micro);
CORE_NODISCARD core_status train_alignment_loss_get(const train_alignment_loss *loss, train_model *model,
                                                    int64_t micro);
/* Parts of the loss of direction d and gradients of own rows, from all outputs put. Collective over the
 * world. */
CORE_NODISCARD core_status train_alignment_loss_evaluate(train_alignment_loss *loss, const train_model *model,
                                                         const data_batch *batch, int32_t d);

#endif
