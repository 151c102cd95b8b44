/* Rotary positions: the pair (i, i + A/2) of a head turns by position * inverse_frequency[i]. */
#include "vecmath_impl.h" /* kern_sincos */

typedef struct rope_rows {
  const int32_t *position;
  const core_real *frequency; /* [half] */
  core_real *x;
  int64_t rows, width, heads, half;
  core_real sign; /* -1 turns back */
} rope_rows;

KERN_INLINE void rope_head(core_real *restrict head, const core_real *restrict sine,
                           const core_real *restrict cosine, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const core_real a = head[i], b = head[half + i];
    head[i] = a * cosine[i] - b * sine[i];
    head[half + i] = b * cosine[i] + a * sine[i];
  }
}

/* One table of sines a row serves all its heads. */
KERN_CLONES static void rope_turn(const rope_rows *job) {
  core_real sine[KERN_MAX_HEAD_WIDTH / 2], cosine[KERN_MAX_HEAD_WIDTH / 2];
  const int64_t half = job->half;
  for (int64_t t = 0; t < job->rows; t++) {
    const core_real position = (core_real)job->position[t] * job->sign;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) kern_sincos(position * job->frequency[i], &sine[i], &cosine[i]);
    for (int64_t h = 0; h < job->heads; h++)
      rope_head(job->x + t * job->width + h * 2 * half, sine, cosine, half);
  }
}

core_status kern_rope_cpu(kern_context *context, kern_rotation rotation, int32_t heads, core_tensor position,
                          core_tensor inverse_frequency, core_tensor x) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(inverse_frequency, KERN_ANY);
  const int64_t rows = x.shape[0], width = x.shape[1], half = inverse_frequency.shape[0];
  KERN_CHECK(position, CORE_INT32, rows);
  CHECK(half <= KERN_MAX_HEAD_WIDTH / 2 && heads >= 0 && heads * 2 * half <= width, CORE_ERR_ARGUMENT,
        "%s: %d heads of width %lld in rows of %lld; the widest head is %d", __func__, (int)heads,
        (long long)(2 * half), (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  const kern_split split = kern_split_rows(rows, width);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    const rope_rows job = {.position = (const int32_t *)position.data + begin,
                           .frequency = inverse_frequency.data,
                           .x = (core_real *)x.data + begin * width,
                           .rows = kern_split_at(split, block + 1) - begin,
                           .width = width,
                           .heads = heads,
                           .half = half,
                           .sign = rotation == KERN_ROTATE ? 1 : -1};
    rope_turn(&job);
  }
  return CORE_OK;
}
