/* Where a model's tensors come from: a checkpoint, or one of what was trained alone (checkpoint.contents) and
 * the one that the rest is in, its base, which may have a base again. A base is known by its path and by the
 * hash of its content; it is looked for beside the run first, then where it was. */
#ifndef TRAIN_SOURCE_H
#define TRAIN_SOURCE_H

#include "trainer/state.h"

enum { TRAIN_MOST_SOURCES = 8 };

typedef struct train_source {
  ckpt_reader *reader[TRAIN_MOST_SOURCES]; /* the first is borrowed, the others are its bases */
  int32_t count;
} train_source;

/* own: outlives the source. ERR_NOT_FOUND: a base is in neither place. ERR_MISMATCH: what lies there has
 * another content. Both name the base and what needs it. Collective. */
CORE_NODISCARD core_status train_source_open(comm_group *control, ckpt_reader *own, train_source *out);
void train_source_close(train_source *source);
/* The checkpoint that a tensor is taken from, the first that holds it, and what it is there; NULL: none.
 * Local. */
ckpt_reader *train_source_find(const train_source *source, const char *name, ckpt_tensor *found);
/* As ckpt_reader_load, each tensor from its checkpoint. Collective. */
CORE_NODISCARD core_status train_source_load(const train_source *source, const ckpt_tensor *list,
                                             int32_t count);

/* Calls `visit` for each tensor of a model once, wherever in the chain it lies: parameters, latent_shift,
 * latent_scale; neither the optimizer's state nor a schedule's. Ends at the first error. */
typedef core_status (*train_source_visitor)(void *context, const ckpt_tensor *tensor);
CORE_NODISCARD core_status train_source_visit(const train_source *source, train_source_visitor visit,
                                              void *context);

/* Fills a model, without the optimizer's state, from a checkpoint and its bases. Errors are agreed.
 * Collective. */
CORE_NODISCARD core_status train_source_model(comm_group *control, ckpt_reader *own, train_model *model);

/* ---- runs that save what is trained alone ---- */

/* The base of a run that begins with all of `source`. ERR_CONFIG: a frozen parameter is in none of it, so
 * that no checkpoint would hold it. Local. */
CORE_NODISCARD core_status train_base_begin(const train_model *model, const train_source *source,
                                            train_base *out);
/* The base of a run that goes on from `source`. ERR_CONFIG: it has none; or a frozen parameter is in its own
 * part, trained once, and the next checkpoint would not hold it. Local. */
CORE_NODISCARD core_status train_base_resume(const train_model *model, const train_source *source,
                                             train_base *out);
/* Fills `relative`: the base as seen from `directory`, of the run. Local. */
void train_base_relate(train_base *base, const char *directory);

#endif
