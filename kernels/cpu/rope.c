/* Rotary positions: the pair (i, i + A/2) of a head turns by position * inverse_frequency[i]. */
#include "vecmath_impl.h" /* kern_sincos */

typedef struct rope_job {
  core_dtype dtype;
  const int32_t *position;
  const core_real *frequency; /* [half] */
  void *x;
  int64_t width, heads, half;
  core_real sign; /* -1 turns back */
} rope_job;

KERN_INLINE void rope_head(void *restrict head, core_dtype dtype, const core_real *restrict sine,
                           const core_real *restrict cosine, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const core_real a = kern_at(head, dtype, i), b = kern_at(head, dtype, half + i);
    kern_to(head, dtype, i, KERN_SET, a * cosine[i] - b * sine[i]);
    kern_to(head, dtype, half + i, KERN_SET, b * cosine[i] + a * sine[i]);
  }
}

/* One table of sines a row serves all its heads. */
KERN_INLINE void rope_rows(const rope_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  core_real sine[KERN_MAX_HEAD_WIDTH / 2], cosine[KERN_MAX_HEAD_WIDTH / 2];
  const int64_t half = job->half;
  for (int64_t t = begin; t < end; t++) {
    const core_real position = (core_real)job->position[t] * job->sign;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) kern_sincos(position * job->frequency[i], &sine[i], &cosine[i]);
    for (int64_t h = 0; h < job->heads; h++)
      rope_head(kern_element(job->x, dtype, t * job->width + h * 2 * half), dtype, sine, cosine, half);
  }
}
KERN_ACTIVE_RUN(rope_rows, rope_job)

core_status kern_rope_cpu(kern_context *context, kern_rotation rotation, int32_t heads, core_tensor position,
                          core_tensor inverse_frequency, core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(inverse_frequency, KERN_ANY);
  const int64_t rows = x.shape[0], width = x.shape[1], half = inverse_frequency.shape[0];
  KERN_CHECK(position, CORE_INT32, rows);
  CHECK(half <= KERN_MAX_HEAD_WIDTH / 2 && heads >= 0 && heads * 2 * half <= width, CORE_ERR_ARGUMENT,
        "%s: %d heads of width %lld in rows of %lld; the widest head is %d", __func__, (int)heads,
        (long long)(2 * half), (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  const rope_job job = {.dtype = x.dtype,
                        .position = position.data,
                        .frequency = inverse_frequency.data,
                        .x = x.data,
                        .width = width,
                        .heads = heads,
                        .half = half,
                        .sign = rotation == KERN_ROTATE ? 1 : -1};
  const kern_split split = kern_split_rows(rows, width);
  KERN_FOR_BLOCKS(context, split, block) {
    rope_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
