/* Early stopping on the mean recall of the held-out split (Prechelt 1998, "Early stopping - but when?"): a
 * run ends after `patience` evaluations in a row without a rise of more than `min_delta` above the last rise.
 * What counts is the sequence of evaluations alone; the state goes into checkpoints, so that a resumed run
 * ends where the uninterrupted one does. Local: recalls are ratios of counts summed over ranks, and so equal
 * on all of them. */
#ifndef TRAIN_EARLY_STOPPING_H
#define TRAIN_EARLY_STOPPING_H

#include "trainer/settings.h"

typedef struct train_early_stopping {
  int64_t patience; /* 0: never stops; the best is followed all the same */
  double min_delta;
  /* state; steps -1: none yet */
  double best;        /* largest recall so far */
  int64_t best_step;  /* where it was first reached */
  double risen;       /* recall of the last rise */
  int64_t risen_step; /* where that was */
  int64_t stale;      /* evaluations since then */
  int64_t seen;       /* step of the last evaluation */
} train_early_stopping;

void train_early_stopping_make(const train_settings *settings, train_early_stopping *out);
/* Takes the evaluation of a step. One that was seen already (it is made again when a run is resumed there) is
 * not counted twice. Returns whether the step is the best so far. */
bool train_early_stopping_observe(train_early_stopping *stopping, int64_t step, double recall);
/* Whether the run is to end. */
bool train_early_stopping_due(const train_early_stopping *stopping);

#endif
