/* What a stage did to what the model could do before (METHODS section 4): quality on held-out splits of the
 * old modalities before and after it, and which share of each class's tokens goes to added experts since. */
#ifndef TRAIN_FORGETTING_H
#define TRAIN_FORGETTING_H

#include "comm/comm.h"
#include "core/config.h"

typedef struct train_forgetting {
  comm_world *comm;
  const core_config *run; /* as train_measure_options; evaluate.forgetting names the splits */
  const char *before;     /* path of a checkpoint; NULL: the stage began with none */
  const char *after;
  const char *report; /* path of forgetting.json */
} train_forgetting;

/* Measures both checkpoints on every split, says it on the log and writes the report; nothing where no split
 * is named. The figures are those of `antiphon eval`: a decoder's mean loss of a response token, else mean
 * R@1. Errors: those of train_measure; ERR_IO. Collective over the world. */
CORE_NODISCARD core_status train_forgetting_run(const train_forgetting *forgetting);

#endif
