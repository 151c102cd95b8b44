/* A shard being written. Private to data/. */
#ifndef DATA_WRITER_IMPL_H
#define DATA_WRITER_IMPL_H

#include "data/encode_impl.h"
#include "data/memory_impl.h"
#include "data/shard_impl.h"

typedef struct token_column {
  bool given;
  data_bytes token;  /* int32 */
  data_bytes offset; /* uint64, after each sample */
} token_column;

struct data_writer {
  char modality[CORE_NAME], encoder[CORE_NAME], origin[CORE_NAME];
  core_dtype dtype;
  data_filter filter;
  int32_t level;
  char *directory, *path, *temporary;
  hid_t file, latent;
  int64_t width, row_bytes, chunk_rows;
  uint8_t *chunk;      /* [chunk_rows, width] stored values */
  int64_t stored_rows; /* of a chunk in the file: fewer in a shard that never fills one */
  data_encoder *compressor;
  int64_t pending, rows, samples;
  data_bytes id, offset, label;
  bool labelled, keyed;
  bool created;   /* the temporary file exists */
  bool failed;    /* a sample was taken in half: the shard must not be published */
  data_bytes key; /* NUL-terminated, one after another */
  token_column prompt, target;
};

/* Attributes and all columns but the latents into the open file. Says only whether it went well; the reason
 * is HDF5's. Inside HDF5. */
bool data_writer_put_columns_priv(const data_writer *writer);

#endif
