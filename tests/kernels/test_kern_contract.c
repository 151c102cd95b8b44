/* Contract: every op of a backend against naive references in double (cases_*.c), and its refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>

#include "battery.h"

static void every_op_matches_its_reference(void **state) {
  (void)state;
  battery_run_all(kern_cpu());
}

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

static void backends_are_selected_by_name(void **state) {
  (void)state;
  const kern_ops *ops = NULL;
  assert_int_equal(kern_select("auto", 0, &ops), CORE_OK);
  assert_ptr_equal(ops, kern_cpu());
  assert_int_equal(kern_select("cpu", 0, &ops), CORE_OK);
  assert_ptr_equal(ops, kern_cpu());
  expect_refusal(kern_select("cuda", 0, &ops), CORE_ERR_UNSUPPORTED, "cuda", "without CUDA", "cpu");
  assert_null(ops);
  expect_refusal(kern_select("tpu", 0, &ops), CORE_ERR_UNSUPPORTED, "tpu", "expected", "auto");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_op_matches_its_reference),
      cmocka_unit_test(wrong_arguments_are_refused),
      cmocka_unit_test(limits_are_checked),
      cmocka_unit_test(backends_are_selected_by_name),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
