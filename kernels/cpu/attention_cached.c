/* One query a row against keys and values that are kept: generation. An online softmax, so that no scores are
 * stored; a row's result depends on its own keys alone. */
#include "active_impl.h"  /* kern_at, kern_to */
#include "vecmath_impl.h" /* kern_exp */

typedef struct cached_job {
  core_dtype dtype;
  int64_t heads, group, width, row; /* H, H / G, A, (H + 2G) A */
  int64_t keys, values;             /* where they begin in a row */
  core_real scale;
  const int32_t *first, *length;
  const void *qkv, *cache;
  void *out;
} cached_job;

/* Head h of query i. */
KERN_INLINE void cached_head(const cached_job *job, core_dtype dtype, int64_t i, int64_t h) {
  const int64_t width = job->width, kv = h / job->group * width;
  core_real q[KERN_MAX_HEAD_WIDTH], mixed[KERN_MAX_HEAD_WIDTH], most = -INFINITY, sum = 0;
  const void *query = kern_element(job->qkv, dtype, i * job->row + h * width);
  for (int64_t a = 0; a < width; a++) q[a] = job->scale * kern_at(query, dtype, a), mixed[a] = 0;
  for (int64_t j = job->first[i]; j < job->first[i] + job->length[i]; j++) {
    const void *key = kern_element(job->cache, dtype, j * job->row + job->keys + kv);
    const void *value = kern_element(job->cache, dtype, j * job->row + job->values + kv);
    core_real score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t a = 0; a < width; a++) score += q[a] * kern_at(key, dtype, a);
    const core_real top = score > most ? score : most, keep = most > -INFINITY ? kern_exp(most - top) : 0;
    const core_real weight = kern_exp(score - top);
#pragma omp simd
    for (int64_t a = 0; a < width; a++) mixed[a] = keep * mixed[a] + weight * kern_at(value, dtype, a);
    sum = keep * sum + weight;
    most = top;
  }
  void *out = kern_element(job->out, dtype, (i * job->heads + h) * width);
  const core_real inverse = sum > 0 ? 1 / sum : 0;
  for (int64_t a = 0; a < width; a++) kern_to(out, dtype, a, KERN_SET, inverse * mixed[a]);
}

KERN_INLINE void cached_heads(const cached_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) cached_head(job, dtype, i / job->heads, i % job->heads);
}
KERN_ACTIVE_RUN(cached_heads, cached_job)

core_status kern_attention_cached_cpu(kern_context *context, const kern_attention *attention,
                                      core_tensor first, core_tensor length, core_tensor qkv,
                                      core_tensor cache, core_tensor out) {
  const int64_t H = attention->heads, G = attention->kv_heads, A = attention->head_width;
  CHECK(H > 0 && G > 0 && H % G == 0 && A > 0 && A <= KERN_MAX_HEAD_WIDTH, CORE_ERR_ARGUMENT,
        "%s: %lld heads, %lld of keys, %lld wide (at most %d)", __func__, (long long)H, (long long)G,
        (long long)A, KERN_MAX_HEAD_WIDTH);
  KERN_CHECK_ACTIVE(qkv, KERN_ANY, (H + 2 * G) * A);
  const int64_t n = qkv.shape[0];
  KERN_CHECK(cache, qkv.dtype, KERN_ANY, (H + 2 * G) * A);
  KERN_CHECK(out, qkv.dtype, n, H * A);
  KERN_CHECK(first, CORE_INT32, n);
  KERN_CHECK(length, CORE_INT32, n);
  KERN_CHECK_INDEX(first, 0, cache.shape[0] + 1);
  const cached_job job = {.dtype = qkv.dtype,
                          .heads = H,
                          .group = H / G,
                          .width = A,
                          .row = (H + 2 * G) * A,
                          .keys = H * A,
                          .values = (H + G) * A,
                          .scale = (core_real)attention->scale,
                          .first = first.data,
                          .length = length.data,
                          .qkv = qkv.data,
                          .cache = cache.data,
                          .out = out.data};
  for (int64_t i = 0; i < n; i++)
    CHECK(job.length[i] >= 0 && job.length[i] <= cache.shape[0] - job.first[i], CORE_ERR_ARGUMENT,
          "%s: row %lld keeps %d rows from %d on, of %lld", __func__, (long long)i, job.length[i],
          job.first[i], (long long)cache.shape[0]);
  const kern_split split = kern_split_of(n * H, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    cached_heads_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
