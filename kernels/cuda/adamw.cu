/* AdamW as torch.optim.AdamW does it: decay first, then moments, then the step. One launch for the whole
 * list: a block finds its range in a table of first blocks that travels with the list. */
#include "cuda_vector.cuh"

enum { STRETCH = 4 * KERN_BLOCK }; /* elements of a block */

struct adamw_range {
  int64_t first, count, block; /* elements, and the first block that works on them */
  float gradient, keep, beta1, rest1, beta2, rest2, denominator, epsilon, step;
};

struct adamw_arrays {
  const float *gradient;
  float *parameter, *m, *v;
  kern_bfloat *copy; /* or NULL */
};

template <int V>
static __device__ __forceinline__ void adamw_at(const adamw_range &f, const adamw_arrays &arrays,
                                                int64_t at) {
  float g[V], p[V], m[V], v[V];
  kern_load(arrays.gradient + at, g);
  kern_load(arrays.parameter + at, p);
  kern_load(arrays.m + at, m);
  kern_load(arrays.v + at, v);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float d = g[i] * f.gradient;
    m[i] = f.beta1 * m[i] + f.rest1 * d;
    v[i] = f.beta2 * v[i] + f.rest2 * (d * d);
    p[i] = p[i] * f.keep - f.step * (m[i] / (sqrtf(v[i]) * f.denominator + f.epsilon));
  }
  kern_store(arrays.parameter + at, p);
  kern_store(arrays.m + at, m);
  kern_store(arrays.v + at, v);
  if (arrays.copy != NULL) kern_store(arrays.copy + at, p);
}

/* The last range that begins at or before the block. */
static __device__ int64_t range_of(const adamw_range *list, int64_t n, int64_t block) {
  int64_t low = 0;
  while (n > 1) {
    const int64_t half = n / 2;
    if (list[low + half].block <= block)
      low += half, n -= half;
    else
      n = half;
  }
  return low;
}

/* True where a range's first element lies on 16 bytes in every array (8 in the copy): its vectors then do. */
static __device__ bool adamw_aligned(const adamw_arrays &arrays, int64_t first) {
  const uintptr_t all = (uintptr_t)(arrays.gradient + first) | (uintptr_t)(arrays.parameter + first) |
                        (uintptr_t)(arrays.m + first) | (uintptr_t)(arrays.v + first);
  return all % 16 == 0 && (arrays.copy == NULL || (uintptr_t)(arrays.copy + first) % 8 == 0);
}

static __global__ void __launch_bounds__(KERN_BLOCK)
    adamw_kernel(const adamw_range *list, int64_t n, adamw_arrays arrays) {
  const adamw_range range = list[range_of(list, n, blockIdx.x)];
  const int64_t begin = (blockIdx.x - range.block) * STRETCH, left = range.count - begin;
  const int64_t count = kern_least(left, STRETCH), at = range.first + begin;
  if (adamw_aligned(arrays, range.first)) {
    const int64_t i = (int64_t)threadIdx.x * 4;
    if (i + 4 <= count)
      adamw_at<4>(range, arrays, at + i);
    else
      for (int64_t j = i; j < count; j++) adamw_at<1>(range, arrays, at + j);
  } else {
    for (int64_t i = threadIdx.x; i < count; i += KERN_BLOCK) adamw_at<1>(range, arrays, at + i);
  }
}

static core_status range_checked(const char *op, const kern_adamw &entry, int64_t length) {
  CHECK(entry.correction1 > 0 && entry.correction2 > 0, CORE_ERR_ARGUMENT,
        "%s: bias corrections %g and %g, expected above 0 (steps are counted from 1)", op, entry.correction1,
        entry.correction2);
  CHECK(entry.first >= 0 && entry.count >= 0 && entry.first <= length - entry.count, CORE_ERR_ARGUMENT,
        "%s: a range of %lld elements from %lld on in arrays of %lld", op, (long long)entry.count,
        (long long)entry.first, (long long)length);
  return CORE_OK;
}

static adamw_range range_made(const kern_adamw &a, int64_t block) {
  return adamw_range{a.first,
                     a.count,
                     block,
                     (float)a.gradient_scale,
                     (float)(1 - a.rate * a.decay),
                     (float)a.beta1,
                     (float)(1 - a.beta1),
                     (float)a.beta2,
                     (float)(1 - a.beta2),
                     (float)(1 / sqrt(a.correction2)),
                     (float)a.epsilon,
                     (float)(a.rate / a.correction1)};
}

core_status kern_adamw_cuda(kern_context *context, const kern_adamw *list, int64_t n, core_tensor gradient,
                            core_tensor parameter, core_tensor m, core_tensor v, core_tensor copy) {
  KERN_CHECK_REAL(parameter, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY);
  KERN_CHECK_LIKE(gradient, parameter);
  KERN_CHECK_LIKE(m, parameter);
  KERN_CHECK_LIKE(v, parameter);
  const int64_t length = core_tensor_count(&parameter);
  if (copy.data != NULL)
    KERN_CHECK(copy, CORE_BFLOAT16, parameter.shape[0], parameter.shape[1], parameter.shape[2],
               parameter.shape[3]);
  CHECK(n >= 0 && (n == 0 || list != NULL), CORE_ERR_ARGUMENT, "%s: a list of %lld ranges", __func__,
        (long long)n);
  KERN_CHECK_LIMIT("the list", n, context->limits.updates);
  for (int64_t i = 0; i < n; i++) TRY(range_checked(__func__, list[i], length));
  void *host, *device;
  TRY(kern_stage_begin_priv(context, (size_t)n * sizeof(adamw_range), &host));
  adamw_range *const ranges = (adamw_range *)host;
  int64_t filled = 0, blocks = 0;
  for (int64_t i = 0; i < n; i++) {
    if (list[i].count == 0) continue;
    ranges[filled++] = range_made(list[i], blocks);
    blocks += kern_divide_up(list[i].count, STRETCH);
  }
  if (filled == 0) return CORE_OK;
  TRY(kern_stage_send_priv(context, (size_t)filled * sizeof(adamw_range), &device));
  const adamw_arrays arrays = {kern_data<const float>(gradient), kern_data<float>(parameter),
                               kern_data<float>(m), kern_data<float>(v), kern_data<kern_bfloat>(copy)};
  KERN_LAUNCH(context, kern_grid(blocks, dim3(KERN_BLOCK)), adamw_kernel, (const adamw_range *)device, filled,
              arrays);
  return CORE_OK;
}
