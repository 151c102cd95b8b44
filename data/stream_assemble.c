/* Outline: the assembler thread turns plan after plan into a batch: the columns of the whole global batch,
 * then the latents of every part, awaited segment by segment and copied from the cache where they do not lie
 * in the batch already. It is the thread that ends the stream, well or with an error, so that everything
 * before an error is still delivered. */
#include <string.h>

#include "data/stream_impl.h"

/* ---- columns of the global batch ---- */

static void fill_columns(const data_stream *stream, const data_plan *plan, data_batch *batch) {
  const size_t samples = (size_t)plan->samples;
  batch->samples = plan->samples;
  batch->skipped = plan->skipped;
  batch->before = plan->before;
  batch->after = plan->after;
  memcpy(batch->id, plan->column.id, samples * sizeof *batch->id);
  memcpy(batch->label, plan->column.label, samples * sizeof *batch->label);
  for (int32_t m = 0; m < stream->set->modalities; ++m)
    for (int64_t i = 0; i < plan->samples; ++i)
      batch->present[m * plan->samples + i] = plan->column.rows[m][i] > 0;
}

static void fill_offsets(const data_plan *plan, int32_t m, const data_range *range, data_part *part) {
  part->lo = range->lo < plan->samples ? range->lo : plan->samples;
  part->hi = range->hi < plan->samples ? range->hi : plan->samples;
  part->offset[0] = 0;
  for (int64_t i = part->lo; i < part->hi; ++i)
    part->offset[i - part->lo + 1] = part->offset[i - part->lo] + plan->column.rows[m][i];
}

/* ---- latents ---- */

static const data_load *load_of(const data_stream *stream, const data_segment *segment) {
  return segment->slot >= 0 ? &stream->cache[segment->m].slot[segment->slot].load : &segment->load;
}

/* That there is room. Under the lock. */
static void tell_reader(data_stream *stream) {
  stream->freed = 0;
  pthread_cond_signal(&stream->room);
}

/* Sleeps until there is something to do; what was freed is told before, since it may be what the reader waits
 * for. Under the lock. */
static void wait_to_fill(data_stream *stream) {
  if (stream->freed > 0) tell_reader(stream);
  pthread_cond_wait(&stream->filled, &stream->lock);
}

/* What to sleep for when the next segment is not there, since each waking costs a switch of threads: in file
 * order, where hardly anything is left to copy, the last load of the batch; else one a few loads on. Every
 * load comes about without the assembler's help. */
static const data_load *choose_awaited(const data_stream *stream, const data_load *load) {
  const int64_t planned = stream->plan[stream->assembled % stream->plans].end;
  const int64_t end = planned < stream->pushed ? planned : stream->pushed;
  int32_t left = stream->direct ? INT32_MAX : DATA_LOADS_AT_ONCE;
  for (int64_t at = stream->popped + 1; at < end && left > 1; ++at) {
    const data_load *later = load_of(stream, &stream->segment[at % DATA_SEGMENTS]);
    if (later->state != DATA_LOAD_UNDER_WAY || later->sequence <= load->sequence) continue;
    load = later;
    --left;
  }
  return load;
}

/* The next segment, when its rows are there. Errors: the one of its load. *going = false when the stream
 * closes. The place of the segment stays its own until release_segment. */
static core_status await_segment(data_stream *stream, const data_segment **segment, bool *going) {
  core_status status = CORE_OK;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    *going = !stream->closing;
    if (!*going) break;
    stream->awaited = NULL;
    if (stream->popped < stream->pushed) {
      *segment = &stream->segment[stream->popped % DATA_SEGMENTS];
      const data_load *load = load_of(stream, *segment);
      if (load->state == DATA_LOAD_DONE) break;
      if (load->state == DATA_LOAD_FAILED) status = core_error_restore(&stream->error);
      stream->awaited = choose_awaited(stream, load);
    } else if (stream->broken) { /* the reader has stopped: there will be no segment */
      status = core_error_restore(&stream->error);
    }
    if (status != CORE_OK) break;
    wait_to_fill(stream);
  }
  stream->awaited = NULL;
  pthread_mutex_unlock(&stream->lock);
  TRY(status);
  return CORE_OK;
}

static void release_segment(data_stream *stream, data_cache *cache, const data_segment *segment) {
  pthread_mutex_lock(&stream->lock);
  ++stream->popped;
  if (segment->slot >= 0 && data_cache_unpin_priv(cache, segment->slot, segment->rows)) ++stream->freed;
  if (stream->freed >= DATA_SLOTS_AT_ONCE || stream->pushed - stream->popped == DATA_SEGMENTS / 2)
    tell_reader(stream);
  pthread_mutex_unlock(&stream->lock);
}

/* Where a value lies. */
typedef struct suspect {
  const data_plan *plan;
  const data_part *part;
  int32_t m;
  int64_t row, feature; /* row of the part */
} suspect;

static core_status report_suspect(const data_set *set, const suspect *s) {
  int64_t i = s->part->lo;
  while (s->part->offset[i - s->part->lo + 1] <= s->row) ++i;
  const data_column *column = data_set_column_priv(set, s->m, s->plan->column.shard[i]);
  FAIL(CORE_ERR_NON_FINITE, "%s: sample %llu holds NaN or infinity at row %lld, feature %lld", column->path,
       (unsigned long long)s->plan->column.id[i], (long long)(s->row - s->part->offset[i - s->part->lo]),
       (long long)s->feature);
}

/* A bad value in a band matters only when it lies in the segment. `rows`: those of the segment, of which the
 * part has `done` before. */
static core_status check_finite(const data_stream *stream, const data_load *load, const uint8_t *rows,
                                int64_t count, int64_t done, suspect *where) {
  if (load->bad < 0) return CORE_OK;
  const data_part *part = where->part;
  const int64_t value = data_first_non_finite_priv(part->dtype, rows, count * part->width);
  if (value < 0) return CORE_OK;
  where->row = done + value / part->width;
  where->feature = value % part->width;
  TRY(report_suspect(stream->set, where));
  return CORE_OK;
}

static core_status fill_latents(data_stream *stream, const data_plan *plan, int32_t m, data_part *part,
                                bool *going) {
  data_cache *cache = &stream->cache[m];
  suspect where = {.plan = plan, .part = part, .m = m};
  const int64_t row_bytes = part->width * (int64_t)core_dtype_size(part->dtype);
  const int64_t rows = part->offset[part->hi - part->lo];
  for (int64_t done = 0; done < rows && *going;) {
    const data_segment *segment = NULL;
    TRY(await_segment(stream, &segment, going));
    if (!*going) break;
    const data_load *load = load_of(stream, segment);
    uint8_t *to = (uint8_t *)part->latent + done * row_bytes;
    const uint8_t *from = segment->slot >= 0 ? load->rows + segment->first * row_bytes : to;
    TRY(check_finite(stream, load, from, segment->rows, done, &where));
    if (from != to) memcpy(to, from, (size_t)(segment->rows * row_bytes));
    done += segment->rows;
    release_segment(stream, cache, segment);
  }
  return CORE_OK;
}

/* Tokens of one kind of the samples [lo, hi) of a batch. */
static void copy_tokens(const data_stream *stream, const data_plan *plan, const data_text_part *part,
                        data_text_kind kind, int64_t *offset, int32_t *token) {
  const data_text *text = stream->set->text;
  offset[0] = 0;
  for (int64_t i = part->lo; i < part->hi; ++i) {
    const int64_t *from = text->offset[kind] + plan->column.sample[i], count = from[1] - from[0];
    int64_t *at = offset + (i - part->lo);
    memcpy(token + at[0], text->token[kind] + from[0], (size_t)count * sizeof *token);
    at[1] = at[0] + count;
  }
}

static void fill_text(const data_stream *stream, const data_plan *plan, int32_t micro, data_text_part *part) {
  const data_range *range = &stream->options.text[micro];
  part->lo = range->lo < plan->samples ? range->lo : plan->samples;
  part->hi = range->hi < plan->samples ? range->hi : plan->samples;
  copy_tokens(stream, plan, part, DATA_TEXT_PROMPT, part->prompt_offset, part->prompt);
  copy_tokens(stream, plan, part, DATA_TEXT_TARGET, part->target_offset, part->target);
}

static core_status fill_batch(data_stream *stream, const data_plan *plan, data_batch *batch, bool *going) {
  const int32_t modalities = stream->set->modalities;
  fill_columns(stream, plan, batch);
  for (int32_t micro = 0; batch->text != NULL && micro < stream->options.micro_batches; ++micro)
    fill_text(stream, plan, micro, &batch->text[micro]);
  for (int32_t micro = 0; micro < stream->options.micro_batches; ++micro)
    for (int32_t m = 0; m < modalities && *going; ++m) {
      const int32_t at = micro * modalities + m;
      fill_offsets(plan, m, &stream->range[at], &batch->part[at]);
      TRY(fill_latents(stream, plan, m, &batch->part[at], going));
    }
  return CORE_OK;
}

/* ---- the thread ---- */

/* Waits for a plan and the batch that it fills. False: closing, or no more plans (then the stream has ended).
 */
static bool next_plan(data_stream *stream, int32_t *batch) {
  bool going = true;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    const bool planned = stream->assembled < stream->planned;
    /* A reader that broke before its next plan says so by `broken` alone. */
    const bool over = !planned && (stream->plans_ended || stream->broken);
    going = !stream->closing && !over;
    *batch = planned ? stream->plan[stream->assembled % stream->plans].batch : -1;
    if (!going || *batch >= 0 || (planned && stream->batches_free > 0)) break;
    wait_to_fill(stream);
  }
  if (going && *batch < 0) *batch = stream->batch_free[--stream->batches_free];
  if (!going && !stream->closing) {
    stream->failed = stream->broken;
    stream->ended = true;
    pthread_cond_broadcast(&stream->ready);
  }
  pthread_mutex_unlock(&stream->lock);
  return going;
}

static void publish_batch(data_stream *stream, int32_t batch) {
  pthread_mutex_lock(&stream->lock);
  ++stream->assembled;
  stream->batch_ready[stream->readied++ % stream->batches] = batch;
  tell_reader(stream);
  pthread_cond_signal(&stream->ready);
  pthread_mutex_unlock(&stream->lock);
}

static void end_with_error(data_stream *stream) {
  pthread_mutex_lock(&stream->lock);
  data_stream_break_priv(stream, 0); /* in the order of the batches this one is the first */
  stream->failed = stream->ended = true;
  pthread_cond_broadcast(&stream->ready);
  pthread_mutex_unlock(&stream->lock);
}

void *data_stream_assembler_priv(void *argument) {
  data_stream *stream = argument;
  bool going = true;
  int32_t batch = 0;
  while (going && next_plan(stream, &batch)) {
    const data_plan *plan =
        &stream->plan[stream->assembled % stream->plans]; /* only this thread changes it */
    if (fill_batch(stream, plan, &stream->batch[batch], &going) != CORE_OK) {
      end_with_error(stream);
      return NULL;
    }
    if (going) publish_batch(stream, batch);
  }
  return NULL;
}
