/* The writer as its caller sees it: create, begin, destroy. Holds the private copies. */
#include <cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/save_buffers_impl.h"
#include "core/clock.h"
#include "core/file.h"

enum { DEFAULT_KEEP = 3, DEFAULT_LEVEL = 1 };

/* ---- create ---- */

static int compare_tensors(const void *left, const void *right) {
  const ckpt_tensor *a = left, *b = right;
  int names = strcmp(a->name, b->name);
  return names != 0 ? names : (a->first > b->first) - (a->first < b->first);
}

static core_status take_options(ckpt_writer *w, const ckpt_options *options) {
  CHECK(options->directory != NULL && options->directory[0] != 0, CORE_ERR_ARGUMENT,
        "no directory for checkpoints was given");
  TRY(ckpt_path(w->directory, "%s", options->directory));
  w->options = *options;
  w->options.directory = w->directory;
  if (w->options.keep == 0) w->options.keep = DEFAULT_KEEP;
  if (w->options.level == 0) w->options.level = DEFAULT_LEVEL;
  if (w->options.threads == 0) w->options.threads = 1;
  if (w->options.buffers == 0) w->options.buffers = 1;
  CHECK(w->options.keep > 0 && w->options.keep_every >= 0, CORE_ERR_ARGUMENT,
        "keep %d and keep_every %lld: expected at least 1 and 0", w->options.keep,
        (long long)w->options.keep_every);
  CHECK(w->options.threads > 0 && w->options.threads <= CKPT_MAX_THREADS, CORE_ERR_ARGUMENT,
        "%d compressing threads: expected 1 to %d", w->options.threads, CKPT_MAX_THREADS);
  CHECK(w->options.level >= ZSTD_minCLevel() && w->options.level <= ZSTD_maxCLevel(), CORE_ERR_ARGUMENT,
        "zstd level %d: expected %d to %d", w->options.level, ZSTD_minCLevel(), ZSTD_maxCLevel());
  CHECK(w->options.buffers > 0 && w->options.buffers <= CKPT_MOST_BUFFERS, CORE_ERR_ARGUMENT,
        "%d copies of the state: expected 1 to %d", w->options.buffers, CKPT_MOST_BUFFERS);
  return CORE_OK;
}

/* Copies the descriptions of what this rank writes; names included, since the caller's may go away. */
static core_status take_tensors(ckpt_writer *w, const ckpt_tensor *tensor, int32_t count) {
  w->tensor = calloc((size_t)count + 1, sizeof *w->tensor);
  w->name = calloc((size_t)count + 1, sizeof *w->name);
  w->range = calloc((size_t)count + 1, sizeof *w->range);
  CHECK(w->tensor != NULL && w->name != NULL && w->range != NULL, CORE_ERR_MEMORY,
        "no memory for the descriptions of %d tensors", count);
  for (int32_t i = 0; i < count; i++) {
    if (!tensor[i].owner || tensor[i].count == 0) continue;
    snprintf(w->name[w->ranges], CORE_NAME, "%s", tensor[i].name);
    w->tensor[w->ranges] = tensor[i];
    w->tensor[w->ranges].name = w->name[w->ranges];
    w->ranges++;
  }
  if (w->ranges > 0) qsort(w->tensor, (size_t)w->ranges, sizeof *w->tensor, compare_tensors);
  for (int32_t i = 0; i < w->ranges; i++) {
    w->range[i].tensor = &w->tensor[i];
    w->blocks += ckpt_cells(w->tensor[i].count);
    w->raw_bytes += w->tensor[i].count * (int64_t)core_dtype_size(w->tensor[i].dtype);
  }
  return CORE_OK;
}

/* Saves are written one after another, so they share the scratch of the threads. */
static core_status plan_scratch(ckpt_writer *w) {
  int32_t threads = w->options.threads;
  uint8_t **slot;
  TRY(ARENA_TAKE(w->arena, 2 * threads, &slot));
  for (int32_t s = 0; s < 2 * threads; s++) {
    uint8_t *bytes;
    TRY(ARENA_TAKE(w->arena, CKPT_STORED_BYTES, &bytes));
    if (!core_arena_is_dry(w->arena)) slot[s] = bytes;
  }
  for (int32_t c = 0; c < threads; c++) TRY(ARENA_TAKE(w->arena, CKPT_BLOCK_BYTES, &w->codec[c].plane));
  for (int32_t b = 0; b < w->options.buffers; b++) w->buffer[b].save.slot = slot;
  return CORE_OK;
}

static core_status plan(ckpt_writer *w) {
  for (int32_t b = 0; b < w->options.buffers; b++) {
    ckpt_buffer *buffer = &w->buffer[b];
    for (int32_t i = 0; i < w->ranges; i++) {
      const ckpt_tensor *t = w->range[i].tensor;
      TRY(core_arena_take(w->copies, t->count, core_dtype_size(t->dtype), (void **)&w->range[i].copy[b]));
    }
    TRY(ARENA_TAKE(w->arena, w->blocks, &buffer->block));
    TRY(ARENA_TAKE(w->arena, w->blocks, &buffer->save.entry));
    TRY(ARENA_TAKE(w->arena, w->blocks, &buffer->save.offset));
  }
  TRY(plan_scratch(w));
  return CORE_OK;
}

static void divide_into_blocks(const ckpt_writer *w, int32_t b) {
  int64_t block = 0;
  for (int32_t i = 0; i < w->ranges; i++) {
    const ckpt_tensor *t = w->range[i].tensor;
    size_t size = core_dtype_size(t->dtype);
    for (int64_t done = 0; done < t->count; done += CKPT_CELL) {
      int64_t left = t->count - done;
      w->buffer[b].block[block++] = (ckpt_block){.raw = w->range[i].copy[b] + (size_t)done * size,
                                                 .count = (int32_t)(left < CKPT_CELL ? left : CKPT_CELL),
                                                 .dtype = (int32_t)t->dtype};
    }
  }
}

/* What all saves of a buffer have in common. Touches its pages now: the first save must not pay for them
 * while training waits. */
static void prepare_buffer(ckpt_writer *w, int32_t b) {
  ckpt_buffer *buffer = &w->buffer[b];
  divide_into_blocks(w, b);
  buffer->save.block = buffer->block;
  buffer->save.blocks = w->blocks;
  buffer->save.codec = w->codec;
  buffer->save.threads = w->options.threads;
  /* With one checkpoint kept, the old one goes on the strength of the new one alone. */
  buffer->save.past_cache = w->options.keep == 1;
  buffer->save.finished = &w->finished;
  for (int32_t i = 0; i < w->ranges; i++)
    memset(w->range[i].copy[b], 0, (size_t)w->tensor[i].count * core_dtype_size(w->tensor[i].dtype));
}

static core_status open_directory(const char *directory) {
  char parent[CKPT_PATH];
  TRY(core_file_make_directories(directory));
  TRY(ckpt_path(parent, "%s/..", directory));
  TRY(core_file_sync_directory(parent)); /* or a power cut takes the directory with all that is in it */
  TRY(ckpt_clean(directory, CKPT_NO_STEP));
  return CORE_OK;
}

/* The device that any of the tensors lie on; NULL: all are in host memory. */
static const core_device *copying_device(const ckpt_writer *w) {
  for (int32_t i = 0; i < w->ranges; i++)
    if (w->tensor[i].device != NULL) return w->tensor[i].device;
  return NULL;
}

static core_status create_local(ckpt_writer *w, const ckpt_tensor *tensor, int32_t count) {
  TRY(take_tensors(w, tensor, count));
  TRY(core_arena_create("checkpoint", NULL, &w->arena));
  TRY(core_arena_create_staging("checkpoint's copies", copying_device(w), &w->copies));
  TRY(plan(w));
  TRY(core_arena_commit(w->arena));
  TRY(core_arena_commit(w->copies));
  TRY(plan(w));
  core_arena_seal(w->arena);
  core_arena_seal(w->copies);
  for (; w->codecs < w->options.threads; w->codecs++) {
    TRY(ckpt_codec_open(&w->codec[w->codecs], w->options.level, w->codec[w->codecs].plane));
  }
  for (int32_t b = 0; b < w->options.buffers; b++) prepare_buffer(w, b);
  if (comm_rank(w->control) == 0) TRY(open_directory(w->directory));
  return CORE_OK;
}

core_status ckpt_writer_create(comm_group *control, const ckpt_options *options, const ckpt_tensor *tensor,
                               int32_t count, ckpt_writer **out) {
  core_status status = CORE_OK, local = CORE_OK;
  ckpt_writer *w = calloc(1, sizeof *w);
  *out = NULL;
  if (w == NULL)
    local = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for a writer");
  if (local == CORE_OK) {
    w->control = control;
    local = take_options(w, options);
  }
  TRY_OUT(comm_agree(control, local), end);
  TRY_OUT(ckpt_catalogue_gather(control, tensor, count, &w->catalogue), end);
  TRY_OUT(comm_agree(control, create_local(w, tensor, count)), end);
  *out = w;
end:
  if (status != CORE_OK) ckpt_writer_destroy(w);
  return status;
}

/* ---- begin ---- */

static core_status check_meta(const char *meta) {
  CHECK(meta != NULL, CORE_ERR_ARGUMENT, "no meta was given, expected JSON text");
  cJSON *root = cJSON_Parse(meta);
  cJSON_Delete(root);
  CHECK(root != NULL, CORE_ERR_ARGUMENT, "meta is not valid JSON: %.80s", meta);
  return CORE_OK;
}

static core_status begin_local(const ckpt_writer *w, ckpt_buffer *b, int64_t step, const char *meta) {
  const int64_t most = 999999999999999999; /* 18 digits, as in the manifest */
  int32_t rank = comm_rank(w->control);
  CHECK(step >= 0 && step <= most, CORE_ERR_ARGUMENT, "step %lld: expected 0 to %lld", (long long)step,
        (long long)most);
  TRY(check_meta(meta));
  TRY(ckpt_place_path(w->directory, step, CKPT_UNFINISHED, b->save.directory));
  TRY(ckpt_path(b->save.path, "%s/rank-%05d.ckpt", b->save.directory, rank));
  char *text = strdup(meta);
  CHECK(text != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes of meta", strlen(meta));
  free(b->meta);
  b->meta = text;
  b->step = step;
  b->save.header = ckpt_header_make(step, rank, comm_size(w->control));
  if (rank == 0) TRY(ckpt_prepare(w->directory, step));
  return CORE_OK;
}

/* All copies of a device are ordered on its main stream, which is waited for once. */
static core_status copy_ranges(const ckpt_writer *w, int32_t b) {
  const core_device *device = copying_device(w);
  for (int32_t i = 0; i < w->ranges; i++) {
    const ckpt_tensor *t = w->range[i].tensor;
    size_t bytes = (size_t)t->count * core_dtype_size(t->dtype);
    if (t->device != NULL)
      TRY(t->device->copy_later(w->range[i].copy[b], t->data, bytes, NULL));
    else
      memcpy(w->range[i].copy[b], t->data, bytes);
  }
  if (device != NULL) TRY(device->stream_wait(NULL));
  return CORE_OK;
}

static void copy_and_start(ckpt_writer *w, int32_t place) {
  ckpt_buffer *b = &w->buffer[place];
  double start = core_clock_now();
  core_status status = copy_ranges(w, place);
  w->figures.stall_seconds = core_clock_now() - start;
  b->save.turn = w->begun++;
  b->running = status == CORE_OK && ckpt_save_start(&b->save, &b->thread) == CORE_OK;
  if (!b->running) { /* known to all at the commit */
    b->save.status = core_error_get()->code;
    core_error_save(&b->save.error);
    atomic_fetch_add(&w->finished, 1);
    atomic_store(&b->save.errand.done, true);
  }
}

/* Whether a save of this step is not yet committed: its unfinished directory is in use. */
static bool step_is_pending(const ckpt_writer *w, int64_t step) {
  for (int32_t i = 0; i < w->pending; i++)
    if (w->buffer[(w->oldest + i) % w->options.buffers].step == step) return true;
  return false;
}

core_status ckpt_writer_begin(ckpt_writer *w, int64_t step, const char *meta) {
  TRY(comm_agree_value(w->control, "step of the checkpoint", (uint64_t)step));
  while (ckpt_writer_full(w) || step_is_pending(w, step)) TRY(ckpt_writer_commit(w));
  int32_t place = (w->oldest + w->pending) % w->options.buffers;
  TRY(comm_agree(w->control, begin_local(w, &w->buffer[place], step, meta)));
  copy_and_start(w, place);
  w->pending++;
  return CORE_OK;
}

bool ckpt_writer_busy(const ckpt_writer *w) {
  return w->pending > 0;
}

bool ckpt_writer_full(const ckpt_writer *w) {
  return w->pending == w->options.buffers;
}

int64_t ckpt_writer_oldest(const ckpt_writer *w) {
  return w->pending > 0 ? w->buffer[w->oldest].step : CKPT_NO_STEP;
}

bool ckpt_writer_ready(ckpt_writer *w) {
  return w->pending == 0 || atomic_load(&w->buffer[w->oldest].save.errand.done);
}

void ckpt_writer_hold_priv(ckpt_writer *w, bool hold) {
  for (int32_t b = 0; b < w->options.buffers; b++) atomic_store(&w->buffer[b].save.hold, hold);
}

/* ---- the rest ---- */

void ckpt_writer_figures(const ckpt_writer *w, ckpt_figures *out) {
  *out = w->figures;
}

void ckpt_writer_spare(ckpt_writer *writer, int64_t step) {
  writer->options.spare = step;
}

int64_t ckpt_writer_bytes(const ckpt_writer *w) {
  return (int64_t)(core_arena_peak(w->arena) + core_arena_peak(w->copies));
}

/* Every rank removes its own files; the last one succeeds with the directory. No thread may be waited for
 * before all were told. */
static void abandon(ckpt_writer *w) {
  for (int32_t b = 0; b < w->options.buffers; b++) atomic_store(&w->buffer[b].save.cancel, true);
  for (int32_t i = 0; i < w->pending; i++) {
    const ckpt_buffer *b = &w->buffer[(w->oldest + i) % w->options.buffers];
    if (b->running) pthread_join(b->thread, NULL);
    if (core_file_exists(b->save.path) && core_file_remove(b->save.path) != CORE_OK) core_error_clear();
    if (core_file_remove_directory(b->save.directory) != CORE_OK) core_error_clear();
  }
}

void ckpt_writer_destroy(ckpt_writer *w) {
  if (w == NULL) return;
  core_error saved;
  core_error_save(&saved);
  if (w->pending > 0) abandon(w);
  for (int32_t c = 0; c < w->codecs; c++) ckpt_codec_close(&w->codec[c]);
  core_arena_destroy(w->arena);
  core_arena_destroy(w->copies);
  ckpt_manifest_free(&w->catalogue);
  free(w->tensor);
  free(w->name);
  free(w->range);
  for (int32_t b = 0; b < CKPT_MOST_BUFFERS; b++) free(w->buffer[b].meta);
  free(w);
  (void)core_error_restore(&saved);
}
