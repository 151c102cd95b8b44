/* Outline: one root attribute as it is stored (from an older header by us, from a newer one by HDF5), then as
 * text or as a number. */
#include <string.h>

#include "data/header_impl.h"
#include "data/heap_impl.h"

/* ---- newer headers: HDF5 ---- */

static void take_type(hid_t type, data_attribute *out) {
  const H5T_class_t type_class = H5Tget_class(type);
  const bool variable = type_class == H5T_STRING && H5Tis_variable_str(type) > 0;
  out->type_class = variable                    ? (int32_t)DATA_ATTRIBUTE_VARIABLE_STRING
                    : type_class == H5T_STRING  ? (int32_t)DATA_ATTRIBUTE_STRING
                    : type_class == H5T_INTEGER ? (int32_t)DATA_ATTRIBUTE_INTEGER
                                                : -1;
  out->bytes = variable ? DATA_DESCRIPTOR_BYTES : (int64_t)H5Tget_size(type);
  out->is_signed = type_class == H5T_INTEGER && H5Tget_sign(type) == H5T_SGN_2;
  out->big_endian = type_class == H5T_INTEGER && H5Tget_order(type) == H5T_ORDER_BE;
  out->space_padded = type_class == H5T_STRING && !variable && H5Tget_strpad(type) == H5T_STR_SPACEPAD;
}

static core_status read_open(const data_hdf5_file *file, const char *name, hid_t attribute, hid_t type,
                             data_attribute *out) {
  const hid_t space = H5Aget_space(attribute);
  out->points = space >= 0 ? (int64_t)H5Sget_simple_extent_npoints(space) : -1;
  if (space >= 0) (void)H5Sclose(space);
  take_type(type, out);
  CHECK(out->points >= 0 && out->bytes > 0 && out->bytes <= DATA_MOST_ATTRIBUTE, CORE_ERR_FORMAT,
        "%s: attribute \"%s\" has %lld bytes, expected at most %d", file->path, name, (long long)out->bytes,
        DATA_MOST_ATTRIBUTE);
  if (out->points != 1 || out->type_class < 0) return CORE_OK; /* refused by the caller */
  if (out->type_class == DATA_ATTRIBUTE_VARIABLE_STRING) {
    TRY(data_heap_descriptor_priv(file, name, attribute, out->value));
    return CORE_OK;
  }
  CHECK(H5Aread(attribute, type, out->value) >= 0, CORE_ERR_CORRUPT, "%s: attribute \"%s\": %s", file->path,
        name, data_hdf5_reason_priv().text);
  return CORE_OK;
}

static core_status read_by_hdf5(const data_hdf5_file *file, const char *name, data_attribute *out) {
  out->found = H5Aexists(file->id, name) > 0;
  (void)H5Eclear2(H5E_DEFAULT);
  if (!out->found) return CORE_OK;
  const hid_t attribute = H5Aopen(file->id, name, H5P_DEFAULT);
  const hid_t type = attribute >= 0 ? H5Aget_type(attribute) : -1;
  core_status status = CORE_OK;
  if (type >= 0)
    status = read_open(file, name, attribute, type, out);
  else
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__, "%s: attribute \"%s\": %s",
                              file->path, name, data_hdf5_reason_priv().text);
  if (type >= 0) (void)H5Tclose(type);
  if (attribute >= 0) (void)H5Aclose(attribute);
  TRY(status);
  return CORE_OK;
}

/* ---- either kind ---- */

static core_status read_stored(const data_hdf5_file *file, const char *name, data_attribute *out) {
  bool older = false;
  *out = (data_attribute){0};
  TRY(data_header_attribute_priv(file, name, &older, out));
  if (!older) TRY(read_by_hdf5(file, name, out));
  CHECK(out->found, CORE_ERR_FORMAT, "%s: attribute \"%s\" is missing", file->path, name);
  CHECK(out->points == 1, CORE_ERR_FORMAT, "%s: attribute \"%s\" must be one value", file->path, name);
  return CORE_OK;
}

core_status data_hdf5_text_priv(const data_hdf5_file *file, const char *name, char *text, size_t capacity) {
  data_attribute stored;
  TRY(read_stored(file, name, &stored));
  CHECK(stored.type_class == DATA_ATTRIBUTE_STRING || stored.type_class == DATA_ATTRIBUTE_VARIABLE_STRING,
        CORE_ERR_FORMAT, "%s: attribute \"%s\" must be a string", file->path, name);
  if (stored.type_class == DATA_ATTRIBUTE_VARIABLE_STRING) {
    CHECK(stored.bytes == DATA_DESCRIPTOR_BYTES, CORE_ERR_CORRUPT, "%s: attribute \"%s\" is damaged",
          file->path, name);
    TRY(data_heap_text_priv(file, name, stored.value, text, capacity));
    return CORE_OK;
  }
  size_t length = strnlen((const char *)stored.value, (size_t)stored.bytes);
  while (stored.space_padded && length > 0 && stored.value[length - 1] == ' ') --length;
  CHECK(length < capacity, CORE_ERR_FORMAT, "%s: attribute \"%s\" has %zu bytes, expected at most %zu",
        file->path, name, length, capacity - 1);
  memcpy(text, stored.value, length);
  text[length] = '\0';
  return CORE_OK;
}

core_status data_hdf5_integer_priv(const data_hdf5_file *file, const char *name, int64_t *value) {
  data_attribute stored;
  uint8_t bytes[8] = {0};
  *value = 0;
  TRY(read_stored(file, name, &stored));
  CHECK(stored.type_class == DATA_ATTRIBUTE_INTEGER && stored.bytes <= 8, CORE_ERR_FORMAT,
        "%s: attribute \"%s\" must be an integer of at most 64 bits", file->path, name);
  for (int64_t i = 0; i < stored.bytes; ++i)
    bytes[i] = stored.value[stored.big_endian ? stored.bytes - 1 - i : i];
  const bool negative = stored.is_signed && (bytes[stored.bytes - 1] & 0x80) != 0;
  for (int64_t i = stored.bytes; negative && i < 8; ++i) bytes[i] = 0xff;
  const uint64_t number = data_little_priv(bytes, 8);
  CHECK(stored.is_signed || number <= INT64_MAX, CORE_ERR_FORMAT, "%s: attribute \"%s\" is %llu, too large",
        file->path, name, (unsigned long long)number);
  *value = (int64_t)number;
  return CORE_OK;
}
