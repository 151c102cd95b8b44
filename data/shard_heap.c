/* Outline: fetching a descriptor as it is stored; finding its object in a collection; the text. The layout of
 * a collection is that of the HDF5 File Format Specification 3.0, section III.E. */
#include "data/heap_impl.h"

#include <fcntl.h>
#include <string.h>

#include "core/file.h"
#include "data/header_impl.h"

enum { HEADER_BYTES = 16, MOST_OBJECTS = 1 << 16 };

/* ---- descriptors ---- */

/* Leaves the elements as they are: source and target both have DATA_DESCRIPTOR_BYTES. */
static herr_t keep_stored(hid_t from, hid_t to, H5T_cdata_t *about, size_t count, size_t stride,
                          size_t other_stride, void *values, void *others, hid_t transfer) {
  (void)from;
  (void)count;
  (void)stride;
  (void)other_stride;
  (void)values;
  (void)others;
  (void)transfer;
  if (about->command == H5T_CONV_INIT) about->need_bkg = H5T_BKG_NO;
  return about->command == H5T_CONV_INIT && H5Tget_size(to) != DATA_DESCRIPTOR_BYTES ? -1 : 0;
}

static hid_t text_type(void) {
  const hid_t type = H5Tcopy(H5T_C_S1);
  if (type >= 0) (void)H5Tset_size(type, H5T_VARIABLE);
  return type;
}

core_status data_heap_register_priv(void) {
  const hid_t from = text_type(), to = H5Tcreate(H5T_OPAQUE, DATA_DESCRIPTOR_BYTES);
  const bool good =
      from >= 0 && to >= 0 && H5Tregister(H5T_PERS_SOFT, "stored string", from, to, keep_stored) >= 0;
  if (from >= 0) (void)H5Tclose(from);
  if (to >= 0) (void)H5Tclose(to);
  CHECK(good, CORE_ERR_INTERNAL, "HDF5 refuses a conversion");
  return CORE_OK;
}

/* Files whose addresses or sizes do not have 8 bytes are not made by anybody. */
core_status data_heap_base_priv(const data_hdf5_file *file, int64_t *base) {
  size_t address_bytes = 0, size_bytes = 0;
  hsize_t user_block = 0;
  const hid_t creation = H5Fget_create_plist(file->id);
  const bool good = creation >= 0 && H5Pget_sizes(creation, &address_bytes, &size_bytes) >= 0 &&
                    H5Pget_userblock(creation, &user_block) >= 0;
  if (creation >= 0) (void)H5Pclose(creation);
  CHECK(good && user_block <= (hsize_t)file->bytes, CORE_ERR_CORRUPT, "%s: superblock is damaged",
        file->path);
  CHECK(address_bytes == 8 && size_bytes == 8, CORE_ERR_UNSUPPORTED, "%s: addresses of %zu bytes, expected 8",
        file->path, address_bytes);
  *base = (int64_t)user_block;
  return CORE_OK;
}

core_status data_heap_descriptor_priv(const data_hdf5_file *file, const char *name, hid_t attribute,
                                      uint8_t descriptor[DATA_DESCRIPTOR_BYTES]) {
  const hid_t type = H5Tcreate(H5T_OPAQUE, DATA_DESCRIPTOR_BYTES);
  const bool good = type >= 0 && H5Aread(attribute, type, descriptor) >= 0;
  if (type >= 0) (void)H5Tclose(type);
  CHECK(good, CORE_ERR_CORRUPT, "%s: attribute \"%s\": %s", file->path, name, data_hdf5_reason_priv().text);
  return CORE_OK;
}

/* ---- collections ---- */

/* A string in the file. */
typedef struct stored_text {
  uint64_t length, address, index;
} stored_text;

/* Offset of the object's bytes in the file, its size in *bytes. Each step moves on by at least a header, and
 * the end of the collection was checked against the file. */
static core_status find_object(int fd, const data_hdf5_file *file, const char *name, const stored_text *text,
                               int64_t base, int64_t *at, uint64_t *bytes) {
  uint8_t header[HEADER_BYTES];
  CHECK(text->address <= (uint64_t)(file->bytes - base) &&
            file->bytes - base - (int64_t)text->address >= HEADER_BYTES,
        CORE_ERR_CORRUPT, "%s: attribute \"%s\" points outside the file", file->path, name);
  const int64_t start = base + (int64_t)text->address;
  TRY(core_file_read_at(fd, file->path, header, sizeof header, start));
  const uint64_t size = data_little_priv(header + 8, 8);
  CHECK(memcmp(header, "GCOL\1", 5) == 0 && size >= HEADER_BYTES && size <= (uint64_t)(file->bytes - start),
        CORE_ERR_CORRUPT, "%s: attribute \"%s\" points to a damaged heap", file->path, name);
  uint64_t offset = HEADER_BYTES;
  for (int i = 0; i < MOST_OBJECTS && size - offset >= HEADER_BYTES; ++i) {
    TRY(core_file_read_at(fd, file->path, header, sizeof header, start + (int64_t)offset));
    const uint64_t index = data_little_priv(header, 2), room = size - offset - HEADER_BYTES;
    *bytes = data_little_priv(header + 8, 8);
    if (index == 0 || *bytes > room) break; /* free space up to the end, or damage */
    *at = start + (int64_t)offset + HEADER_BYTES;
    if (index == text->index) return CORE_OK;
    const uint64_t padded = (*bytes + 7) & ~(uint64_t)7;
    if (padded > room) break;
    offset += HEADER_BYTES + padded;
  }
  FAIL(CORE_ERR_CORRUPT, "%s: attribute \"%s\" points to nothing in a heap", file->path, name);
}

static core_status read_text(int fd, const data_hdf5_file *file, const char *name, const stored_text *stored,
                             char *text) {
  int64_t base = 0, at = 0;
  uint64_t bytes = 0;
  TRY(data_heap_base_priv(file, &base));
  TRY(find_object(fd, file, name, stored, base, &at, &bytes));
  CHECK(stored->length <= bytes, CORE_ERR_CORRUPT, "%s: attribute \"%s\" has %llu bytes, stored are %llu",
        file->path, name, (unsigned long long)stored->length, (unsigned long long)bytes);
  TRY(core_file_read_at(fd, file->path, text, (size_t)stored->length, at));
  text[stored->length] = '\0';
  return CORE_OK;
}

core_status data_heap_text_priv(const data_hdf5_file *file, const char *name,
                                const uint8_t descriptor[DATA_DESCRIPTOR_BYTES], char *text,
                                size_t capacity) {
  const stored_text stored = {data_little_priv(descriptor, 4), data_little_priv(descriptor + 4, 8),
                              data_little_priv(descriptor + 12, 4)};
  int fd = -1;
  text[0] = '\0';
  if (stored.length == 0) return CORE_OK;
  CHECK(stored.length < capacity, CORE_ERR_FORMAT,
        "%s: attribute \"%s\" has %llu bytes, expected at most %zu", file->path, name,
        (unsigned long long)stored.length, capacity - 1);
  TRY(core_file_open(file->path, O_RDONLY, &fd));
  const core_status status = read_text(fd, file, name, &stored, text);
  core_error saved;
  core_error_save(&saved);
  TRY(core_keep_first(status, &saved, core_file_close(fd, file->path)));
  return CORE_OK;
}
