/* What the files of the assembly share. */
#ifndef TRAIN_ASSEMBLE_IMPL_H
#define TRAIN_ASSEMBLE_IMPL_H

#include "trainer/assemble.h"
#include "trainer/lora_merge.h"
#include "trainer/model/tower.h"

/* A checkpoint that something is taken from. */
typedef struct train_assembly_source {
  const char *path;
  ckpt_reader *reader;
  train_source files;  /* it and its bases */
  bool adapters;       /* it has some */
  train_merged merged; /* then, while it is worked on: all of it on every rank, without them */
} train_assembly_source;

typedef enum train_assembly_kind {
  TRAIN_ASSEMBLY_SHARED, /* of the base, the same in all sources */
  TRAIN_ASSEMBLY_TAKEN,  /* of one source */
  TRAIN_ASSEMBLY_FRESH   /* drawn */
} train_assembly_kind;

/* A tensor of the assembled checkpoint. */
typedef struct train_assembly_tensor {
  char name[CORE_NAME + 16], from[CORE_NAME + 16]; /* from: as the source calls it */
  train_assembly_kind kind;
  int32_t source;    /* number of the source; fresh: none */
  int32_t parameter; /* of the model; -1: standardisation */
  int32_t shape_rank;
  int64_t shape[CORE_MAX_RANK], count;
  int32_t rank; /* that makes it */
} train_assembly_tensor;

/* The work in progress: sources[0] is the base. */
typedef struct train_assembly_work {
  const train_assembly *assembly;
  const train_settings *settings;
  train_assembly_source *source;
  int32_t sources;
  train_env env; /* of one rank, on paper: for the declaration of the model */
  train_model *model;
  int64_t width[CORE_MAX_MODALITIES]; /* of latents */
  int32_t connector[CORE_MAX_MODALITIES];
  train_assembly_tensor *tensor;
  int32_t tensors;
} train_assembly_work;

/* assemble_plan.c: compares the sources' configurations, declares the model, says for each tensor where it
 * comes from. Local, after the sources are open. ERR_MISMATCH. */
core_status train_assembly_plan_priv(train_assembly_work *work);
/* That what is taken from source s is there in its shape. Local. ERR_MISMATCH. */
core_status train_assembly_check_priv(const train_assembly_work *work, int32_t s);
/* A tensor of a source, what it is there; of a merged one with its place in memory. False: it has none.
 * Local. */
bool train_assembly_find_tensor_priv(const train_assembly_source *source, const char *name,
                                     ckpt_tensor *found);
/* Number of the source of this path, -1 if there is none. */
int32_t train_assembly_find_priv(const train_assembly_work *work, const char *path);

#endif
