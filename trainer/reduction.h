/* Gradients over their groups: dense ones over the world, experts over their replicas, a modality's over its
 * ranks. Never divides: losses are already normalised by global counts.
 *
 * Gradients are reduced in buckets, ranges of neighbours of one scope. A bucket goes off as soon as the last
 * backward pass of the step has added all it adds to the gradients in it, on a stream of its own, while the
 * blocks below are still on their way (Li et al. 2020, "PyTorch Distributed", section 3.2.3). Buckets and
 * their order are a function of the active parameters alone, equal on all ranks of each group, and the same
 * whether or not they go off early: so the sums have the same bits. Where nothing could go off early, a
 * bucket is as large as can be. */
#ifndef TRAIN_REDUCTION_H
#define TRAIN_REDUCTION_H

#include "trainer/model/tower.h"

typedef struct train_bucket {
  int32_t scope;
  int64_t point;    /* of the backward pass (train_parameter_point), after which it may go off */
  train_span place; /* of the gradients */
} train_bucket;

typedef struct train_reduction {
  train_model *model;
  bool early;           /* buckets go off during the backward pass */
  bool cut;             /* there are several: the same with and without `early` */
  int64_t most;         /* a bucket of as many elements takes no more parameters */
  train_bucket *bucket; /* [parameters] those of this step, scope by scope */
  int32_t count;
  int64_t reached; /* points that have been reduced */
  int32_t ahead;   /* buckets of this step that went off before its last backward pass was over */
  int64_t *bound[TRAIN_SCOPES]; /* [ranks of the group + 1] shares of the gradients; NULL: not sharded */
  int64_t *share;               /* [ranks of the largest group] elements of one bucket */
  core_stream *stream;          /* NULL: the main one */
  core_event *ready, *done;
} train_reduction;

/* After the groups have been told of the device. Local. Free with train_reduction_free, also after a failure.
 */
CORE_NODISCARD core_status train_reduction_make(train_model *model, train_reduction *out);
/* Two passes, as core_arena. */
CORE_NODISCARD core_status train_reduction_plan(train_reduction *reduction, const train_arenas *arenas);
void train_reduction_free(train_reduction *reduction);

/* Makes the buckets of the active parameters; before the first backward pass of a step. Local. */
void train_reduction_begin(train_reduction *reduction);
/* What the last backward pass of a step tells of its points; call is NULL where nothing goes off early. The
 * call is Collective over the groups of this rank. */
train_pass_observer train_reduction_observer(train_reduction *reduction);
/* Reduces what is left; the main stream then waits for all of it. Afterwards the sums are in what this rank
 * updates (train_parameters.update); where that is only its share, the rest is undefined. Collective over the
 * world. */
CORE_NODISCARD core_status train_reduction_finish(train_reduction *reduction);

#endif
