/* Outline: footer and table into memory, hashed; the parts of the table, each compared with what is possible;
 * the files themselves, looked at but not opened; a set made of it all. Nothing of an index is believed that
 * was not compared with its hash and with the sizes of the files that it speaks of. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/random.h"
#include "data/index_impl.h"
#include "data/index_open_impl.h"
#include "data/memory_impl.h"
#include "data/retry_impl.h"

/* ---- footer and table ---- */

static core_status check_footer(const data_index_table *table, const data_index_footer *footer,
                                int64_t bytes) {
  CHECK(memcmp(footer->magic, DATA_INDEX_MAGIC, sizeof footer->magic) == 0, CORE_ERR_FORMAT,
        "%s: not an index of latent shards", table->path);
  CHECK(footer->version == DATA_INDEX_VERSION, CORE_ERR_UNSUPPORTED,
        "%s: version is %" PRId64 ", this program reads version %d; `antiphon index` makes a new one",
        table->path, footer->version, DATA_INDEX_VERSION);
  const int64_t most = bytes - (int64_t)sizeof *footer;
  CHECK(footer->table_at >= 0 && footer->table_bytes >= (int64_t)sizeof(data_index_head) &&
            footer->table_at <= most && footer->table_bytes == most - footer->table_at,
        CORE_ERR_CORRUPT, "%s: is cut short or damaged; `antiphon index` makes a new one", table->path);
  return CORE_OK;
}

static core_status load_table(int fd, int64_t bytes, data_index_table *table) {
  data_index_footer footer;
  CHECK(bytes >= (int64_t)sizeof footer, CORE_ERR_FORMAT, "%s: not an index of latent shards (%lld bytes)",
        table->path, (long long)bytes);
  TRY(core_file_read_at(fd, table->path, &footer, sizeof footer, bytes - (int64_t)sizeof footer));
  TRY(check_footer(table, &footer, bytes));
  TRY(DATA_ALLOCATE(footer.table_bytes, "index", &table->bytes));
  table->count = footer.table_bytes;
  table->blocks_end = footer.table_at;
  TRY(core_file_read_at(fd, table->path, table->bytes, (size_t)table->count, footer.table_at));
  const uint64_t seed = core_hash(&footer, offsetof(data_index_footer, hash), 0);
  CHECK(core_hash(table->bytes, (size_t)table->count, seed) == footer.hash, CORE_ERR_CORRUPT,
        "%s: is damaged (wrong hash); `antiphon index` makes a new one", table->path);
  return CORE_OK;
}

/* The next `count` records of the table; their count was never believed before it was compared with what is
 * left. */
static core_status take(data_index_table *table, int64_t count, size_t size, const void **out) {
  const int64_t left = table->count - table->taken;
  CHECK(count >= 0 && count <= left / (int64_t)size, CORE_ERR_CORRUPT,
        "%s: is damaged: %" PRId64 " records in %" PRId64 " bytes", table->path, count, left);
  *out = table->bytes + table->taken;
  table->taken += count * (int64_t)size;
  return CORE_OK;
}
#define TAKE(table, records, pointer) take((table), (records), sizeof(**(pointer)), (const void **)(pointer))

static core_status damaged(const data_index_table *table, const char *what) {
  FAIL(CORE_ERR_CORRUPT, "%s: is damaged: %s; `antiphon index` makes a new one", table->path, what);
}

/* ---- modalities ---- */

static core_status check_runs(const data_index_table *table, const data_index_entry *entry) {
  const data_index_modality *m = entry->modality;
  int64_t samples = 0, rows = 0;
  for (int64_t r = 0; r < m->runs; ++r) {
    const data_length_run *run = &entry->run[r];
    int64_t product = 0;
    const bool good = run->rows >= 0 && run->rows <= INT32_MAX && run->samples > 0 &&
                      (r == 0 ? run->rows == m->longest : run->rows < run[-1].rows) &&
                      !__builtin_mul_overflow(run->rows, run->samples, &product) &&
                      !__builtin_add_overflow(rows, product, &rows) &&
                      !__builtin_add_overflow(samples, run->samples, &samples);
    if (!good) TRY(damaged(table, "lengths"));
  }
  if (samples != table->head->samples || rows != m->tokens) TRY(damaged(table, "lengths"));
  for (int64_t b = 0; b < m->bad; ++b)
    if (entry->bad[b] < (b > 0 ? entry->bad[b - 1] + 1 : 0) || entry->bad[b] >= samples)
      TRY(damaged(table, "the list of samples that are not finite"));
  return CORE_OK;
}

static bool sound_modality(const data_index_modality *m) {
  return memchr(m->name, '\0', CORE_NAME) != NULL && memchr(m->encoder, '\0', CORE_NAME) != NULL &&
         m->width >= 1 && m->width <= DATA_MOST_WIDTH && m->tokens >= 0 && m->absent >= 0 &&
         (m->dtype == CORE_FLOAT16 || m->dtype == CORE_BFLOAT16 || m->dtype == CORE_FLOAT32);
}

static core_status parse_modalities(data_index_table *table) {
  for (int64_t m = 0; m < table->head->modalities; ++m) {
    data_index_entry *entry = &table->entry[m];
    TRY(TAKE(table, 1, &entry->modality));
    if (!sound_modality(entry->modality)) TRY(damaged(table, "a modality"));
    TRY(TAKE(table, entry->modality->runs, &entry->run));
    TRY(TAKE(table, entry->modality->bad, &entry->bad));
    TRY(check_runs(table, entry));
  }
  return CORE_OK;
}

/* ---- shards ---- */

/* Bytes that all blocks of a shard have, -1: impossible. */
static int64_t shard_block_bytes(const data_index_table *table, int64_t samples) {
  const int64_t M = table->head->modalities, whole = samples / DATA_INDEX_BLOCK,
                rest = samples % DATA_INDEX_BLOCK;
  const int64_t one = data_index_block_bytes_priv(M, DATA_INDEX_BLOCK);
  if (samples < 0 || whole > table->blocks_end / one) return -1;
  return whole * one + (rest > 0 ? data_index_block_bytes_priv(M, rest) : 0);
}

static core_status parse_shards(data_index_table *table) {
  const data_index_head *head = table->head;
  int64_t samples = 0;
  TRY(DATA_ALLOCATE(head->shards, "index", &table->shard));
  TRY(DATA_ALLOCATE(head->shards, "index", &table->column));
  for (int64_t k = 0; k < head->shards; ++k) {
    TRY(TAKE(table, 1, &table->shard[k]));
    TRY(TAKE(table, head->modalities, &table->column[k]));
    const data_index_shard *shard = table->shard[k];
    const int64_t blocks = shard_block_bytes(table, shard->samples);
    if (blocks < 0 || shard->block_at < 0 || shard->block_at > table->blocks_end - blocks ||
        __builtin_add_overflow(samples, shard->samples, &samples))
      TRY(damaged(table, "a shard"));
  }
  if (samples != head->samples || table->taken != table->count) TRY(damaged(table, "numbers of samples"));
  return CORE_OK;
}

static core_status parse_table(data_index_table *table) {
  TRY(TAKE(table, 1, &table->head));
  const data_index_head *head = table->head;
  if (head->modalities < 1 || head->modalities > CORE_MAX_MODALITIES || head->shards < 1 ||
      head->shards > table->count || head->samples < 1 || head->block_samples != DATA_INDEX_BLOCK)
    TRY(damaged(table, "its head"));
  TRY(parse_modalities(table));
  TRY(parse_shards(table));
  return CORE_OK;
}

core_status data_index_load_priv(const char *path, int *fd, data_index_table *table) {
  int64_t bytes = 0;
  *table = (data_index_table){.path = path};
  TRY(core_file_open(path, O_RDONLY, fd));
  core_status status = core_file_size(path, &bytes);
  if (status == CORE_OK) status = load_table(*fd, bytes, table);
  if (status == CORE_OK) status = parse_table(table);
  if (status == CORE_OK) return CORE_OK;
  data_index_unload_priv(table);
  (void)close(*fd);
  *fd = -1;
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

void data_index_unload_priv(data_index_table *table) {
  free(table->bytes);
  free(table->shard);
  free(table->column);
  *table = (data_index_table){0};
}

/* ---- the set ---- */

/* What the table says of a file must be possible in a file of this size. */
static bool sound_column(const data_index_column *c, const data_index_modality *m) {
  const int64_t value = (int64_t)core_dtype_size((core_dtype)m->dtype), row_bytes = m->width * value;
  if (c->filters < 0 || c->filters > DATA_MAX_FILTERS || c->rows < 0 || c->band_rows < 1 || c->tile_width < 1)
    return false;
  int64_t most = c->bytes;
  for (int64_t i = 0; i < c->filters; ++i) {
    if (data_filter_name_priv(c->id[i]) == NULL) return false;
    if (__builtin_mul_overflow(most, data_filter_most_priv(c->id[i]), &most)) most = INT64_MAX;
  }
  return c->rows <= most / row_bytes && c->band_rows <= DATA_MOST_CHUNK_BYTES / row_bytes &&
         c->tile_width <= DATA_MOST_CHUNK_BYTES / value / c->band_rows &&
         (c->band_rows * row_bytes <= most || c->band_rows * row_bytes <= DATA_FREE_CHUNK_BYTES) &&
         (c->rows + c->band_rows - 1) / c->band_rows <= c->bytes;
}

static core_status check_file(const data_index_table *table, const data_index_column *c, const char *path,
                              data_file_identity *now) {
  TRY(data_identity_of_priv(path, now));
  CHECK(now->bytes == c->bytes && now->seconds == c->seconds && now->nanoseconds == c->nanoseconds,
        CORE_ERR_MISMATCH,
        "%s: was changed after %s was made (%lld bytes, then %lld%s); run `antiphon index` again, or remove "
        "the "
        "index to open without one",
        path, table->path, (long long)now->bytes, (long long)c->bytes,
        now->bytes == c->bytes ? ", another time of change" : "");
  return CORE_OK;
}

static core_status take_column(const data_index_table *table, int64_t k, int32_t from, const char *directory,
                               data_set *set, int32_t m) {
  const data_index_column *c = &table->column[k][from];
  const data_index_modality *modality = table->entry[from].modality;
  data_column *column = &set->column[(int64_t)m * set->shards + k];
  if (!sound_column(c, modality)) TRY(damaged(table, "the layout of a shard"));
  TRY(data_text_priv(&column->path, "%s/%s-%05d.h5", directory, modality->name, (int)k));
  TRY(check_file(table, c, column->path, &column->identity));
  column->samples = table->shard[k]->samples;
  column->rows = c->rows;
  column->width = modality->width;
  column->dtype = (core_dtype)modality->dtype;
  column->band_rows = c->band_rows;
  column->bands = (c->rows + c->band_rows - 1) / c->band_rows;
  column->tile_width = c->tile_width;
  column->tiles = (column->width + c->tile_width - 1) / c->tile_width;
  column->chunked = c->chunked != 0;
  column->partial_unfiltered = c->partial_unfiltered != 0;
  column->pipeline.count = (int32_t)c->filters;
  memcpy(column->pipeline.id, c->id, sizeof c->id);
  memcpy(column->pipeline.value, c->value, sizeof c->value);
  column->first_band = k > 0 ? column[-1].first_band + column[-1].bands : 0;
  return CORE_OK;
}

static core_status take_modality(const data_index_table *table, int32_t from, data_set *set, int32_t m) {
  const data_index_entry *entry = &table->entry[from];
  const data_index_modality *modality = entry->modality;
  data_modality_info *info = &set->info[m];
  memcpy(info->name, modality->name, sizeof info->name);
  memcpy(info->encoder, modality->encoder, sizeof info->encoder);
  info->dtype = (core_dtype)modality->dtype;
  info->width = modality->width;
  info->tokens = modality->tokens;
  info->longest = modality->longest;
  info->absent = modality->absent;
  set->has_labels = set->has_labels || modality->labelled != 0;
  set->runs[m] = modality->runs;
  TRY(DATA_ALLOCATE(modality->runs, "runs of lengths", &set->run[m]));
  memcpy(set->run[m], entry->run, (size_t)modality->runs * sizeof *set->run[m]);
  return CORE_OK;
}

static core_status take_set(const data_index_table *table, const int32_t *from, const char *directory,
                            data_set *set) {
  for (int32_t m = 0; m < set->modalities; ++m) TRY(take_modality(table, from[m], set, m));
  for (int32_t k = 0; k < set->shards; ++k) {
    set->sample_base[k + 1] = set->sample_base[k] + table->shard[k]->samples;
    set->id_hash[k] = table->shard[k]->id_hash;
    for (int32_t m = 0; m < set->modalities; ++m) TRY(take_column(table, k, from[m], directory, set, m));
  }
  set->samples = set->sample_base[set->shards];
  data_set_seal_priv(set);
  return CORE_OK;
}

/* Where each wanted modality stands in the table. */
static core_status find_modalities(const data_index_table *table, const char *const *modalities,
                                   int32_t count, int32_t *from) {
  for (int32_t m = 0; m < count; ++m) {
    from[m] = -1;
    for (int32_t i = 0; i < (int32_t)table->head->modalities; ++i)
      if (strcmp(table->entry[i].modality->name, modalities[m]) == 0) from[m] = i;
    CHECK(from[m] >= 0, CORE_ERR_MISMATCH,
          "%s: does not know modality \"%s\", whose shards are there; run `antiphon index` again, or remove "
          "the "
          "index to open without one",
          table->path, modalities[m]);
  }
  return CORE_OK;
}

static core_status open_table(const data_index_table *table, int fd, const char *directory,
                              const char *const *modalities, int32_t count, int32_t shards, data_set **out) {
  int32_t from[CORE_MAX_MODALITIES];
  CHECK(table->head->shards == shards, CORE_ERR_MISMATCH,
        "%s: was made of %lld shards, now there are %d; run `antiphon index` again, or remove the index to "
        "open "
        "without one",
        table->path, (long long)table->head->shards, shards);
  TRY(find_modalities(table, modalities, count, from));
  core_status status = data_set_create_priv(count, shards, out);
  if (status == CORE_OK) status = take_set(table, from, directory, *out);
  if (status == CORE_OK) status = data_index_create_priv(table, fd, from, count, &(*out)->index);
  if (status == CORE_OK) return CORE_OK;
  data_set_close(*out);
  *out = NULL;
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

core_status data_index_open_priv(const char *directory, const char *split, const char *const *modalities,
                                 int32_t modality_count, int32_t shards, bool *indexed, data_set **out) {
  data_index_table table = {0};
  char *path = NULL, *where = NULL;
  int fd = -1;
  TRY(data_text_priv(&path, "%s/%s/" DATA_INDEX_FILE, directory, split));
  *indexed = core_file_exists(path);
  core_status status = data_text_priv(&where, "%s/%s", directory, split);
  data_patience patience = {0};
  if (*indexed && status == CORE_OK) {
    do status = data_index_load_priv(path, &fd, &table);
    while (data_try_again_priv(&patience, status));
  }
  if (*indexed && status == CORE_OK)
    status = open_table(&table, fd, where, modalities, modality_count, shards, out);
  if (status != CORE_OK && fd >= 0) (void)close(fd);
  data_index_unload_priv(&table);
  free(path);
  free(where);
  TRY(status);
  return CORE_OK;
}
