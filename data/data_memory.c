#include "data/memory_impl.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

core_status data_allocate_priv(int64_t count, size_t size, const char *what, void **out) {
  size_t bytes = 0;
  *out = NULL;
  CHECK(count >= 0 && !__builtin_mul_overflow((size_t)count, size, &bytes) && bytes <= PTRDIFF_MAX,
        CORE_ERR_ARGUMENT, "%s: %lld items of %zu bytes are not addressable", what, (long long)count, size);
  *out = calloc(1, bytes > 0 ? bytes : 1);
  CHECK(*out != NULL, CORE_ERR_MEMORY, "%s: no memory for %lld items of %zu bytes", what, (long long)count,
        size);
  return CORE_OK;
}

core_status data_bytes_append_priv(data_bytes *target, const void *source, int64_t count) {
  if (target->capacity - target->count < count) {
    int64_t wanted = 0;
    CHECK(count <= INT64_MAX / 4 - target->count, CORE_ERR_ARGUMENT, "cannot append %lld bytes",
          (long long)count);
    wanted = 2 * (target->count + count) + 256;
    uint8_t *grown = realloc(target->bytes, (size_t)wanted);
    CHECK(grown != NULL, CORE_ERR_MEMORY, "no memory for %lld bytes of sample data", (long long)wanted);
    target->bytes = grown;
    target->capacity = wanted;
  }
  if (count > 0) memcpy(target->bytes + target->count, source, (size_t)count);
  target->count += count;
  return CORE_OK;
}

core_status data_text_priv(char **out, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vasprintf(out, format, arguments);
  va_end(arguments);
  if (length < 0) *out = NULL;
  CHECK(length >= 0, CORE_ERR_MEMORY, "no memory for a path");
  return CORE_OK;
}
