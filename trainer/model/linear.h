/* Linear maps: every product of activations with a matrix of the blocks, connectors and heads,
 *
 *   y (+)= x W^T + b        dx = dy W        dW += dy^T x        db += sum of dy
 *
 * with one matrix for all rows, or a matrix for each group of rows (experts). A frozen matrix or bias has no
 * gradient, and the product that would make it is not computed. */
#ifndef TRAIN_LINEAR_H
#define TRAIN_LINEAR_H

#include "trainer/parameter.h"

struct train_model;

typedef struct train_linear {
  int32_t weight, bias; /* parameters [n, k], [n]; bias -1: none. Of groups: the first's, the others follow */
  int64_t groups;       /* 0: one matrix for all rows */
} train_linear;

/* What the rows are. */
typedef struct train_linear_rows {
  const int64_t *group; /* [groups + 1], host: the rows of each group; NULL with one matrix */
} train_linear_rows;

/* Memory that all maps share. */
typedef struct train_linear_scratch {
  int64_t *group; /* [local experts + 1], host: the rows of some of the groups */
} train_linear_scratch;

/* A map of all rows. */
static inline train_linear train_linear_of(int32_t weight, int32_t bias) {
  return (train_linear){.weight = weight, .bias = bias};
}

/* Two passes, as core_arena. */
CORE_NODISCARD core_status train_linear_plan(struct train_model *model, const train_arenas *arenas);
/* x: [R, k] active; y: [R, n] active or core_real. Local. */
CORE_NODISCARD core_status train_linear_forward(struct train_model *model, const train_linear *map,
                                                train_linear_rows rows, core_tensor x, kern_write write,
                                                core_tensor y);
/* x: as forward; dy: [R, n] active; dx: [R, k] active, set, may be x's memory; absent: not wanted. Gradients
 * of trained parameters accumulate. Local. */
CORE_NODISCARD core_status train_linear_backward(struct train_model *model, const train_linear *map,
                                                 train_linear_rows rows, core_tensor dy, core_tensor x,
                                                 core_tensor dx);
/* The gradient of a vector that was added to all rows, where it is trained. */
CORE_NODISCARD core_status train_bias_backward(struct train_model *model, int32_t bias, core_tensor dy);

#endif
