/* Attention on packed segments, forward: an online softmax over tiles of keys, per tile of queries and head
 * (Milakov and Gimelshein 2018; Dao et al. 2022). */
#include "attention_tile.cuh"

struct attention_range {
  int2 *range;

  template <int V>
  __device__ void run(int64_t, const kern_span &span, int64_t row, int64_t) const {
    range[row] = make_int2((int)span.begin, (int)span.end);
  }
};

/* Largest and sum of exponentials of the thread's own rows so far. */
struct attention_softmax {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  /* Masked scores are -infinity. s -> exp(s - most); by: what older sums are to be multiplied with. */
  __device__ void add(float (&s)[2][4], float (&by)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = fmaxf(fmaxf(s[r][0], s[r][1]), fmaxf(s[r][2], s[r][3]));
      top = fmaxf(most[r], kern_lanes_reduce<KERN_TILE_LANES>(top, kern_larger()));
      const float base = top > -INFINITY ? top : 0.0f;
      by[r] = expf(most[r] - base);
      float part = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        s[r][j] = expf(s[r][j] - base);
        part += s[r][j];
      }
      sum[r] = sum[r] * by[r] + kern_lanes_reduce<KERN_TILE_LANES>(part, kern_plus());
      most[r] = top;
    }
  }
};

/* Block (tile of queries, head). */
template <typename T, int D>
static __global__ void __launch_bounds__(KERN_TILE_BLOCK)
    attention_forward(kern_attention_job job, const T *qkv, T *out, float *lse) {
  constexpr int TILE = KERN_TILE_ROWS * kern_tile_pitch<D>;
  float *const query = KERN_SHARED(float), *const key = query + TILE, *const value = key + TILE,
               *const weights = value + TILE;
  const int head = blockIdx.y, kv_head = head / (job.heads / job.kv_heads);
  const int64_t first = (int64_t)blockIdx.x * KERN_TILE_ROWS, own = first + kern_tile_own();
  const int64_t past = kern_least(first + KERN_TILE_ROWS, job.rows);
  const int2 segment[2] = {job.segment(own), job.segment(own + 1)};
  const int64_t end = job.causal ? past : job.segment(past - 1).y;
  kern_tile_load<D>(job, qkv + job.query_column(head), job.qkv_row(), first, past, query);
  attention_softmax softmax;
  float acc[2][D / 8] = {};
  for (int64_t at = job.segment(first).x; at < end; at += KERN_TILE_ROWS) {
    kern_tile_load<D>(job, qkv + job.key_column(kv_head), job.qkv_row(), at, end, key);
    kern_tile_load<D>(job, qkv + job.value_column(kv_head), job.qkv_row(), at, end, value);
    __syncthreads();
    float s[2][4], by[2];
    kern_tile_scores<D>(query, key, s);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t other = at + kern_tile_x() + j * KERN_TILE_LANES;
        const bool seen = other >= segment[r].x && other < segment[r].y && !(job.causal && other > own + r);
        s[r][j] = seen ? job.scale * s[r][j] : -INFINITY;
      }
    softmax.add(s, by);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int c = 0; c < D / 8; c++) acc[r][c] *= by[r];
    kern_tile_weights(s, weights);
    kern_tile_mix<D>(weights, value, acc);
    __syncthreads();
  }
  const float by[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
  kern_tile_store<D>(job, first, job.out_row(), acc, by,
                     out + first * job.out_row() + job.query_column(head));
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (kern_tile_x() == 0 && own + r < job.rows)
      lse[(own + r) * job.heads + head] = softmax.most[r] + logf(softmax.sum[r]);
}

core_status kern_attention_checked_priv(const char *op, const kern_context *context,
                                        const kern_attention *attention, core_tensor qkv, core_tensor out,
                                        core_tensor lse) {
  const int64_t rows = qkv.shape[0], heads = attention->heads, kv_heads = attention->kv_heads;
  const int64_t width = attention->head_width;
  CHECK(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0, CORE_ERR_ARGUMENT,
        "%s: %lld heads over %lld key/value heads, expected a multiple", op, (long long)heads,
        (long long)kv_heads);
  CHECK(width >= 1 && width <= KERN_MAX_HEAD_WIDTH, CORE_ERR_ARGUMENT,
        "%s: head width %lld, expected 1 to %d", op, (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  TRY(kern_check_active_cuda_priv(op, "qkv", qkv));
  TRY(kern_check_cuda_priv(op, "qkv", qkv, qkv.dtype, {KERN_ANY, (heads + 2 * kv_heads) * width}));
  TRY(kern_check_cuda_priv(op, "out", out, qkv.dtype, {rows, heads * width}));
  TRY(kern_check_cuda_priv(op, "lse", lse, CORE_FLOAT32, {rows, heads}));
  TRY(kern_check_limit_cuda_priv(op, "rows", rows, context->limits.rows));
  TRY(kern_check_limit_cuda_priv(op, "heads", heads, context->limits.heads));
  TRY(kern_check_limit_cuda_priv(op, "width", qkv.shape[1], context->limits.width));
  TRY(kern_check_segments_cuda_priv(op, attention->segments, rows, context->limits.sequence));
  return CORE_OK;
}

core_status kern_attention_job_priv(const kern_context *context, const kern_attention *attention,
                                    core_tensor qkv, kern_fault fault, kern_attention_job *job) {
  job->range = context->range;
  job->rows = qkv.shape[0];
  job->heads = attention->heads, job->kv_heads = attention->kv_heads, job->width = attention->head_width;
  job->causal = attention->mask == KERN_CAUSAL;
  job->scale = (float)attention->scale;
  const attention_range range = {context->range};
  /* Rows that no segment of the device's offsets covers see nothing. */
  KERN_CUDA(cudaMemsetAsync(context->range, 0, (size_t)job->rows * sizeof(int2), context->stream));
  TRY(kern_segments_priv<1>(context, __func__, range, attention->segments, job->rows, 1, fault, false));
  return CORE_OK;
}

core_status kern_attention_fwd_cuda(kern_context *context, const kern_attention *attention, core_tensor qkv,
                                    core_tensor out, core_tensor lse) {
  TRY(kern_attention_checked_priv(__func__, context, attention, qkv, out, lse));
  CHECK(attention->scale > 0, CORE_ERR_ARGUMENT, "%s: scale is %g, expected above 0", __func__,
        attention->scale);
  if (qkv.shape[0] == 0) return CORE_OK;
  kern_attention_job job;
  TRY(kern_attention_job_priv(context, attention, qkv, kern_cuda_fault_priv(KERN_CUDA_OP_attention_fwd),
                              &job));
  return kern_with_active(qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    job.vectors = job.width % kern_vector<T> == 0 && kern_aligned({qkv.data, out.data});
    return kern_with_head(job.width, [&](auto head) -> core_status {
      constexpr int D = decltype(head)::value;
      const kern_grid grid(kern_divide_up(job.rows, KERN_TILE_ROWS), dim3(KERN_TILE_BLOCK), job.heads,
                           kern_tile_floats<D>(3) * sizeof(float));
      KERN_LAUNCH(context, grid, (attention_forward<T, D>), job, kern_data<const T>(qkv), kern_data<T>(out),
                  kern_data<float>(lse));
      return CORE_OK;
    });
  });
}
