/* Small matrix products and transposition for attention, and the common checks. oneDNN's call costs more than
 * a product of 14 x 14 x 32. A block of TILE_ROWS x KERN_LANES sums stays in registers: 6 x 16 is what
 * sixteen 32-byte registers hold, and keeps three quarters of the multipliers of a machine with 64-byte ones
 * busy. */
#include "attention_impl.h" /* kern_tile */
#include "active_impl.h"    /* kern_put, kern_prefetch */

enum { TILE_ROWS = 6, PREFETCH_MOST = 1 << 16 };

/* c[rows, lanes] (+)= a[rows, k] b[k, lanes] at (i, j); rows and lanes are constants after inlining, or lanes
 * is the remainder of a row. */
KERN_INLINE void tile_block(const kern_tile *t, kern_write write, int64_t i, int64_t j, int rows,
                            int64_t lanes) {
  core_real sum[TILE_ROWS][KERN_LANES];
  const core_real *restrict a = t->a + i * t->a_row, *restrict b = t->b + j;
  core_real *restrict c = t->c + i * t->c_row + j;
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
#pragma omp simd
    for (int64_t l = 0; l < lanes; l++) sum[r][l] = 0;
  }
  for (int64_t p = 0; p < t->k; p++) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const core_real factor = a[r * t->a_row + p * t->a_inner];
#pragma omp simd
      for (int64_t l = 0; l < lanes; l++) sum[r][l] += factor * b[p * t->b_row + l];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
#pragma omp simd
    for (int64_t l = 0; l < lanes; l++) kern_put(&c[r * t->c_row + l], write, sum[r][l]);
  }
}

KERN_INLINE void tile_rows(const kern_tile *t, kern_write write, int64_t i, int rows) {
  int64_t j = 0;
  for (; j + KERN_LANES <= t->n; j += KERN_LANES) tile_block(t, write, i, j, rows, KERN_LANES);
  if (j < t->n) tile_block(t, write, i, j, rows, t->n - j);
}

KERN_INLINE void tile_all(const kern_tile *tile, kern_write write) {
  int64_t i = 0;
  for (; i + TILE_ROWS <= tile->m; i += TILE_ROWS) tile_rows(tile, write, i, TILE_ROWS);
  switch (tile->m - i) {
    case 5:
      tile_rows(tile, write, i, 5);
      break;
    case 4:
      tile_rows(tile, write, i, 4);
      break;
    case 3:
      tile_rows(tile, write, i, 3);
      break;
    case 2:
      tile_rows(tile, write, i, 2);
      break;
    case 1:
      tile_rows(tile, write, i, 1);
      break;
    default:
      break;
  }
}

KERN_CLONES void kern_tile_multiply_priv(const kern_tile *tile, kern_write write) {
  if (write == KERN_ADD)
    tile_all(tile, KERN_ADD);
  else
    tile_all(tile, KERN_SET);
}

/* Four rows of four, by halves and then by quarters; vectors this short exist on every x86-64. */
typedef core_real tile_four __attribute__((vector_size(4 * sizeof(core_real)), aligned(sizeof(core_real))));
#ifdef ANTIPHON_DOUBLE
typedef int64_t tile_index __attribute__((vector_size(32)));
#else
typedef int32_t tile_index __attribute__((vector_size(16)));
#endif

KERN_INLINE void transpose_four(const core_real *const row[4], int64_t at, int64_t y_row, core_real *y) {
  const tile_index low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const tile_four a = *(const tile_four *)(row[0] + at), b = *(const tile_four *)(row[1] + at);
  const tile_four c = *(const tile_four *)(row[2] + at), d = *(const tile_four *)(row[3] + at);
  const tile_four ab_low = __builtin_shuffle(a, b, low), cd_low = __builtin_shuffle(c, d, low);
  const tile_four ab_high = __builtin_shuffle(a, b, high), cd_high = __builtin_shuffle(c, d, high);
  *(tile_four *)y = __builtin_shuffle(ab_low, cd_low, first);
  *(tile_four *)(y + y_row) = __builtin_shuffle(ab_low, cd_low, second);
  *(tile_four *)(y + 2 * y_row) = __builtin_shuffle(ab_high, cd_high, first);
  *(tile_four *)(y + 3 * y_row) = __builtin_shuffle(ab_high, cd_high, second);
}

/* Rows beyond the length are rows of zeros, so that the padding needs no code of its own. */
void kern_tile_transpose_priv(const core_real *x, int64_t x_row, int64_t length, int64_t columns,
                              int64_t width, core_real *y) {
  static const core_real zeros[KERN_MAX_HEAD_WIDTH];
  const int64_t wide = width / 4 * 4;
  for (int64_t j = 0; j < columns; j += 4) {
    const core_real *row[4];
    for (int64_t r = 0; r < 4; r++) row[r] = j + r < length ? x + (j + r) * x_row : zeros;
    for (int64_t a = 0; a < wide; a += 4) transpose_four(row, a, columns, y + a * columns + j);
    for (int64_t a = wide; a < width; a++)
      for (int64_t r = 0; r < 4; r++) y[a * columns + j + r] = row[r][a];
  }
}

kern_slice kern_slice_open_priv(const kern_attention_job *job, void *tensor, int64_t first, int64_t row,
                                core_real *room) {
  if (job->dtype == CORE_BFLOAT16) return (kern_slice){room, job->attention->head_width};
  return (kern_slice){(core_real *)tensor + first, row};
}

kern_slice kern_slice_load_priv(const kern_attention_job *job, const void *tensor, int64_t first, int64_t row,
                                int64_t rows, core_real *room) {
  const kern_slice slice = kern_slice_open_priv(job, kern_element(tensor, job->dtype, 0), first, row, room);
  if (job->dtype == CORE_BFLOAT16)
    kern_widen_rows_priv((const uint16_t *)tensor + first, row, rows, slice.row, slice.at, slice.row, 1);
  return slice;
}

void kern_slice_store_priv(const kern_attention_job *job, kern_slice slice, void *tensor, int64_t first,
                           int64_t row, int64_t rows) {
  if (job->dtype == CORE_BFLOAT16)
    kern_narrow_rows_priv(slice.at, slice.row, rows, slice.row, KERN_SET, (uint16_t *)tensor + first, row, 1);
}

static core_status heads_check(const char *op, const kern_attention *attention) {
  const int64_t heads = attention->heads, kv_heads = attention->kv_heads, width = attention->head_width;
  CHECK(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0, CORE_ERR_ARGUMENT,
        "%s: %lld heads over %lld key/value heads, expected a multiple", op, (long long)heads,
        (long long)kv_heads);
  CHECK(width >= 1 && width <= KERN_MAX_HEAD_WIDTH, CORE_ERR_ARGUMENT,
        "%s: head width %lld, expected 1 to %d", op, (long long)width, (int)KERN_MAX_HEAD_WIDTH);
  return CORE_OK;
}

static core_status segments_check(const char *op, const kern_context *context, kern_segments segments,
                                  int64_t rows) {
  TRY(kern_check_offset_priv(op, "segments", segments.offset, segments.count, rows));
  for (int64_t s = 0; s < segments.count; s++)
    TRY(kern_check_limit_priv(op, "a segment's length", segments.offset[s + 1] - segments.offset[s],
                              context->limits.sequence));
  return CORE_OK;
}

core_status kern_attention_check_priv(const char *op, const kern_context *context,
                                      const kern_attention *attention, core_tensor qkv, core_tensor out,
                                      core_tensor lse) {
  const int64_t rows = qkv.shape[0], heads = attention->heads, kv_heads = attention->kv_heads;
  const int64_t width = attention->head_width;
  TRY(heads_check(op, attention));
  TRY(kern_check_priv(op, "qkv", &qkv, kern_active_dtype(qkv.dtype),
                      (const int64_t[]){KERN_ANY, (heads + 2 * kv_heads) * width}, 2));
  TRY(kern_check_priv(op, "out", &out, qkv.dtype, (const int64_t[]){rows, heads * width}, 2));
  TRY(kern_check_priv(op, "lse", &lse, CORE_REAL_DTYPE, (const int64_t[]){rows, heads}, 2));
  TRY(kern_check_limit_priv(op, "width", qkv.shape[1], context->limits.width));
  TRY(segments_check(op, context, attention->segments, rows));
  return CORE_OK;
}

core_status kern_cross_check_priv(const char *op, const kern_context *context, const kern_cross *cross) {
  const kern_attention *attention = &cross->attention;
  const kern_segments queries = attention->segments, keys = cross->keys;
  const int64_t rows = cross->q.shape[0], heads = attention->heads, width = attention->head_width;
  TRY(heads_check(op, attention));
  CHECK(attention->mask == KERN_BIDIRECTIONAL, CORE_ERR_ARGUMENT, "%s: there is no mask between two tensors",
        op);
  TRY(kern_check_priv(op, "q", &cross->q, kern_active_dtype(cross->q.dtype),
                      (const int64_t[]){KERN_ANY, heads * width}, 2));
  TRY(kern_check_priv(op, "kv", &cross->kv, cross->q.dtype,
                      (const int64_t[]){KERN_ANY, 2 * (int64_t)attention->kv_heads * width}, 2));
  TRY(kern_check_priv(op, "out", &cross->out, cross->q.dtype, (const int64_t[]){rows, heads * width}, 2));
  TRY(kern_check_priv(op, "lse", &cross->lse, CORE_REAL_DTYPE, (const int64_t[]){rows, heads}, 2));
  TRY(kern_check_limit_priv(op, "width", cross->kv.shape[1], context->limits.width));
  CHECK(keys.count == queries.count, CORE_ERR_ARGUMENT, "%s: %lld segments of queries and %lld of keys", op,
        (long long)queries.count, (long long)keys.count);
  TRY(segments_check(op, context, queries, rows));
  TRY(segments_check(op, context, keys, cross->kv.shape[0]));
  for (int64_t s = 0; s < keys.count; s++)
    CHECK(queries.offset[s + 1] == queries.offset[s] || keys.offset[s + 1] > keys.offset[s],
          CORE_ERR_ARGUMENT, "%s: segment %lld has queries and no keys", op, (long long)s);
  return CORE_OK;
}

kern_attention_job kern_attention_job_priv(const kern_attention *attention, core_tensor qkv,
                                           core_tensor lse) {
  return (kern_attention_job){.attention = attention,
                              .keys = attention->segments,
                              .dtype = qkv.dtype,
                              .query = qkv.data,
                              .source = qkv.data,
                              .lse = lse.data,
                              .row = qkv.shape[1],
                              .source_row = qkv.shape[1],
                              .key_column = (int64_t)attention->heads * attention->head_width};
}

kern_attention_job kern_cross_job_priv(const kern_cross *cross) {
  return (kern_attention_job){.attention = &cross->attention,
                              .keys = cross->keys,
                              .dtype = cross->q.dtype,
                              .query = cross->q.data,
                              .source = cross->kv.data,
                              .lse = cross->lse.data,
                              .row = cross->q.shape[1],
                              .source_row = cross->kv.shape[1]};
}

void kern_attention_start_priv(kern_attention_job *job, const kern_context *context, int64_t segment,
                               int64_t kv_head, int32_t thread) {
  const kern_attention *attention = job->attention;
  const int64_t width = attention->head_width;
  job->begin = attention->segments.offset[segment];
  job->length = attention->segments.offset[segment + 1] - job->begin;
  job->key_begin = job->keys.offset[segment];
  job->key_length = job->keys.offset[segment + 1] - job->key_begin;
  job->columns = kern_round_lanes(job->key_length);
  job->kv_head = kv_head;
  job->out_row = attention->heads * width;
  job->key_table = context->attention + thread * context->attention_count;
  job->value_table = job->key_table + width * job->columns;
  job->score = job->value_table + width * job->columns;
  job->dscore = job->score + KERN_QUERY_ROWS * job->columns;
  job->key_room = job->dscore + KERN_QUERY_ROWS * job->columns;
  job->value_room = job->key_room + width * job->columns;
  job->dkey_room = job->value_room + width * job->columns;
  job->dvalue_room = job->dkey_room + width * job->columns;
  job->query_room = job->dvalue_room + width * job->columns;
  job->dout_room = job->query_room + KERN_QUERY_ROWS * width;
  job->to_room = job->dout_room + KERN_QUERY_ROWS * width;
}

void kern_attention_prefetch_priv(const kern_attention_job *job, kern_segments segments, int64_t segment,
                                  const void *rows, int64_t row) {
  if (segment >= segments.count) return;
  const int64_t *offset = segments.offset + segment;
  const int64_t elements = (offset[1] - offset[0]) * row;
  if (elements <= PREFETCH_MOST)
    kern_prefetch(kern_element(rows, job->dtype, offset[0] * row), job->dtype, elements);
}
