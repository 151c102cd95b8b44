/* Dropout keyed by the global place of what is dropped, so that masks are the same on every layout and in
 * every repetition of a pass. */
#include "active_impl.h" /* kern_at, kern_to */
#include "core/random.h" /* core_random_at */

typedef struct dropout_job {
  core_dtype dtype;
  uint64_t seed, stream;
  double rate;
  int64_t k, c;
  const uint64_t *key;
  const int32_t *slot;
  void *x;
} dropout_job;

KERN_INLINE void dropout_tokens(const dropout_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real kept = (core_real)(1 / (1 - job->rate));
  const double limit = job->rate * 0x1p32;
  const uint64_t blocks = (uint64_t)(job->c + 3) / 4;
  for (int64_t i = begin * job->k; i < end * job->k; i++) {
    if (job->slot[i] < 0) continue;
    void *x = kern_element(job->x, dtype, job->slot[i] * job->c);
    const uint64_t place = job->key[i / job->k] * (uint64_t)job->k + (uint64_t)(i % job->k);
    core_random_block block = {{0}};
    for (int64_t c = 0; c < job->c; c++) {
      if (c % 4 == 0) block = core_random_at(job->seed, job->stream, place * blocks + (uint64_t)c / 4);
      const bool drops = (double)block.word[c % 4] < limit;
      kern_to(x, dtype, c, KERN_SET, drops ? 0 : kept * kern_at(x, dtype, c));
    }
  }
}
KERN_ACTIVE_RUN(dropout_tokens, dropout_job)

core_status kern_dropout_cpu(kern_context *context, uint64_t seed, uint64_t stream, double rate,
                             core_tensor key, core_tensor slot, core_tensor x) {
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t tokens = slot.shape[0], k = slot.shape[1];
  KERN_CHECK(key, CORE_UINT64, tokens);
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  KERN_CHECK_INDEX(slot, -1, x.shape[0]);
  CHECK(rate >= 0 && rate < 1, CORE_ERR_ARGUMENT, "%s: rate is %g, expected 0 to below 1", __func__, rate);
  if (rate == 0) return CORE_OK;
  const dropout_job job = {.dtype = x.dtype,
                           .seed = seed,
                           .stream = stream,
                           .rate = rate,
                           .k = k,
                           .c = x.shape[1],
                           .key = key.data,
                           .slot = slot.data,
                           .x = x.data};
  const kern_split split = kern_split_rows(tokens, k * job.c);
  KERN_FOR_BLOCKS(context, split, block) {
    dropout_tokens_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
