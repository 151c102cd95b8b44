/* Committing the oldest save: wait, agree, publish, retain. All communication of a save but that of its begin
 * happens here, on the caller's thread. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/save_buffers_impl.h"
#include "core/file.h"
#include "core/log.h"

static core_status join_local(ckpt_writer *w, ckpt_buffer *b) {
  if (b->running) pthread_join(b->thread, NULL);
  b->running = false;
  w->figures.write_seconds = b->save.seconds;
  w->figures.raw_bytes = w->raw_bytes;
  w->figures.stored_bytes = b->save.status == CORE_OK ? b->save.file.bytes : 0;
  return b->save.status == CORE_OK ? CORE_OK : core_error_restore(&b->save.error);
}

/* What a rank tells rank 0 of its file: ckpt_file, then the raw hash of every block. */
static core_status summarise(const ckpt_buffer *b, char **out, int64_t *bytes) {
  *bytes = (int64_t)sizeof b->save.file + b->save.blocks * (int64_t)sizeof(uint64_t);
  *out = malloc((size_t)*bytes);
  CHECK(*out != NULL, CORE_ERR_MEMORY, "no memory for a summary of %lld blocks", (long long)b->save.blocks);
  memcpy(*out, &b->save.file, sizeof b->save.file);
  char *hashes = *out + sizeof b->save.file;
  for (int64_t i = 0; i < b->save.blocks; i++)
    memcpy(hashes + (size_t)i * sizeof(uint64_t), &b->save.entry[i].raw_hash, sizeof(uint64_t));
  return CORE_OK;
}

typedef struct summaries {
  const char *bytes;
  const int64_t *offset;
} summaries;

static uint64_t hash_in_summary(const void *context, const ckpt_part *part, int64_t cell) {
  const summaries *all = context;
  uint64_t hash;
  memcpy(
      &hash,
      all->bytes + all->offset[part->file] + sizeof(ckpt_file) + (size_t)(part->block + cell) * sizeof hash,
      sizeof hash);
  return hash;
}

static core_status publish_local(ckpt_writer *w, const ckpt_buffer *b, const char *bytes,
                                 const int64_t *offset) {
  ckpt_manifest *m = &w->catalogue;
  const summaries all = {bytes, offset};
  for (int32_t f = 0; f < m->files; f++) memcpy(&m->file[f], bytes + offset[f], sizeof m->file[f]);
  for (int32_t i = 0; i < m->items; i++)
    m->item[i].hash = ckpt_item_hash(m, &m->item[i], hash_in_summary, &all);
  m->content_hash = ckpt_content_hash(m);
  m->step = b->step;
  m->meta = b->meta;
  core_status status = ckpt_publish(w->directory, m);
  m->meta = NULL; /* lent */
  TRY(status);
  return CORE_OK;
}

static core_status publish(ckpt_writer *w, ckpt_buffer *b) {
  char *mine = NULL, *all = NULL;
  int64_t bytes = 0, *offset = NULL;
  core_status status;
  TRY_OUT(ckpt_wait_for_all(w->control, &b->save.errand), end);
  TRY_OUT(comm_agree(w->control, join_local(w, b)), end);
  TRY_OUT(comm_agree(w->control, summarise(b, &mine, &bytes)), end);
  TRY_OUT(comm_gather_bytes(w->control, 0, mine, bytes, &all, &offset), end);
  core_status local = comm_rank(w->control) == 0 ? publish_local(w, b, all, offset) : CORE_OK;
  TRY_OUT(comm_agree(w->control, local), end);
end:
  free(mine);
  free(all);
  free(offset);
  return status;
}

/* After a failure: what is left of step-X.tmp goes. All ranks' threads have ended with it. */
static void discard(const ckpt_buffer *b) {
  core_error saved;
  core_error_save(&saved);
  if (core_file_exists(b->save.directory) && ckpt_remove(b->save.directory) != CORE_OK) {
    LOG_WARNING("cannot remove the unfinished checkpoint: %s", core_error_get()->message);
  }
  (void)core_error_restore(&saved);
}

/* The save that is still pending, if there is one, has a directory that must not be cleaned away. */
static void retain(const ckpt_writer *w, int64_t newest) {
  if (ckpt_retain(&w->options, newest, ckpt_writer_oldest(w)) == CORE_OK) return;
  LOG_WARNING("old checkpoints are not removed: %s", core_error_get()->message);
  core_error_clear();
}

core_status ckpt_writer_commit(ckpt_writer *w) {
  CHECK(w->pending > 0, CORE_ERR_ARGUMENT, "no save was begun");
  ckpt_buffer *b = &w->buffer[w->oldest];
  core_status status = publish(w, b);
  w->oldest = (w->oldest + 1) % w->options.buffers;
  w->pending--;
  if (comm_rank(w->control) == 0) {
    if (status == CORE_OK) retain(w, b->step);
    if (status != CORE_OK) discard(b);
  }
  TRY(status);
  return CORE_OK;
}
