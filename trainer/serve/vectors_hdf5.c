/* The one door of the trainer to HDF5: makes the file around the vectors, and reads the keys of shards. HDF5
 * has one state per process, so these run while no latent stream does. */
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/serve/vectors_impl.h"

/* ---- making ---- */

static bool put_attribute(hid_t file, const char *name, hid_t type, const void *value) {
  hid_t space = H5Screate(H5S_SCALAR);
  hid_t id = space < 0 ? -1 : H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  bool good = id >= 0 && H5Awrite(id, type, value) >= 0;
  if (space >= 0) (void)H5Sclose(space);
  return (id < 0 || H5Aclose(id) >= 0) && good;
}

static bool put_text(hid_t file, const char *name, const char *value) {
  hid_t type = H5Tcopy(H5T_C_S1);
  bool good = type >= 0 && H5Tset_size(type, strlen(value) + 1) >= 0 &&
              H5Tset_cset(type, H5T_CSET_UTF8) >= 0 && put_attribute(file, name, type, value);
  if (type >= 0) (void)H5Tclose(type);
  return good;
}

static bool put_attributes(hid_t file, const train_vectors_header *h) {
  char checkpoint[32], direction[2 * CORE_NAME + 2] = "";
  snprintf(checkpoint, sizeof checkpoint, "%016llx", (unsigned long long)h->checkpoint);
  if (h->toward[0]) snprintf(direction, sizeof direction, "%s:%s", h->modality, h->toward);
  return put_text(file, "format", "antiphon-vectors") &&
         put_attribute(file, "version", H5T_STD_I32LE, &h->version) &&
         put_text(file, "checkpoint", checkpoint) && put_attribute(file, "step", H5T_STD_I64LE, &h->step) &&
         put_text(file, "kind", train_vectors_kind_text((train_vectors_kind)h->kind)) &&
         put_text(file, "modality", h->modality) && put_text(file, "direction", direction) &&
         put_text(file, "dtype", core_dtype_text((core_dtype)h->dtype)) &&
         put_attribute(file, "width", H5T_STD_I64LE, &h->width) &&
         put_attribute(file, "block_samples", H5T_STD_I64LE, &h->block_samples);
}

/* A dataset in one piece, its place in the file fixed now and its bytes written by others. */
static bool put_dataset(hid_t file, const char *name, hid_t type, int64_t rows, int64_t columns,
                        int64_t *at) {
  hsize_t extent[2] = {(hsize_t)rows, (hsize_t)columns};
  hid_t space = H5Screate_simple(columns > 0 ? 2 : 1, extent, NULL), list = H5Pcreate(H5P_DATASET_CREATE);
  bool good = space >= 0 && list >= 0 && H5Pset_layout(list, H5D_CONTIGUOUS) >= 0 &&
              H5Pset_alloc_time(list, H5D_ALLOC_TIME_EARLY) >= 0 &&
              H5Pset_fill_time(list, H5D_FILL_TIME_NEVER) >= 0 && H5Pset_obj_track_times(list, 0) >= 0;
  hid_t id = good ? H5Dcreate2(file, name, type, space, H5P_DEFAULT, list, H5P_DEFAULT) : -1;
  haddr_t place = id >= 0 && rows > 0 ? H5Dget_offset(id) : 0;
  good = id >= 0 && place != HADDR_UNDEF;
  *at = good ? (int64_t)place : 0;
  if (id >= 0) good = H5Dclose(id) >= 0 && good;
  if (list >= 0) (void)H5Pclose(list);
  if (space >= 0) (void)H5Sclose(space);
  return good;
}

static bool put_keys(hid_t file, train_vectors_header *h) {
  if (h->key_bytes == 0) return true;
  hid_t type = H5Tcopy(H5T_C_S1);
  bool good = type >= 0 && H5Tset_size(type, (size_t)h->key_bytes) >= 0 &&
              H5Tset_strpad(type, H5T_STR_NULLPAD) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0 &&
              put_dataset(file, "key", type, h->rows, 0, &h->key_at);
  if (type >= 0) (void)H5Tclose(type);
  return good;
}

/* IEEE half precision, as h5py writes it. */
static hid_t half_type(void) {
  hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  bool good = type >= 0 && H5Tset_fields(type, 15, 10, 5, 0, 10) >= 0 && H5Tset_size(type, 2) >= 0 &&
              H5Tset_ebias(type, 15) >= 0;
  if (good || type < 0) return type;
  (void)H5Tclose(type);
  return -1;
}

static bool put_datasets(hid_t file, train_vectors_header *h) {
  hid_t type = h->dtype == CORE_FLOAT16 ? half_type() : H5Tcopy(H5T_IEEE_F32LE);
  bool good = type >= 0 && put_dataset(file, "id", H5T_STD_U64LE, h->rows, 0, &h->id_at) &&
              (!h->labelled || put_dataset(file, "label", H5T_STD_I32LE, h->rows, 0, &h->label_at)) &&
              put_keys(file, h) &&
              put_dataset(file, "block_row", H5T_STD_U64LE, h->blocks + 1, 0, &h->block_row_at) &&
              put_dataset(file, "block_hash", H5T_STD_U64LE, h->blocks, 0, &h->block_hash_at) &&
              put_dataset(file, "vectors", type, h->rows, h->width, &h->vectors_at);
  if (type >= 0) (void)H5Tclose(type);
  return good;
}

/* With our block before it, no times in it and the vectors on a page of their own. */
static hid_t create_file(const char *path) {
  hid_t creation = H5Pcreate(H5P_FILE_CREATE), access = H5Pcreate(H5P_FILE_ACCESS), file = -1;
  if (creation >= 0 && access >= 0 && H5Pset_userblock(creation, TRAIN_VECTORS_HEADER) >= 0 &&
      H5Pset_obj_track_times(creation, 0) >= 0 && H5Pset_alignment(access, 65536, 4096) >= 0 &&
      H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V18) >= 0)
    file = H5Fcreate(path, H5F_ACC_TRUNC, creation, access);
  if (creation >= 0) (void)H5Pclose(creation);
  if (access >= 0) (void)H5Pclose(access);
  return file;
}

static herr_t take_innermost(unsigned n, const H5E_error2_t *entry, void *target) {
  if (n == 0 && entry->desc) snprintf(target, 192, "%s", entry->desc);
  return 0;
}

/* HDF5's reason, and its stack cleared. reason: 192 bytes. */
static const char *take_reason(char *reason) {
  snprintf(reason, 192, "HDF5 gives no reason");
  (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_innermost, reason);
  (void)H5Eclear2(H5E_DEFAULT);
  return reason;
}

core_status train_vectors_make_priv(const char *path, train_vectors_header *h) {
  char reason[192];
  (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  hid_t file = create_file(path);
  bool good =
      file >= 0 && put_attributes(file, h) && put_datasets(file, h) && H5Fflush(file, H5F_SCOPE_LOCAL) >= 0;
  if (file >= 0) good = H5Fclose(file) >= 0 && good;
  CHECK(good, CORE_ERR_IO, "cannot make %s: %s", path, take_reason(reason));
  return CORE_OK;
}

/* ---- keys of a shard ---- */

typedef struct strings {
  hid_t file, dataset, type, space;
  int64_t count, bytes; /* bytes: of the type */
  bool variable;
} strings;

static void strings_close(strings *s) {
  if (s->space >= 0) (void)H5Sclose(s->space);
  if (s->type >= 0) (void)H5Tclose(s->type);
  if (s->dataset >= 0) (void)H5Dclose(s->dataset);
  if (s->file >= 0) (void)H5Fclose(s->file);
}

/* False: the file has no strings of that name. */
static bool strings_open(const char *path, strings *s) {
  *s = (strings){.file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT), .dataset = -1, .type = -1, .space = -1};
  if (s->file < 0 || H5Lexists(s->file, "key", H5P_DEFAULT) <= 0) return false;
  s->dataset = H5Dopen2(s->file, "key", H5P_DEFAULT);
  if (s->dataset < 0) return false;
  s->type = H5Dget_type(s->dataset);
  s->space = H5Dget_space(s->dataset);
  if (s->type < 0 || s->space < 0 || H5Tget_class(s->type) != H5T_STRING) return false;
  s->count = H5Sget_simple_extent_npoints(s->space);
  s->variable = H5Tis_variable_str(s->type) > 0;
  s->bytes = (int64_t)H5Tget_size(s->type);
  return s->count >= 0 && H5Sget_simple_extent_ndims(s->space) == 1;
}

/* `count` strings at `from`, `stride` bytes apart and at most `most` long, packed without spare bytes. */
static core_status pack(const char *path, const char *const *text, int64_t count, int64_t most, char **keys,
                        int64_t *key_bytes) {
  int64_t longest = 1;
  for (int64_t i = 0; i < count; i++) {
    int64_t length = text[i] ? (int64_t)strnlen(text[i], (size_t)most) : 0;
    if (length > longest) longest = length;
  }
  CHECK(longest <= TRAIN_MOST_KEY, CORE_ERR_UNSUPPORTED, "%s: a key of more than %d bytes", path,
        TRAIN_MOST_KEY);
  *keys = calloc((size_t)count + 1, (size_t)longest);
  CHECK(*keys, CORE_ERR_MEMORY, "%s: no memory for %lld keys", path, (long long)count);
  for (int64_t i = 0; i < count; i++)
    if (text[i]) memcpy(*keys + i * longest, text[i], strnlen(text[i], (size_t)longest));
  *key_bytes = longest;
  return CORE_OK;
}

static core_status read_variable(const char *path, const strings *s, char **keys, int64_t *key_bytes) {
  char reason[192], **text = calloc((size_t)s->count + 1, sizeof *text);
  CHECK(text, CORE_ERR_MEMORY, "%s: no memory for %lld keys", path, (long long)s->count);
  core_status status = CORE_OK;
  if (H5Dread(s->dataset, s->type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text) < 0)
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__,
                              "%s: the keys cannot be read: %s", path, take_reason(reason));
  if (status == CORE_OK)
    status = pack(path, (const char *const *)text, s->count, TRAIN_MOST_KEY + 1, keys, key_bytes);
  (void)H5Dvlen_reclaim(s->type, s->space, H5P_DEFAULT, text);
  free(text);
  return status;
}

static core_status read_fixed(const char *path, const strings *s, char **keys, int64_t *key_bytes) {
  char reason[192];
  CHECK(s->bytes <= TRAIN_MOST_KEY, CORE_ERR_UNSUPPORTED, "%s: keys of %lld bytes, at most %d", path,
        (long long)s->bytes, TRAIN_MOST_KEY);
  char *all = malloc((size_t)(s->count * s->bytes) + 1);
  const char **text = calloc((size_t)s->count + 1, sizeof *text);
  core_status status = CORE_OK;
  if (!all || !text)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "%s: no memory for %lld keys",
                              path, (long long)s->count);
  if (status == CORE_OK && H5Dread(s->dataset, s->type, H5S_ALL, H5S_ALL, H5P_DEFAULT, all) < 0)
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__,
                              "%s: the keys cannot be read: %s", path, take_reason(reason));
  for (int64_t i = 0; status == CORE_OK && i < s->count; i++) text[i] = all + i * s->bytes;
  if (status == CORE_OK) status = pack(path, text, s->count, s->bytes, keys, key_bytes);
  free(all);
  free(text);
  return status;
}

core_status train_shard_keys(const char *directory, const char *split, const char *modality, int32_t shard,
                             char **keys, int64_t *samples, int64_t *key_bytes) {
  char path[4096];
  strings s;
  core_status status = CORE_OK;
  *keys = NULL;
  *samples = *key_bytes = 0;
  snprintf(path, sizeof path, "%s/%s/%s-%05d.h5", directory, split, modality, shard);
  (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  if (strings_open(path, &s)) {
    *samples = s.count;
    status = s.variable ? read_variable(path, &s, keys, key_bytes) : read_fixed(path, &s, keys, key_bytes);
  }
  (void)H5Eclear2(H5E_DEFAULT);
  strings_close(&s);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}
