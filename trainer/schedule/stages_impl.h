/* What the files of the stages share. */
#ifndef TRAIN_STAGES_IMPL_H
#define TRAIN_STAGES_IMPL_H

#include "trainer/schedule/stages.h"
#include "trainer/settings.h"

enum { TRAIN_STAGE_PATH = 1024 };

/* What a stage begins from, or is assembled of. */
typedef struct train_stage_source {
  const char *text;            /* as the configuration has it */
  int32_t stage;               /* -1: a path */
  bool best;                   /* its best checkpoint, not its last */
  char path[TRAIN_STAGE_PATH]; /* of the checkpoint */
  uint64_t content;            /* of the checkpoint, once it is there; 0: not known */
} train_stage_source;

typedef struct train_stage {
  const train_stage_settings *settings;
  core_config *config; /* resolved */
  char directory[TRAIN_STAGE_PATH - 128];
  train_stage_source
      *source; /* train: at most one; assemble: the base, the slots, the connectors; extend:
                  what is extended, and it after its routers were trained, if that is asked for */
  int32_t sources;
  int32_t depth; /* stages on the longest way to it. Keys its order of samples, so that stages beside one
                    another that differ in a setting see the same samples, and no other stage changes them */
  /* of an assembly, whose sources are the base, the slots, the connectors: */
  int32_t slots, *layer_slots;            /* all of them; [layers] of each, NULL: all are for each */
  int32_t connector[CORE_MAX_MODALITIES]; /* number of the source, -1: the base's */
  char **lines;                           /* [assemble.layers_count] that sources' texts lie in */
  int32_t ranks, first_rank; /* that it runs on; less than the world's: beside the others of its group */
  /* of stage.json: */
  bool begun, done;
  int64_t step;     /* of its last checkpoint */
  uint64_t content; /* of its last checkpoint */
} train_stage;

typedef struct train_stages {
  const core_config *config;
  const train_settings *settings;
  comm_world *comm;
  comm_group *control;
  train_stage *list;
  int32_t count;
  int lock;
} train_stages;

/* ---- stage_plan.c ---- */

/* Resolves and checks all stages for a world of `ranks`. Local; the same on every rank but for what the file
 * system says. ERR_CONFIG, ERR_NOT_FOUND. */
core_status train_stages_plan_priv(train_stages *stages, int32_t ranks);
void train_stages_free_priv(train_stages *stages);
/* Stages [i, the result) form a group, maybe of one. */
int32_t train_stages_group_end_priv(const train_stages *stages, int32_t i);
/* Adds the source that stage i names by `text`, which is borrowed. ERR_CONFIG. */
core_status train_stage_add_source_priv(train_stages *stages, int32_t i, const char *text);
/* Stage i's configuration with `more` overrides after its own. ERR_CONFIG. */
core_status train_stage_resolve_priv(train_stages *stages, int32_t i, const char *const *more,
                                     int32_t more_count, core_config **out);

/* ---- stage_assemble.c ---- */

/* Finds the sources of stage i, which is an assembly. Local. ERR_CONFIG. */
core_status train_stage_assembly_sources_priv(train_stages *stages, int32_t i);
/* Makes its checkpoint, manifest and config.yaml; a checkpoint that is there already stays. Collective. */
core_status train_stage_assemble_priv(comm_group *control, const train_stage *stage);
/* Whether a stage's only checkpoint, of step 0, has been published. Collective. */
core_status train_stage_is_made_priv(comm_group *control, const char *directory, int32_t *made);

/* ---- stage_extend.c ---- */

/* Finds the sources of stage i, which is an extension. Local. ERR_CONFIG. */
core_status train_stage_extension_sources_priv(train_stages *stages, int32_t i);
/* Makes its checkpoint, extend.json and config.yaml; a checkpoint that is there already stays. Collective. */
core_status train_stage_extend_priv(comm_world *world, const train_stage *stage);
/* What is asked of it, in a line. */
void train_stage_extension_text_priv(const train_stage *stage, char *out, size_t capacity);
/* The extension whose experts the model of stage i has, directly or through stages between; -1: none. */
int32_t train_stage_extension_priv(const train_stages *stages, int32_t i);
/* Gives stage i, if it follows an extension, a configuration in which every MoE layer is extended: the most
 * that it may be. Local. ERR_CONFIG. */
core_status train_stage_expect_extension_priv(train_stages *stages, int32_t i);
/* Gives it the one that was made, once the extension is done. Collective. */
core_status train_stage_take_extension_priv(comm_group *control, train_stages *stages, int32_t i);

/* ---- stage_record.c ---- */

/* Reads stage.json, compares it with the present configuration. Collective over `control`. ERR_CONFIG when a
 * stage that is done was another then, ERR_FORMAT. */
core_status train_stage_read_priv(comm_group *control, train_stage *stage);
/* Writes it, rank 0. Collective. */
core_status train_stage_write_priv(comm_group *control, const train_stage *stage);
/* Opens the sources for their content, and refuses where a stage that has begun began from another.
 * Collective. */
core_status train_stage_open_sources_priv(comm_group *control, train_stage *stage);

#endif
