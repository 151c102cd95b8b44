/* Properties that hold without a reference: inverses, determinism, independence of threads and neighbours,
 * extreme values, and the CPU's device. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "core/random.h"
#include "kernels/kernels.h"

enum { ROWS = 1000, WIDTH = 37, EXPERTS = 11, CHOICES = 3, LONG = 1100 };

static void must(core_status status) {
  if (status != CORE_OK) fail_msg("%s", core_error_get()->message);
}

static kern_context *context_of(int32_t threads) {
  const kern_limits limits = {
      .rows = 4096, .width = 1024, .experts = 64, .sequence = LONG, .heads = 8, .threads = threads};
  kern_context *context;
  must(kern_cpu()->context_create(&limits, &context));
  assert_int_equal(kern_cpu()->context_threads(context), threads);
  return context;
}

static core_tensor normals(int64_t rows, int64_t columns, uint64_t stream) {
  core_tensor tensor = core_tensor_2(NULL, CORE_REAL_DTYPE, rows, columns);
  must(kern_cpu()->device->allocate(core_tensor_bytes(&tensor), &tensor.data));
  for (int64_t i = 0; i < rows * columns; i++)
    ((core_real *)tensor.data)[i] = (core_real)core_random_normal(3, stream, (uint64_t)i);
  return tensor;
}
static core_tensor integers(int64_t rows, int64_t columns) {
  core_tensor tensor = core_tensor_2(NULL, CORE_INT32, rows, columns);
  must(kern_cpu()->device->allocate(core_tensor_bytes(&tensor), &tensor.data));
  memset(tensor.data, 0, core_tensor_bytes(&tensor));
  return tensor;
}
static void drop(core_tensor tensor) {
  kern_cpu()->device->release(tensor.data);
}
static uint64_t hash(core_tensor tensor) {
  return core_hash(tensor.data, core_tensor_bytes(&tensor), 0);
}
static core_real *values(core_tensor tensor) {
  return tensor.data;
}
static core_tensor row_of(core_tensor tensor, int64_t row) {
  return core_tensor_2(values(tensor) + row * tensor.shape[1], tensor.dtype, 1, tensor.shape[1]);
}

/* A token's logits must be the same bits alone and among a thousand, at every address. */
static void router_logits_do_not_depend_on_neighbours(void **state) {
  (void)state;
  kern_context *context = context_of(1);
  const int64_t widths[] = {1, 15, 16, 37, 64, 192, 255};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
    const core_tensor x = normals(ROWS, widths[w], w), weight = normals(EXPERTS, widths[w], 50 + w);
    const core_tensor all = normals(ROWS, EXPERTS, 0), one = normals(1, EXPERTS, 0), none = {0};
    must(kern_cpu()->router_logits(context, x, weight, none, all));
    for (int64_t row = 0; row < ROWS; row += 7) {
      must(kern_cpu()->router_logits(context, row_of(x, row), weight, none, one));
      assert_memory_equal(one.data, row_of(all, row).data, core_tensor_bytes(&one));
    }
    drop(x), drop(weight), drop(all), drop(one);
  }
  kern_cpu()->context_destroy(context);
}

typedef struct routed {
  uint64_t logits, noisy, choice, gate, sums;
} routed;

/* Everything that decides the routing, and the sums of the losses, as hashes. */
static routed route(int32_t threads) {
  const kern_ops *ops = kern_cpu();
  kern_context *context = context_of(threads);
  const core_tensor x = normals(ROWS, WIDTH, 1), weight = normals(EXPERTS, WIDTH, 2),
                    bias = normals(EXPERTS, 1, 3);
  const core_tensor logits = normals(ROWS, EXPERTS, 4), noisy = normals(ROWS, EXPERTS, 5);
  const core_tensor prob = normals(ROWS, EXPERTS, 6), gate = normals(ROWS, CHOICES, 7),
                    choice = integers(ROWS, CHOICES);
  static uint64_t key[ROWS];
  double all[2 * EXPERTS + 3] = {0};
  for (uint64_t i = 0; i < ROWS; i++) key[i] = 3 * i;
  must(ops->router_logits(context, x, weight, core_tensor_1(bias.data, bias.dtype, EXPERTS), logits));
  must(ops->router_noise(context, logits, 1, 2, core_tensor_1(key, CORE_UINT64, ROWS), 0.3, noisy));
  must(ops->router_choose(context, KERN_GATE_RENORMALISED, noisy, prob, choice, gate));
  must(ops->softmax_fwd(context, logits, prob));
  must(ops->router_sums(context, logits, prob, noisy, choice, 0.3,
                        core_tensor_1(all, CORE_FLOAT64, kern_router_sums_count(EXPERTS))));
  const routed result = {hash(logits), hash(noisy), hash(choice), hash(gate), core_hash(all, sizeof all, 0)};
  drop(x), drop(weight), drop(bias), drop(logits), drop(noisy), drop(prob), drop(gate), drop(choice);
  ops->context_destroy(context);
  return result;
}

static void routing_is_the_same_on_every_thread_count(void **state) {
  (void)state;
  const routed one = route(1), again = route(1), two = route(2), five = route(5);
  assert_memory_equal(&one, &again, sizeof one);
  assert_memory_equal(&one, &two, sizeof one);
  assert_memory_equal(&one, &five, sizeof one);
}

/* The choice's own softmax is the same bits as the op's, also on memory that lies differently. */
static void probabilities_do_not_depend_on_the_op(void **state) {
  (void)state;
  kern_context *context = context_of(2);
  for (int64_t experts = 1; experts < 70; experts += 17) {
    const core_tensor logits = normals(ROWS, experts, 1), prob = normals(ROWS, experts, 2);
    const core_tensor room = normals(ROWS + 1, experts, 3), gate = normals(ROWS, 1, 4);
    const core_tensor again = core_tensor_2(values(room) + 1, room.dtype, ROWS, experts);
    const core_tensor choice = integers(ROWS, 1);
    must(kern_cpu()->softmax_fwd(context, logits, prob));
    must(kern_cpu()->router_choose(context, KERN_GATE_SOFTMAX, logits, again, choice, gate));
    assert_memory_equal(prob.data, again.data, core_tensor_bytes(&prob));
    drop(logits), drop(prob), drop(room), drop(gate), drop(choice);
  }
  kern_cpu()->context_destroy(context);
}

/* Backward reductions over rows and tiles: same bits run after run, on one thread and on two. */
static uint64_t backward_hash(int32_t threads) {
  const kern_ops *ops = kern_cpu();
  kern_context *context = context_of(threads);
  const core_tensor dy = normals(ROWS, WIDTH, 1), x = normals(ROWS, WIDTH, 2), weight = normals(WIDTH, 1, 3);
  const core_tensor inv = normals(ROWS, 1, 4), dx = normals(ROWS, WIDTH, 5), dweight = normals(WIDTH, 1, 6);
  const core_tensor qkv = normals(ROWS, 3 * WIDTH, 7), dqkv = normals(ROWS, 3 * WIDTH, 8),
                    lse = normals(ROWS, 1, 9);
  const int64_t offset[] = {0, 3, 50, 51, 300, ROWS};
  const kern_attention attention = {{.offset = offset, .count = 5}, 1, 1, WIDTH, KERN_CAUSAL, 0.2};
  double squares = 0;
  must(ops->rmsnorm_bwd(context, dy, x, weight, inv, KERN_SET, dx, dweight));
  must(ops->bias_bwd(context, dy, dweight));
  must(ops->attention_fwd(context, &attention, qkv, dx, lse));
  must(ops->attention_bwd(context, &attention, dy, qkv, dx, lse, dqkv));
  must(ops->sum_squares(context, dqkv, core_tensor_1(&squares, CORE_FLOAT64, 1)));
  const uint64_t all[] = {hash(dx), hash(dweight), hash(dqkv), core_hash(&squares, sizeof squares, 0)};
  drop(dy), drop(x), drop(weight), drop(inv), drop(dx), drop(dweight), drop(qkv), drop(dqkv), drop(lse);
  ops->context_destroy(context);
  return core_hash(all, sizeof all, 0);
}

static void backward_is_deterministic(void **state) {
  (void)state;
  const uint64_t one = backward_hash(1);
  assert_true(one == backward_hash(1));
  assert_true(one == backward_hash(2));
}

/* Un-permutation undoes permutation, with each token's copies weighted 1/3 in exactly invertible numbers. */
static void combine_undoes_gather(void **state) {
  (void)state;
  kern_context *context = context_of(2);
  const core_tensor x = normals(ROWS, WIDTH, 1), rows = normals(ROWS * 2, WIDTH, 2),
                    back = normals(ROWS, WIDTH, 3);
  const core_tensor index = integers(ROWS * 2, 1), slot = integers(ROWS, 2), weight = normals(ROWS, 2, 4);
  static int64_t order[ROWS * 2];
  core_random_permutation(1, 2, ROWS * 2, order);
  for (int64_t i = 0; i < ROWS * 2; i++) {
    ((int32_t *)slot.data)[i] = (int32_t)order[i];
    ((int32_t *)index.data)[order[i]] = (int32_t)(i / 2);
    values(weight)[i] = (core_real)0.5;
  }
  must(kern_cpu()->gather_rows(context, x, index, rows));
  must(kern_cpu()->combine_fwd(context, rows, slot, weight, KERN_SET, back));
  assert_memory_equal(back.data, x.data, core_tensor_bytes(&x));
  drop(x), drop(rows), drop(back), drop(index), drop(slot), drop(weight);
  kern_cpu()->context_destroy(context);
}

/* Rows of NaN and infinity: indices stay in range, NaN loses to every number, sums do not crash. */
static void choices_survive_nan(void **state) {
  (void)state;
  kern_context *context = context_of(1);
  core_real logits[4][3] = {
      {NAN, NAN, NAN}, {NAN, -5, NAN}, {-INFINITY, -INFINITY, -INFINITY}, {INFINITY, NAN, 1}};
  const int32_t want[4][2] = {{0, 1}, {1, 0}, {0, 1}, {0, 2}};
  core_real prob[4][3], gate[4][2];
  int32_t choice[4][2];
  double sums[9] = {0};
  const core_tensor l = core_tensor_2(logits, CORE_REAL_DTYPE, 4, 3),
                    p = core_tensor_2(prob, CORE_REAL_DTYPE, 4, 3);
  const core_tensor c = core_tensor_2(choice, CORE_INT32, 4, 2);
  must(kern_cpu()->router_choose(context, KERN_GATE_SOFTMAX, l, p, c,
                                 core_tensor_2(gate, CORE_REAL_DTYPE, 4, 2)));
  assert_memory_equal(choice, want, sizeof want);
  must(kern_cpu()->router_sums(context, l, p, l, c, 0, core_tensor_1(sums, CORE_FLOAT64, 9)));
  assert_true(sums[0] == 4 && isnan(sums[1]));
  kern_cpu()->context_destroy(context);
}

/* Drawn second choices are as frequent as the others' probabilities say, whatever the first is; the same key
 * draws the same. A share of n draws is off by four of its deviations at most. */
static void second_choices_follow_the_probabilities(void **state) {
  (void)state;
  enum { DRAWS = 20000, E = 5 };
  static const core_real logits[E] = {0.3f, 1.2f, -0.7f, 0, 2};
  kern_context *context = context_of(2);
  core_real *all = malloc(sizeof *all * DRAWS * E);
  uint64_t *key = malloc(sizeof *key * DRAWS);
  int32_t *choice = malloc(sizeof *choice * DRAWS * 2), *again = malloc(sizeof *again * DRAWS * 2);
  double count[E] = {0}, rest = 0;
  assert_true(all && key && choice && again);
  for (int64_t i = 0; i < DRAWS * E; i++) all[i] = logits[i % E];
  for (int64_t i = 0; i < DRAWS; i++) key[i] = (uint64_t)i << 24;
  for (int64_t i = 0; i < 2 * DRAWS; i++) choice[i] = again[i] = 4;
  for (int32_t *to = choice; to; to = to == choice ? again : NULL)
    must(kern_cpu()->router_second(context, core_tensor_2(all, CORE_REAL_DTYPE, DRAWS, E), 1, 2,
                                   core_tensor_1(key, CORE_UINT64, DRAWS),
                                   core_tensor_2(to, CORE_INT32, DRAWS, 2)));
  assert_memory_equal(choice, again, sizeof *choice * DRAWS * 2);
  for (int64_t i = 0; i < DRAWS; i++) count[choice[2 * i + 1]]++;
  for (int e = 0; e < 4; e++) rest += exp((double)logits[e]);
  assert_true(count[4] == 0);
  for (int e = 0; e < 4; e++) {
    const double share = exp((double)logits[e]) / rest;
    assert_true(fabs(count[e] / DRAWS - share) < 4 * sqrt(share * (1 - share) / DRAWS));
  }
  free(all), free(key), free(choice), free(again);
  kern_cpu()->context_destroy(context);
}

/* One segment of 1100 tokens equals its causal self computed row by row with a prefix as the segment. */
static void long_causal_attention_equals_its_prefixes(void **state) {
  (void)state;
  enum { A = 32 };
  kern_context *context = context_of(2);
  const core_tensor qkv = normals(LONG, 3 * A, 1), out = normals(LONG, A, 2), lse = normals(LONG, 1, 3);
  const core_tensor part = normals(LONG, A, 4), part_lse = normals(LONG, 1, 5);
  const int64_t whole[] = {0, LONG};
  const kern_attention causal = {{.offset = whole, .count = 1}, 1, 1, A, KERN_CAUSAL, 0.5};
  must(kern_cpu()->attention_fwd(context, &causal, qkv, out, lse));
  for (int64_t length = 1; length <= LONG; length += 157) {
    const int64_t prefix[] = {0, length};
    const kern_attention open = {{.offset = prefix, .count = 1}, 1, 1, A, KERN_BIDIRECTIONAL, 0.5};
    must(kern_cpu()->attention_fwd(context, &open, core_tensor_2(qkv.data, qkv.dtype, length, 3 * A),
                                   core_tensor_2(part.data, part.dtype, length, A),
                                   core_tensor_2(part_lse.data, part_lse.dtype, length, 1)));
    for (int64_t a = 0; a < A; a++)
      assert_true(fabs((double)values(part)[(length - 1) * A + a] -
                       (double)values(out)[(length - 1) * A + a]) < 1e-5);
    assert_true(fabs((double)values(part_lse)[length - 1] - (double)values(lse)[length - 1]) < 1e-5);
  }
  drop(qkv), drop(out), drop(lse), drop(part), drop(part_lse);
  kern_cpu()->context_destroy(context);
}

/* Softmax and activations where exponentials overflow, vanish or are not numbers. */
static void extreme_values_are_handled(void **state) {
  (void)state;
  kern_context *context = context_of(1);
  core_real x[6] = {-1000, -100, -88, 88, 100, 1000}, y[6], p[6];
  const core_tensor in = core_tensor_2(x, CORE_REAL_DTYPE, 1, 6),
                    out = core_tensor_2(y, CORE_REAL_DTYPE, 1, 6);
  must(kern_cpu()->gelu_fwd(context, KERN_GELU_ERF, in, out));
  for (int i = 0; i < 6; i++) assert_true(i < 3 ? fabs((double)y[i]) < 1e-30 : y[i] == x[i]);
  must(kern_cpu()->gelu_fwd(context, KERN_GELU_TANH, in, out));
  for (int i = 0; i < 6; i++) assert_true(i < 3 ? fabs((double)y[i]) < 1e-30 : y[i] == x[i]);
  must(kern_cpu()->softmax_fwd(context, in, core_tensor_2(p, CORE_REAL_DTYPE, 1, 6)));
  for (int i = 0; i < 6; i++) assert_true(p[i] == (i == 5 ? 1 : 0));
  x[2] = NAN;
  must(kern_cpu()->gelu_fwd(context, KERN_GELU_ERF, in, out));
  assert_true(isnan(y[2]) && y[5] == 1000);
  must(kern_cpu()->softmax_fwd(context, in, core_tensor_2(p, CORE_REAL_DTYPE, 1, 6)));
  assert_true(isnan(p[0]) && isnan(p[5]));
  kern_cpu()->context_destroy(context);
}

/* A rank without tokens passes tensors without memory. */
static void nothing_needs_no_memory(void **state) {
  (void)state;
  const kern_ops *ops = kern_cpu();
  kern_context *context = context_of(2);
  const core_tensor none = core_tensor_2(NULL, CORE_REAL_DTYPE, 0, 12),
                    narrow = core_tensor_2(NULL, none.dtype, 0, 4);
  const core_tensor one = core_tensor_2(NULL, none.dtype, 0, 1), index = core_tensor_1(NULL, CORE_INT32, 0);
  const core_tensor experts = normals(3 * 4, 12, 1), weight = normals(12, 1, 2), mean = normals(2, 12, 3);
  const core_tensor stack = core_tensor_3(experts.data, none.dtype, 3, 4, 12);
  const int64_t zeros[4] = {0};
  const kern_attention attention = {{.offset = zeros, .count = 2}, 1, 1, 4, KERN_CAUSAL, 0.5};
  const uint64_t before = hash(weight);
  must(ops->attention_fwd(context, &attention, none, narrow, one));
  must(ops->attention_bwd(context, &attention, narrow, none, narrow, one, none));
  must(ops->gemm(context, KERN_NT, none, experts, KERN_SET, none));
  must(ops->gemm_grouped(context, KERN_NT, zeros, none, stack, KERN_SET, narrow));
  must(ops->rmsnorm_bwd(context, none, none, weight, one, KERN_ADD, none, weight));
  must(ops->bias_bwd(context, none, weight));
  must(ops->gather_rows(context, none, index, none));
  assert_true(hash(weight) == before);
  must(ops->segment_mean_fwd(context, attention.segments, none, mean));
  for (int64_t i = 0; i < 2 * 12; i++) assert_true(values(mean)[i] == 0);
  must(ops->gemm_grouped(context, KERN_TN, zeros, narrow, none, KERN_SET, stack));
  for (int64_t i = 0; i < 3 * 4 * 12; i++) assert_true(values(stack)[i] == 0);
  drop(experts), drop(weight), drop(mean);
  ops->context_destroy(context);
}

static void device_allocates_aligned_memory(void **state) {
  (void)state;
  const core_device *device = kern_cpu()->device;
  const size_t sizes[] = {0, 1, 63, 4096, (size_t)9 << 20};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    void *memory = NULL;
    must(device->allocate(sizes[i], &memory));
    assert_non_null(memory);
    assert_int_equal((uintptr_t)memory % 64, 0);
    must(device->fill(memory, 0x5a, sizes[i], NULL));
    for (size_t at = 0; at < sizes[i]; at += 4095) assert_int_equal(((unsigned char *)memory)[at], 0x5a);
    device->release(memory);
  }
  void *none = &none;
  assert_int_equal(device->allocate(SIZE_MAX - 10, &none), CORE_ERR_MEMORY);
  assert_null(none);
}

static void device_knows_its_memory(void **state) {
  (void)state;
  const core_device *device = kern_cpu()->device;
  size_t available = 0, total = 0;
  must(device->memory(&available, &total));
  assert_true(available > 0 && available <= total);
  void *host = NULL;
  must(device->host_allocate(100, &host));
  must(device->fill(host, 7, 100, NULL));
  char bytes[100] = {0};
  must(device->copy_later(bytes, host, 100, NULL));
  must(device->stream_wait(NULL));
  for (int i = 0; i < 100; i++) assert_int_equal(bytes[i], 7);
  device->host_release(host);
  device->watch(NULL, NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(router_logits_do_not_depend_on_neighbours),
      cmocka_unit_test(routing_is_the_same_on_every_thread_count),
      cmocka_unit_test(probabilities_do_not_depend_on_the_op),
      cmocka_unit_test(backward_is_deterministic),
      cmocka_unit_test(combine_undoes_gather),
      cmocka_unit_test(choices_survive_nan),
      cmocka_unit_test(second_choices_follow_the_probabilities),
      cmocka_unit_test(long_causal_attention_equals_its_prefixes),
      cmocka_unit_test(extreme_values_are_handled),
      cmocka_unit_test(nothing_needs_no_memory),
      cmocka_unit_test(device_allocates_aligned_memory),
      cmocka_unit_test(device_knows_its_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
