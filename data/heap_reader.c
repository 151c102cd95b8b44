/* Outline: many strings of variable length. A collection of the global heap is read as one piece and stays
 * until a string lies in another; its layout is that of the HDF5 File Format Specification 3.0, section
 * III.E. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "data/header_impl.h"
#include "data/heap_impl.h"
#include "data/memory_impl.h"

enum { HEADER_BYTES = 16 };

struct data_heap_reader {
  const data_hdf5_file *file;
  const char *name;
  int fd;
  int64_t base;
  uint8_t *bytes; /* of the collection at `address`; NULL: none yet */
  uint64_t address;
  int64_t count;
};

core_status data_heap_descriptors_priv(const data_hdf5_dataset *dataset, uint8_t *descriptors) {
  const hid_t type = H5Tcreate(H5T_OPAQUE, DATA_DESCRIPTOR_BYTES);
  const bool good = type >= 0 && (dataset->extent[0] == 0 || H5Dread(dataset->id, type, H5S_ALL, H5S_ALL,
                                                                     H5P_DEFAULT, descriptors) >= 0);
  if (type >= 0) (void)H5Tclose(type);
  CHECK(good, CORE_ERR_CORRUPT, "%s: \"%s\" cannot be read: %s", dataset->file->path, dataset->name,
        data_hdf5_reason_priv().text);
  return CORE_OK;
}

core_status data_heap_open_priv(const data_hdf5_file *file, const char *name, data_heap_reader **out) {
  data_heap_reader *heap = NULL;
  *out = NULL;
  TRY(DATA_ALLOCATE(1, "heap", &heap));
  *heap = (data_heap_reader){.file = file, .name = name, .fd = -1};
  core_status status = data_heap_base_priv(file, &heap->base);
  if (status == CORE_OK) status = data_hdf5_descriptor_priv(file, &heap->fd);
  if (status != CORE_OK) data_heap_close_priv(heap);
  TRY(status);
  *out = heap;
  return CORE_OK;
}

void data_heap_close_priv(data_heap_reader *heap) {
  if (heap == NULL) return;
  if (heap->fd >= 0) (void)close(heap->fd);
  free(heap->bytes);
  free(heap);
}

static core_status load_collection(data_heap_reader *heap, uint64_t address) {
  const data_hdf5_file *file = heap->file;
  uint8_t header[HEADER_BYTES];
  if (heap->bytes != NULL && heap->address == address) return CORE_OK;
  const int64_t most = file->bytes - heap->base;
  CHECK(address <= (uint64_t)most && most - (int64_t)address >= HEADER_BYTES, CORE_ERR_CORRUPT,
        "%s: \"%s\" points outside the file", file->path, heap->name);
  const int64_t start = heap->base + (int64_t)address;
  TRY(core_file_read_at(heap->fd, file->path, header, sizeof header, start));
  const uint64_t size = data_little_priv(header + 8, 8);
  CHECK(memcmp(header, "GCOL\1", 5) == 0 && size >= HEADER_BYTES && size <= (uint64_t)(file->bytes - start),
        CORE_ERR_CORRUPT, "%s: \"%s\" points to a damaged heap", file->path, heap->name);
  free(heap->bytes);
  heap->bytes = NULL;
  TRY(DATA_ALLOCATE((int64_t)size, "heap", &heap->bytes));
  heap->address = address;
  heap->count = (int64_t)size;
  TRY(core_file_read_at(heap->fd, file->path, heap->bytes, (size_t)size, start));
  return CORE_OK;
}

/* Each step moves on by at least a header. */
static const uint8_t *find_object(const data_heap_reader *heap, uint64_t index, uint64_t *bytes) {
  const uint64_t size = (uint64_t)heap->count;
  for (uint64_t offset = HEADER_BYTES; size - offset >= HEADER_BYTES;) {
    const uint8_t *header = heap->bytes + offset;
    const uint64_t found = data_little_priv(header, 2), room = size - offset - HEADER_BYTES;
    *bytes = data_little_priv(header + 8, 8);
    if (found == 0 || *bytes > room) return NULL; /* free space up to the end, or damage */
    if (found == index) return header + HEADER_BYTES;
    const uint64_t padded = (*bytes + 7) & ~(uint64_t)7;
    if (padded > room) return NULL;
    offset += HEADER_BYTES + padded;
  }
  return NULL;
}

core_status data_heap_next_priv(data_heap_reader *heap, const uint8_t descriptor[DATA_DESCRIPTOR_BYTES],
                                char *text, size_t capacity) {
  const uint64_t length = data_little_priv(descriptor, 4), address = data_little_priv(descriptor + 4, 8),
                 index = data_little_priv(descriptor + 12, 4);
  uint64_t bytes = 0;
  text[0] = '\0';
  if (length == 0) return CORE_OK;
  CHECK(length < capacity, CORE_ERR_FORMAT, "%s: a string of \"%s\" has %llu bytes, expected at most %zu",
        heap->file->path, heap->name, (unsigned long long)length, capacity - 1);
  TRY(load_collection(heap, address));
  const uint8_t *object = find_object(heap, index, &bytes);
  CHECK(object != NULL && length <= bytes, CORE_ERR_CORRUPT,
        "%s: a string of \"%s\" points to nothing in a heap", heap->file->path, heap->name);
  memcpy(text, object, (size_t)length);
  text[length] = '\0';
  return CORE_OK;
}
