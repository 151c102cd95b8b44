/* Dropout keyed by the global place of what is dropped, so that masks are the same on every layout and in
 * every repetition of a pass. One block of random words serves four neighbouring columns. */
#include "cuda_random.cuh"
#include "cuda_vector.cuh"

template <typename T>
struct dropout_row {
  uint64_t seed, stream, limit; /* words below it drop */
  float kept;
  int64_t rows, k, c; /* rows of x */
  const uint64_t *key;
  const int32_t *slot;
  T *x;
  kern_fault fault;

  template <int V>
  __device__ void run(int64_t pair, int64_t at) const {
    const int64_t row = slot[pair];
    if (row == -1 || !fault.inside(row, 0, rows)) return;
    const uint64_t place = key[pair / k] * (uint64_t)k + (uint64_t)(pair % k);
    const uint64_t first = place * (uint64_t)((c + 3) / 4);
    float value[V];
    kern_load(x + row * c + at, value);
    uint4 word = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (i % 4 == 0) word = kern_random_at(seed, stream, first + (uint64_t)(at + i) / 4);
      const int which = (int)((at + i) % 4);
      const uint32_t own = which == 0 ? word.x : which == 1 ? word.y : which == 2 ? word.z : word.w;
      value[i] = own < limit ? 0.0f : kept * value[i];
    }
    kern_store(x + row * c + at, value);
  }
};

core_status kern_dropout_cuda(kern_context *context, uint64_t seed, uint64_t stream, double rate,
                              core_tensor key, core_tensor slot, core_tensor x) {
  KERN_CHECK(slot, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t tokens = slot.shape[0], k = slot.shape[1];
  KERN_CHECK(key, CORE_UINT64, tokens);
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  CHECK(rate >= 0 && rate < 1, CORE_ERR_ARGUMENT, "%s: rate is %g, expected 0 to below 1", __func__, rate);
  if (rate == 0) return CORE_OK;
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dropout_row<T> drop = {seed,
                                 stream,
                                 (uint64_t)ceil(rate * 0x1p32),
                                 (float)(1 / (1 - rate)),
                                 x.shape[0],
                                 k,
                                 x.shape[1],
                                 kern_data<const uint64_t>(key),
                                 kern_data<const int32_t>(slot),
                                 kern_data<T>(x),
                                 kern_cuda_fault_priv(KERN_CUDA_OP_dropout)};
    return kern_rows_priv<kern_vector<T>>(context, op, drop, tokens * k, x.shape[1], kern_aligned({x.data}));
  });
}
