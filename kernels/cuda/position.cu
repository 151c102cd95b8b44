/* Learned positions: row i of the table is added to row i of every segment. Its gradient is summed over
 * stretches of segments, which are then added in order. */
#include "cuda_vector.cuh"

template <typename T>
struct position_add {
  const float *table;
  T *x;
  int64_t c;

  template <int V>
  __device__ void run(int64_t, const kern_span &span, int64_t row, int64_t at) const {
    float value[V], add[V];
    kern_load(x + row * c + at, value);
    kern_load(table + (row - span.begin) * c + at, add);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] += add[i];
    kern_store(x + row * c + at, value);
  }
};

/* A stretch of segments of blockIdx.y; out: its partial sums [longest, c], or the gradient itself. */
template <typename T, int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    position_sum(const T *dx, const int64_t *offset, int64_t count, int64_t stretch, int64_t rows,
                 int64_t longest, int64_t c, kern_write write, float *out, kern_fault fault) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t begin = blockIdx.y * stretch, end = kern_least(begin + stretch, count);
  if (i >= longest) return;
  for (int64_t at = (int64_t)threadIdx.x * V; at < c; at += (int64_t)blockDim.x * V) {
    float sum[V] = {};
#pragma unroll 4
    for (int64_t s = begin; s < end; s++) {
      const kern_span span(offset, s, rows, fault);
      if (i >= span.end - span.begin) continue;
      float value[V];
      kern_load(dx + (span.begin + i) * c + at, value);
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += value[j];
    }
    kern_put(out + ((int64_t)blockIdx.y * longest + i) * c + at, write, sum);
  }
}

static int64_t longest_of(const kern_segments &segments) {
  int64_t longest = 0;
  for (int64_t s = 0; s < segments.count; s++) {
    const int64_t length = segments.offset[s + 1] - segments.offset[s];
    if (length > longest) longest = length;
  }
  return longest;
}

core_status kern_position_fwd_cuda(kern_context *context, kern_segments segments, core_tensor table,
                                   core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(table, KERN_ANY, c);
  TRY(kern_check_segments_cuda_priv(__func__, segments, rows, table.shape[0]));
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const position_add<T> add = {kern_data<const float>(table), kern_data<T>(x), c};
    return kern_segments_priv<kern_vector<T>>(context, op, add, segments, rows, c,
                                              kern_cuda_fault_priv(KERN_CUDA_OP_position_fwd),
                                              kern_aligned({x.data, table.data}));
  });
}

core_status kern_position_bwd_cuda(kern_context *context, kern_segments segments, core_tensor dx,
                                   core_tensor dtable) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t rows = dx.shape[0], c = dx.shape[1];
  KERN_CHECK_REAL(dtable, KERN_ANY, c);
  TRY(kern_check_segments_cuda_priv(__func__, segments, rows, dtable.shape[0]));
  const int64_t longest = longest_of(segments), table = longest * c;
  if (table == 0) return CORE_OK;
  /* As many stretches as the scratch holds tables; one writes the gradient itself. */
  const int64_t most = kern_least(context->partial_count / table, 64);
  const int64_t wanted = kern_least(most, kern_divide_up(segments.count, 16));
  const int64_t stretch = kern_divide_up(segments.count, wanted > 1 ? wanted : 1);
  const int64_t stretches = kern_divide_up(segments.count, stretch);
  return kern_with_active(dx.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    constexpr int V = kern_vector<T>;
    const bool vectors = c % V == 0 && kern_aligned({dx.data, dtable.data});
    const dim3 block = kern_rows_block(vectors ? c / V : c);
    float *const out = stretches > 1 ? context->partial : kern_data<float>(dtable);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(longest, block.y), block, stretches),
                vectors ? position_sum<T, V> : position_sum<T, 1>, kern_data<const T>(dx),
                kern_data<const int64_t>(segments.device_offset), segments.count, stretch, rows, longest, c,
                stretches > 1 ? KERN_SET : KERN_ADD, out, kern_cuda_fault_priv(KERN_CUDA_OP_position_bwd));
    if (stretches > 1)
      TRY(kern_combine_partials_priv(context, out, stretches, table, table, kern_data<float>(dtable)));
    return CORE_OK;
  });
}
