#include "twin.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h> /* fail_msg */

#include "core/random.h"

void twin_expect_ok(core_status status) {
  if (status != CORE_OK) fail_msg("%s", core_error_get()->message);
}

static double read_at(const void *data, core_dtype dtype, int64_t i) {
  if (dtype == CORE_FLOAT32) return ((const float *)data)[i];
  if (dtype == CORE_FLOAT64) return ((const double *)data)[i];
  if (dtype == CORE_INT32) return ((const int32_t *)data)[i];
  if (dtype == CORE_UINT8) return ((const uint8_t *)data)[i];
  if (dtype == CORE_INT64 || dtype == CORE_UINT64) return (double)((const int64_t *)data)[i];
  return core_float_from_bfloat(((const uint16_t *)data)[i]);
}

/* Random normals times scale; integers are left 0. */
static void fill_host(session *s, core_tensor *host, double scale) {
  s->stream++;
  for (int64_t i = 0; scale != 0 && i < core_tensor_count(host); i++) {
    const double value = scale * core_random_normal(5, s->stream, (uint64_t)i);
    if (host->dtype == CORE_FLOAT32) ((float *)host->data)[i] = (float)value;
    if (host->dtype == CORE_BFLOAT16) ((uint16_t *)host->data)[i] = core_bfloat_from_float((float)value);
  }
}

void twin_publish(session *s, twin *t) {
  const size_t bytes = core_tensor_bytes(&t->of[CPU]);
  twin_expect_ok(s->ops[CUDA]->device->copy(t->of[CUDA].data, t->of[CPU].data, bytes, NULL));
}

twin *twin_add(session *s, const char *name, core_dtype dtype, double scale, int64_t rows, int64_t columns) {
  assert_true(s->count < MOST_TWINS);
  twin *t = &s->twins[s->count++];
  t->name = name;
  for (int side = 0; side < SIDES; side++) {
    t->of[side] = core_tensor_2(NULL, dtype, rows, columns);
    twin_expect_ok(s->ops[side]->device->allocate(core_tensor_bytes(&t->of[side]) + 1, &t->of[side].data));
  }
  memset(t->of[CPU].data, 0, core_tensor_bytes(&t->of[CPU]));
  fill_host(s, &t->of[CPU], scale);
  twin_publish(s, t);
  return t;
}
twin *twin_add_active(session *s, const char *name, double scale, int64_t rows, int64_t columns) {
  return twin_add(s, name, s->active, scale, rows, columns);
}
twin *twin_add_real(session *s, const char *name, double scale, int64_t rows, int64_t columns) {
  return twin_add(s, name, CORE_FLOAT32, scale, rows, columns);
}

/* Float results agree as sums in another order do; a bfloat16 result may fall on the other side of a rounding
 * in a few elements of a thousand. Exact for integers. */
static double allowed(core_dtype dtype) {
  if (dtype == CORE_FLOAT32) return 2e-11;
  if (dtype == CORE_FLOAT64) return 1e-12;
  return dtype == CORE_BFLOAT16 ? 1e-7 : 0;
}

static void compare(session *s, const twin *t, double bar, int64_t width) {
  const size_t bytes = core_tensor_bytes(&t->of[CUDA]);
  void *got = malloc(bytes + 1);
  twin_expect_ok(s->ops[CUDA]->device->copy(got, t->of[CUDA].data, bytes, NULL));
  double error = 0, norm = 0;
  for (int64_t i = 0; i < core_tensor_count(&t->of[CPU]); i++) {
    const double want = read_at(t->of[CPU].data, t->of[CPU].dtype, i),
                 d = read_at(got, t->of[CPU].dtype, i) - want;
    error += d * d;
    norm += want * want;
  }
  free(got);
  if (!(error <= bar * norm))
    fail_msg("%s (%s) at %lld: NMSE %.3g above %.3g", t->name, core_dtype_text(s->active), (long long)width,
             error / norm, bar);
}

void twin_finish(session *s, int64_t width) {
  for (int i = 0; i < s->count; i++)
    compare(s, &s->twins[i], s->bar > 0 ? s->bar : allowed(s->twins[i].of[CPU].dtype), width);
  s->bar = 0;
  for (int i = 0; i < s->count; i++)
    for (int side = 0; side < SIDES; side++) s->ops[side]->device->release(s->twins[i].of[side].data);
  s->count = 0;
}
