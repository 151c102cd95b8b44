/* The CUDA backend: the battery's cases in both Active types, refusals, bad indices in device memory, watched
 * waits, repeatability. Needs a device; an emulated build brings one. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "battery.h"
#include "core/random.h"

enum { SKIPPED = 77 };

static const kern_ops *cuda;
static const core_tensor none;

static void float_ops_match_their_references(void **state) {
  (void)state;
  battery_run_all(cuda, CORE_FLOAT32);
}

static void bfloat_ops_match_their_references(void **state) {
  (void)state;
  battery_run_all(cuda, CORE_BFLOAT16);
}

static void expect_ok(core_status status) {
  if (status != CORE_OK) fail_msg("%s", core_error_get()->message);
}

/* The message names what is wrong. */
static void expect_refusal(core_status got, core_status code, const char *first, const char *second) {
  const char *message = got == CORE_OK ? "no failure" : core_error_get()->message;
  if (got != code || strstr(message, first) == NULL || strstr(message, second) == NULL)
    fail_msg("\"%s\" is no %s with \"%s\" and \"%s\"", message, core_status_name(code), first, second);
}

static kern_context *new_context(void) {
  const kern_limits limits = {.rows = 1024,
                              .width = 512,
                              .experts = 16,
                              .sequence = 64,
                              .segments = 64,
                              .heads = 4,
                              .updates = 2,
                              .threads = 1};
  kern_context *context;
  expect_ok(cuda->context_create(&limits, &context));
  return context;
}

/* A tensor in device memory, released by the caller; content NULL: normals. */
static core_tensor on_device(core_dtype dtype, int64_t rows, int64_t columns, const void *content) {
  core_tensor t = core_tensor_2(NULL, dtype, rows, columns);
  const int64_t count = rows * columns;
  expect_ok(cuda->device->allocate(core_tensor_bytes(&t) + 1, &t.data));
  float *const host = calloc((size_t)count + 1, sizeof(double)); /* as large as any type */
  for (int64_t i = 0; i < count; i++) host[i] = (float)core_random_normal(3, (uint64_t)columns, (uint64_t)i);
  uint16_t *const brief = malloc((size_t)count * sizeof(uint16_t) + 1);
  for (int64_t i = 0; i < count; i++) brief[i] = core_bfloat_from_float(host[i]);
  if (content == NULL) content = dtype == CORE_BFLOAT16 ? (void *)brief : (void *)host;
  expect_ok(cuda->device->copy(t.data, content, core_tensor_bytes(&t), NULL));
  free(host), free(brief);
  return t;
}

static core_tensor line(core_tensor t) {
  return core_tensor_1(t.data, t.dtype, t.shape[0] * t.shape[1]);
}

static void wrong_arguments_are_refused(void **state) {
  (void)state;
  kern_context *c = new_context();
  core_tensor x = on_device(CORE_FLOAT32, 8, 12, NULL), odd = x, brief = x, lost = x;
  odd.shape[1] = 11, brief.dtype = CORE_BFLOAT16, lost.data = NULL;
  expect_refusal(cuda->axpy(c, 1, x, odd), CORE_ERR_ARGUMENT, "axpy", "[8, 11]");
  expect_refusal(cuda->scale(c, 1, lost), CORE_ERR_ARGUMENT, "scale", "no memory");
  expect_refusal(cuda->scale(c, 1, brief), CORE_ERR_UNSUPPORTED, "scale", "bfloat16");
  expect_refusal(cuda->gemm(c, KERN_NN, x, x, KERN_SET, x), CORE_ERR_ARGUMENT, "gemm", "inner");
  expect_refusal(cuda->gemm(c, KERN_NT, x, brief, KERN_SET, x), CORE_ERR_UNSUPPORTED, "gemm", "bfloat16");
  const int64_t down[] = {0, 6, 4, 8};
  expect_refusal(cuda->segment_mean_fwd(c, (kern_segments){down, x, 3}, x, x), CORE_ERR_ARGUMENT,
                 "segment_mean_fwd", "descends from 6 to 4");
  const kern_adamw list[3] = {{0}, {0}, {0}};
  expect_refusal(cuda->adamw(c, list, 3, x, x, x, x, none), CORE_ERR_ARGUMENT, "the list is 3", "at most 2");
  expect_refusal(cuda->adamw(c, list, 1, x, x, x, x, none), CORE_ERR_ARGUMENT, "adamw", "corrections");
  const kern_limits negative = {.width = -1};
  kern_context *other;
  expect_refusal(cuda->context_create(&negative, &other), CORE_ERR_ARGUMENT, "width", "-1");
  assert_null(other);
  assert_true(cuda->context_bytes(&negative) == SIZE_MAX);
  cuda->device->release(x.data);
  cuda->context_destroy(c);
}

/* A fault is reported by the next wait, once, by the name of its op. */
static void expect_fault(core_status enqueued, const char *op, const char *index) {
  expect_ok(enqueued);
  expect_refusal(cuda->device->stream_wait(NULL), CORE_ERR_ARGUMENT, op, index);
  expect_ok(cuda->device->stream_wait(NULL));
}

static void bad_indices_are_reported_and_harmless(void **state) {
  (void)state;
  kern_context *c = new_context();
  const int32_t bad[] = {0, 1, 2, 77, -9, 1, 0, 3};
  const int64_t offset[] = {0, 4, 8}, astray[] = {0, 4000, 8}, whole[] = {0, 8};
  core_tensor x = on_device(CORE_FLOAT32, 8, 12, NULL), y = on_device(CORE_FLOAT32, 8, 12, NULL);
  core_tensor list = on_device(CORE_INT32, 4, 2, bad), gate = on_device(CORE_FLOAT32, 4, 2, NULL);
  core_tensor four = on_device(CORE_FLOAT32, 4, 12, NULL), row = on_device(CORE_FLOAT32, 1, 8, NULL);
  core_tensor at = on_device(CORE_INT64, 1, 3, astray), slot = on_device(CORE_INT32, 4, 2, bad);
  core_tensor zeros = on_device(CORE_INT64, 1, 32, NULL), whole_at = on_device(CORE_INT64, 1, 2, whole);
  expect_fault(cuda->gather_rows(c, x, line(list), y), "gather_rows", "is ");
  expect_fault(cuda->combine_fwd(c, x, list, none, KERN_SET, four), "combine_fwd", "is ");
  expect_fault(cuda->combine_bwd(c, four, x, list, none, y, gate), "combine_bwd", "is ");
  expect_fault(cuda->router_gate_bwd(c, KERN_GATE_SOFTMAX, gate, four, list, gate, KERN_SET, four),
               "router_gate_bwd", "is ");
  expect_fault(cuda->router_gate_fwd(c, KERN_GATE_SOFTMAX, KERN_CALIBRATE_ADD, four, none, list, gate),
               "router_gate_fwd", "is ");
  expect_fault(cuda->router_calibrated_bwd(c, KERN_GATE_SOFTMAX, KERN_CALIBRATE_ADD, gate, four, four, list,
                                           four, four),
               "router_calibrated_bwd", "is ");
  expect_fault(cuda->router_second(c, four, 1, 2, core_tensor_1(zeros.data, CORE_UINT64, 4), list),
               "router_second", "is ");
  expect_fault(cuda->router_balance(c, four, list, core_tensor_1(zeros.data, CORE_INT32, 4), 2,
                                    core_tensor_2(zeros.data, CORE_FLOAT64, 1, 25)),
               "router_balance", "is ");
  expect_fault(cuda->router_balance_bwd(c, core_tensor_2(zeros.data, CORE_FLOAT64, 2, 12),
                                        core_tensor_1(list.data, CORE_INT32, 4), four, four),
               "router_balance_bwd", "is ");
  expect_fault(cuda->cross_entropy_fwd(c, x, 0, 12, line(list), line(row), line(row)), "cross_entropy_fwd",
               "is ");
  expect_fault(cuda->cross_entropy_bwd(c, 1, line(row), 0, 12, line(list), x, x), "cross_entropy_bwd", "is ");
  expect_fault(cuda->embedding_bwd(c, (kern_segments){whole, line(whole_at), 1}, line(list),
                                   core_tensor_1(slot.data, CORE_INT32, 1), x, y),
               "embedding_bwd", "is ");
  expect_fault(cuda->router_count(c, list, list, core_tensor_1(zeros.data, CORE_INT64, 26)), "router_count",
               "is ");
  expect_fault(cuda->segment_mean_fwd(c, (kern_segments){offset, line(at), 2}, x,
                                      core_tensor_2(four.data, CORE_FLOAT32, 2, 12)),
               "segment_mean_fwd", "is ");
  const kern_attention one_head = {.heads = 1, .kv_heads = 1, .head_width = 4, .scale = 1};
  expect_fault(cuda->attention_cached(c, &one_head, line(list), line(list), x, y,
                                      core_tensor_2(four.data, CORE_FLOAT32, 8, 4)),
               "attention_cached", "is ");
  expect_fault(cuda->dropout(c, 1, 2, 0.5, core_tensor_1(zeros.data, CORE_UINT64, 4), list, x), "dropout",
               "is ");
  int64_t count[4];
  expect_refusal(cuda->dispatch_plan(c, list, none, 4, count, slot, line(list)), CORE_ERR_ARGUMENT,
                 "dispatch_plan", "is ");
  expect_ok(cuda->device->stream_wait(NULL));
  const core_tensor all[] = {x, y, list, gate, four, row, at, slot, zeros, whole_at};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) cuda->device->release(all[i].data);
  cuda->context_destroy(c);
}

static core_status poll_gives_up(void *context) {
  int *calls = context;
  ++*calls;
  FAIL(CORE_ERR_TIMEOUT, "a peer is missing");
}

static void waits_end_when_the_watch_says_so(void **state) {
  (void)state;
  enum { BYTES = 16 << 20, TIMES = 300 };
  void *memory;
  int calls = 0;
  expect_ok(cuda->device->allocate(BYTES, &memory));
  for (int i = 0; i < TIMES; i++) expect_ok(cuda->device->fill(memory, i, BYTES, NULL));
  cuda->device->watch(poll_gives_up, &calls);
  const core_status status = cuda->device->stream_wait(NULL);
  cuda->device->watch(NULL, NULL);
  expect_refusal(status, CORE_ERR_TIMEOUT, "a peer is missing", "");
  assert_int_equal(calls, 1);
  expect_ok(cuda->device->stream_wait(NULL));
  cuda->device->release(memory);
}

static void one_device_is_opened(void **state) {
  (void)state;
  const kern_ops *again = NULL, *selected = NULL;
  size_t available = 0, total = 0;
  expect_ok(kern_cuda(0, &again));
  assert_ptr_equal(again, cuda);
  expect_ok(kern_select("cuda", 0, &selected));
  assert_ptr_equal(selected, cuda);
  expect_refusal(kern_cuda(-1, &again), CORE_ERR_ARGUMENT, "ordinal", "-1");
  assert_true(cuda->device->kind == CORE_DEVICE_CUDA && !cuda->device->host_access);
  assert_non_null(strstr(cuda->device->name, "cuda:0 "));
  expect_ok(cuda->device->memory(&available, &total));
  assert_true(available > 0 && available <= total);
}

/* --- repeatability --- */
typedef struct bits {
  unsigned char *at;
  size_t bytes;
} bits;

static bits download(core_tensor t) {
  const bits b = {malloc(core_tensor_bytes(&t) + 1), core_tensor_bytes(&t)};
  expect_ok(cuda->device->copy(b.at, t.data, b.bytes, NULL));
  return b;
}

/* Gradients that many blocks add up: the same bits each time. */
static void results_are_the_same_bits_each_time(void **state) {
  (void)state;
  kern_context *c = new_context();
  enum { T = 600, C = 64, TIMES = 3 };
  core_tensor x = on_device(CORE_BFLOAT16, T, C, NULL), dy = on_device(CORE_BFLOAT16, T, C, NULL);
  core_tensor weight = on_device(CORE_FLOAT32, 1, C, NULL), inv = on_device(CORE_FLOAT32, 1, T, NULL);
  bits first[2] = {{0}, {0}};
  for (int time = 0; time < TIMES; time++) {
    core_tensor dx = on_device(CORE_BFLOAT16, T, C, NULL), dweight = on_device(CORE_FLOAT32, 1, C, NULL);
    expect_ok(cuda->rmsnorm_bwd(c, dy, x, line(weight), line(inv), KERN_ADD, dx, line(dweight)));
    expect_ok(cuda->bias_bwd(c, dy, line(dweight)));
    const core_tensor results[2] = {dx, dweight};
    for (int i = 0; i < 2; i++) {
      const bits now = download(results[i]);
      if (time > 0) assert_memory_equal(first[i].at, now.at, now.bytes);
      if (time == 0)
        first[i] = now;
      else
        free(now.at);
      cuda->device->release(results[i].data);
    }
  }
  for (int i = 0; i < 2; i++) free(first[i].at);
  const core_tensor all[] = {x, dy, weight, inv};
  for (int i = 0; i < 4; i++) cuda->device->release(all[i].data);
  cuda->context_destroy(c);
}

/* Row 70 alone, and off the cache line, has the bits that it has among 130 rows. */
static void logits_of_a_row_depend_on_that_row_alone(void **state) {
  (void)state;
  kern_context *c = new_context();
  enum { T = 130, C = 100, E = 12, ROW = 70 };
  core_tensor x = on_device(CORE_BFLOAT16, T, C, NULL), weight = on_device(CORE_FLOAT32, E, C, NULL);
  core_tensor logits = on_device(CORE_FLOAT32, T, E, NULL), moved = on_device(CORE_BFLOAT16, 2, C, NULL);
  core_tensor one = core_tensor_2((uint16_t *)moved.data + 1, CORE_BFLOAT16, 1, C);
  core_tensor alone = on_device(CORE_FLOAT32, 1, E, NULL);
  expect_ok(cuda->device->copy(one.data, (uint16_t *)x.data + ROW * C, C * sizeof(uint16_t), NULL));
  expect_ok(cuda->router_logits(c, x, weight, none, logits));
  expect_ok(cuda->router_logits(c, one, weight, none, alone));
  const bits all = download(logits), single = download(alone);
  assert_memory_equal(all.at + ROW * E * sizeof(float), single.at, single.bytes);
  free(all.at), free(single.at);
  const core_tensor tensors[] = {x, weight, logits, moved, alone};
  for (int i = 0; i < 5; i++) cuda->device->release(tensors[i].data);
  cuda->context_destroy(c);
}

int main(void) {
  if (kern_cuda(0, &cuda) != CORE_OK) {
    printf("skipped: no CUDA device: %s\n", core_error_get()->message);
    return SKIPPED;
  }
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(float_ops_match_their_references),
      cmocka_unit_test(bfloat_ops_match_their_references),
      cmocka_unit_test(wrong_arguments_are_refused),
      cmocka_unit_test(bad_indices_are_reported_and_harmless),
      cmocka_unit_test(waits_end_when_the_watch_says_so),
      cmocka_unit_test(one_device_is_opened),
      cmocka_unit_test(results_are_the_same_bits_each_time),
      cmocka_unit_test(logits_of_a_row_depend_on_that_row_alone),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
