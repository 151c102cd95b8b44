/* Attention on packed segments, backward: with P recomputed from lse,
 *   dV = P^T dO;  dP = dO V^T;  dS = P (dP - rowsum(P dP)) scale;  dQ = dS K;  dK = dS^T Q.
 * rowsum(P dP) equals rowsum(dO O), which a tiled device kernel would take; here P and dP lie in the cache.
 * One (segment, key/value head) writes its own columns of dqkv, so threads never meet. */
#include <omp.h> /* omp_get_thread_num */

#include "attention_impl.h" /* kern_tile */
#include "vecmath_impl.h"   /* kern_exp */

/* One tile of query rows of one head, as pointers to its first row. */
typedef struct backward_tile {
  int64_t first, rows, keys, columns;
  const core_real *query, *key, *dout, *lse;
  core_real *dquery, *dkey, *dvalue;
  kern_write write; /* of dkey and dvalue */
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
  const int64_t width = job->attention->head_width, row = job->row, out_row = job->out_row;
  const int64_t columns = job->columns;
  const kern_tile scores = {t->query, job->keys, job->score, row,        1,
                            columns,  columns,   t->rows,    t->columns, width};
  const kern_tile dprob = {t->dout, job->values, job->dscore, out_row,    1,
                           columns, columns,     t->rows,     t->columns, width};
  const kern_tile dquery = {job->dscore, t->key, t->dquery, columns, 1, row, row, t->rows, width, t->keys};
  const kern_tile dkey = {job->dscore, t->query, t->dkey, 1, columns, row, row, t->keys, width, t->rows};
  const kern_tile dvalue = {job->score, t->dout, t->dvalue, 1,     columns,
                            out_row,    row,     t->keys,   width, t->rows};
  kern_tile_multiply_priv(&scores, KERN_SET);
  kern_tile_multiply_priv(&dprob, KERN_SET);
  gradient_tile(job, t);
  kern_tile_multiply_priv(&dquery, KERN_SET);
  kern_tile_multiply_priv(&dkey, t->write);
  kern_tile_multiply_priv(&dvalue, t->write);
}

/* The first tile of a key/value head overwrites the gradients of the keys that it sees. */
static void backward_tile_at(const kern_attention_job *job, int64_t head, int64_t first) {
  const kern_attention *attention = job->attention;
  const int64_t width = attention->head_width, end = first + KERN_QUERY_ROWS;
  const int64_t last = end < job->length ? end : job->length, keys = kern_attention_keys(job, last);
  const int64_t segment = job->begin * job->row, tile = segment + first * job->row;
  const bool is_first = first == 0 && head == job->kv_head * (attention->heads / attention->kv_heads);
  const int64_t out = (job->begin + first) * job->out_row + head * width;
  const int64_t key = (attention->heads + job->kv_head) * width, value = key + attention->kv_heads * width;
  const backward_tile t = {.first = first,
                           .rows = last - first,
                           .keys = keys,
                           .columns = kern_round_lanes(keys),
                           .query = job->qkv + tile + head * width,
                           .key = job->qkv + segment + key,
                           .dout = job->dout + out,
                           .lse = job->lse + (job->begin + first) * attention->heads + head,
                           .dquery = job->dqkv + tile + head * width,
                           .dkey = job->dqkv + segment + key,
                           .dvalue = job->dqkv + segment + value,
                           .write = is_first ? KERN_SET : KERN_ADD};
  backward_run(job, &t);
}

static void backward_segment(const kern_attention_job *job) {
  const kern_attention *attention = job->attention;
  const int64_t group = attention->heads / attention->kv_heads, width = attention->head_width;
  const int64_t key = job->begin * job->row + (attention->heads + job->kv_head) * width;
  const int64_t value = key + attention->kv_heads * width;
  /* Later keys of a causal segment are first met by ADD. */
  const int64_t met = attention->mask == KERN_CAUSAL ? KERN_QUERY_ROWS : job->length;
  for (int64_t j = met; j < job->length; j++)
    for (int64_t a = 0; a < width; a++)
      job->dqkv[key + j * job->row + a] = job->dqkv[value + j * job->row + a] = 0;
  kern_tile_transpose_priv(job->qkv + key, job->row, job->length, job->columns, width, job->keys);
  kern_tile_transpose_priv(job->qkv + value, job->row, job->length, job->columns, width, job->values);
  for (int64_t head = job->kv_head * group; head < (job->kv_head + 1) * group; head++)
    for (int64_t first = 0; first < job->length; first += KERN_QUERY_ROWS) backward_tile_at(job, head, first);
}

core_status kern_attention_bwd_cpu(kern_context *context, const kern_attention *attention, core_tensor dout,
                                   core_tensor qkv, core_tensor out, core_tensor lse, core_tensor dqkv) {
  TRY(kern_attention_check_priv(__func__, context, attention, qkv, out, lse));
  KERN_CHECK_LIKE(dout, out);
  KERN_CHECK_LIKE(dqkv, qkv);
  const int64_t jobs = attention->segments.count * attention->kv_heads;
#pragma omp parallel for schedule(dynamic, 8) num_threads(context->threads)
  for (int64_t at = 0; at < jobs; at++) {
    kern_attention_job job = {
        .attention = attention, .qkv = qkv.data, .dout = dout.data, .lse = lse.data, .dqkv = dqkv.data};
    kern_attention_start_priv(&job, context, at / attention->kv_heads, at % attention->kv_heads,
                              omp_get_thread_num());
    if (job.kv_head == 0) {
      kern_attention_prefetch_priv(attention, at / attention->kv_heads + 1, job.qkv, job.row);
      kern_attention_prefetch_priv(attention, at / attention->kv_heads + 1, job.dout, job.out_row);
      kern_attention_prefetch_priv(attention, at / attention->kv_heads + 1, job.dqkv, job.row);
    }
    if (job.length > 0) backward_segment(&job);
  }
  return CORE_OK;
}
