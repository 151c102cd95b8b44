/* Attention on packed segments, forward: an online softmax over tiles of keys, per tile of queries and head
 * (Milakov and Gimelshein 2018; Dao et al. 2022). */
#include "attention_tile.cuh"

/* other: offsets of the rows that pass by. */
struct attention_range {
  int2 *range;
  const int64_t *other;
  int64_t rows;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t segment, const kern_span &, int64_t row, int64_t) const {
    const kern_span span(other, segment, rows, fault);
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
    attention_forward(kern_attention_job job, const T *queries, const T *source, T *out, float *lse) {
  constexpr int TILE = KERN_TILE_ROWS * kern_tile_pitch<D>;
  float *const query = KERN_SHARED(float), *const key = query + TILE, *const value = key + TILE,
               *const weights = value + TILE;
  const int head = blockIdx.y, kv_head = head / (job.heads / job.kv_heads);
  const int64_t first = (int64_t)blockIdx.x * KERN_TILE_ROWS, own = first + kern_tile_own();
  const int64_t past = kern_least(first + KERN_TILE_ROWS, job.rows);
  const int2 segment[2] = {job.segment(own), job.segment(own + 1)};
  const int64_t end = job.causal ? past : job.segment(past - 1).y;
  kern_tile_load<D>(job, queries + job.query_column(head), job.query_row, first, past, query);
  attention_softmax softmax;
  float acc[2][D / 8] = {};
  for (int64_t at = job.segment(first).x; at < end; at += KERN_TILE_ROWS) {
    kern_tile_load<D>(job, source + job.key_column(kv_head), job.source_row, at, end, key);
    kern_tile_load<D>(job, source + job.value_column(kv_head), job.source_row, at, end, value);
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

static core_status heads_checked(const char *op, const kern_context *context,
                                 const kern_attention *attention) {
  const int64_t heads = attention->heads, kv_heads = attention->kv_heads, width = attention->head_width;
  CHECK(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0, CORE_ERR_ARGUMENT,
        "%s: %lld heads over %lld key/value heads, expected a multiple", op, (long long)heads,
        (long long)kv_heads);
  CHECK(width >= 1 && width <= KERN_MAX_HEAD_WIDTH, CORE_ERR_ARGUMENT,
        "%s: head width %lld, expected 1 to %d", op, (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  TRY(kern_check_limit_cuda_priv(op, "heads", heads, context->limits.heads));
  return CORE_OK;
}

core_status kern_attention_checked_priv(const char *op, const kern_context *context,
                                        const kern_attention *attention, core_tensor qkv, core_tensor out,
                                        core_tensor lse) {
  const int64_t rows = qkv.shape[0], heads = attention->heads, kv_heads = attention->kv_heads;
  const int64_t width = attention->head_width;
  TRY(heads_checked(op, context, attention));
  TRY(kern_check_active_cuda_priv(op, "qkv", qkv));
  TRY(kern_check_cuda_priv(op, "qkv", qkv, qkv.dtype, {KERN_ANY, (heads + 2 * kv_heads) * width}));
  TRY(kern_check_cuda_priv(op, "out", out, qkv.dtype, {rows, heads * width}));
  TRY(kern_check_cuda_priv(op, "lse", lse, CORE_FLOAT32, {rows, heads}));
  TRY(kern_check_limit_cuda_priv(op, "rows", rows, context->limits.rows));
  TRY(kern_check_limit_cuda_priv(op, "width", qkv.shape[1], context->limits.width));
  TRY(kern_check_segments_cuda_priv(op, attention->segments, rows, context->limits.sequence));
  return CORE_OK;
}

core_status kern_cross_checked_priv(const char *op, const kern_context *context, const kern_cross *cross) {
  const kern_attention *attention = &cross->attention;
  const kern_segments &queries = attention->segments, &keys = cross->keys;
  const int64_t rows = cross->q.shape[0], source = cross->kv.shape[0];
  const int64_t columns = (int64_t)attention->heads * attention->head_width;
  TRY(heads_checked(op, context, attention));
  CHECK(attention->mask == KERN_BIDIRECTIONAL, CORE_ERR_ARGUMENT, "%s: there is no mask between two tensors",
        op);
  TRY(kern_check_active_cuda_priv(op, "q", cross->q));
  TRY(kern_check_cuda_priv(op, "q", cross->q, cross->q.dtype, {KERN_ANY, columns}));
  TRY(kern_check_cuda_priv(op, "kv", cross->kv, cross->q.dtype,
                           {KERN_ANY, 2 * (int64_t)attention->kv_heads * attention->head_width}));
  TRY(kern_check_cuda_priv(op, "out", cross->out, cross->q.dtype, {rows, columns}));
  TRY(kern_check_cuda_priv(op, "lse", cross->lse, CORE_FLOAT32, {rows, attention->heads}));
  TRY(kern_check_limit_cuda_priv(op, "rows", rows > source ? rows : source, context->limits.rows));
  TRY(kern_check_limit_cuda_priv(op, "width", cross->kv.shape[1], context->limits.width));
  CHECK(keys.count == queries.count, CORE_ERR_ARGUMENT, "%s: %lld segments of queries and %lld of keys", op,
        (long long)queries.count, (long long)keys.count);
  TRY(kern_check_segments_cuda_priv(op, queries, rows, context->limits.sequence));
  TRY(kern_check_segments_cuda_priv(op, keys, source, context->limits.sequence));
  for (int64_t s = 0; s < keys.count; s++)
    CHECK(queries.offset[s + 1] == queries.offset[s] || keys.offset[s + 1] > keys.offset[s],
          CORE_ERR_ARGUMENT, "%s: segment %lld has queries and no keys", op, (long long)s);
  return CORE_OK;
}

/* context->range of `rows` own rows, in segments `own`. */
static core_status range_filled(const kern_context *context, const kern_segments &own, int64_t rows,
                                const kern_segments &other, int64_t other_rows, kern_fault fault) {
  const attention_range range = {context->range, kern_data<const int64_t>(other.device_offset), other_rows,
                                 fault};
  /* Rows that no segment of the device's offsets covers see nothing. */
  KERN_CUDA(cudaMemsetAsync(context->range, 0, (size_t)rows * sizeof(int2), context->stream));
  TRY(kern_segments_priv<1>(context, __func__, range, own, rows, 1, fault, false));
  return CORE_OK;
}

static void job_made(const kern_context *context, const kern_attention *attention, kern_attention_job *job) {
  job->range = context->range;
  job->heads = attention->heads, job->kv_heads = attention->kv_heads, job->width = attention->head_width;
  job->causal = attention->mask == KERN_CAUSAL;
  job->scale = (float)attention->scale;
}

core_status kern_attention_job_priv(const kern_context *context, const kern_attention *attention,
                                    core_tensor qkv, kern_fault fault, kern_attention_job *job) {
  job_made(context, attention, job);
  job->rows = qkv.shape[0];
  job->query_row = job->source_row = qkv.shape[1];
  job->key_first = (int64_t)attention->heads * attention->head_width;
  TRY(range_filled(context, attention->segments, job->rows, attention->segments, job->rows, fault));
  return CORE_OK;
}

core_status kern_cross_job_priv(const kern_context *context, const kern_cross *cross, kern_fault fault,
                                kern_attention_job *job) {
  job_made(context, &cross->attention, job);
  job->rows = cross->q.shape[0];
  job->query_row = cross->q.shape[1], job->source_row = cross->kv.shape[1];
  job->key_first = 0;
  TRY(range_filled(context, cross->attention.segments, job->rows, cross->keys, cross->kv.shape[0], fault));
  return CORE_OK;
}

core_status kern_cross_turn_priv(const kern_context *context, const kern_cross *cross, kern_fault fault,
                                 kern_attention_job *job) {
  job->rows = cross->kv.shape[0];
  TRY(range_filled(context, cross->keys, job->rows, cross->attention.segments, cross->q.shape[0], fault));
  return CORE_OK;
}

static core_status forward_run(kern_context *context, const kern_attention_job &call, core_tensor queries,
                               core_tensor source, core_tensor out, core_tensor lse) {
  return kern_with_active(queries.dtype, [&](auto zero) {
    using T = decltype(zero);
    kern_attention_job job = call;
    job.vectors = job.width % kern_vector<T> == 0 && kern_aligned({queries.data, source.data, out.data});
    return kern_with_head(job.width, [&](auto head) -> core_status {
      constexpr int D = decltype(head)::value;
      const kern_grid grid(kern_divide_up(job.rows, KERN_TILE_ROWS), dim3(KERN_TILE_BLOCK), job.heads,
                           kern_tile_floats<D>(3) * sizeof(float));
      KERN_LAUNCH(context, grid, (attention_forward<T, D>), job, kern_data<const T>(queries),
                  kern_data<const T>(source), kern_data<T>(out), kern_data<float>(lse));
      return CORE_OK;
    });
  });
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
  TRY(forward_run(context, job, qkv, qkv, out, lse));
  return CORE_OK;
}

core_status kern_attention_cross_fwd_cuda(kern_context *context, const kern_cross *cross) {
  TRY(kern_cross_checked_priv(__func__, context, cross));
  CHECK(cross->attention.scale > 0, CORE_ERR_ARGUMENT, "%s: scale is %g, expected above 0", __func__,
        cross->attention.scale);
  if (cross->q.shape[0] == 0) return CORE_OK;
  kern_attention_job job;
  TRY(kern_cross_job_priv(context, cross, kern_cuda_fault_priv(KERN_CUDA_OP_attention_cross_fwd), &job));
  TRY(forward_run(context, job, cross->q, cross->kv, cross->out, cross->lse));
  return CORE_OK;
}
