/* Outline: opening shard by shard; comparing modalities with one another; whole-set tables (ids, runs of
 * lengths, fingerprint); columns of samples; small queries. */
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "data/groups_impl.h"
#include "data/index_impl.h"
#include "data/memory_impl.h"
#include "data/retry_impl.h"
#include "data/set_impl.h"

/* ---- taking in shards ---- */

/* Ids of shard k must be the same in every modality: the first one's are kept. */
static core_status compare_ids(const data_column *first, const uint64_t *id, const data_shard *shard) {
  const data_column *other = &shard->column;
  CHECK(first->samples == other->samples, CORE_ERR_MISMATCH,
        "%s has %lld samples, %s has %lld: they must hold the same", first->path, (long long)first->samples,
        other->path, (long long)other->samples);
  for (int64_t i = 0; i < first->samples; ++i)
    CHECK(id[i] == shard->id[i], CORE_ERR_MISMATCH,
          "ids differ at sample %lld: %s has %llu, %s has %llu; shards of one number must hold the same "
          "samples in the "
          "same order",
          (long long)i, first->path, (unsigned long long)id[i], other->path,
          (unsigned long long)shard->id[i]);
  return CORE_OK;
}

/* A sample has one label, whichever modality states it. */
static core_status merge_labels(data_set *set, int32_t k, const data_shard *shard) {
  int32_t *label = set->label + set->sample_base[k];
  for (int64_t i = 0; shard->label != NULL && i < shard->column.samples; ++i) {
    CHECK(label[i] == shard->label[i] || label[i] == -1 || shard->label[i] == -1, CORE_ERR_MISMATCH,
          "%s: sample %llu has label %d, another modality says %d", shard->column.path,
          (unsigned long long)shard->id[i], shard->label[i], label[i]);
    if (label[i] == -1) label[i] = shard->label[i];
    set->has_labels = set->has_labels || label[i] != -1;
  }
  return CORE_OK;
}

/* All shards of a modality come from one encoder and have one width and type. */
static core_status merge_info(data_modality_info *info, int32_t k, const data_column *first,
                              const data_shard *shard) {
  const data_column *column = &shard->column;
  if (k == 0) {
    memcpy(info->encoder, shard->encoder, sizeof info->encoder);
    info->dtype = column->dtype;
    info->width = column->width;
  }
  CHECK(info->width == column->width, CORE_ERR_MISMATCH, "%s is %lld wide, %s is %lld", first->path,
        (long long)info->width, column->path, (long long)column->width);
  CHECK(info->dtype == column->dtype, CORE_ERR_MISMATCH, "%s holds %s, %s holds %s", first->path,
        core_dtype_text(info->dtype), column->path, core_dtype_text(column->dtype));
  CHECK(strcmp(info->encoder, shard->encoder) == 0, CORE_ERR_MISMATCH,
        "%s comes from encoder \"%s\", %s from \"%s\"", first->path, info->encoder, column->path,
        shard->encoder);
  info->tokens += column->rows;
  for (int64_t i = 0; i < column->samples; ++i) {
    const int64_t rows = column->offset[i + 1] - column->offset[i];
    if (rows > info->longest) info->longest = rows;
    info->absent += rows == 0;
  }
  CHECK(info->longest <= INT32_MAX, CORE_ERR_UNSUPPORTED, "%s: a sample of %lld rows, expected at most %d",
        column->path, (long long)info->longest, INT32_MAX);
  return CORE_OK;
}

/* Appends the ids of shard k (from the first modality) and room for its labels. */
static core_status extend_samples(data_set *set, int32_t k, const data_shard *shard) {
  const int64_t before = set->samples, count = shard->column.samples;
  uint64_t *id = realloc(set->id, (size_t)(before + count + 1) * sizeof *id);
  if (id != NULL) set->id = id;
  int32_t *label = realloc(set->label, (size_t)(before + count + 1) * sizeof *label);
  if (label != NULL) set->label = label;
  CHECK(id != NULL && label != NULL, CORE_ERR_MEMORY, "no memory for %lld sample ids",
        (long long)(before + count));
  memcpy(set->id + before, shard->id, (size_t)count * sizeof *id);
  for (int64_t i = 0; i < count; ++i) set->label[before + i] = -1;
  set->samples += count;
  set->sample_base[k + 1] = set->samples;
  set->id_hash[k] = core_hash(shard->id, (size_t)count * sizeof *id, 0);
  return CORE_OK;
}

/* Takes over the column of `shard`, also on failure. */
static core_status take_shard(data_set *set, int32_t m, int32_t k, data_shard *shard) {
  data_column *column = &set->column[(int64_t)m * set->shards + k];
  *column = shard->column;
  const data_column *previous = k > 0 ? column - 1 : column;
  column->first_band = k > 0 ? previous->first_band + previous->bands : 0;
  if (m == 0)
    TRY(extend_samples(set, k, shard));
  else
    TRY(compare_ids(data_set_column_priv(set, 0, k), set->id + set->sample_base[k], shard));
  TRY(merge_labels(set, k, shard));
  TRY(merge_info(&set->info[m], k, data_set_column_priv(set, m, 0), shard));
  return CORE_OK;
}

static core_status open_one(data_set *set, const char *path, const char *modality, int32_t m, int32_t k) {
  data_shard shard;
  data_patience patience = {0};
  core_status status;
  do status = data_shard_open_priv(path, modality, &shard);
  while (data_try_again_priv(&patience, status));
  TRY(status);
  status = take_shard(set, m, k, &shard);
  shard.column = (data_column){0}; /* the set's now */
  data_shard_release_priv(&shard);
  TRY(status);
  return CORE_OK;
}

/* ---- tables over the whole set ---- */

static int compare_unsigned(const void *a, const void *b) {
  const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return (x > y) - (x < y);
}

static int compare_falling(const void *a, const void *b) {
  return compare_unsigned(b, a);
}

static core_status report_twice(const data_set *set, uint64_t id) {
  int64_t at[2] = {0, 0};
  for (int64_t i = 0, found = 0; i < set->samples && found < 2; ++i)
    if (set->id[i] == id) at[found++] = i;
  const int32_t k[2] = {data_set_shard_of_priv(set, at[0]), data_set_shard_of_priv(set, at[1])};
  FAIL(CORE_ERR_MISMATCH, "sample id %llu comes twice: %s sample %lld and %s sample %lld",
       (unsigned long long)id, data_set_column_priv(set, 0, k[0])->path,
       (long long)(at[0] - set->sample_base[k[0]]), data_set_column_priv(set, 0, k[1])->path,
       (long long)(at[1] - set->sample_base[k[1]]));
}

static core_status check_unique(const data_set *set) {
  uint64_t *sorted = NULL;
  int64_t rising = 1, twice = -1;
  while (rising < set->samples && set->id[rising - 1] < set->id[rising]) ++rising;
  if (rising >= set->samples) return CORE_OK; /* the common case needs no sorting */
  TRY(DATA_ALLOCATE(set->samples, "sorted ids", &sorted));
  memcpy(sorted, set->id, (size_t)set->samples * sizeof *sorted);
  qsort(sorted, (size_t)set->samples, sizeof *sorted, compare_unsigned);
  for (int64_t i = 1; i < set->samples && twice < 0; ++i)
    if (sorted[i - 1] == sorted[i]) twice = i;
  const uint64_t id = twice >= 0 ? sorted[twice] : 0;
  free(sorted);
  if (twice >= 0) TRY(report_twice(set, id));
  return CORE_OK;
}

core_status data_runs_make_priv(uint64_t *length, int64_t count, data_length_run **run, int64_t *runs) {
  int64_t distinct = 0;
  qsort(length, (size_t)count, sizeof *length, compare_falling);
  for (int64_t i = 0; i < count; ++i) distinct += i == 0 || length[i] != length[i - 1];
  TRY(DATA_ALLOCATE(distinct, "runs of lengths", run));
  for (int64_t i = 0, r = -1; i < count; ++i) {
    if (i == 0 || length[i] != length[i - 1]) (*run)[++r].rows = (int64_t)length[i];
    ++(*run)[r].samples;
  }
  *runs = distinct;
  return CORE_OK;
}

static core_status build_runs(data_set *set, int32_t m) {
  uint64_t *rows = NULL;
  int64_t at = 0;
  TRY(DATA_ALLOCATE(set->samples, "lengths", &rows));
  for (int32_t k = 0; k < set->shards; ++k) {
    const data_column *column = data_set_column_priv(set, m, k);
    for (int64_t i = 0; i < column->samples; ++i)
      rows[at++] = (uint64_t)(column->offset[i + 1] - column->offset[i]);
  }
  const core_status status = data_runs_make_priv(rows, at, &set->run[m], &set->runs[m]);
  free(rows);
  TRY(status);
  return CORE_OK;
}

void data_set_seal_priv(data_set *set) {
  uint64_t hash = core_hash_text(DATA_FORMAT_NAME);
  const int64_t head[3] = {DATA_VERSION, set->modalities, set->shards};
  hash = core_hash(head, sizeof head, hash);
  for (int32_t m = 0; m < set->modalities; ++m) {
    const int64_t shape[3] = {set->info[m].width, (int64_t)set->info[m].dtype, set->info[m].tokens};
    hash = core_hash(set->info[m].name, strlen(set->info[m].name), hash);
    hash = core_hash(shape, sizeof shape, hash);
  }
  hash = core_hash(set->sample_base, (size_t)(set->shards + 1) * sizeof *set->sample_base, hash);
  set->fingerprint = core_hash(set->id_hash, (size_t)set->shards * sizeof *set->id_hash, hash);
}

static core_status finish_set(data_set *set, const char *where) {
  CHECK(set->samples > 0, CORE_ERR_FORMAT, "%s: holds no samples, expected at least one", where);
  TRY(check_unique(set));
  for (int32_t m = 0; m < set->modalities; ++m) TRY(build_runs(set, m));
  data_set_seal_priv(set);
  return CORE_OK;
}

/* ---- opening ---- */

core_status data_set_create_priv(int32_t modalities, int32_t shards, data_set **out) {
  data_set *set = NULL;
  TRY(DATA_ALLOCATE(1, "set", &set));
  *out = set; /* closed by the caller when anything below fails */
  set->modalities = modalities;
  set->shards = shards;
  TRY(DATA_ALLOCATE(modalities, "modalities", &set->info));
  TRY(DATA_ALLOCATE((int64_t)modalities * shards, "shards", &set->column));
  TRY(DATA_ALLOCATE((int64_t)shards + 1, "shards", &set->sample_base));
  TRY(DATA_ALLOCATE(shards, "shards", &set->id_hash));
  TRY(DATA_ALLOCATE(modalities, "runs of lengths", &set->run));
  TRY(DATA_ALLOCATE(modalities, "runs of lengths", &set->runs));
  return CORE_OK;
}

static core_status check_names(const char *const *modalities, int32_t count) {
  CHECK(count >= 1 && count <= CORE_MAX_MODALITIES, CORE_ERR_ARGUMENT, "%d modalities, expected 1 to %d",
        count, CORE_MAX_MODALITIES);
  for (int32_t m = 0; m < count; ++m) {
    CHECK(modalities[m][0] != '\0' && strlen(modalities[m]) < CORE_NAME && strchr(modalities[m], '/') == NULL,
          CORE_ERR_ARGUMENT, "modality \"%.120s\": expected 1 to %d bytes without \"/\"", modalities[m],
          CORE_NAME - 1);
    for (int32_t other = 0; other < m; ++other)
      CHECK(strcmp(modalities[other], modalities[m]) != 0, CORE_ERR_ARGUMENT,
            "modality \"%s\" is named twice", modalities[m]);
  }
  return CORE_OK;
}

static core_status open_shards(data_set *set, const char *directory, const char *split,
                               const char *const *modalities) {
  for (int32_t m = 0; m < set->modalities; ++m)
    (void)snprintf(set->info[m].name, sizeof set->info[m].name, "%s", modalities[m]);
  for (int32_t k = 0; k < set->shards; ++k)
    for (int32_t m = 0; m < set->modalities; ++m) {
      char *path = NULL;
      TRY(data_text_priv(&path, "%s/%s/%s-%05d.h5", directory, split, modalities[m], k));
      const core_status status = open_one(set, path, modalities[m], m, k);
      free(path);
      TRY(status);
    }
  return CORE_OK;
}

/* Every shard's header; the number of shards is known. */
static core_status open_headers(const char *directory, const char *split, const char *const *modalities,
                                int32_t modality_count, int32_t shards, data_set **out) {
  data_set *set = NULL;
  char *where = NULL;
  TRY(data_text_priv(&where, "%s/%s", directory, split));
  core_status status = data_set_create_priv(modality_count, shards, &set);
  if (status == CORE_OK) status = open_shards(set, directory, split, modalities);
  if (status == CORE_OK) status = finish_set(set, where);
  free(where);
  if (status != CORE_OK) data_set_close(set);
  TRY(status);
  *out = set;
  return CORE_OK;
}

core_status data_set_open_shards_priv(const char *directory, const char *split, const char *const *modalities,
                                      int32_t modality_count, data_set **out) {
  int32_t shards = 0;
  *out = NULL;
  TRY(check_names(modalities, modality_count));
  TRY(data_list_shards_priv(directory, split, modalities, modality_count, &shards));
  TRY(open_headers(directory, split, modalities, modality_count, shards, out));
  return CORE_OK;
}

core_status data_set_open(const char *directory, const char *split, const char *const *modalities,
                          int32_t modality_count, data_set **out) {
  int32_t shards = 0;
  bool indexed = false;
  *out = NULL;
  TRY(check_names(modalities, modality_count));
  TRY(data_list_shards_priv(directory, split, modalities, modality_count, &shards));
  TRY(data_index_open_priv(directory, split, modalities, modality_count, shards, &indexed, out));
  if (!indexed) TRY(open_headers(directory, split, modalities, modality_count, shards, out));
  return CORE_OK;
}

core_status data_set_open_file_priv(const char *path, data_set **out) {
  data_set *set = NULL;
  data_shard shard = {0};
  *out = NULL;
  core_status status = data_set_create_priv(1, 1, &set);
  if (status == CORE_OK) status = data_shard_open_priv(path, NULL, &shard);
  if (status == CORE_OK) {
    memcpy(set->info[0].name, shard.modality, sizeof set->info[0].name);
    status = take_shard(set, 0, 0, &shard);
    shard.column = (data_column){0};
  }
  data_shard_release_priv(&shard);
  if (status == CORE_OK && set->samples > 0) status = finish_set(set, path);
  if (status != CORE_OK) data_set_close(set);
  TRY(status);
  *out = set;
  return CORE_OK;
}

void data_set_close(data_set *set) {
  if (set == NULL) return;
  for (int64_t i = 0; set->column != NULL && i < (int64_t)set->modalities * set->shards; ++i)
    data_column_release_priv(&set->column[i]);
  for (int32_t m = 0; set->run != NULL && m < set->modalities; ++m) free(set->run[m]);
  free(set->column);
  free(set->info);
  data_index_close_priv(set->index);
  data_text_free_priv(set->text);
  data_groups_free_priv(set->groups);
  free(set->sample_base);
  free(set->id_hash);
  free(set->id);
  free(set->label);
  free(set->run);
  free(set->runs);
  free(set);
}

/* ---- queries ---- */

int64_t data_set_samples(const data_set *set) {
  return set->samples;
}

int32_t data_set_shards(const data_set *set) {
  return set->shards;
}

const data_modality_info *data_set_modality(const data_set *set, int32_t m) {
  return m >= 0 && m < set->modalities ? &set->info[m] : NULL;
}

uint64_t data_set_fingerprint(const data_set *set) {
  return set->fingerprint;
}

bool data_set_has_labels(const data_set *set) {
  return set->has_labels;
}

int64_t data_runs_most_priv(const data_set *set, const data_length_run *run, int64_t runs, int64_t samples) {
  /* Consecutive positions of a stream touch at most this many epochs, each of which holds a sample once. */
  int64_t epochs = samples > 0 ? 1 + (samples - 1 + set->samples - 1) / set->samples : 0;
  if (set->groups != NULL && samples > 0) epochs = data_groups_copies_priv(set->groups);
  int64_t rows = 0;
  for (int64_t r = 0; r < runs && samples > 0; ++r) {
    const int64_t all = run[r].samples * epochs, taken = all < samples ? all : samples;
    rows += taken * run[r].rows;
    samples -= taken;
  }
  return rows;
}

int64_t data_set_most_rows(const data_set *set, int32_t m, int64_t samples) {
  return data_runs_most_priv(set, set->run[m], set->runs[m], samples);
}

int32_t data_set_shard_of_priv(const data_set *set, int64_t index) {
  int32_t lo = 0, hi = set->shards; /* sample_base[lo] <= index < sample_base[hi] */
  while (hi - lo > 1) {
    const int32_t middle = lo + (hi - lo) / 2;
    if (set->sample_base[middle] <= index)
      lo = middle;
    else
      hi = middle;
  }
  return lo;
}

/* ---- columns of samples ---- */

int64_t data_set_scratch_priv(const data_set *set) {
  return set->index != NULL ? data_index_scratch_priv(set->index) : 0;
}

core_status data_set_read_samples_priv(const data_set *set, int32_t k, int64_t first, int64_t count,
                                       uint8_t *scratch, const data_samples *out, int64_t at) {
  for (int64_t i = 0; i < count; ++i) out->shard[at + i] = k;
  for (int64_t i = 0; out->sample != NULL && i < count; ++i)
    out->sample[at + i] = set->sample_base[k] + first + i;
  if (set->index != NULL) {
    TRY(data_index_read_priv(set, k, first, count, scratch, out, at));
    return CORE_OK;
  }
  const int64_t base = set->sample_base[k] + first;
  memcpy(out->id + at, set->id + base, (size_t)count * sizeof *set->id);
  memcpy(out->label + at, set->label + base, (size_t)count * sizeof *set->label);
  for (int32_t m = 0; m < set->modalities; ++m) {
    const int64_t *offset = data_set_column_priv(set, m, k)->offset + first;
    for (int64_t i = 0; i < count; ++i) {
      out->first[m][at + i] = offset[i];
      out->rows[m][at + i] = (int32_t)(offset[i + 1] - offset[i]);
    }
  }
  return CORE_OK;
}
