/* Outline: from the superblock to the root group's object header, over its blocks and messages, to the
 * attribute of a name. Layouts are those of the HDF5 File Format Specification 3.0, sections II.A, IV.A.1.a,
 * IV.A.2.b, .d, .m, .q. */
#include "data/header_impl.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "data/heap_impl.h"
#include "data/memory_impl.h"

enum { MOST_BLOCKS = 32, MOST_BLOCK_BYTES = 1 << 20, MESSAGE_ATTRIBUTE = 0x0c, MESSAGE_CONTINUATION = 0x10 };

/* A block of messages in the file, and the way through all of them. */
typedef struct header_walk {
  const data_hdf5_file *file;
  int fd;
  int64_t base;
  int32_t blocks;
  int64_t at[MOST_BLOCKS], bytes[MOST_BLOCKS];
} header_walk;

uint64_t data_little_priv(const uint8_t *bytes, int64_t count) {
  uint64_t value = 0;
  for (int64_t i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

static core_status damaged(const header_walk *walk, const char *what) {
  FAIL(CORE_ERR_CORRUPT, "%s: damaged: %s", walk->file->path, what);
}

static core_status add_block(header_walk *walk, uint64_t address, uint64_t bytes) {
  const uint64_t size = (uint64_t)(walk->file->bytes - walk->base);
  if (walk->blocks == MOST_BLOCKS || address > size || bytes > size - address || bytes > MOST_BLOCK_BYTES)
    return damaged(walk, "a block of the root header lies outside the file or is too large");
  walk->at[walk->blocks] = walk->base + (int64_t)address;
  walk->bytes[walk->blocks++] = (int64_t)bytes;
  return CORE_OK;
}

/* ---- one attribute ---- */

/* Takes `count` bytes off the front, padded to `unit`; NULL when there are not so many. */
static const uint8_t *take(const uint8_t **bytes, int64_t *left, int64_t count, int64_t unit) {
  const int64_t padded = (count + unit - 1) / unit * unit;
  const uint8_t *taken = *bytes;
  if (padded > *left) return NULL;
  *bytes += padded;
  *left -= padded;
  return taken;
}

/* Values that a dataspace has, -1: it makes no sense. */
static int64_t count_points(const uint8_t *space, int64_t bytes) {
  if (bytes < 4 || (space[0] != 1 && space[0] != 2)) return -1;
  const int64_t head = space[0] == 1 ? 8 : 4, rank = space[1];
  int64_t points = space[0] == 2 && space[3] == 2 ? 0 : 1; /* type 2 is empty */
  if (rank > 32 || head + 8 * rank > bytes) return -1;
  for (int64_t i = 0; i < rank; ++i) {
    const uint64_t extent = data_little_priv(space + head + 8 * i, 8);
    if (extent > DATA_MOST_ATTRIBUTE || points * (int64_t)extent > DATA_MOST_ATTRIBUTE) return -1;
    points *= (int64_t)extent;
  }
  return points;
}

/* Reads a message that is the attribute `name`; others leave *out as it is. False: its parts do not fit into
 * it. */
static bool read_attribute(const uint8_t *message, int64_t bytes, const char *name, data_attribute *out) {
  if (bytes < 8 || message[0] < 1 || message[0] > 3) return false;
  const int64_t unit = message[0] == 1 ? 8 : 1, head = message[0] == 3 ? 9 : 8;
  const int64_t name_bytes = (int64_t)data_little_priv(message + 2, 2),
                type_bytes = (int64_t)data_little_priv(message + 4, 2);
  const int64_t space_bytes = (int64_t)data_little_priv(message + 6, 2);
  const bool shared = message[0] > 1 && (message[1] & 3) != 0; /* type or space lies elsewhere */
  const uint8_t *at = message;
  if (take(&at, &bytes, head, 1) == NULL) return false;
  const uint8_t *text = take(&at, &bytes, name_bytes, unit);
  if (text == NULL || strnlen((const char *)text, (size_t)name_bytes) == (size_t)name_bytes) return false;
  if (strcmp((const char *)text, name) != 0) return true;
  const uint8_t *type = take(&at, &bytes, type_bytes, unit), *space = take(&at, &bytes, space_bytes, unit);
  if (type == NULL || space == NULL || type_bytes < 8 || shared) return false;
  const int64_t size = (int64_t)data_little_priv(type + 4, 4);
  *out =
      (data_attribute){.found = true, .type_class = type[0] & 15, .points = count_points(space, space_bytes)};
  if (out->points < 0 || size < 1 || size > DATA_MOST_ATTRIBUTE || out->points * size > bytes) return false;
  out->big_endian = (type[1] & 1) != 0;
  out->is_signed = (type[1] & 8) != 0;
  out->space_padded = (type[1] & 15) == 2;
  /* Of variable length are sequences (kind 0) and strings (kind 1). */
  if (out->type_class == DATA_ATTRIBUTE_VARIABLE_STRING && (type[1] & 15) != 1) out->type_class = -1;
  out->bytes = out->points > 0 ? size : 0;
  memcpy(out->value, at, (size_t)out->bytes);
  return true;
}

/* ---- messages and blocks ---- */

static core_status read_messages(header_walk *walk, const uint8_t *block, int64_t bytes, const char *name,
                                 data_attribute *out) {
  for (int64_t at = 0; bytes - at >= 8;) {
    const uint64_t type = data_little_priv(block + at, 2), size = data_little_priv(block + at + 2, 2);
    const uint8_t *message = block + at + 8;
    const bool shared = (block[at + 4] & 2) != 0;
    at += 8;
    if ((int64_t)size > bytes - at)
      return damaged(walk, "a message of the root header is longer than its block");
    at += (int64_t)size;
    if (type == MESSAGE_ATTRIBUTE && !shared && !read_attribute(message, (int64_t)size, name, out))
      return damaged(walk, "an attribute of the root group does not fit into its message");
    if (type == MESSAGE_CONTINUATION && size < 16)
      return damaged(walk, "a short continuation of the root header");
    if (type == MESSAGE_CONTINUATION)
      TRY(add_block(walk, data_little_priv(message, 8), data_little_priv(message + 8, 8)));
  }
  return CORE_OK;
}

/* Every block, including those that blocks before have added. */
static core_status read_blocks(header_walk *walk, const char *name, data_attribute *out) {
  core_status status = CORE_OK;
  for (int32_t b = 0; status == CORE_OK && b < walk->blocks && !out->found; ++b) {
    uint8_t *block = NULL;
    TRY(DATA_ALLOCATE(walk->bytes[b], "block of a header", &block));
    status = core_file_read_at(walk->fd, walk->file->path, block, (size_t)walk->bytes[b], walk->at[b]);
    if (status == CORE_OK) status = read_messages(walk, block, walk->bytes[b], name, out);
    free(block);
  }
  TRY(status);
  return CORE_OK;
}

/* ---- the root group ---- */

/* Finds the root group's header; a header of the older kind becomes the first block. */
static core_status find_root(header_walk *walk, bool *older) {
  uint8_t super[96] = {0}, head[16];
  const int64_t size = walk->file->bytes - walk->base;
  const int64_t read = size < (int64_t)sizeof super ? size : (int64_t)sizeof super;
  TRY(core_file_read_at(walk->fd, walk->file->path, super, (size_t)read, walk->base));
  const int64_t place = super[8] == 0 ? 64 : super[8] == 1 ? 68 : 36;
  const uint64_t root = data_little_priv(super + place, 8);
  if (read < 48 || super[8] > 3) return damaged(walk, "its superblock is of a kind that is not known");
  if (root > (uint64_t)size || (uint64_t)size - root < sizeof head)
    return damaged(walk, "its root lies outside the file");
  TRY(core_file_read_at(walk->fd, walk->file->path, head, sizeof head, walk->base + (int64_t)root));
  *older = memcmp(head, "OHDR", 4) != 0;
  if (!*older) return CORE_OK;
  if (head[0] != 1) return damaged(walk, "its root header is of a kind that is not known");
  return add_block(walk, root + sizeof head, data_little_priv(head + 8, 4));
}

static core_status walk_root(header_walk *walk, const char *name, bool *older, data_attribute *out) {
  TRY(find_root(walk, older));
  if (*older) TRY(read_blocks(walk, name, out));
  return CORE_OK;
}

core_status data_header_attribute_priv(const data_hdf5_file *file, const char *name, bool *older,
                                       data_attribute *out) {
  header_walk walk = {.file = file, .fd = -1};
  out->found = false;
  TRY(data_heap_base_priv(file, &walk.base));
  TRY(core_file_open(file->path, O_RDONLY, &walk.fd));
  const core_status status = walk_root(&walk, name, older, out);
  core_error saved;
  core_error_save(&saved);
  TRY(core_keep_first(status, &saved, core_file_close(walk.fd, file->path)));
  return CORE_OK;
}
