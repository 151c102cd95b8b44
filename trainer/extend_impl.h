/* What the files of the extension share. */
#ifndef TRAIN_EXTEND_IMPL_H
#define TRAIN_EXTEND_IMPL_H

#include "trainer/extend.h"
#include "trainer/source.h"

typedef enum train_extension_kind {
  TRAIN_EXTENSION_OLD,    /* the original's, as it is */
  TRAIN_EXTENSION_EXPERT, /* a copy of another of the original's */
  TRAIN_EXTENSION_COLUMN, /* of the router: made of the original's columns */
  TRAIN_EXTENSION_BIAS    /* likewise of its biases, where it has some */
} train_extension_kind;

/* A tensor of the extended checkpoint. */
typedef struct train_extension_tensor {
  char name[CORE_NAME], from[CORE_NAME]; /* from: empty where it is made of nothing */
  train_extension_kind kind;
  int32_t layer; /* of a new one: number of the MoE layer */
  int32_t shape_rank;
  int64_t shape[CORE_MAX_RANK], count;
  int64_t from_shape[CORE_MAX_RANK], from_count;
  int32_t from_rank;
  int32_t rank; /* that makes it */
} train_extension_tensor;

typedef struct train_extension_work {
  const train_extension *extension;
  comm_group *control;
  ckpt_reader *original, *tuned;  /* tuned NULL: none */
  train_source source, other;     /* with their bases */
  core_config *config, *extended; /* the original's; of what is made */
  train_measurement before, after;
  train_extension_choice choice;
  train_extension_tensor *tensor;
  int32_t tensors;
} train_extension_work;

/* extend_surgery.c. That two checkpoints have the same tensors, by their names and shapes. Local.
 * ERR_MISMATCH. */
core_status train_extension_compare_priv(const train_extension_work *work);
/* Lists the tensors of the extended checkpoint, each with the rank that makes it. After the choice. Local. */
core_status train_extension_list_priv(train_extension_work *work);
/* Makes them, compares what is tuned with what is not, writes the report and the checkpoint. Collective. */
core_status train_extension_write_priv(const train_extension_work *work);

/* extend_report.c, on rank 0. The table on the log; and extend.json: lines "HASH NAME" of old tensors. */
void train_extension_print_priv(const train_extension_work *work);
core_status train_extension_report_priv(const train_extension_work *work, char *lines);

/* The bias that keeps the copied column of a layer under the K-th logit of every held-out token. */
static inline double train_extension_below(const train_extension_work *work, int32_t layer) {
  int64_t source = work->choice.layer[layer].source;
  double bias = work->before.gap[(int64_t)layer * work->before.most + source] - work->extension->how->margin;
  return bias < 0 ? bias : 0;
}

#endif
