/* Outline: the filters of a shard's latents, done outside HDF5 as they are undone, so that several shards are
 * compressed at once. What comes out is byte for byte what HDF5 would make with the same libraries. */
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "data/encode_impl.h"
#include "data/memory_impl.h"

struct data_encoder {
  data_filter filter;
  int32_t level;
  int64_t element, capacity;
  ZSTD_CCtx *zstd;
  uint8_t *shuffled, *out;
};

int32_t data_encoder_level_priv(data_filter filter, int32_t level) {
  enum { GZIP_LEVEL = 6, ZSTD_LEVEL = 3 };
  return level > 0 ? level : filter >= DATA_FILTER_ZSTD ? ZSTD_LEVEL : GZIP_LEVEL;
}

core_status data_encoder_create_priv(data_filter filter, int32_t level, int64_t element, int64_t largest,
                                     data_encoder **out) {
  core_status status = CORE_OK;
  data_encoder *encoder = NULL;
  *out = NULL;
  TRY(DATA_ALLOCATE(1, "encoder", &encoder));
  encoder->filter = filter;
  encoder->level = data_encoder_level_priv(filter, level);
  encoder->element = element;
  const size_t deflated = compressBound((uLong)largest), framed = ZSTD_compressBound((size_t)largest) + 4;
  encoder->capacity = (int64_t)(deflated > framed ? deflated : framed) + DATA_CHECKSUM_BYTES;
  TRY_OUT(DATA_ALLOCATE(largest, "encoder", &encoder->shuffled), fail);
  TRY_OUT(DATA_ALLOCATE(encoder->capacity, "encoder", &encoder->out), fail);
  encoder->zstd = ZSTD_createCCtx();
  const bool set =
      encoder->zstd != NULL &&
      !ZSTD_isError(ZSTD_CCtx_setParameter(encoder->zstd, ZSTD_c_compressionLevel, encoder->level)) &&
      !ZSTD_isError(ZSTD_CCtx_setParameter(encoder->zstd, ZSTD_c_checksumFlag, 1));
  if (!set)
    TRY_OUT(core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for zstd"), fail);
  *out = encoder;
  return CORE_OK;
fail:
  data_encoder_destroy_priv(encoder);
  return status;
}

void data_encoder_destroy_priv(data_encoder *encoder) {
  if (encoder == NULL) return;
  (void)ZSTD_freeCCtx(encoder->zstd);
  free(encoder->shuffled);
  free(encoder->out);
  free(encoder);
}

static void shuffle(int64_t element, const uint8_t *restrict in, int64_t bytes, uint8_t *restrict out) {
  const int64_t count = bytes / element;
  for (int64_t k = 0; k < element; ++k)
    for (int64_t i = 0; i < count; ++i) out[k * count + i] = in[i * element + k];
}

static core_status deflate_all(data_encoder *encoder, const uint8_t *in, int64_t bytes, int64_t *produced) {
  uLongf used = (uLongf)encoder->capacity;
  const int result = compress2(encoder->out, &used, in, (uLong)bytes, encoder->level);
  CHECK(result == Z_OK, CORE_ERR_MEMORY, "gzip fails (%d)", result);
  *produced = (int64_t)used;
  return CORE_OK;
}

static core_status frame_all(data_encoder *encoder, const uint8_t *in, int64_t bytes, int64_t *produced) {
  const size_t used =
      ZSTD_compress2(encoder->zstd, encoder->out, (size_t)encoder->capacity, in, (size_t)bytes);
  CHECK(!ZSTD_isError(used), CORE_ERR_MEMORY, "zstd fails (%s)", ZSTD_getErrorName(used));
  *produced = (int64_t)used;
  return CORE_OK;
}

static void append_checksum(data_encoder *encoder, const uint8_t *in, int64_t bytes, int64_t *produced) {
  const uint32_t sum = data_checksum_priv(in, bytes);
  memcpy(encoder->out, in, (size_t)bytes);
  for (int i = 0; i < DATA_CHECKSUM_BYTES; ++i) encoder->out[bytes + i] = (uint8_t)(sum >> 8 * i);
  *produced = bytes + DATA_CHECKSUM_BYTES;
}

core_status data_encode_priv(data_encoder *encoder, const uint8_t *in, int64_t bytes, const uint8_t **out,
                             int64_t *produced) {
  const data_filter filter = encoder->filter;
  *out = encoder->out;
  if (filter == DATA_FILTER_SHUFFLE_GZIP || filter == DATA_FILTER_SHUFFLE_ZSTD) {
    shuffle(encoder->element, in, bytes, encoder->shuffled);
    in = encoder->shuffled;
  }
  if (filter == DATA_FILTER_NONE)
    append_checksum(encoder, in, bytes, produced);
  else if (filter >= DATA_FILTER_ZSTD)
    TRY(frame_all(encoder, in, bytes, produced));
  else
    TRY(deflate_all(encoder, in, bytes, produced));
  return CORE_OK;
}
