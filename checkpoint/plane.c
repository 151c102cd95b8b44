/* Block codec. A floating-point block is rotated left by one bit (the sign goes to the low end, so that the
 * exponent fills whole bytes at the high end), split into byte planes, and each plane is compressed alone:
 * the exponents have 2 to 3 bits of entropy and the mantissas none, and zstd finds that out only when they
 * are apart. Level 1 is the best level for such planes: there are no matches to search for, and it reaches
 * Huffman coding soonest. */
#include <string.h>
#include <xxhash.h>

#include "checkpoint/checkpoint_impl.h"

enum { PROBE_STRIPS = 4, PROBE_STRIP = 2048, PROBE = PROBE_STRIPS * PROBE_STRIP };
enum { PLANE_MATCH = 7, PLANE_HASH_LOG = 8 };

int32_t ckpt_plane_count(core_dtype dtype) {
  switch (dtype) {
    case CORE_FLOAT32:
    case CORE_BFLOAT16:
    case CORE_FLOAT16:
    case CORE_FLOAT64:
      return (int32_t)core_dtype_size(dtype);
    default:
      return 1;
  }
}

size_t ckpt_entry_bytes(const ckpt_entry *entry) {
  size_t sum = 0;
  for (int p = 0; p < CKPT_PLANES; p++) sum += entry->size[p];
  return sum;
}

core_status ckpt_codec_open(ckpt_codec *codec, int32_t level, uint8_t *plane) {
  *codec = (ckpt_codec){.compress = ZSTD_createCCtx(), .decompress = ZSTD_createDCtx(), .plane = plane};
  if (codec->compress == NULL || codec->decompress == NULL) {
    ckpt_codec_close(codec);
    FAIL(CORE_ERR_MEMORY, "no memory for a zstd context");
  }
  codec->level = level;
  size_t level_set = ZSTD_CCtx_setParameter(codec->compress, ZSTD_c_compressionLevel, level);
  size_t checksum_set = ZSTD_CCtx_setParameter(codec->compress, ZSTD_c_checksumFlag, 1);
  if (ZSTD_isError(level_set) || ZSTD_isError(checksum_set)) {
    ckpt_codec_close(codec);
    FAIL(CORE_ERR_ARGUMENT, "zstd refuses compression level %d", level);
  }
  return CORE_OK;
}

void ckpt_codec_close(ckpt_codec *codec) {
  (void)ZSTD_freeCCtx(codec->compress);
  (void)ZSTD_freeDCtx(codec->decompress);
  codec->compress = NULL;
  codec->decompress = NULL;
}

/* Exponents repeat by chance, and a short match costs more than the Huffman codes it replaces: with the least
 * hash table and long matches only, zstd is three times as fast and 5 % smaller on them, and still finds
 * runs. 0 is the level's own choice. */
static void tune(ckpt_codec *codec, int32_t planes) {
  bool exponents = planes > 1 && codec->level == 1;
  (void)ZSTD_CCtx_setParameter(codec->compress, ZSTD_c_minMatch, exponents ? PLANE_MATCH : 0);
  (void)ZSTD_CCtx_setParameter(codec->compress, ZSTD_c_hashLog, exponents ? PLANE_HASH_LOG : 0);
}

/* ---- splitting; element access by memcpy because the memory belongs to other types ---- */

static void split_2(const uint8_t *restrict raw, size_t count, uint8_t *restrict plane) {
  for (size_t i = 0; i < count; i++) {
    uint16_t word;
    memcpy(&word, raw + 2 * i, 2);
    word = (uint16_t)(word << 1 | word >> 15);
    plane[i] = (uint8_t)word;
    plane[count + i] = (uint8_t)(word >> 8);
  }
}

static void split_4(const uint8_t *restrict raw, size_t count, uint8_t *restrict plane) {
  for (size_t i = 0; i < count; i++) {
    uint32_t word;
    memcpy(&word, raw + 4 * i, 4);
    word = word << 1 | word >> 31;
    plane[i] = (uint8_t)word;
    plane[count + i] = (uint8_t)(word >> 8);
    plane[2 * count + i] = (uint8_t)(word >> 16);
    plane[3 * count + i] = (uint8_t)(word >> 24);
  }
}

static void split_8(const uint8_t *restrict raw, size_t count, uint8_t *restrict plane) {
  for (size_t i = 0; i < count; i++) {
    uint64_t word;
    memcpy(&word, raw + 8 * i, 8);
    word = word << 1 | word >> 63;
    for (size_t p = 0; p < 8; p++) plane[p * count + i] = (uint8_t)(word >> (8 * p));
  }
}

static void merge_2(const uint8_t *const *plane, size_t count, uint8_t *restrict raw) {
  const uint8_t *restrict low = plane[0], *restrict high = plane[1];
  for (size_t i = 0; i < count; i++) {
    uint16_t word = (uint16_t)(low[i] | high[i] << 8);
    word = (uint16_t)(word >> 1 | word << 15);
    memcpy(raw + 2 * i, &word, 2);
  }
}

static void merge_4(const uint8_t *const *plane, size_t count, uint8_t *restrict raw) {
  const uint8_t *restrict p0 = plane[0], *restrict p1 = plane[1];
  const uint8_t *restrict p2 = plane[2], *restrict p3 = plane[3];
  for (size_t i = 0; i < count; i++) {
    uint32_t word = p0[i] | (uint32_t)p1[i] << 8 | (uint32_t)p2[i] << 16 | (uint32_t)p3[i] << 24;
    word = word >> 1 | word << 31;
    memcpy(raw + 4 * i, &word, 4);
  }
}

static void merge_8(const uint8_t *const *plane, size_t count, uint8_t *restrict raw) {
  for (size_t i = 0; i < count; i++) {
    uint64_t word = 0;
    for (int p = 0; p < 8; p++) word |= (uint64_t)plane[p][i] << (8 * p);
    word = word >> 1 | word << 63;
    memcpy(raw + 8 * i, &word, 8);
  }
}

/* ---- encoding ---- */

/* True when strips from four places, compressed together, shrink: trying a mantissa plane in vain costs more
 * than all the rest of the block, and the strips are short because they are tried in vain as well. */
static bool worth_compressing(ckpt_codec *codec, const uint8_t *plane, size_t bytes, uint8_t *out) {
  if (bytes <= PROBE) return true;
  uint8_t strips[PROBE];
  for (size_t s = 0; s < PROBE_STRIPS; s++) {
    memcpy(strips + s * PROBE_STRIP, plane + s * ((bytes - PROBE_STRIP) / (PROBE_STRIPS - 1)), PROBE_STRIP);
  }
  size_t size = ZSTD_compress2(codec->compress, out, ZSTD_compressBound(PROBE), strips, PROBE);
  return !ZSTD_isError(size) && size + PROBE / 64 < PROBE;
}

/* Appends one plane at *out; returns its stored size, or a zstd error. */
static size_t encode_plane(ckpt_codec *codec, const uint8_t *plane, size_t bytes, bool probe, uint8_t *out) {
  if (!probe || worth_compressing(codec, plane, bytes, out)) {
    size_t size = ZSTD_compress2(codec->compress, out, ZSTD_compressBound(bytes), plane, bytes);
    if (ZSTD_isError(size) || size < bytes) return size;
  }
  memcpy(out, plane, bytes);
  return bytes;
}

core_status ckpt_block_encode(ckpt_codec *codec, core_dtype dtype, const void *restrict raw, int64_t count,
                              uint8_t *restrict out, ckpt_entry *entry) {
  int32_t planes = ckpt_plane_count(dtype);
  size_t raw_bytes = (size_t)count * core_dtype_size(dtype), bytes = raw_bytes / (size_t)planes;
  *entry = (ckpt_entry){.raw_hash = XXH64(raw, raw_bytes, 0)};
  const uint8_t *plane = planes == 1 ? raw : codec->plane;
  if (planes == 2) split_2(raw, (size_t)count, codec->plane);
  if (planes == 4) split_4(raw, (size_t)count, codec->plane);
  if (planes == 8) split_8(raw, (size_t)count, codec->plane);
  tune(codec, planes);
  size_t used = 0;
  for (int32_t p = 0; p < planes; p++) {
    size_t size = encode_plane(codec, plane + (size_t)p * bytes, bytes, p < planes - 1, out + used);
    CHECK(!ZSTD_isError(size), CORE_ERR_INTERNAL, "zstd cannot compress a block: %s",
          ZSTD_getErrorName(size));
    entry->size[p] = (uint32_t)size;
    used += size;
  }
  entry->stored_hash = XXH64(out, used, 0);
  return CORE_OK;
}

/* ---- decoding ---- */

/* Points *plane at the plane's bytes: in the stored block when stored as they are, else in the scratch. */
static core_status decode_plane(ckpt_codec *codec, const uint8_t *stored, size_t size, size_t bytes,
                                uint8_t *target, const uint8_t **plane) {
  *plane = stored;
  if (size == bytes) return CORE_OK;
  size_t got = ZSTD_decompressDCtx(codec->decompress, target, bytes, stored, size);
  CHECK(!ZSTD_isError(got), CORE_ERR_CORRUPT, "zstd: %s", ZSTD_getErrorName(got));
  CHECK(got == bytes, CORE_ERR_CORRUPT, "a plane has %zu bytes, expected %zu", got, bytes);
  *plane = target;
  return CORE_OK;
}

core_status ckpt_block_decode(ckpt_codec *codec, core_dtype dtype, const ckpt_entry *entry,
                              const uint8_t *restrict stored, int64_t count, void *restrict raw) {
  int32_t planes = ckpt_plane_count(dtype);
  size_t raw_bytes = (size_t)count * core_dtype_size(dtype), bytes = raw_bytes / (size_t)planes;
  const uint8_t *plane[CKPT_PLANES] = {NULL};
  uint64_t hash = XXH64(stored, ckpt_entry_bytes(entry), 0);
  CHECK(hash == entry->stored_hash, CORE_ERR_CORRUPT, "stored bytes have hash %016llx, expected %016llx",
        (unsigned long long)hash, (unsigned long long)entry->stored_hash);
  for (int32_t p = 0; p < planes; p++) {
    uint8_t *target = planes == 1 ? raw : codec->plane + (size_t)p * bytes;
    TRY(decode_plane(codec, stored, entry->size[p], bytes, target, &plane[p]));
    stored += entry->size[p];
  }
  if (planes == 1 && plane[0] != raw) memcpy(raw, plane[0], bytes);
  if (planes == 2) merge_2(plane, (size_t)count, raw);
  if (planes == 4) merge_4(plane, (size_t)count, raw);
  if (planes == 8) merge_8(plane, (size_t)count, raw);
  hash = XXH64(raw, raw_bytes, 0);
  CHECK(hash == entry->raw_hash, CORE_ERR_CORRUPT, "elements have hash %016llx, expected %016llx",
        (unsigned long long)hash, (unsigned long long)entry->raw_hash);
  return CORE_OK;
}
