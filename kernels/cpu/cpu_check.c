/* Checks of arguments: one message form for every op. */
#include <stdio.h> /* snprintf */

#include "cpu_impl.h" /* declarations */

enum { SHAPE_TEXT = 112 };

static void shape_text(const int64_t *shape, int32_t rank, char text[SHAPE_TEXT]) {
  int at = snprintf(text, SHAPE_TEXT, "[");
  for (int32_t i = 0; i < rank && at < SHAPE_TEXT - 24; i++) {
    const char *comma = i > 0 ? ", " : "";
    at += shape[i] == KERN_ANY
              ? snprintf(text + at, (size_t)(SHAPE_TEXT - at), "%sany", comma)
              : snprintf(text + at, (size_t)(SHAPE_TEXT - at), "%s%lld", comma, (long long)shape[i]);
  }
  snprintf(text + at, (size_t)(SHAPE_TEXT - at), "]");
}

static bool shape_fits(const core_tensor *tensor, const int64_t *shape, int32_t rank) {
  int64_t bytes = (int64_t)core_dtype_size(tensor->dtype);
  for (int32_t i = 0; i < CORE_MAX_RANK; i++) {
    const int64_t expected = i < rank ? shape[i] : 1;
    if (tensor->shape[i] < 0) return false;
    if (expected != KERN_ANY && tensor->shape[i] != expected) return false;
    if (tensor->shape[i] > 0 && __builtin_mul_overflow(bytes, tensor->shape[i], &bytes)) return false;
  }
  return true;
}

core_status kern_check_priv(const char *op, const char *name, const core_tensor *tensor, core_dtype dtype,
                            const int64_t *shape, int32_t rank) {
  if (tensor->dtype == dtype && shape_fits(tensor, shape, rank)) {
    CHECK(tensor->data != NULL || core_tensor_count(tensor) == 0, CORE_ERR_ARGUMENT,
          "%s: %s has no memory, but %lld elements", op, name, (long long)core_tensor_count(tensor));
    return CORE_OK;
  }
  char got[SHAPE_TEXT], expected[SHAPE_TEXT];
  shape_text(tensor->shape,
             tensor->rank < 1               ? 1
             : tensor->rank > CORE_MAX_RANK ? CORE_MAX_RANK
                                            : tensor->rank,
             got);
  shape_text(shape, rank, expected);
  const bool later = tensor->dtype == CORE_BFLOAT16 && dtype == CORE_REAL_DTYPE;
  FAIL(later ? CORE_ERR_UNSUPPORTED : CORE_ERR_ARGUMENT, "%s: %s is %s %s, expected %s %s", op, name,
       core_dtype_text(tensor->dtype), got, core_dtype_text(dtype), expected);
}

KERN_CLONES static bool index_inside(const int32_t *index, int64_t count, int64_t low, int64_t high) {
  int32_t least = INT32_MAX, most = INT32_MIN;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < count; i++) {
    least = index[i] < least ? index[i] : least;
    most = index[i] > most ? index[i] : most;
  }
  return count == 0 || (least >= low && most < high);
}

core_status kern_check_index_priv(const char *op, const char *name, const core_tensor *tensor, int64_t low,
                                  int64_t high) {
  const int32_t *index = tensor->data;
  const int64_t count = core_tensor_count(tensor);
  if (index_inside(index, count, low, high)) return CORE_OK;
  int64_t at = 0;
  while (index[at] >= low && index[at] < high) at++;
  FAIL(CORE_ERR_ARGUMENT, "%s: %s[%lld] is %d, expected %lld to %lld", op, name, (long long)at,
       (int)index[at], (long long)low, (long long)high - 1);
}

core_status kern_check_offset_priv(const char *op, const char *name, const int64_t *offset, int64_t count,
                                   int64_t rows) {
  CHECK(count >= 0, CORE_ERR_ARGUMENT, "%s: %s: a count of %lld", op, name, (long long)count);
  if (offset == NULL) {
    CHECK(count == 0 && rows == 0, CORE_ERR_ARGUMENT, "%s: %s is absent, but there are %lld rows", op, name,
          (long long)rows);
    return CORE_OK;
  }
  CHECK(offset[0] == 0 && offset[count] == rows, CORE_ERR_ARGUMENT,
        "%s: %s runs from %lld to %lld, expected 0 to %lld", op, name, (long long)offset[0],
        (long long)offset[count], (long long)rows);
  for (int64_t i = 0; i < count; i++)
    CHECK(offset[i] <= offset[i + 1], CORE_ERR_ARGUMENT, "%s: %s descends from %lld to %lld at %lld", op,
          name, (long long)offset[i], (long long)offset[i + 1], (long long)i);
  return CORE_OK;
}

core_status kern_check_limit_priv(const char *op, const char *name, int64_t size, int64_t limit) {
  CHECK(size <= limit, CORE_ERR_ARGUMENT, "%s: %s is %lld, but the context was made for at most %lld", op,
        name, (long long)size, (long long)limit);
  return CORE_OK;
}

core_status kern_check_columns_priv(const char *op, int64_t first, int64_t n, int64_t all) {
  CHECK(first >= 0 && n >= 0 && all <= INT32_MAX && first <= all - n, CORE_ERR_ARGUMENT,
        "%s: columns %lld to %lld of %lld", op, (long long)first, (long long)(first + n), (long long)all);
  return CORE_OK;
}
