/* Embedding: forward passes of a trained model over latents of one modality, noise off and dropless (METHODS
 * section 0), for serving. Every block of consecutive samples is passed as a whole by one rank, with experts
 * of its own: its vectors depend neither on the number of ranks nor on which of them it fell to. They do
 * depend, in the last bits, on the number of threads, by which the GEMM library divides its sums.
 *
 *   connector  keys of modality b: K_b mean(h_b), which any direction toward b answers with;
 *              queries of a direction a:b  (METHODS section 2)
 *   tower      one embedding a modality */
#ifndef TRAIN_EMBED_H
#define TRAIN_EMBED_H

#include "checkpoint/checkpoint.h"
#include "trainer/serve/vectors.h"
#include "trainer/session.h"

typedef struct train_embed_options {
  comm_world *comm;
  const core_config *config; /* of the checkpoint, one expert rank, shared; outlives the embedder */
  ckpt_reader *reader;       /* borrowed while it opens; NULL: the model as it is initialised */
  int64_t step;              /* of the checkpoint */
  const char *directory;     /* of splits, or of shards of the modality (then without split) */
  const char *split;         /* NULL: data.validation, or none where the directory holds shards */
  const char *key, *query;   /* a modality; a direction "a:b": one of the two, the other NULL */
  const char *overrides;     /* what else tells commands apart; "" */
} train_embed_options;

typedef struct train_embedder train_embedder;

/* Opens shards and model. Errors are agreed: ERR_CONFIG for modalities and directions that the model lacks,
 * ERR_MISMATCH for another width, and those of data, session and checkpoint. Collective. */
CORE_NODISCARD core_status train_embedder_open(const train_embed_options *options, train_embedder **out);
void train_embedder_close(train_embedder *embedder);
/* checkpoint, step, kind, modalities, rows, width; dtype FLOAT32. */
const train_vectors_about *train_embedder_about(const train_embedder *embedder);
int64_t train_embedder_samples(const train_embedder *embedder);
const uint64_t *train_embedder_ids(const train_embedder *embedder); /* [rows], on rank 0; NULL elsewhere */

/* What happened, for a person and for benchmarks; seconds of this rank. */
typedef struct train_embed_figures {
  train_vectors_state state;
  int64_t blocks, kept; /* in all; of them there before */
  double seconds;       /* of the whole */
  double waited;        /* for latents */
} train_embed_figures;

/* Writes the vectors file `path` as dtype (FLOAT16, FLOAT32), or goes on where another start of the same work
 * ended. ERR_STOPPED when a stop was requested: what is done stays. Collective. */
CORE_NODISCARD core_status train_embedder_write(train_embedder *embedder, const char *path, core_dtype dtype,
                                                train_embed_figures *figures);
/* All vectors to memory: float [rows, width]. One rank. */
CORE_NODISCARD core_status train_embedder_rows(train_embedder *embedder, float *rows);
/* What a whole split takes by its parts, in seconds of the slowest rank: the forward passes alone (that of
 * the first block, over a batch that is there, once for every block of a rank), and streaming the latents
 * while nothing else is done. Collective. */
typedef struct train_embed_parts {
  double forward, stream;
} train_embed_parts;
CORE_NODISCARD core_status train_embedder_parts(train_embedder *embedder, train_embed_parts *out);

#endif
