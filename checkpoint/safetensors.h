/* Safetensors: the files in which weights are published (github.com/huggingface/safetensors, "Format"):
 * u64 little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
 *
 * A *collection* is one such file, or the shards that an index (model.safetensors.index.json) lists. The
 * files are hostile: every size is checked against the file before memory is taken, every tensor must lie
 * inside the data, all of them together must cover it without holes or overlaps, and no name may come twice.
 * Local: nothing here communicates. */
#ifndef CKPT_SAFETENSORS_H
#define CKPT_SAFETENSORS_H

#include <stdint.h>

#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h"

/* Largest header and index that are read: what it claims is held in memory, some 60 bytes for each byte. */
enum { CKPT_SAFETENSORS_HEADER = 16 << 20, CKPT_SAFETENSORS_NAME = 256, CKPT_SAFETENSORS_FILES = 4096 };

/* ---- reading ---- */

typedef struct ckpt_safetensors ckpt_safetensors;

/* One tensor, described; the names are lent by the collection. */
typedef struct ckpt_safetensor {
  const char *name;
  core_dtype dtype; /* FLOAT32, FLOAT16, BFLOAT16, FLOAT64, INT32, INT64, UINT64 or UINT8 */
  int32_t rank;     /* 0..CORE_MAX_RANK */
  int64_t shape[CORE_MAX_RANK];
  int64_t count; /* elements */
  int32_t file;  /* number of its file */
  int64_t at;    /* first byte in the file */
} ckpt_safetensor;

/* Opens a .safetensors file, an index file (*.json), or a directory that holds model.safetensors or
 * model.safetensors.index.json, and checks the headers of all files; no data are read. Errors name file and
 * tensor: ERR_NOT_FOUND, ERR_IO, ERR_FORMAT (no such file or no such header), ERR_CORRUPT (the header lies),
 * ERR_MISMATCH (index and shards differ), ERR_UNSUPPORTED (a dtype or rank that is not read). */
CORE_NODISCARD core_status ckpt_safetensors_open(const char *path, ckpt_safetensors **out);
void ckpt_safetensors_close(ckpt_safetensors *collection); /* NULL is allowed */
/* Tensors are ordered by name (bytes). */
int32_t ckpt_safetensors_count(const ckpt_safetensors *collection);
const ckpt_safetensor *ckpt_safetensors_at(const ckpt_safetensors *collection, int32_t i);
const ckpt_safetensor *ckpt_safetensors_find(const ckpt_safetensors *collection, const char *name);
/* File of a tensor, for messages. */
const char *ckpt_safetensors_path(const ckpt_safetensors *collection, const ckpt_safetensor *tensor);
/* Elements [first, first + count) of a tensor of FLOAT32, FLOAT16 or BFLOAT16, exactly, as core_real [count].
 * Errors: ERR_ARGUMENT outside the tensor, ERR_UNSUPPORTED another dtype, ERR_NON_FINITE (NaN or infinity,
 * naming the element), those of reading. */
CORE_NODISCARD core_status ckpt_safetensors_read(const ckpt_safetensors *collection,
                                                 const ckpt_safetensor *tensor, int64_t first, int64_t count,
                                                 core_real *out);

/* ---- writing ---- */

typedef struct ckpt_safetensors_source {
  char name[CKPT_SAFETENSORS_NAME];
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
  const core_real *data; /* host, all elements; borrowed */
} ckpt_safetensors_source;

/* Writes all tensors, in this order, as `dtype` (FLOAT32, FLOAT16 or BFLOAT16; rounded to nearest even) and
 * under their final name only when everything is on the disk: temporary file, fsync, rename, fsync of the
 * directory. metadata: pairs "key", "value", ..., NULL, for the header's __metadata__; NULL: none. On failure
 * nothing is left and what was there before is untouched (but when only the last sync, of the directory,
 * fails, the new file stands). Errors: ERR_ARGUMENT (a name twice), ERR_IO,
 * ERR_NON_FINITE (a value that `dtype` cannot hold, naming tensor and element). */
CORE_NODISCARD core_status ckpt_safetensors_write(const char *path, const ckpt_safetensors_source *list,
                                                  int32_t count, core_dtype dtype,
                                                  const char *const *metadata);

#endif
