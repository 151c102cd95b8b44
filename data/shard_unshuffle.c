/* Outline: byte planes back into elements, in stretches whose planes stay in the processor's first cache: the
 * elements, past the caches where nobody will read them soon, and the largest byte of the last plane. */
#include "data/filter_impl.h"

#if defined __SSE2__ /* of every x86-64 */
#include <immintrin.h>
#endif

enum { STRETCH = 4096, MAGNITUDE = 0x7f };

static void join_2(const uint8_t *restrict in, int64_t planes, int64_t count, uint8_t *restrict out) {
  const uint8_t *restrict high = in + planes;
  for (int64_t i = 0; i < count; ++i) {
    out[2 * i] = in[i];
    out[2 * i + 1] = high[i];
  }
}

static void join_4(const uint8_t *restrict in, int64_t planes, int64_t count, uint8_t *restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[4 * i] = in[i];
    out[4 * i + 1] = in[planes + i];
    out[4 * i + 2] = in[2 * planes + i];
    out[4 * i + 3] = in[3 * planes + i];
  }
}

static void join_any(int64_t element, const uint8_t *restrict in, int64_t planes, int64_t count,
                     uint8_t *restrict out) {
  for (int64_t k = 0; k < element; ++k)
    for (int64_t i = 0; i < count; ++i) out[i * element + k] = in[k * planes + i];
}

#if defined __SSE2__

/* Of count, how many elements were written: whole vectors. A store that goes past the caches need not fetch
 * the line that it overwrites, which is a third of the traffic, and leaves the caches to what is read next.
 */
static int64_t join_2_past(const uint8_t *restrict in, int64_t planes, int64_t count, uint8_t *restrict out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(in + i)),
                  high = _mm_loadu_si128((const __m128i *)(const void *)(in + planes + i));
    __m128i *to = (__m128i *)(void *)(out + 2 * i);
    _mm_stream_si128(to, _mm_unpacklo_epi8(low, high));
    _mm_stream_si128(to + 1, _mm_unpackhi_epi8(low, high));
  }
  return i;
}

static int64_t join_4_past(const uint8_t *restrict in, int64_t planes, int64_t count, uint8_t *restrict out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m128i plane[4], *to = (__m128i *)(void *)(out + 4 * i);
    for (int64_t k = 0; k < 4; ++k)
      plane[k] = _mm_loadu_si128((const __m128i *)(const void *)(in + k * planes + i));
    const __m128i low_0 = _mm_unpacklo_epi8(plane[0], plane[1]),
                  high_0 = _mm_unpackhi_epi8(plane[0], plane[1]),
                  low_1 = _mm_unpacklo_epi8(plane[2], plane[3]),
                  high_1 = _mm_unpackhi_epi8(plane[2], plane[3]);
    _mm_stream_si128(to, _mm_unpacklo_epi16(low_0, low_1));
    _mm_stream_si128(to + 1, _mm_unpackhi_epi16(low_0, low_1));
    _mm_stream_si128(to + 2, _mm_unpacklo_epi16(high_0, high_1));
    _mm_stream_si128(to + 3, _mm_unpackhi_epi16(high_0, high_1));
  }
  return i;
}

static int64_t join_past(int64_t element, const uint8_t *in, int64_t planes, int64_t count, uint8_t *out) {
  if ((uintptr_t)out % sizeof(__m128i) != 0) return 0;
  return element == 2   ? join_2_past(in, planes, count, out)
         : element == 4 ? join_4_past(in, planes, count, out)
                        : 0;
}

/* Such stores are in no order with others until this one: not with that of a lock either. */
static void settle(void) {
  _mm_sfence();
}

#else

static int64_t join_past(int64_t element, const uint8_t *in, int64_t planes, int64_t count, uint8_t *out) {
  (void)element, (void)in, (void)planes, (void)count, (void)out;
  return 0;
}

static void settle(void) {}

#endif

static void join(int64_t element, const uint8_t *in, int64_t planes, int64_t count, uint8_t *out) {
  if (element == 2)
    join_2(in, planes, count, out);
  else if (element == 4)
    join_4(in, planes, count, out);
  else
    join_any(element, in, planes, count, out);
}

static uint8_t largest(const uint8_t *plane, int64_t count) {
  uint8_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t magnitude = plane[i] & MAGNITUDE;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

void data_unshuffle_priv(int64_t element, const uint8_t *in, int64_t count, uint8_t *out) {
  join(element, in, count, count, out);
}

uint8_t data_unshuffle_past_priv(int64_t element, const uint8_t *in, int64_t count, uint8_t *out) {
  uint8_t most = 0;
  for (int64_t at = 0; at < count; at += STRETCH) {
    const int64_t some = count - at < STRETCH ? count - at : STRETCH;
    const int64_t done = join_past(element, in + at, count, some, out + at * element);
    join(element, in + at + done, count, some - done, out + (at + done) * element);
    const uint8_t here = largest(in + (element - 1) * count + at, some);
    most = here > most ? here : most;
  }
  settle();
  return most;
}
