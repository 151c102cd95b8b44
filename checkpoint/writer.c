/* The writer as its caller sees it: create, begin, commit. Holds the private copy. All communication of a
 * save happens here, on the caller's thread. */
#include <cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/log.h"

enum { DEFAULT_KEEP = 3, DEFAULT_LEVEL = 1 };

/* One owned range and its place in the private copy. */
typedef struct range {
  const ckpt_tensor *tensor; /* the writer's copy of the description */
  uint8_t *copy;
} range;

struct ckpt_writer {
  comm_group *control;
  ckpt_options options;
  char directory[CKPT_PATH];
  core_arena *arena, *copies; /* working memory; the private copy */
  ckpt_tensor *tensor;        /* owned ranges with elements, in the order of the file: by name, first */
  char (*name)[CORE_NAME];
  range *range;
  int32_t ranges;
  int64_t raw_bytes;
  ckpt_block *block;
  ckpt_codec codec[CKPT_MAX_THREADS];
  int32_t codecs;          /* opened */
  ckpt_manifest catalogue; /* rank 0 */
  ckpt_save save;
  pthread_t thread;
  bool busy, running;
  int64_t step;
  char *meta;
  ckpt_figures figures;
};

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
  CHECK(w->options.keep > 0 && w->options.keep_every >= 0, CORE_ERR_ARGUMENT,
        "keep %d and keep_every %lld: expected at least 1 and 0", w->options.keep,
        (long long)w->options.keep_every);
  CHECK(w->options.threads > 0 && w->options.threads <= CKPT_MAX_THREADS, CORE_ERR_ARGUMENT,
        "%d compressing threads: expected 1 to %d", w->options.threads, CKPT_MAX_THREADS);
  CHECK(w->options.level >= ZSTD_minCLevel() && w->options.level <= ZSTD_maxCLevel(), CORE_ERR_ARGUMENT,
        "zstd level %d: expected %d to %d", w->options.level, ZSTD_minCLevel(), ZSTD_maxCLevel());
  w->save.threads = w->options.threads;
  /* With one checkpoint kept, the old one goes on the strength of the new one alone. */
  w->save.past_cache = w->options.keep == 1;
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
    w->save.blocks += ckpt_cells(w->tensor[i].count);
    w->raw_bytes += w->tensor[i].count * (int64_t)core_dtype_size(w->tensor[i].dtype);
  }
  return CORE_OK;
}

static core_status plan(ckpt_writer *w) {
  int32_t threads = w->options.threads;
  for (int32_t i = 0; i < w->ranges; i++) {
    const ckpt_tensor *t = w->range[i].tensor;
    TRY(core_arena_take(w->copies, t->count, core_dtype_size(t->dtype), (void **)&w->range[i].copy));
  }
  TRY(ARENA_TAKE(w->arena, w->save.blocks, &w->block));
  TRY(ARENA_TAKE(w->arena, w->save.blocks, &w->save.entry));
  TRY(ARENA_TAKE(w->arena, w->save.blocks, &w->save.offset));
  TRY(ARENA_TAKE(w->arena, 2 * threads, &w->save.slot));
  for (int32_t s = 0; s < 2 * threads; s++) {
    uint8_t *slot;
    TRY(ARENA_TAKE(w->arena, CKPT_STORED_BYTES, &slot));
    if (!core_arena_is_dry(w->arena)) w->save.slot[s] = slot;
  }
  for (int32_t c = 0; c < threads; c++) TRY(ARENA_TAKE(w->arena, CKPT_BLOCK_BYTES, &w->codec[c].plane));
  return CORE_OK;
}

static void divide_into_blocks(ckpt_writer *w) {
  int64_t block = 0;
  for (int32_t i = 0; i < w->ranges; i++) {
    const ckpt_tensor *t = w->range[i].tensor;
    size_t size = core_dtype_size(t->dtype);
    for (int64_t done = 0; done < t->count; done += CKPT_CELL) {
      int64_t left = t->count - done;
      w->block[block++] = (ckpt_block){.raw = w->range[i].copy + (size_t)done * size,
                                       .count = (int32_t)(left < CKPT_CELL ? left : CKPT_CELL),
                                       .dtype = (int32_t)t->dtype};
    }
  }
  w->save.block = w->block;
}

static core_status open_directory(const char *directory) {
  char parent[CKPT_PATH];
  TRY(core_file_make_directories(directory));
  TRY(ckpt_path(parent, "%s/..", directory));
  TRY(core_file_sync_directory(parent)); /* or a power cut takes the directory with all that is in it */
  TRY(ckpt_clean(directory));
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
  TRY(core_arena_create_staging("checkpoint's copy", copying_device(w), &w->copies));
  TRY(plan(w));
  TRY(core_arena_commit(w->arena));
  TRY(core_arena_commit(w->copies));
  TRY(plan(w));
  core_arena_seal(w->arena);
  core_arena_seal(w->copies);
  divide_into_blocks(w);
  for (; w->codecs < w->options.threads; w->codecs++) {
    TRY(ckpt_codec_open(&w->codec[w->codecs], w->options.level, w->codec[w->codecs].plane));
  }
  w->save.codec = w->codec;
  /* Touch the private copy now: the first save must not pay for its pages while training waits. */
  for (int32_t i = 0; i < w->ranges; i++) {
    memset(w->range[i].copy, 0, (size_t)w->tensor[i].count * core_dtype_size(w->tensor[i].dtype));
  }
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
    atomic_init(&w->save.errand.done, true);
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

static core_status begin_local(ckpt_writer *w, int64_t step, const char *meta) {
  const int64_t most = 999999999999999999; /* 18 digits, as in the manifest */
  int32_t rank = comm_rank(w->control);
  CHECK(step >= 0 && step <= most, CORE_ERR_ARGUMENT, "step %lld: expected 0 to %lld", (long long)step,
        (long long)most);
  TRY(check_meta(meta));
  TRY(ckpt_place_path(w->directory, step, CKPT_UNFINISHED, w->save.directory));
  TRY(ckpt_path(w->save.path, "%s/rank-%05d.ckpt", w->save.directory, rank));
  char *text = strdup(meta);
  CHECK(text != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes of meta", strlen(meta));
  free(w->meta);
  w->meta = text;
  w->step = step;
  w->save.header = ckpt_header_make(step, rank, comm_size(w->control));
  if (rank == 0) TRY(ckpt_prepare(w->directory, step));
  return CORE_OK;
}

/* All copies of a device are ordered on its main stream, which is waited for once. */
static core_status copy_ranges(ckpt_writer *w) {
  const core_device *device = copying_device(w);
  for (int32_t i = 0; i < w->ranges; i++) {
    const ckpt_tensor *t = w->range[i].tensor;
    size_t bytes = (size_t)t->count * core_dtype_size(t->dtype);
    if (t->device != NULL)
      TRY(t->device->copy_later(w->range[i].copy, t->data, bytes, NULL));
    else
      memcpy(w->range[i].copy, t->data, bytes);
  }
  if (device != NULL) TRY(device->stream_wait(NULL));
  return CORE_OK;
}

static void copy_and_start(ckpt_writer *w) {
  double start = core_clock_now();
  core_status status = copy_ranges(w);
  w->figures.stall_seconds = core_clock_now() - start;
  w->running = status == CORE_OK && ckpt_save_start(&w->save, &w->thread) == CORE_OK;
  if (!w->running) { /* known to all at the commit */
    w->save.status = core_error_get()->code;
    core_error_save(&w->save.error);
    atomic_store(&w->save.errand.done, true);
  }
}

core_status ckpt_writer_begin(ckpt_writer *w, int64_t step, const char *meta) {
  if (w->busy) TRY(ckpt_writer_commit(w));
  TRY(comm_agree_value(w->control, "step of the checkpoint", (uint64_t)step));
  TRY(comm_agree(w->control, begin_local(w, step, meta)));
  copy_and_start(w);
  w->busy = true;
  return CORE_OK;
}

bool ckpt_writer_busy(const ckpt_writer *w) {
  return w->busy;
}

bool ckpt_writer_ready(ckpt_writer *w) {
  return atomic_load(&w->save.errand.done);
}

void ckpt_writer_hold_priv(ckpt_writer *w, bool hold) {
  atomic_store(&w->save.hold, hold);
}

/* ---- commit ---- */

static core_status join_local(ckpt_writer *w) {
  if (w->running) pthread_join(w->thread, NULL);
  w->running = false;
  w->figures.write_seconds = w->save.seconds;
  w->figures.raw_bytes = w->raw_bytes;
  w->figures.stored_bytes = w->save.status == CORE_OK ? w->save.file.bytes : 0;
  return w->save.status == CORE_OK ? CORE_OK : core_error_restore(&w->save.error);
}

/* What a rank tells rank 0 of its file: ckpt_file, then the raw hash of every block. */
static core_status summarise(const ckpt_writer *w, char **out, int64_t *bytes) {
  *bytes = (int64_t)sizeof w->save.file + w->save.blocks * (int64_t)sizeof(uint64_t);
  *out = malloc((size_t)*bytes);
  CHECK(*out != NULL, CORE_ERR_MEMORY, "no memory for a summary of %lld blocks", (long long)w->save.blocks);
  memcpy(*out, &w->save.file, sizeof w->save.file);
  char *hashes = *out + sizeof w->save.file;
  for (int64_t b = 0; b < w->save.blocks; b++) {
    memcpy(hashes + (size_t)b * sizeof(uint64_t), &w->save.entry[b].raw_hash, sizeof(uint64_t));
  }
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

static core_status publish_local(ckpt_writer *w, const char *bytes, const int64_t *offset) {
  ckpt_manifest *m = &w->catalogue;
  const summaries all = {bytes, offset};
  for (int32_t f = 0; f < m->files; f++) memcpy(&m->file[f], bytes + offset[f], sizeof m->file[f]);
  for (int32_t i = 0; i < m->items; i++)
    m->item[i].hash = ckpt_item_hash(m, &m->item[i], hash_in_summary, &all);
  m->content_hash = ckpt_content_hash(m);
  m->step = w->step;
  m->meta = w->meta;
  core_status status = ckpt_publish(w->directory, m);
  m->meta = NULL; /* lent */
  TRY(status);
  return CORE_OK;
}

static core_status publish(ckpt_writer *w) {
  char *mine = NULL, *all = NULL;
  int64_t bytes = 0, *offset = NULL;
  core_status status;
  TRY_OUT(ckpt_wait_for_all(w->control, &w->save.errand), end);
  TRY_OUT(comm_agree(w->control, join_local(w)), end);
  TRY_OUT(comm_agree(w->control, summarise(w, &mine, &bytes)), end);
  TRY_OUT(comm_gather_bytes(w->control, 0, mine, bytes, &all, &offset), end);
  core_status local = comm_rank(w->control) == 0 ? publish_local(w, all, offset) : CORE_OK;
  TRY_OUT(comm_agree(w->control, local), end);
end:
  free(mine);
  free(all);
  free(offset);
  return status;
}

/* After a failure: what is left of step-X.tmp goes. All ranks' threads have ended. */
static void discard(const ckpt_writer *w) {
  core_error saved;
  core_error_save(&saved);
  if (core_file_exists(w->save.directory) && ckpt_remove(w->save.directory) != CORE_OK) {
    LOG_WARNING("cannot remove the unfinished checkpoint: %s", core_error_get()->message);
  }
  (void)core_error_restore(&saved);
}

static void retain(const ckpt_writer *w) {
  if (ckpt_retain(&w->options, w->step) == CORE_OK) return;
  LOG_WARNING("old checkpoints are not removed: %s", core_error_get()->message);
  core_error_clear();
}

core_status ckpt_writer_commit(ckpt_writer *w) {
  CHECK(w->busy, CORE_ERR_ARGUMENT, "no save was begun");
  core_status status = publish(w);
  w->busy = false;
  if (comm_rank(w->control) == 0) {
    if (status == CORE_OK) retain(w);
    if (status != CORE_OK) discard(w);
  }
  TRY(status);
  return CORE_OK;
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

/* Every rank removes its own file; the last one succeeds with the directory. */
static void abandon(ckpt_writer *w) {
  atomic_store(&w->save.cancel, true);
  if (w->running) pthread_join(w->thread, NULL);
  if (core_file_exists(w->save.path) && core_file_remove(w->save.path) != CORE_OK) core_error_clear();
  if (core_file_remove_directory(w->save.directory) != CORE_OK) core_error_clear();
}

void ckpt_writer_destroy(ckpt_writer *w) {
  if (w == NULL) return;
  core_error saved;
  core_error_save(&saved);
  if (w->busy) abandon(w);
  for (int32_t c = 0; c < w->codecs; c++) ckpt_codec_close(&w->codec[c]);
  core_arena_destroy(w->arena);
  core_arena_destroy(w->copies);
  ckpt_manifest_free(&w->catalogue);
  free(w->tensor);
  free(w->name);
  free(w->range);
  free(w->meta);
  free(w);
  (void)core_error_restore(&saved);
}
