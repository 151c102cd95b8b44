/* Outline: every entry of the header is taken by itself (fields, type, shape, place); then, in the order of
 * their data, the places must follow one another from the first byte to the last; names are compared last. */
#include <cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/safetensors_header.h"

static const struct {
  const char *text;
  int64_t bytes;
} types[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2},  {"F64", 8},     {"I8", 1},
             {"I16", 2}, {"I32", 4},  {"I64", 8},  {"U8", 1},      {"U16", 2},
             {"U32", 4}, {"U64", 8},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};

static int64_t bytes_of(const char *type) {
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (strcmp(types[i].text, type) == 0) return types[i].bytes;
  return 0;
}

/* Whole numbers up to 2^53 are exact in JSON's doubles. */
static bool take_whole(const cJSON *item, int64_t *out) {
  if (!cJSON_IsNumber(item)) return false;
  const double value = item->valuedouble;
  if (!(value >= 0) || value > 9007199254740992.0 || value != floor(value)) return false;
  *out = (int64_t)value;
  return true;
}

static core_status take_shape(const cJSON *shape, core_safetensor *out) {
  const cJSON *item = NULL;
  CHECK(cJSON_IsArray(shape), CORE_ERR_CORRUPT, "tensor '%.96s' has no shape", out->name);
  CHECK(cJSON_GetArraySize(shape) <= CORE_MAX_RANK, CORE_ERR_UNSUPPORTED,
        "tensor '%.96s' has %d dimensions, at most %d are read", out->name, cJSON_GetArraySize(shape),
        CORE_MAX_RANK);
  for (int i = 0; i < CORE_MAX_RANK; i++) out->shape[i] = 1;
  out->count = 1;
  cJSON_ArrayForEach(item, shape) {
    int64_t *extent = &out->shape[out->rank++];
    CHECK(take_whole(item, extent) && !__builtin_mul_overflow(out->count, *extent, &out->count),
          CORE_ERR_CORRUPT, "the shape of tensor '%.96s' makes no sense at dimension %d", out->name,
          out->rank - 1);
  }
  return CORE_OK;
}

static core_status take_place(const cJSON *offsets, int64_t room, core_safetensor *out) {
  int64_t bytes = 0;
  CHECK(cJSON_IsArray(offsets) && cJSON_GetArraySize(offsets) == 2 &&
            take_whole(cJSON_GetArrayItem(offsets, 0), &out->begin) &&
            take_whole(cJSON_GetArrayItem(offsets, 1), &out->end),
        CORE_ERR_CORRUPT, "tensor '%.96s' has no data_offsets [begin, end]", out->name);
  CHECK(out->begin <= out->end && out->end <= room, CORE_ERR_CORRUPT,
        "tensor '%.96s' claims bytes %lld to %lld of %lld bytes of data", out->name, (long long)out->begin,
        (long long)out->end, (long long)room);
  if (out->bytes == 0) return CORE_OK; /* a type that is not known */
  CHECK(!__builtin_mul_overflow(out->count, out->bytes, &bytes) && bytes == out->end - out->begin,
        CORE_ERR_CORRUPT,
        "the shape of tensor '%.96s' needs %lld elements of %lld bytes, its place has %lld bytes", out->name,
        (long long)out->count, (long long)out->bytes, (long long)(out->end - out->begin));
  return CORE_OK;
}

static core_status take_name(const char *name, core_safetensor *out) {
  size_t length = name ? strlen(name) : 0;
  CHECK(length > 0 && length < CORE_SAFETENSORS_NAME, CORE_ERR_CORRUPT,
        "a tensor's name has %zu bytes, expected 1 to %d", length, CORE_SAFETENSORS_NAME - 1);
  out->name = strdup(name);
  CHECK(out->name, CORE_ERR_MEMORY, "no memory for the name of a tensor");
  return CORE_OK;
}

/* A key twice would be read by one program in one way and by another in another: exactly three are there. */
static core_status take_tensor(const cJSON *item, int64_t room, core_safetensor *out) {
  TRY(take_name(item->string, out));
  const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
  const char *type = cJSON_GetStringValue(dtype);
  CHECK(cJSON_IsObject(item) && cJSON_GetArraySize(item) == 3 && type, CORE_ERR_CORRUPT,
        "tensor '%.96s' is not described by dtype, shape and data_offsets", out->name);
  snprintf(out->type, sizeof out->type, "%s", type);
  out->bytes = bytes_of(type);
  TRY(take_shape(cJSON_GetObjectItemCaseSensitive(item, "shape"), out));
  TRY(take_place(cJSON_GetObjectItemCaseSensitive(item, "data_offsets"), room, out));
  return CORE_OK;
}

static int compare_places(const void *a, const void *b) {
  const core_safetensor *x = a, *y = b;
  if (x->begin != y->begin) return (x->begin > y->begin) - (x->begin < y->begin);
  return (x->end > y->end) - (x->end < y->end);
}

/* From the first byte to the last: what no tensor owns could hold anything. */
static core_status check_places(core_safetensors *header, int64_t room) {
  int64_t at = 0;
  qsort(header->list, (size_t)header->count, sizeof *header->list, compare_places);
  for (int32_t i = 0; i < header->count; i++) {
    const core_safetensor *tensor = &header->list[i];
    CHECK(tensor->begin >= at, CORE_ERR_CORRUPT,
          "tensor '%.96s' begins at byte %lld, inside the one before it", tensor->name,
          (long long)tensor->begin);
    CHECK(tensor->begin == at, CORE_ERR_CORRUPT,
          "bytes %lld to %lld of the data, before tensor '%.96s', belong to none", (long long)at,
          (long long)tensor->begin, tensor->name);
    at = tensor->end;
  }
  CHECK(at == room, CORE_ERR_CORRUPT, "the tensors end at byte %lld of %lld bytes of data", (long long)at,
        (long long)room);
  return CORE_OK;
}

static core_status check_metadata(const cJSON *item) {
  const cJSON *value = NULL;
  CHECK(cJSON_IsObject(item), CORE_ERR_CORRUPT, "__metadata__ is no object");
  cJSON_ArrayForEach(value, item)
      CHECK(cJSON_IsString(value), CORE_ERR_CORRUPT, "__metadata__ holds something that is no text");
  return CORE_OK;
}

static core_status take_all(const cJSON *root, int64_t room, core_safetensors *out) {
  const cJSON *item = NULL;
  int metadata = 0;
  cJSON_ArrayForEach(item, root) {
    if (item->string && strcmp(item->string, "__metadata__") == 0) {
      CHECK(++metadata == 1, CORE_ERR_CORRUPT, "__metadata__ comes twice");
      TRY(check_metadata(item));
    } else {
      TRY(take_tensor(item, room, &out->list[out->count++]));
    }
  }
  TRY(check_places(out, room));
  return CORE_OK;
}

/* Behind the object only the blanks that align the data may follow. */
static core_status parse(const char *text, int64_t length, cJSON **root) {
  const char *end = NULL;
  CHECK(length > 0 && text[0] == '{', CORE_ERR_FORMAT, "its header does not begin with '{'");
  CHECK(!memchr(text, '\0', (size_t)length), CORE_ERR_CORRUPT, "its header holds a zero byte");
  *root = cJSON_ParseWithLengthOpts(text, (size_t)length, &end, 0);
  CHECK(cJSON_IsObject(*root), CORE_ERR_CORRUPT, "its header is no JSON object");
  for (; end < text + length; end++)
    CHECK(*end == ' ', CORE_ERR_CORRUPT, "something follows the JSON object of its header");
  return CORE_OK;
}

core_status core_safetensors_parse(const char *text, int64_t length, int64_t room, core_safetensors *out) {
  cJSON *root = NULL;
  *out = (core_safetensors){0};
  core_status status = parse(text, length, &root);
  if (status == CORE_OK) {
    out->list = calloc((size_t)cJSON_GetArraySize(root) + 1, sizeof *out->list);
    if (!out->list)
      status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for %d tensors",
                                cJSON_GetArraySize(root));
  }
  if (status == CORE_OK) status = take_all(root, room, out);
  cJSON_Delete(root);
  if (status != CORE_OK) {
    core_safetensors_free(out);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

void core_safetensors_free(core_safetensors *header) {
  for (int32_t i = 0; i < header->count; i++) free(header->list[i].name);
  free(header->list);
  *header = (core_safetensors){0};
}
