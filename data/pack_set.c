/* Outline: one modality of a set as a source of samples. Each thread streams its own stretch of the file
 * order, and reads keys and tokens, which a set does not keep, of the shards that it crosses. */
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "data/encode_impl.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

typedef struct set_source {
  data_source base;
  data_set *set;
} set_source;

/* What a thread has of the shard that its samples come from. */
typedef struct crossing {
  const data_set *set;
  int32_t shard; /* -1: none */
  data_extras extras;
  float *row; /* [longest, width], where the type changes; NULL: it stays */
} crossing;

static core_status cross_into(crossing *c, int64_t sample) {
  const int32_t k = data_set_shard_of_priv(c->set, sample);
  if (c->shard == k) return CORE_OK;
  data_extras_release_priv(&c->extras);
  c->shard = -1;
  TRY(data_extras_read_priv(data_set_column_priv(c->set, 0, k), &c->extras));
  c->shard = k;
  return CORE_OK;
}

static void widen(core_dtype dtype, const void *rows, int64_t count, float *out) {
  const uint16_t *half = rows;
  for (int64_t i = 0; i < count; ++i)
    out[i] = dtype == CORE_FLOAT32   ? ((const float *)rows)[i]
             : dtype == CORE_FLOAT16 ? core_float_from_half(half[i])
                                     : core_float_from_bfloat(half[i]);
}

static core_status add_sample(crossing *c, const data_batch *batch, int64_t i, int64_t sample,
                              data_writer *writer) {
  const data_part *part = &batch->part[0];
  const int64_t row_bytes = part->width * (int64_t)core_dtype_size(part->dtype);
  TRY(cross_into(c, sample));
  const data_extras *e = &c->extras;
  const int64_t at = sample - c->set->sample_base[c->shard];
  data_sample out = {
      .id = batch->id[i], .rows = part->offset[i + 1] - part->offset[i], .label = batch->label[i]};
  const uint8_t *rows = (const uint8_t *)part->latent + part->offset[i] * row_bytes;
  if (c->row == NULL)
    out.stored = rows;
  else
    out.latent = c->row;
  if (c->row != NULL) widen(part->dtype, rows, out.rows * part->width, c->row);
  if (e->keyed) out.key = (const char *)e->key.bytes + e->key_at[at];
  if (e->prompted) {
    out.prompt = e->prompt + e->prompt_offset[at];
    out.prompt_count = e->prompt_offset[at + 1] - e->prompt_offset[at];
  }
  if (e->targeted) {
    out.target = e->target + e->target_offset[at];
    out.target_count = e->target_offset[at + 1] - e->target_offset[at];
  }
  TRY(data_writer_add(writer, &out));
  return CORE_OK;
}

static core_status add_batches(data_stream *stream, crossing *c, int64_t first, int64_t count,
                               data_writer *writer) {
  for (int64_t done = 0; done < count;) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    CHECK(batch != NULL, CORE_ERR_INTERNAL, "the set ends at sample %lld", (long long)(first + done));
    const int64_t some = count - done < batch->samples ? count - done : batch->samples;
    core_status status = CORE_OK;
    for (int64_t i = 0; status == CORE_OK && i < some; ++i)
      status = add_sample(c, batch, i, first + done + i, writer);
    data_stream_put(stream, batch);
    TRY(status);
    done += some;
  }
  return CORE_OK;
}

static core_status copy(const data_source *source, int64_t first, int64_t count, data_writer *writer) {
  data_set *set = ((const set_source *)source)->set;
  const int64_t samples = data_set_moment_batch_priv(set, 0);
  const data_range range = {0, samples};
  const data_stream_options options = {
      .start = {.consumed = first}, .batch = samples, .micro_batches = 1, .range = &range, .queue = 1};
  crossing c = {.set = set, .shard = -1};
  data_stream *stream = NULL;
  core_status status = CORE_OK;
  if (data_writer_dtype_priv(writer) != source->dtype)
    status = DATA_ALLOCATE(set->info[0].longest * source->width, "rows of a sample", &c.row);
  if (status == CORE_OK) status = data_stream_open(set, &options, &stream);
  if (status == CORE_OK) status = add_batches(stream, &c, first, count, writer);
  data_stream_close(stream);
  data_extras_release_priv(&c.extras);
  free(c.row);
  TRY(status);
  return CORE_OK;
}

static void close_source(data_source *source) {
  data_set_close(((set_source *)source)->set);
  free(source);
}

/* Every file of the set as it is now. */
static uint64_t set_identity(const data_set *set) {
  uint64_t hash = set->fingerprint;
  for (int32_t k = 0; k < set->shards; ++k) {
    const data_file_identity *i = &data_set_column_priv(set, 0, k)->identity;
    const int64_t facts[3] = {i->bytes, i->seconds, i->nanoseconds};
    hash = core_hash(facts, sizeof facts, hash);
  }
  return hash;
}

core_status data_source_set_priv(const data_pack_options *options, data_source **out) {
  set_source *source = NULL;
  TRY(DATA_ALLOCATE(1, "source", &source));
  const core_status status =
      data_set_open(options->from_set, options->from_split, &options->modality, 1, &source->set);
  if (status != CORE_OK) free(source);
  TRY(status);
  const data_modality_info *info = data_set_modality(source->set, 0);
  source->base = (data_source){.samples = source->set->samples,
                               .width = info->width,
                               .dtype = info->dtype,
                               .identity = set_identity(source->set),
                               .copy = copy,
                               .close = close_source};
  memcpy(source->base.encoder, info->encoder, sizeof source->base.encoder);
  *out = &source->base;
  return CORE_OK;
}
