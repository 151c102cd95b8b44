/* What every part of the trainer needs at hand: backend, groups of ranks, settings, the step. Shared by
 * reference; owned by the run (run.c). */
#ifndef TRAIN_ENV_H
#define TRAIN_ENV_H

#include "comm/comm.h"
#include "core/arena.h"
#include "kernels/kernels.h"
#include "trainer/layout.h"
#include "trainer/settings.h"

/* Where the time of a step goes. */
typedef enum train_phase {
  TRAIN_PHASE_DATA,
  TRAIN_PHASE_FORWARD,
  TRAIN_PHASE_EXCHANGE, /* the all-to-alls of MoE layers; not counted in forward and backward */
  TRAIN_PHASE_LOSS,
  TRAIN_PHASE_BACKWARD,
  TRAIN_PHASE_REDUCE, /* gradients over their groups */
  TRAIN_PHASE_OPTIMIZER,
  TRAIN_PHASE_CHECKPOINT,
  TRAIN_PHASE_COUNT
} train_phase;

/* Memory of a session by lifetime and place. */
typedef struct train_arenas {
  core_arena *parameters, *activations, *objective; /* of the device */
  core_arena *host;                                 /* what only the host works on, and its side of mirrors */
  bool host_access;                                 /* the host can read the device's memory */
} train_arenas;

typedef struct train_env {
  const core_config *config;
  const train_settings *settings;
  const kern_ops *ops;
  core_dtype active; /* dtype of activations and of the matrices they meet: core_real's, or BFLOAT16 */
  kern_context *kern;
  comm_world *comm;
  comm_group *world, *control;
  comm_group *expert;                        /* the e ranks that hold all experts together */
  comm_group *replica;                       /* the G ranks that hold copies of this rank's experts */
  comm_group *modality[CORE_MAX_MODALITIES]; /* NULL where this rank does not hold the modality */
  train_layout layout;
  int64_t step;
  double seconds[TRAIN_PHASE_COUNT]; /* of the current step */
} train_env;

/* Runs an op of the table, or passes its failure on. */
#define KERN(env, op, ...) TRY((env)->ops->op((env)->kern, __VA_ARGS__))

/* First n rows of a matrix, or n rows from `first` on. */
static inline core_tensor train_rows(core_tensor tensor, int64_t n) {
  tensor.shape[0] = n;
  return tensor;
}
static inline core_tensor train_slice(core_tensor tensor, int64_t first, int64_t n) {
  size_t row = core_dtype_size(tensor.dtype);
  for (int32_t i = 1; i < tensor.rank; i++) row *= (size_t)tensor.shape[i];
  if (tensor.data) tensor.data = (char *)tensor.data + (size_t)first * row;
  tensor.shape[0] = n;
  return tensor;
}
static inline core_tensor train_none(void) {
  return core_tensor_1(NULL, CORE_REAL_DTYPE, 0);
}
/* A matrix from an arena. */
CORE_NODISCARD static inline core_status train_take(core_arena *arena, core_dtype dtype, int64_t rows,
                                                    int64_t columns, core_tensor *out) {
  *out = core_tensor_2(NULL, dtype, rows, columns);
  TRY(core_arena_take(arena, rows * columns, core_dtype_size(dtype), &out->data));
  return CORE_OK;
}

#endif
