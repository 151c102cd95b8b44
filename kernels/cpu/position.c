/* Learned positions: row i of the table is added to row i of every segment. */
#include "cpu_impl.h" /* checks, blocks */

KERN_CLONES static void position_add(const core_real *restrict table, core_real *restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] += table[i];
}

/* Rows of the table are independent: each sums its gradient over the segments in their order. */
KERN_CLONES static void position_sum(kern_segments segments, int64_t row, const core_real *restrict dx,
                                     core_real *restrict dtable, int64_t c) {
  for (int64_t s = 0; s < segments.count; s++) {
    const int64_t t = segments.offset[s] + row;
    if (t >= segments.offset[s + 1]) continue;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) dtable[i] += dx[t * c + i];
  }
}

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
  KERN_CHECK_REAL(x, KERN_ANY, KERN_ANY);
  const int64_t c = x.shape[1];
  KERN_CHECK_REAL(table, KERN_ANY, c);
  TRY(position_check(__func__, segments, x.shape[0], table.shape[0]));
  const kern_split split = kern_split_of(segments.count, 1);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t s = kern_split_at(split, block); s < kern_split_at(split, block + 1); s++)
      position_add(table.data, (core_real *)x.data + segments.offset[s] * c,
                   (segments.offset[s + 1] - segments.offset[s]) * c);
  }
  return CORE_OK;
}

core_status kern_position_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dx,
                                  core_tensor dtable) {
  KERN_CHECK_REAL(dx, KERN_ANY, KERN_ANY);
  const int64_t c = dx.shape[1];
  KERN_CHECK_REAL(dtable, KERN_ANY, c);
  TRY(position_check(__func__, segments, dx.shape[0], dtable.shape[0]));
  const kern_split split = kern_split_of(dtable.shape[0], 1);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t row = kern_split_at(split, block); row < kern_split_at(split, block + 1); row++)
      position_sum(segments, row, dx.data, (core_real *)dtable.data + row * c, c);
  }
  return CORE_OK;
}
