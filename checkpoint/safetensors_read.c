/* Outline: the files of a collection (one, or those of an index); the header of each; all tensors by name,
 * compared with the index; values, converted a piece at a time. */
#include <cJSON.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/safetensors_impl.h"
#include "core/file.h"

struct ckpt_safetensors {
  char **path; /* [files] */
  int32_t files;
  ckpt_safetensor *list; /* [count], by name */
  int32_t count;
};

static const char single_name[] = "model.safetensors", index_name[] = "model.safetensors.index.json";

/* ---- one file ---- */

static int64_t little(const uint8_t bytes[8]) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; i--) value = value << 8 | bytes[i];
  return value > INT64_MAX ? INT64_MAX : (int64_t)value;
}

static core_status read_header(int fd, const char *path, int64_t bytes, char **text, int64_t *length) {
  uint8_t first[8];
  CHECK(bytes >= (int64_t)sizeof first, CORE_ERR_FORMAT,
        "it has %lld bytes, a safetensors file has at least 8", (long long)bytes);
  TRY(core_file_read_at(fd, path, first, sizeof first, 0));
  *length = little(first);
  CHECK(*length <= bytes - (int64_t)sizeof first, CORE_ERR_FORMAT,
        "its first 8 bytes claim a header of %lld bytes in a file of %lld: no safetensors file, or cut short",
        (long long)*length, (long long)bytes);
  CHECK(*length <= CKPT_SAFETENSORS_HEADER, CORE_ERR_UNSUPPORTED,
        "its header has %lld bytes, at most %d are read", (long long)*length, CKPT_SAFETENSORS_HEADER);
  *text = malloc((size_t)*length + 1);
  CHECK(*text, CORE_ERR_MEMORY, "no memory for a header of %lld bytes", (long long)*length);
  TRY(core_file_read_at(fd, path, *text, (size_t)*length, sizeof first));
  return CORE_OK;
}

static core_status append(ckpt_safetensors *c, ckpt_header *header, int32_t file, int64_t data) {
  ckpt_safetensor *grown = realloc(c->list, (size_t)(c->count + header->count + 1) * sizeof *grown);
  if (grown) c->list = grown;
  CHECK(grown, CORE_ERR_MEMORY, "no memory for %d tensors", c->count + header->count);
  for (int32_t i = 0; i < header->count; i++) {
    ckpt_safetensor *tensor = &c->list[c->count++];
    *tensor = header->list[i];
    tensor->file = file;
    tensor->at += data;
  }
  header->count = 0; /* the names are the collection's now */
  return CORE_OK;
}

static core_status scan(ckpt_safetensors *c, int32_t file, int fd, int64_t bytes) {
  char *text = NULL;
  int64_t length = 0;
  ckpt_header header = {0};
  core_status status = read_header(fd, c->path[file], bytes, &text, &length);
  if (status == CORE_OK) status = ckpt_header_parse_priv(text, length, bytes - 8 - length, &header);
  free(text);
  if (status == CORE_OK) status = append(c, &header, file, 8 + length);
  ckpt_header_free_priv(&header);
  if (status != CORE_OK && status != CORE_ERR_IO) return core_error_context(status, "%s", c->path[file]);
  TRY(status);
  return CORE_OK;
}

static core_status scan_file(ckpt_safetensors *c, int32_t file) {
  int fd = -1;
  int64_t bytes = 0;
  struct stat info;
  TRY(core_file_size(c->path[file], &bytes));
  CHECK(stat(c->path[file], &info) == 0 && S_ISREG(info.st_mode), CORE_ERR_FORMAT, "%s is no regular file",
        c->path[file]);
  TRY(core_file_open(c->path[file], O_RDONLY, &fd));
  core_status status = scan(c, file, fd, bytes);
  core_error saved;
  core_error_save(&saved);
  TRY(core_keep_first(status, &saved, core_file_close(fd, c->path[file])));
  return CORE_OK;
}

static core_status add_path(ckpt_safetensors *c, const char *folder, const char *name) {
  size_t bytes = strlen(folder) + strlen(name) + 2;
  char **grown = realloc(c->path, (size_t)(c->files + 1) * sizeof *grown), *path = malloc(bytes);
  if (grown) c->path = grown;
  if (!grown || !path) free(path);
  CHECK(grown && path, CORE_ERR_MEMORY, "no memory for the name of a file");
  snprintf(path, bytes, "%s%s%s", folder, *folder ? "/" : "", name);
  c->path[c->files++] = path;
  return CORE_OK;
}

/* ---- by name ---- */

static int compare_names(const void *a, const void *b) {
  return strcmp(((const ckpt_safetensor *)a)->name, ((const ckpt_safetensor *)b)->name);
}

static core_status order(ckpt_safetensors *c) {
  if (c->count > 0) qsort(c->list, (size_t)c->count, sizeof *c->list, compare_names);
  for (int32_t i = 1; i < c->count; i++)
    CHECK(strcmp(c->list[i].name, c->list[i - 1].name) != 0, CORE_ERR_CORRUPT,
          "tensor '%.96s' comes twice: in %s and in %s", c->list[i].name, c->path[c->list[i - 1].file],
          c->path[c->list[i].file]);
  return CORE_OK;
}

/* ---- an index ---- */

/* A shard lies beside its index. */
static bool plain_name(const char *name) {
  return *name && *name != '.' && !strchr(name, '/') && strlen(name) < CKPT_SAFETENSORS_NAME;
}

static int compare_texts(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct files of the map, sorted: each once, however often it is named. */
static core_status add_shards(ckpt_safetensors *c, const cJSON *map, const char *folder, const char **name) {
  const cJSON *item = NULL;
  int32_t count = 0;
  cJSON_ArrayForEach(item, map) {
    const char *file = cJSON_GetStringValue(item);
    CHECK(item->string && file && plain_name(file), CORE_ERR_CORRUPT,
          "weight_map of '%.96s' is not the name of a file beside the index",
          item->string ? item->string : "");
    name[count++] = file;
  }
  CHECK(count > 0, CORE_ERR_CORRUPT, "weight_map is empty");
  qsort(name, (size_t)count, sizeof *name, compare_texts);
  for (int32_t i = 0; i < count; i++) {
    if (i > 0 && strcmp(name[i], name[i - 1]) == 0) continue;
    CHECK(c->files < CKPT_SAFETENSORS_FILES, CORE_ERR_UNSUPPORTED, "more than %d shards",
          CKPT_SAFETENSORS_FILES);
    TRY(add_path(c, folder, name[i]));
  }
  return CORE_OK;
}

static const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

/* Index and shards must say the same: each tensor of the one in the other, where it says. */
static core_status compare_with_map(const ckpt_safetensors *c, const cJSON *map) {
  const cJSON *item = NULL;
  int32_t count = 0;
  cJSON_ArrayForEach(item, map) {
    const ckpt_safetensor *tensor = ckpt_safetensors_find(c, item->string);
    CHECK(tensor, CORE_ERR_MISMATCH, "tensor '%.96s' of the index is in no shard", item->string);
    CHECK(strcmp(base_name(c->path[tensor->file]), cJSON_GetStringValue(item)) == 0, CORE_ERR_MISMATCH,
          "tensor '%.96s' is in %s, the index says %s", item->string, base_name(c->path[tensor->file]),
          cJSON_GetStringValue(item));
    count++;
  }
  CHECK(count == c->count, CORE_ERR_MISMATCH, "the index lists %d tensors, its shards hold %d", count,
        c->count);
  return CORE_OK;
}

static core_status take_index(ckpt_safetensors *c, const cJSON *root, const char *folder) {
  const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
  CHECK(cJSON_IsObject(map), CORE_ERR_FORMAT, "it is no index of safetensors: it has no weight_map");
  const char **name = calloc((size_t)cJSON_GetArraySize(map) + 1, sizeof *name);
  CHECK(name, CORE_ERR_MEMORY, "no memory for an index of %d tensors", cJSON_GetArraySize(map));
  core_status status = add_shards(c, map, folder, name);
  free(name);
  for (int32_t i = 0; i < c->files && status == CORE_OK; i++) status = scan_file(c, i);
  if (status == CORE_OK) status = order(c);
  if (status == CORE_OK) status = compare_with_map(c, map);
  TRY(status);
  return CORE_OK;
}

static core_status open_index(ckpt_safetensors *c, const char *path) {
  char *text = NULL, folder[4096];
  int64_t length = 0;
  snprintf(folder, sizeof folder, "%.*s", (int)(base_name(path) - path), path);
  size_t end = strlen(folder);
  if (end > 1) folder[end - 1] = '\0';
  TRY(core_file_read_all(path, CKPT_SAFETENSORS_HEADER, &text, &length));
  cJSON *root = cJSON_ParseWithLength(text, (size_t)length);
  core_status status = take_index(c, root, folder);
  cJSON_Delete(root);
  free(text);
  if (status != CORE_OK) return core_error_context(status, "%s", path);
  return CORE_OK;
}

/* ---- opening ---- */

static core_status open_single(ckpt_safetensors *c, const char *folder, const char *name) {
  TRY(add_path(c, folder, name));
  TRY(scan_file(c, 0));
  TRY(order(c));
  return CORE_OK;
}

static core_status open_directory(ckpt_safetensors *c, const char *path) {
  char index[4096], single[4096];
  CHECK(strlen(path) < 4000, CORE_ERR_ARGUMENT, "a directory name of %zu bytes", strlen(path));
  snprintf(index, sizeof index, "%s/%s", path, index_name);
  snprintf(single, sizeof single, "%s/%s", path, single_name);
  bool sharded = core_file_exists(index);
  CHECK(sharded || core_file_exists(single), CORE_ERR_NOT_FOUND, "%s holds neither %s nor %s", path,
        single_name, index_name);
  if (sharded) return open_index(c, index);
  return open_single(c, path, single_name);
}

static core_status open_any(ckpt_safetensors *c, const char *path) {
  struct stat info;
  const char *dot = strrchr(path, '.');
  CHECK(strlen(path) < 4000, CORE_ERR_ARGUMENT, "a file name of %zu bytes", strlen(path));
  if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) return open_directory(c, path);
  if (dot && strcmp(dot, ".json") == 0) return open_index(c, path);
  return open_single(c, "", path);
}

core_status ckpt_safetensors_open(const char *path, ckpt_safetensors **out) {
  ckpt_safetensors *c = calloc(1, sizeof *c);
  *out = NULL;
  CHECK(c, CORE_ERR_MEMORY, "no memory for a list of tensors");
  core_status status = open_any(c, path);
  if (status != CORE_OK) {
    ckpt_safetensors_close(c);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = c;
  return CORE_OK;
}

void ckpt_safetensors_close(ckpt_safetensors *c) {
  if (!c) return;
  for (int32_t i = 0; i < c->files; i++) free(c->path[i]);
  for (int32_t i = 0; i < c->count; i++) free((char *)(uintptr_t)c->list[i].name);
  free(c->path);
  free(c->list);
  free(c);
}

int32_t ckpt_safetensors_count(const ckpt_safetensors *c) {
  return c->count;
}

const ckpt_safetensor *ckpt_safetensors_at(const ckpt_safetensors *c, int32_t i) {
  return &c->list[i];
}

const ckpt_safetensor *ckpt_safetensors_find(const ckpt_safetensors *c, const char *name) {
  const ckpt_safetensor wanted = {.name = name};
  if (c->count == 0) return NULL;
  return bsearch(&wanted, c->list, (size_t)c->count, sizeof *c->list, compare_names);
}

const char *ckpt_safetensors_path(const ckpt_safetensors *c, const ckpt_safetensor *tensor) {
  return c->path[tensor->file];
}

/* ---- values ---- */

enum { PIECE = 1 << 16 }; /* elements converted at a time */

static core_status convert(const ckpt_safetensors *c, const ckpt_safetensor *tensor, int64_t first,
                           int64_t count, const uint8_t *from, core_real *out) {
  for (int64_t i = 0; i < count; i++) {
    float value;
    uint16_t half;
    if (tensor->dtype == CORE_FLOAT32) {
      memcpy(&value, from + 4 * i, sizeof value);
    } else {
      memcpy(&half, from + 2 * i, sizeof half);
      value = tensor->dtype == CORE_FLOAT16 ? core_float_from_half(half) : core_float_from_bfloat(half);
    }
    CHECK(isfinite(value), CORE_ERR_NON_FINITE, "%s: element %lld of tensor '%.96s' is not finite",
          c->path[tensor->file], (long long)(first + i), tensor->name);
    out[i] = (core_real)value;
  }
  return CORE_OK;
}

static core_status read_pieces(const ckpt_safetensors *c, const ckpt_safetensor *tensor, int fd,
                               int64_t first, int64_t count, uint8_t *stored, core_real *out) {
  int64_t size = (int64_t)core_dtype_size(tensor->dtype);
  for (int64_t done = 0; done < count;) {
    int64_t some = count - done < PIECE ? count - done : PIECE;
    TRY(core_file_read_at(fd, c->path[tensor->file], stored, (size_t)(some * size),
                          tensor->at + (first + done) * size));
    TRY(convert(c, tensor, first + done, some, stored, out + done));
    done += some;
  }
  return CORE_OK;
}

core_status ckpt_safetensors_read(const ckpt_safetensors *c, const ckpt_safetensor *tensor, int64_t first,
                                  int64_t count, core_real *out) {
  int fd = -1;
  const char *path = c->path[tensor->file];
  bool real =
      tensor->dtype == CORE_FLOAT32 || tensor->dtype == CORE_FLOAT16 || tensor->dtype == CORE_BFLOAT16;
  CHECK(real, CORE_ERR_UNSUPPORTED, "%s: tensor '%.96s' is %s; weights are float32, float16 or bfloat16",
        path, tensor->name, core_dtype_text(tensor->dtype));
  CHECK(first >= 0 && count >= 0 && first <= tensor->count && count <= tensor->count - first,
        CORE_ERR_ARGUMENT, "elements %lld to %lld of tensor '%.96s', which has %lld", (long long)first,
        (long long)(first + count), tensor->name, (long long)tensor->count);
  uint8_t *stored = malloc((size_t)PIECE * 4);
  CHECK(stored, CORE_ERR_MEMORY, "no memory to read %s", path);
  core_status status = core_file_open(path, O_RDONLY, &fd);
  if (status == CORE_OK) {
    status = read_pieces(c, tensor, fd, first, count, stored, out);
    core_error saved;
    core_error_save(&saved);
    status = core_keep_first(status, &saved, core_file_close(fd, path));
  }
  free(stored);
  TRY(status);
  return CORE_OK;
}
