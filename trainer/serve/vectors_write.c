/* Writing a vectors file: begin or take up, put blocks, publish. */
#include <fcntl.h>
#include <limits.h> /* PATH_MAX */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h> /* flock */
#include <unistd.h>

#include "core/file.h"
#include "trainer/serve/vectors_impl.h"

struct train_vectors_writer {
  char path[PATH_MAX], part[PATH_MAX];
  int fd;
  train_vectors_header header;
  train_vectors_section section[TRAIN_VECTORS_SECTIONS];
  uint64_t *block_row; /* [blocks + 1] */
};

enum { VECTORS, ID, LABEL, KEY, BLOCK_ROW, BLOCK_HASH };

static core_status name_files(const char *path, train_vectors_writer *w) {
  int length = snprintf(w->path, sizeof w->path, "%s", path);
  CHECK(length > 0 && length < PATH_MAX - 16, CORE_ERR_ARGUMENT, "a file name of %d bytes", length);
  snprintf(w->part, sizeof w->part, "%.*s.part", PATH_MAX - 16, path);
  return CORE_OK;
}

/* Whether a file of this name is of the plan; one that is of something else is refused. */
static core_status compare(const char *path, const train_vectors_plan *plan, train_vectors_header *header) {
  int fd = -1;
  TRY(core_file_open(path, O_RDONLY, &fd));
  core_status status = train_vectors_header_read_priv(fd, path, header);
  close(fd);
  if (status != CORE_OK)
    return core_error_context(status, "%s is in the way; remove it or choose another -o", path);
  CHECK(header->identity == plan->identity, CORE_ERR_MISMATCH,
        "%s was made from something else (%s vectors of '%s', checkpoint %016llx, step %lld): remove it or "
        "choose "
        "another -o",
        path, train_vectors_kind_text((train_vectors_kind)header->kind), header->modality,
        (unsigned long long)header->checkpoint, (long long)header->step);
  return CORE_OK;
}

static void fill_header(const train_vectors_plan *plan, train_vectors_header *h) {
  const train_vectors_about *about = &plan->about;
  memset(h, 0, sizeof *h);
  h->version = TRAIN_VECTORS_VERSION;
  h->checkpoint = about->checkpoint;
  h->identity = plan->identity;
  h->step = about->step;
  h->samples = plan->samples;
  h->block_samples = plan->block_samples;
  h->blocks = plan->blocks;
  h->rows = about->rows;
  h->width = about->width;
  h->key_bytes = plan->key_bytes;
  h->labelled = plan->label != NULL;
  h->kind = (int32_t)about->kind;
  h->dtype = (int32_t)about->dtype;
  snprintf(h->modality, sizeof h->modality, "%s", about->modality);
  snprintf(h->toward, sizeof h->toward, "%s", about->toward);
}

static core_status put_section(int fd, const char *path, const train_vectors_section *section,
                               const void *bytes) {
  if (section->bytes > 0) TRY(train_write_at_priv(fd, path, section->at, bytes, section->bytes));
  return CORE_OK;
}

/* Everything but keys and vectors; the header last. */
static core_status fill(int fd, const char *path, const train_vectors_plan *plan, train_vectors_header *h) {
  train_vectors_section section[TRAIN_VECTORS_SECTIONS];
  TRY(train_vectors_sections_priv(h, path, section));
  uint64_t *zero = calloc((size_t)plan->blocks + 1, sizeof *zero);
  CHECK(zero, CORE_ERR_MEMORY, "%s: no memory for %lld blocks", path, (long long)plan->blocks);
  core_status status = put_section(fd, path, &section[ID], plan->id);
  if (status == CORE_OK) status = put_section(fd, path, &section[LABEL], plan->label);
  if (status == CORE_OK) status = put_section(fd, path, &section[BLOCK_ROW], plan->block_row);
  if (status == CORE_OK) status = put_section(fd, path, &section[BLOCK_HASH], zero);
  free(zero);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  TRY(train_vectors_hash_priv(fd, path, &section[ID], 0, &h->tables));
  TRY(train_vectors_hash_priv(fd, path, &section[LABEL], h->tables, &h->tables));
  TRY(train_vectors_hash_priv(fd, path, &section[BLOCK_ROW], h->tables, &h->tables));
  TRY(train_vectors_header_write_priv(fd, path, h));
  TRY(core_file_sync(fd, path));
  return CORE_OK;
}

/* Under a third name until it is whole, so that PATH.part always makes sense. */
static core_status make(const train_vectors_writer *w, const train_vectors_plan *plan) {
  char fresh[PATH_MAX];
  train_vectors_header header;
  int fd = -1;
  snprintf(fresh, sizeof fresh, "%.*s.new", PATH_MAX - 16, w->path);
  fill_header(plan, &header);
  TRY(train_vectors_make_priv(fresh, &header));
  TRY(core_file_open(fresh, O_RDWR, &fd));
  core_status status = fill(fd, fresh, plan, &header);
  core_error saved;
  core_error_save(&saved);
  status = core_keep_first(status, &saved, core_file_close(fd, fresh));
  if (status == CORE_OK) status = core_file_rename(fresh, w->part);
  if (status != CORE_OK) {
    (void)unlink(fresh);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static core_status open_part(train_vectors_writer *w) {
  const train_vectors_section *rows = &w->section[BLOCK_ROW];
  TRY(core_file_open(w->part, O_RDWR, &w->fd));
  TRY(train_vectors_header_read_priv(w->fd, w->part, &w->header));
  TRY(train_vectors_sections_priv(&w->header, w->part, w->section));
  w->block_row = malloc((size_t)rows->bytes);
  CHECK(w->block_row, CORE_ERR_MEMORY, "%s: no memory for %lld blocks", w->part, (long long)w->header.blocks);
  TRY(core_file_read_at(w->fd, w->part, w->block_row, (size_t)rows->bytes, rows->at));
  return CORE_OK;
}

static core_status begin(const char *path, const train_vectors_plan *plan, train_vectors_state *state,
                         train_vectors_writer *w) {
  train_vectors_header there;
  TRY(name_files(path, w));
  if (core_file_exists(path)) {
    TRY(compare(path, plan, &there));
    *state = TRAIN_VECTORS_DONE;
    return CORE_OK;
  }
  *state = core_file_exists(w->part) ? TRAIN_VECTORS_RESUMED : TRAIN_VECTORS_FRESH;
  if (*state == TRAIN_VECTORS_RESUMED) TRY(compare(w->part, plan, &there));
  if (*state == TRAIN_VECTORS_FRESH) TRY(make(w, plan));
  TRY(open_part(w));
  CHECK(flock(w->fd, LOCK_EX | LOCK_NB) == 0, CORE_ERR_IO,
        "another process is writing %s; wait for it or choose another -o", w->part);
  return CORE_OK;
}

core_status train_vectors_begin(const char *path, const train_vectors_plan *plan, train_vectors_state *state,
                                train_vectors_writer **out) {
  train_vectors_writer *w = calloc(1, sizeof *w);
  CHECK(w, CORE_ERR_MEMORY, "no memory to write %s", path);
  w->fd = -1;
  *out = NULL;
  core_status status = begin(path, plan, state, w);
  if (status == CORE_OK && *state != TRAIN_VECTORS_DONE) {
    *out = w;
    return CORE_OK;
  }
  train_vectors_leave(w);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status train_vectors_attach(const char *path, train_vectors_writer **out) {
  train_vectors_writer *w = calloc(1, sizeof *w);
  CHECK(w, CORE_ERR_MEMORY, "no memory to write %s", path);
  w->fd = -1;
  *out = NULL;
  core_status status = name_files(path, w);
  if (status == CORE_OK) status = open_part(w);
  if (status != CORE_OK) {
    train_vectors_leave(w);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = w;
  return CORE_OK;
}

void train_vectors_leave(train_vectors_writer *writer) {
  if (!writer) return;
  if (writer->fd >= 0) close(writer->fd);
  free(writer->block_row);
  free(writer);
}

static int64_t row_bytes(const train_vectors_writer *w) {
  return w->header.width * (int64_t)core_dtype_size((core_dtype)w->header.dtype);
}

static int64_t bytes_of_block(const train_vectors_writer *w, int64_t block) {
  return (int64_t)(w->block_row[block + 1] - w->block_row[block]) * row_bytes(w);
}

core_status train_vectors_done(const train_vectors_writer *w, uint8_t *done) {
  int64_t blocks = w->header.blocks, most = 1;
  for (int64_t b = 0; b < blocks; b++)
    if (bytes_of_block(w, b) > most) most = bytes_of_block(w, b);
  uint64_t *hash = malloc((size_t)(blocks + 1) * sizeof *hash);
  char *rows = malloc((size_t)most);
  core_status status = CORE_OK;
  if (!hash || !rows)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "%s: no memory for %lld blocks",
                              w->part, (long long)blocks);
  if (status == CORE_OK && blocks > 0)
    status =
        core_file_read_at(w->fd, w->part, hash, (size_t)blocks * sizeof *hash, w->section[BLOCK_HASH].at);
  for (int64_t b = 0; b < blocks && status == CORE_OK; b++) {
    size_t bytes = (size_t)bytes_of_block(w, b);
    done[b] = 0;
    if (hash[b] == 0) continue;
    status = core_file_read_at(w->fd, w->part, rows, bytes,
                               w->section[VECTORS].at + (int64_t)w->block_row[b] * row_bytes(w));
    done[b] = status == CORE_OK && train_vectors_block_hash_priv(rows, bytes) == hash[b];
  }
  free(hash);
  free(rows);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status train_vectors_put_keys(const train_vectors_writer *w, int64_t row, int64_t count,
                                   const char *keys) {
  int64_t bytes = w->header.key_bytes;
  CHECK(row >= 0 && count >= 0 && row + count <= w->header.rows, CORE_ERR_ARGUMENT,
        "%s: keys of rows %lld to %lld, there are %lld", w->part, (long long)row, (long long)(row + count),
        (long long)w->header.rows);
  TRY(train_write_at_priv(w->fd, w->part, w->section[KEY].at + row * bytes, keys, count * bytes));
  return CORE_OK;
}

core_status train_vectors_put(const train_vectors_writer *w, int64_t block, const void *rows) {
  CHECK(block >= 0 && block < w->header.blocks, CORE_ERR_ARGUMENT, "%s: block %lld, there are %lld", w->part,
        (long long)block, (long long)w->header.blocks);
  int64_t bytes = bytes_of_block(w, block), at = (int64_t)w->block_row[block] * row_bytes(w);
  uint64_t hash = train_vectors_block_hash_priv(rows, (size_t)bytes);
  if (bytes > 0) TRY(train_write_at_priv(w->fd, w->part, w->section[VECTORS].at + at, rows, bytes));
  TRY(train_write_at_priv(w->fd, w->part, w->section[BLOCK_HASH].at + 8 * block, &hash, sizeof hash));
  return CORE_OK;
}

core_status train_vectors_sync(const train_vectors_writer *w) {
  TRY(core_file_sync(w->fd, w->part));
  return CORE_OK;
}

static core_status all_put(const train_vectors_writer *w) {
  int64_t blocks = w->header.blocks, missing = 0;
  uint64_t *hash = calloc((size_t)blocks + 1, sizeof *hash);
  CHECK(hash, CORE_ERR_MEMORY, "%s: no memory for %lld blocks", w->part, (long long)blocks);
  core_status status =
      core_file_read_at(w->fd, w->part, hash, (size_t)blocks * sizeof *hash, w->section[BLOCK_HASH].at);
  for (int64_t b = 0; b < blocks; b++) missing += hash[b] == 0;
  free(hash);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  CHECK(missing == 0, CORE_ERR_INTERNAL, "%s: %lld of %lld blocks were not written", w->part,
        (long long)missing, (long long)blocks);
  return CORE_OK;
}

static core_status sync_parent(const char *path) {
  char parent[PATH_MAX];
  snprintf(parent, sizeof parent, "%s", path);
  char *slash = strrchr(parent, '/');
  if (slash == parent) slash++; /* a file directly under the root */
  if (slash) *slash = '\0';
  TRY(core_file_sync_directory(slash ? parent : "."));
  return CORE_OK;
}

core_status train_vectors_publish(const train_vectors_writer *w) {
  train_vectors_header header = w->header;
  if (header.blocks > 0) TRY(all_put(w));
  header.complete = 1;
  TRY(train_vectors_hash_priv(w->fd, w->part, &w->section[KEY], 0, &header.keys));
  TRY(train_vectors_hash_priv(w->fd, w->part, &w->section[BLOCK_HASH], 0, &header.block_hashes));
  TRY(train_vectors_header_write_priv(w->fd, w->part, &header));
  TRY(core_file_sync(w->fd, w->part));
  TRY(core_file_rename(w->part, w->path));
  TRY(sync_parent(w->path));
  return CORE_OK;
}
