/* Outline: what the caches hold; all memory of a stream, carved by one function that runs dry and then for
 * real; what is zero or listed as free before the first thread starts. */
#include <string.h>

#include "core/log.h"
#include "data/index_impl.h"
#include "data/stream_impl.h"

/* ---- caches ---- */

/* Decoded bytes that the ranges ask of modality m in a batch of average samples. */
static double wanted_bytes(const data_stream *stream, int32_t m) {
  const data_set *set = stream->set;
  const data_modality_info *info = &set->info[m];
  int64_t samples = 0;
  for (int32_t micro = 0; micro < stream->options.micro_batches; ++micro) {
    const data_range *range = &stream->range[micro * set->modalities + m];
    samples += range->hi - range->lo;
  }
  return (double)samples * (double)info->tokens / (double)set->samples *
         (double)(info->width * (int64_t)core_dtype_size(info->dtype));
}

static void measure_bands(data_stream *stream, int32_t m) {
  data_cache *cache = &stream->cache[m];
  for (int32_t k = 0; k < stream->set->shards; ++k) {
    const data_column *column = data_set_column_priv(stream->set, m, k);
    const int64_t band = data_column_band_bytes_priv(column), tile = data_column_tile_bytes_priv(column);
    if (column->bands == 0) continue;
    cache->bands = column->first_band + column->bands;
    if (band > cache->band_bytes) cache->band_bytes = band;
    if (tile > stream->tile_bytes) stream->tile_bytes = tile;
    if (column->tiles > 1 && tile > stream->side_bytes) stream->side_bytes = tile;
  }
}

/* Slots for `share` bytes: enough to keep the workers busy, never more than there are bands. In file order
 * hardly more than the bands across borders go through the cache. */
static int32_t slots_for(const data_stream *stream, const data_cache *cache, double share) {
  const int64_t least = stream->options.threads + 2, most = 4 * (int64_t)stream->options.threads + 16;
  int64_t slots = (int64_t)(share / (double)cache->band_bytes);
  if (slots < least) slots = least;
  if (stream->direct && slots > most) slots = most;
  if (slots > cache->bands) slots = cache->bands;
  return (int32_t)(slots < INT32_MAX ? slots : INT32_MAX);
}

/* Whether a band will be wanted again: not in one pass in file order. */
static bool keeps_bands(const data_stream *stream) {
  return !stream->direct || stream->options.repeat;
}

/* Shares the cache in proportion to what is asked; what a modality that fits whole leaves over goes to the
 * others. */
static void size_caches(data_stream *stream) {
  const int32_t modalities = stream->set->modalities;
  double wanted[CORE_MAX_MODALITIES] = {0}, left = (double)stream->options.cache_bytes, sum = 0;
  for (int32_t m = 0; m < modalities; ++m) {
    const double bytes = wanted_bytes(stream, m);
    if (bytes > 0) measure_bands(stream, m);
    if (stream->cache[m].bands > 0) sum += wanted[m] = bytes;
  }
  for (int32_t round = 0; round < modalities; ++round)
    for (int32_t m = 0; m < modalities; ++m) {
      data_cache *cache = &stream->cache[m];
      const double all = (double)cache->bands * (double)cache->band_bytes;
      if (!keeps_bands(stream) || wanted[m] <= 0 || cache->slots == cache->bands ||
          all > left * wanted[m] / sum)
        continue;
      cache->slots = (int32_t)cache->bands;
      cache->whole = true;
      left -= all;
      sum -= wanted[m];
    }
  for (int32_t m = 0; m < modalities; ++m)
    if (wanted[m] > 0 && stream->cache[m].slots == 0)
      stream->cache[m].slots = slots_for(stream, &stream->cache[m], left * wanted[m] / sum);
}

/* A shuffle buffer that does not fit is not wrong, but bands are then decoded again and again. */
static void warn_small_cache(const data_stream *stream) {
  const data_set *set = stream->set;
  for (int32_t m = 0; m < set->modalities; ++m) {
    const data_cache *cache = &stream->cache[m];
    const data_modality_info *info = &set->info[m];
    const double buffer = (double)stream->options.order.shuffle_samples * (double)info->tokens /
                          (double)set->samples *
                          (double)(info->width * (int64_t)core_dtype_size(info->dtype));
    const double held = (double)cache->slots * (double)cache->band_bytes;
    if (cache->slots > 0 && cache->slots < cache->bands && buffer > held)
      LOG_WARNING(
          "modality %s: the shuffle buffer of %lld samples has %.1f MiB, the cache for it %.1f MiB; chunks "
          "will be "
          "decompressed several times",
          info->name, (long long)stream->options.order.shuffle_samples, buffer / 1048576, held / 1048576);
  }
}

/* ---- memory ---- */

static core_status take_text(data_stream *stream, const data_range *range, data_text_part *text) {
  const int64_t asked = range->hi - range->lo;
  data_text_part part = {0};
  TRY(ARENA_TAKE(stream->arena, asked + 1, &part.prompt_offset));
  TRY(ARENA_TAKE(stream->arena, asked + 1, &part.target_offset));
  TRY(ARENA_TAKE(stream->arena, data_set_most_text(stream->set, DATA_TEXT_PROMPT, asked), &part.prompt));
  TRY(ARENA_TAKE(stream->arena, data_set_most_text(stream->set, DATA_TEXT_TARGET, asked), &part.target));
  if (!core_arena_is_dry(stream->arena)) *text = part;
  return CORE_OK;
}

static core_status take_texts(data_stream *stream, data_batch *batch) {
  const bool dry = core_arena_is_dry(stream->arena);
  if (stream->options.text == NULL) return CORE_OK;
  TRY(ARENA_TAKE(stream->arena, stream->options.micro_batches, &batch->text));
  for (int32_t micro = 0; micro < stream->options.micro_batches; ++micro)
    TRY(take_text(stream, &stream->options.text[micro], dry ? NULL : &batch->text[micro]));
  return CORE_OK;
}

static core_status take_batch(data_stream *stream, data_batch *batch) {
  const data_set *set = stream->set;
  const int64_t samples = stream->options.batch,
                parts = (int64_t)stream->options.micro_batches * set->modalities;
  const bool dry = core_arena_is_dry(stream->arena);
  data_batch fresh = {.micro_batches = stream->options.micro_batches, .modalities = set->modalities};
  TRY(ARENA_TAKE(stream->arena, samples, &fresh.id));
  TRY(ARENA_TAKE(stream->arena, samples, &fresh.label));
  TRY(ARENA_TAKE(stream->arena, samples * set->modalities, &fresh.present));
  TRY(ARENA_TAKE(stream->arena, parts, &fresh.part));
  for (int64_t p = 0; p < parts; ++p) {
    const int32_t m = (int32_t)(p % set->modalities);
    const int64_t asked = stream->range[p].hi - stream->range[p].lo;
    const data_modality_info *info = &set->info[m];
    data_part part = {.dtype = info->dtype, .width = info->width};
    TRY(ARENA_TAKE(stream->arena, asked + 1, &part.offset));
    TRY(core_arena_take(stream->latents, data_set_most_rows(set, m, asked) * info->width,
                        core_dtype_size(info->dtype), &part.latent));
    if (!dry) fresh.part[p] = part;
  }
  TRY(take_texts(stream, &fresh));
  if (!dry) *batch = fresh;
  return CORE_OK;
}

static core_status take_samples(data_stream *stream, int64_t count, data_samples *samples) {
  TRY(ARENA_TAKE(stream->arena, count, &samples->id));
  TRY(ARENA_TAKE(stream->arena, count, &samples->label));
  TRY(ARENA_TAKE(stream->arena, count, &samples->shard));
  if (stream->options.text != NULL) TRY(ARENA_TAKE(stream->arena, count, &samples->sample));
  for (int32_t m = 0; m < stream->set->modalities; ++m) {
    TRY(ARENA_TAKE(stream->arena, count, &samples->first[m]));
    TRY(ARENA_TAKE(stream->arena, count, &samples->rows[m]));
  }
  return CORE_OK;
}

/* For homogeneous batches: the order of an epoch, and what computing it takes. */
static core_status take_groups(data_stream *stream) {
  const data_set *set = stream->set;
  data_window *window = &stream->window;
  if (!stream->options.grouped) return CORE_OK;
  const data_groups *groups = set->groups;
  TRY(ARENA_TAKE(stream->arena, data_groups_most_priv(set), &window->sample));
  TRY(ARENA_TAKE(stream->arena, set->samples, &window->groups.order));
  TRY(ARENA_TAKE(stream->arena, groups->kinds * groups->batch, &window->groups.pending));
  TRY(ARENA_TAKE(stream->arena, groups->kinds, &window->groups.held));
  TRY(ARENA_TAKE(stream->arena, data_groups_most_batches_priv(set), &window->groups.pick));
  window->groups.shard = window->shard;
  window->groups.start = window->begin;
  TRY(take_samples(stream, DATA_SPAN, &window->span));
  return CORE_OK;
}

static core_status take_window(data_stream *stream) {
  data_window *window = &stream->window;
  const data_set *set = stream->set;
  const int64_t shuffle = stream->options.order.shuffle_samples;
  window->capacity = shuffle > 0 ? shuffle : DATA_PLAIN_WINDOW;
  const int64_t most = stream->options.grouped ? data_groups_most_priv(set) : set->samples;
  const int64_t held = window->capacity < most ? window->capacity : most;
  TRY(ARENA_TAKE(stream->arena, set->shards, &window->shard));
  TRY(ARENA_TAKE(stream->arena, (int64_t)set->shards + 1, &window->begin));
  TRY(ARENA_TAKE(stream->arena, held, &window->pick));
  TRY(ARENA_TAKE(stream->arena, data_set_scratch_priv(set), &window->scratch));
  TRY(take_samples(stream, held, &window->column));
  TRY(take_groups(stream));
  return CORE_OK;
}

/* For comparing shards with the index. */
static core_status take_verification(data_stream *stream) {
  const data_set *set = stream->set;
  const int64_t columns = (int64_t)set->modalities * set->shards;
  if (set->index == NULL) return CORE_OK;
  TRY(ARENA_TAKE(stream->arena, columns, &stream->verified));
  TRY(ARENA_TAKE(stream->arena, data_index_most_samples_priv(set) + 1, &stream->verify_scratch));
  if (!core_arena_is_dry(stream->arena)) memset(stream->verified, 0, (size_t)columns);
  return CORE_OK;
}

static core_status take_batches(data_stream *stream) {
  const bool dry = core_arena_is_dry(stream->arena);
  TRY(ARENA_TAKE(stream->arena, stream->batches, &stream->batch));
  TRY(ARENA_TAKE(stream->arena, stream->batches, &stream->batch_free));
  TRY(ARENA_TAKE(stream->arena, stream->batches, &stream->batch_ready));
  for (int32_t b = 0; b < stream->batches; ++b) TRY(take_batch(stream, dry ? NULL : &stream->batch[b]));
  TRY(ARENA_TAKE(stream->arena, stream->plans, &stream->plan));
  for (int32_t p = 0; p < stream->plans; ++p) {
    data_plan plan = {.batch = -1};
    TRY(take_samples(stream, stream->options.batch, &plan.column));
    if (!dry) stream->plan[p] = plan;
  }
  return CORE_OK;
}

static core_status take_cache(data_stream *stream, data_cache *cache) {
  uint8_t *rows = NULL;
  if (cache->slots == 0) return CORE_OK;
  TRY(ARENA_TAKE(stream->arena, cache->slots, &cache->slot));
  TRY(ARENA_TAKE(stream->arena, cache->bands, &cache->slot_of));
  TRY(core_arena_take(stream->arena, cache->slots, (size_t)cache->band_bytes, (void **)&rows));
  if (!core_arena_is_dry(stream->arena)) data_cache_reset_priv(cache, rows);
  return CORE_OK;
}

static core_status take_threads(data_stream *stream) {
  const int64_t stored = data_stored_most_priv(stream->tile_bytes);
  TRY(ARENA_TAKE(stream->arena, DATA_JOBS, &stream->job));
  TRY(ARENA_TAKE(stream->arena, stream->options.threads, &stream->thread));
  TRY(ARENA_TAKE(stream->arena, stream->options.threads, &stream->worker));
  for (int32_t w = 0; w < stream->options.threads; ++w) {
    data_worker worker = {.stream = stream};
    TRY(ARENA_TAKE(stream->arena, stored, &worker.stored));
    TRY(ARENA_TAKE(stream->arena, stream->side_bytes, &worker.tile));
    if (!core_arena_is_dry(stream->arena)) stream->worker[w] = worker;
  }
  return CORE_OK;
}

static core_status take_all(data_stream *stream) {
  const data_set *set = stream->set;
  TRY(ARENA_TAKE(stream->arena, DATA_SEGMENTS, &stream->segment));
  TRY(take_window(stream));
  TRY(take_verification(stream));
  TRY(take_batches(stream));
  for (int32_t m = 0; m < set->modalities; ++m) TRY(take_cache(stream, &stream->cache[m]));
  TRY(take_threads(stream));
  return CORE_OK;
}

static void fill_free_lists(data_stream *stream) {
  for (int32_t i = 0; i < stream->batches; ++i) stream->batch_free[i] = i;
  stream->batches_free = stream->batches;
}

core_status data_stream_plan_priv(data_stream *stream) {
  size_caches(stream);
  warn_small_cache(stream);
  stream->batches = stream->options.queue + 1; /* one is with the caller */
  stream->plans = stream->options.queue + DATA_PLANS_AHEAD;
  TRY(core_arena_create("data stream", NULL, &stream->arena));
  TRY(core_arena_create_staging("latents of batches", stream->options.device, &stream->latents));
  TRY(take_all(stream));
  TRY(core_arena_commit(stream->arena));
  TRY(core_arena_commit(stream->latents));
  TRY(take_all(stream));
  core_arena_seal(stream->arena);
  core_arena_seal(stream->latents);
  fill_free_lists(stream);
  stream->bytes = (int64_t)(core_arena_peak(stream->arena) + core_arena_peak(stream->latents));
  for (int32_t w = 0; w < stream->options.threads; ++w) {
    TRY(data_decoder_create_priv(stream->tile_bytes,
                                 stream->side_bytes > 0 ? DATA_DECODED_FOR_NOW : DATA_DECODED_FOR_LATER,
                                 &stream->worker[w].decoder));
    stream->bytes += data_decoder_bytes_priv(stream->worker[w].decoder);
  }
  return CORE_OK;
}
