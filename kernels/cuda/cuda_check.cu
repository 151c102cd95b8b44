/* Checks of arguments: one message form for every op. */
#include <stdio.h> /* snprintf */

#include "cuda_impl.h" /* declarations */

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

static bool shape_fits(const core_tensor &tensor, const int64_t *shape, int32_t rank) {
  int64_t bytes = (int64_t)core_dtype_size(tensor.dtype);
  for (int32_t i = 0; i < CORE_MAX_RANK; i++) {
    const int64_t expected = i < rank ? shape[i] : 1;
    if (tensor.shape[i] < 0) return false;
    if (expected != KERN_ANY && tensor.shape[i] != expected) return false;
    if (tensor.shape[i] > 0 && __builtin_mul_overflow(bytes, tensor.shape[i], &bytes)) return false;
  }
  return true;
}

core_status kern_check_cuda_priv(const char *op, const char *name, const core_tensor &tensor,
                                 core_dtype dtype, std::initializer_list<int64_t> shape) {
  const int32_t rank = (int32_t)shape.size();
  if (tensor.dtype == dtype && shape_fits(tensor, shape.begin(), rank)) {
    CHECK(tensor.data != NULL || core_tensor_count(&tensor) == 0, CORE_ERR_ARGUMENT,
          "%s: %s has no memory, but %lld elements", op, name, (long long)core_tensor_count(&tensor));
    return CORE_OK;
  }
  char got[SHAPE_TEXT], expected[SHAPE_TEXT];
  const int32_t own = tensor.rank < 1 ? 1 : tensor.rank > CORE_MAX_RANK ? CORE_MAX_RANK : tensor.rank;
  shape_text(tensor.shape, own, got);
  shape_text(shape.begin(), rank, expected);
  const bool brief = tensor.dtype == CORE_BFLOAT16 && dtype == CORE_FLOAT32;
  FAIL(brief ? CORE_ERR_UNSUPPORTED : CORE_ERR_ARGUMENT, "%s: %s is %s %s, expected %s %s", op, name,
       core_dtype_text(tensor.dtype), got, core_dtype_text(dtype), expected);
}

core_status kern_check_active_cuda_priv(const char *op, const char *name, const core_tensor &tensor) {
  CHECK(tensor.dtype == CORE_FLOAT32 || tensor.dtype == CORE_BFLOAT16, CORE_ERR_UNSUPPORTED,
        "%s: %s is %s, expected float32 or bfloat16", op, name, core_dtype_text(tensor.dtype));
  return CORE_OK;
}

core_status kern_check_offset_cuda_priv(const char *op, const char *name, const int64_t *offset,
                                        int64_t count, int64_t rows) {
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

core_status kern_check_segments_cuda_priv(const char *op, const kern_segments &segments, int64_t rows,
                                          int64_t longest) {
  TRY(kern_check_offset_cuda_priv(op, "segments", segments.offset, segments.count, rows));
  if (segments.count > 0)
    TRY(kern_check_cuda_priv(op, "segments.device_offset", segments.device_offset, CORE_INT64,
                             {segments.count + 1}));
  for (int64_t s = 0; s < segments.count; s++)
    CHECK(segments.offset[s + 1] - segments.offset[s] <= longest, CORE_ERR_ARGUMENT,
          "%s: segment %lld: its length is %lld, expected at most %lld", op, (long long)s,
          (long long)(segments.offset[s + 1] - segments.offset[s]), (long long)longest);
  return CORE_OK;
}

core_status kern_check_limit_cuda_priv(const char *op, const char *name, int64_t size, int64_t limit) {
  CHECK(size <= limit, CORE_ERR_ARGUMENT, "%s: %s is %lld, but the context was made for at most %lld", op,
        name, (long long)size, (long long)limit);
  return CORE_OK;
}

core_status kern_check_columns_cuda_priv(const char *op, int64_t first, int64_t n, int64_t all) {
  CHECK(first >= 0 && n >= 0 && all <= INT32_MAX && first <= all - n, CORE_ERR_ARGUMENT,
        "%s: columns %lld to %lld of %lld", op, (long long)first, (long long)(first + n), (long long)all);
  return CORE_OK;
}
