/* Gradient of a table whose rows were looked up: an entry has one writer a column, which adds its rows in
 * their order. */
#include "cuda_vector.cuh"

template <typename T>
struct embedding_sum {
  const int64_t *offset;
  const int32_t *row, *entry;
  const T *dx;
  float *dtable;
  int64_t count, rows, entries, c; /* of row, of dx, of dtable */
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t segment, int64_t at) const {
    const kern_span span(offset, segment, count, fault);
    const int64_t own = entry[segment];
    if (!fault.inside(own, 0, entries)) return;
    float sum[V];
    kern_load(dtable + own * c + at, sum);
    for (int64_t i = span.begin; i < span.end; i++) {
      const int64_t source = row[i];
      float value[V] = {};
      if (fault.inside(source, 0, rows)) kern_load(dx + source * c + at, value);
#pragma unroll
      for (int v = 0; v < V; v++) sum[v] += value[v];
    }
    kern_store(dtable + own * c + at, sum);
  }
};

core_status kern_embedding_bwd_cuda(kern_context *context, kern_segments segments, core_tensor row,
                                    core_tensor entry, core_tensor dx, core_tensor dtable) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  KERN_CHECK(row, CORE_INT32, KERN_ANY);
  KERN_CHECK(entry, CORE_INT32, segments.count);
  KERN_CHECK_REAL(dtable, KERN_ANY, c);
  TRY(kern_check_segments_cuda_priv(__func__, segments, row.shape[0], row.shape[0]));
  const char *const op = __func__;
  return kern_with_active(dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    const embedding_sum<T> sum = {kern_data<const int64_t>(segments.device_offset),
                                  kern_data<const int32_t>(row),
                                  kern_data<const int32_t>(entry),
                                  kern_data<const T>(dx),
                                  kern_data<float>(dtable),
                                  row.shape[0],
                                  dx.shape[0],
                                  dtable.shape[0],
                                  c,
                                  kern_cuda_fault_priv(KERN_CUDA_OP_embedding_bwd)};
    return kern_rows_priv<4>(context, op, sum, segments.count, c, kern_aligned({dx.data, dtable.data}));
  });
}
