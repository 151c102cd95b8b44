/* A bias per group of rows: the bias of a linear layer, group by group, in one launch for all groups. */
#include <string.h> /* memcpy */

#include "cuda_vector.cuh"

template <typename T>
struct bias_add_group {
  const float *bias; /* [G,C] */
  T *x;
  int64_t c;

  template <int V>
  __device__ void run(int64_t group, const kern_span &, int64_t row, int64_t at) const {
    float sum[V], add[V];
    kern_load(x + row * c + at, sum);
    kern_load(bias + group * c + at, add);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += add[i];
    kern_store(x + row * c + at, sum);
  }
};

/* The rows of the groups in device memory. */
static core_status rows_sent(kern_context *context, const int64_t *row, int64_t groups,
                             const int64_t **device) {
  const size_t bytes = (size_t)(groups + 1) * sizeof *row;
  void *host, *sent;
  TRY(kern_stage_begin_priv(context, bytes, &host));
  memcpy(host, row, bytes);
  TRY(kern_stage_send_priv(context, bytes, &sent));
  *device = (const int64_t *)sent;
  return CORE_OK;
}

core_status kern_bias_grouped_fwd_cuda(kern_context *context, const int64_t *row, core_tensor bias,
                                       core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t rows = x.shape[0], c = x.shape[1];
  KERN_CHECK_REAL(bias, KERN_ANY, c);
  const int64_t groups = bias.shape[0];
  TRY(kern_check_offset_cuda_priv(__func__, "row", row, groups, rows));
  if (rows == 0 || c == 0) return CORE_OK;
  const int64_t *offset = NULL;
  TRY(rows_sent(context, row, groups, &offset));
  const char *const op = __func__;
  const int64_t parts = kern_least(kern_divide_up(rows, groups * 16), 64); /* blocks of an average group */
  const kern_fault fault = kern_cuda_fault_priv(KERN_CUDA_OP_bias_grouped_fwd);
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kern_vector<T>;
    const bias_add_group<T> add = {kern_data<const float>(bias), kern_data<T>(x), c};
    return kern_aligned({x.data, bias.data}) && c % V == 0
               ? kern_segments_of<V>(context, op, add, offset, groups, parts, rows, c, fault)
               : kern_segments_of<1>(context, op, add, offset, groups, parts, rows, c, fault);
  });
}

core_status kern_bias_grouped_bwd_cuda(kern_context *context, const int64_t *row, core_tensor dy,
                                       core_tensor dbias) {
  KERN_CHECK_ACTIVE(dy, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(dbias, KERN_ANY, dy.shape[1]);
  const int64_t rows = dy.shape[0], groups = dbias.shape[0];
  TRY(kern_check_offset_cuda_priv(__func__, "row", row, groups, rows));
  if (rows == 0) return CORE_OK;
  int64_t longest = 0;
  for (int64_t g = 0; g < groups; g++)
    longest = row[g + 1] - row[g] > longest ? row[g + 1] - row[g] : longest;
  const int64_t *offset = NULL;
  TRY(rows_sent(context, row, groups, &offset));
  TRY(kern_sum_rows_priv(context, dy, offset, groups, longest, kern_data<float>(dbias)));
  return CORE_OK;
}
