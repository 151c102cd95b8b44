/* Outline: the header as text; header and data into a temporary file, a piece at a time; rename. */
#include <cJSON.h>
#include <fcntl.h>
#include <limits.h> /* PATH_MAX */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* unlink */

#include "checkpoint/safetensors_impl.h"
#include "core/file.h"

enum { PIECE = 1 << 16, ALIGN = 8 };

static int64_t count_of(const ckpt_safetensors_source *source) {
  int64_t count = 1;
  for (int32_t i = 0; i < source->rank; i++) count *= source->shape[i];
  return count;
}

/* ---- the header ---- */

static cJSON *describe(const ckpt_safetensors_source *source, core_dtype dtype, int64_t *at) {
  cJSON *entry = cJSON_CreateObject(), *shape = cJSON_CreateArray(), *place = cJSON_CreateArray();
  int64_t end = *at + count_of(source) * (int64_t)core_dtype_size(dtype);
  cJSON_AddStringToObject(entry, "dtype", ckpt_safetensors_text_priv(dtype));
  for (int32_t i = 0; i < source->rank; i++)
    cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)source->shape[i]));
  cJSON_AddItemToObject(entry, "shape", shape);
  cJSON_AddItemToArray(place, cJSON_CreateNumber((double)*at));
  cJSON_AddItemToArray(place, cJSON_CreateNumber((double)end));
  cJSON_AddItemToObject(entry, "data_offsets", place);
  *at = end;
  return entry;
}

/* The data begin at a multiple of ALIGN: blanks fill the header up, as the format allows. */
static core_status make_header(const ckpt_safetensors_source *list, int32_t count, core_dtype dtype,
                               const char *const *metadata, char **out, size_t *bytes) {
  cJSON *root = cJSON_CreateObject();
  int64_t at = 0;
  if (metadata) {
    cJSON *object = cJSON_AddObjectToObject(root, "__metadata__");
    for (int i = 0; metadata[i] && metadata[i + 1]; i += 2)
      cJSON_AddStringToObject(object, metadata[i], metadata[i + 1]);
  }
  for (int32_t i = 0; i < count; i++)
    cJSON_AddItemToObject(root, list[i].name, describe(&list[i], dtype, &at));
  char *text = cJSON_PrintUnformatted(root);
  cJSON_Delete(root);
  size_t length = text ? strlen(text) : 0, padded = (length + ALIGN - 1) / ALIGN * ALIGN;
  char *header = text ? malloc(8 + padded) : NULL;
  if (header) {
    for (int i = 0; i < 8; i++) header[i] = (char)(uint8_t)((uint64_t)padded >> (8 * i));
    memcpy(header + 8, text, length);
    memset(header + 8 + length, ' ', padded - length);
  }
  cJSON_free(text);
  CHECK(header, CORE_ERR_MEMORY, "no memory for the header of %d tensors", count);
  CHECK(padded <= CKPT_SAFETENSORS_HEADER, CORE_ERR_UNSUPPORTED,
        "a header of %zu bytes, at most %d are written", padded, CKPT_SAFETENSORS_HEADER);
  *out = header;
  *bytes = 8 + padded;
  return CORE_OK;
}

static int compare_texts(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static core_status check_names(const ckpt_safetensors_source *list, int32_t count) {
  const char **name = calloc((size_t)count + 1, sizeof *name);
  int32_t twice = -1;
  CHECK(name, CORE_ERR_MEMORY, "no memory for %d names", count);
  for (int32_t i = 0; i < count; i++) name[i] = list[i].name;
  qsort(name, (size_t)count, sizeof *name, compare_texts);
  for (int32_t i = 1; i < count && twice < 0; i++)
    if (strcmp(name[i], name[i - 1]) == 0) twice = i;
  const char *which = twice >= 0 ? name[twice] : NULL;
  free(name);
  CHECK(!which, CORE_ERR_ARGUMENT, "tensor '%.96s' is given twice", which);
  return CORE_OK;
}

/* ---- the data ---- */

static core_status convert(const ckpt_safetensors_source *source, core_dtype dtype, int64_t first,
                           int64_t count, uint8_t *to) {
  for (int64_t i = 0; i < count; i++) {
    float value = (float)source->data[first + i], stored = value;
    uint16_t half = 0;
    if (dtype == CORE_FLOAT16) stored = core_float_from_half(half = core_half_from_float(value));
    if (dtype == CORE_BFLOAT16) stored = core_float_from_bfloat(half = core_bfloat_from_float(value));
    CHECK(isfinite(stored), CORE_ERR_NON_FINITE, "element %lld of tensor '%.96s', %g, cannot be stored as %s",
          (long long)(first + i), source->name, (double)value, core_dtype_text(dtype));
    if (dtype == CORE_FLOAT32)
      memcpy(to + 4 * i, &value, sizeof value);
    else
      memcpy(to + 2 * i, &half, sizeof half);
  }
  return CORE_OK;
}

static core_status write_data(int fd, const char *path, const ckpt_safetensors_source *source,
                              core_dtype dtype, uint8_t *piece) {
  int64_t count = count_of(source);
  for (int64_t done = 0; done < count; done += PIECE) {
    int64_t some = count - done < PIECE ? count - done : PIECE;
    TRY(convert(source, dtype, done, some, piece));
    TRY(core_file_write(fd, path, piece, (size_t)some * core_dtype_size(dtype)));
  }
  return CORE_OK;
}

static core_status write_all(int fd, const char *path, const char *header, size_t bytes,
                             const ckpt_safetensors_source *list, int32_t count, core_dtype dtype) {
  uint8_t *piece = malloc((size_t)PIECE * 4);
  CHECK(piece, CORE_ERR_MEMORY, "no memory to write %s", path);
  core_status status = core_file_write(fd, path, header, bytes);
  for (int32_t i = 0; i < count && status == CORE_OK; i++)
    status = write_data(fd, path, &list[i], dtype, piece);
  free(piece);
  if (status == CORE_OK) status = core_file_sync(fd, path);
  TRY(status);
  return CORE_OK;
}

static core_status publish(const char *temporary, const char *path) {
  char parent[PATH_MAX];
  TRY(core_file_rename(temporary, path));
  snprintf(parent, sizeof parent, "%s", path);
  char *slash = strrchr(parent, '/');
  if (slash == parent) slash++; /* a file directly under the root */
  if (slash) *slash = '\0';
  TRY(core_file_sync_directory(slash ? parent : "."));
  return CORE_OK;
}

core_status ckpt_safetensors_write(const char *path, const ckpt_safetensors_source *list, int32_t count,
                                   core_dtype dtype, const char *const *metadata) {
  char temporary[PATH_MAX], *header = NULL;
  size_t bytes = 0;
  int fd = -1;
  CHECK(dtype == CORE_FLOAT32 || dtype == CORE_FLOAT16 || dtype == CORE_BFLOAT16, CORE_ERR_UNSUPPORTED,
        "%s: tensors are written as float32, float16 or bfloat16", path);
  int length = snprintf(temporary, sizeof temporary, "%s.tmp", path);
  CHECK(length < (int)sizeof temporary, CORE_ERR_ARGUMENT, "a file name of %d bytes", length);
  TRY(check_names(list, count));
  TRY(make_header(list, count, dtype, metadata, &header, &bytes));
  core_status status = core_file_open(temporary, O_WRONLY | O_CREAT | O_TRUNC, &fd);
  if (status == CORE_OK) {
    status = write_all(fd, temporary, header, bytes, list, count, dtype);
    core_error saved;
    core_error_save(&saved);
    status = core_keep_first(status, &saved, core_file_close(fd, temporary));
  }
  free(header);
  if (status == CORE_OK) status = publish(temporary, path);
  if (status != CORE_OK) {
    if (fd >= 0) (void)unlink(temporary);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
