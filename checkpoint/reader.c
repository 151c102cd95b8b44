/* Loading at any layout, and the choice of the newest checkpoint that verifies. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/log.h"

struct ckpt_reader {
  comm_group *control;
  char path[CKPT_PATH];
  ckpt_manifest manifest;
  int32_t threads;
};

/* ---- opening ---- */

/* Rank 0 reads, all receive: one look at the file, the same answer everywhere. */
static core_status share_text(comm_group *control, const char *path, char **text, int64_t *count) {
  core_status status = CORE_OK, local = CORE_OK;
  *text = NULL;
  *count = 0;
  if (comm_rank(control) == 0) local = ckpt_manifest_text(path, text, count);
  TRY_OUT(comm_agree(control, local), end);
  TRY_OUT(comm_broadcast(control, 0, count, sizeof *count), end);
  if (comm_rank(control) != 0) *text = malloc((size_t)*count + 1);
  if (*text == NULL) {
    local = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                             "no memory for a manifest of %lld bytes", (long long)*count);
  }
  TRY_OUT(comm_agree(control, local), end);
  TRY_OUT(comm_broadcast(control, 0, *text, (size_t)*count), end);
end:
  if (status != CORE_OK) {
    free(*text);
    *text = NULL;
  }
  return status;
}

static core_status open_local(ckpt_reader *reader, const char *path, const char *text, int64_t count) {
  CHECK(reader != NULL, CORE_ERR_MEMORY, "no memory for a reader of %s", path);
  TRY(ckpt_path(reader->path, "%s", path));
  TRY(ckpt_manifest_take(path, text, count, &reader->manifest));
  return CORE_OK;
}

core_status ckpt_reader_open(comm_group *control, const char *path, ckpt_reader **out) {
  char *text;
  int64_t count;
  *out = NULL;
  TRY(share_text(control, path, &text, &count));
  ckpt_reader *reader = calloc(1, sizeof *reader);
  core_status status = comm_agree(control, open_local(reader, path, text, count));
  free(text);
  if (status != CORE_OK) {
    ckpt_reader_close(reader);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  reader->control = control;
  reader->threads = 1;
  *out = reader;
  return CORE_OK;
}

void ckpt_reader_close(ckpt_reader *reader) {
  if (reader == NULL) return;
  ckpt_manifest_free(&reader->manifest);
  free(reader);
}

core_status ckpt_reader_threads(ckpt_reader *reader, int32_t threads) {
  CHECK(threads > 0 && threads <= CKPT_MAX_THREADS, CORE_ERR_ARGUMENT, "%d reading threads: expected 1 to %d",
        threads, CKPT_MAX_THREADS);
  reader->threads = threads;
  return CORE_OK;
}

/* ---- the newest that verifies ---- */

/* Damage and absence lead to an older checkpoint; anything else would be as true of that one. A format that
 * this program is too old for is no damage either: going back silently would throw away work. */
bool ckpt_is_damage(core_status status) {
  switch (status) {
    case CORE_ERR_IO:
    case CORE_ERR_FORMAT:
    case CORE_ERR_CORRUPT:
    case CORE_ERR_MISMATCH:
    case CORE_ERR_NOT_FOUND:
      return true;
    default:
      return false;
  }
}

static core_status open_verified(comm_group *control, const char *path, int32_t threads, ckpt_reader **out) {
  TRY(ckpt_reader_open(control, path, out));
  core_status status = ckpt_verify_together(control, path, &(*out)->manifest, threads);
  (*out)->threads = threads;
  if (status != CORE_OK) {
    ckpt_reader_close(*out);
    *out = NULL;
  }
  TRY(status);
  return CORE_OK;
}

/* A published one without manifest, and none newer that has one, has lost it: it is tried, fails, and that is
 * said. With a newer one it is what an interrupted removal left. */
static void keep_candidates(const char *directory, ckpt_place *place, int32_t *count) {
  int32_t kept = 0;
  for (int32_t i = 0; i < *count; i++) {
    bool lost = place[i].kind == CKPT_PUBLISHED && !place[i].manifest && kept == 0;
    if (lost || (place[i].kind != CKPT_UNFINISHED && place[i].manifest)) {
      place[kept++] = place[i];
    } else {
      LOG_DEBUG("unfinished checkpoint of step %lld in %s is passed over", (long long)place[i].step,
                directory);
    }
  }
  *count = kept;
}

/* Rank 0's list of candidates, newest first, on all ranks. */
static core_status share_candidates(comm_group *control, const char *directory, ckpt_place **place,
                                    int32_t *count) {
  core_status status = CORE_OK, local = CORE_OK;
  *place = NULL;
  *count = 0;
  if (comm_rank(control) == 0) {
    local = ckpt_places(directory, place, count);
    keep_candidates(directory, *place, count);
  }
  TRY_OUT(comm_agree(control, local), end);
  TRY_OUT(comm_broadcast(control, 0, count, sizeof *count), end);
  if (comm_rank(control) != 0) *place = calloc((size_t)*count + 1, sizeof **place);
  if (*place == NULL && *count > 0) {
    local = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                             "no memory for a list of %d checkpoints", *count);
  }
  TRY_OUT(comm_agree(control, local), end);
  if (*count > 0) TRY_OUT(comm_broadcast(control, 0, *place, (size_t)*count * sizeof **place), end);
end:
  if (status != CORE_OK) {
    free(*place);
    *place = NULL;
  }
  return status;
}

/* A disk or a network that refuses a read may grant it a moment later, and an older checkpoint is work lost.
 */
static core_status open_patiently(comm_group *control, const char *path, int32_t threads, ckpt_reader **out) {
  enum { ATTEMPTS = 4 };
  double pause = 0.05;
  core_status status = open_verified(control, path, threads, out);
  for (int attempt = 1; status == CORE_ERR_IO && attempt < ATTEMPTS; attempt++, pause *= 4) {
    if (comm_rank(control) == 0) LOG_WARNING("reading once more: %s", core_error_get()->message);
    core_clock_sleep(pause);
    status = open_verified(control, path, threads, out);
  }
  TRY(status);
  return CORE_OK;
}

static core_status try_candidates(comm_group *control, const char *directory, const ckpt_place *place,
                                  int32_t count, int32_t threads, ckpt_reader **out) {
  core_error first = {0};
  char path[CKPT_PATH];
  for (int32_t i = 0; i < count; i++) {
    TRY(ckpt_place_path(directory, place[i].step, (ckpt_place_kind)place[i].kind, path));
    core_status status = open_patiently(control, path, threads, out);
    if (status == CORE_OK) {
      if (i > 0 && comm_rank(control) == 0)
        LOG_WARNING("falling back to checkpoint %s, which is sound", path);
      return CORE_OK;
    }
    if (!ckpt_is_damage(status)) return core_error_trace(status, __func__, __FILE__, __LINE__);
    if (comm_rank(control) == 0)
      LOG_WARNING("checkpoint %s is passed over: %s", path, core_error_get()->message);
    if (i == 0) core_error_save(&first);
  }
  CHECK(count == 0, CORE_ERR_CORRUPT, "none of the %d checkpoints in %s is sound; the newest: %s", count,
        directory, first.message);
  return CORE_OK;
}

core_status ckpt_reader_newest(comm_group *control, const char *directory, int32_t threads,
                               ckpt_reader **out) {
  ckpt_place *place;
  int32_t count;
  *out = NULL;
  CHECK(threads > 0 && threads <= CKPT_MAX_THREADS, CORE_ERR_ARGUMENT, "%d reading threads: expected 1 to %d",
        threads, CKPT_MAX_THREADS);
  TRY(share_candidates(control, directory, &place, &count));
  core_status status = try_candidates(control, directory, place, count, threads, out);
  free(place);
  TRY(status);
  return CORE_OK;
}

/* ---- what is in it ---- */

const char *ckpt_reader_meta(const ckpt_reader *reader) {
  return reader->manifest.meta;
}

const char *ckpt_reader_path(const ckpt_reader *reader) {
  return reader->path;
}

int64_t ckpt_reader_step(const ckpt_reader *reader) {
  return reader->manifest.step;
}

uint64_t ckpt_reader_content_hash(const ckpt_reader *reader) {
  return reader->manifest.content_hash;
}

static int compare_name(const void *name, const void *item) {
  return strcmp(name, ((const ckpt_item *)item)->name);
}

static const ckpt_item *find_item(const ckpt_manifest *m, const char *name) {
  return bsearch(name, m->item, (size_t)m->items, sizeof *m->item, compare_name);
}

static void describe_item(const ckpt_item *item, ckpt_tensor *out) {
  *out = (ckpt_tensor){.name = item->name, .dtype = item->dtype, .rank = item->rank, .count = item->count};
  memcpy(out->shape, item->shape, sizeof out->shape);
}

int32_t ckpt_reader_count(const ckpt_reader *reader) {
  return reader->manifest.items;
}

void ckpt_reader_at(const ckpt_reader *reader, int32_t i, ckpt_tensor *out) {
  describe_item(&reader->manifest.item[i], out);
}

core_status ckpt_reader_find(const ckpt_reader *reader, const char *name, ckpt_tensor *out) {
  const ckpt_item *item = find_item(&reader->manifest, name);
  CHECK(item != NULL, CORE_ERR_NOT_FOUND, "checkpoint %s has no tensor %s", reader->path, name);
  describe_item(item, out);
  return CORE_OK;
}

/* ---- loading ---- */

/* A cell, or a piece of one, and where it goes. */
typedef struct load_job {
  const ckpt_part *part;
  int64_t cell;        /* within the part */
  int64_t skip, count; /* elements of the cell */
  uint8_t *target;
  const core_device *device; /* of the target; NULL: host memory */
} load_job;

typedef struct load_list {
  load_job *job;
  int64_t count, capacity;
} load_list;

static core_status add_job(load_list *list, const load_job *job) {
  if (list->count == list->capacity) {
    int64_t capacity = list->capacity == 0 ? 256 : 2 * list->capacity;
    load_job *grown = realloc(list->job, (size_t)capacity * sizeof *grown);
    CHECK(grown != NULL, CORE_ERR_MEMORY, "no memory for a list of %lld blocks to load", (long long)capacity);
    list->job = grown;
    list->capacity = capacity;
  }
  list->job[list->count++] = *job;
  return CORE_OK;
}

static core_status add_part(load_list *list, const ckpt_tensor *t, const ckpt_part *part) {
  int64_t begin = t->first > part->first ? t->first : part->first;
  int64_t end = t->first + t->count, part_end = part->first + part->count;
  if (part_end < end) end = part_end;
  size_t size = core_dtype_size(t->dtype);
  while (begin < end) {
    int64_t cell = (begin - part->first) / CKPT_CELL, at = part->first + cell * CKPT_CELL;
    int64_t stop = end - at < CKPT_CELL ? end : at + CKPT_CELL;
    load_job job = {
        part,     cell, begin - at, stop - begin, (uint8_t *)t->data + (size_t)(begin - t->first) * size,
        t->device};
    TRY(add_job(list, &job));
    begin = stop;
  }
  return CORE_OK;
}

static core_status check_same(const ckpt_reader *reader, const ckpt_tensor *t, const ckpt_item *item) {
  char wanted[96], found[96];
  CHECK(item != NULL, CORE_ERR_MISMATCH, "checkpoint %s has no tensor %s", reader->path, t->name);
  bool same = item->dtype == t->dtype && item->rank == t->rank;
  for (int32_t d = 0; same && d < t->rank; d++) same = item->shape[d] == t->shape[d];
  CHECK(same, CORE_ERR_MISMATCH, "tensor %s is %s %s in checkpoint %s, expected %s %s", t->name,
        core_dtype_text(item->dtype), ckpt_shape_text(item->rank, item->shape, found), reader->path,
        core_dtype_text(t->dtype), ckpt_shape_text(t->rank, t->shape, wanted));
  return CORE_OK;
}

static core_status list_jobs(const ckpt_reader *reader, const ckpt_tensor *tensor, int32_t count,
                             load_list *list) {
  const ckpt_manifest *m = &reader->manifest;
  for (int32_t i = 0; i < count; i++) {
    const ckpt_tensor *t = &tensor[i];
    TRY(ckpt_tensor_check(t));
    const ckpt_item *item = find_item(m, t->name);
    TRY(check_same(reader, t, item));
    for (int64_t p = item->part; p < item->part + item->parts; p++) TRY(add_part(list, t, &m->part[p]));
  }
  return CORE_OK;
}

static int compare_jobs(const void *left, const void *right) {
  const load_job *a = left, *b = right;
  if (a->part->file != b->part->file) return a->part->file < b->part->file ? -1 : 1;
  int64_t x = a->part->block + a->cell, y = b->part->block + b->cell;
  return (x > y) - (x < y);
}

/* Scratch of one thread. */
typedef struct load_worker {
  ckpt_codec codec;
  uint8_t *memory, *raw, *stored;
} load_worker;

typedef struct load_run {
  const ckpt_manifest *manifest;
  ckpt_rank_file file;
  const load_job *job;
  load_worker worker[CKPT_MAX_THREADS];
  pthread_mutex_t device; /* one thread at a time copies to the device */
} load_run;

static core_status put(load_run *run, const load_job *job, const uint8_t *source, size_t bytes) {
  if (job->device == NULL || job->device->host_access) {
    memcpy(job->target, source, bytes);
    return CORE_OK;
  }
  pthread_mutex_lock(&run->device);
  core_status status = job->device->copy(job->target, source, bytes, NULL);
  pthread_mutex_unlock(&run->device);
  TRY(status);
  return CORE_OK;
}

static core_status load_one(void *context, int32_t worker, int64_t number) {
  load_run *run = context;
  load_worker *w = &run->worker[worker];
  const load_job *job = &run->job[number];
  int64_t left = job->part->count - job->cell * CKPT_CELL;
  bool reached = job->device == NULL || job->device->host_access;
  bool whole = reached && job->skip == 0 && job->count == (left < CKPT_CELL ? left : CKPT_CELL);
  uint8_t *raw = whole ? job->target : w->raw;
  TRY(ckpt_rank_file_read(&run->file, run->manifest, job->part, job->cell, &w->codec, w->stored, raw));
  if (!whole) {
    size_t size = core_dtype_size(run->manifest->item[job->part->tensor].dtype);
    TRY(put(run, job, raw + (size_t)job->skip * size, (size_t)job->count * size));
  }
  return CORE_OK;
}

static core_status open_workers(load_run *run, int32_t threads) {
  for (int32_t t = 0; t < threads; t++) {
    load_worker *w = &run->worker[t];
    w->memory = malloc((size_t)CKPT_BLOCK_BYTES * 2 + CKPT_STORED_BYTES);
    CHECK(w->memory != NULL, CORE_ERR_MEMORY, "no memory for the blocks of %d reading threads", threads);
    w->raw = w->memory + CKPT_BLOCK_BYTES;
    w->stored = w->raw + CKPT_BLOCK_BYTES;
    TRY(ckpt_codec_open(&w->codec, 1, w->memory));
  }
  return CORE_OK;
}

static void close_workers(load_run *run, int32_t threads) {
  for (int32_t t = 0; t < threads; t++) {
    ckpt_codec_close(&run->worker[t].codec);
    free(run->worker[t].memory);
  }
}

static core_status load_file(const ckpt_reader *reader, load_run *run, int32_t number, int64_t jobs) {
  core_status status = ckpt_rank_file_open(reader->path, &reader->manifest, number, &run->file);
  if (status == CORE_OK) status = ckpt_parallel(reader->threads, jobs, load_one, run);
  ckpt_rank_file_close(&run->file);
  TRY(status);
  return CORE_OK;
}

/* File by file, so that a rank holds one descriptor and one index at a time. */
static core_status load_files(const ckpt_reader *reader, load_run *run, const load_list *list) {
  for (int64_t begin = 0, end = 0; begin < list->count; begin = end) {
    int32_t file = list->job[begin].part->file;
    while (end < list->count && list->job[end].part->file == file) end++;
    run->job = list->job + begin;
    TRY(load_file(reader, run, file, end - begin));
  }
  return CORE_OK;
}

static core_status load_local(const ckpt_reader *reader, const ckpt_tensor *tensor, int32_t count) {
  core_status status = CORE_OK;
  load_list list = {0};
  load_run *run = calloc(1, sizeof *run);
  CHECK(run != NULL, CORE_ERR_MEMORY, "no memory to load %s", reader->path);
  run->manifest = &reader->manifest;
  pthread_mutex_init(&run->device, NULL);
  TRY_OUT(list_jobs(reader, tensor, count, &list), end);
  if (list.count > 0) qsort(list.job, (size_t)list.count, sizeof *list.job, compare_jobs);
  TRY_OUT(open_workers(run, reader->threads), end);
  TRY_OUT(load_files(reader, run, &list), end);
end:
  close_workers(run, reader->threads);
  pthread_mutex_destroy(&run->device);
  free(list.job);
  free(run);
  return status;
}

core_status ckpt_reader_load(ckpt_reader *reader, const ckpt_tensor *tensor, int32_t count) {
  TRY(comm_agree(reader->control, load_local(reader, tensor, count)));
  return CORE_OK;
}
