/* A second choice drawn in proportion to the probabilities of the others: the largest of logits plus Gumbel
 * noise, keyed by the token's number in the global order. */
#include <math.h> /* log */

#include "core/random.h" /* core_random_uniform */
#include "cpu_impl.h"    /* checks, blocks */

typedef struct second_job {
  const core_real *logits;
  const uint64_t *key;
  int64_t experts;
  uint64_t seed, stream;
} second_job;

/* NaN ranks as -infinity, ties go to the lower expert. */
static int32_t second_of(const second_job *job, int64_t t, int32_t first) {
  int32_t best = first == 0 ? 1 : 0;
  core_real most = -INFINITY;
  for (int64_t e = 0; e < job->experts; e++) {
    const uint64_t index = job->key[t] * (uint64_t)job->experts + (uint64_t)e;
    const double noise = -log(-log(core_random_uniform(job->seed, job->stream, index)));
    const core_real value = (core_real)((double)job->logits[t * job->experts + e] + noise);
    if (e == first || !(value > most)) continue;
    most = value;
    best = (int32_t)e;
  }
  return best;
}

core_status kern_router_second_cpu(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                   core_tensor key, core_tensor choice) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  KERN_CHECK(key, CORE_UINT64, rows);
  KERN_CHECK(choice, CORE_INT32, rows, 2);
  CHECK(experts >= 2, CORE_ERR_ARGUMENT, "%s: %lld experts, expected at least 2", __func__,
        (long long)experts);
  KERN_CHECK_INDEX(choice, 0, experts);
  const second_job job = {logits.data, key.data, experts, seed, stream};
  int32_t *chosen = choice.data;
  const kern_split split = kern_split_rows(rows, experts * 16);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++)
      chosen[2 * t + 1] = second_of(&job, t, chosen[2 * t]);
  }
  return CORE_OK;
}
