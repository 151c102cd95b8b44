/* Outline: gzip chunks with libdeflate where the build found it, which takes them whole and somewhat more
 * than half of zlib's time; what it does not take goes to zlib, which says what is wrong. */
#include <stdlib.h>
#include <zlib.h>

#include "data/filter_impl.h"
#include "data/memory_impl.h"
#ifdef ANTIPHON_LIBDEFLATE
#include <libdeflate.h>
#endif

struct data_inflater {
  z_stream zlib;
  bool ready;
#ifdef ANTIPHON_LIBDEFLATE
  struct libdeflate_decompressor *whole;
#endif
};

#ifdef ANTIPHON_LIBDEFLATE

enum { WHOLE_BYTES = 16 * 1024 }; /* its tables */

static bool open_whole(data_inflater *inflater) {
  inflater->whole = libdeflate_alloc_decompressor();
  return inflater->whole != NULL;
}

static void close_whole(data_inflater *inflater) {
  libdeflate_free_decompressor(inflater->whole);
}

static bool inflate_whole(const data_inflater *inflater, const uint8_t *in, int64_t in_bytes, uint8_t *out,
                          int64_t capacity, int64_t *produced) {
  size_t bytes = 0;
  if (libdeflate_zlib_decompress(inflater->whole, in, (size_t)in_bytes, out, (size_t)capacity, &bytes) !=
      LIBDEFLATE_SUCCESS)
    return false;
  *produced = (int64_t)bytes;
  return true;
}

#else

enum { WHOLE_BYTES = 0 };

static bool open_whole(const data_inflater *inflater) {
  (void)inflater;
  return true;
}

static void close_whole(const data_inflater *inflater) {
  (void)inflater;
}

static bool inflate_whole(const data_inflater *inflater, const uint8_t *in, int64_t in_bytes,
                          const uint8_t *out, int64_t capacity, const int64_t *produced) {
  (void)inflater, (void)in, (void)in_bytes, (void)out, (void)capacity, (void)produced;
  return false;
}

#endif

int64_t data_inflater_bytes_priv(void) {
  enum { WINDOW_AND_TABLES = 40 * 1024 }; /* as zlib documents them */
  return (int64_t)sizeof(data_inflater) + WINDOW_AND_TABLES + WHOLE_BYTES;
}

core_status data_inflater_create_priv(data_inflater **out) {
  data_inflater *inflater = NULL;
  *out = NULL;
  TRY(DATA_ALLOCATE(1, "decoder", &inflater));
  inflater->ready = inflateInit(&inflater->zlib) == Z_OK;
  if (inflater->ready && open_whole(inflater)) {
    *out = inflater;
    return CORE_OK;
  }
  data_inflater_destroy_priv(inflater);
  FAIL(CORE_ERR_MEMORY, "no memory for a decompressor");
}

void data_inflater_destroy_priv(data_inflater *inflater) {
  if (inflater == NULL) return;
  if (inflater->ready) (void)inflateEnd(&inflater->zlib);
  close_whole(inflater);
  free(inflater);
}

core_status data_inflate_priv(data_inflater *inflater, const uint8_t *in, int64_t in_bytes, uint8_t *out,
                              int64_t capacity, int64_t *produced) {
  z_stream *z = &inflater->zlib;
  if (inflate_whole(inflater, in, in_bytes, out, capacity, produced)) return CORE_OK;
  CHECK(inflateReset(z) == Z_OK, CORE_ERR_INTERNAL, "zlib cannot be reset");
  CHECK(in_bytes <= UINT32_MAX && capacity <= UINT32_MAX, CORE_ERR_CORRUPT, "a gzip chunk of %lld bytes",
        (long long)in_bytes);
  z->next_in = (uint8_t *)(uintptr_t)in;
  z->avail_in = (uInt)in_bytes;
  z->next_out = out;
  z->avail_out = (uInt)capacity;
  int result = inflate(z, Z_FINISH);
  CHECK(result == Z_STREAM_END, CORE_ERR_CORRUPT, "gzip data are damaged (%s)",
        z->msg != NULL          ? z->msg
        : z->avail_out == 0     ? "they hold more than the chunk"
        : result == Z_BUF_ERROR ? "they end too early"
                                : "unknown reason");
  *produced = capacity - (int64_t)z->avail_out;
  return CORE_OK;
}
