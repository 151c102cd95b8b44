/* bfloat16 on the CPU: rounding to the bit, products larger than a part on both paths, independence of
 * threads, of neighbours and of addresses, types that do not go together. (Each op against its reference:
 * contract.) */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "core/random.h"
#include "kernels/cpu/cpu_impl.h" /* kern_context: bfloat_units */

enum { ROWS = 1000, WIDTH = 37, EXPERTS = 11 };

static void must(core_status status) {
  if (status != CORE_OK) fail_msg("%s", core_error_get()->message);
}

static kern_context *context_of(int32_t threads) {
  const kern_limits limits = {.rows = 2048,
                              .width = 2048,
                              .experts = 64,
                              .sequence = ROWS,
                              .segments = 8,
                              .heads = 8,
                              .threads = threads};
  kern_context *context;
  must(kern_cpu()->context_create(&limits, &context));
  return context;
}

static core_tensor tensor_of(core_dtype dtype, int64_t rows, int64_t columns) {
  core_tensor tensor = core_tensor_2(NULL, dtype, rows, columns);
  must(kern_cpu()->device->allocate(core_tensor_bytes(&tensor), &tensor.data));
  memset(tensor.data, 0, core_tensor_bytes(&tensor));
  return tensor;
}
static core_tensor normals(core_dtype dtype, int64_t rows, int64_t columns, uint64_t stream) {
  const core_tensor tensor = tensor_of(dtype, rows, columns);
  for (int64_t i = 0; i < rows * columns; i++) {
    const float value = (float)core_random_normal(3, stream, (uint64_t)i);
    if (dtype == CORE_BFLOAT16)
      ((uint16_t *)tensor.data)[i] = core_bfloat_from_float(value);
    else
      ((float *)tensor.data)[i] = value;
  }
  return tensor;
}
static core_tensor brief(int64_t rows, int64_t columns, uint64_t stream) {
  return normals(CORE_BFLOAT16, rows, columns, stream);
}
static core_tensor real(int64_t rows, int64_t columns, uint64_t stream) {
  return normals(CORE_FLOAT32, rows, columns, stream);
}
static void drop(core_tensor tensor) {
  kern_cpu()->device->release(tensor.data);
}
static uint64_t hash(core_tensor tensor) {
  return core_hash(tensor.data, core_tensor_bytes(&tensor), 0);
}

/* Every kind of number: random bits, and each half way between two neighbours, one bit less and one more. */
static void narrowing_rounds_to_nearest_even(void **state) {
  (void)state;
  enum { COUNT = 1 << 18 };
  kern_context *context = context_of(2);
  const core_tensor x = tensor_of(CORE_FLOAT32, 1, COUNT), y = tensor_of(CORE_BFLOAT16, 1, COUNT);
  uint32_t *bits = x.data;
  for (uint32_t i = 0; i < COUNT; i++) {
    const uint32_t upper = (i / 4 & 0xffffu) << 16;
    bits[i] = i % 4 == 3 ? (uint32_t)core_random_below(1, 2, i, UINT64_C(1) << 32) : upper + 0x7fffu + i % 4;
  }
  must(kern_cpu()->cast(context, x, y));
  for (int64_t i = 0; i < COUNT; i++) {
    const uint16_t got = ((uint16_t *)y.data)[i];
    assert_int_equal(got, core_bfloat_from_float(((float *)x.data)[i]));
    if (isnan(((float *)x.data)[i])) assert_true(isnan(core_float_from_bfloat(got)));
  }
  drop(x), drop(y);
  kern_cpu()->context_destroy(context);
}

static void widening_loses_nothing(void **state) {
  (void)state;
  enum { COUNT = 1 << 16 };
  kern_context *context = context_of(1);
  const core_tensor x = tensor_of(CORE_BFLOAT16, 1, COUNT), y = tensor_of(CORE_FLOAT32, 1, COUNT);
  for (int64_t i = 0; i < COUNT; i++) ((uint16_t *)x.data)[i] = (uint16_t)i;
  must(kern_cpu()->cast(context, x, y));
  for (uint32_t i = 0; i < COUNT; i++) assert_int_equal(((uint32_t *)y.data)[i], i << 16);
  drop(x), drop(y);
  kern_cpu()->context_destroy(context);
}

/* How far r is from x, or from what rounds to x: half a unit in the last of 8 places. */
static double distance(double x, double r, core_dtype dtype) {
  int exponent;
  (void)frexp(x, &exponent);
  const double half = dtype == CORE_BFLOAT16 ? ldexp(1, exponent - 9) : 0;
  return fabs(x - r) <= half ? 0 : fabs(x - r) - half;
}

/* A product of bfloat16 against float32's of the same numbers. Both are sums of exact products in float32. */
static void product_matches_float(kern_context *context, kern_form form, core_dtype result) {
  enum { M = 1050, N = 1031, K = 530 }; /* a whole part and a rest, in each direction */
  const core_tensor a = form == KERN_TN ? brief(K, M, 1) : brief(M, K, 1);
  const core_tensor b = form == KERN_NT ? brief(N, K, 2) : brief(K, N, 2);
  const core_tensor a_wide = tensor_of(CORE_FLOAT32, a.shape[0], a.shape[1]);
  const core_tensor b_wide = tensor_of(CORE_FLOAT32, b.shape[0], b.shape[1]);
  const core_tensor got = brief(M, N, 3), c = result == CORE_BFLOAT16 ? got : tensor_of(CORE_FLOAT32, M, N);
  const core_tensor got_wide = tensor_of(CORE_FLOAT32, M, N), want = tensor_of(CORE_FLOAT32, M, N);
  must(kern_cpu()->cast(context, got, want));
  must(kern_cpu()->cast(context, got, c));
  must(kern_cpu()->cast(context, a, a_wide));
  must(kern_cpu()->cast(context, b, b_wide));
  must(kern_cpu()->gemm(context, form, a, b, KERN_ADD, c));
  must(kern_cpu()->gemm(context, form, a_wide, b_wide, KERN_ADD, want));
  must(kern_cpu()->cast(context, c, got_wide));
  double error = 0, norm = 0;
  for (int64_t i = 0; i < M * N; i++) {
    const double r = ((float *)want.data)[i];
    const double beyond = distance(((float *)got_wide.data)[i], r, result);
    error += beyond * beyond;
    norm += r * r;
  }
  if (!(error <= 1e-12 * norm))
    fail_msg("form %d, %s: NMSE %.3g", (int)form, core_dtype_text(result), error / norm);
  drop(a), drop(b), drop(a_wide), drop(b_wide), drop(got), drop(got_wide), drop(want);
  if (result != CORE_BFLOAT16) drop(c);
}

static void products_larger_than_a_part_match(void **state) {
  (void)state;
  for (int way = 0; way < 2; way++) {
    kern_context *context = context_of(2);
    if (way == 1) context->bfloat_units = false;
    for (int form = 0; form < 3; form++) {
      product_matches_float(context, (kern_form)form, CORE_BFLOAT16);
      product_matches_float(context, (kern_form)form, CORE_FLOAT32);
    }
    kern_cpu()->context_destroy(context);
  }
}

/* Forward and backward of what sums over rows or tiles, as one hash; products are not among them. */
static uint64_t ops_hash(int32_t threads) {
  const kern_ops *ops = kern_cpu();
  kern_context *context = context_of(threads);
  const core_tensor x = brief(ROWS, WIDTH, 1), dy = brief(ROWS, WIDTH, 2), y = brief(ROWS, WIDTH, 3);
  const core_tensor dx = brief(ROWS, WIDTH, 4), qkv = brief(ROWS, 3 * WIDTH, 5),
                    dqkv = brief(ROWS, 3 * WIDTH, 6);
  const core_tensor weight = real(WIDTH, 1, 7), inv = real(ROWS, 1, 8), lse = real(ROWS, 1, 9);
  const core_tensor dweight = real(WIDTH, 1, 10), mean = brief(5, WIDTH, 11), table = real(ROWS, WIDTH, 12);
  const int64_t offset[] = {0, 3, 50, 51, 300, ROWS};
  const kern_segments segments = {.offset = offset, .count = 5};
  const kern_attention attention = {segments, 1, 1, WIDTH, KERN_CAUSAL, 0.2};
  must(ops->rmsnorm_fwd(context, x, weight, 1e-5, y, inv));
  must(ops->rmsnorm_bwd(context, dy, x, weight, inv, KERN_ADD, dx, dweight));
  must(ops->bias_bwd(context, dy, dweight));
  must(ops->gelu_bwd(context, KERN_GELU_ERF, dy, x, KERN_ADD, dx));
  must(ops->segment_mean_fwd(context, segments, x, mean));
  must(ops->position_bwd(context, segments, dx, table));
  must(ops->attention_fwd(context, &attention, qkv, y, lse));
  must(ops->attention_bwd(context, &attention, dy, qkv, y, lse, dqkv));
  const uint64_t all[] = {hash(y), hash(dx), hash(dqkv), hash(dweight), hash(mean), hash(table), hash(lse)};
  drop(x), drop(dy), drop(y), drop(dx), drop(qkv), drop(dqkv), drop(weight), drop(inv), drop(lse);
  drop(dweight), drop(mean), drop(table);
  ops->context_destroy(context);
  return core_hash(all, sizeof all, 0);
}

static void ops_are_the_same_on_every_thread_count(void **state) {
  (void)state;
  const uint64_t one = ops_hash(1);
  assert_true(one == ops_hash(1));
  assert_true(one == ops_hash(2));
  assert_true(one == ops_hash(5));
}

/* A token's logits must be the same bits alone and among a thousand, at every address. */
static void router_logits_do_not_depend_on_neighbours(void **state) {
  (void)state;
  kern_context *context = context_of(1);
  const int64_t widths[] = {1, 15, 16, 31, 37, 64, 192, 255};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    const core_tensor x = brief(ROWS, widths[w], w), weight = real(EXPERTS, widths[w], 50 + w);
    const core_tensor all = real(ROWS, EXPERTS, 0), one = real(1, EXPERTS, 0), none = {0};
    must(kern_cpu()->router_logits(context, x, weight, none, all));
    for (int64_t row = 0; row < ROWS; row += 7) {
      const core_tensor alone =
          core_tensor_2((uint16_t *)x.data + row * widths[w], CORE_BFLOAT16, 1, widths[w]);
      must(kern_cpu()->router_logits(context, alone, weight, none, one));
      assert_memory_equal(one.data, (float *)all.data + row * EXPERTS, core_tensor_bytes(&one));
    }
    drop(x), drop(weight), drop(all), drop(one);
  }
  kern_cpu()->context_destroy(context);
}

static void expect_refusal(core_status got, core_status code, const char *text) {
  assert_int_equal(got, code);
  if (strstr(core_error_get()->message, text) == NULL)
    fail_msg("message \"%s\" lacks \"%s\"", core_error_get()->message, text);
}

static void types_that_do_not_go_together_are_refused(void **state) {
  (void)state;
  const kern_ops *ops = kern_cpu();
  kern_context *context = context_of(1);
  const core_tensor x = brief(8, 8, 1), y = real(8, 8, 2), row = brief(8, 1, 3);
  const core_tensor half = core_tensor_2(x.data, CORE_FLOAT16, 8, 8);
  expect_refusal(ops->gelu_fwd(context, KERN_GELU_ERF, x, y), CORE_ERR_ARGUMENT, "y is float32");
  expect_refusal(ops->gemm(context, KERN_NT, x, y, KERN_SET, y), CORE_ERR_ARGUMENT, "b is float32");
  expect_refusal(ops->gemm(context, KERN_NT, y, y, KERN_SET, x), CORE_ERR_UNSUPPORTED, "c is bfloat16");
  expect_refusal(ops->softmax_fwd(context, x, x), CORE_ERR_UNSUPPORTED, "logits is bfloat16");
  expect_refusal(ops->bias_fwd(context, row, x), CORE_ERR_UNSUPPORTED, "bias is bfloat16");
  expect_refusal(ops->sum_squares(context, x, y), CORE_ERR_UNSUPPORTED, "x is bfloat16");
  expect_refusal(ops->cast(context, half, y), CORE_ERR_ARGUMENT, "x is float16");
  drop(x), drop(y), drop(row);
  ops->context_destroy(context);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(narrowing_rounds_to_nearest_even),
      cmocka_unit_test(widening_loses_nothing),
      cmocka_unit_test(products_larger_than_a_part_match),
      cmocka_unit_test(ops_are_the_same_on_every_thread_count),
      cmocka_unit_test(router_logits_do_not_depend_on_neighbours),
      cmocka_unit_test(types_that_do_not_go_together_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
