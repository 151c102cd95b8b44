/* The header of a vectors file, where its parts lie, checksums. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* lseek */

#include "core/file.h"
#include "core/random.h" /* core_hash */
#include "trainer/serve/vectors_impl.h"

static const char magic[16] = "antiphon-vectors";
_Static_assert(sizeof(train_vectors_header) <= TRAIN_VECTORS_HEADER, "the header has a block of the file");
_Static_assert(offsetof(train_vectors_header, hash) % 8 == 0 &&
                   sizeof(train_vectors_header) == offsetof(train_vectors_header, hash) + 8,
               "the header has no padding");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "vectors files are little-endian");

const char *train_vectors_kind_text(train_vectors_kind kind) {
  return kind == TRAIN_VECTORS_KEY ? "key" : kind == TRAIN_VECTORS_QUERY ? "query" : "embedding";
}

uint64_t train_vectors_block_hash_priv(const void *bytes, size_t count) {
  uint64_t hash = core_hash(bytes, count, 0);
  return hash != 0 ? hash : 1;
}

static bool bytes_of(int64_t count, int64_t size, int64_t *bytes) {
  return count >= 0 && size >= 0 && !__builtin_mul_overflow(count, size, bytes);
}

core_status train_vectors_sections_priv(const train_vectors_header *h, const char *path,
                                        train_vectors_section section[TRAIN_VECTORS_SECTIONS]) {
  int64_t row = 0, vectors = 0, id = 0, label = 0, key = 0, block = 0;
  int64_t size = (int64_t)core_dtype_size((core_dtype)h->dtype);
  bool good = h->blocks >= 0 && h->blocks < INT64_MAX / 16 && bytes_of(h->width, size, &row) &&
              bytes_of(h->rows, row, &vectors) && bytes_of(h->rows, 8, &id) &&
              bytes_of(h->labelled ? h->rows : 0, 4, &label) && bytes_of(h->rows, h->key_bytes, &key) &&
              bytes_of(h->blocks, 8, &block);
  CHECK(good, CORE_ERR_CORRUPT, "%s: %lld rows of %lld numbers in %lld blocks cannot be", path,
        (long long)h->rows, (long long)h->width, (long long)h->blocks);
  section[0] = (train_vectors_section){"vectors", h->vectors_at, vectors};
  section[1] = (train_vectors_section){"id", h->id_at, id};
  section[2] = (train_vectors_section){"label", h->label_at, label};
  section[3] = (train_vectors_section){"key", h->key_at, key};
  section[4] = (train_vectors_section){"block_row", h->block_row_at, block + 8};
  section[5] = (train_vectors_section){"block_hash", h->block_hash_at, block};
  return CORE_OK;
}

core_status train_vectors_hash_priv(int fd, const char *path, const train_vectors_section *section,
                                    uint64_t seed, uint64_t *hash) {
  enum { PIECE = 1 << 20 };
  core_status status = CORE_OK;
  char *piece = malloc(PIECE);
  CHECK(piece, CORE_ERR_MEMORY, "no memory to read %s", path);
  *hash = seed;
  for (int64_t done = 0; done < section->bytes && status == CORE_OK; done += PIECE) {
    size_t count = (size_t)(section->bytes - done < PIECE ? section->bytes - done : PIECE);
    status = core_file_read_at(fd, path, piece, count, section->at + done);
    if (status == CORE_OK) *hash = core_hash(piece, count, *hash);
  }
  free(piece);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* Numbers that no header of ours has, whatever its checksum says. */
static core_status check_values(const train_vectors_header *h, const char *path) {
  bool dtype = h->dtype == CORE_FLOAT16 || h->dtype == CORE_FLOAT32;
  CHECK(dtype && h->kind >= TRAIN_VECTORS_KEY && h->kind <= TRAIN_VECTORS_EMBEDDING, CORE_ERR_CORRUPT,
        "%s: vectors of dtype %d and kind %d", path, h->dtype, h->kind);
  CHECK(h->rows >= 0 && h->width >= 1 && h->samples >= h->rows && h->block_samples >= 1 &&
            h->key_bytes >= 0 && h->key_bytes <= TRAIN_MOST_KEY,
        CORE_ERR_CORRUPT, "%s: %lld vectors of width %lld from %lld samples, keys of %lld bytes", path,
        (long long)h->rows, (long long)h->width, (long long)h->samples, (long long)h->key_bytes);
  CHECK(memchr(h->modality, 0, CORE_NAME) && memchr(h->toward, 0, CORE_NAME), CORE_ERR_CORRUPT,
        "%s: names of modalities without end", path);
  return CORE_OK;
}

static core_status check_places(int fd, const char *path, const train_vectors_header *header) {
  train_vectors_section section[TRAIN_VECTORS_SECTIONS];
  int64_t size = lseek(fd, 0, SEEK_END);
  TRY(train_vectors_sections_priv(header, path, section));
  for (int i = 0; i < TRAIN_VECTORS_SECTIONS; i++) {
    const train_vectors_section *s = &section[i];
    if (s->bytes == 0) continue;
    CHECK(s->at >= TRAIN_VECTORS_HEADER && s->bytes <= size && s->at <= size - s->bytes, CORE_ERR_CORRUPT,
          "%s is cut off: '%s' needs %lld bytes from byte %lld on, the file has %lld", path, s->name,
          (long long)s->bytes, (long long)s->at, (long long)size);
  }
  return CORE_OK;
}

core_status train_vectors_header_read_priv(int fd, const char *path, train_vectors_header *h) {
  int64_t size = lseek(fd, 0, SEEK_END);
  CHECK(size >= TRAIN_VECTORS_HEADER, CORE_ERR_FORMAT,
        "%s is no file of `antiphon embed`: it has %lld bytes, the header alone has %d", path,
        (long long)size, TRAIN_VECTORS_HEADER);
  TRY(core_file_read_at(fd, path, h, sizeof *h, 0));
  CHECK(memcmp(h->magic, magic, sizeof magic) == 0, CORE_ERR_FORMAT, "%s is no file of `antiphon embed`",
        path);
  CHECK(h->version == TRAIN_VECTORS_VERSION, CORE_ERR_UNSUPPORTED,
        "%s is of version %u of the vectors format; this program reads version %d", path, h->version,
        TRAIN_VECTORS_VERSION);
  CHECK(h->hash == core_hash(h, offsetof(train_vectors_header, hash), 0), CORE_ERR_CORRUPT,
        "%s: the header does not match its checksum", path);
  TRY(check_values(h, path));
  TRY(check_places(fd, path, h));
  return CORE_OK;
}

core_status train_write_at_priv(int fd, const char *path, int64_t at, const void *bytes, int64_t count) {
  CHECK(lseek(fd, (off_t)at, SEEK_SET) == at, CORE_ERR_IO, "%s: cannot go to byte %lld", path, (long long)at);
  TRY(core_file_write(fd, path, bytes, (size_t)count));
  return CORE_OK;
}

core_status train_vectors_header_write_priv(int fd, const char *path, train_vectors_header *h) {
  memcpy(h->magic, magic, sizeof magic);
  h->version = TRAIN_VECTORS_VERSION;
  h->hash = core_hash(h, offsetof(train_vectors_header, hash), 0);
  TRY(train_write_at_priv(fd, path, 0, h, sizeof *h));
  return CORE_OK;
}
