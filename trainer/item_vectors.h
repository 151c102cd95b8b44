/* Embedding in evaluation: the batches of a split through the model, and what a forward pass leaves of them.
 */
#ifndef TRAIN_ITEM_VECTORS_H
#define TRAIN_ITEM_VECTORS_H

#include "trainer/session.h"

/* The next batch on all ranks, NULL at the end, or the agreed reason why there is none. ERR_STOPPED when a
 * stop was requested on any rank. Collective over the world. */
CORE_NODISCARD core_status train_item_vectors_batch(train_session *session, data_stream *stream,
                                                    data_batch **batch);
/* What the last forward pass made of this rank's samples of modality m, [n, Z], L2-normalised, lent: a
 * tower's embeddings (direction -1), or a connector's queries (m is where the direction comes from) or keys.
 * Local. */
core_tensor train_item_vectors_rows(const train_session *session, int32_t direction, int32_t m);

/* All vectors of a split of one modality, in its order, on every rank. */
typedef struct train_item_vectors {
  const core_device *device;
  int64_t samples;  /* N */
  core_tensor z;    /* core_real [N, Z], device; zeros where the sample has no rows */
  uint8_t *present; /* [N] the sample has rows */
  uint64_t *id;     /* [N] */
  int32_t *label;   /* [N] */
} train_item_vectors;

/* Embeds with noise off and no drops (unless evaluate.capacity). direction: of a connector, -1 of a tower.
 * Free with train_item_vectors_free, also after a failure. Collective over the world. */
CORE_NODISCARD core_status train_item_vectors_make(train_session *session, const train_part *part,
                                                   int32_t direction, train_item_vectors *out);
void train_item_vectors_free(train_item_vectors *vectors);

#endif
