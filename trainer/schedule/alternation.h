/* Alternation (METHODS section 2; Lei et al. 2024): which direction a step trains.
 *   joint     all directions in every step
 *   cyclic    one after another, a step each
 *   block     one after another, K_d steps each
 *   adaptive  drawn for each step, p_d proportional to clamp(1/D + gain (mean R - R_d), least, most), R_d the
 * last validation recall in [0, 1]; uniform before the first evaluation joint, cyclic and block are pure
 * functions of the step. Adaptive is one of (seed, step, the probabilities), and its probabilities and counts
 * are state that a checkpoint holds. Local: equal on all ranks. */
#ifndef TRAIN_ALTERNATION_H
#define TRAIN_ALTERNATION_H

#include "trainer/settings.h"

typedef struct train_alternation {
  train_alternate kind;
  int32_t directions;                       /* D */
  int64_t block[TRAIN_MAX_DIRECTIONS];      /* K_d; 1 for cyclic */
  int64_t cycle;                            /* sum of K_d */
  double gain, least, most;                 /* adaptive */
  double probability[TRAIN_MAX_DIRECTIONS]; /* adaptive: state */
  int64_t taken[TRAIN_MAX_DIRECTIONS];      /* adaptive: steps of each direction so far: state */
  uint64_t seed;
} train_alternation;

/* From checked settings. */
void train_alternation_make(const train_settings *settings, train_alternation *out);
/* The direction of step t (from 0); -1: all of them. */
int32_t train_alternation_direction(const train_alternation *alternation, int64_t step);
/* Steps before step t that trained direction d: what its learning rate counts. */
int64_t train_alternation_own(const train_alternation *alternation, int32_t d, int64_t step);
/* Steps of direction d among `steps`; for adaptive its share when all are equal, rounded up. */
int64_t train_alternation_total(const train_alternation *alternation, int32_t d, int64_t steps);
/* Notes that a step of direction d is done (adaptive). */
void train_alternation_done(train_alternation *alternation, int32_t d);
/* New probabilities from the recall of each direction [D] (adaptive; otherwise nothing). */
void train_alternation_adapt(train_alternation *alternation, const double *recall);

#endif
