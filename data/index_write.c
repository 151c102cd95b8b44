/* Outline: the set is opened from the headers of its shards, which checks it; with `check_values` every
 * latent is read; then blocks, table and footer go to a temporary file that takes the index's name when it is
 * on the disk. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/random.h"
#include "data/index_impl.h"
#include "data/memory_impl.h"

typedef struct index_writer {
  const data_index_options *options;
  int32_t modalities;
  data_set *set;                       /* all modalities */
  data_set *own[CORE_MAX_MODALITIES];  /* those with labels, alone: their own labels. NULL: none */
  data_bytes bad[CORE_MAX_MODALITIES]; /* int64 */
  data_bytes table, block;
  char *path, *temporary;
  int fd;
  int64_t at;
} index_writer;

/* ---- values that are not finite ---- */

static core_status note_bad(const data_batch *batch, int32_t m, int64_t first, data_bytes *bad) {
  const data_part *part = &batch->part[m];
  const int64_t row_bytes = part->width * (int64_t)core_dtype_size(part->dtype);
  for (int64_t i = part->lo; i < part->hi; ++i) {
    const int64_t begin = part->offset[i - part->lo], rows = part->offset[i - part->lo + 1] - begin;
    const uint8_t *values = (const uint8_t *)part->latent + begin * row_bytes;
    const int64_t sample = first + i;
    if (data_first_non_finite_priv(part->dtype, values, rows * part->width) >= 0)
      TRY(data_bytes_append_priv(bad, &sample, sizeof sample));
  }
  return CORE_OK;
}

static core_status scan_batches(index_writer *writer, data_stream *stream, int32_t m) {
  const data_index_options *o = writer->options;
  for (int64_t first = 0;;) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    if (batch == NULL) return CORE_OK;
    core_status status = note_bad(batch, m, first, &writer->bad[m]);
    first += batch->samples;
    data_stream_put(stream, batch);
    if (status == CORE_OK && o->tick != NULL) status = o->tick(o->context);
    TRY(status);
  }
}

static core_status scan_values(index_writer *writer, int32_t m) {
  data_range range[CORE_MAX_MODALITIES] = {0};
  data_stream *stream = NULL;
  const int64_t samples = data_set_moment_batch_priv(writer->set, m);
  range[m].hi = samples;
  const data_stream_options options = {.batch = samples,
                                       .micro_batches = 1,
                                       .range = range,
                                       .threads = writer->options->threads,
                                       .non_finite = DATA_NON_FINITE_DELIVER};
  TRY(data_stream_open(writer->set, &options, &stream));
  const core_status status = scan_batches(writer, stream, m);
  data_stream_close(stream);
  TRY(status);
  return CORE_OK;
}

/* ---- blocks ---- */

static core_status put(index_writer *writer, const void *bytes, int64_t count) {
  TRY(core_file_write(writer->fd, writer->temporary, bytes, (size_t)count));
  writer->at += count;
  return CORE_OK;
}

static core_status append_labels(index_writer *writer, int32_t m, int64_t first, int64_t count) {
  static const int32_t none = -1;
  static const uint8_t padding[8] = {0};
  if (writer->own[m] != NULL)
    TRY(data_bytes_append_priv(&writer->block, writer->own[m]->label + first, count * 4));
  else
    for (int64_t i = 0; i < count; ++i) TRY(data_bytes_append_priv(&writer->block, &none, 4));
  TRY(data_bytes_append_priv(&writer->block, padding, count % 2 * 4));
  return CORE_OK;
}

static core_status put_block(index_writer *writer, int32_t k, int64_t start, int64_t count) {
  const data_set *set = writer->set;
  const int64_t first = set->sample_base[k] + start;
  writer->block.count = 0;
  TRY(data_bytes_append_priv(&writer->block, set->id + first, count * 8));
  for (int32_t m = 0; m < set->modalities; ++m) {
    TRY(append_labels(writer, m, first, count));
    TRY(data_bytes_append_priv(&writer->block, data_set_column_priv(set, m, k)->offset + start,
                               (count + 1) * 8));
  }
  const uint64_t hash = core_hash(writer->block.bytes, (size_t)writer->block.count, (uint64_t)k);
  TRY(data_bytes_append_priv(&writer->block, &hash, sizeof hash));
  TRY(put(writer, writer->block.bytes, writer->block.count));
  return CORE_OK;
}

static core_status put_blocks(index_writer *writer, int32_t k) {
  const int64_t all = writer->set->sample_base[k + 1] - writer->set->sample_base[k];
  for (int64_t start = 0; start < all; start += DATA_INDEX_BLOCK)
    TRY(put_block(writer, k, start, all - start < DATA_INDEX_BLOCK ? all - start : DATA_INDEX_BLOCK));
  return CORE_OK;
}

/* ---- the table ---- */

#define APPEND(writer, value) data_bytes_append_priv(&(writer)->table, (value), (int64_t)sizeof *(value))

static core_status append_modality(index_writer *writer, int32_t m) {
  const data_set *set = writer->set;
  const data_modality_info *info = &set->info[m];
  data_index_modality record = {.dtype = (int64_t)info->dtype,
                                .width = info->width,
                                .tokens = info->tokens,
                                .longest = info->longest,
                                .absent = info->absent,
                                .labelled = writer->own[m] != NULL,
                                .runs = set->runs[m],
                                .bad = writer->bad[m].count / 8};
  memcpy(record.name, info->name, sizeof record.name);
  memcpy(record.encoder, info->encoder, sizeof record.encoder);
  TRY(APPEND(writer, &record));
  TRY(data_bytes_append_priv(&writer->table, set->run[m], set->runs[m] * (int64_t)sizeof *set->run[m]));
  TRY(data_bytes_append_priv(&writer->table, writer->bad[m].bytes, writer->bad[m].count));
  return CORE_OK;
}

static core_status append_column(index_writer *writer, const data_column *column) {
  const uint64_t hash = core_hash(column->offset, (size_t)(column->samples + 1) * sizeof *column->offset, 0);
  data_index_column record = {.bytes = column->identity.bytes,
                              .seconds = column->identity.seconds,
                              .nanoseconds = column->identity.nanoseconds,
                              .rows = column->rows,
                              .band_rows = column->band_rows,
                              .tile_width = column->tile_width,
                              .chunked = column->chunked,
                              .partial_unfiltered = column->partial_unfiltered,
                              .offset_hash = hash,
                              .filters = column->pipeline.count};
  memcpy(record.id, column->pipeline.id, sizeof record.id);
  memcpy(record.value, column->pipeline.value, sizeof record.value);
  TRY(APPEND(writer, &record));
  return CORE_OK;
}

static core_status append_head(index_writer *writer) {
  const data_set *set = writer->set;
  const data_index_head head = {set->modalities, set->shards, set->samples, DATA_INDEX_BLOCK,
                                writer->options->check_values};
  TRY(APPEND(writer, &head));
  for (int32_t m = 0; m < set->modalities; ++m) TRY(append_modality(writer, m));
  return CORE_OK;
}

static core_status put_shard(index_writer *writer, int32_t k) {
  const data_set *set = writer->set;
  const data_index_shard record = {set->sample_base[k + 1] - set->sample_base[k], writer->at,
                                   set->id_hash[k]};
  TRY(APPEND(writer, &record));
  for (int32_t m = 0; m < set->modalities; ++m) TRY(append_column(writer, data_set_column_priv(set, m, k)));
  TRY(put_blocks(writer, k));
  return CORE_OK;
}

static core_status put_table(index_writer *writer) {
  data_index_footer footer = {
      .version = DATA_INDEX_VERSION, .table_at = writer->at, .table_bytes = writer->table.count};
  memcpy(footer.magic, DATA_INDEX_MAGIC, sizeof footer.magic);
  const uint64_t seed = core_hash(&footer, offsetof(data_index_footer, hash), 0);
  footer.hash = core_hash(writer->table.bytes, (size_t)writer->table.count, seed);
  TRY(put(writer, writer->table.bytes, writer->table.count));
  TRY(put(writer, &footer, sizeof footer));
  return CORE_OK;
}

static core_status put_all(index_writer *writer) {
  TRY(append_head(writer));
  for (int32_t k = 0; k < writer->set->shards; ++k) TRY(put_shard(writer, k));
  TRY(put_table(writer));
  TRY(core_file_sync(writer->fd, writer->temporary));
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status open_sets(index_writer *writer) {
  const data_index_options *o = writer->options;
  char names[CORE_MAX_MODALITIES][CORE_NAME];
  const char *pointer[CORE_MAX_MODALITIES];
  TRY(data_list_modalities(o->directory, o->split, names, &writer->modalities));
  for (int32_t m = 0; m < writer->modalities; ++m) pointer[m] = names[m];
  TRY(data_set_open_shards_priv(o->directory, o->split, pointer, writer->modalities, &writer->set));
  for (int32_t m = 0; m < writer->modalities && writer->set->has_labels; ++m) {
    TRY(data_set_open_shards_priv(o->directory, o->split, &pointer[m], 1, &writer->own[m]));
    if (writer->own[m]->has_labels) continue;
    data_set_close(writer->own[m]);
    writer->own[m] = NULL;
  }
  return CORE_OK;
}

static core_status write_file(index_writer *writer) {
  TRY(core_file_open(writer->temporary, O_WRONLY | O_CREAT | O_TRUNC, &writer->fd));
  core_status status = put_all(writer);
  core_error saved;
  core_error_save(&saved);
  TRY(core_keep_first(status, &saved, core_file_close(writer->fd, writer->temporary)));
  TRY(core_file_rename(writer->temporary, writer->path));
  return CORE_OK;
}

static core_status build(index_writer *writer, data_index_result *out) {
  const data_index_options *o = writer->options;
  char *split = NULL;
  TRY(data_text_priv(&writer->path, "%s/%s/" DATA_INDEX_FILE, o->directory, o->split));
  TRY(data_text_priv(&writer->temporary, "%s.part", writer->path));
  TRY(open_sets(writer));
  for (int32_t m = 0; m < writer->modalities && o->check_values; ++m) TRY(scan_values(writer, m));
  core_status status = write_file(writer);
  if (status != CORE_OK) (void)unlink(writer->temporary);
  TRY(status);
  TRY(data_text_priv(&split, "%s/%s", o->directory, o->split));
  status = core_file_sync_directory(split);
  free(split);
  TRY(status);
  *out = (data_index_result){writer->set->samples, writer->set->shards, writer->modalities, 0, writer->at};
  for (int32_t m = 0; m < writer->modalities; ++m) out->not_finite += writer->bad[m].count / 8;
  return CORE_OK;
}

core_status data_index_build(const data_index_options *options, data_index_result *out) {
  index_writer writer = {.options = options};
  *out = (data_index_result){0};
  const core_status status = build(&writer, out);
  data_set_close(writer.set);
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; ++m) {
    data_set_close(writer.own[m]);
    free(writer.bad[m].bytes);
  }
  free(writer.table.bytes);
  free(writer.block.bytes);
  free(writer.path);
  free(writer.temporary);
  TRY(status);
  return CORE_OK;
}
