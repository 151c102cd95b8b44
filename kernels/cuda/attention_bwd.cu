/* Attention on packed segments, backward: with P recomputed from lse and delta = rowsum(dO O),
 *   dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta) scale;  dQ = dS K;  dK = dS^T Q.
 * One kernel passes keys by a tile of queries and writes dQ, another passes the queries of all heads of a
 * key/value head by a tile of keys and writes dK and dV: every number has one writer, so there are no
 * atomics. */
#include "attention_tile.cuh"

/* delta[row][head] = <dout, out>; 8 lanes a head. */
template <typename T, int V>
static __global__ void __launch_bounds__(KERN_BLOCK)
    attention_delta(const T *dout, const T *out, int64_t heads, int width, float *delta) {
  constexpr int LANES = KERN_TILE_LANES;
  const int64_t head = ((int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;
  float sum = 0;
  for (int at = lane * V; head < heads && at < width; at += LANES * V) {
    float d[V], o[V];
    kern_load(dout + head * width + at, d);
    kern_load(out + head * width + at, o);
#pragma unroll
    for (int i = 0; i < V; i++) sum += d[i] * o[i];
  }
  sum = kern_lanes_reduce<LANES>(sum, kern_plus());
  if (lane == 0 && head < heads) delta[head] = sum;
}

/* Block (tile of queries, head): dQ. */
template <typename T, int D>
static __global__ void __launch_bounds__(KERN_TILE_BLOCK)
    attention_backward_query(kern_attention_job job, const T *dout, const T *queries, const T *source,
                             const float *lse, const float *delta, T *dqueries) {
  constexpr int TILE = KERN_TILE_ROWS * kern_tile_pitch<D>;
  float *const query = KERN_SHARED(float), *const doutput = query + TILE, *const key = doutput + TILE,
               *const value = key + TILE, *const weights = value + TILE;
  const int head = blockIdx.y, kv_head = head / (job.heads / job.kv_heads);
  const int64_t first = (int64_t)blockIdx.x * KERN_TILE_ROWS, own = first + kern_tile_own();
  const int64_t past = kern_least(first + KERN_TILE_ROWS, job.rows);
  const int2 segment[2] = {job.segment(own), job.segment(own + 1)};
  const int64_t end = job.causal ? past : job.segment(past - 1).y;
  float level[2] = {}, base[2] = {}, acc[2][D / 8] = {};
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (own + r < job.rows)
      base[r] = lse[(own + r) * job.heads + head], level[r] = delta[(own + r) * job.heads + head];
  kern_tile_load<D>(job, queries + job.query_column(head), job.query_row, first, past, query);
  kern_tile_load<D>(job, dout + job.query_column(head), job.out_row(), first, past, doutput);
  for (int64_t at = job.segment(first).x; at < end; at += KERN_TILE_ROWS) {
    kern_tile_load<D>(job, source + job.key_column(kv_head), job.source_row, at, end, key);
    kern_tile_load<D>(job, source + job.value_column(kv_head), job.source_row, at, end, value);
    __syncthreads();
    float s[2][4], dp[2][4];
    kern_tile_scores<D>(query, key, s);
    kern_tile_scores<D>(doutput, value, dp);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t other = at + kern_tile_x() + j * KERN_TILE_LANES;
        const bool seen = other >= segment[r].x && other < segment[r].y && !(job.causal && other > own + r);
        s[r][j] = seen ? expf(job.scale * s[r][j] - base[r]) * (dp[r][j] - level[r]) * job.scale : 0.0f;
      }
    kern_tile_weights(s, weights);
    kern_tile_mix<D>(weights, key, acc);
    __syncthreads();
  }
  const float by[2] = {1.0f, 1.0f};
  kern_tile_store<D>(job, first, job.query_row, acc, by,
                     dqueries + first * job.query_row + job.query_column(head));
}

/* Block (tile of keys, key/value head): dK and dV. */
template <typename T, int D>
static __global__ void __launch_bounds__(KERN_TILE_BLOCK)
    attention_backward_key(kern_attention_job job, const T *dout, const T *queries, const T *source,
                           const float *lse, const float *delta, T *dsource) {
  constexpr int TILE = KERN_TILE_ROWS * kern_tile_pitch<D>;
  float *const key = KERN_SHARED(float), *const value = key + TILE, *const query = value + TILE,
               *const doutput = query + TILE, *const weights = doutput + TILE;
  const int kv_head = blockIdx.y, group = job.heads / job.kv_heads;
  const int64_t first = (int64_t)blockIdx.x * KERN_TILE_ROWS, own = first + kern_tile_own();
  const int64_t past = kern_least(first + KERN_TILE_ROWS, job.rows);
  const int2 segment[2] = {job.segment(own), job.segment(own + 1)};
  const int64_t begin = job.causal ? first : job.segment(first).x, end = job.segment(past - 1).y;
  float dkey[2][D / 8] = {}, dvalue[2][D / 8] = {};
  kern_tile_load<D>(job, source + job.key_column(kv_head), job.source_row, first, past, key);
  kern_tile_load<D>(job, source + job.value_column(kv_head), job.source_row, first, past, value);
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
    for (int64_t at = begin; at < end; at += KERN_TILE_ROWS) {
      kern_tile_load<D>(job, queries + job.query_column(head), job.query_row, at, end, query);
      kern_tile_load<D>(job, dout + job.query_column(head), job.out_row(), at, end, doutput);
      __syncthreads();
      float s[2][4], dp[2][4];
      kern_tile_scores<D>(key, query, s);
      kern_tile_scores<D>(value, doutput, dp);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t other = at + kern_tile_x() + j * KERN_TILE_LANES;
        const bool there = other < end;
        const float base = there ? lse[other * job.heads + head] : 0.0f;
        const float level = there ? delta[other * job.heads + head] : 0.0f;
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const bool seen = other >= segment[r].x && other < segment[r].y && !(job.causal && other < own + r);
          s[r][j] = seen ? expf(job.scale * s[r][j] - base) : 0.0f;
          dp[r][j] = s[r][j] * (dp[r][j] - level) * job.scale;
        }
      }
      kern_tile_weights(s, weights);
      kern_tile_mix<D>(weights, doutput, dvalue);
      kern_tile_weights(dp, weights);
      kern_tile_mix<D>(weights, query, dkey);
      __syncthreads();
    }
  const float by[2] = {1.0f, 1.0f};
  T *const to = dsource + first * job.source_row;
  kern_tile_store<D>(job, first, job.source_row, dkey, by, to + job.key_column(kv_head));
  kern_tile_store<D>(job, first, job.source_row, dvalue, by, to + job.value_column(kv_head));
}

template <typename T>
static core_status delta_made(const kern_context *context, const kern_attention_job &job, core_tensor dout,
                              core_tensor out) {
  const int64_t heads = job.rows * job.heads;
  const auto kernel = job.vectors ? attention_delta<T, kern_vector<T>> : attention_delta<T, 1>;
  KERN_LAUNCH(context, kern_grid(kern_divide_up(heads * KERN_TILE_LANES, KERN_BLOCK), dim3(KERN_BLOCK)),
              kernel, kern_data<const T>(dout), kern_data<const T>(out), heads, job.width, context->delta);
  return CORE_OK;
}

/* What both kernels read; gradients are left out. */
typedef struct backward_call {
  core_tensor dout, queries, source, lse;
} backward_call;

template <typename T>
static core_status query_gradients(kern_context *context, const kern_attention_job &job,
                                   const backward_call &c, core_tensor dqueries) {
  return kern_with_head(job.width, [&](auto head) -> core_status {
    constexpr int D = decltype(head)::value;
    const kern_grid grid(kern_divide_up(job.rows, KERN_TILE_ROWS), dim3(KERN_TILE_BLOCK), job.heads,
                         kern_tile_floats<D>(4) * sizeof(float));
    KERN_LAUNCH(context, grid, (attention_backward_query<T, D>), job, kern_data<const T>(c.dout),
                kern_data<const T>(c.queries), kern_data<const T>(c.source), kern_data<const float>(c.lse),
                (const float *)context->delta, kern_data<T>(dqueries));
    return CORE_OK;
  });
}

template <typename T>
static core_status key_gradients(kern_context *context, const kern_attention_job &job, const backward_call &c,
                                 core_tensor dsource) {
  return kern_with_head(job.width, [&](auto head) -> core_status {
    constexpr int D = decltype(head)::value;
    const kern_grid grid(kern_divide_up(job.rows, KERN_TILE_ROWS), dim3(KERN_TILE_BLOCK), job.kv_heads,
                         kern_tile_floats<D>(4) * sizeof(float));
    KERN_LAUNCH(context, grid, (attention_backward_key<T, D>), job, kern_data<const T>(c.dout),
                kern_data<const T>(c.queries), kern_data<const T>(c.source), kern_data<const float>(c.lse),
                (const float *)context->delta, kern_data<T>(dsource));
    return CORE_OK;
  });
}

core_status kern_attention_bwd_cuda(kern_context *context, const kern_attention *attention, core_tensor dout,
                                    core_tensor qkv, core_tensor out, core_tensor lse, core_tensor dqkv) {
  TRY(kern_attention_checked_priv(__func__, context, attention, qkv, out, lse));
  KERN_CHECK_LIKE(dout, out);
  KERN_CHECK_LIKE(dqkv, qkv);
  if (qkv.shape[0] == 0) return CORE_OK;
  kern_attention_job job;
  TRY(kern_attention_job_priv(context, attention, qkv, kern_cuda_fault_priv(KERN_CUDA_OP_attention_bwd),
                              &job));
  return kern_with_active(qkv.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    const backward_call call = {dout, qkv, qkv, lse};
    job.vectors = job.width % kern_vector<T> == 0 && kern_aligned({dout.data, qkv.data, out.data, dqkv.data});
    TRY(delta_made<T>(context, job, dout, out));
    TRY(query_gradients<T>(context, job, call, dqkv));
    TRY(key_gradients<T>(context, job, call, dqkv));
    return CORE_OK;
  });
}

/* The ranges of the keys take the place of those of the queries, in the order of the stream. */
core_status kern_attention_cross_bwd_cuda(kern_context *context, const kern_cross *cross, core_tensor dout,
                                          core_tensor dq, core_tensor dkv) {
  const core_tensor q = cross->q, kv = cross->kv, out = cross->out;
  const kern_fault fault = kern_cuda_fault_priv(KERN_CUDA_OP_attention_cross_bwd);
  TRY(kern_cross_checked_priv(__func__, context, cross));
  KERN_CHECK_LIKE(dout, out);
  KERN_CHECK_LIKE(dq, q);
  KERN_CHECK_LIKE(dkv, kv);
  return kern_with_active(q.dtype, [&](auto zero) -> core_status {
    using T = decltype(zero);
    const backward_call call = {dout, q, kv, cross->lse};
    kern_attention_job job;
    if (q.shape[0] > 0) {
      TRY(kern_cross_job_priv(context, cross, fault, &job));
      job.vectors = job.width % kern_vector<T> == 0 &&
                    kern_aligned({dout.data, q.data, kv.data, out.data, dq.data, dkv.data});
      TRY(delta_made<T>(context, job, dout, out));
      TRY(query_gradients<T>(context, job, call, dq));
      TRY(kern_cross_turn_priv(context, cross, fault, &job));
      TRY(key_gradients<T>(context, job, call, dkv));
    } else if (kv.shape[0] > 0) {
      KERN_CUDA(cudaMemsetAsync(dkv.data, 0, core_tensor_bytes(&dkv), context->stream));
    }
    return CORE_OK;
  });
}
