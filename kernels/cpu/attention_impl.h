/* Private to attention_{tile,fwd,bwd}.c. Work is one (segment, key/value head) at a time, on one thread, with
 * that thread's scratch:
 *
 *   key_table    [A][columns]  K transposed; columns = the segment's keys rounded up to whole vectors
 *   value_table  [A][columns]  V transposed (backward)
 *   score        [KERN_QUERY_ROWS][columns]
 *   dscore       [KERN_QUERY_ROWS][columns]  (backward)
 *
 * and, for bfloat16, copies of the head's columns as core_real, so that the arithmetic is the same and a
 * gradient is rounded once, when it is complete:
 *
 *   K, V, dK, dV    [columns][A] each
 *   Q, dO, O or dQ  [KERN_QUERY_ROWS][A] each
 *
 * Scores of a block of query rows are materialised over all keys: with segments of tens of tokens that is one
 * tile in the first cache, and with thousands it still streams, without the rescaling of an online softmax.
 * Key columns are padded to whole vectors and the padding's probability is exactly 0, so that inner loops
 * have no remainders, which at 14 keys would be the whole loop. */
#ifndef KERN_ATTENTION_IMPL_H
#define KERN_ATTENTION_IMPL_H

#include "cpu_impl.h" /* kern_context */

/* Elements of that scratch by padded key, and by tile of queries. */
static inline int64_t kern_attention_per_key(int64_t width) {
  return (2 + 4) * width + 2 * KERN_QUERY_ROWS;
}
static inline int64_t kern_attention_per_tile(int64_t width) {
  return 3 * KERN_QUERY_ROWS * width;
}

/* One head's columns of some rows, as core_real: in the tensor itself, or a copy in scratch. */
typedef struct kern_slice {
  core_real *at;
  int64_t row; /* elements from one row to the next */
} kern_slice;

typedef struct kern_attention_job {
  const kern_attention *attention;
  kern_segments keys;                /* those of the attention, where a tensor attends to itself */
  core_dtype dtype;                  /* of all tensors but lse */
  const void *query, *source, *dout; /* source: of keys and values; of self-attention the same tensor */
  void *to_out, *dquery, *dsource;
  core_real *lse;
  int64_t row, source_row, out_row; /* elements from one token to the next in query, source and out */
  int64_t key_column;               /* of the first key head in a row of source; the values follow */
  int64_t length, begin;            /* of the segment's queries */
  int64_t key_length, key_begin;    /* of its keys */
  int64_t columns;                  /* key_length rounded up */
  int64_t kv_head;
  core_real *key_table, *value_table, *score, *dscore; /* scratch */
  core_real *key_room, *value_room, *dkey_room, *dvalue_room, *query_room, *dout_room, *to_room;
  kern_slice key, value, dkey, dvalue; /* of the segment and key/value head */
} kern_attention_job;

/* c[m,n] = a b, or += when write is KERN_ADD. a[i,p] = a[i * a_row + p * a_inner], so a transposed a costs
 * nothing; b and c are row-major with the strides given. c overlaps neither a nor b. */
typedef struct kern_tile {
  const core_real *a, *b;
  core_real *c;
  int64_t a_row, a_inner, b_row, c_row;
  int64_t m, n, k;
} kern_tile;
void kern_tile_multiply_priv(const kern_tile *tile, kern_write write);

/* y[a][j] = x[j * x_row + a] for j < length, 0 up to columns. */
void kern_tile_transpose_priv(const core_real *x, int64_t x_row, int64_t length, int64_t columns,
                              int64_t width, core_real *y);

/* `rows` rows of a head's columns from element `first` of a tensor on, `row` elements apart; `room` takes the
 * copy where there must be one. open: not read. store: writes an opened slice back. */
kern_slice kern_slice_load_priv(const kern_attention_job *job, const void *tensor, int64_t first, int64_t row,
                                int64_t rows, core_real *room);
kern_slice kern_slice_open_priv(const kern_attention_job *job, void *tensor, int64_t first, int64_t row,
                                core_real *room);
void kern_slice_store_priv(const kern_attention_job *job, kern_slice slice, void *tensor, int64_t first,
                           int64_t row, int64_t rows);

/* Shapes, limits and segments of an attention call. */
CORE_NODISCARD core_status kern_attention_check_priv(const char *op, const kern_context *context,
                                                     const kern_attention *attention, core_tensor qkv,
                                                     core_tensor out, core_tensor lse);
CORE_NODISCARD core_status kern_cross_check_priv(const char *op, const kern_context *context,
                                                 const kern_cross *cross);
/* What all segments and heads of a call share, without gradients. */
kern_attention_job kern_attention_job_priv(const kern_attention *attention, core_tensor qkv, core_tensor lse);
kern_attention_job kern_cross_job_priv(const kern_cross *cross);
/* Fills in what depends on the segment and the thread. */
void kern_attention_start_priv(kern_attention_job *job, const kern_context *context, int64_t segment,
                               int64_t kv_head, int32_t thread);

/* Asks for the rows of the next one of `segments` before they are needed: heads are visited in slices too
 * short for the hardware to see a stream. Long segments, whose slices it does see, are left alone. */
void kern_attention_prefetch_priv(const kern_attention_job *job, kern_segments segments, int64_t segment,
                                  const void *rows, int64_t row);

/* Keys that query rows below `end` see, and the padded count of score columns that holds them. */
static inline int64_t kern_attention_keys(const kern_attention_job *job, int64_t end) {
  return job->attention->mask == KERN_CAUSAL ? end : job->key_length;
}

#endif
