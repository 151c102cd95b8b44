#include "battery.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h> /* fail_msg */

#include "core/random.h"

enum { GUARD = 64, GUARD_BYTE = 0xA5 };

static double allowed_error(const battery *b, const item *it) {
  static const double errors[] = {
      [TOL_EXACT] = 0, [TOL_DOUBLE] = 1e-24, [TOL_ROUND] = 1e-12, [TOL_SUM] = 1e-11, [TOL_CHAIN] = 1e-10};
  const bool device = b->ops->device->kind != CORE_DEVICE_CPU && b->active == CORE_BFLOAT16;
  return device && it->rounded_inside ? 1e-5 : errors[it->allowed];
}

static double get(const void *data, core_dtype dtype, int64_t i) {
  switch (dtype) {
    case CORE_FLOAT32:
      return ((const float *)data)[i];
    case CORE_FLOAT64:
      return ((const double *)data)[i];
    case CORE_INT32:
      return ((const int32_t *)data)[i];
    case CORE_INT64:
      return (double)((const int64_t *)data)[i];
    case CORE_UINT64:
      return (double)((const uint64_t *)data)[i];
    case CORE_UINT8:
      return ((const uint8_t *)data)[i];
    case CORE_FLOAT16:
      return core_float_from_half(((const uint16_t *)data)[i]);
    default:
      return core_float_from_bfloat(((const uint16_t *)data)[i]);
  }
}

static void put(void *data, core_dtype dtype, int64_t i, double value) {
  switch (dtype) {
    case CORE_FLOAT32:
      ((float *)data)[i] = (float)value;
      break;
    case CORE_FLOAT64:
      ((double *)data)[i] = value;
      break;
    case CORE_INT32:
      ((int32_t *)data)[i] = (int32_t)value;
      break;
    case CORE_INT64:
      ((int64_t *)data)[i] = (int64_t)value;
      break;
    case CORE_UINT64:
      ((uint64_t *)data)[i] = (uint64_t)value;
      break;
    case CORE_UINT8:
      ((uint8_t *)data)[i] = (uint8_t)value;
      break;
    case CORE_FLOAT16:
      ((uint16_t *)data)[i] = core_half_from_float((float)value);
      break;
    default:
      ((uint16_t *)data)[i] = core_bfloat_from_float((float)value);
      break;
  }
}

/* Data begin on a cache line, or one element past it: no op may count on alignment. */
static size_t lead(const item *it) {
  return GUARD + (it->shifted ? core_dtype_size(it->tensor.dtype) : 0);
}
static size_t block_bytes(const item *it) {
  return lead(it) + core_tensor_bytes(&it->tensor) + GUARD;
}

void battery_upload(battery *b, item *it) {
  char *stage = malloc(block_bytes(it));
  memset(stage, GUARD_BYTE, block_bytes(it));
  for (int64_t i = 0; i < it->count; i++) {
    put(stage + lead(it), it->tensor.dtype, i, it->ref[i]);
    it->ref[i] = get(stage + lead(it), it->tensor.dtype, i);
  }
  battery_expect_ok(b, b->ops->device->copy(it->block, stage, block_bytes(it), NULL));
  battery_expect_ok(b, b->ops->device->stream_wait(NULL));
  free(stage);
}

item *battery_add(battery *b, const char *name, core_dtype dtype, tolerance allowed, double scale,
                  const int64_t *shape, int32_t rank) {
  assert_true(b->count < (int32_t)(sizeof b->items / sizeof *b->items));
  item *it = &b->items[b->count++];
  *it = (item){.name = name,
               .tensor = {.dtype = dtype, .rank = rank, .shape = {1, 1, 1, 1}},
               .allowed = allowed,
               .shifted = b->shifted};
  for (int32_t i = 0; i < rank; i++) it->tensor.shape[i] = shape[i];
  it->count = core_tensor_count(&it->tensor);
  it->ref = calloc((size_t)it->count + 1, sizeof *it->ref);
  void *block = NULL;
  battery_expect_ok(b, b->ops->device->allocate(block_bytes(it), &block));
  it->block = block;
  it->tensor.data = it->block + lead(it);
  b->stream++;
  for (int64_t i = 0; scale != 0 && i < it->count; i++)
    it->ref[i] = scale * core_random_normal(7, b->stream, (uint64_t)i);
  battery_upload(b, it);
  return it;
}

void battery_expect_ok(const battery *b, core_status status) {
  if (status != CORE_OK) fail_msg("%s: %s", b->name, core_error_get()->message);
}

int64_t battery_pick(battery *b, int64_t n) {
  return (int64_t)core_random_below(11, ++b->stream, 0, (uint64_t)n);
}

kern_segments battery_segments(battery *b, int64_t t, int64_t *offset) {
  int64_t count = 0;
  offset[0] = 0;
  while (offset[count] < t) {
    int64_t next = offset[count] + battery_pick(b, 2 * count + 3); /* 0, or longer and longer */
    if (count >= t + 1) next = t;
    offset[count + 1] = next < t ? next : t;
    count++;
  }
  offset[++count] = t; /* an empty one at the end */
  item *it = battery_add(b, "offset", CORE_INT64, TOL_EXACT, 0, (const int64_t[]){count + 1}, 1);
  for (int64_t s = 0; s <= count; s++) it->ref[s] = (double)offset[s];
  battery_upload(b, it);
  return (kern_segments){.offset = offset, .device_offset = it->tensor, .count = count};
}

static void judge_guards(const battery *b, const item *it, const char *stage) {
  const size_t end = lead(it) + core_tensor_bytes(&it->tensor);
  for (size_t i = 0; i < block_bytes(it); i++)
    if ((i < lead(it) || i >= end) && (unsigned char)stage[i] != GUARD_BYTE)
      fail_msg("%s: byte %lld beside %s was overwritten (T %lld, C %lld, E %lld, K %lld)", b->name,
               (long long)i - (long long)lead(it), it->name, (long long)b->s.t, (long long)b->s.c,
               (long long)b->s.e, (long long)b->s.k);
}

/* The bfloat16 next to `bits` in magnitude, above or below. */
static double neighbour(uint16_t bits, int step) {
  if ((bits & 0x7fffu) == 0 && step < 0) return -core_float_from_bfloat((uint16_t)((bits & 0x8000u) | 1u));
  return core_float_from_bfloat((uint16_t)(bits + step));
}

/* How far r lies from element i, or from all that rounds to it; NaN when either is. */
static double distance(const void *data, core_dtype dtype, int64_t i, double r) {
  const double got = get(data, dtype, i);
  if (dtype != CORE_BFLOAT16) return got - r;
  const uint16_t bits = ((const uint16_t *)data)[i];
  const double one = (got + neighbour(bits, -1)) / 2, other = (got + neighbour(bits, 1)) / 2;
  const double low = one < other ? one : other, high = one < other ? other : one;
  if (!(r >= low)) return low - r;
  return r <= high ? 0 : r - high;
}

/* Compares the backend's content, downloaded into stage, with the mirror. */
static void judge_stage(const battery *b, const item *it, const char *stage) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < it->count; i++) {
    const double d = distance(stage + lead(it), it->tensor.dtype, i, it->ref[i]);
    error += d * d;
    norm += it->ref[i] * it->ref[i];
  }
  /* Numbers are of order one; the floor keeps a lone result that cancels from being judged by its own size.
   */
  const double nmse = it->count > 0 ? error / (norm + 0.01 * (double)it->count) : 0;
  const double allowed = allowed_error(b, it);
  if (!(nmse <= allowed))
    fail_msg("%s (%s): %s: NMSE %.3g above %.3g (T %lld, C %lld, E %lld, K %lld, write %d, variant %d, %s)",
             b->name, core_dtype_text(b->active), it->name, nmse, allowed, (long long)b->s.t,
             (long long)b->s.c, (long long)b->s.e, (long long)b->s.k, (int)b->s.write, b->s.variant,
             it->shifted ? "unaligned" : "aligned");
}

void battery_settle(battery *b, item *it) {
  char *stage = malloc(block_bytes(it));
  battery_expect_ok(b, b->ops->device->copy(stage, it->block, block_bytes(it), NULL));
  battery_expect_ok(b, b->ops->device->stream_wait(NULL));
  judge_guards(b, it, stage);
  judge_stage(b, it, stage);
  for (int64_t i = 0; i < it->count; i++) it->ref[i] = get(stage + lead(it), it->tensor.dtype, i);
  free(stage);
}

void battery_judge(battery *b) {
  for (int32_t i = 0; i < b->count; i++) battery_settle(b, &b->items[i]);
  for (int32_t i = 0; i < b->count; i++) {
    b->ops->device->release(b->items[i].block);
    free(b->items[i].ref);
  }
  b->count = 0;
}

/* Zero rows, one of everything, odd sizes, whole vectors, one more and one less, several blocks of work. */
static const sizes battery_sizes[] = {
    {.t = 0, .c = 8, .e = 4, .k = 2},    {.t = 1, .c = 1, .e = 1, .k = 1},
    {.t = 3, .c = 5, .e = 3, .k = 2},    {.t = 16, .c = 16, .e = 8, .k = 1},
    {.t = 17, .c = 33, .e = 5, .k = 3},  {.t = 63, .c = 64, .e = 16, .k = 8},
    {.t = 130, .c = 96, .e = 9, .k = 4}, {.t = 517, .c = 47, .e = 33, .k = 2}};

static void run_case(battery *b, const battery_case *it) {
  for (int write = 0; write < it->writes; write++)
    for (int variant = 0; variant < it->variants; variant++)
      for (int shifted = 0; shifted < 2; shifted++) {
        b->name = it->name;
        b->s.write = write == 0 ? KERN_SET : KERN_ADD;
        b->s.variant = variant;
        b->shifted = shifted != 0;
        it->run(b);
        battery_judge(b);
      }
}

void battery_run(const kern_ops *ops, core_dtype active, const battery_case *cases, int count) {
  const kern_limits limits = {.rows = 4096,
                              .width = 4096,
                              .experts = 64,
                              .sequence = 1024,
                              .segments = 1024,
                              .heads = 16,
                              .updates = 8,
                              .threads = 2};
  battery b = {.ops = ops, .active = active, .name = "context_create"};
  battery_expect_ok(&b, ops->context_create(&limits, &b.context));
  for (int i = 0; i < count; i++)
    for (size_t s = 0; s < sizeof battery_sizes / sizeof *battery_sizes; s++) {
      b.s = battery_sizes[s];
      run_case(&b, &cases[i]);
    }
  ops->context_destroy(b.context);
}

void battery_run_all(const kern_ops *ops, core_dtype active) {
  battery_run(ops, active, battery_dense, battery_dense_count);
  battery_run(ops, active, battery_flat, battery_flat_count);
  battery_run(ops, active, battery_sequence, battery_sequence_count);
  battery_run(ops, active, battery_router, battery_router_count);
  battery_run(ops, active, battery_gates, battery_gates_count);
  battery_run(ops, active, battery_permutation, battery_permutation_count);
  battery_run(ops, active, battery_loss, battery_loss_count);
}
