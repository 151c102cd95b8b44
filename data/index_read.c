/* Outline: what a set keeps of its index; blocks, read, hashed, their offsets checked; shards compared with
 * what the index says of them. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/random.h"
#include "data/index_open_impl.h"
#include "data/memory_impl.h"
#include "data/retry_impl.h"

struct data_index {
  char *path;
  int fd;
  bool values_checked;
  int64_t modalities; /* of the file */
  int32_t count, from[CORE_MAX_MODALITIES];
  int64_t *block_at;     /* [shards] */
  uint64_t *offset_hash; /* [shards][count] */
  int64_t *bad[CORE_MAX_MODALITIES], bad_count[CORE_MAX_MODALITIES];
};

static int64_t label_bytes(int64_t count) {
  return (count * (int64_t)sizeof(int32_t) + 7) / 8 * 8;
}

int64_t data_index_block_bytes_priv(int64_t modalities, int64_t count) {
  return count * 8 + modalities * (label_bytes(count) + (count + 1) * 8) + 8;
}

/* ---- what a set keeps ---- */

static core_status fill(const data_index_table *table, data_index *index) {
  const int64_t shards = table->head->shards;
  TRY(data_text_priv(&index->path, "%s", table->path));
  TRY(DATA_ALLOCATE(shards, "index", &index->block_at));
  TRY(DATA_ALLOCATE(shards * index->count, "index", &index->offset_hash));
  for (int64_t k = 0; k < shards; ++k) {
    index->block_at[k] = table->shard[k]->block_at;
    for (int32_t m = 0; m < index->count; ++m)
      index->offset_hash[k * index->count + m] = table->column[k][index->from[m]].offset_hash;
  }
  for (int32_t m = 0; m < index->count; ++m) {
    const data_index_entry *entry = &table->entry[index->from[m]];
    index->bad_count[m] = entry->modality->bad;
    TRY(DATA_ALLOCATE(index->bad_count[m], "index", &index->bad[m]));
    memcpy(index->bad[m], entry->bad, (size_t)index->bad_count[m] * sizeof *index->bad[m]);
  }
  return CORE_OK;
}

core_status data_index_create_priv(const data_index_table *table, int fd, const int32_t *from, int32_t count,
                                   data_index **out) {
  data_index *index = NULL;
  TRY(DATA_ALLOCATE(1, "index", &index));
  index->fd = -1;
  index->modalities = table->head->modalities;
  index->values_checked = table->head->values_checked != 0;
  index->count = count;
  memcpy(index->from, from, (size_t)count * sizeof *from);
  const core_status status = fill(table, index);
  if (status != CORE_OK) data_index_close_priv(index);
  TRY(status);
  index->fd = fd;
  *out = index;
  return CORE_OK;
}

void data_index_close_priv(data_index *index) {
  if (index == NULL) return;
  if (index->fd >= 0) (void)close(index->fd);
  for (int32_t m = 0; m < index->count; ++m) free(index->bad[m]);
  free(index->block_at);
  free(index->offset_hash);
  free(index->path);
  free(index);
}

/* ---- values that are not finite ---- */

bool data_index_values_checked_priv(const data_index *index) {
  return index->values_checked;
}

int64_t data_index_bad_count_priv(const data_index *index, int32_t m) {
  return index->bad_count[m];
}

bool data_index_is_bad_priv(const data_index *index, int32_t m, int64_t sample) {
  int64_t lo = 0, hi = index->bad_count[m];
  while (lo < hi) {
    const int64_t middle = lo + (hi - lo) / 2;
    if (index->bad[m][middle] < sample)
      lo = middle + 1;
    else
      hi = middle;
  }
  return lo < index->bad_count[m] && index->bad[m][lo] == sample;
}

/* ---- blocks ---- */

int64_t data_index_scratch_priv(const data_index *index) {
  return data_index_block_bytes_priv(index->modalities, DATA_INDEX_BLOCK);
}

static core_status read_block(const data_index *index, int32_t k, int64_t block, int64_t count,
                              uint8_t *scratch) {
  const int64_t bytes = data_index_block_bytes_priv(index->modalities, count);
  const int64_t at =
      index->block_at[k] + block * data_index_block_bytes_priv(index->modalities, DATA_INDEX_BLOCK);
  uint64_t stored = 0;
  data_patience patience = {0};
  core_status status;
  do status = core_file_read_at(index->fd, index->path, scratch, (size_t)bytes, at);
  while (data_try_again_priv(&patience, status));
  if (status != CORE_OK)
    return core_error_context(status, "block %lld of shard %d, attempt %d", (long long)block, k,
                              patience.retries + 1);
  memcpy(&stored, scratch + bytes - 8, sizeof stored);
  CHECK(core_hash(scratch, (size_t)bytes - 8, (uint64_t)k) == stored, CORE_ERR_CORRUPT,
        "%s: block %lld of shard %d is damaged (wrong hash); `antiphon index` makes a new one", index->path,
        (long long)block, k);
  return CORE_OK;
}

/* Offsets of the block's samples [i, i + count). */
static core_status copy_offsets(const data_index *index, const data_column *column, const int64_t *offset,
                                int64_t i, int64_t count, int64_t *first, int32_t *rows) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t begin = offset[i + n], end = offset[i + n + 1];
    CHECK(begin >= 0 && end >= begin && end <= column->rows && end - begin <= INT32_MAX, CORE_ERR_CORRUPT,
          "%s: offsets %lld, %lld of a shard of %lld rows (%s)", index->path, (long long)begin,
          (long long)end, (long long)column->rows, column->path);
    first[n] = begin;
    rows[n] = (int32_t)(end - begin);
  }
  return CORE_OK;
}

/* Samples [i, i + count) of a block of `samples`; of several labels the first one given counts. */
static core_status copy_block(const data_set *set, int32_t k, const uint8_t *block, int64_t samples,
                              int64_t i, int64_t count, const data_samples *out, int64_t at) {
  const data_index *index = set->index;
  const uint8_t *columns = block + samples * 8;
  const int64_t column_bytes = label_bytes(samples) + (samples + 1) * 8;
  memcpy(out->id + at, block + i * 8, (size_t)count * 8);
  for (int64_t n = 0; n < count; ++n) out->label[at + n] = -1;
  for (int32_t m = 0; m < index->count; ++m) {
    const uint8_t *column = columns + index->from[m] * column_bytes;
    const int32_t *label = (const int32_t *)(const void *)column + i;
    for (int64_t n = 0; n < count; ++n)
      if (out->label[at + n] == -1) out->label[at + n] = label[n];
    TRY(copy_offsets(index, data_set_column_priv(set, m, k),
                     (const int64_t *)(const void *)(column + label_bytes(samples)), i, count,
                     out->first[m] + at, out->rows[m] + at));
  }
  return CORE_OK;
}

core_status data_index_read_priv(const data_set *set, int32_t k, int64_t first, int64_t count,
                                 uint8_t *scratch, const data_samples *out, int64_t at) {
  const int64_t all = set->sample_base[k + 1] - set->sample_base[k];
  for (int64_t done = 0; done < count;) {
    const int64_t block = (first + done) / DATA_INDEX_BLOCK, start = block * DATA_INDEX_BLOCK;
    const int64_t samples = all - start < DATA_INDEX_BLOCK ? all - start : DATA_INDEX_BLOCK;
    const int64_t i = first + done - start, some = count - done < samples - i ? count - done : samples - i;
    TRY(read_block(set->index, k, block, samples, scratch));
    TRY(copy_block(set, k, scratch, samples, i, some, out, at + done));
    done += some;
  }
  return CORE_OK;
}

/* ---- shards ---- */

int64_t data_index_most_samples_priv(const data_set *set) {
  int64_t most = 0;
  for (int32_t k = 0; k < set->shards; ++k) {
    const int64_t samples = set->sample_base[k + 1] - set->sample_base[k];
    if (samples > most) most = samples;
  }
  return most;
}

/* Inside HDF5. */
static core_status verify_column(const data_hdf5_file *file, const char *name, int64_t count, uint64_t hash,
                                 const char *index, uint64_t *scratch) {
  data_hdf5_dataset dataset;
  TRY(data_hdf5_dataset_open_priv(file, name, 1, &dataset));
  const bool fits = dataset.extent[0] == count;
  const core_status status = fits ? data_hdf5_read_unsigned_priv(&dataset, scratch) : CORE_OK;
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  CHECK(fits && core_hash(scratch, (size_t)count * sizeof *scratch, 0) == hash, CORE_ERR_MISMATCH,
        "%s: \"%s\" is not what %s says; run `antiphon index` again", file->path, name, index);
  return CORE_OK;
}

core_status data_index_verify_shard_priv(const data_set *set, int32_t m, int32_t k,
                                         const data_hdf5_file *file, uint64_t *scratch) {
  const data_index *index = set->index;
  const int64_t samples = set->sample_base[k + 1] - set->sample_base[k];
  TRY(verify_column(file, "id", samples, set->id_hash[k], index->path, scratch));
  TRY(verify_column(file, "offset", samples + 1, index->offset_hash[(int64_t)k * index->count + m],
                    index->path, scratch));
  return CORE_OK;
}
