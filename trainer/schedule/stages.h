/* Stages: several runs of one configuration, each with changes of its own, one beginning from another's
 * checkpoint (METHODS section 3: Uni-MoE's alignment, experts, assembly and unified tuning in one file).
 *
 *   stages:
 *     - {name: align, set: [run.steps=100, "optimizer.frozen=[blocks.*]"]}
 *     - {name: tune, from: align}
 *
 * Stage i is the configuration with its `set` over it and run.directory <run.directory>/<name>: a run like
 * any other, which may be looked at, evaluated and plotted by itself. Beside the run's own files its
 * directory has
 *
 *   stage.json   how it was configured and what it began from; once it is done, the step and content hash of
 * its last checkpoint. Replaced atomically.
 *
 *   forgetting.json   with evaluate.forgetting: what it did to the quality of what it began with
 *
 *   extend.json   of a stage of kind extend: which mixtures got an expert, and why (extend.h)
 *
 * The order of samples is keyed by the number of stages that a stage comes after (its source, its source's
 * source, ...; of several the longest way): controls that begin from one stage see the same samples.
 *
 * A stage after an extension has the model that was made: it takes the numbers of experts from there.
 *
 * A stage that is done is passed over by the next start, unless its configuration has changed in anything
 * that decides what is trained (not: where files lie, how many ranks, threads, devices, when it is saved), or
 * what it began from has: both are refused. One that is not done goes on at its newest checkpoint.
 * Consecutive stages of equal `group` run side by side on ranks of their own, where there are enough. */
#ifndef TRAIN_STAGES_H
#define TRAIN_STAGES_H

#include "trainer/run.h"

typedef struct train_stages_options {
  const core_config *config; /* with stages; outlives the call */
  comm_world *comm;
  const char *resume; /* "auto", or "never": refused where a stage has begun */
} train_stages_options;

/* Runs what is not done. All stages are checked (names, sources, settings, the data's directories) before the
 * first one starts. Errors carry the stage's name and are the same on every rank; in stages side by side one
 * ends the job (comm_fail_stop). Collective over the world. */
CORE_NODISCARD core_status train_stages_run(const train_stages_options *options, train_outcome *outcome);

#endif
