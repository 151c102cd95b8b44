/* One optimizer step: batch -> forward -> objective -> backward -> reduce -> clip -> AdamW. */
#ifndef TRAIN_STEP_H
#define TRAIN_STEP_H

#include "trainer/objective/alignment_loss.h"
#include "trainer/objective/objective.h"
#include "trainer/optimizer.h"
#include "trainer/reduction.h"
#include "trainer/schedule/alternation.h"

/* "data", "forward" and so on, as metrics name them. */
const char *train_phase_name(train_phase phase);

/* What a step did; sums and counts over all ranks are in the model's `sums`. Equal on all ranks except the
 * times, which are this rank's. */
typedef struct train_report {
  int64_t step;                              /* number of the step, from 1 */
  double loss;                               /* what was differentiated: contrastive + router losses */
  double contrastive, pair[TRAIN_MAX_PAIRS]; /* mean over pairs; of each pair (or direction of a connector) */
  double regression[TRAIN_MAX_DIRECTIONS];   /* of each direction of a connector, not weighted */
  double next_token;                         /* of a decoder: mean over `predictions` */
  int64_t predictions;                       /* response tokens of the global batch */
  int32_t direction;                         /* that was trained; -1: all, or a tower */
  train_router_loss router;
  double scale;                                                /* 1 / temperature used */
  double rate, norm, clip;                                     /* clip: factor on gradients, 1 = none */
  bool skipped;                                                /* non-finite: nothing was updated */
  int64_t tokens[TRAIN_MAX_CLASSES], items[TRAIN_MAX_CLASSES]; /* global, by class */
  double seconds[TRAIN_PHASE_COUNT], wall;
} train_report;

typedef struct train_stepper {
  train_env *env;
  train_model *model;
  train_contrastive contrastive;  /* of a tower */
  train_alignment_loss alignment; /* of a connector */
  train_alternation alternation;
  train_router_objective router;
  train_reduction reduction;
  train_optimizer optimizer;
  double *reduced; /* [pairs + sums] */
  int64_t reduced_count;
  int64_t *counted; /* [sums + 2 classes] */
  int64_t counted_count;
} train_stepper;

CORE_NODISCARD core_status train_stepper_make(train_env *env, train_model *model, train_stepper *out);
CORE_NODISCARD core_status train_stepper_plan(train_stepper *stepper, const train_arenas *arenas);
/* A stepper that is all zeros is allowed. */
void train_stepper_free(train_stepper *stepper);
/* Gradients of one global batch, summed over ranks, are left in the model (train_reduction_finish says which
 * on which rank); nothing is updated. Fills everything of the report but rate, clip, skipped, wall. env->step
 * numbers the noise. Collective over the world. */
CORE_NODISCARD core_status train_stepper_gradients(train_stepper *stepper, const data_batch *batch,
                                                   train_report *report);
/* The whole step: gradients, then the update with the rate of env->step, skipped where a value is not finite.
 * Collective over the world. */
CORE_NODISCARD core_status train_stepper_run(train_stepper *stepper, const data_batch *batch,
                                             train_report *report);

#endif
