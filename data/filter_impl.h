/* HDF5 filter pipelines, undone outside HDF5: shuffle (2), deflate (1), Fletcher's checksum (3) and zstd
 * (32015) in any order.
 *
 * A pipeline is a plain description read from the file; a decoder is the state of one thread. Private to
 * data/. */
#ifndef DATA_FILTER_IMPL_H
#define DATA_FILTER_IMPL_H

#include <stddef.h>

#include "core/status.h"
#include "core/tensor.h" /* core_dtype */

enum {
  DATA_MAX_FILTERS = 4,
  DATA_FILTER_ID_DEFLATE = 1,
  DATA_FILTER_ID_SHUFFLE = 2,
  DATA_FILTER_ID_FLETCHER = 3,
  DATA_FILTER_ID_ZSTD = 32015
};

/* "gzip", "shuffle", "checksum", "zstd"; NULL for any other filter. */
const char *data_filter_name_priv(int32_t id);

/* Filters in the order in which writing applied them. */
typedef struct data_pipeline {
  int32_t count;
  int32_t id[DATA_MAX_FILTERS];
  uint32_t
      value[DATA_MAX_FILTERS]; /* first client value: bytes of an element (shuffle), level (the others) */
} data_pipeline;

/* "none", "shuffle+gzip", ... into text. */
void data_pipeline_text_priv(const data_pipeline *pipeline, char *text, size_t capacity);

/* Most bytes that a sound stored chunk of `bytes` decoded bytes can have: compressors expand what they cannot
 * shrink by well under an eighth. Also the capacity of a decoder's scratch buffers. */
int64_t data_stored_most_priv(int64_t bytes);

/* The stored bytes are the decoded ones, followed by Fletcher's checksum: DATA_CHECKSUM_BYTES. */
enum { DATA_CHECKSUM_BYTES = 4 };
bool data_pipeline_is_checksum_priv(const data_pipeline *pipeline, uint32_t skipped);
/* Fletcher's checksum as HDF5 defines it. */
uint32_t data_checksum_priv(const uint8_t *bytes, int64_t count);
/* ERR_CORRUPT unless `stored` is the checksum of `bytes`. */
CORE_NODISCARD core_status data_checksum_verify_priv(const uint8_t *bytes, int64_t count,
                                                     const uint8_t stored[DATA_CHECKSUM_BYTES]);

typedef struct data_decoder data_decoder;

/* Who reads what is decoded: this thread, at once, from its cache; or another one, later. */
typedef enum data_decoder_use { DATA_DECODED_FOR_NOW, DATA_DECODED_FOR_LATER } data_decoder_use;

/* One per thread. largest: decoded bytes of the largest chunk. All memory is taken here. */
CORE_NODISCARD core_status data_decoder_create_priv(int64_t largest, data_decoder_use use,
                                                    data_decoder **out);
void data_decoder_destroy_priv(data_decoder *decoder);
int64_t data_decoder_bytes_priv(const data_decoder *decoder);

/* Undoes `pipeline` except the filters whose bit is set in `skipped` (HDF5's filter mask of the chunk).
 * Exactly `bytes` bytes must come out. stored and out may not overlap. Errors: ERR_CORRUPT saying what is
 * wrong. */
CORE_NODISCARD core_status data_decode_priv(data_decoder *decoder, const data_pipeline *pipeline,
                                            uint32_t skipped, const uint8_t *stored, int64_t stored_bytes,
                                            uint8_t *out, int64_t bytes);

/* What was decoded last are values of this type, and all are finite: the decoder came to see that none has an
 * exponent of all ones. False: it did not see it, and they have to be searched. Shuffled values
 * DATA_DECODED_FOR_LATER are seen; other filters tell nothing. */
bool data_decoder_saw_finite_priv(const data_decoder *decoder, core_dtype dtype);

/* ---- shard_inflate.c ---- */

/* Undoes gzip's filter (zlib's format). State of one thread; all memory is taken at create. */
typedef struct data_inflater data_inflater;
CORE_NODISCARD core_status data_inflater_create_priv(data_inflater **out);
void data_inflater_destroy_priv(data_inflater *inflater); /* NULL is allowed */
int64_t data_inflater_bytes_priv(void);
/* ERR_CORRUPT, saying what is wrong; what is in `out` is then undefined. */
CORE_NODISCARD core_status data_inflate_priv(data_inflater *inflater, const uint8_t *in, int64_t in_bytes,
                                             uint8_t *out, int64_t capacity, int64_t *produced);

/* ---- shard_unshuffle.c ---- */

/* Undoes the shuffle filter: byte k of element i lies at in[k * count + i]. in: [element * count], out: the
 * same, not aliased. */
void data_unshuffle_priv(int64_t element, const uint8_t *in, int64_t count, uint8_t *out);
/* The same for elements that are read much later: they go to memory past the caches. Returns the largest of
 * the elements' last bytes without their highest bit: of little-endian numbers, without the sign. */
uint8_t data_unshuffle_past_priv(int64_t element, const uint8_t *in, int64_t count, uint8_t *out);

/* Makes zstd known to HDF5 as filter 32015. The caller holds HDF5. */
CORE_NODISCARD core_status data_filter_register_priv(void);

#endif
