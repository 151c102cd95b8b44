/* Attention on packed segments, forward. Segments and heads are independent; each output is written once. */
#include <omp.h> /* omp_get_thread_num */

#include "attention_impl.h" /* kern_tile */
#include "vecmath_impl.h"   /* kern_exp, kern_row_max */

/* score[rows][columns] -> probabilities in place; lse strided by heads. `first` is the tile's first query. */
KERN_CLONES static void softmax_tile(const kern_attention_job *job, int64_t first, int64_t rows,
                                     int64_t columns, core_real *restrict lse) {
  const core_real scale = (core_real)job->attention->scale;
  for (int64_t i = 0; i < rows; i++) {
    core_real *restrict score = job->score + i * job->columns;
    const int64_t keys = kern_attention_keys(job, first + i + 1);
    for (int64_t j = keys; j < columns; j++) score[j] = -INFINITY;
    const core_real most = kern_row_max(score, columns);
    core_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; j++) {
      score[j] = kern_exp(scale * (score[j] - most));
      sum += score[j];
    }
    const core_real inverse = 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) score[j] *= inverse;
    lse[i * job->attention->heads] = scale * most + core_real_log(sum);
  }
}

static void forward_tile(const kern_attention_job *job, int64_t head, int64_t first) {
  const kern_attention *attention = job->attention;
  const int64_t width = attention->head_width, end = first + KERN_QUERY_ROWS;
  const int64_t last = end < job->length ? end : job->length, rows = last - first;
  const int64_t keys = kern_attention_keys(job, last), columns = kern_round_lanes(keys);
  const int64_t from = (job->begin + first) * job->row + head * width;
  const int64_t to = (job->begin + first) * job->out_row + head * width;
  const kern_slice query = kern_slice_load_priv(job, job->query, from, job->row, rows, job->query_room);
  const kern_slice out = kern_slice_open_priv(job, job->to_out, to, job->out_row, job->to_room);
  const kern_tile scores = {.a = query.at,
                            .a_row = query.row,
                            .a_inner = 1,
                            .b = job->key_table,
                            .b_row = job->columns,
                            .c = job->score,
                            .c_row = job->columns,
                            .m = rows,
                            .n = columns,
                            .k = width};
  const kern_tile mix = {.a = job->score,
                         .a_row = job->columns,
                         .a_inner = 1,
                         .b = job->value.at,
                         .b_row = job->value.row,
                         .c = out.at,
                         .c_row = out.row,
                         .m = rows,
                         .n = width,
                         .k = keys};
  kern_tile_multiply_priv(&scores, KERN_SET);
  softmax_tile(job, first, rows, columns, job->lse + (job->begin + first) * attention->heads + head);
  kern_tile_multiply_priv(&mix, KERN_SET);
  kern_slice_store_priv(job, out, job->to_out, to, job->out_row, rows);
}

static void forward_segment(kern_attention_job *job) {
  const kern_attention *attention = job->attention;
  const int64_t group = attention->heads / attention->kv_heads, width = attention->head_width;
  const int64_t row = job->source_row, length = job->key_length;
  const int64_t key = job->key_begin * row + job->key_column + job->kv_head * width;
  const int64_t value = key + attention->kv_heads * width;
  job->key = kern_slice_load_priv(job, job->source, key, row, length, job->key_room);
  job->value = kern_slice_load_priv(job, job->source, value, row, length, job->value_room);
  kern_tile_transpose_priv(job->key.at, job->key.row, length, job->columns, width, job->key_table);
  for (int64_t head = job->kv_head * group; head < (job->kv_head + 1) * group; head++)
    for (int64_t first = 0; first < job->length; first += KERN_QUERY_ROWS) forward_tile(job, head, first);
}

/* All segments and key/value heads of a call. */
static void forward_all(kern_context *context, const kern_attention_job *call) {
  const kern_attention *attention = call->attention;
  const int64_t jobs = attention->segments.count * attention->kv_heads;
#pragma omp parallel for schedule(dynamic, 8) num_threads(context->threads)
  for (int64_t at = 0; at < jobs; at++) {
    kern_attention_job job = *call;
    const int64_t next = at / attention->kv_heads + 1;
    kern_attention_start_priv(&job, context, next - 1, at % attention->kv_heads, omp_get_thread_num());
    if (job.kv_head == 0) {
      kern_attention_prefetch_priv(&job, job.keys, next, job.source, job.source_row);
      if (job.query != job.source)
        kern_attention_prefetch_priv(&job, attention->segments, next, job.query, job.row);
    }
    if (job.length > 0) forward_segment(&job);
  }
}

core_status kern_attention_fwd_cpu(kern_context *context, const kern_attention *attention, core_tensor qkv,
                                   core_tensor out, core_tensor lse) {
  TRY(kern_attention_check_priv(__func__, context, attention, qkv, out, lse));
  CHECK(attention->scale > 0, CORE_ERR_ARGUMENT, "%s: scale is %g, expected above 0", __func__,
        attention->scale);
  kern_attention_job call = kern_attention_job_priv(attention, qkv, lse);
  call.to_out = out.data;
  forward_all(context, &call);
  return CORE_OK;
}

core_status kern_attention_cross_fwd_cpu(kern_context *context, const kern_cross *cross) {
  TRY(kern_cross_check_priv(__func__, context, cross));
  CHECK(cross->attention.scale > 0, CORE_ERR_ARGUMENT, "%s: scale is %g, expected above 0", __func__,
        cross->attention.scale);
  kern_attention_job call = kern_cross_job_priv(cross);
  call.to_out = cross->out.data;
  forward_all(context, &call);
  return CORE_OK;
}
