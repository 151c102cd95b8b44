/* Tensor descriptor: where numbers lie, of what type and shape. It owns nothing; memory belongs to an arena.
 * Row-major and contiguous unless a docstring says otherwise. */
#ifndef CORE_TENSOR_H
#define CORE_TENSOR_H

#include <stddef.h> /* size_t */
#include <stdint.h>

#include "core/real.h" /* CORE_REAL_DTYPE */

/* name, bytes, text. Values are stored in checkpoints: append only. */
#define CORE_DTYPE_LIST(X)   \
  X(FLOAT32, 4, "float32")   \
  X(BFLOAT16, 2, "bfloat16") \
  X(FLOAT16, 2, "float16")   \
  X(FLOAT64, 8, "float64")   \
  X(INT32, 4, "int32")       \
  X(INT64, 8, "int64")       \
  X(UINT64, 8, "uint64")     \
  X(UINT8, 1, "uint8")

typedef enum core_dtype {
#define CORE_DTYPE_ENUM(name, bytes, text) CORE_##name,
  CORE_DTYPE_LIST(CORE_DTYPE_ENUM)
#undef CORE_DTYPE_ENUM
      CORE_DTYPE_COUNT
} core_dtype;

enum { CORE_MAX_RANK = 4 };

typedef struct core_tensor {
  void *data;
  core_dtype dtype;
  int32_t rank;                 /* 0..4; 0 is a scalar */
  int64_t shape[CORE_MAX_RANK]; /* unused entries are 1 */
} core_tensor;

size_t core_dtype_size(core_dtype dtype);
const char *core_dtype_text(core_dtype dtype);
/* Reads "float32" and so on; returns CORE_DTYPE_COUNT for anything else. */
core_dtype core_dtype_parse(const char *text);

int64_t core_tensor_count(const core_tensor *tensor);
size_t core_tensor_bytes(const core_tensor *tensor);

static inline core_tensor core_tensor_1(void *data, core_dtype dtype, int64_t n) {
  return (core_tensor){data, dtype, 1, {n, 1, 1, 1}};
}
static inline core_tensor core_tensor_2(void *data, core_dtype dtype, int64_t rows, int64_t columns) {
  return (core_tensor){data, dtype, 2, {rows, columns, 1, 1}};
}
static inline core_tensor core_tensor_3(void *data, core_dtype dtype, int64_t n, int64_t rows,
                                        int64_t columns) {
  return (core_tensor){data, dtype, 3, {n, rows, columns, 1}};
}

/* float16 and bfloat16 to float32 and back (round to nearest even; NaN stays NaN). */
float core_float_from_half(uint16_t bits);
uint16_t core_half_from_float(float value);
static inline float core_float_from_bfloat(uint16_t bits) {
  union {
    uint32_t u;
    float f;
  } word = {(uint32_t)bits << 16};
  return word.f;
}
uint16_t core_bfloat_from_float(float value);

#endif
