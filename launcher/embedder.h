/* An embedder of a checkpoint, as commands open it. */
#ifndef LAUNCH_EMBEDDER_H
#define LAUNCH_EMBEDDER_H

#include "launcher/launcher.h"
#include "trainer/serve/embed.h"

/* What the command line asks for. */
typedef struct launch_embed {
  const char *checkpoint, *shards;
  const char *key, *query;            /* one of the two */
  const train_vectors_about *gallery; /* that the vectors are for: of another checkpoint it is refused */
  const char *gallery_path;           /* both NULL: for none */
} launch_embed;

/* ERR_MISMATCH unless both are of one checkpoint. */
CORE_NODISCARD core_status launch_embed_same(uint64_t checkpoint, int64_t step, const char *name,
                                             const train_vectors_about *gallery, const char *gallery_path);

typedef struct launch_embedder {
  ckpt_reader *reader;
  core_config *config;
  char *overrides;
  launch_checkpoint_words words;
  train_embedder *embedder;
} launch_embedder;

/* Opens the checkpoint, its configuration and the shards; --set and --split are taken from `arguments`, which
 * is changed. Errors are agreed. Collective. */
CORE_NODISCARD core_status launch_embedder_open(comm_world *world, const launch_embed *want,
                                                launch_arguments *arguments, launch_embedder *out);
void launch_embedder_close(launch_embedder *embedder);

#endif
