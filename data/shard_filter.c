/* Outline: undoing single filters; running a pipeline backwards through two scratch buffers; the zstd filter
 * class that HDF5 itself calls for the small datasets and on writing. */
#include "data/filter_impl.h"

#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "data/memory_impl.h"

/* No chunk of HDF5 can be larger than 4 GiB; what we accept is far below. A frame that claims more is a lie.
 */
static const unsigned long long most_frame_bytes = 1ull << 30;

struct data_decoder {
  data_inflater *inflater;
  ZSTD_DCtx *zstd;
  uint8_t *scratch[2];
  int64_t capacity; /* of each */
  data_decoder_use use;
  int64_t element; /* of what was decoded last, if its largest byte is known; else 0 */
  uint8_t largest; /* of the last bytes of its elements, without their highest bit */
};

const char *data_filter_name_priv(int32_t id) {
  switch (id) {
    case DATA_FILTER_ID_DEFLATE:
      return "gzip";
    case DATA_FILTER_ID_SHUFFLE:
      return "shuffle";
    case DATA_FILTER_ID_FLETCHER:
      return "checksum";
    case DATA_FILTER_ID_ZSTD:
      return "zstd";
    default:
      return NULL;
  }
}

void data_pipeline_text_priv(const data_pipeline *pipeline, char *text, size_t capacity) {
  int used = snprintf(text, capacity, "%s", pipeline->count == 0 ? "none" : "");
  for (int32_t i = 0; i < pipeline->count && used >= 0 && (size_t)used < capacity; ++i)
    used += snprintf(text + used, capacity - (size_t)used, "%s%s", i > 0 ? "+" : "",
                     data_filter_name_priv(pipeline->id[i]));
}

int64_t data_stored_most_priv(int64_t bytes) {
  return bytes + bytes / 8 + 4096;
}

int64_t data_decoder_bytes_priv(const data_decoder *decoder) {
  return (int64_t)sizeof *decoder + 2 * decoder->capacity + (int64_t)ZSTD_sizeof_DCtx(decoder->zstd) +
         data_inflater_bytes_priv();
}

core_status data_decoder_create_priv(int64_t largest, data_decoder_use use, data_decoder **out) {
  core_status status = CORE_OK;
  data_decoder *decoder = NULL;
  *out = NULL;
  TRY(DATA_ALLOCATE(1, "decoder", &decoder));
  decoder->capacity = data_stored_most_priv(largest);
  decoder->use = use;
  for (int i = 0; i < 2; ++i)
    TRY_OUT(DATA_ALLOCATE(decoder->capacity, "decoder", &decoder->scratch[i]), fail);
  TRY_OUT(data_inflater_create_priv(&decoder->inflater), fail);
  decoder->zstd = ZSTD_createDCtx();
  if (decoder->zstd == NULL) {
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for a decompressor");
    goto fail;
  }
  *out = decoder;
  return CORE_OK;
fail:
  data_decoder_destroy_priv(decoder);
  return status;
}

void data_decoder_destroy_priv(data_decoder *decoder) {
  if (decoder == NULL) return;
  data_inflater_destroy_priv(decoder->inflater);
  (void)ZSTD_freeDCtx(decoder->zstd);
  free(decoder->scratch[0]);
  free(decoder->scratch[1]);
  free(decoder);
}

static core_status undo_zstd(data_decoder *decoder, const uint8_t *in, int64_t in_bytes, uint8_t *out,
                             int64_t capacity, int64_t *produced) {
  size_t result = ZSTD_decompressDCtx(decoder->zstd, out, (size_t)capacity, in, (size_t)in_bytes);
  CHECK(!ZSTD_isError(result), CORE_ERR_CORRUPT, "zstd data are damaged (%s)", ZSTD_getErrorName(result));
  *produced = (int64_t)result;
  return CORE_OK;
}

/* Byte k of every element lies in plane k; bytes beyond the last whole element follow unchanged. */
static core_status undo_shuffle(data_decoder *decoder, int64_t element, bool last, const uint8_t *in,
                                int64_t in_bytes, uint8_t *out, int64_t capacity, int64_t *produced) {
  CHECK(in_bytes <= capacity, CORE_ERR_CORRUPT, "shuffled data of %lld bytes, expected at most %lld",
        (long long)in_bytes, (long long)capacity);
  CHECK(element >= 1, CORE_ERR_CORRUPT, "the shuffle filter says that a value has %lld bytes",
        (long long)element);
  const int64_t count = in_bytes / element;
  if (last && decoder->use == DATA_DECODED_FOR_LATER) {
    decoder->largest = data_unshuffle_past_priv(element, in, count, out);
    decoder->element = element;
  } else {
    data_unshuffle_priv(element, in, count, out);
  }
  memcpy(out + count * element, in + count * element, (size_t)(in_bytes - count * element));
  *produced = in_bytes;
  return CORE_OK;
}

/* Over big-endian 16-bit words, an odd last byte being the high one. */
uint32_t data_checksum_priv(const uint8_t *bytes, int64_t count) {
  enum { WORDS = 360 }; /* before the sums are folded, so that they do not overflow */
  uint32_t low = 0, high = 0;
  for (int64_t at = 0; at + 1 < count;) {
    const int64_t end = count - at > 2 * WORDS ? at + 2 * WORDS : count - count % 2;
    for (; at < end; at += 2) {
      low += (uint32_t)bytes[at] << 8 | bytes[at + 1];
      high += low;
    }
    low = (low & 0xffff) + (low >> 16);
    high = (high & 0xffff) + (high >> 16);
  }
  if (count % 2 != 0) {
    low += (uint32_t)bytes[count - 1] << 8;
    high += low;
    low = (low & 0xffff) + (low >> 16);
    high = (high & 0xffff) + (high >> 16);
  }
  return ((high & 0xffff) + (high >> 16)) << 16 | ((low & 0xffff) + (low >> 16));
}

bool data_pipeline_is_checksum_priv(const data_pipeline *pipeline, uint32_t skipped) {
  return pipeline->count == 1 && pipeline->id[0] == DATA_FILTER_ID_FLETCHER && (skipped & 1) == 0;
}

core_status data_checksum_verify_priv(const uint8_t *bytes, int64_t count,
                                      const uint8_t stored[DATA_CHECKSUM_BYTES]) {
  const uint32_t expected =
      (uint32_t)stored[3] << 24 | (uint32_t)stored[2] << 16 | (uint32_t)stored[1] << 8 | stored[0];
  const uint32_t sum = data_checksum_priv(bytes, count);
  CHECK(sum == expected, CORE_ERR_CORRUPT, "its checksum is %08x, stored is %08x", sum, expected);
  return CORE_OK;
}

/* The checksum lies behind the data, little-endian. */
static core_status undo_fletcher(const uint8_t *in, int64_t in_bytes, uint8_t *out, int64_t capacity,
                                 int64_t *produced) {
  const int64_t count = in_bytes - DATA_CHECKSUM_BYTES;
  CHECK(count >= 0 && count <= capacity, CORE_ERR_CORRUPT,
        "checksummed data of %lld bytes, expected at most %lld", (long long)in_bytes,
        (long long)capacity + DATA_CHECKSUM_BYTES);
  TRY(data_checksum_verify_priv(in, count, in + count));
  memcpy(out, in, (size_t)count);
  *produced = count;
  return CORE_OK;
}

static core_status undo_one(data_decoder *decoder, int32_t id, uint32_t value, bool last, const uint8_t *in,
                            int64_t in_bytes, uint8_t *out, int64_t capacity, int64_t *produced) {
  switch (id) {
    case DATA_FILTER_ID_DEFLATE:
      return data_inflate_priv(decoder->inflater, in, in_bytes, out, capacity, produced);
    case DATA_FILTER_ID_SHUFFLE:
      return undo_shuffle(decoder, (int64_t)value, last, in, in_bytes, out, capacity, produced);
    case DATA_FILTER_ID_FLETCHER:
      return undo_fletcher(in, in_bytes, out, capacity, produced);
    case DATA_FILTER_ID_ZSTD:
      return undo_zstd(decoder, in, in_bytes, out, capacity, produced);
    default:
      FAIL(CORE_ERR_UNSUPPORTED, "filter %d is not known", id);
  }
}

core_status data_decode_priv(data_decoder *decoder, const data_pipeline *pipeline, uint32_t skipped,
                             const uint8_t *stored, int64_t stored_bytes, uint8_t *out, int64_t bytes) {
  const uint8_t *from = stored;
  int64_t from_bytes = stored_bytes;
  int32_t left = 0;
  decoder->element = 0;
  CHECK(data_stored_most_priv(bytes) <= decoder->capacity, CORE_ERR_INTERNAL,
        "chunk of %lld bytes beyond the plan", (long long)bytes);
  for (int32_t i = 0; i < pipeline->count; ++i) left += (skipped >> i & 1) == 0;
  /* Compressors are skipped when they do not shrink a chunk. Shuffling never is, unless everything is: a lone
   * bit is damage, and nothing else would notice it. */
  for (int32_t i = 0; i < pipeline->count && left > 0; ++i)
    CHECK(pipeline->id[i] != DATA_FILTER_ID_SHUFFLE || (skipped >> i & 1) == 0, CORE_ERR_CORRUPT,
          "it says that its bytes are not shuffled");
  for (int32_t i = pipeline->count - 1; i >= 0; --i) {
    if ((skipped >> i & 1) != 0) continue;
    const bool last = --left == 0;
    uint8_t *to = last ? out : decoder->scratch[left & 1];
    TRY(undo_one(decoder, pipeline->id[i], pipeline->value[i], last, from, from_bytes, to,
                 last ? bytes : decoder->capacity, &from_bytes));
    from = to;
  }
  CHECK(from_bytes == bytes, CORE_ERR_CORRUPT, "it decompresses to %lld bytes, expected %lld",
        (long long)from_bytes, (long long)bytes);
  if (from != out) memcpy(out, from, (size_t)bytes);
  return CORE_OK;
}

bool data_decoder_saw_finite_priv(const data_decoder *decoder, core_dtype dtype) {
  const uint8_t exponent = dtype == CORE_FLOAT16 ? 0x7c : 0x7f; /* its bits in the last byte, all ones */
  return decoder->element == (int64_t)core_dtype_size(dtype) && decoder->largest < exponent;
}

/* ---- the filter class for HDF5: each chunk is one zstd frame, the level is the first client value ---- */

static size_t swap_buffer(void *fresh, size_t used, size_t capacity, size_t *buffer_bytes, void **buffer) {
  H5free_memory(*buffer);
  *buffer = fresh;
  *buffer_bytes = capacity;
  return used;
}

static size_t zstd_backward(size_t bytes, size_t *buffer_bytes, void **buffer) {
  const unsigned long long claimed = ZSTD_getFrameContentSize(*buffer, bytes);
  if (claimed == ZSTD_CONTENTSIZE_ERROR || claimed == ZSTD_CONTENTSIZE_UNKNOWN || claimed > most_frame_bytes)
    return 0;
  const size_t capacity = claimed > 0 ? (size_t)claimed : 1;
  void *fresh = H5allocate_memory(capacity, 0);
  if (fresh == NULL) return 0;
  const size_t used = ZSTD_decompress(fresh, capacity, *buffer, bytes);
  if (ZSTD_isError(used) || used != claimed) {
    H5free_memory(fresh);
    return 0;
  }
  return swap_buffer(fresh, used, capacity, buffer_bytes, buffer);
}

/* With the frame's own checksum, which any reader of zstd verifies. */
static size_t compress_checked(void *out, size_t capacity, const void *in, size_t bytes, int level) {
  ZSTD_CCtx *context = ZSTD_createCCtx();
  size_t used = 0;
  if (context == NULL) return 0;
  const bool set = !ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level)) &&
                   !ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1));
  if (set) used = ZSTD_compress2(context, out, capacity, in, bytes);
  (void)ZSTD_freeCCtx(context);
  return ZSTD_isError(used) ? 0 : used;
}

static size_t zstd_forward(int level, size_t bytes, size_t *buffer_bytes, void **buffer) {
  const size_t capacity = ZSTD_compressBound(bytes) + 4; /* its checksum */
  void *fresh = H5allocate_memory(capacity, 0);
  if (fresh == NULL) return 0;
  const size_t used = compress_checked(fresh, capacity, *buffer, bytes, level);
  if (used == 0) {
    H5free_memory(fresh);
    return 0;
  }
  return swap_buffer(fresh, used, capacity, buffer_bytes, buffer);
}

static size_t zstd_filter(unsigned flags, size_t value_count, const unsigned values[], size_t bytes,
                          size_t *buffer_bytes, void **buffer) {
  if ((flags & H5Z_FLAG_REVERSE) != 0) return zstd_backward(bytes, buffer_bytes, buffer);
  return zstd_forward(value_count > 0 ? (int)values[0] : ZSTD_CLEVEL_DEFAULT, bytes, buffer_bytes, buffer);
}

core_status data_filter_register_priv(void) {
  static const H5Z_class2_t zstd_class = {
      H5Z_CLASS_T_VERS, DATA_FILTER_ID_ZSTD, 1, 1, "zstd", NULL, NULL, zstd_filter,
  };
  CHECK(H5Zregister(&zstd_class) >= 0, CORE_ERR_INTERNAL, "HDF5 refuses the zstd filter");
  return CORE_OK;
}
