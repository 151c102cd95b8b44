/* Rotary positions: the pair (i, i + A/2) of a head turns by position * inverse_frequency[i]. A thread
 * computes the sines of its columns once and turns them in all heads of the row. */
#include "cuda_vector.cuh"

template <typename T>
struct rope_turn {
  const int32_t *position;
  const float *frequency; /* [half] */
  T *x;
  int64_t width, half;
  int32_t heads;
  float sign; /* -1 turns back */

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    float sine[V], cosine[V];
    kern_load(frequency + at, sine);
    const float turn = (float)position[row] * sign;
#pragma unroll
    for (int i = 0; i < V; i++) sincosf(turn * sine[i], &sine[i], &cosine[i]);
    T *head = x + row * width + at;
#pragma unroll 4
    for (int32_t h = 0; h < heads; h++, head += 2 * half) {
      float low[V], high[V];
      kern_load(head, low);
      kern_load(head + half, high);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = b * cosine[i] + a * sine[i];
      }
      kern_store(head, low);
      kern_store(head + half, high);
    }
  }
};

core_status kern_rope_cuda(kern_context *context, kern_rotation rotation, int32_t heads, core_tensor position,
                           core_tensor inverse_frequency, core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(inverse_frequency, KERN_ANY);
  const int64_t rows = x.shape[0], width = x.shape[1], half = inverse_frequency.shape[0];
  KERN_CHECK(position, CORE_INT32, rows);
  CHECK(half <= KERN_MAX_HEAD_WIDTH / 2 && heads >= 0 && heads * 2 * half <= width, CORE_ERR_ARGUMENT,
        "%s: %d heads of width %lld in rows of %lld; the widest head is %d", __func__, (int)heads,
        (long long)(2 * half), (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  const char *const op = __func__;
  return kern_with_active(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const rope_turn<T> turn = {kern_data<const int32_t>(position),
                               kern_data<const float>(inverse_frequency),
                               kern_data<T>(x),
                               width,
                               half,
                               heads,
                               rotation == KERN_ROTATE ? 1.0f : -1.0f};
    const bool aligned = width % kern_vector<T> == 0 && kern_aligned({x.data, inverse_frequency.data});
    return kern_rows_priv<kern_vector<T>>(context, op, turn, rows, half, aligned);
  });
}
