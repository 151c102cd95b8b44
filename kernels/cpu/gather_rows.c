/* Permutation by index: a copy of rows. Its inverse is combine without weights. */
#include <string.h> /* memcpy */

#include "active_impl.h" /* kern_element */

core_status kern_gather_rows_cpu(kern_context *context, core_tensor x, core_tensor index, core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
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
      memcpy(kern_element(y.data, y.dtype, t * c), kern_element(x.data, x.dtype, row[t] * c), bytes);
  }
  return CORE_OK;
}
