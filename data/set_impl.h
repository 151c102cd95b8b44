/* A set in memory: read-only after opening, so streams share it without locks. Private to data/. */
#ifndef DATA_SET_IMPL_H
#define DATA_SET_IMPL_H

#include "data/data.h"
#include "data/shard_impl.h"

/* Samples that have `rows` rows; runs are sorted by falling rows. */
typedef struct data_length_run {
  int64_t rows, samples;
} data_length_run;

struct data_set {
  int32_t modalities, shards;
  int64_t samples;
  data_modality_info *info; /* [modalities] */
  data_column *column;      /* [modalities][shards] */
  int64_t *sample_base;     /* [shards + 1] first sample of each shard in file order */
  uint64_t *id;             /* [samples] */
  int32_t *label;           /* [samples] */
  bool has_labels;
  data_length_run **run; /* [modalities][runs] */
  int64_t *runs;         /* [modalities] */
  uint64_t fingerprint;
};

static inline const data_column *data_set_column_priv(const data_set *set, int32_t m, int32_t shard) {
  return &set->column[(int64_t)m * set->shards + shard];
}

/* The shard that holds sample `index` of the file order. */
int32_t data_set_shard_of_priv(const data_set *set, int64_t index);
/* Rows of a sample: [*first, return) of its shard. */
int64_t data_set_rows_priv(const data_set *set, int32_t m, int64_t index, int64_t *first);

/* What lies in <directory>/<split>: number of shards, which every modality must have without a gap. */
CORE_NODISCARD core_status data_list_shards_priv(const char *directory, const char *split,
                                                 const char *const *modalities, int32_t modality_count,
                                                 int32_t *shards);
/* A set of one shard and its one modality, for looking at a file. */
CORE_NODISCARD core_status data_set_open_file_priv(const char *path, data_set **out);

#endif
