/* Linear maps: every product of activations with a matrix of the blocks, connectors and heads,
 *
 *   y (+)= x W^T + b        dx = dy W        dW += dy^T x        db += sum of dy
 *
 * with one matrix for all rows, or a matrix for each group of rows (experts). A frozen matrix or bias has no
 * gradient, and the product that would make it is not computed. */
#ifndef TRAIN_LINEAR_H
#define TRAIN_LINEAR_H

#include "trainer/mirror.h"
#include "trainer/parameter.h"

struct train_model;

/* An adapter beside a map: see lora.h. */
typedef struct train_lora {
  int32_t a, b; /* parameters [r, k], [n, r]; of groups the first's */
  int64_t rank; /* r; 0: there is none */
  double scale, dropout;
} train_lora;

typedef struct train_linear {
  int32_t weight, bias; /* parameters [n, k], [n]; bias -1: none. Of groups: the first's, the others follow */
  int64_t groups;       /* 0: one matrix for all rows */
  train_lora lora;
} train_linear;

/* What the rows are. */
typedef struct train_linear_rows {
  const int64_t *group; /* [groups + 1], host: the rows of each group; NULL with one matrix */
  core_tensor key;      /* uint64 [R] global places; read where an adapter's input is dropped out */
} train_linear_rows;

/* Memory that all maps share. */
typedef struct train_linear_scratch {
  int64_t *group; /* [local experts + 1], host: the rows of some of the groups */
} train_linear_scratch;

/* Memory that all adapters share. */
typedef struct train_lora_scratch {
  bool drops;           /* set by train_model_forward: the pass is one of training */
  core_tensor low;      /* [R, r] core_real */
  core_tensor rounded;  /* the same, active */
  core_tensor input;    /* [R, k] active: dropped out, or a gradient by it */
  core_tensor sent_key; /* int32 [T K, 2] keys of rows at their sender, for experts */
  train_mirror row;     /* int32 [R] 0, 1, ... */
} train_lora_scratch;

/* A map of all rows. */
static inline train_linear train_linear_of(int32_t weight, int32_t bias) {
  return (train_linear){.weight = weight, .bias = bias};
}

/* Makes a map known, so that model.lora may name it; `map` stays where it is. Local. */
CORE_NODISCARD core_status train_linear_add(struct train_model *model, train_linear *map);
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
/* Whether a step may change the matrix, the bias or the adapter of a map of all rows. */
bool train_linear_trained(const struct train_model *model, const train_linear *map);
/* One product, or with groups one for each: kern_ops.gemm, gemm_grouped. */
CORE_NODISCARD core_status train_product(struct train_model *model, kern_form form, const int64_t *group,
                                         core_tensor a, core_tensor b, kern_write write, core_tensor c);
/* The gradient of a matrix, or of those of the groups, where they are trained: += dy^T x. */
CORE_NODISCARD core_status train_matrix_backward(struct train_model *model, int32_t index, int64_t groups,
                                                 train_linear_rows rows, core_tensor dy, core_tensor x);
/* The gradient of a vector that was added to all rows, where it is trained. */
CORE_NODISCARD core_status train_bias_backward(struct train_model *model, int32_t bias, core_tensor dy);

#endif
