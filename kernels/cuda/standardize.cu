/* Latents as stored (float32, float16 or bfloat16) to standardised activations. */
#include "cuda_vector.cuh"

struct half_bits {
  uint16_t bits;
};

/* Exponents are rebased by a multiplication, which also normalises subnormals. */
__device__ __forceinline__ float half_to_float(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const uint32_t finite = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  return __uint_as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

template <int V>
__device__ __forceinline__ void kern_load(const half_bits *from, float (&to)[V]) {
  if constexpr (V == 8) {
    const uint4 eight = *reinterpret_cast<const uint4 *>(from);
    const uint32_t pair[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = half_to_float(pair[i / 2] >> 16 * (i % 2) & 0xffffu);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = half_to_float(from[i].bits);
  }
}

template <typename From, typename T>
struct standardize_row {
  const From *x;
  const float *shift, *scale;
  T *y;
  int64_t d;

  template <int V>
  __device__ void run(int64_t row, int64_t at) const {
    float value[V], minus[V], times[V];
    kern_load(x + row * d + at, value);
    kern_load(shift + at, minus);
    kern_load(scale + at, times);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] = (value[i] - minus[i]) * times[i];
    kern_store(y + row * d + at, value);
  }
};

template <typename From>
static core_status standardize_from(kern_context *context, const char *op, core_tensor x, core_tensor shift,
                                    core_tensor scale, core_tensor y) {
  return kern_with_active(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = y.shape[0], d = y.shape[1];
    const standardize_row<From, T> row = {kern_data<const From>(x), kern_data<const float>(shift),
                                          kern_data<const float>(scale), kern_data<T>(y), d};
    return kern_rows_priv<8>(context, op, row, rows, d,
                             kern_aligned({x.data, shift.data, scale.data, y.data}));
  });
}

core_status kern_standardize_cuda(kern_context *context, core_tensor x, core_tensor shift, core_tensor scale,
                                  core_tensor y) {
  CHECK(x.dtype == CORE_FLOAT32 || x.dtype == CORE_FLOAT16 || x.dtype == CORE_BFLOAT16, CORE_ERR_UNSUPPORTED,
        "%s: x is %s, expected float32, float16 or bfloat16", __func__, core_dtype_text(x.dtype));
  KERN_CHECK_ACTIVE(y, KERN_ANY, KERN_ANY);
  KERN_CHECK(x, x.dtype, y.shape[0], y.shape[1]);
  KERN_CHECK_REAL(shift, y.shape[1]);
  KERN_CHECK_REAL(scale, y.shape[1]);
  if (x.dtype == CORE_FLOAT16) return standardize_from<half_bits>(context, __func__, x, shift, scale, y);
  if (x.dtype == CORE_BFLOAT16) return standardize_from<kern_bfloat>(context, __func__, x, shift, scale, y);
  return standardize_from<float>(context, __func__, x, shift, scale, y);
}
