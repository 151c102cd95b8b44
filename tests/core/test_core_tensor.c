/* Half and bfloat conversions against references in double that know only the formats' definitions. */
#include "core/tensor.h"

#include <float.h>
#include <math.h>

#include "core/random.h"
#include "tests/support/test_unit.h"

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* sign, 5 bits of exponent with bias 15, 10 bits of fraction */
static double half_value(uint16_t bits) {
  double sign = bits & 0x8000 ? -1 : 1, fraction = (bits & 1023) / 1024.0;
  int exponent = bits >> 10 & 31;
  if (exponent == 31) return fraction > 0 ? (double)NAN : sign * (double)INFINITY;
  return exponent == 0 ? sign * ldexp(fraction, -14) : sign * ldexp(1 + fraction, exponent - 15);
}

/* Nearest number with 11 significant bits and no bit below 2^-24; ties to even by nearbyint. Exact: the
 * scalings are by powers of two. */
static double nearest_half(float value) {
  int exponent;
  (void)frexp((double)value, &exponent);
  double unit = ldexp(1, exponent - 11 > -24 ? exponent - 11 : -24);
  double rounded = nearbyint((double)value / unit) * unit;
  return fabs(rounded) >= 65536 ? copysign((double)INFINITY, (double)value) : rounded;
}

static void check_half(float value) {
  uint16_t got = core_half_from_float(value);
  double expected = nearest_half(value);
  if (half_value(got) != expected || (got & 0x8000) != (bits_of(value) >> 16 & 0x8000))
    fail_msg("half of %a is %a, expected %a", (double)value, half_value(got), expected);
}

static void every_half_reads_as_defined_and_comes_back(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    float value = core_float_from_half((uint16_t)bits);
    double expected = half_value((uint16_t)bits);
    uint16_t back = core_half_from_float(value);
    if (isnan(expected)) {
      assert_true(isnan(value));
      assert_true(isnan(half_value(back)));
      continue;
    }
    assert_true((double)value == expected);
    assert_int_equal(signbit(value) != 0, bits >> 15);
    assert_int_equal(back, bits);
  }
}

static void halves_round_to_nearest_even_everywhere(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 0x7bff; bits++) { /* between every two neighbours, both signs */
    float low = core_float_from_half((uint16_t)bits), high = core_float_from_half((uint16_t)(bits + 1));
    float tie = (float)(((double)low + (double)high) / 2);
    for (int sign = -1; sign <= 1; sign += 2) {
      check_half((float)sign * tie);
      check_half((float)sign * nextafterf(tie, INFINITY));
      check_half((float)sign * nextafterf(tie, 0));
    }
  }
  for (uint64_t i = 0; i < 1000000; i++) {
    float value = from_bits((uint32_t)core_random_u64(1, 2, i));
    if (!isnan(value)) check_half(value);
  }
}

static void halves_at_the_ends_of_the_range(void **state) {
  (void)state;
  assert_int_equal(core_half_from_float(65504), 0x7bff);
  assert_int_equal(core_half_from_float(65519.996f), 0x7bff);
  assert_int_equal(core_half_from_float(65520), 0x7c00); /* the tie beyond the largest goes to infinity */
  assert_int_equal(core_half_from_float(-1e30f), 0xfc00);
  assert_int_equal(core_half_from_float(INFINITY), 0x7c00);
  assert_int_equal(core_half_from_float(0x1p-24f), 1);
  assert_int_equal(core_half_from_float(0x1p-25f), 0); /* tie to even zero */
  assert_int_equal(core_half_from_float(-0x1.000002p-25f), 0x8001);
  assert_int_equal(core_half_from_float(0x1.ffcp-15f), 0x3ff + 1); /* rounds up into the normal numbers */
  assert_int_equal(core_half_from_float(-0.0f), 0x8000);
  assert_int_equal(core_half_from_float(FLT_TRUE_MIN), 0);
}

static void nan_stays_nan(void **state) {
  (void)state;
  for (int sign = 0; sign < 2; sign++)
    for (int bit = 0; bit < 23; bit++) { /* a payload that lies wholly in the bits that are cut */
      float value = from_bits((uint32_t)sign << 31 | 0x7f800000u | 1u << bit);
      assert_true(isnan(half_value(core_half_from_float(value))));
      assert_true(isnan(core_float_from_bfloat(core_bfloat_from_float(value))));
    }
  assert_true(isnan(core_float_from_bfloat(core_bfloat_from_float(from_bits(0x7fffffffu)))));
}

/* The upper half of a float's bits; above the largest lies 2^128. */
static double bfloat_value(uint32_t upper) {
  return upper == 0x7f80 ? 0x1p128 : (double)from_bits(upper << 16);
}

static void check_bfloat(float value) {
  uint32_t magnitude = bits_of(value) & 0x7fffffffu, lower = magnitude >> 16;
  double size = fabs((double)value);
  if (isinf(value)) size = 0x1p128;
  uint32_t expected = lower;
  if (lower < 0x7f80) {
    double down = size - bfloat_value(lower), up = bfloat_value(lower + 1) - size;
    if (up < down || (up == down && lower % 2 == 1)) expected++;
  }
  expected |= bits_of(value) >> 16 & 0x8000;
  if (core_bfloat_from_float(value) != expected)
    fail_msg("bfloat of %a is %04x, expected %04x", (double)value, core_bfloat_from_float(value), expected);
}

static void bfloats_round_to_nearest_even_everywhere(void **state) {
  (void)state;
  for (uint32_t upper = 0; upper < 65536; upper++) {
    float value = core_float_from_bfloat((uint16_t)upper);
    assert_int_equal(bits_of(value), upper << 16);
    if (isnan(value)) continue;
    assert_int_equal(core_bfloat_from_float(value), upper);
    if (isinf(value)) continue;
    static const uint32_t lower[] = {1, 0x7fff, 0x8000, 0x8001, 0xffff};
    for (int i = 0; i < 5; i++) check_bfloat(from_bits(upper << 16 | lower[i]));
  }
  assert_int_equal(core_bfloat_from_float(FLT_MAX), 0x7f80);
  assert_int_equal(core_bfloat_from_float(-FLT_MAX), 0xff80);
  assert_int_equal(core_bfloat_from_float(FLT_TRUE_MIN), 0);
  for (uint64_t i = 0; i < 1000000; i++) {
    float value = from_bits((uint32_t)core_random_u64(3, 4, i));
    if (!isnan(value)) check_bfloat(value);
  }
}

static void types_have_sizes_and_names(void **state) {
  (void)state;
  static const size_t sizes[] = {4, 2, 2, 8, 4, 8, 8, 1};
  assert_int_equal(CORE_DTYPE_COUNT, sizeof sizes / sizeof *sizes); /* numbers are stored in checkpoints */
  for (int i = 0; i < CORE_DTYPE_COUNT; i++) {
    assert_int_equal(core_dtype_size((core_dtype)i), sizes[i]);
    assert_int_equal(core_dtype_parse(core_dtype_text((core_dtype)i)), i);
  }
  assert_int_equal(CORE_BFLOAT16, 1);
  assert_int_equal(CORE_UINT8, 7);
  assert_int_equal(core_dtype_parse("float"), CORE_DTYPE_COUNT);
  assert_int_equal(core_dtype_parse("float32 "), CORE_DTYPE_COUNT);
  assert_int_equal(core_dtype_parse(""), CORE_DTYPE_COUNT);
  assert_int_equal(core_dtype_size(CORE_DTYPE_COUNT), 0);
  assert_string_equal(core_dtype_text(CORE_DTYPE_COUNT), "unknown");
}

static void descriptors_count_elements(void **state) {
  (void)state;
  core_tensor scalar = {NULL, CORE_FLOAT64, 0, {1, 1, 1, 1}};
  core_tensor empty = core_tensor_2(NULL, CORE_FLOAT32, 0, 7),
              cube = core_tensor_3(NULL, CORE_BFLOAT16, 2, 3, 5);
  core_tensor vector = core_tensor_1(NULL, CORE_UINT8, (int64_t)1 << 40);
  assert_int_equal(core_tensor_count(&scalar), 1);
  assert_int_equal(core_tensor_bytes(&scalar), 8);
  assert_int_equal(core_tensor_count(&empty), 0);
  assert_int_equal(core_tensor_bytes(&empty), 0);
  assert_int_equal(core_tensor_count(&cube), 30);
  assert_int_equal(core_tensor_bytes(&cube), 60);
  assert_int_equal(cube.rank, 3);
  assert_int_equal(cube.shape[3], 1);
  assert_true(core_tensor_bytes(&vector) == (size_t)1 << 40);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_half_reads_as_defined_and_comes_back),
      cmocka_unit_test(halves_round_to_nearest_even_everywhere),
      cmocka_unit_test(halves_at_the_ends_of_the_range),
      cmocka_unit_test(nan_stays_nan),
      cmocka_unit_test(bfloats_round_to_nearest_even_everywhere),
      cmocka_unit_test(types_have_sizes_and_names),
      cmocka_unit_test(descriptors_count_elements),
  };
  return cmocka_run_group_tests_name("core/tensor", tests, NULL, NULL);
}
