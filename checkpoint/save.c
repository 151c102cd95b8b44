/* The background part of a save: compress, write, sync, read back. One thread writes; with more than one
 * compressor, the compressors run ahead of it through a ring of slots. Local disk only, no communication. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <xxhash.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/file.h"

/* ---- ring: block i is encoded into slot i % slots ---- */

typedef struct ring {
  ckpt_save *save;
  int32_t slots, threads; /* threads 0: the writing thread encodes by itself */
  pthread_t thread[CKPT_MAX_THREADS];
  pthread_mutex_t lock;
  pthread_cond_t change;
  int64_t next, written;               /* under the lock, as all below */
  int64_t ready[2 * CKPT_MAX_THREADS]; /* block in the slot + 1 */
  int32_t workers;
  bool stop;
  core_status status;
  core_error error;
} ring;

static core_status encode(ckpt_save *save, int32_t worker, int64_t block, int32_t slot) {
  const ckpt_block *b = &save->block[block];
  return ckpt_block_encode(&save->codec[worker], (core_dtype)b->dtype, b->raw, b->count, save->slot[slot],
                           &save->entry[block]);
}

/* Next block to encode, -1 at the end; waits for a free slot. Under the lock. */
static int64_t next_block(ring *r) {
  while (!r->stop && r->next < r->save->blocks && r->next - r->written >= r->slots) {
    pthread_cond_wait(&r->change, &r->lock);
  }
  return r->stop || r->next >= r->save->blocks ? -1 : r->next++;
}

static void *compressor(void *argument) {
  ring *r = argument;
  pthread_mutex_lock(&r->lock);
  int32_t worker = r->workers++;
  for (int64_t block = next_block(r); block >= 0; block = next_block(r)) {
    int32_t slot = (int32_t)(block % r->slots);
    pthread_mutex_unlock(&r->lock);
    core_status status = encode(r->save, worker, block, slot);
    pthread_mutex_lock(&r->lock);
    if (status != CORE_OK && r->status == CORE_OK) {
      r->status = status;
      core_error_save(&r->error);
    }
    r->ready[slot] = block + 1;
    pthread_cond_broadcast(&r->change);
  }
  pthread_mutex_unlock(&r->lock);
  return NULL;
}

static void ring_start(ring *r, ckpt_save *save) {
  memset(r, 0, sizeof *r);
  r->save = save;
  r->slots = 2 * save->threads;
  pthread_mutex_init(&r->lock, NULL);
  pthread_cond_init(&r->change, NULL);
  while (save->threads > 1 && r->threads < save->threads) {
    if (ckpt_thread_start(&r->thread[r->threads], compressor, r) != CORE_OK) {
      core_error_clear(); /* fewer compressors, or none, give the same file */
      break;
    }
    r->threads++;
  }
}

static void ring_stop(ring *r) {
  pthread_mutex_lock(&r->lock);
  r->stop = true;
  pthread_cond_broadcast(&r->change);
  pthread_mutex_unlock(&r->lock);
  for (int32_t t = 0; t < r->threads; t++) pthread_join(r->thread[t], NULL);
  pthread_cond_destroy(&r->change);
  pthread_mutex_destroy(&r->lock);
}

/* Waits until the block is in its slot. */
static core_status ring_take(ring *r, int64_t block, const uint8_t **stored) {
  int32_t slot = (int32_t)(block % r->slots);
  *stored = r->save->slot[slot];
  if (r->threads == 0) return encode(r->save, 0, block, slot);
  pthread_mutex_lock(&r->lock);
  while (r->status == CORE_OK && r->ready[slot] != block + 1) pthread_cond_wait(&r->change, &r->lock);
  core_status status = r->status == CORE_OK ? CORE_OK : core_error_restore(&r->error);
  pthread_mutex_unlock(&r->lock);
  return status;
}

static void ring_give(ring *r) {
  pthread_mutex_lock(&r->lock);
  r->written++;
  pthread_cond_broadcast(&r->change);
  pthread_mutex_unlock(&r->lock);
}

/* ---- sink: gathers small blocks into large writes ---- */

enum { SINK = 1 << 18, STRETCH = 1 << 24 };

typedef struct sink {
  int fd;
  const char *path;
  int64_t offset;  /* bytes so far, the gathered ones included */
  int64_t started; /* bytes whose way to the disk has begun */
  int64_t there;   /* bytes that have reached it */
  size_t used;
  uint8_t buffer[SINK];
} sink;

static core_status sink_flush(sink *s) {
  if (s->used == 0) return CORE_OK;
  size_t used = s->used;
  s->used = 0;
  return core_file_write(s->fd, s->path, s->buffer, used);
}

static core_status sink_append(sink *s, const void *bytes, size_t count) {
  if (count > SINK - s->used || count > SINK / 2) TRY(sink_flush(s)); /* what goes by itself goes behind it */
  s->offset += (int64_t)count;
  if (count > SINK / 2) return core_file_write(s->fd, s->path, bytes, count);
  memcpy(s->buffer + s->used, bytes, count);
  s->used += count;
  return CORE_OK;
}

/* Lets the system begin with what was written, while more is compressed, and waits for the stretch before:
 * the sync at the end is short then, and a slow disk shows as slow progress, not as a standstill. An error of
 * the disk is told once, here or by the sync; file systems without this call are left to the sync. */
static core_status start_stretch(sink *s) {
  const unsigned whole = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  int64_t written = s->offset - (int64_t)s->used;
  if (written - s->started < STRETCH) return CORE_OK;
  int result = s->started > s->there ? sync_file_range(s->fd, s->there, s->started - s->there, whole) : 0;
  CHECK(result == 0 || (errno != EIO && errno != ENOSPC && errno != EDQUOT), CORE_ERR_IO,
        "cannot sync %s: %s", s->path, strerror(errno));
  (void)sync_file_range(s->fd, s->started, written - s->started, SYNC_FILE_RANGE_WRITE);
  s->there = s->started;
  s->started = written;
  return CORE_OK;
}

/* ---- the file ---- */

static core_status write_blocks(ckpt_save *save, ring *r, sink *s) {
  for (int64_t b = 0; b < save->blocks; b++) {
    const uint8_t *stored;
    CHECK(!atomic_load(&save->cancel), CORE_ERR_STOPPED, "writing %s was abandoned", save->path);
    TRY(ring_take(r, b, &stored));
    save->offset[b] = s->offset;
    TRY(sink_append(s, stored, ckpt_entry_bytes(&save->entry[b])));
    ring_give(r);
    TRY(start_stretch(s));
    atomic_fetch_add(&save->errand.progress, 1);
  }
  return CORE_OK;
}

static core_status write_file(ckpt_save *save, ring *r, sink *s) {
  TRY(sink_append(s, &save->header, sizeof save->header));
  TRY(write_blocks(save, r, s));
  ckpt_trailer trailer = ckpt_trailer_make(&save->header, save->entry, save->blocks, s->offset);
  if (save->blocks > 0) TRY(sink_append(s, save->entry, (size_t)save->blocks * sizeof *save->entry));
  TRY(sink_append(s, &trailer, sizeof trailer));
  TRY(sink_flush(s));
  TRY(core_file_sync(s->fd, s->path));
  save->file = (ckpt_file){.bytes = s->offset, .blocks = save->blocks, .index_hash = trailer.index_hash};
  return CORE_OK;
}

/* What the threads that read back share. */
typedef struct read_back_run {
  ckpt_save *save;
  int fd;
} read_back_run;

static core_status read_back_block(void *context, int32_t worker, int64_t block) {
  const read_back_run *run = context;
  ckpt_save *save = run->save;
  const ckpt_entry *entry = &save->entry[block];
  int64_t at = save->offset[block];
  if (atomic_load(&save->cancel)) return CORE_OK;
  TRY(core_file_read_at(run->fd, save->path, save->slot[worker], ckpt_entry_bytes(entry), at));
  CHECK(XXH64(save->slot[worker], ckpt_entry_bytes(entry), 0) == entry->stored_hash, CORE_ERR_CORRUPT,
        "%s: block %lld at byte %lld reads back otherwise than it was written", save->path, (long long)block,
        (long long)at);
  atomic_fetch_add(&save->errand.progress, 1);
  return CORE_OK;
}

/* Reads back what was written: older checkpoints are removed on the strength of this one. Where nothing older
 * stays (past_cache), past the page cache, if the system lets it go. */
static core_status read_back(ckpt_save *save, int fd) {
  read_back_run run = {save, fd};
  if (save->past_cache) (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  TRY(ckpt_parallel(save->threads, save->blocks, read_back_block, &run));
  return CORE_OK;
}

static core_status save_file(ckpt_save *save) {
  ring r;
  sink s = {.fd = -1, .path = save->path};
  core_error saved = {0};
  TRY(core_file_open(save->path, O_RDWR | O_CREAT | O_TRUNC, &s.fd));
  ring_start(&r, save);
  core_status status = write_file(save, &r, &s);
  ring_stop(&r);
  if (status == CORE_OK) status = read_back(save, s.fd);
  core_error_save(&saved);
  status = core_keep_first(status, &saved, core_file_close(s.fd, s.path));
  TRY(status);
  TRY(core_file_sync_directory(save->directory));
  return CORE_OK;
}

/* Behind the save before: it has the scratch and the disk, and is published first. */
static core_status wait_for_turn(ckpt_save *save) {
  while (!atomic_load(&save->cancel) &&
         (atomic_load(&save->hold) || atomic_load(save->finished) < save->turn))
    core_clock_sleep(0.001);
  CHECK(!atomic_load(&save->cancel), CORE_ERR_STOPPED, "%s was abandoned before its turn came", save->path);
  return CORE_OK;
}

static void *save_main(void *argument) {
  ckpt_save *save = argument;
  ckpt_thread_give_way(); /* the compressors, which it starts, too */
  save->status = wait_for_turn(save);
  double start = core_clock_now();
  if (save->status == CORE_OK) save->status = save_file(save);
  if (save->status != CORE_OK) core_error_save(&save->error);
  save->seconds = core_clock_now() - start;
  atomic_fetch_add(save->finished, 1);
  atomic_store(&save->errand.done, true);
  return NULL;
}

core_status ckpt_save_start(ckpt_save *save, pthread_t *thread) {
  save->status = CORE_OK;
  save->seconds = 0;
  atomic_store(&save->errand.done, false);
  atomic_store(&save->cancel, false);
  TRY(ckpt_thread_start(thread, save_main, save));
  return CORE_OK;
}
