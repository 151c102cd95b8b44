/* Parameters: named tensors, laid out flat so that each set that is reduced together is one range.
 *
 * Models declare parameters first (name, shape, scope, initial values), what no step changes is frozen, then
 * the set is placed in two flat spaces, each ordered by scope: the values of all parameters, and the
 * gradients of the trained ones. A frozen parameter has no gradient and no moments. Parameters declared one
 * after another in one scope lie one after another in both spaces, without gaps, so that the matrices of a
 * layer's experts form one [E, n, k] block.
 *
 * The ranks that hold copies of a scope divide its ranges into shares, those of either space. Each saves its
 * shares; where the optimizer is sharded (ZeRO stage 1, Rajbhandari et al. 2020) it also keeps the moments of
 * its share of the gradients alone and updates nothing else. With bfloat16 activations the matrices are
 * multiplied from a rounded copy; the values stay float32. */
#ifndef TRAIN_PARAMETER_H
#define TRAIN_PARAMETER_H

#include "core/dims.h"
#include "trainer/env.h"

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
  TRAIN_INIT_UNIFORM,
  TRAIN_INIT_CONSTANT
} train_init;

typedef struct train_parameter {
  char name[CORE_NAME]; /* global: an expert by its global number */
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
  train_scope scope;
  int32_t modality; /* of TRAIN_SCOPE_MODALITY */
  int64_t expert;   /* of TRAIN_SCOPE_EXPERT: its number in its layer; a token passes as many weights as the
                       first   K hold */
  train_init init;
  double init_value; /* standard deviation, half of the range around 0, or the constant */
  bool decay;        /* weight decay applies */
  bool frozen;       /* no step changes it: neither gradient nor moments */
  bool active;       /* takes part in the current step; when declared, and of a tower always, unless frozen */
  /* set by train_parameters_place: */
  int64_t first, count;   /* range of the values */
  int64_t gradient_first; /* the gradients begin here; -1: frozen */
  int64_t steps;          /* updates so far, for Adam's bias correction */
} train_parameter;

enum {
  TRAIN_SCOPES = 2 + CORE_MAX_MODALITIES, /* world, expert, modality 0.. */
  TRAIN_MAX_RANKS = 4096                  /* of one group */
};

/* A range of a flat space. */
typedef struct train_span {
  int64_t first, count;
} train_span;

/* The same parameters as a range of either space. */
typedef struct train_stretch {
  train_span value, gradient;
} train_stretch;

typedef struct train_parameters {
  train_parameter *list;
  int32_t count, capacity;
  int64_t total;                            /* values */
  int64_t scope_first[TRAIN_SCOPES + 1];    /* ranges of the scopes */
  int64_t gradient_total;                   /* gradients */
  int64_t gradient_scope[TRAIN_SCOPES + 1]; /* ranges of the scopes */
  train_span share[TRAIN_SCOPES];           /* values that this rank saves; its group covers the scope */
  train_span gradient_share[TRAIN_SCOPES];  /* of the gradients, likewise: whose norm it counts, whose moments
                                               it saves */
  train_span update[TRAIN_SCOPES];          /* gradients that it follows: its share, or all of the scope */
  int64_t state_first[TRAIN_SCOPES + 1];    /* where the moments of `update` lie in m and v */
  core_real *value;                         /* [total], device */
  core_real *gradient;                      /* [gradient_total], device */
  uint16_t *copy;                           /* [total], device: rounded to bfloat16; NULL: not needed */
  core_real *m, *v;                         /* [state_first[TRAIN_SCOPES]], device */
} train_parameters;

/* Declares a parameter; *index is its number in the set. */
CORE_NODISCARD core_status train_parameters_add(train_parameters *set, const train_parameter *parameter,
                                                int32_t *index);
/* Freezes what matches a pattern of names (* and ?). Before train_parameters_place. */
void train_parameters_freeze(train_parameters *set, const char *pattern);
/* Orders by scope and fixes the ranges; no more declarations. */
void train_parameters_place(train_parameters *set);
/* Divides each scope among the ranks of its group, at cells of CKPT_CELL elements inside a parameter, as
 * evenly as these allow. sharded: moments and updates follow the shares. After train_parameters_place. */
void train_parameters_share(train_parameters *set, const train_env *env, bool sharded);
/* The share of one rank of a scope's group: of the values, and of the gradients. */
train_span train_parameters_share_of(const train_parameters *set, int32_t scope, int32_t rank, int32_t size);
train_span train_gradients_share_of(const train_parameters *set, int32_t scope, int32_t rank, int32_t size);
/* The group whose ranks hold copies of a scope; NULL: this rank holds nothing of it. */
comm_group *train_scope_group(const train_env *env, int32_t scope);
int32_t train_scope_number(const train_parameter *parameter);
/* The next run of active parameters of a scope, one range in both spaces; *from is 0 at first. False at the
 * end. */
bool train_parameters_next_active(const train_parameters *set, int32_t scope, int32_t *from,
                                  train_stretch *out);
/* What two ranges have in common; count 0: nothing. */
train_span train_span_common(train_span a, train_span b);
/* The part of parameter p that lies in `span` of the values; count 0: none. And of the gradients. */
train_span train_parameter_within(const train_parameter *p, train_span span);
train_span train_gradient_within(const train_parameter *p, train_span span);

/* Takes the arrays (gradient, m, v only when `training`). Two passes, as core_arena. */
CORE_NODISCARD core_status train_parameters_plan(train_parameters *set, const train_env *env,
                                                 core_arena *arena, bool training);
/* Fills values from the seed, by name and global element number: the same on every layout. Gradients and
 * moments become zero. Takes host memory for the largest parameter where the host cannot reach the device's.
 */
CORE_NODISCARD core_status train_parameters_initialise(train_parameters *set, const train_env *env);
/* The initial values of one: the same function of seed, name and number of an element everywhere. value:
 * [count], host. Local. */
void train_parameter_draw(const train_parameter *parameter, uint64_t seed, core_real *value);
/* Brings the rounded copy up to date with the values of a range. */
CORE_NODISCARD core_status train_parameters_round(train_parameters *set, const train_env *env,
                                                  train_span span);
void train_parameters_free(train_parameters *set);

/* As the optimizer and the ops of norms, biases and routers see a parameter: core_real. The gradient of a
 * frozen one is absent (no data); index -1, a parameter that there is not, has neither. */
core_tensor train_parameter_value(const train_parameters *set, int32_t index);
core_tensor train_parameter_gradient(const train_parameters *set, int32_t index);
/* As products with activations see it: the rounded copy where there is one. */
core_tensor train_parameter_matrix(const train_parameters *set, int32_t index);
/* `count` equal-shaped neighbours [n, k] as one [count, n, k]. */
core_tensor train_parameter_matrices(const train_parameters *set, int32_t index, int64_t count);
/* `count` equal-shaped neighbours [n] as one [count, n], core_real. */
core_tensor train_parameter_vectors(const train_parameters *set, int32_t index, int64_t count);
/* Their gradients; all of them are trained, or the tensor is absent. */
core_tensor train_parameter_gradients(const train_parameters *set, int32_t index, int64_t count);
/* Whether a step may change it; false for index -1. */
bool train_parameter_trained(const train_parameters *set, int32_t index);

#endif
