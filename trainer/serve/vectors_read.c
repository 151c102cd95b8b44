/* Reading a vectors file: checked when opened, and each block again when it is read. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "trainer/serve/vectors_impl.h"

struct train_vectors {
  char *path;
  int fd;
  train_vectors_header header;
  train_vectors_section section[TRAIN_VECTORS_SECTIONS];
  train_vectors_about about;
  uint64_t *id, *block_row, *block_hash; /* [rows], [blocks + 1], [blocks] */
  int32_t *label;                        /* [rows] or NULL */
};

enum { VECTORS, ID, LABEL, KEY, BLOCK_ROW, BLOCK_HASH };

static core_status read_section(train_vectors *v, int which, void *out) {
  const train_vectors_section *section = &v->section[which];
  void *bytes = malloc((size_t)section->bytes + 8);
  CHECK(bytes, CORE_ERR_MEMORY, "%s: no memory for %lld bytes of '%s'", v->path, (long long)section->bytes,
        section->name);
  *(void **)out = bytes;
  if (section->bytes > 0) TRY(core_file_read_at(v->fd, v->path, bytes, (size_t)section->bytes, section->at));
  return CORE_OK;
}

static core_status check_tables(const train_vectors *v) {
  const train_vectors_header *h = &v->header;
  uint64_t tables = 0, keys = 0, hashes = 0;
  TRY(train_vectors_hash_priv(v->fd, v->path, &v->section[ID], 0, &tables));
  TRY(train_vectors_hash_priv(v->fd, v->path, &v->section[LABEL], tables, &tables));
  TRY(train_vectors_hash_priv(v->fd, v->path, &v->section[BLOCK_ROW], tables, &tables));
  TRY(train_vectors_hash_priv(v->fd, v->path, &v->section[KEY], 0, &keys));
  TRY(train_vectors_hash_priv(v->fd, v->path, &v->section[BLOCK_HASH], 0, &hashes));
  CHECK(tables == h->tables, CORE_ERR_CORRUPT, "%s: ids, labels or blocks do not match their checksum",
        v->path);
  CHECK(keys == h->keys && hashes == h->block_hashes, CORE_ERR_CORRUPT,
        "%s: keys or the blocks' checksums do not match their own", v->path);
  return CORE_OK;
}

/* Rows of blocks grow and end with the number of rows; no block is larger than its samples. */
static core_status check_blocks(const train_vectors *v) {
  const train_vectors_header *h = &v->header;
  bool good = v->block_row[0] == 0 && v->block_row[h->blocks] == (uint64_t)h->rows;
  for (int64_t b = 0; good && b < h->blocks; b++)
    good = v->block_row[b] <= v->block_row[b + 1] &&
           v->block_row[b + 1] - v->block_row[b] <= (uint64_t)h->block_samples;
  CHECK(good, CORE_ERR_CORRUPT, "%s: the blocks do not divide the %lld rows", v->path, (long long)h->rows);
  return CORE_OK;
}

static core_status open_all(train_vectors *v, const char *path) {
  v->path = strdup(path);
  CHECK(v->path, CORE_ERR_MEMORY, "no memory to read %s", path);
  CHECK(core_file_exists(path), CORE_ERR_NOT_FOUND, "there is no %s", path);
  TRY(core_file_open(path, O_RDONLY, &v->fd));
  TRY(train_vectors_header_read_priv(v->fd, path, &v->header));
  CHECK(v->header.complete == 1, CORE_ERR_FORMAT,
        "%s is not finished: run the `antiphon embed` that began it again", path);
  TRY(train_vectors_sections_priv(&v->header, path, v->section));
  TRY(check_tables(v));
  TRY(read_section(v, ID, &v->id));
  if (v->header.labelled) TRY(read_section(v, LABEL, &v->label));
  TRY(read_section(v, BLOCK_ROW, &v->block_row));
  TRY(read_section(v, BLOCK_HASH, &v->block_hash));
  TRY(check_blocks(v));
  return CORE_OK;
}

core_status train_vectors_open(const char *path, train_vectors **out) {
  train_vectors *v = calloc(1, sizeof *v);
  CHECK(v, CORE_ERR_MEMORY, "no memory to read %s", path);
  v->fd = -1;
  *out = NULL;
  core_status status = open_all(v, path);
  if (status != CORE_OK) {
    train_vectors_close(v);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  const train_vectors_header *h = &v->header;
  v->about = (train_vectors_about){.checkpoint = h->checkpoint,
                                   .step = h->step,
                                   .kind = (train_vectors_kind)h->kind,
                                   .dtype = (core_dtype)h->dtype,
                                   .rows = h->rows,
                                   .width = h->width};
  memcpy(v->about.modality, h->modality, CORE_NAME);
  memcpy(v->about.toward, h->toward, CORE_NAME);
  *out = v;
  return CORE_OK;
}

void train_vectors_close(train_vectors *vectors) {
  if (!vectors) return;
  if (vectors->fd >= 0) close(vectors->fd);
  free(vectors->path);
  free(vectors->id);
  free(vectors->label);
  free(vectors->block_row);
  free(vectors->block_hash);
  free(vectors);
}

const train_vectors_about *train_vectors_info(const train_vectors *vectors) {
  return &vectors->about;
}

const char *train_vectors_path(const train_vectors *vectors) {
  return vectors->path;
}

const uint64_t *train_vectors_ids(const train_vectors *vectors) {
  return vectors->id;
}

const int32_t *train_vectors_labels(const train_vectors *vectors) {
  return vectors->label;
}

int64_t train_vectors_blocks(const train_vectors *vectors) {
  return vectors->header.blocks;
}

int64_t train_vectors_block_row(const train_vectors *vectors, int64_t block) {
  return (int64_t)vectors->block_row[block];
}

core_status train_vectors_read(const train_vectors *v, int64_t first, int64_t last, void *out) {
  int64_t row = v->about.width * (int64_t)core_dtype_size(v->about.dtype);
  int64_t lo = (int64_t)v->block_row[first], hi = (int64_t)v->block_row[last];
  if (hi > lo)
    TRY(core_file_read_at(v->fd, v->path, out, (size_t)((hi - lo) * row), v->section[VECTORS].at + lo * row));
  for (int64_t b = first; b < last; b++) {
    int64_t from = (int64_t)v->block_row[b], to = (int64_t)v->block_row[b + 1];
    const char *rows = (const char *)out + (from - lo) * row;
    CHECK(train_vectors_block_hash_priv(rows, (size_t)((to - from) * row)) == v->block_hash[b],
          CORE_ERR_CORRUPT, "%s is damaged: vectors %lld to %lld do not match their checksum", v->path,
          (long long)from, (long long)to - 1);
  }
  return CORE_OK;
}

core_status train_vectors_key(const train_vectors *v, int64_t row, char text[TRAIN_MOST_KEY + 1]) {
  int64_t bytes = v->header.key_bytes;
  text[0] = text[bytes] = '\0';
  if (bytes > 0)
    TRY(core_file_read_at(v->fd, v->path, text, (size_t)bytes, v->section[KEY].at + row * bytes));
  return CORE_OK;
}
