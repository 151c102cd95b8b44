/* Private to trainer/serve: the embedder, and the table of what a split holds. */
#ifndef TRAIN_EMBED_IMPL_H
#define TRAIN_EMBED_IMPL_H

#include "trainer/serve/embed.h"

struct train_embedder {
  train_embed_options options;
  const train_settings *settings;
  comm_group *control;
  char directory[4096], split[CORE_NAME];
  int32_t modality, toward, direction; /* indices; toward -1 but for queries; direction -1 in a tower */
  data_set *set;                       /* of the one modality */
  train_session_sizes sizes;
  train_session *session;
  train_vectors_about about;
  int64_t samples, block_samples, blocks;
  /* rank 0: what the split holds */
  uint64_t *block_row, *id; /* [blocks + 1], [rows] */
  int32_t *label;           /* [rows]; NULL: none */
  uint8_t *present;         /* [samples] */
  /* a pass */
  data_stream *stream;
  int64_t next; /* block that the stream delivers next */
  double waited;
  data_part *part; /* [modalities]: one modality's latents, nothing of the others */
  core_real *real; /* [block_samples, width] as the model gives them */
  float *rows;     /* the same, present samples only */
};

/* Ids, labels and rows of blocks, without reading latents. Local. */
CORE_NODISCARD core_status train_embed_index_priv(train_embedder *e);
/* What the embedder is asked for, in terms of the model: modality, toward, direction, kind. Local. */
CORE_NODISCARD core_status train_embed_resolve_priv(train_embedder *e);

/* Takes the vectors of a block: float [count, width]. */
typedef core_status (*train_embed_sink)(void *context, int64_t block, const float *rows, int64_t count);
/* Embeds every block that is not done (NULL: all), shared out over the ranks as ranges, and gives each to the
 * sink. After each round of one block a rank all agree, so a failure or a request to stop ends it everywhere.
 * Collective. */
CORE_NODISCARD core_status train_embed_pass_priv(train_embedder *e, const uint8_t *done,
                                                 train_embed_sink sink, void *context);
/* One batch through the model; the vectors stay where the model made them until train_embed_fetch_priv copies
 * those of present samples to e->rows. */
CORE_NODISCARD core_status train_embed_forward_priv(train_embedder *e, const data_batch *batch);
CORE_NODISCARD core_status train_embed_fetch_priv(train_embedder *e, const data_batch *batch, int64_t *count);
/* A stream of blocks from `block` on. */
CORE_NODISCARD core_status train_embed_stream_priv(train_embedder *e, int64_t block);

#endif
