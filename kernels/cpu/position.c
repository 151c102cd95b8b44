/* Learned positions: row i of the table is added to row i of every segment. */
#include "active_impl.h" /* kern_at, kern_to */

typedef struct position_job {
  core_dtype dtype; /* of x and dx */
  kern_segments segments;
  int64_t c;
  const core_real *table;
  void *x;
  const void *dx;
  core_real *dtable;
} position_job;

/* Segments [begin, end). */
KERN_INLINE void position_add(const position_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real *restrict table = job->table;
  const int64_t *offset = job->segments.offset, c = job->c;
  for (int64_t s = begin; s < end; s++) {
    void *restrict x = kern_element(job->x, dtype, offset[s] * c);
#pragma omp simd
    for (int64_t i = 0; i < (offset[s + 1] - offset[s]) * c; i++) kern_to(x, dtype, i, KERN_ADD, table[i]);
  }
}
KERN_ACTIVE_RUN(position_add, position_job)

/* Rows [begin, end) of the table are independent: each sums its gradient over the segments in their order. */
KERN_INLINE void position_sum(const position_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const int64_t *offset = job->segments.offset, c = job->c;
  for (int64_t row = begin; row < end; row++) {
    core_real *restrict dtable = job->dtable + row * c;
    for (int64_t s = 0; s < job->segments.count; s++) {
      if (offset[s] + row >= offset[s + 1]) continue;
      const void *restrict dx = kern_element(job->dx, dtype, (offset[s] + row) * c);
#pragma omp simd
      for (int64_t i = 0; i < c; i++) dtable[i] += kern_at(dx, dtype, i);
    }
  }
}
KERN_ACTIVE_RUN(position_sum, position_job)

static core_status position_check(const char *op, kern_segments segments, int64_t rows, int64_t longest) {
  TRY(kern_check_offset_priv(op, "segments", segments.offset, segments.count, rows));
  for (int64_t s = 0; s < segments.count; s++)
    CHECK(segments.offset[s + 1] - segments.offset[s] <= longest, CORE_ERR_ARGUMENT,
          "%s: segment %lld has %lld rows, but there are only %lld positions", op, (long long)s,
          (long long)(segments.offset[s + 1] - segments.offset[s]), (long long)longest);
  return CORE_OK;
}

core_status kern_position_fwd_cpu(kern_context *context, kern_segments segments, core_tensor table,
                                  core_tensor x) {
  KERN_CHECK_ACTIVE(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK_REAL(table, KERN_ANY, c);
  TRY(position_check(__func__, segments, x.shape[0], table.shape[0]));
  const position_job job = {.dtype = x.dtype, .segments = segments, .c = c, .table = table.data, .x = x.data};
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    position_add_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

core_status kern_position_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dx,
                                  core_tensor dtable) {
  KERN_CHECK_ACTIVE(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  KERN_CHECK_REAL(dtable, KERN_ANY, c);
  TRY(position_check(__func__, segments, dx.shape[0], dtable.shape[0]));
  const position_job job = {
      .dtype = dx.dtype, .segments = segments, .c = c, .dx = dx.data, .dtable = dtable.data};
  const kern_split split = kern_split_of(dtable.shape[0], 1);
  KERN_FOR_BLOCKS(context, split, block) {
    position_sum_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
