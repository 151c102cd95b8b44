/* Attention on packed segments, backward: with P recomputed from lse,
 *   dV = P^T dO;  dP = dO V^T;  dS = P (dP - rowsum(P dP)) scale;  dQ = dS K;  dK = dS^T Q.
 * rowsum(P dP) equals rowsum(dO O), which a tiled device kernel would take; here P and dP lie in the cache.
 * One (segment, key/value head) writes its own columns of the gradients, so threads never meet. */
#include <omp.h> /* omp_get_thread_num */

#include "attention_impl.h" /* kern_tile */
#include "vecmath_impl.h"   /* kern_exp */

/* One tile of query rows of one head. */
typedef struct backward_tile {
  int64_t first, rows, keys, columns;
  kern_slice query, dout, dquery;
  const core_real *lse; /* of its first row */
  kern_write write;     /* of dkey and dvalue */
} backward_tile;

/* score: S -> P; dscore: dP -> dS. */
KERN_CLONES static void gradient_tile(const kern_attention_job *job, const backward_tile *tile) {
  const core_real scale = (core_real)job->attention->scale;
  for (int64_t i = 0; i < tile->rows; i++) {
    core_real *restrict score = job->score + i * job->columns, *restrict dscore =
                                                                   job->dscore + i * job->columns;
    const core_real lse = tile->lse[i * job->attention->heads];
    const int64_t keys = kern_attention_keys(job, tile->first + i + 1);
    for (int64_t j = keys; j < tile->columns; j++) score[j] = -INFINITY;
    core_real mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < tile->columns; j++) {
      score[j] = kern_exp(scale * score[j] - lse);
      mean += score[j] * dscore[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < tile->columns; j++) dscore[j] = score[j] * (dscore[j] - mean) * scale;
  }
}

static void backward_run(const kern_attention_job *job, const backward_tile *t) {
  const int64_t width = job->attention->head_width, columns = job->columns;
  const kern_slice query = t->query, dout = t->dout, key = job->key, dkey = job->dkey, dvalue = job->dvalue;
  const kern_tile scores = {query.at, job->key_table, job->score, query.row,  1,
                            columns,  columns,        t->rows,    t->columns, width};
  const kern_tile dprob = {dout.at, job->value_table, job->dscore, dout.row,   1,
                           columns, columns,          t->rows,     t->columns, width};
  const kern_tile to_query = {job->dscore, key.at,        t->dquery.at, columns, 1,
                              key.row,     t->dquery.row, t->rows,      width,   t->keys};
  const kern_tile to_key = {job->dscore, query.at, dkey.at, 1,     columns,
                            query.row,   dkey.row, t->keys, width, t->rows};
  const kern_tile to_value = {job->score, dout.at,    dvalue.at, 1,     columns,
                              dout.row,   dvalue.row, t->keys,   width, t->rows};
  kern_tile_multiply_priv(&scores, KERN_SET);
  kern_tile_multiply_priv(&dprob, KERN_SET);
  gradient_tile(job, t);
  kern_tile_multiply_priv(&to_query, KERN_SET);
  kern_tile_multiply_priv(&to_key, t->write);
  kern_tile_multiply_priv(&to_value, t->write);
}

/* The first tile of a key/value head overwrites the gradients of the keys that it sees. */
static void backward_tile_at(const kern_attention_job *job, int64_t head, int64_t first) {
  const kern_attention *attention = job->attention;
  const int64_t width = attention->head_width, end = first + KERN_QUERY_ROWS;
  const int64_t last = end < job->length ? end : job->length, keys = kern_attention_keys(job, last);
  const int64_t rows = last - first, tokens = job->begin + first;
  const int64_t query = tokens * job->row + head * width, out = tokens * job->out_row + head * width;
  const bool is_first = first == 0 && head == job->kv_head * (attention->heads / attention->kv_heads);
  const backward_tile t = {
      .first = first,
      .rows = rows,
      .keys = keys,
      .columns = kern_round_lanes(keys),
      .query = kern_slice_load_priv(job, job->query, query, job->row, rows, job->query_room),
      .dout = kern_slice_load_priv(job, job->dout, out, job->out_row, rows, job->dout_room),
      .dquery = kern_slice_open_priv(job, job->dquery, query, job->row, job->to_room),
      .lse = job->lse + tokens * attention->heads + head,
      .write = is_first ? KERN_SET : KERN_ADD};
  backward_run(job, &t);
  kern_slice_store_priv(job, t.dquery, job->dquery, query, job->row, rows);
}

static void slice_clear(kern_slice slice, int64_t begin, int64_t end, int64_t width) {
  for (int64_t j = begin; j < end; j++)
    for (int64_t a = 0; a < width; a++) slice.at[j * slice.row + a] = 0;
}

static void backward_segment(kern_attention_job *job) {
  const kern_attention *attention = job->attention;
  const int64_t group = attention->heads / attention->kv_heads, width = attention->head_width;
  const int64_t length = job->key_length, row = job->source_row;
  const int64_t key = job->key_begin * row + job->key_column + job->kv_head * width;
  const int64_t value = key + attention->kv_heads * width;
  job->key = kern_slice_load_priv(job, job->source, key, row, length, job->key_room);
  job->value = kern_slice_load_priv(job, job->source, value, row, length, job->value_room);
  job->dkey = kern_slice_open_priv(job, job->dsource, key, row, job->dkey_room);
  job->dvalue = kern_slice_open_priv(job, job->dsource, value, row, job->dvalue_room);
  /* Later keys of a causal segment are first met by ADD, and those without queries never. */
  const int64_t seen = attention->mask == KERN_CAUSAL ? KERN_QUERY_ROWS : length;
  const int64_t met = job->length > 0 ? seen : 0;
  slice_clear(job->dkey, met, length, width);
  slice_clear(job->dvalue, met, length, width);
  kern_tile_transpose_priv(job->key.at, job->key.row, length, job->columns, width, job->key_table);
  kern_tile_transpose_priv(job->value.at, job->value.row, length, job->columns, width, job->value_table);
  for (int64_t head = job->kv_head * group; head < (job->kv_head + 1) * group; head++)
    for (int64_t first = 0; first < job->length; first += KERN_QUERY_ROWS) backward_tile_at(job, head, first);
  kern_slice_store_priv(job, job->dkey, job->dsource, key, row, length);
  kern_slice_store_priv(job, job->dvalue, job->dsource, value, row, length);
}

/* All segments and key/value heads of a call. */
static void backward_all(kern_context *context, const kern_attention_job *call) {
  const kern_attention *attention = call->attention;
  const int64_t jobs = attention->segments.count * attention->kv_heads;
#pragma omp parallel for schedule(dynamic, 8) num_threads(context->threads)
  for (int64_t at = 0; at < jobs; at++) {
    kern_attention_job job = *call;
    const int64_t next = at / attention->kv_heads + 1;
    kern_attention_start_priv(&job, context, next - 1, at % attention->kv_heads, omp_get_thread_num());
    if (job.kv_head == 0) {
      kern_attention_prefetch_priv(&job, job.keys, next, job.source, job.source_row);
      kern_attention_prefetch_priv(&job, attention->segments, next, job.dout, job.out_row);
      kern_attention_prefetch_priv(&job, job.keys, next, job.dsource, job.source_row);
    }
    if (job.key_length > 0) backward_segment(&job);
  }
}

core_status kern_attention_bwd_cpu(kern_context *context, const kern_attention *attention, core_tensor dout,
                                   core_tensor qkv, core_tensor out, core_tensor lse, core_tensor dqkv) {
  TRY(kern_attention_check_priv(__func__, context, attention, qkv, out, lse));
  KERN_CHECK_LIKE(dout, out);
  KERN_CHECK_LIKE(dqkv, qkv);
  kern_attention_job call = kern_attention_job_priv(attention, qkv, lse);
  call.dout = dout.data, call.dquery = call.dsource = dqkv.data;
  backward_all(context, &call);
  return CORE_OK;
}

core_status kern_attention_cross_bwd_cpu(kern_context *context, const kern_cross *cross, core_tensor dout,
                                         core_tensor dq, core_tensor dkv) {
  const core_tensor q = cross->q, kv = cross->kv, out = cross->out;
  TRY(kern_cross_check_priv(__func__, context, cross));
  KERN_CHECK_LIKE(dout, out);
  KERN_CHECK_LIKE(dq, q);
  KERN_CHECK_LIKE(dkv, kv);
  kern_attention_job call = kern_cross_job_priv(cross);
  call.dout = dout.data, call.dquery = dq.data, call.dsource = dkv.data;
  backward_all(context, &call);
  return CORE_OK;
}
