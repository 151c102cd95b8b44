/* A training run: run directory, resume, the loop, checkpoints, evaluations, an orderly stop. What trains and
 * what it began from stands in the run directory's manifest.json. */
#ifndef TRAIN_RUN_H
#define TRAIN_RUN_H

#include "comm/comm.h"
#include "core/config.h"

typedef struct train_run_options {
  const core_config *config;
  comm_world *comm;
  const char *resume; /* "auto", "never", or the path of a checkpoint */
  const char
      *from; /* a checkpoint whose parameters a new run begins with, as far as it has them; NULL: none */
  const char *stage; /* of several runs of one configuration; NULL: it is a run by itself */
  int64_t number;    /* of stages before this one on its way: a new run's order of samples is keyed by it */
} train_run_options;

/* How a run ended when nothing failed. */
typedef enum train_outcome {
  TRAIN_FINISHED, /* all steps done */
  TRAIN_STOPPED   /* on request: a checkpoint holds the state, the run can be resumed */
} train_outcome;

/* Runs to the end, to a request to stop, or to an error, which is the same on every rank. A failure in the
 * middle of a step, when other ranks wait for this one, ends the whole job (comm_fail_stop). Collective over
 * the world. */
CORE_NODISCARD core_status train_run(const train_run_options *options, train_outcome *outcome);

#endif
