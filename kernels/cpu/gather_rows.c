/* Permutation by index: a copy of rows. Its inverse is combine without weights. */
#include <string.h> /* memcpy */

#include "cpu_impl.h"

core_status kern_gather_rows_cpu(kern_context *context, core_tensor x, core_tensor index, core_tensor y) {
  KERN_CHECK(x, x.dtype == CORE_INT32 ? CORE_INT32 : kern_active_dtype(x.dtype), KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(index, CORE_INT32, KERN_ANY);
  const int64_t rows = index.shape[0];
  KERN_CHECK(y, x.dtype, rows, c);
  KERN_CHECK_INDEX(index, 0, x.shape[0]);
  const int32_t *row = index.data;
  const size_t bytes = (size_t)c * core_dtype_size(x.dtype);
  const kern_split split = kern_split_rows(c > 0 ? rows : 0, c);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++)
      memcpy((char *)y.data + (size_t)t * bytes, (const char *)x.data + (size_t)row[t] * bytes, bytes);
  }
  return CORE_OK;
}
