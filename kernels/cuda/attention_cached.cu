/* One query a row against keys and values that are kept: a warp a head, its lanes along the head's width, an
 * online softmax over the rows. */
#include "cuda_math.cuh"

enum { LANES = 32, MOST = 8 }; /* elements of a lane: heads are at most 256 wide */

template <typename T>
struct cached_attention {
  int64_t heads, group, width, row, keys, values, rows; /* of the cache */
  float scale;
  const int32_t *first, *length;
  const T *qkv, *cache;
  T *out;
  kern_fault fault;
};

template <typename T>
static __global__ void __launch_bounds__(LANES) attend_cached(cached_attention<T> job) {
  const int64_t i = blockIdx.x / job.heads, h = blockIdx.x % job.heads, kv = h / job.group * job.width;
  const int lane = threadIdx.x;
  float q[MOST] = {}, mixed[MOST] = {}, most = -INFINITY, sum = 0;
  const int64_t first = job.first[i], length = job.length[i];
  const bool good = first >= 0 && length >= 0 && length <= job.rows - first;
  if (!good) job.fault.report(first);
  for (int e = 0; e < MOST; e++)
    if (lane + e * LANES < job.width)
      q[e] = job.scale * kern_get(job.qkv + i * job.row + h * job.width + lane + e * LANES);
  for (int64_t j = first; good && j < first + length; j++) {
    const T *const key = job.cache + j * job.row + job.keys + kv, *const value = job.cache + j * job.row +
                                                                                 job.values + kv;
    float part = 0;
    for (int e = 0; e < MOST; e++)
      if (lane + e * LANES < job.width) part += q[e] * kern_get(key + lane + e * LANES);
    const float score = kern_team_sum<LANES>(part), top = fmaxf(score, most);
    const float keep = most > -INFINITY ? expf(most - top) : 0.0f, weight = expf(score - top);
    for (int e = 0; e < MOST; e++)
      if (lane + e * LANES < job.width)
        mixed[e] = keep * mixed[e] + weight * kern_get(value + lane + e * LANES);
    sum = keep * sum + weight;
    most = top;
  }
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
  for (int e = 0; e < MOST; e++)
    if (lane + e * LANES < job.width)
      kern_set(job.out + (i * job.heads + h) * job.width + lane + e * LANES, inverse * mixed[e]);
}

core_status kern_attention_cached_cuda(kern_context *context, const kern_attention *attention,
                                       core_tensor first, core_tensor length, core_tensor qkv,
                                       core_tensor cache, core_tensor out) {
  const int64_t H = attention->heads, G = attention->kv_heads, A = attention->head_width;
  CHECK(H > 0 && G > 0 && H % G == 0 && A > 0 && A <= LANES * MOST, CORE_ERR_ARGUMENT,
        "%s: %lld heads, %lld of keys, %lld wide (at most %d)", __func__, (long long)H, (long long)G,
        (long long)A, LANES * MOST);
  KERN_CHECK_ACTIVE(qkv, KERN_ANY, (H + 2 * G) * A);
  const int64_t n = qkv.shape[0];
  KERN_CHECK(cache, qkv.dtype, KERN_ANY, (H + 2 * G) * A);
  KERN_CHECK(out, qkv.dtype, n, H * A);
  KERN_CHECK(first, CORE_INT32, n);
  KERN_CHECK(length, CORE_INT32, n);
  const char *const op = __func__;
  return kern_with_active(qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const cached_attention<T> job = {H,
                                     H / G,
                                     A,
                                     (H + 2 * G) * A,
                                     H * A,
                                     (H + G) * A,
                                     cache.shape[0],
                                     (float)attention->scale,
                                     kern_data<const int32_t>(first),
                                     kern_data<const int32_t>(length),
                                     kern_data<const T>(qkv),
                                     kern_data<const T>(cache),
                                     kern_data<T>(out),
                                     kern_cuda_fault_priv(KERN_CUDA_OP_attention_cached)};
    return kern_launch_priv(context, op, kern_grid(n * H, dim3(LANES)), attend_cached<T>, job);
  });
}
