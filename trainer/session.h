/* Session: everything a run, an evaluation or a benchmark needs, opened in order and agreed on by all ranks:
 * backend, data, layout, groups, model, memory. */
#ifndef TRAIN_SESSION_H
#define TRAIN_SESSION_H

#include "trainer/arithmetic.h"
#include "trainer/step.h"

typedef enum train_purpose { TRAIN_PURPOSE_TRAIN, TRAIN_PURPOSE_EVALUATE } train_purpose;

/* A split that holds one modality alone, whatever others the model has. */
typedef struct train_part_options {
  const char *path, *split;
  int32_t modality;
} train_part_options;
enum { TRAIN_MOST_PARTS = 2 };
/* What items may be, where no set is opened that says so: serving knows the widths from a checkpoint and
 * streams one modality. 0 items: none of that modality. */
typedef struct train_session_sizes {
  int64_t width[CORE_MAX_MODALITIES];       /* D */
  int64_t tokens[CORE_MAX_MODALITIES];      /* rows of one pass */
  int64_t segments[CORE_MAX_MODALITIES];    /* items of one pass */
  int64_t longest[CORE_MAX_MODALITIES];     /* rows of an item */
  size_t latent_bytes[CORE_MAX_MODALITIES]; /* of a stored number */
} train_session_sizes;

typedef struct train_session_options {
  const core_config *config; /* outlives the session */
  comm_world *comm;
  train_purpose purpose;
  const char *data_path;        /* NULL: data.path of the configuration */
  const char *training_split;   /* NULL: none is opened */
  const char *evaluation_split; /* NULL: none */
  train_part_options part[TRAIN_MOST_PARTS];
  int32_t part_count;
  const int64_t *width; /* [M] of the latents that no split tells; NULL: a split with all modalities is
                           opened */
  const train_session_sizes *sizes; /* with no split: borrowed until the session is closed */
  bool without_responses;           /* a decoder's samples need none: it is to continue their prompts */
} train_session_options;

typedef struct train_part {
  const char *path, *split; /* borrowed from the options */
  data_set *set;
  int32_t modality;
} train_part;

typedef struct train_session {
  train_env env;
  train_purpose purpose;
  const train_session_sizes *sizes; /* NULL: the sets say */
  data_set *training, *evaluation;  /* NULL where not opened */
  train_part part[TRAIN_MOST_PARTS];
  int32_t part_count;
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

/* The same for a split of one modality: batches of evaluation_layout, of which this rank gets its share of
 * that modality as the only part. */
CORE_NODISCARD core_status train_session_part_stream(train_session *session, const train_part *part,
                                                     data_stream **out);

/* Distinct parameters over all ranks, and those without the experts and trunks that a token does not pass.
 * Collective. */
typedef struct train_counts {
  int64_t total, active, frozen; /* frozen: of the total, changed by no step */
} train_counts;
CORE_NODISCARD core_status train_session_counts(train_session *session, train_counts *out);
/* What the session's model costs, with the widths and mean lengths of its data. Free with
 * train_arithmetic_free. Local. */
CORE_NODISCARD core_status train_session_arithmetic(const train_session *session, train_arithmetic *out);

#endif
