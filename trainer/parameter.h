/* Parameters: named tensors, laid out flat so that each set that is reduced together is one range.
 *
 * Models declare parameters first (name, shape, scope, initial values), then the set is placed: value,
 * gradient and both Adam moments in four equal flat arrays, ordered by scope. Parameters declared one after
 * another in one scope lie one after another, without gaps, so that the matrices of a layer's experts form
 * one [E, n, k] block. */
#ifndef TRAIN_PARAMETER_H
#define TRAIN_PARAMETER_H

#include "core/arena.h"
#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h"

/* Over which ranks copies of a parameter exist; its gradient is summed over them. */
typedef enum train_scope {
  TRAIN_SCOPE_WORLD,    /* every rank */
  TRAIN_SCOPE_EXPERT,   /* the replica group: equal slots of all expert groups */
  TRAIN_SCOPE_MODALITY, /* the ranks that hold modality m */
} train_scope;

typedef enum train_init {
  TRAIN_INIT_ZERO,
  TRAIN_INIT_ONE,
  TRAIN_INIT_NORMAL,
  TRAIN_INIT_CONSTANT
} train_init;

typedef struct train_parameter {
  char name[CORE_NAME]; /* global: an expert by its global number */
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
  train_scope scope;
  int32_t modality; /* of TRAIN_SCOPE_MODALITY */
  train_init init;
  double init_value; /* standard deviation, or the constant */
  bool decay;        /* weight decay applies */
  /* set by train_parameters_place: */
  int64_t first, count; /* range in the flat arrays */
  int64_t steps;        /* updates so far, for Adam's bias correction */
} train_parameter;

typedef struct train_parameters {
  train_parameter *list;
  int32_t count, capacity;
  int64_t total;                                    /* elements */
  int64_t scope_first[2 + CORE_MAX_MODALITIES + 1]; /* world, expert, modality 0.. */
  core_real *value, *gradient, *m, *v;              /* [total] */
} train_parameters;

/* Declares a parameter; *index is its number in the set. */
CORE_NODISCARD core_status train_parameters_add(train_parameters *set, const train_parameter *parameter,
                                                int32_t *index);
/* Orders by scope and fixes the ranges; no more declarations. */
void train_parameters_place(train_parameters *set);
/* Takes the four arrays (gradient, m, v only when `training`). Two passes, as core_arena. */
CORE_NODISCARD core_status train_parameters_plan(train_parameters *set, core_arena *arena, bool training);
/* Fills values from the seed, by name and global element number: the same on every layout. Gradients and
 * moments become zero. */
void train_parameters_initialise(train_parameters *set, uint64_t seed);
void train_parameters_free(train_parameters *set);

core_tensor train_parameter_value(const train_parameters *set, int32_t index);
core_tensor train_parameter_gradient(const train_parameters *set, int32_t index);
/* `count` equal-shaped neighbours [n, k] as one [count, n, k]. */
core_tensor train_parameter_values(const train_parameters *set, int32_t index, int64_t count);
core_tensor train_parameter_gradients(const train_parameters *set, int32_t index, int64_t count);

#endif
