/* Gradient of a table whose rows were looked up. Each entry belongs to one block, which adds its rows in
 * their order: no two threads write one row, and the sums do not depend on the number of threads. */
#include "active_impl.h" /* kern_at */

typedef struct embedding_job {
  core_dtype dtype; /* of dx */
  const int64_t *offset;
  const int32_t *row, *entry;
  int64_t c;
  const void *dx;
  core_real *dtable;
} embedding_job;

/* Segments [begin, end). */
KERN_INLINE void embedding_sum(const embedding_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; s++) {
    core_real *restrict dtable = job->dtable + job->entry[s] * job->c;
    for (int64_t i = job->offset[s]; i < job->offset[s + 1]; i++) {
      const void *restrict dx = kern_element(job->dx, dtype, job->row[i] * job->c);
#pragma omp simd
      for (int64_t c = 0; c < job->c; c++) dtable[c] += kern_at(dx, dtype, c);
    }
  }
}
KERN_ACTIVE_RUN(embedding_sum, embedding_job)

core_status kern_embedding_bwd_cpu(kern_context *context, kern_segments segments, core_tensor row,
                                   core_tensor entry, core_tensor dx, core_tensor dtable) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  KERN_CHECK(row, CORE_INT32, KERN_ANY);
  KERN_CHECK(entry, CORE_INT32, segments.count);
  KERN_CHECK_REAL(dtable, KERN_ANY, c);
  TRY(kern_check_offset_priv(__func__, "segments", segments.offset, segments.count, row.shape[0]));
  KERN_CHECK_INDEX(row, 0, dx.shape[0]);
  KERN_CHECK_INDEX(entry, 0, dtable.shape[0]);
  const embedding_job job = {.dtype = dx.dtype,
                             .offset = segments.offset,
                             .row = row.data,
                             .entry = entry.data,
                             .c = c,
                             .dx = dx.data,
                             .dtable = dtable.data};
  const kern_split split = kern_split_rows(segments.count, c);
  KERN_FOR_BLOCKS(context, split, block) {
    embedding_sum_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
