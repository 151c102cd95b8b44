#include "core/tensor.h"

#include <string.h>

size_t core_dtype_size(core_dtype dtype) {
  static const size_t sizes[] = {
#define CORE_DTYPE_SIZE(name, bytes, text) bytes,
      CORE_DTYPE_LIST(CORE_DTYPE_SIZE)
#undef CORE_DTYPE_SIZE
  };
  return (unsigned)dtype < CORE_DTYPE_COUNT ? sizes[dtype] : 0;
}

static const char *const dtype_texts[] = {
#define CORE_DTYPE_TEXT(name, bytes, text) text,
    CORE_DTYPE_LIST(CORE_DTYPE_TEXT)
#undef CORE_DTYPE_TEXT
};

const char *core_dtype_text(core_dtype dtype) {
  return (unsigned)dtype < CORE_DTYPE_COUNT ? dtype_texts[dtype] : "unknown";
}

core_dtype core_dtype_parse(const char *text) {
  for (int i = 0; i < CORE_DTYPE_COUNT; i++)
    if (strcmp(text, dtype_texts[i]) == 0) return (core_dtype)i;
  return CORE_DTYPE_COUNT;
}

int64_t core_tensor_count(const core_tensor *tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor->rank; i++) count *= tensor->shape[i];
  return count;
}

size_t core_tensor_bytes(const core_tensor *tensor) {
  return (size_t)core_tensor_count(tensor) * core_dtype_size(tensor->dtype);
}

typedef union word {
  uint32_t u;
  float f;
} word;

float core_float_from_half(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return (word){.u = sign | 0x7f800000u | mantissa << 13}.f;
  if (exponent != 0) return (word){.u = sign | (exponent + 112) << 23 | mantissa << 13}.f;
  float tiny = (float)mantissa * 0x1p-24f; /* subnormal */
  return sign ? -tiny : tiny;
}

uint16_t core_half_from_float(float value) {
  uint32_t bits = (word){.f = value}.u, magnitude = bits & 0x7fffffffu;
  uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;  /* NaN */
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u; /* rounds beyond 65504 */
  if (magnitude < 0x38800000u) {                       /* subnormal: let the float unit round to even */
    word shifted = {.f = (word){.u = magnitude}.f + 0.5f};
    return sign | (uint16_t)(shifted.u - 0x3f000000u);
  }
  uint32_t odd = magnitude >> 13 & 1u;
  return sign | (uint16_t)((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

uint16_t core_bfloat_from_float(float value) {
  uint32_t bits = (word){.f = value}.u;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
