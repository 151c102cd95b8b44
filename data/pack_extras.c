/* Outline: the columns of a shard that only rewriting needs: keys, prompts, targets. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "data/header_impl.h"
#include "data/heap_impl.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

/* ---- tokens. Inside HDF5. ---- */

static core_status read_list(const data_hdf5_file *file, const char *name, int64_t *count, int32_t **tokens,
                             uint64_t **offsets) {
  data_hdf5_dataset dataset;
  TRY(data_hdf5_dataset_open_priv(file, name, 1, &dataset));
  core_status status = CORE_OK;
  *count = dataset.extent[0];
  if (tokens != NULL) status = DATA_ALLOCATE(*count, name, tokens);
  if (tokens != NULL && status == CORE_OK) status = data_hdf5_read_int32_priv(&dataset, *tokens);
  if (offsets != NULL) status = DATA_ALLOCATE(*count, name, offsets);
  if (offsets != NULL && status == CORE_OK) status = data_hdf5_read_unsigned_priv(&dataset, *offsets);
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  return CORE_OK;
}

/* Opening the set checked the offsets; the file is looked at again all the same. */
static core_status read_tokens(const data_hdf5_file *file, const char *kind, int64_t samples, bool *given,
                               int32_t **token, int64_t **offset) {
  char name[32];
  int64_t count = 0, entries = 0;
  (void)snprintf(name, sizeof name, "%s_token", kind);
  *given = data_hdf5_has_priv(file, name);
  if (!*given) return CORE_OK;
  TRY(read_list(file, name, &count, token, NULL));
  (void)snprintf(name, sizeof name, "%s_offset", kind);
  TRY(read_list(file, name, &entries, NULL, (uint64_t **)offset));
  bool good = entries == samples + 1 && (*offset)[0] == 0;
  for (int64_t i = 0; good && i < samples; ++i)
    good = (*offset)[i] <= (*offset)[i + 1] && (*offset)[i + 1] <= count;
  CHECK(good, CORE_ERR_CORRUPT, "%s: \"%s\" does not rise from 0 to %lld", file->path, name,
        (long long)count);
  return CORE_OK;
}

/* ---- keys. Inside HDF5. ---- */

static core_status append_key(data_extras *out, int64_t i, const char *text, size_t length) {
  out->key_at[i] = out->key.count;
  TRY(data_bytes_append_priv(&out->key, text, (int64_t)strnlen(text, length)));
  TRY(data_bytes_append_priv(&out->key, "", 1));
  return CORE_OK;
}

/* Strings of `bytes` bytes each, padded with zeros or spaces. */
static core_status read_fixed(const data_hdf5_dataset *dataset, int64_t bytes, data_extras *out) {
  char *values = NULL;
  TRY(DATA_ALLOCATE(dataset->extent[0] * bytes, "keys", &values));
  const hid_t type = H5Dget_type(dataset->id);
  const bool spaces = type >= 0 && H5Tget_strpad(type) == H5T_STR_SPACEPAD;
  const bool good = type >= 0 && H5Dread(dataset->id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0;
  if (type >= 0) (void)H5Tclose(type);
  core_status status = good ? CORE_OK
                            : core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__,
                                               "%s: \"key\" cannot be read: %s", dataset->file->path,
                                               data_hdf5_reason_priv().text);
  for (int64_t i = 0; status == CORE_OK && i < dataset->extent[0]; ++i) {
    size_t length = strnlen(values + i * bytes, (size_t)bytes);
    while (spaces && length > 0 && values[i * bytes + (int64_t)length - 1] == ' ') --length;
    status = append_key(out, i, values + i * bytes, length);
  }
  free(values);
  TRY(status);
  return CORE_OK;
}

static core_status read_variable(const data_hdf5_dataset *dataset, data_extras *out) {
  enum { MOST_KEY = 65536 };
  uint8_t *descriptor = NULL;
  char *text = NULL;
  core_status status = CORE_OK;
  data_heap_reader *heap = NULL;
  TRY_OUT(DATA_ALLOCATE(dataset->extent[0] * DATA_DESCRIPTOR_BYTES, "keys", &descriptor), done);
  TRY_OUT(DATA_ALLOCATE(MOST_KEY, "key", &text), done);
  TRY_OUT(data_heap_descriptors_priv(dataset, descriptor), done);
  TRY_OUT(data_heap_open_priv(dataset->file, dataset->name, &heap), done);
  for (int64_t i = 0; i < dataset->extent[0]; ++i) {
    TRY_OUT(data_heap_next_priv(heap, descriptor + i * DATA_DESCRIPTOR_BYTES, text, MOST_KEY), done);
    TRY_OUT(append_key(out, i, text, MOST_KEY), done);
  }
done:
  data_heap_close_priv(heap);
  free(descriptor);
  free(text);
  return status;
}

static core_status read_keys(const data_hdf5_file *file, data_extras *out) {
  data_hdf5_dataset dataset;
  out->keyed = data_hdf5_has_priv(file, "key");
  if (!out->keyed) return CORE_OK;
  TRY(data_hdf5_dataset_open_priv(file, "key", 1, &dataset));
  const hid_t type = H5Dget_type(dataset.id);
  const bool text = type >= 0 && H5Tget_class(type) == H5T_STRING && dataset.extent[0] == out->samples;
  const bool variable = text && H5Tis_variable_str(type) > 0;
  if (type >= 0) (void)H5Tclose(type);
  core_status status = CORE_OK;
  if (!text)
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__, "%s: \"key\" is damaged",
                              file->path);
  if (status == CORE_OK) status = DATA_ALLOCATE(out->samples, "keys", &out->key_at);
  if (status == CORE_OK)
    status = variable ? read_variable(&dataset, out) : read_fixed(&dataset, dataset.type_bytes, out);
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  return CORE_OK;
}

/* ---- the shard ---- */

typedef core_status (*reading)(const data_column *column, const data_hdf5_file *file, data_extras *out);

static core_status read_both(const data_column *column, const data_hdf5_file *file, data_extras *out) {
  data_file_identity now;
  TRY(data_hdf5_identity_priv(file, &now));
  CHECK(data_identity_equal_priv(&now, &column->identity), CORE_ERR_MISMATCH,
        "%s: was changed while it was in use", column->path);
  TRY(read_tokens(file, "prompt", out->samples, &out->prompted, &out->prompt, &out->prompt_offset));
  TRY(read_tokens(file, "target", out->samples, &out->targeted, &out->target, &out->target_offset));
  return CORE_OK;
}

static core_status read_file(const data_column *column, const data_hdf5_file *file, data_extras *out) {
  TRY(read_both(column, file, out));
  TRY(read_keys(file, out));
  return CORE_OK;
}

static core_status read_inside(const data_column *column, reading read, data_extras *out) {
  data_hdf5_file file;
  *out = (data_extras){.samples = column->samples};
  TRY(data_hdf5_enter_priv());
  core_status status = data_hdf5_open_priv(column->path, &file);
  if (status == CORE_OK) status = read(column, &file, out);
  data_hdf5_close_priv(&file);
  data_hdf5_leave_priv();
  if (status != CORE_OK) data_extras_release_priv(out);
  TRY(status);
  return CORE_OK;
}

core_status data_extras_read_priv(const data_column *column, data_extras *out) {
  TRY(read_inside(column, read_file, out));
  return CORE_OK;
}

core_status data_tokens_read_priv(const data_column *column, data_extras *out) {
  TRY(read_inside(column, read_both, out));
  return CORE_OK;
}

void data_extras_release_priv(data_extras *extras) {
  free(extras->key.bytes);
  free(extras->key_at);
  free(extras->prompt);
  free(extras->target);
  free(extras->prompt_offset);
  free(extras->target_offset);
  *extras = (data_extras){0};
}
