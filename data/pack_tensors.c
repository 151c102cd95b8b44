/* Outline: every tensor of a .safetensors header is checked (type, shape, place), none may overlap another,
 * and the one that is wanted must be there once. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "data/memory_impl.h"
#include "data/pack_impl.h"

typedef struct place {
  int64_t begin, end;
} place;

static const struct {
  const char *text;
  data_number kind;
  int64_t bytes;
} kinds[] = {
    {"F16", DATA_NUMBER_FLOAT16, 2},  {"BF16", DATA_NUMBER_BFLOAT16, 2}, {"F32", DATA_NUMBER_FLOAT32, 4},
    {"F64", DATA_NUMBER_FLOAT64, 8},  {"I8", DATA_NUMBER_SIGNED, 1},     {"I16", DATA_NUMBER_SIGNED, 2},
    {"I32", DATA_NUMBER_SIGNED, 4},   {"I64", DATA_NUMBER_SIGNED, 8},    {"U8", DATA_NUMBER_UNSIGNED, 1},
    {"U16", DATA_NUMBER_UNSIGNED, 2}, {"U32", DATA_NUMBER_UNSIGNED, 4},  {"U64", DATA_NUMBER_UNSIGNED, 8}};

/* Whole numbers up to 2^53 are exact in JSON's doubles. */
static bool take_whole(const cJSON *item, int64_t *out) {
  if (!cJSON_IsNumber(item)) return false;
  const double value = item->valuedouble;
  if (!(value >= 0) || value > 9007199254740992.0 || value != floor(value)) return false;
  *out = (int64_t)value;
  return true;
}

static bool take_shape(const cJSON *shape, data_array *out) {
  const cJSON *item = NULL;
  if (!cJSON_IsArray(shape)) return false;
  for (int i = 0; i < 4; ++i) out->shape[i] = 1;
  out->rank = 0;
  cJSON_ArrayForEach(item, shape) {
    if (out->rank == 4 || !take_whole(item, &out->shape[out->rank])) return false;
    ++out->rank;
  }
  return true;
}

static bool take_place(const cJSON *offsets, int64_t room, place *out) {
  return cJSON_IsArray(offsets) && cJSON_GetArraySize(offsets) == 2 &&
         take_whole(cJSON_GetArrayItem(offsets, 0), &out->begin) &&
         take_whole(cJSON_GetArrayItem(offsets, 1), &out->end) && out->begin <= out->end && out->end <= room;
}

/* *known: its type is one that is read here; others (booleans, 8-bit floats) may be there beside. */
static core_status take_tensor(const cJSON *item, int64_t room, data_array *out, place *where, bool *known) {
  const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "dtype"));
  const char *name = item->string;
  *known = false;
  CHECK(type != NULL && take_shape(cJSON_GetObjectItemCaseSensitive(item, "shape"), out) &&
            take_place(cJSON_GetObjectItemCaseSensitive(item, "data_offsets"), room, where),
        CORE_ERR_CORRUPT, "tensor \"%.64s\": type, shape or place makes no sense", name);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds && !*known; ++i) {
    *known = strcmp(kinds[i].text, type) == 0;
    out->kind = kinds[i].kind;
    out->value_bytes = kinds[i].bytes;
  }
  if (!*known) return CORE_OK;
  int64_t bytes = out->value_bytes;
  for (int i = 0; i < 4; ++i)
    CHECK(!__builtin_mul_overflow(bytes, out->shape[i], &bytes), CORE_ERR_CORRUPT,
          "tensor \"%.64s\": its shape is not addressable", name);
  CHECK(bytes == where->end - where->begin, CORE_ERR_CORRUPT,
        "tensor \"%.64s\": its shape needs %lld bytes, its place has %lld", name, (long long)bytes,
        (long long)(where->end - where->begin));
  out->at = where->begin;
  return CORE_OK;
}

static int compare_places(const void *a, const void *b) {
  const place *x = a, *y = b;
  if (x->begin != y->begin) return (x->begin > y->begin) - (x->begin < y->begin);
  return (x->end > y->end) - (x->end < y->end);
}

static core_status take_tensors(const cJSON *root, int64_t room, const char *name, place *places,
                                data_array *out) {
  const cJSON *item = NULL;
  int64_t count = 0, found = 0, only = 0;
  data_array last = *out;
  cJSON_ArrayForEach(item, root) {
    data_array tensor = *out;
    bool known = false;
    if (item->string == NULL || strcmp(item->string, "__metadata__") == 0) continue;
    TRY(take_tensor(item, room, &tensor, &places[count], &known));
    ++count;
    if (known) last = tensor;
    only += known;
    if (name != NULL && strcmp(item->string, name) == 0) {
      CHECK(known, CORE_ERR_UNSUPPORTED, "tensor \"%.64s\" has a type that is not read here", name);
      ++found;
      *out = tensor;
    }
  }
  qsort(places, (size_t)count, sizeof *places, compare_places);
  for (int64_t i = 1; i < count; ++i)
    CHECK(places[i].begin >= places[i - 1].end, CORE_ERR_CORRUPT, "two tensors overlap at byte %lld",
          (long long)places[i].begin);
  if (name == NULL && only == 1) *out = last;
  CHECK(name != NULL ? found == 1 : only == 1, CORE_ERR_NOT_FOUND,
        name != NULL ? "it has %lld tensors of the name \"%.64s\"" : "it has %lld tensors%.0s; say which one",
        (long long)(name != NULL ? found : only), name != NULL ? name : "");
  return CORE_OK;
}

core_status data_safetensors_parse_priv(const char *header, int64_t length, int64_t room, const char *name,
                                        data_array *out) {
  place *places = NULL;
  cJSON *root = cJSON_ParseWithLength(header, (size_t)length);
  core_status status = CORE_OK;
  if (!cJSON_IsObject(root))
    status = core_error_begin(CORE_ERR_FORMAT, __func__, __FILE__, __LINE__, "its header is no JSON object");
  if (status == CORE_OK) status = DATA_ALLOCATE(cJSON_GetArraySize(root), "places", &places);
  if (status == CORE_OK) status = take_tensors(root, room, name, places, out);
  free(places);
  cJSON_Delete(root);
  TRY(status);
  return CORE_OK;
}
