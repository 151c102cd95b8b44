/* Outline: signatures and lengths of all samples, measured once; the order of an epoch of homogeneous
 * batches.
 *
 * The samples of one signature, epoch after epoch in the shuffled order, are a stream; every B of them in
 * turn are a batch. So what an epoch leaves over begins the next one's, and with c samples of the signature
 * epoch e begins with e c mod B of them: nothing needs to be remembered. */
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/random.h"
#include "data/groups_impl.h"
#include "data/index_impl.h"
#include "data/memory_impl.h"
#include "data/order_impl.h"

/* ---- measuring ---- */

enum { SPAN = 1024, SIGNATURES = 1 << CORE_MAX_MODALITIES };

static int64_t text_of(const data_set *set, int64_t sample) {
  int64_t tokens = 0;
  for (int kind = 0; set->text != NULL && kind < 2; ++kind)
    tokens += set->text->offset[kind][sample + 1] - set->text->offset[kind][sample];
  return tokens;
}

/* Samples [first, first + count) of the set, whose columns lie in `column`. signature: of each, into kind. */
static void measure(const data_set *set, const data_group_options *options, const data_samples *column,
                    int64_t first, int64_t count) {
  const bool skip = options->non_finite == DATA_NON_FINITE_SKIP && set->index != NULL;
  data_groups *groups = set->groups;
  for (int64_t i = 0; i < count; ++i) {
    int64_t length = text_of(set, first + i);
    uint32_t signature = 0;
    for (int32_t m = 0; m < set->modalities; ++m) {
      const bool bad = skip && data_index_bad_count_priv(set->index, m) > 0 &&
                       data_index_is_bad_priv(set->index, m, first + i);
      const int32_t rows = bad ? 0 : column->rows[m][i];
      length += rows > 0 && options->rows[m] > 0 ? options->rows[m] : rows;
      if (rows > 0) signature |= 1u << m;
    }
    groups->kind[first + i] = (uint16_t)signature;
    groups->length[first + i] = (int32_t)(length < INT32_MAX ? length : INT32_MAX);
  }
}

/* Columns of a span, in one block of memory. */
static core_status take_span(const data_set *set, data_samples *column, uint8_t **memory) {
  const int64_t each = 8 + 4 + 4 + set->modalities * (int64_t)(8 + 4);
  TRY(DATA_ALLOCATE(each * SPAN + data_set_scratch_priv(set), "lengths of samples", memory));
  uint8_t *at = *memory + data_set_scratch_priv(set);
  memset(column, 0, sizeof *column);
  column->id = (uint64_t *)(void *)at;
  at += SPAN * 8;
  for (int32_t m = 0; m < set->modalities; ++m, at += SPAN * 8) column->first[m] = (int64_t *)(void *)at;
  column->label = (int32_t *)(void *)at;
  at += SPAN * 4;
  column->shard = (int32_t *)(void *)at;
  at += SPAN * 4;
  for (int32_t m = 0; m < set->modalities; ++m, at += SPAN * 4) column->rows[m] = (int32_t *)(void *)at;
  return CORE_OK;
}

static core_status measure_all(const data_set *set, const data_group_options *options) {
  data_samples column;
  uint8_t *memory = NULL;
  core_status status = take_span(set, &column, &memory);
  for (int32_t k = 0; k < set->shards && status == CORE_OK; ++k) {
    const int64_t base = set->sample_base[k], all = set->sample_base[k + 1] - base;
    for (int64_t first = 0; first < all && status == CORE_OK; first += SPAN) {
      const int64_t count = all - first < SPAN ? all - first : SPAN;
      status = data_set_read_samples_priv(set, k, first, count, memory, &column, 0);
      if (status == CORE_OK) measure(set, options, &column, base + first, count);
    }
  }
  free(memory);
  TRY(status);
  return CORE_OK;
}

/* Signatures become numbers in the order of their bits. */
static core_status number_kinds(data_set *set) {
  data_groups *groups = set->groups;
  int64_t *count = NULL;
  TRY(DATA_ALLOCATE(SIGNATURES, "signatures", &count));
  for (int64_t i = 0; i < set->samples; ++i) ++count[groups->kind[i]];
  for (int32_t s = 0; s < SIGNATURES; ++s) groups->kinds += count[s] > 0;
  const core_status status = DATA_ALLOCATE(groups->kinds, "signatures", &groups->samples);
  int32_t next = 0;
  for (int32_t s = 0; s < SIGNATURES && status == CORE_OK; ++s) {
    if (count[s] == 0) continue;
    groups->samples[next] = count[s];
    count[s] = next++;
  }
  for (int64_t i = 0; i < set->samples && status == CORE_OK; ++i)
    groups->kind[i] = (uint16_t)count[groups->kind[i]];
  free(count);
  TRY(status);
  return CORE_OK;
}

/* What is too rare for a batch is carried long or dropped always. */
static core_status check_counts(const data_set *set) {
  const data_groups *groups = set->groups;
  int64_t rare = 0, whole = 0;
  for (int32_t s = 0; s < groups->kinds; ++s)
    *(groups->samples[s] < groups->batch ? &rare : &whole) += groups->samples[s];
  CHECK(
      !groups->drop || whole > 0, CORE_ERR_ARGUMENT,
      "no %lld samples have the same modalities, so that there is no batch when incomplete ones are dropped",
      (long long)groups->batch);
  if (rare > 0)
    LOG_WARNING("%lld samples have modalities that fewer samples than a batch of %lld have: %s",
                (long long)rare, (long long)groups->batch,
                groups->drop ? "they are always dropped"
                             : "their batches come once in several epochs and hold a sample more than once");
  return CORE_OK;
}

static core_status group(data_set *set, const data_group_options *options) {
  data_groups *groups = set->groups;
  groups->batch = options->batch;
  groups->drop = options->incomplete == DATA_INCOMPLETE_DROP;
  TRY(DATA_ALLOCATE(set->samples, "signatures", &groups->kind));
  TRY(DATA_ALLOCATE(set->samples, "lengths", &groups->length));
  TRY(measure_all(set, options));
  TRY(number_kinds(set));
  TRY(check_counts(set));
  return CORE_OK;
}

core_status data_set_group(data_set *set, const data_group_options *options) {
  CHECK(set->groups == NULL && options->batch >= 1 && options->batch <= INT32_MAX, CORE_ERR_ARGUMENT,
        "homogeneous batches of %lld samples of a set that %s grouped", (long long)options->batch,
        set->groups != NULL ? "is already" : "is not");
  TRY(DATA_ALLOCATE(1, "groups", &set->groups));
  const core_status status = group(set, options);
  if (status != CORE_OK) {
    data_groups_free_priv(set->groups);
    set->groups = NULL;
  }
  TRY(status);
  return CORE_OK;
}

void data_groups_free_priv(data_groups *groups) {
  if (groups == NULL) return;
  free(groups->samples);
  free(groups->kind);
  free(groups->length);
  free(groups);
}

/* ---- sizes ---- */

/* Samples of a kind that epochs before this one left over. */
static int64_t left_over(const data_groups *groups, int32_t kind, int64_t epoch) {
  if (groups->drop) return 0;
  return (epoch % groups->batch) * (groups->samples[kind] % groups->batch) % groups->batch;
}

int64_t data_set_epoch_samples(const data_set *set, int64_t epoch) {
  const data_groups *groups = set->groups;
  int64_t batches = 0;
  if (groups == NULL) return set->samples;
  for (int32_t s = 0; s < groups->kinds; ++s)
    batches += (left_over(groups, s, epoch) + groups->samples[s]) / groups->batch;
  return batches * groups->batch;
}

int64_t data_groups_most_batches_priv(const data_set *set) {
  const data_groups *groups = set->groups;
  int64_t batches = 0;
  for (int32_t s = 0; s < groups->kinds; ++s)
    batches += (groups->batch - 1 + groups->samples[s]) / groups->batch;
  return batches;
}

int64_t data_groups_most_priv(const data_set *set) {
  return data_groups_most_batches_priv(set) * set->groups->batch;
}

int64_t data_groups_copies_priv(const data_groups *groups) {
  int64_t most = 1;
  for (int32_t s = 0; s < groups->kinds && !groups->drop; ++s) {
    /* so many epochs of its signature's stream does a batch touch */
    const int64_t epochs = 1 + (groups->batch - 1 + groups->samples[s] - 1) / groups->samples[s];
    if (epochs > most) most = epochs;
  }
  return most;
}

/* ---- the order of an epoch ---- */

/* Epochs before this one, backwards, until every kind has what was left over of it; they end up in order. */
static void recall(const data_set *set, const data_order_options *options, int64_t stage, int64_t epoch,
                   const data_groups_scratch *scratch) {
  const data_groups *groups = set->groups;
  int64_t missing = 0;
  for (int32_t s = 0; s < groups->kinds; ++s) missing += scratch->held[s] = left_over(groups, s, epoch);
  for (int64_t before = epoch - 1; before >= 0 && missing > 0; --before) {
    data_order_fill_priv(set, options, stage, before, scratch->shard, scratch->start, scratch->order);
    for (int64_t i = set->samples - 1; i >= 0 && missing > 0; --i) {
      const int64_t sample = scratch->order[i];
      const int32_t s = groups->kind[sample];
      if (scratch->held[s] == 0) continue;
      scratch->pending[s * groups->batch + --scratch->held[s]] = sample;
      --missing;
    }
  }
  for (int32_t s = 0; s < groups->kinds; ++s) scratch->held[s] = left_over(groups, s, epoch);
}

/* Insertion into a list sorted by falling length; equal ones keep their order. */
static void insert(const data_groups *groups, int64_t *list, int64_t count, int64_t sample) {
  int64_t lo = 0, hi = count; /* the first that is shorter */
  while (lo < hi) {
    const int64_t middle = lo + (hi - lo) / 2;
    if (groups->length[list[middle]] >= groups->length[sample])
      lo = middle + 1;
    else
      hi = middle;
  }
  memmove(list + lo + 1, list + lo, (size_t)(count - lo) * sizeof *list);
  list[lo] = sample;
}

static uint64_t reversed(uint64_t value, int bits) {
  uint64_t out = 0;
  for (int b = 0; b < bits; ++b) out |= (value >> b & 1) << (bits - 1 - b);
  return out;
}

/* The sorted samples are dealt out so that the ranks' equal shares of a batch, which are consecutive, are of
 * about equal length, however many ranks there are: neighbours in the sorted list go to places far apart. */
static void deal(const int64_t *sorted, int64_t count, int64_t *out) {
  int bits = 0;
  while ((int64_t)1 << bits < count) ++bits;
  int64_t next = 0;
  for (uint64_t i = 0; i < (uint64_t)1 << bits; ++i) {
    const int64_t place = (int64_t)reversed(i, bits);
    if (place < count) out[place] = sorted[next++];
  }
}

/* A sample joins its kind; a batch that is whole goes to `out`. Returns the samples written. */
static int64_t join(const data_groups *groups, const data_groups_scratch *scratch, int64_t sample,
                    int64_t *out) {
  const int32_t s = groups->kind[sample];
  int64_t *pending = scratch->pending + s * groups->batch;
  pending[scratch->held[s]++] = sample;
  if (scratch->held[s] < groups->batch) return 0;
  scratch->held[s] = 0;
  for (int64_t i = 1; i < groups->batch; ++i) insert(groups, pending, i, pending[i]);
  deal(pending, groups->batch, out);
  return groups->batch;
}

static void swap_batches(int64_t *out, int64_t batch, int64_t a, int64_t b) {
  for (int64_t i = 0; i < batch && a != b; ++i) {
    const int64_t kept = out[a * batch + i];
    out[a * batch + i] = out[b * batch + i];
    out[b * batch + i] = kept;
  }
}

/* Batches come in the order in which they were completed, which puts those of rare signatures late; within as
 * many as fill the shuffle buffer they are permuted, so that reading stays in its neighbourhood. */
static void shuffle_batches(const data_set *set, const data_order_options *options, uint64_t key,
                            int64_t batches, int64_t *pick, int64_t *out) {
  const int64_t batch = set->groups->batch;
  const int64_t run = options->shuffle_samples / batch > 1 ? options->shuffle_samples / batch : 1;
  for (int64_t at = 0, n = 0; at < batches && options->shuffle_samples > 0; at += run, ++n) {
    const int64_t count = batches - at < run ? batches - at : run;
    const uint64_t stream = core_random_stream(CORE_RANDOM_ORDER, key, UINT64_MAX - (uint64_t)n);
    core_random_permutation(options->seed, stream, count, pick);
    for (int64_t i = 0; i < count; ++i) { /* follow each batch through the swaps made so far */
      int64_t from = pick[i];
      while (from < i) from = pick[from];
      swap_batches(out + at * batch, batch, i, from);
    }
  }
}

void data_groups_order_priv(const data_set *set, const data_order_options *options, int64_t stage,
                            int64_t epoch, const data_groups_scratch *scratch, int64_t *out) {
  const data_groups *groups = set->groups;
  const uint64_t key = core_random_stream(CORE_RANDOM_ORDER, (uint64_t)stage, (uint64_t)epoch);
  int64_t written = 0;
  recall(set, options, stage, epoch, scratch);
  data_order_fill_priv(set, options, stage, epoch, scratch->shard, scratch->start, scratch->order);
  for (int64_t i = 0; i < set->samples; ++i)
    written += join(groups, scratch, scratch->order[i], out + written);
  shuffle_batches(set, options, key, written / groups->batch, scratch->pick, out);
}

static core_status allocate(const data_set *set, data_groups_scratch *out) {
  const data_groups *groups = set->groups;
  TRY(DATA_ALLOCATE(set->samples, "order", &out->order));
  TRY(DATA_ALLOCATE(set->shards, "order of shards", &out->shard));
  TRY(DATA_ALLOCATE((int64_t)set->shards + 1, "order of shards", &out->start));
  TRY(DATA_ALLOCATE(groups->kinds * groups->batch, "batches", &out->pending));
  TRY(DATA_ALLOCATE(groups->kinds, "batches", &out->held));
  TRY(DATA_ALLOCATE(data_groups_most_batches_priv(set), "batches", &out->pick));
  return CORE_OK;
}

core_status data_set_grouped_order(const data_set *set, const data_order_options *options, int64_t stage,
                                   int64_t epoch, int64_t *order) {
  data_groups_scratch scratch = {0};
  CHECK(set->groups != NULL && options->shuffle_samples >= 0 && epoch >= 0, CORE_ERR_ARGUMENT,
        "the order of epoch %lld, with a shuffle buffer of %lld samples, of a set that %s grouped",
        (long long)epoch, (long long)options->shuffle_samples, set->groups != NULL ? "is" : "is not");
  const core_status status = allocate(set, &scratch);
  if (status == CORE_OK) data_groups_order_priv(set, options, stage, epoch, &scratch, order);
  free(scratch.order);
  free(scratch.shard);
  free(scratch.start);
  free(scratch.pending);
  free(scratch.held);
  free(scratch.pick);
  TRY(status);
  return CORE_OK;
}
