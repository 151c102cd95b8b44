/* The global norm and AdamW, with the optimizer's state sharded or not. */
#ifndef TRAIN_OPTIMIZER_H
#define TRAIN_OPTIMIZER_H

#include "trainer/model/tower.h"

/* Memory of the optimizer beside the parameters' own. */
typedef struct train_optimizer {
  train_mirror squares; /* float64 [1] */
  kern_adamw *list;     /* [parameters] updates of one scope */
} train_optimizer;

CORE_NODISCARD core_status train_optimizer_plan(train_optimizer *optimizer, const train_model *model,
                                                const train_arenas *arenas);
/* Makes the reduced gradients complete on every rank; for tests and diagnosis. Collective. */
CORE_NODISCARD core_status train_optimizer_gather(train_model *model);
/* Norm of all distinct parameters' gradients, each counted once whatever its copies. Equal bits on all ranks.
 * After train_reduction_finish. Collective over the world. */
CORE_NODISCARD core_status train_optimizer_norm(const train_optimizer *optimizer, train_model *model,
                                                double *norm);
/* AdamW on what this rank updates, then every rank has all new values and their rounded copies. Gradients are
 * multiplied by `scale` (clipping) on the way. Also clamps the contrastive scale. Collective where the
 * optimizer is sharded, else local. */
CORE_NODISCARD core_status train_optimizer_update(const train_optimizer *optimizer, train_model *model,
                                                  double rate, double scale);
/* Sets all gradients to zero. */
CORE_NODISCARD core_status train_optimizer_clear(train_model *model);

#endif
