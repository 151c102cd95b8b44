/* Gaussian noise on the logits, keyed by the token's number in the global order: the same on every layout. */
#include "core/random.h" /* core_random_normal */
#include "cpu_impl.h"    /* checks, blocks */

core_status kern_router_noise_cpu(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                  core_tensor key, double sigma, core_tensor noisy) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  KERN_CHECK(key, CORE_UINT64, rows);
  KERN_CHECK_LIKE(noisy, logits);
  const uint64_t *restrict keys = key.data;
  const core_real *from = logits.data;
  core_real *to = noisy.data;
  const kern_split split = kern_split_rows(rows, experts * 16);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++)
      for (int64_t e = 0; e < experts; e++) {
        const uint64_t index = keys[t] * (uint64_t)experts + (uint64_t)e;
        to[t * experts + e] =
            (core_real)(from[t * experts + e] + sigma * core_random_normal(seed, stream, index));
      }
  }
  return CORE_OK;
}
