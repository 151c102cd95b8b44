/* Contract: every op of a backend against naive references in double (cases_*.c), and its refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>

#include "battery.h"
#include "kernels/cpu/cpu_impl.h" /* kern_context: paths that this processor would not take */

static void every_op_matches_its_reference(void **state) {
  (void)state;
  battery_run_all(kern_cpu(), CORE_REAL_DTYPE);
}

#ifdef ANTIPHON_DOUBLE

static void expect_no_bfloat(core_status status) {
  const char *message = status == CORE_OK ? "taken" : core_error_get()->message;
  if (status != CORE_ERR_UNSUPPORTED || strstr(message, "bfloat16") == NULL)
    fail_msg("expected a refusal of bfloat16: %s", message);
}

/* The build in double has no bfloat16, and says so. */
static void bfloat_is_refused(void **state) {
  (void)state;
  const kern_ops *ops = kern_cpu();
  const kern_limits limits = {.rows = 8, .width = 12, .experts = 4, .sequence = 8, .heads = 2, .updates = 1};
  const int64_t whole[] = {0, 8};
  const kern_segments segments = {.offset = whole, .count = 1};
  const kern_attention attention = {segments, 1, 1, 4, KERN_CAUSAL, 0.5};
  const kern_adamw update = {0, 8, 1, 0, 0, 1, 0, 1, 1, 1};
  static core_real memory[96];
  const core_tensor x = core_tensor_2(memory, CORE_BFLOAT16, 8, 12),
                    r = core_tensor_2(memory, CORE_FLOAT64, 8, 12);
  const core_tensor cube = core_tensor_3(memory, CORE_BFLOAT16, 1, 8, 12), none = {0};
  const core_tensor row = core_tensor_1(memory, CORE_FLOAT64, 12), of = core_tensor_1(memory, CORE_INT32, 8);
  const core_tensor norm = core_tensor_1(memory, CORE_FLOAT64, 8);
  const core_tensor key = core_tensor_1(memory, CORE_UINT64, 8), valid = core_tensor_1(memory, CORE_UINT8, 8);
  kern_context *c;
  assert_int_equal(ops->context_create(&limits, &c), CORE_OK);
  expect_no_bfloat(ops->gemm(c, KERN_NT, x, x, KERN_SET, x));
  expect_no_bfloat(ops->gemm_grouped(c, KERN_NT, whole, x, cube, KERN_SET, x));
  expect_no_bfloat(ops->bias_fwd(c, row, x));
  expect_no_bfloat(ops->bias_bwd(c, x, row));
  expect_no_bfloat(ops->gelu_fwd(c, KERN_GELU_ERF, x, x));
  expect_no_bfloat(ops->gelu_bwd(c, KERN_GELU_ERF, x, x, KERN_SET, x));
  expect_no_bfloat(ops->swiglu_fwd(c, x, x));
  expect_no_bfloat(ops->swiglu_bwd(c, x, x, KERN_SET, x));
  expect_no_bfloat(ops->rmsnorm_fwd(c, x, row, 1, x, row));
  expect_no_bfloat(ops->rmsnorm_bwd(c, x, x, row, row, KERN_SET, x, row));
  expect_no_bfloat(ops->layernorm_fwd(c, x, row, row, 1, x, row));
  expect_no_bfloat(ops->layernorm_bwd(c, x, x, row, row, KERN_SET, x, row, row));
  expect_no_bfloat(ops->rope(c, KERN_ROTATE, 1, of, row, x));
  expect_no_bfloat(ops->attention_fwd(c, &attention, x, x, row));
  expect_no_bfloat(ops->attention_bwd(c, &attention, x, x, x, row, x));
  expect_no_bfloat(ops->router_logits(c, x, r, none, r));
  expect_no_bfloat(ops->router_logits_bwd(c, r, x, r, KERN_SET, x, r, none));
  expect_no_bfloat(ops->gather_rows(c, x, of, x));
  expect_no_bfloat(ops->combine_fwd(c, x, of, none, KERN_SET, x));
  expect_no_bfloat(ops->combine_bwd(c, x, x, of, none, x, none));
  expect_no_bfloat(ops->segment_mean_fwd(c, segments, x, x));
  expect_no_bfloat(ops->segment_mean_bwd(c, segments, x, KERN_SET, x));
  expect_no_bfloat(ops->position_fwd(c, segments, r, x));
  expect_no_bfloat(ops->position_bwd(c, segments, x, r));
  expect_no_bfloat(ops->l2norm_bwd(c, r, r, norm, KERN_SET, x));
  expect_no_bfloat(ops->standardize(c, r, row, row, x));
  expect_no_bfloat(ops->adamw(c, &update, 1, r, r, r, r, x));
  expect_no_bfloat(ops->bias_grouped_fwd(c, whole, r, x));
  expect_no_bfloat(ops->bias_grouped_bwd(c, whole, x, r));
  expect_no_bfloat(ops->dropout(c, 1, 2, 0.5, key, of, x));
  expect_no_bfloat(ops->regression(c, KERN_SQUARED, 1, r, r, valid, norm, x));
  expect_no_bfloat(ops->cast(c, r, x));
  expect_no_bfloat(ops->cast(c, x, r));
  expect_no_bfloat(ops->fill(c, 1, x));
  ops->context_destroy(c);
}

#else

static void every_op_takes_bfloat(void **state) {
  (void)state;
  battery_run_all(kern_cpu(), CORE_BFLOAT16);
}

/* Products by way of scratch, in parts smaller than the cases. */
static core_status small_parts(const kern_limits *limits, kern_context **out) {
  TRY(kern_cpu()->context_create(limits, out));
  (*out)->tile = (kern_extent){32, 48, 16};
  return CORE_OK;
}
static core_status small_widened_parts(const kern_limits *limits, kern_context **out) {
  TRY(small_parts(limits, out));
  (*out)->bfloat_units = false;
  return CORE_OK;
}

static void judge_products(core_status (*create)(const kern_limits *, kern_context **)) {
  kern_ops ops = *kern_cpu();
  ops.context_create = create;
  battery_run(&ops, CORE_BFLOAT16, battery_dense, battery_dense_count);
  battery_run(&ops, CORE_BFLOAT16, battery_router, battery_router_count);
}

static void products_pass_through_scratch_in_parts(void **state) {
  (void)state;
  judge_products(small_parts);
}

/* As on a processor that does not multiply bfloat16. */
static void products_of_widened_factors_match(void **state) {
  (void)state;
  judge_products(small_widened_parts);
}

#endif

/* The message must name the op, the argument and the sizes. */
static void expect_refusal(core_status got, core_status code, const char *op, const char *argument,
                           const char *size) {
  const char *message = core_error_get()->message;
  assert_int_equal(got, code);
  if (strstr(message, op) == NULL || strstr(message, argument) == NULL || strstr(message, size) == NULL)
    fail_msg("message \"%s\" lacks one of \"%s\", \"%s\", \"%s\"", message, op, argument, size);
}

static void wrong_arguments_are_refused(void **state) {
  (void)state;
  const kern_ops *ops = kern_cpu();
  const kern_limits limits = {.rows = 8, .width = 12, .experts = 4, .sequence = 4, .heads = 2, .threads = 1};
  kern_context *context;
  assert_int_equal(ops->context_create(&limits, &context), CORE_OK);
  static core_real memory[256];
  static int32_t index[8] = {0, 1, 2, 9, -2, 0, 0, 0};
  const core_dtype real = CORE_REAL_DTYPE;
  const core_tensor x = core_tensor_2(memory, real, 8, 12), odd = core_tensor_2(memory, real, 8, 11);
  const core_tensor none = core_tensor_2(NULL, real, 8, 12),
                    brain = core_tensor_2(memory, CORE_BFLOAT16, 8, 12);
  expect_refusal(ops->axpy(context, 1, x, odd), CORE_ERR_ARGUMENT, "axpy", "y is", "[8, 11]");
  expect_refusal(ops->scale(context, 1, none), CORE_ERR_ARGUMENT, "scale", "x has no memory", "96");
  expect_refusal(ops->scale(context, 1, brain), CORE_ERR_UNSUPPORTED, "scale", "bfloat16", "[8, 12]");
  expect_refusal(ops->gemm(context, KERN_NN, x, x, KERN_SET, x), CORE_ERR_ARGUMENT, "gemm", "inner",
                 "[8, 12]");
  expect_refusal(ops->gather_rows(context, x, core_tensor_1(index, CORE_INT32, 8), x), CORE_ERR_ARGUMENT,
                 "gather_rows", "index[3] is 9", "0 to 7");
  expect_refusal(ops->combine_fwd(context, x, core_tensor_2(index + 3, CORE_INT32, 2, 2), (core_tensor){0},
                                  KERN_SET, core_tensor_2(memory, real, 2, 12)),
                 CORE_ERR_ARGUMENT, "combine_fwd", "slot[0] is 9", "-1 to 7");
  const int64_t down[] = {0, 6, 4, 8}, shy[] = {0, 4, 7}, whole[] = {0, 8};
  expect_refusal(ops->segment_mean_fwd(context, (kern_segments){.offset = down, .count = 3}, x,
                                       core_tensor_2(memory, real, 3, 12)),
                 CORE_ERR_ARGUMENT, "segment_mean_fwd", "descends from 6 to 4", "at 1");
  expect_refusal(ops->segment_mean_fwd(context, (kern_segments){.offset = shy, .count = 2}, x,
                                       core_tensor_2(memory, real, 2, 12)),
                 CORE_ERR_ARGUMENT, "segment_mean_fwd", "0 to 7", "0 to 8");
  const kern_attention attention = {{.offset = whole, .count = 1}, 1, 1, 4, KERN_CAUSAL, 0.5};
  expect_refusal(ops->attention_fwd(context, &attention, x, core_tensor_2(memory, real, 8, 4),
                                    core_tensor_2(memory, real, 8, 1)),
                 CORE_ERR_ARGUMENT, "attention_fwd", "length is 8", "at most 4");
  static const int64_t halves[] = {0, 4, 8}, none_of_both[] = {0, 0, 4};
  kern_cross cross = {.attention = {{.offset = halves, .count = 2}, 1, 1, 4, KERN_BIDIRECTIONAL, 0.5},
                      .keys = {.offset = none_of_both, .count = 2},
                      .q = core_tensor_2(memory, real, 8, 4),
                      .kv = core_tensor_2(memory, real, 4, 8),
                      .out = core_tensor_2(memory, real, 8, 4),
                      .lse = core_tensor_2(memory, real, 8, 1)};
  expect_refusal(ops->attention_cross_fwd(context, &cross), CORE_ERR_ARGUMENT, "attention_cross_fwd",
                 "segment 0 has queries", "no keys");
  cross.keys.count = 1;
  expect_refusal(ops->attention_cross_fwd(context, &cross), CORE_ERR_ARGUMENT, "attention_cross_fwd",
                 "2 segments of queries", "1 of keys");
  cross.attention.mask = KERN_CAUSAL;
  expect_refusal(ops->attention_cross_bwd(context, &cross, cross.out, cross.q, cross.kv), CORE_ERR_ARGUMENT,
                 "attention_cross_bwd", "no mask", "two tensors");
  const core_tensor huge = core_tensor_2(memory, real, INT64_MAX / 2, 16);
  expect_refusal(ops->fill(context, 0, huge), CORE_ERR_ARGUMENT, "fill", "x is", "16]");
  ops->context_destroy(context);
}

static void limits_are_checked(void **state) {
  (void)state;
  kern_context *context;
  const kern_limits negative = {
      .rows = 8, .width = -1, .experts = 4, .sequence = 4, .heads = 2, .threads = 1};
  const kern_limits endless = {
      .rows = 8, .width = INT64_MAX, .experts = 4, .sequence = 4, .heads = 2, .threads = 1};
  const kern_limits few = {.segments = -2, .threads = 1}, none = {.updates = -3, .threads = 1};
  expect_refusal(kern_cpu()->context_create(&negative, &context), CORE_ERR_ARGUMENT, "limits", "width", "-1");
  assert_null(context);
  expect_refusal(kern_cpu()->context_create(&few, &context), CORE_ERR_ARGUMENT, "limits", "segments", "-2");
  expect_refusal(kern_cpu()->context_create(&none, &context), CORE_ERR_ARGUMENT, "limits", "updates", "-3");
  expect_refusal(kern_cpu()->context_create(&endless, &context), CORE_ERR_ARGUMENT, "limits", "overflow",
                 "width");
  assert_true(kern_cpu()->context_bytes(&endless) == SIZE_MAX);
}

#ifdef ANTIPHON_CUDA

/* With a device "auto" is "cuda"; without one it is "cpu", and "cuda" says what is missing. */
static void cuda_is_selected_by_name(void) {
  const kern_ops *ops = NULL, *cuda = NULL;
  const core_status status = kern_select("cuda", 0, &cuda);
  assert_true(status == CORE_OK || status == CORE_ERR_UNSUPPORTED);
  if (status == CORE_OK)
    assert_string_equal(cuda->name, "cuda");
  else
    assert_null(cuda);
  assert_int_equal(kern_select("auto", 0, &ops), CORE_OK);
  assert_ptr_equal(ops, status == CORE_OK ? cuda : kern_cpu());
}

#else

static void cuda_is_selected_by_name(void) {
  const kern_ops *ops = NULL;
  expect_refusal(kern_select("cuda", 0, &ops), CORE_ERR_UNSUPPORTED, "cuda", "without CUDA", "cpu");
  assert_null(ops);
  assert_int_equal(kern_select("auto", 0, &ops), CORE_OK);
  assert_ptr_equal(ops, kern_cpu());
}

#endif

static void backends_are_selected_by_name(void **state) {
  (void)state;
  const kern_ops *ops = NULL;
  assert_int_equal(kern_select("cpu", 0, &ops), CORE_OK);
  assert_ptr_equal(ops, kern_cpu());
  expect_refusal(kern_select("tpu", 0, &ops), CORE_ERR_UNSUPPORTED, "tpu", "expected", "auto");
  assert_null(ops);
  expect_refusal(kern_select("cpu", -1, &ops), CORE_ERR_ARGUMENT, "kern_select", "local rank", "-1");
  cuda_is_selected_by_name();
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_op_matches_its_reference),
#ifdef ANTIPHON_DOUBLE
      cmocka_unit_test(bfloat_is_refused),
#else
      cmocka_unit_test(every_op_takes_bfloat),
      cmocka_unit_test(products_pass_through_scratch_in_parts),
      cmocka_unit_test(products_of_widened_factors_match),
#endif
      cmocka_unit_test(wrong_arguments_are_refused),
      cmocka_unit_test(limits_are_checked),
      cmocka_unit_test(backends_are_selected_by_name),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
