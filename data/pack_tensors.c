/* Outline: a .safetensors header is parsed and checked by core; the tensor that is wanted must be there once,
 * of a type that is read here. Others (booleans, 8-bit floats) may be there beside. */
#include <string.h>

#include "core/safetensors_header.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

static const struct {
  const char *text;
  data_number kind;
} kinds[] = {{"F16", DATA_NUMBER_FLOAT16},  {"BF16", DATA_NUMBER_BFLOAT16}, {"F32", DATA_NUMBER_FLOAT32},
             {"F64", DATA_NUMBER_FLOAT64},  {"I8", DATA_NUMBER_SIGNED},     {"I16", DATA_NUMBER_SIGNED},
             {"I32", DATA_NUMBER_SIGNED},   {"I64", DATA_NUMBER_SIGNED},    {"U8", DATA_NUMBER_UNSIGNED},
             {"U16", DATA_NUMBER_UNSIGNED}, {"U32", DATA_NUMBER_UNSIGNED},  {"U64", DATA_NUMBER_UNSIGNED}};

static bool kind_of(const core_safetensor *tensor, data_number *out) {
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) {
    if (strcmp(kinds[i].text, tensor->type) != 0) continue;
    *out = kinds[i].kind;
    return true;
  }
  return false;
}

_Static_assert(CORE_MAX_RANK == sizeof((data_array){0}.shape) / sizeof(int64_t), "one number of dimensions");

/* name: NULL, then there is one tensor that can be read. */
static core_status choose(const core_safetensors *header, const char *name, data_array *out) {
  const core_safetensor *chosen = NULL;
  int64_t found = 0;
  for (int32_t i = 0; i < header->count; ++i) {
    const core_safetensor *tensor = &header->list[i];
    data_number kind;
    const bool known = kind_of(tensor, &kind);
    if (name != NULL ? strcmp(tensor->name, name) != 0 : !known) continue;
    CHECK(known, CORE_ERR_UNSUPPORTED, "tensor \"%.64s\" has a type that is not read here", name);
    out->kind = kind;
    chosen = tensor;
    ++found;
  }
  CHECK(found == 1, CORE_ERR_NOT_FOUND,
        name != NULL ? "it has %lld tensors of the name \"%.64s\"" : "it has %lld tensors%.0s; say which one",
        (long long)found, name != NULL ? name : "");
  out->value_bytes = chosen->bytes;
  out->at = chosen->begin;
  out->rank = chosen->rank;
  memcpy(out->shape, chosen->shape, sizeof out->shape);
  return CORE_OK;
}

core_status data_safetensors_parse_priv(const char *header, int64_t length, int64_t room, const char *name,
                                        data_array *out) {
  core_safetensors parsed;
  TRY(core_safetensors_parse(header, length, room, &parsed));
  const core_status status = choose(&parsed, name, out);
  core_safetensors_free(&parsed);
  TRY(status);
  return CORE_OK;
}
