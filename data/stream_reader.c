/* Outline: the reader thread. For batch after batch: plan its samples, walk what this rank wants of it in the
 * order in which the assembler will take it, merge neighbouring rows into segments, say where each will lie,
 * queue what is not there yet. */
#include <string.h>

#include "data/stream_impl.h"

/* Rows of one band of one column that follow one another, and where in its part they begin. */
typedef struct piece {
  const data_column *column;
  int32_t m;
  int64_t band, first, rows; /* band within the column, rows from its start; rows = 0: nothing */
  uint8_t *target;           /* in the batch, when that is known; NULL: not */
} piece;

/* ---- queueing ---- */

void data_stream_wake_workers_priv(data_stream *stream) {
  int64_t waking = stream->queued - stream->taken;
  if (waking > stream->idle) waking = stream->idle;
  for (int64_t i = 0; i < waking; ++i) pthread_cond_signal(&stream->work);
  stream->unsaid = 0;
}

/* Sleeps until somebody makes room. Under the lock. */
static void wait_for_room(data_stream *stream) {
  data_stream_wake_workers_priv(stream);
  pthread_cond_wait(&stream->room, &stream->lock);
}

static bool push_job(data_stream *stream, const data_job *job) {
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken && stream->queued - stream->taken == DATA_JOBS)
    wait_for_room(stream);
  const bool going = !stream->closing && !stream->broken;
  if (going) {
    stream->job[stream->queued++ % DATA_JOBS] = *job;
    if (++stream->unsaid >= DATA_JOBS_AT_ONCE) data_stream_wake_workers_priv(stream);
  }
  pthread_mutex_unlock(&stream->lock);
  return going;
}

/* Queues the chunks of a load that begins at row `first` of its band. False: stop. */
static bool queue_load(data_stream *stream, const piece *what, int64_t first, data_load *load) {
  const data_column *column = what->column;
  const int64_t jobs = load->jobs_left; /* of which none is queued yet */
  for (int64_t t = 0; t < jobs; ++t) {
    data_job job = {.column = column, .load = load, .first = first, .tile = {.band = what->band, .tile = t}};
    const core_status status =
        data_stream_find_priv(stream, column, what->m, &job.tile, load->rows, &job.handle);
    if (status == CORE_OK && push_job(stream, &job)) continue;
    pthread_mutex_lock(&stream->lock);
    if (status != CORE_OK) data_stream_break_priv(stream, load->sequence);
    load->state = DATA_LOAD_FAILED; /* it must not look as if it were being loaded */
    pthread_cond_signal(&stream->filled);
    pthread_mutex_unlock(&stream->lock);
    return false;
  }
  return true;
}

/* ---- segments ---- */

/* Compact datasets cannot be read by a worker: their band goes to a slot, whole. */
static bool goes_direct(const data_stream *stream, const piece *what) {
  const data_column *column = what->column;
  if (what->target == NULL || column->tiles > 1 || stream->cache[what->m].whole) return false;
  if (data_column_is_plain_priv(column)) return column->chunked || column->rows * column->width > 65536;
  return what->first == 0 && what->rows == column->band_rows;
}

static void start_load(data_stream *stream, const piece *what, uint8_t *rows, int64_t count,
                       data_load *load) {
  *load = (data_load){.rows = rows, .count = count, .state = DATA_LOAD_UNDER_WAY, .bad = -1};
  load->jobs_left = data_column_is_plain_priv(what->column) ? 1 : (int32_t)what->column->tiles;
  load->sequence = ++stream->sequence;
}

/* Under the lock. The place of the next segment, when there is room for it and its rows have a place. fresh:
 * its load, if it has still to be queued. */
static bool place_segment(data_stream *stream, const piece *what, data_load **fresh) {
  data_cache *cache = &stream->cache[what->m];
  data_segment *segment = &stream->segment[stream->pushed % DATA_SEGMENTS];
  bool is_fresh = true;
  if (stream->pushed - stream->popped == DATA_SEGMENTS) return false;
  *segment = (data_segment){-1, (int32_t)what->first, (int32_t)what->rows, what->m, {0}};
  if (goes_direct(stream, what)) {
    start_load(stream, what, what->target, what->rows, &segment->load);
    *fresh = &segment->load;
  } else {
    segment->slot = data_cache_pin_priv(cache, what->column->first_band + what->band, &is_fresh);
    if (segment->slot < 0) return false;
    data_load *load = &cache->slot[segment->slot].load;
    if (is_fresh)
      start_load(stream, what, load->rows, data_column_band_count_priv(what->column, what->band), load);
    *fresh = is_fresh ? load : NULL;
  }
  ++stream->pushed;
  if (stream->awaited == NULL) pthread_cond_signal(&stream->filled);
  return true;
}

/* Publishes a piece as a segment and queues its load when it is not under way. False: stop. */
static bool emit(data_stream *stream, piece *next) {
  if (next->rows == 0) return true;
  data_load *fresh = NULL;
  bool placed = false;
  pthread_mutex_lock(&stream->lock);
  while (!stream->closing && !stream->broken) {
    placed = place_segment(stream, next, &fresh);
    if (placed) break;
    wait_for_room(stream);
  }
  pthread_mutex_unlock(&stream->lock);
  const int64_t first = fresh != NULL && fresh->rows == next->target ? next->first : 0;
  const bool going = placed && (fresh == NULL || queue_load(stream, next, first, fresh));
  next->rows = 0;
  return going;
}

/* Adds rows [first, end) of a sample, joining them to the piece before where they touch. */
static bool add_rows(data_stream *stream, piece *next, const data_column *column, int32_t m, int64_t first,
                     int64_t end, uint8_t **target) {
  while (first < end) {
    const int64_t band = first / column->band_rows, start = first - band * column->band_rows;
    const int64_t left = column->band_rows - start, rows = end - first < left ? end - first : left;
    if (next->rows > 0 && next->column == column && next->band == band && next->first + next->rows == start) {
      next->rows += rows;
    } else {
      if (!emit(stream, next)) return false;
      *next = (piece){column, m, band, start, rows, *target};
    }
    if (*target != NULL) *target += rows * data_column_row_bytes_priv(column);
    first += rows;
  }
  return true;
}

/* A segment never reaches over the end of a part: the assembler counts on it. */
static bool walk_part(data_stream *stream, const data_plan *plan, int32_t at) {
  const data_set *set = stream->set;
  const int32_t m = at % set->modalities;
  const data_range *range = &stream->range[at];
  uint8_t *target = plan->batch >= 0 ? stream->batch[plan->batch].part[at].latent : NULL;
  piece next = {0};
  for (int64_t i = range->lo; i < range->hi && i < plan->samples; ++i) {
    const int64_t first = plan->column.first[m][i];
    if (!add_rows(stream, &next, data_set_column_priv(set, m, plan->column.shard[i]), m, first,
                  first + plan->column.rows[m][i], &target))
      return false;
  }
  return emit(stream, &next);
}

/* ---- plans ---- */

/* Fills the next plan; samples = 0 at the end of a stream that does not repeat. */
static core_status fill_plan(data_stream *stream, data_plan *plan) {
  data_position *at = &stream->position;
  plan->samples = plan->skipped = 0;
  while (plan->samples < stream->options.batch) {
    const int64_t samples = data_stream_epoch_priv(stream, at->epoch);
    if (at->consumed == samples) {
      if (!stream->options.repeat) break;
      ++at->epoch;
      at->consumed = 0;
      continue; /* rare samples may fill no batch of an epoch */
    }
    if (plan->samples == 0) plan->before = *at;
    const int64_t left = samples - at->consumed, wanted = stream->options.batch - plan->samples;
    const int64_t count = left < wanted ? left : wanted;
    TRY(data_window_read_priv(stream, at, count, plan, plan->samples));
    plan->samples += count;
    at->consumed += count;
  }
  plan->after = *at;
  return CORE_OK;
}

/* The memory of a batch is planned from the lengths that the whole set has; an index says these in one place
 * and each sample's in another, and only hashes of its own vouch for either. */
static core_status check_plan(const data_stream *stream, const data_plan *plan) {
  const data_set *set = stream->set;
  const int32_t parts = stream->options.micro_batches * set->modalities;
  for (int32_t at = 0; at < parts; ++at) {
    const int32_t m = at % set->modalities;
    const data_range *range = &stream->range[at];
    const int64_t most = data_set_most_rows(set, m, range->hi - range->lo);
    int64_t rows = 0;
    for (int64_t i = range->lo; i < range->hi && i < plan->samples; ++i) rows += plan->column.rows[m][i];
    CHECK(rows <= most, CORE_ERR_CORRUPT,
          "modality %s: %lld samples of the set have %lld rows, expected at most %lld; run `antiphon index` "
          "again",
          set->info[m].name, (long long)(range->hi - range->lo), (long long)rows, (long long)most);
  }
  return CORE_OK;
}

/* In file order the reader takes the batch that a plan will fill, the assembler otherwise. */
static bool wait_for_plan(data_stream *stream, data_plan **plan) {
  pthread_mutex_lock(&stream->lock);
  while (
      !stream->closing && !stream->broken &&
      (stream->planned - stream->assembled == stream->plans || (stream->direct && stream->batches_free == 0)))
    wait_for_room(stream);
  const bool going = !stream->closing && !stream->broken;
  *plan = &stream->plan[stream->planned % stream->plans];
  (*plan)->end = INT64_MAX;
  (*plan)->batch = going && stream->direct ? stream->batch_free[--stream->batches_free] : -1;
  pthread_mutex_unlock(&stream->lock);
  return going;
}

static void publish_plan(data_stream *stream, bool more) {
  pthread_mutex_lock(&stream->lock);
  if (more)
    ++stream->planned;
  else
    stream->plans_ended = true;
  if (stream->awaited == NULL) pthread_cond_signal(&stream->filled);
  pthread_mutex_unlock(&stream->lock);
}

static bool walk_plan(data_stream *stream, data_plan *plan) {
  const int32_t parts = stream->options.micro_batches * stream->set->modalities;
  for (int32_t at = 0; at < parts; ++at)
    if (!walk_part(stream, plan, at)) return false;
  pthread_mutex_lock(&stream->lock);
  plan->end = stream->pushed;
  pthread_mutex_unlock(&stream->lock);
  return true;
}

/* False: no plan after this one. */
static bool make_plan(data_stream *stream, data_plan *plan) {
  core_status status = fill_plan(stream, plan);
  if (status == CORE_OK) status = check_plan(stream, plan);
  if (status != CORE_OK) {
    pthread_mutex_lock(&stream->lock);
    data_stream_break_priv(stream, ++stream->sequence);
    pthread_mutex_unlock(&stream->lock);
    return false;
  }
  publish_plan(stream, plan->samples > 0);
  return plan->samples > 0 && walk_plan(stream, plan);
}

void *data_stream_reader_priv(void *argument) {
  data_stream *stream = argument;
  data_plan *plan = NULL;
  while (wait_for_plan(stream, &plan))
    if (!make_plan(stream, plan)) break;
  pthread_mutex_lock(&stream->lock);
  data_stream_wake_workers_priv(stream);
  pthread_mutex_unlock(&stream->lock);
  return NULL;
}
