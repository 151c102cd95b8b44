/* Checked allocation for data/: sizes may come from hostile files. Memory belongs to the caller (free). */
#ifndef DATA_MEMORY_IMPL_H
#define DATA_MEMORY_IMPL_H

#include <stddef.h>

#include "core/status.h"

/* count * size zeroed bytes (at least one), refused when the product overflows. `what` names it in the error.
 */
CORE_NODISCARD core_status data_allocate_priv(int64_t count, size_t size, const char *what, void **out);
/* Typed: DATA_ALLOCATE(n, "ids", &pointer) */
#define DATA_ALLOCATE(count, what, pointer) \
  data_allocate_priv((count), sizeof(**(pointer)), (what), (void **)(pointer))

/* Bytes that grow by appending. Zero-initialised is empty; `bytes` is freed by the owner. */
typedef struct data_bytes {
  uint8_t *bytes;
  int64_t count, capacity;
} data_bytes;

CORE_NODISCARD core_status data_bytes_append_priv(data_bytes *target, const void *source, int64_t count);

/* printf into fresh memory. */
CORE_NODISCARD core_status data_text_priv(char **out, const char *format, ...) CORE_PRINTF(2, 3);

#endif
