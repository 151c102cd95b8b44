/* Outline: the set opened by its index and the same set opened by its shards must be equal in everything. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "data/index_impl.h"
#include "data/memory_impl.h"

typedef struct comparison {
  const char *index; /* its path */
  const data_set *by_index, *by_shards;
  uint8_t *scratch;
  data_samples one, other; /* columns of a shard */
} comparison;

static core_status differs(const comparison *c, const char *what) {
  FAIL(CORE_ERR_MISMATCH, "%s: %s differs from what the shards say; run `antiphon index` again", c->index,
       what);
}

static core_status compare_sets(const comparison *c) {
  const data_set *a = c->by_index, *b = c->by_shards;
  if (a->fingerprint != b->fingerprint || a->has_labels != b->has_labels) TRY(differs(c, "the set"));
  for (int32_t m = 0; m < a->modalities; ++m) {
    const bool same = memcmp(&a->info[m], &b->info[m], sizeof a->info[m]) == 0 && a->runs[m] == b->runs[m] &&
                      memcmp(a->run[m], b->run[m], (size_t)a->runs[m] * sizeof *a->run[m]) == 0;
    if (!same) TRY(differs(c, a->info[m].name));
  }
  return CORE_OK;
}

static core_status compare_shard(const comparison *c, int32_t k) {
  const data_set *a = c->by_index, *b = c->by_shards;
  const int64_t samples = a->sample_base[k + 1] - a->sample_base[k];
  const size_t count = (size_t)samples;
  TRY(data_set_read_samples_priv(a, k, 0, samples, c->scratch, &c->one, 0));
  TRY(data_set_read_samples_priv(b, k, 0, samples, NULL, &c->other, 0));
  bool same = memcmp(c->one.id, c->other.id, count * sizeof *c->one.id) == 0 &&
              memcmp(c->one.label, c->other.label, count * sizeof *c->one.label) == 0;
  for (int32_t m = 0; m < a->modalities; ++m)
    same = same && memcmp(c->one.first[m], c->other.first[m], count * sizeof *c->one.first[m]) == 0 &&
           memcmp(c->one.rows[m], c->other.rows[m], count * sizeof *c->one.rows[m]) == 0;
  if (!same) TRY(differs(c, data_set_column_priv(a, 0, k)->path));
  return CORE_OK;
}

static core_status take_columns(int32_t modalities, int64_t count, data_samples *out) {
  TRY(DATA_ALLOCATE(count, "samples", &out->id));
  TRY(DATA_ALLOCATE(count, "samples", &out->label));
  TRY(DATA_ALLOCATE(count, "samples", &out->shard));
  for (int32_t m = 0; m < modalities; ++m) {
    TRY(DATA_ALLOCATE(count, "samples", &out->first[m]));
    TRY(DATA_ALLOCATE(count, "samples", &out->rows[m]));
  }
  return CORE_OK;
}

static void free_columns(data_samples *samples) {
  free(samples->id);
  free(samples->label);
  free(samples->shard);
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; ++m) {
    free(samples->first[m]);
    free(samples->rows[m]);
  }
}

static core_status compare_all(comparison *c) {
  const data_set *set = c->by_index;
  const int64_t most = data_index_most_samples_priv(set);
  TRY(compare_sets(c));
  TRY(DATA_ALLOCATE(data_set_scratch_priv(set), "index", &c->scratch));
  TRY(take_columns(set->modalities, most, &c->one));
  TRY(take_columns(set->modalities, most, &c->other));
  for (int32_t k = 0; k < set->shards; ++k) TRY(compare_shard(c, k));
  return CORE_OK;
}

core_status data_index_verify(const char *directory, const char *split, bool *found) {
  char names[CORE_MAX_MODALITIES][CORE_NAME], *path = NULL;
  const char *pointer[CORE_MAX_MODALITIES];
  data_set *by_index = NULL, *by_shards = NULL;
  int32_t count = 0;
  *found = false;
  TRY(data_text_priv(&path, "%s/%s/" DATA_INDEX_FILE, directory, split));
  comparison c = {.index = path};
  core_status status = CORE_OK;
  *found = core_file_exists(path);
  if (!*found) goto done;
  TRY_OUT(data_list_modalities(directory, split, names, &count), done);
  for (int32_t m = 0; m < count; ++m) pointer[m] = names[m];
  TRY_OUT(data_set_open(directory, split, pointer, count, &by_index), done);
  TRY_OUT(data_set_open_shards_priv(directory, split, pointer, count, &by_shards), done);
  c.by_index = by_index;
  c.by_shards = by_shards;
  TRY_OUT(compare_all(&c), done);
done:
  data_set_close(by_index);
  data_set_close(by_shards);
  free_columns(&c.one);
  free_columns(&c.other);
  free(c.scratch);
  free(path);
  return status;
}
