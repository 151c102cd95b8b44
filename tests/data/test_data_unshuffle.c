/* The shuffle filter, undone: the way past the caches gives the same bytes as the plain one, writes nothing
 * beside them, and a decoder that says that it saw finite values is right. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/filter_impl.h"

enum { MOST = 10000, WIDEST = 8, GUARD = 64 };

static uint8_t stored[MOST * WIDEST], expected[MOST * WIDEST];
static _Alignas(64) uint8_t out[MOST * WIDEST + 2 * GUARD];

/* By the definition: byte k of every element, one after another. */
static void shuffle(int64_t element, const uint8_t *in, int64_t count, uint8_t *to) {
  for (int64_t k = 0; k < element; ++k)
    for (int64_t i = 0; i < count; ++i) *to++ = in[i * element + k];
}

static void fill(uint8_t *bytes, int64_t count, uint32_t seed) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = (uint8_t)((seed = seed * 1664525 + 1013904223) >> 24);
}

static void expect_bytes(const uint8_t *at, int64_t bytes) {
  assert_memory_equal(at, expected, (size_t)bytes);
  for (int64_t i = 1; i <= GUARD / 2; ++i) {
    assert_int_equal(at[-i], 0xee);
    assert_int_equal(at[bytes + i - 1], 0xee);
  }
}

static void elements_come_back(int64_t element, int64_t count, int64_t offset) {
  uint8_t *to = out + GUARD + offset, most = 0;
  fill(expected, element * count, (uint32_t)(element * MOST + count));
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t last = expected[i * element + element - 1] & 0x7f;
    if (last > most) most = last;
  }
  shuffle(element, expected, count, stored);
  memset(out, 0xee, sizeof out);
  data_unshuffle_priv(element, stored, count, to);
  expect_bytes(to, element * count);
  memset(out, 0xee, sizeof out);
  assert_int_equal(data_unshuffle_past_priv(element, stored, count, to), most);
  expect_bytes(to, element * count);
}

static void both_ways_give_the_elements(void **state) {
  const int64_t counts[] = {0, 1, 15, 16, 17, 255, 4095, 4096, 4097, 8200, MOST};
  (void)state;
  for (int64_t element = 1; element <= WIDEST; ++element)
    for (size_t c = 0; c < sizeof counts / sizeof *counts; ++c)
      for (int64_t offset = 0; offset < 2; ++offset) elements_come_back(element, counts[c], offset);
}

/* ---- what a decoder says of the values ---- */

/* Types with the largest finite value whose last byte is below the exponent's, and infinity and a NaN. */
static const struct {
  core_dtype dtype;
  uint32_t finite, bad[2];
} types[] = {
    {CORE_FLOAT16, 0x7bff, {0x7c00, 0xfe01}},
    {CORE_BFLOAT16, 0x7eff, {0x7f80, 0xffc0}},
    {CORE_FLOAT32, 0x7effffff, {0xff800000, 0x7fc00000}},
};

static bool decode_says_finite(data_decoder *decoder, core_dtype dtype, int32_t element, int64_t bytes) {
  const data_pipeline pipeline = {.count = 1, .id = {DATA_FILTER_ID_SHUFFLE}, .value = {(uint32_t)element}};
  shuffle(element, expected, bytes / element, stored);
  memset(out, 0, sizeof out);
  assert_int_equal(data_decode_priv(decoder, &pipeline, 0, stored, bytes, out, bytes), CORE_OK);
  assert_memory_equal(out, expected, (size_t)bytes);
  return data_decoder_saw_finite_priv(decoder, dtype);
}

static void put(int64_t size, int64_t i, uint32_t value) {
  memcpy(expected + i * size, &value, (size_t)size); /* little-endian, as the files */
}

static void finite_is_what_was_seen(void **state) {
  data_decoder *later = NULL, *now = NULL;
  (void)state;
  assert_int_equal(data_decoder_create_priv(sizeof expected, DATA_DECODED_FOR_LATER, &later), CORE_OK);
  assert_int_equal(data_decoder_create_priv(sizeof expected, DATA_DECODED_FOR_NOW, &now), CORE_OK);
  for (size_t t = 0; t < sizeof types / sizeof *types; ++t) {
    const core_dtype dtype = types[t].dtype;
    const int32_t size = (int32_t)core_dtype_size(dtype);
    const int64_t places[] = {0, 16, 4095, 4096, MOST - 1}, bytes = (int64_t)size * MOST;
    for (int64_t i = 0; i < MOST; ++i) put(size, i, types[t].finite);
    assert_true(decode_says_finite(later, dtype, size, bytes));
    assert_false(decode_says_finite(now, dtype, size, bytes));       /* it did not look */
    assert_false(decode_says_finite(later, dtype, 2 * size, bytes)); /* at other bytes than the exponents */
    for (size_t p = 0; p < sizeof places / sizeof *places; ++p)
      for (int b = 0; b < 2; ++b) {
        put(size, places[p], types[t].bad[b]);
        assert_false(decode_says_finite(later, dtype, size, bytes));
        put(size, places[p], types[t].finite);
      }
    assert_true(decode_says_finite(later, dtype, size, bytes));
    const data_pipeline none = {0}; /* and what it saw before is forgotten */
    assert_int_equal(data_decode_priv(later, &none, 0, expected, bytes, out, bytes), CORE_OK);
    assert_false(data_decoder_saw_finite_priv(later, dtype));
  }
  data_decoder_destroy_priv(later);
  data_decoder_destroy_priv(now);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(both_ways_give_the_elements),
      cmocka_unit_test(finite_is_what_was_seen),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
