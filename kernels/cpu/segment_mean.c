/* Mean of each segment's rows. Segments are split among threads by count; they are of similar length. */
#include "active_impl.h" /* kern_at, kern_to */

enum { CHUNK = 512 }; /* columns whose sums stay in the first cache over the rows of a segment */

typedef struct mean_job {
  core_dtype dtype;
  kern_write write; /* of dx */
  const int64_t *offset;
  int64_t c;
  const void *from; /* x[T,C] or dy[S,C] */
  void *to;         /* y[S,C] or dx[T,C] */
} mean_job;

/* Columns [from, from + n) of segment s, which is not empty. */
KERN_INLINE void mean_chunk(const mean_job *job, core_dtype dtype, int64_t s, int64_t from, int64_t n) {
  const int64_t begin = job->offset[s], end = job->offset[s + 1];
  core_real sum[CHUNK];
  for (int64_t i = 0; i < n; i++) sum[i] = 0;
  for (int64_t t = begin; t < end; t++) {
    const void *restrict x = kern_element(job->from, dtype, t * job->c + from);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sum[i] += kern_at(x, dtype, i);
  }
  const core_real inverse = begin < end ? 1 / (core_real)(end - begin) : 0;
  void *restrict y = kern_element(job->to, dtype, s * job->c + from);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) kern_to(y, dtype, i, KERN_SET, sum[i] * inverse);
}

KERN_INLINE void mean_segments(const mean_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; s++)
    for (int64_t from = 0; from < job->c; from += CHUNK)
      mean_chunk(job, dtype, s, from, job->c - from < CHUNK ? job->c - from : CHUNK);
}
KERN_ACTIVE_RUN(mean_segments, mean_job)

KERN_INLINE void mean_segments_back(const mean_job *job, core_dtype dtype, kern_write write, int64_t begin,
                                    int64_t end) {
  const int64_t c = job->c;
  for (int64_t s = begin; s < end; s++) {
    const core_real inverse = 1 / (core_real)(job->offset[s + 1] - job->offset[s]);
    const void *restrict dy = kern_element(job->from, dtype, s * c);
    for (int64_t t = job->offset[s]; t < job->offset[s + 1]; t++) {
      void *restrict dx = kern_element(job->to, dtype, t * c);
#pragma omp simd
      for (int64_t i = 0; i < c; i++) kern_to(dx, dtype, i, write, kern_at(dy, dtype, i) * inverse);
    }
  }
}
KERN_ACTIVE_WRITE_RUN(mean_segments_back, mean_job)

core_status kern_segment_mean_fwd_cpu(kern_context *context, kern_segments segments, core_tensor x,
                                      core_tensor y) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  TRY(kern_check_offset_priv(__func__, "segments", segments.offset, segments.count, x.shape[0]));
  KERN_CHECK(y, x.dtype, segments.count, c);
  const mean_job job = {.dtype = x.dtype, .offset = segments.offset, .c = c, .from = x.data, .to = y.data};
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    mean_segments_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_segment_mean_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dy,
                                      kern_write write, core_tensor dx) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  TRY(kern_check_offset_priv(__func__, "segments", segments.offset, segments.count, dx.shape[0]));
  KERN_CHECK(dy, dx.dtype, segments.count, c);
  const mean_job job = {
      .dtype = dx.dtype, .write = write, .offset = segments.offset, .c = c, .from = dy.data, .to = dx.data};
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    mean_segments_back_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
