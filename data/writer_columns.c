/* Outline: the small columns and the attributes of a shard, written when it is finished. All of this is
 * inside HDF5 and says only whether it went well; the reason is HDF5's. */
#include <stdlib.h>
#include <string.h>

#include "data/writer_impl.h"

/* One chunk a column, up to a sensible size, with a checksum. Strings lie in a heap: a checksum would not
 * cover them. */
static hid_t column_creation(hid_t stored, int64_t count) {
  enum { MOST_CHUNK = 1 << 17 };
  const hsize_t chunk = (hsize_t)(count < MOST_CHUNK ? count : MOST_CHUNK);
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const bool timeless = creation >= 0 && H5Pset_obj_track_times(creation, false) >= 0;
  if (timeless && (count == 0 || H5Tget_class(stored) != H5T_INTEGER)) return creation;
  if (timeless && H5Pset_chunk(creation, 1, &chunk) >= 0 && H5Pset_fletcher32(creation) >= 0) return creation;
  if (creation >= 0) (void)H5Pclose(creation);
  return -1;
}

static bool put_values(hid_t file, const char *name, hid_t stored, hid_t memory, int64_t count,
                       const void *values) {
  const hsize_t extent = (hsize_t)count;
  const hid_t space = H5Screate_simple(1, &extent, NULL), creation = column_creation(stored, count);
  const hid_t id = space < 0 || creation < 0
                       ? -1
                       : H5Dcreate2(file, name, stored, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  const bool good =
      id >= 0 && (count == 0 || H5Dwrite(id, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
  if (space >= 0) (void)H5Sclose(space);
  if (creation >= 0) (void)H5Pclose(creation);
  return (id < 0 || H5Dclose(id) >= 0) && good;
}

/* `ends` holds the end of each sample; the dataset starts with a 0 besides. */
static bool put_offsets(hid_t file, const char *name, const data_bytes *ends) {
  const int64_t count = ends->count / 8;
  uint64_t *offset = calloc((size_t)count + 1, sizeof *offset);
  if (offset == NULL) return false;
  if (count > 0) memcpy(offset + 1, ends->bytes, (size_t)ends->count);
  const bool good = put_values(file, name, H5T_STD_U64LE, H5T_NATIVE_UINT64, count + 1, offset);
  free(offset);
  return good;
}

static bool put_tokens(hid_t file, const char *kind, const token_column *column) {
  char token[32], offset[32];
  if (!column->given) return true;
  (void)snprintf(token, sizeof token, "%s_token", kind);
  (void)snprintf(offset, sizeof offset, "%s_offset", kind);
  return put_values(file, token, H5T_STD_I32LE, H5T_NATIVE_INT32, column->token.count / 4,
                    column->token.bytes) &&
         put_offsets(file, offset, &column->offset);
}

static hid_t text_type(void) {
  const hid_t type = H5Tcopy(H5T_C_S1);
  if (type >= 0) (void)H5Tset_size(type, H5T_VARIABLE);
  if (type >= 0) (void)H5Tset_cset(type, H5T_CSET_UTF8);
  return type;
}

static bool put_keys(const data_writer *writer) {
  if (!writer->keyed) return true;
  const char **key = calloc((size_t)writer->samples + 1, sizeof *key);
  const hid_t type = text_type();
  const char *at = (const char *)writer->key.bytes;
  for (int64_t i = 0; key != NULL && i < writer->samples; ++i, at += strlen(at) + 1) key[i] = at;
  const bool good =
      key != NULL && type >= 0 && put_values(writer->file, "key", type, type, writer->samples, key);
  if (type >= 0) (void)H5Tclose(type);
  free(key);
  return good;
}

static bool put_attribute(hid_t file, const char *name, hid_t stored, hid_t memory, const void *value) {
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t id = space < 0 ? -1 : H5Acreate2(file, name, stored, space, H5P_DEFAULT, H5P_DEFAULT);
  const bool good = id >= 0 && H5Awrite(id, memory, value) >= 0;
  if (space >= 0) (void)H5Sclose(space);
  return (id < 0 || H5Aclose(id) >= 0) && good;
}

static bool put_text(hid_t file, const char *name, const char *value) {
  const hid_t type = H5Tcopy(H5T_C_S1);
  const bool good = type >= 0 && H5Tset_size(type, strlen(value) + 1) >= 0 &&
                    H5Tset_cset(type, H5T_CSET_UTF8) >= 0 && put_attribute(file, name, type, type, value);
  if (type >= 0) (void)H5Tclose(type);
  return good;
}

static bool put_attributes(const data_writer *writer) {
  const int32_t version = DATA_VERSION, width = (int32_t)writer->width;
  return put_text(writer->file, "format", DATA_FORMAT_NAME) &&
         put_text(writer->file, "modality", writer->modality) &&
         put_text(writer->file, "encoder", writer->encoder) &&
         put_text(writer->file, "dtype", core_dtype_text(writer->dtype)) &&
         (writer->origin[0] == '\0' || put_text(writer->file, "origin", writer->origin)) &&
         put_attribute(writer->file, "version", H5T_STD_I32LE, H5T_NATIVE_INT32, &version) &&
         put_attribute(writer->file, "width", H5T_STD_I32LE, H5T_NATIVE_INT32, &width);
}

bool data_writer_put_columns_priv(const data_writer *writer) {
  return put_attributes(writer) &&
         put_values(writer->file, "id", H5T_STD_U64LE, H5T_NATIVE_UINT64, writer->samples,
                    writer->id.bytes) &&
         put_offsets(writer->file, "offset", &writer->offset) &&
         (!writer->labelled || put_values(writer->file, "label", H5T_STD_I32LE, H5T_NATIVE_INT32,
                                          writer->samples, writer->label.bytes)) &&
         put_keys(writer) && put_tokens(writer->file, "prompt", &writer->prompt) &&
         put_tokens(writer->file, "target", &writer->target);
}
