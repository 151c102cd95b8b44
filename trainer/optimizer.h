/* Gradients over their groups, the global norm, AdamW. */
#ifndef TRAIN_OPTIMIZER_H
#define TRAIN_OPTIMIZER_H

#include "trainer/model/tower.h"

/* Sums each range of gradients over the ranks that hold it: dense over the world, experts over their
 * replicas, a modality's over its ranks. Never divides: losses are already normalised by global counts.
 * Collective. */
CORE_NODISCARD core_status train_optimizer_reduce(train_model *model);
/* Norm of all distinct parameters' gradients, each counted once whatever its copies. Equal bits on all ranks.
 * After train_optimizer_reduce. Collective over the world. */
CORE_NODISCARD core_status train_optimizer_norm(train_model *model, double *norm);
/* AdamW on every parameter; gradients are multiplied by `scale` (clipping) on the way. Also clamps the
 * contrastive scale. Local. */
CORE_NODISCARD core_status train_optimizer_update(train_model *model, double rate, double scale);
/* Sets all gradients to zero. */
CORE_NODISCARD core_status train_optimizer_clear(train_model *model);

#endif
