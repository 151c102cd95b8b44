/* The header of one safetensors file. Private to checkpoint/. */
#ifndef CKPT_SAFETENSORS_IMPL_H
#define CKPT_SAFETENSORS_IMPL_H

#include "checkpoint/safetensors.h"

/* Tensors of one header, in the order of their data. Owned by the caller: free the names, then the list. */
typedef struct ckpt_header {
  ckpt_safetensor *list; /* names malloc'ed, file 0, `at` counted from the data's first byte */
  int32_t count;
} ckpt_header;

/* Parses `length` bytes of JSON that describe `room` bytes of data. Errors name the tensor. */
CORE_NODISCARD core_status ckpt_header_parse_priv(const char *text, int64_t length, int64_t room,
                                                  ckpt_header *out);
void ckpt_header_free_priv(ckpt_header *header);

/* "F32" and so on; NULL for what has none. */
const char *ckpt_safetensors_text_priv(core_dtype dtype);

#endif
