/* Session: everything a run, an evaluation or a benchmark needs, opened in order and agreed on by all ranks:
 * backend, data, layout, groups, model, memory. */
#ifndef TRAIN_SESSION_H
#define TRAIN_SESSION_H

#include "trainer/step.h"

typedef enum train_purpose { TRAIN_PURPOSE_TRAIN, TRAIN_PURPOSE_EVALUATE } train_purpose;

typedef struct train_session_options {
  const core_config *config; /* outlives the session */
  comm_world *comm;
  train_purpose purpose;
  const char *data_path;        /* NULL: data.path of the configuration */
  const char *training_split;   /* NULL: none is opened */
  const char *evaluation_split; /* NULL: none */
  bool without_responses;       /* a decoder's samples need none: it is to continue their prompts */
} train_session_options;

typedef struct train_session {
  train_env env;
  train_purpose purpose;
  data_set *training, *evaluation; /* NULL where not opened */
  train_model *model;
  train_stepper stepper; /* training only */
  train_layout evaluation_layout;
  train_arenas arenas;
} train_session;

/* Errors are agreed: every rank returns the same. Collective over the world. */
CORE_NODISCARD core_status train_session_open(const train_session_options *options, train_session **out);
void train_session_close(train_session *session);

/* Measures mean and deviation of the training latents and makes them the connectors' standardisation.
 * Collective. */
CORE_NODISCARD core_status train_session_standardise(train_session *session);

/* Planned memory of this rank in bytes. */
typedef struct train_memory {
  size_t parameters, activations, objective, host, kernels, total;
} train_memory;
train_memory train_session_memory(const train_session *session);

/* Opens a stream of batches for this rank's share. */
CORE_NODISCARD core_status train_session_stream(train_session *session, data_set *set,
                                                const train_layout *layout, const data_position *start,
                                                bool training, data_stream **out);

/* Distinct parameters over all ranks, and those without the experts that a token does not pass. Collective.
 */
typedef struct train_counts {
  int64_t total, active, frozen; /* frozen: of the total, changed by no step */
} train_counts;
CORE_NODISCARD core_status train_session_counts(train_session *session, train_counts *out);

#endif
