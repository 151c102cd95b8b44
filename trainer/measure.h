/* A checkpoint on a held-out split: its quality, and which experts its tokens chose. For what compares
 * checkpoints with one another (extend.h, forgetting.h): noise off, nothing dropped, the K largest logits,
 * whatever training used. */
#ifndef TRAIN_MEASURE_H
#define TRAIN_MEASURE_H

#include "checkpoint/checkpoint.h"
#include "comm/comm.h"
#include "core/config.h"
#include "core/dims.h"

typedef struct train_measure_options {
  comm_world *comm;
  const core_config *run; /* where and how: data.path, device, threads, parallel.experts, evaluate.batch */
  ckpt_reader *checkpoint;
  const char *split; /* of data.path; modalities that it lacks take no part */
  /* Key=value over the checkpoint's configuration, which says what the model is; NULL: none. */
  const char *const *model;
  int32_t model_count;
} train_measure_options;

typedef struct train_measurement {
  int32_t layers, classes; /* MoE layers; classes of tokens (train_settings_classes) */
  char class[CORE_MAX_MODALITIES + 1][CORE_NAME];
  int64_t choose, most;             /* K, experts of the largest layer */
  int64_t *experts, *added, *block; /* [layers] each; block: number of the layer in the trunk */
  int64_t *tokens;                  /* [layers][classes] */
  int64_t *count;                   /* [layers][classes][most] tokens that chose it */
  double *gap; /* [layers][most] least of the K-th logit minus its own, over all tokens */
  bool decoder;
  double quality; /* a decoder's mean loss of a response token; else mean R@1, 0 for none */
  double fresh[CORE_MAX_MODALITIES + 2]; /* [classes + 1] share of tokens at added experts, the last of all */
  int64_t samples;
} train_measurement;

/* Opens a session for the checkpoint's model, runs it over the split, closes it. Counts are sums of integers
 * and gaps are minima, over all ranks: the same on every layout, but for near-ties. ERR_STOPPED when a stop
 * was requested. Free with train_measurement_free, also after an error. Collective over the world. */
CORE_NODISCARD core_status train_measure(const train_measure_options *options, train_measurement *out);
void train_measurement_free(train_measurement *measurement);
/* The only thing that is done of it: the model's memory is planned, and what has no room is refused
 * (ERR_MEMORY) with what it is made of; so are settings that are none. Collective. */
CORE_NODISCARD core_status train_measure_room(const train_measure_options *options);

/* Tokens of class c (-1: all) that chose expert e of a layer. Local. */
int64_t train_measurement_count(const train_measurement *m, int32_t layer, int32_t c, int64_t e);
/* Number of a class by its name, -1 if there is none. Local. */
int32_t train_measurement_class(const train_measurement *m, const char *name);

#endif
