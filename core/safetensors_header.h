/* The header of a safetensors file (github.com/huggingface/safetensors, "Format"): JSON, name -> dtype,
 * shape, data_offsets. It is hostile: every tensor must lie inside the data with as many bytes as its shape
 * needs, all of them together must cover the data without holes or overlaps, and nothing else may be there.
 * Local. */
#ifndef CORE_SAFETENSORS_HEADER_H
#define CORE_SAFETENSORS_HEADER_H

#include "core/status.h"
#include "core/tensor.h"

enum { CORE_SAFETENSORS_NAME = 256 };

typedef struct core_safetensor {
  char *name;    /* malloc'ed */
  char type[16]; /* "F32" and so on, cut */
  int64_t bytes; /* of one number; 0: the type is not known, and its place not compared with its shape */
  int32_t rank;  /* 0..CORE_MAX_RANK */
  int64_t shape[CORE_MAX_RANK]; /* unused entries are 1 */
  int64_t count;                /* elements */
  int64_t begin, end;           /* from the data's first byte */
} core_safetensor;

/* Tensors of one header, in the order of their data. */
typedef struct core_safetensors {
  core_safetensor *list;
  int32_t count;
} core_safetensors;

/* Parses `length` bytes of JSON that describe `room` bytes of data. Errors name the tensor: ERR_FORMAT (no
 * such header), ERR_CORRUPT (it lies), ERR_UNSUPPORTED (too many dimensions), ERR_MEMORY. Free with
 * core_safetensors_free; after an error there is nothing to free. Names may come twice. */
CORE_NODISCARD core_status core_safetensors_parse(const char *text, int64_t length, int64_t room,
                                                  core_safetensors *out);
void core_safetensors_free(core_safetensors *header);

#endif
