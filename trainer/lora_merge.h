/* Adapters folded into the matrices that they adapt, W' = W + alpha / r B A (Hu et al. 2021, section 4.1), in
 * double precision, rounded once: a model without adapters and with the same function. */
#ifndef TRAIN_LORA_MERGE_H
#define TRAIN_LORA_MERGE_H

#include "trainer/source.h"

/* Whether a parameter or what belongs to one is an adapter's. */
bool train_lora_is_adapter(const char *name);
/* The first adapter's tensor of a model, if it has one. Local. */
bool train_lora_find_adapter(const train_source *source, ckpt_tensor *out);

/* A checkpoint's model in memory, whole and without adapters. */
typedef struct train_merged {
  core_config *config; /* the checkpoint's, with model.lora empty and checkpoint.contents all */
  ckpt_tensor
      *list; /* [count] parameter/..., latent_shift/..., latent_scale/...: whole, owned, host memory */
  int32_t count;
  int64_t adapters; /* that were folded in */
  core_real *value; /* what the list's data lie in */
  char (*name)[CORE_NAME];
} train_merged;

/* Reads everything but the optimizer's state of a checkpoint, and of its bases. A checkpoint without adapters
 * is taken as it is. ERR_FORMAT: an adapter without its other half, without a matrix, of other sizes, or of a
 * map that the configuration does not adapt; ERR_UNSUPPORTED: numbers of another type than core_real. Free
 * with train_merged_free, also after an error. Collective over `control`, every rank gets all. */
CORE_NODISCARD core_status train_merged_read(comm_group *control, ckpt_reader *reader, train_merged *out);
void train_merged_free(train_merged *merged);

/* Writes <directory>/step-<NNNNNNNN>, of the checkpoint's step, which must not be there yet: the merged
 * model, from which a run begins with --from. `control`: of a world of one rank. */
CORE_NODISCARD core_status train_lora_merge(comm_group *control, const char *checkpoint,
                                            const char *directory);

#endif
