/* Outline: a header is parsed and checked by core; here its types become those that weights have. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/safetensors_impl.h"
#include "core/safetensors_header.h"

_Static_assert((int)CKPT_SAFETENSORS_NAME == (int)CORE_SAFETENSORS_NAME, "one length of names");

static const struct {
  const char *text;
  core_dtype dtype;
} types[] = {{"F32", CORE_FLOAT32}, {"BF16", CORE_BFLOAT16}, {"F16", CORE_FLOAT16}, {"F64", CORE_FLOAT64},
             {"I32", CORE_INT32},   {"I64", CORE_INT64},     {"U64", CORE_UINT64},  {"U8", CORE_UINT8}};
enum { TYPES = sizeof types / sizeof *types };

static core_dtype dtype_of(const char *text) {
  for (int i = 0; i < TYPES; i++)
    if (strcmp(types[i].text, text) == 0) return types[i].dtype;
  return CORE_DTYPE_COUNT;
}

const char *ckpt_safetensors_text_priv(core_dtype dtype) {
  for (int i = 0; i < TYPES; i++)
    if (types[i].dtype == dtype) return types[i].text;
  return NULL;
}

static core_status take(core_safetensor *from, ckpt_safetensor *out) {
  *out = (ckpt_safetensor){
      .dtype = dtype_of(from->type), .rank = from->rank, .count = from->count, .at = from->begin};
  CHECK(out->dtype != CORE_DTYPE_COUNT, CORE_ERR_UNSUPPORTED,
        "tensor '%.96s' is of type '%.16s'; F32, F16, BF16, F64, I32, I64, U64 and U8 are read", from->name,
        from->type);
  memcpy(out->shape, from->shape, sizeof out->shape);
  out->name = from->name; /* which is the list's now */
  from->name = NULL;
  return CORE_OK;
}

static core_status take_all(core_safetensors *parsed, ckpt_header *out) {
  out->list = calloc((size_t)parsed->count + 1, sizeof *out->list);
  CHECK(out->list, CORE_ERR_MEMORY, "no memory for %d tensors", parsed->count);
  for (int32_t i = 0; i < parsed->count; i++) {
    TRY(take(&parsed->list[i], &out->list[i]));
    out->count++;
  }
  return CORE_OK;
}

core_status ckpt_header_parse_priv(const char *text, int64_t length, int64_t room, ckpt_header *out) {
  core_safetensors parsed;
  *out = (ckpt_header){0};
  TRY(core_safetensors_parse(text, length, room, &parsed));
  core_status status = take_all(&parsed, out);
  core_safetensors_free(&parsed);
  if (status == CORE_OK) return CORE_OK;
  ckpt_header_free_priv(out);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

void ckpt_header_free_priv(ckpt_header *header) {
  for (int32_t i = 0; i < header->count; i++) free((char *)(uintptr_t)header->list[i].name);
  free(header->list);
  *header = (ckpt_header){0};
}
