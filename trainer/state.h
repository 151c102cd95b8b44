/* What a checkpoint holds of a run, and back: parameters, Adam's moments and step counts, the standardisation
 * of the latents, and as meta data the configuration, the position in the data and the step. */
#ifndef TRAIN_STATE_H
#define TRAIN_STATE_H

#include "checkpoint/checkpoint.h"
#include "data/data.h"
#include "trainer/model/tower.h"
#include "trainer/schedule/alternation.h"
#include "trainer/schedule/early_stopping.h"

struct train_source;

typedef struct train_state_tensors {
  ckpt_tensor *list;
  int32_t count;
  char (*names)[CORE_NAME];
} train_state_tensors;

typedef enum train_state_purpose {
  TRAIN_STATE_SAVE, /* what this rank writes: its share of every parameter and of the optimizer's state */
  TRAIN_STATE_SAVE_TRAINED, /* the same without frozen parameters */
  TRAIN_STATE_LOAD,         /* what it needs: all its parameters, the optimizer's state of what it updates */
  TRAIN_STATE_LOAD_MODEL    /* without the optimizer's */
} train_state_purpose;

/* Lists the model's tensors, and the state of an adaptive schedule (alternation may be NULL). Saved ranges
 * cover each element exactly once over all ranks. Free with train_state_free. */
CORE_NODISCARD core_status train_state_list(train_model *model, train_alternation *alternation,
                                            train_state_purpose purpose, train_state_tensors *out);
/* The optimizer's state follows what is trained now, not what was trained when the checkpoint was written:
 * what a trained parameter has no moments and no count of there is taken off the list, so that it begins anew
 * (the values are still demanded), and those of parameters that are frozen now are left behind. Says both on
 * the log. Local. */
void train_state_match(const train_model *model, const struct train_source *source,
                       train_state_tensors *wanted);
/* After loading: what is derived from the values. */
CORE_NODISCARD core_status train_state_loaded(train_model *model);
void train_state_free(train_state_tensors *tensors);

enum { TRAIN_BASE_PATH = 1024 };
/* What a checkpoint of trained parameters alone is completed by: source.h. */
typedef struct train_base {
  char path[TRAIN_BASE_PATH];     /* empty: there is none, the checkpoint is whole */
  char relative[TRAIN_BASE_PATH]; /* from the run directory; empty: not known */
  uint64_t hash;                  /* ckpt_reader_content_hash */
} train_base;

/* Meta data of a checkpoint. */
typedef struct train_state_meta {
  int64_t step;
  data_position position;
  uint64_t fingerprint; /* of the training shards */
  int64_t ranks, expert_ranks;
  train_early_stopping stopping; /* its state; as new where the checkpoint is older than the feature */
  train_base base;
  char *config; /* YAML, malloc'ed by train_state_meta_read */
} train_state_meta;

/* JSON text, malloc'ed. */
CORE_NODISCARD core_status train_state_meta_write(const train_state_meta *meta, char **json);
/* ERR_FORMAT when a field is missing or of another type. Free meta->config. */
CORE_NODISCARD core_status train_state_meta_read(const char *json, train_state_meta *out);

/* ---- checkpoints that are made, not trained ---- */

/* That a checkpoint of this step is not there yet. Local. ERR_ARGUMENT. */
CORE_NODISCARD core_status train_state_target(const char *directory, int64_t step);
/* Writes a checkpoint of meta->step into a directory of checkpoints, whole or not at all. list: what this
 * rank owns of it. Collective. */
CORE_NODISCARD core_status train_state_publish(comm_group *control, const char *directory,
                                               const train_state_meta *meta, const ckpt_tensor *list,
                                               int32_t count);

#endif
