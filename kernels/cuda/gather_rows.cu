/* Rows picked by an index: the dispatch. */
#include "cuda_vector.cuh"

template <typename T>
struct gather_row {
  const T *x;
  const int32_t *index;
  T *y;
  int64_t rows, c; /* of x */
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    const int64_t source = index[row];
    float value[V] = {};
    if (fault.inside(source, 0, rows)) kern_load(x + source * c + at, value);
    kern_store(y + row * c + at, value);
  }
};

core_status kern_gather_rows_cuda(kern_context *context, core_tensor x, core_tensor index, core_tensor y) {
  if (x.dtype != CORE_INT32) TRY(kern_check_active_cuda_priv(__func__, "x", x));
  KERN_CHECK(x, x.dtype, KERN_ANY, KERN_ANY);
  KERN_CHECK(index, CORE_INT32, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK(y, x.dtype, index.shape[0], c);
  const char *const op = __func__;
  return kern_with_active(
      x.dtype, [&](auto zero) { /* an int32 is copied as a float's bits */
                                using T = decltype(zero);
                                const gather_row<T> gather = {kern_data<const T>(x),
                                                              kern_data<const int32_t>(index),
                                                              kern_data<T>(y),
                                                              x.shape[0],
                                                              c,
                                                              kern_cuda_fault_priv(KERN_CUDA_OP_gather_rows)};
                                return kern_rows_priv<kern_vector<T>>(context, op, gather, index.shape[0], c,
                                                                      kern_aligned({x.data, y.data}));
      });
}
