/* An embedder of a checkpoint, for `antiphon embed` and `antiphon search --latents`. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h" /* core_hash_text */
#include "launcher/embedder.h"
#include "trainer/state.h"

/* Vectors are to be the same on any number of ranks and cores, so a rank has one thread unless told. */
static void add_thread(launch_arguments *arguments) {
  if (arguments->override_count == LAUNCH_MOST_OVERRIDES) return;
  memmove(arguments->override + 1, arguments->override,
          (size_t)arguments->override_count * sizeof *arguments->override);
  arguments->override[0] = "run.threads=1";
  arguments->override_count++;
}

/* All that the user set, one after another. */
static core_status join_overrides(const launch_arguments *arguments, char **out) {
  size_t length = 1;
  for (int32_t i = 0; i < arguments->override_count; i++) length += strlen(arguments->override[i]) + 1;
  *out = calloc(length, 1);
  CHECK(*out, CORE_ERR_MEMORY, "no memory for the command line");
  for (int32_t i = 0; i < arguments->override_count; i++) {
    strcat(*out, arguments->override[i]);
    strcat(*out, "\n");
  }
  return CORE_OK;
}

core_status launch_embed_same(uint64_t checkpoint, int64_t step, const char *name,
                              const train_vectors_about *gallery, const char *gallery_path) {
  CHECK(checkpoint == gallery->checkpoint, CORE_ERR_MISMATCH,
        "%s is of checkpoint %016" PRIx64 " (step %lld), the gallery %s of %016" PRIx64
        " (step %lld): vectors of different models cannot be compared",
        name, checkpoint, (long long)step, gallery_path, gallery->checkpoint, (long long)gallery->step);
  return CORE_OK;
}

static core_status open_all(comm_world *world, const launch_embed *want, launch_arguments *arguments,
                            launch_embedder *out) {
  train_state_meta meta = {0};
  TRY(join_overrides(arguments, &out->overrides));
  add_thread(arguments);
  launch_checkpoint_defaults(arguments, NULL, &out->words, comm_size(comm_world_group(world)));
  TRY(launch_checkpoint_open(world, want->checkpoint, &out->reader));
  if (want->gallery)
    TRY(launch_embed_same(ckpt_reader_content_hash(out->reader), ckpt_reader_step(out->reader),
                          ckpt_reader_path(out->reader), want->gallery, want->gallery_path));
  core_status status = train_state_meta_read(ckpt_reader_meta(out->reader), &meta);
  if (status == CORE_OK)
    status = launch_config(world, "the checkpoint's configuration", meta.config, arguments, &out->config);
  free(meta.config);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  train_embed_options options = {.comm = world,
                                 .config = out->config,
                                 .reader = out->reader,
                                 .step = meta.step,
                                 .directory = want->shards,
                                 .split = arguments->split,
                                 .key = want->key,
                                 .query = want->query,
                                 .overrides = out->overrides};
  TRY(train_embedder_open(&options, &out->embedder));
  return CORE_OK;
}

core_status launch_embedder_open(comm_world *world, const launch_embed *want, launch_arguments *arguments,
                                 launch_embedder *out) {
  memset(out, 0, sizeof *out);
  core_status status = open_all(world, want, arguments, out);
  if (status != CORE_OK) {
    core_error saved;
    core_error_save(&saved);
    launch_embedder_close(out);
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

void launch_embedder_close(launch_embedder *embedder) {
  train_embedder_close(embedder->embedder);
  core_config_destroy(embedder->config);
  ckpt_reader_close(embedder->reader);
  free(embedder->overrides);
  memset(embedder, 0, sizeof *embedder);
}
