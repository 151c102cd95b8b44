/* Gaussian noise on the logits, keyed by the token's number in the global order: the same on every layout. */
#include "cuda_random.cuh"
#include "cuda_vector.cuh"

struct noise_row {
  const float *logits;
  const uint64_t *key;
  float *noisy;
  uint64_t seed, stream;
  double sigma;
  int64_t experts;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    const int64_t i = row * experts + at;
    const uint64_t index = key[row] * (uint64_t)experts + (uint64_t)at;
    noisy[i] = (float)((double)logits[i] + sigma * kern_random_normal(seed, stream, index));
  }
};

core_status kern_router_noise_cuda(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                   core_tensor key, double sigma, core_tensor noisy) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  KERN_CHECK(key, CORE_UINT64, rows);
  KERN_CHECK_LIKE(noisy, logits);
  const noise_row noise = {kern_data<const float>(logits),
                           kern_data<const uint64_t>(key),
                           kern_data<float>(noisy),
                           seed,
                           stream,
                           sigma,
                           experts};
  return kern_rows_of<1>(context, __func__, noise, rows, experts);
}
