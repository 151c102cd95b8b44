/* Outline: the lock; the reason of a failure; files; datasets and the claims of their headers; integers. */
#include "data/hdf5_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "data/heap_impl.h"
#include "data/memory_impl.h"

/* The one mutable file-scope state of data/: HDF5 itself is one state per process. */
static pthread_mutex_t hdf5_lock = PTHREAD_MUTEX_INITIALIZER;

core_status data_hdf5_enter_priv(void) {
  static bool ready; /* under the lock */
  pthread_mutex_lock(&hdf5_lock);
  if (!ready) {
    core_status status = H5open() < 0 ? CORE_ERR_INTERNAL : data_filter_register_priv();
    if (status == CORE_OK) status = data_heap_register_priv();
    if (status != CORE_OK) {
      pthread_mutex_unlock(&hdf5_lock);
      FAIL(CORE_ERR_INTERNAL, "HDF5 does not start");
    }
    ready = true;
  }
  /* Thread-safe builds keep this per thread, so it cannot be done once. */
  (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  return CORE_OK;
}

void data_hdf5_leave_priv(void) {
  pthread_mutex_unlock(&hdf5_lock);
}

static herr_t take_innermost(unsigned n, const H5E_error2_t *entry, void *target) {
  data_hdf5_reason *reason = target;
  if (n == 0 && entry->desc != NULL) (void)snprintf(reason->text, sizeof reason->text, "%s", entry->desc);
  if (n == 0 && entry->maj_num == H5E_IO) reason->code = CORE_ERR_IO;
  return 0;
}

data_hdf5_reason data_hdf5_reason_priv(void) {
  data_hdf5_reason reason = {"HDF5 gives no reason", CORE_ERR_CORRUPT};
  (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_innermost, &reason);
  (void)H5Eclear2(H5E_DEFAULT);
  return reason;
}

/* ---- files ---- */

static hid_t access_properties(void) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  if (access < 0) return access;
  (void)H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
#if H5_VERSION_GE(1, 12, 1) || (H5_VERS_MAJOR == 1 && H5_VERS_MINOR == 10 && H5_VERS_RELEASE >= 7)
  (void)H5Pset_file_locking(access, 0, 1);
#endif
  return access;
}

/* Whether addresses count from the block or from the file's start depends on the version of HDF5. */
static core_status refuse_user_block(const data_hdf5_file *file) {
  hsize_t bytes = 1;
  const hid_t creation = H5Fget_create_plist(file->id);
  const bool known = creation >= 0 && H5Pget_userblock(creation, &bytes) >= 0;
  if (creation >= 0) (void)H5Pclose(creation);
  CHECK(known, CORE_ERR_CORRUPT, "%s: superblock is damaged", file->path);
  CHECK(bytes == 0, CORE_ERR_UNSUPPORTED,
        "%s: begins with a user block of %llu bytes, which is not supported", file->path,
        (unsigned long long)bytes);
  return CORE_OK;
}

/* HDF5 does not tell a file that is not its own from one that the system refuses to read. */
static core_status probe(const data_hdf5_file *file) {
  uint8_t head[8];
  int fd = -1;
  TRY(core_file_open(file->path, O_RDONLY, &fd));
  const core_status status =
      file->bytes >= (int64_t)sizeof head ? core_file_read_at(fd, file->path, head, sizeof head, 0) : CORE_OK;
  (void)close(fd);
  TRY(status);
  return CORE_OK;
}

core_status data_hdf5_open_priv(const char *path, data_hdf5_file *out) {
  struct stat about;
  *out = (data_hdf5_file){.id = -1, .path = path};
  if (stat(path, &about) != 0)
    FAIL(errno == ENOENT ? CORE_ERR_NOT_FOUND : CORE_ERR_IO, "%s: %s", path, strerror(errno));
  CHECK(S_ISREG(about.st_mode), CORE_ERR_FORMAT, "%s: not a file", path);
  out->bytes = (int64_t)about.st_size;
  TRY(probe(out));
  const htri_t is_hdf5 = H5Fis_hdf5(path);
  (void)H5Eclear2(H5E_DEFAULT);
  CHECK(is_hdf5 > 0, CORE_ERR_FORMAT, "%s: not an HDF5 file, so not a latent shard (%lld bytes)", path,
        (long long)out->bytes);
  const hid_t access = access_properties();
  out->id = H5Fopen(path, H5F_ACC_RDONLY, access);
  data_hdf5_reason reason = {.code = CORE_OK};
  if (out->id < 0) reason = data_hdf5_reason_priv();
  if (access >= 0) (void)H5Pclose(access);
  CHECK(out->id >= 0, reason.code, "%s: cannot be opened%s: %s", path,
        reason.code == CORE_ERR_CORRUPT ? ", damaged or cut short" : "", reason.text);
  const core_status status = refuse_user_block(out);
  if (status != CORE_OK) data_hdf5_close_priv(out);
  TRY(status);
  return CORE_OK;
}

void data_hdf5_close_priv(data_hdf5_file *file) {
  if (file->id >= 0) (void)H5Fclose(file->id);
  (void)H5Eclear2(H5E_DEFAULT);
  file->id = -1;
}

/* ---- which file it is ---- */

static data_file_identity identity_of(const struct stat *about) {
  return (data_file_identity){(int64_t)about->st_dev, (int64_t)about->st_ino, (int64_t)about->st_size,
                              (int64_t)about->st_mtim.tv_sec, (int64_t)about->st_mtim.tv_nsec};
}

bool data_identity_equal_priv(const data_file_identity *a, const data_file_identity *b) {
  return a->device == b->device && a->node == b->node && a->bytes == b->bytes && a->seconds == b->seconds &&
         a->nanoseconds == b->nanoseconds;
}

core_status data_identity_unchanged_priv(const char *path, int fd, const data_file_identity *seen) {
  struct stat about;
  CHECK(fstat(fd, &about) == 0, CORE_ERR_IO, "%s: %s", path, strerror(errno));
  const data_file_identity now = identity_of(&about);
  CHECK(data_identity_equal_priv(&now, seen), CORE_ERR_MISMATCH, "%s: was changed while it was in use", path);
  return CORE_OK;
}

core_status data_identity_of_priv(const char *path, data_file_identity *out) {
  struct stat about;
  if (stat(path, &about) != 0)
    FAIL(errno == ENOENT ? CORE_ERR_NOT_FOUND : CORE_ERR_IO, "%s: %s", path, strerror(errno));
  *out = identity_of(&about);
  return CORE_OK;
}

/* The descriptor that HDF5 reads by; it stays HDF5's. */
static int own_descriptor(const data_hdf5_file *file) {
  void *handle = NULL;
  const bool good = H5Fget_vfd_handle(file->id, H5P_DEFAULT, &handle) >= 0 && handle != NULL;
  (void)H5Eclear2(H5E_DEFAULT);
  return good ? *(const int *)handle : -1;
}

core_status data_hdf5_identity_priv(const data_hdf5_file *file, data_file_identity *out) {
  struct stat about;
  CHECK(fstat(own_descriptor(file), &about) == 0, CORE_ERR_IO, "%s: %s", file->path, strerror(errno));
  *out = identity_of(&about);
  return CORE_OK;
}

core_status data_hdf5_descriptor_priv(const data_hdf5_file *file, int *fd) {
  *fd = fcntl(own_descriptor(file), F_DUPFD_CLOEXEC, 0);
  CHECK(*fd >= 0, CORE_ERR_IO, "%s: no second descriptor: %s", file->path, strerror(errno));
  return CORE_OK;
}

/* ---- datasets ---- */

bool data_hdf5_has_priv(const data_hdf5_file *file, const char *name) {
  const bool has = H5Lexists(file->id, name, H5P_DEFAULT) > 0;
  (void)H5Eclear2(H5E_DEFAULT);
  return has;
}

static core_status read_type(data_hdf5_dataset *dataset) {
  const hid_t type = H5Dget_type(dataset->id);
  CHECK(type >= 0, CORE_ERR_CORRUPT, "%s: type of \"%s\": %s", dataset->file->path, dataset->name,
        data_hdf5_reason_priv().text);
  dataset->type_class = H5Tget_class(type);
  dataset->type_bytes = (int64_t)H5Tget_size(type);
  const H5T_order_t order = H5Tget_order(type);
  dataset->little_endian = order == H5T_ORDER_LE || order == H5T_ORDER_NONE;
  dataset->is_signed = dataset->type_class == H5T_INTEGER && H5Tget_sign(type) == H5T_SGN_2;
  (void)H5Tclose(type);
  (void)H5Eclear2(H5E_DEFAULT);
  CHECK(dataset->type_bytes > 0 && dataset->type_bytes <= 4096, CORE_ERR_FORMAT,
        "%s: \"%s\" has values of %lld bytes", dataset->file->path, dataset->name,
        (long long)dataset->type_bytes);
  return CORE_OK;
}

static core_status read_extent(data_hdf5_dataset *dataset, int32_t rank) {
  hsize_t extent[2] = {0, 0};
  const hid_t space = H5Dget_space(dataset->id);
  const int found = space >= 0 ? H5Sget_simple_extent_ndims(space) : -1;
  const bool simple = found == rank && H5Sget_simple_extent_type(space) == H5S_SIMPLE &&
                      H5Sget_simple_extent_dims(space, extent, NULL) == rank;
  if (space >= 0) (void)H5Sclose(space);
  CHECK(simple, CORE_ERR_FORMAT, "%s: \"%s\" must have %d dimension%s, it has %d", dataset->file->path,
        dataset->name, rank, rank == 1 ? "" : "s", found);
  dataset->rank = rank;
  for (int32_t i = 0; i < 2; ++i) {
    CHECK(extent[i] <= INT64_MAX, CORE_ERR_CORRUPT, "%s: \"%s\" claims %llu rows", dataset->file->path,
          dataset->name, (unsigned long long)extent[i]);
    dataset->extent[i] = i < rank ? (int64_t)extent[i] : 1;
  }
  return CORE_OK;
}

static core_status read_filters(data_hdf5_dataset *dataset, hid_t creation) {
  const int count = H5Pget_nfilters(creation);
  CHECK(count >= 0 && count <= DATA_MAX_FILTERS, CORE_ERR_UNSUPPORTED,
        "%s: \"%s\" has %d filters, expected at most %d", dataset->file->path, dataset->name, count,
        DATA_MAX_FILTERS);
  for (int i = 0; i < count; ++i) {
    unsigned flags = 0, values[16] = {0}, configuration = 0;
    size_t value_count = 16;
    char name[64] = "";
    const H5Z_filter_t id = H5Pget_filter2(creation, (unsigned)i, &flags, &value_count, values, sizeof name,
                                           name, &configuration);
    CHECK(data_filter_name_priv((int32_t)id) != NULL, CORE_ERR_UNSUPPORTED,
          "%s: \"%s\" uses HDF5 filter %d (%.63s), which is not supported; known are gzip (%d), shuffle "
          "(%d), checksum "
          "(%d), zstd (%d)",
          dataset->file->path, dataset->name, (int)id, name[0] != '\0' ? name : "no name",
          DATA_FILTER_ID_DEFLATE, DATA_FILTER_ID_SHUFFLE, DATA_FILTER_ID_FLETCHER, DATA_FILTER_ID_ZSTD);
    /* HDF5 fills in the size of a value when the dataset is made. */
    const unsigned value = value_count > 0 ? values[0] : 0;
    dataset->pipeline.id[i] = (int32_t)id;
    dataset->pipeline.value[i] = value;
    CHECK(id != DATA_FILTER_ID_SHUFFLE || value == (unsigned)dataset->type_bytes, CORE_ERR_CORRUPT,
          "%s: \"%s\" is shuffled by %u bytes, expected the %lld of a value", dataset->file->path,
          dataset->name, value, (long long)dataset->type_bytes);
  }
  dataset->pipeline.count = count;
  return CORE_OK;
}

static core_status read_layout(data_hdf5_dataset *dataset, hid_t creation) {
  const H5D_layout_t layout = H5Pget_layout(creation);
  CHECK(layout == H5D_CHUNKED || layout == H5D_CONTIGUOUS || layout == H5D_COMPACT, CORE_ERR_UNSUPPORTED,
        "%s: \"%s\" has a layout that is not supported; expected chunked or contiguous", dataset->file->path,
        dataset->name);
  CHECK(H5Pget_external_count(creation) == 0, CORE_ERR_UNSUPPORTED,
        "%s: \"%s\" keeps its values in another file, which is not supported", dataset->file->path,
        dataset->name);
  dataset->chunked = layout == H5D_CHUNKED;
  if (!dataset->chunked) return CORE_OK;
  hsize_t chunk[2] = {1, 1};
  CHECK(H5Pget_chunk(creation, dataset->rank, chunk) == dataset->rank, CORE_ERR_CORRUPT,
        "%s: chunks of \"%s\": %s", dataset->file->path, dataset->name, data_hdf5_reason_priv().text);
  const uint64_t most = (uint64_t)(DATA_MOST_CHUNK_BYTES / dataset->type_bytes);
  CHECK(chunk[0] > 0 && chunk[1] > 0 && chunk[0] <= most && chunk[1] <= most / chunk[0], CORE_ERR_UNSUPPORTED,
        "%s: \"%s\" has chunks of %llu x %llu values, expected at most %d bytes", dataset->file->path,
        dataset->name, (unsigned long long)chunk[0], (unsigned long long)chunk[1], DATA_MOST_CHUNK_BYTES);
  for (int i = 0; i < 2; ++i) dataset->chunk[i] = (int64_t)chunk[i];
  unsigned options = 0;
  (void)H5Pget_chunk_opts(creation, &options);
  dataset->partial_unfiltered = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  return read_filters(dataset, creation);
}

int64_t data_filter_most_priv(int32_t id) {
  return id == DATA_FILTER_ID_DEFLATE ? DATA_MOST_DEFLATE : id == DATA_FILTER_ID_ZSTD ? DATA_MOST_ZSTD : 1;
}

/* Most bytes that a file of this size can hold behind the dataset's filters. */
static int64_t most_bytes(const data_hdf5_dataset *dataset) {
  int64_t most = dataset->file->bytes;
  for (int32_t i = 0; i < dataset->pipeline.count; ++i)
    if (__builtin_mul_overflow(most, data_filter_most_priv(dataset->pipeline.id[i]), &most)) return INT64_MAX;
  return most;
}

/* What the header claims must be possible in a file of this size, so that nobody allocates for a lie. */
static core_status check_claims(const data_hdf5_dataset *dataset) {
  const int64_t file = dataset->file->bytes, most = most_bytes(dataset);
  int64_t bytes = 0;
  const bool over = __builtin_mul_overflow(dataset->extent[0], dataset->extent[1], &bytes) ||
                    __builtin_mul_overflow(bytes, dataset->type_bytes, &bytes);
  CHECK(!over && bytes <= most, CORE_ERR_CORRUPT,
        "%s: \"%s\" claims %lld x %lld values of %lld bytes in a file of %lld bytes", dataset->file->path,
        dataset->name, (long long)dataset->extent[0], (long long)dataset->extent[1],
        (long long)dataset->type_bytes, (long long)file);
  if (dataset->chunked) {
    const int64_t chunk = dataset->chunk[0] * dataset->chunk[1] * dataset->type_bytes;
    CHECK(chunk <= most || chunk <= DATA_FREE_CHUNK_BYTES, CORE_ERR_CORRUPT,
          "%s: \"%s\" claims chunks of %lld bytes in a file of %lld", dataset->file->path, dataset->name,
          (long long)chunk, (long long)file);
  } else {
    const int64_t stored = (int64_t)H5Dget_storage_size(dataset->id);
    CHECK(stored >= bytes, CORE_ERR_CORRUPT, "%s: \"%s\" stores %lld bytes, expected %lld",
          dataset->file->path, dataset->name, (long long)stored, (long long)bytes);
  }
  return CORE_OK;
}

static core_status read_header(data_hdf5_dataset *dataset, int32_t rank) {
  TRY(read_type(dataset));
  TRY(read_extent(dataset, rank));
  const hid_t creation = H5Dget_create_plist(dataset->id);
  CHECK(creation >= 0, CORE_ERR_CORRUPT, "%s: layout of \"%s\": %s", dataset->file->path, dataset->name,
        data_hdf5_reason_priv().text);
  const core_status status = read_layout(dataset, creation);
  (void)H5Pclose(creation);
  TRY(status);
  TRY(check_claims(dataset));
  return CORE_OK;
}

/* Chunks are read raw and values once, so HDF5's own chunk cache would only take memory. */
static hid_t open_uncached(hid_t file, const char *name) {
  const hid_t access = H5Pcreate(H5P_DATASET_ACCESS);
  if (access >= 0) (void)H5Pset_chunk_cache(access, 1, 0, 1.0);
  const hid_t id = H5Dopen2(file, name, access >= 0 ? access : H5P_DEFAULT);
  if (access >= 0) (void)H5Pclose(access);
  return id;
}

core_status data_hdf5_dataset_open_priv(const data_hdf5_file *file, const char *name, int32_t rank,
                                        data_hdf5_dataset *out) {
  H5L_info_t link;
  *out = (data_hdf5_dataset){.id = -1, .file = file};
  (void)snprintf(out->name, sizeof out->name, "%s", name);
  CHECK(data_hdf5_has_priv(file, name), CORE_ERR_FORMAT, "%s: dataset \"%s\" is missing", file->path, name);
  CHECK(H5Lget_info(file->id, name, &link, H5P_DEFAULT) >= 0 && link.type == H5L_TYPE_HARD,
        CORE_ERR_UNSUPPORTED, "%s: \"%s\" is a link to somewhere else, expected a dataset", file->path, name);
  out->id = open_uncached(file->id, name);
  CHECK(out->id >= 0, CORE_ERR_CORRUPT, "%s: \"%s\" is not a readable dataset: %s", file->path, name,
        data_hdf5_reason_priv().text);
  const core_status status = read_header(out, rank);
  if (status != CORE_OK) data_hdf5_dataset_close_priv(out);
  TRY(status);
  return CORE_OK;
}

void data_hdf5_dataset_close_priv(data_hdf5_dataset *dataset) {
  if (dataset->id >= 0) (void)H5Dclose(dataset->id);
  (void)H5Eclear2(H5E_DEFAULT);
  dataset->id = -1;
}

/* ---- integers ---- */

static core_status read_all(const data_hdf5_dataset *dataset, hid_t type, void *values) {
  CHECK(dataset->type_class == H5T_INTEGER && dataset->type_bytes <= 8, CORE_ERR_FORMAT,
        "%s: \"%s\" must hold integers of at most 64 bits", dataset->file->path, dataset->name);
  if (dataset->extent[0] == 0) return CORE_OK;
  CHECK(H5Dread(dataset->id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0, CORE_ERR_CORRUPT,
        "%s: \"%s\" cannot be read: %s", dataset->file->path, dataset->name, data_hdf5_reason_priv().text);
  return CORE_OK;
}

core_status data_hdf5_read_unsigned_priv(const data_hdf5_dataset *dataset, uint64_t *values) {
  TRY(read_all(dataset, dataset->is_signed ? H5T_NATIVE_INT64 : H5T_NATIVE_UINT64, values));
  for (int64_t i = 0; dataset->is_signed && i < dataset->extent[0]; ++i)
    CHECK(values[i] <= INT64_MAX, CORE_ERR_FORMAT, "%s: \"%s\"[%lld] is %lld, expected no negative number",
          dataset->file->path, dataset->name, (long long)i, (long long)values[i]);
  return CORE_OK;
}

core_status data_hdf5_read_int32_priv(const data_hdf5_dataset *dataset, int32_t *values) {
  int64_t *wide = NULL, outside = -1;
  TRY(DATA_ALLOCATE(dataset->extent[0], dataset->name, &wide));
  /* An unsigned value beyond int64 is clipped by the conversion, so it still fails the test of range. */
  const core_status status = read_all(dataset, H5T_NATIVE_INT64, wide);
  for (int64_t i = 0; status == CORE_OK && i < dataset->extent[0]; ++i) {
    if (wide[i] < INT32_MIN || wide[i] > INT32_MAX) outside = i;
    values[i] = (int32_t)wide[i];
  }
  free(wide);
  TRY(status);
  CHECK(outside < 0, CORE_ERR_FORMAT, "%s: \"%s\"[%lld] does not fit an int32", dataset->file->path,
        dataset->name, (long long)outside);
  return CORE_OK;
}
