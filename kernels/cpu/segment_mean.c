/* Mean of each segment's rows. Segments are split among threads by count; they are of similar length. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_put */

KERN_CLONES static void mean_segments(const int64_t *offset, int64_t begin, int64_t end,
                                      const core_real *restrict x, core_real *restrict y, int64_t c) {
  for (int64_t s = begin; s < end; s++) {
    core_real *restrict to = y + s * c;
    memset(to, 0, (size_t)c * sizeof *to);
    for (int64_t t = offset[s]; t < offset[s + 1]; t++) {
#pragma omp simd
      for (int64_t i = 0; i < c; i++) to[i] += x[t * c + i];
    }
    if (offset[s] == offset[s + 1]) continue;
    const core_real inverse = 1 / (core_real)(offset[s + 1] - offset[s]);
#pragma omp simd
    for (int64_t i = 0; i < c; i++) to[i] *= inverse;
  }
}

KERN_CLONES static void mean_segments_back(const int64_t *offset, int64_t begin, int64_t end,
                                           const core_real *restrict dy, kern_write write,
                                           core_real *restrict dx, int64_t c) {
  for (int64_t s = begin; s < end; s++) {
    const core_real inverse = 1 / (core_real)(offset[s + 1] - offset[s]);
    for (int64_t t = offset[s]; t < offset[s + 1]; t++) {
#pragma omp simd
      for (int64_t i = 0; i < c; i++) kern_put(&dx[t * c + i], write, dy[s * c + i] * inverse);
    }
  }
}

core_status kern_segment_mean_fwd_cpu(kern_context *context, kern_segments segments, core_tensor x,
                                      core_tensor y) {
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  TRY(kern_check_offset_priv(__func__, "segments", segments.offset, segments.count, x.shape[0]));
  KERN_CHECK_REAL(y, segments.count, c);
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    mean_segments(segments.offset, kern_split_at(split, block), kern_split_at(split, block + 1), x.data,
                  y.data, c);
  }
  return CORE_OK;
}

core_status kern_segment_mean_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dy,
                                      kern_write write, core_tensor dx) {
  KERN_CHECK_REAL(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  TRY(kern_check_offset_priv(__func__, "segments", segments.offset, segments.count, dx.shape[0]));
  KERN_CHECK_REAL(dy, segments.count, c);
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    mean_segments_back(segments.offset, kern_split_at(split, block), kern_split_at(split, block + 1), dy.data,
                       write, dx.data, c);
  }
  return CORE_OK;
}
