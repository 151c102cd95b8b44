/* A set in memory: read-only after opening, so streams share it without locks. Private to data/.
 *
 * What is kept of each sample depends on how the set was opened. From the headers of its shards: everything
 * but the latents. From an index: nothing; a stream reads what it needs of the index, a shuffle buffer at a
 * time. */
#ifndef DATA_SET_IMPL_H
#define DATA_SET_IMPL_H

#include "data/data.h"
#include "data/shard_impl.h"

/* Samples that have `rows` rows; runs are sorted by falling rows. */
typedef struct data_length_run {
  int64_t rows, samples;
} data_length_run;

/* Columns of some samples, one array a column. */
typedef struct data_samples {
  uint64_t *id;
  int32_t *label, *shard;
  int64_t *first[CORE_MAX_MODALITIES]; /* row of the shard at which the sample begins */
  int32_t *rows[CORE_MAX_MODALITIES];  /* 0: lacks the modality */
  int64_t *sample;                     /* number in the set; NULL where nobody asks for tokens */
} data_samples;

/* Prompts and targets of all samples, in file order. */
typedef struct data_text {
  int32_t *token[2];       /* by data_text_kind */
  int64_t *offset[2];      /* [samples + 1] */
  data_length_run *run[3]; /* of lengths, by data_text_kind */
  int64_t runs[3];
} data_text;

typedef struct data_index data_index;   /* index_impl.h */
typedef struct data_groups data_groups; /* groups_impl.h */

struct data_set {
  int32_t modalities, shards;
  int64_t samples;
  data_modality_info *info; /* [modalities] */
  data_column *column;      /* [modalities][shards] */
  int64_t *sample_base;     /* [shards + 1] first sample of each shard in file order */
  uint64_t *id_hash;        /* [shards] of the ids of each */
  bool has_labels;
  data_length_run **run; /* [modalities][runs] */
  int64_t *runs;         /* [modalities] */
  uint64_t fingerprint;
  uint64_t *id;        /* [samples], NULL with an index */
  int32_t *label;      /* [samples], NULL with an index */
  data_index *index;   /* NULL: none */
  data_text *text;     /* NULL: not taken */
  data_groups *groups; /* NULL: not grouped */
};

static inline const data_column *data_set_column_priv(const data_set *set, int32_t m, int32_t shard) {
  return &set->column[(int64_t)m * set->shards + shard];
}

/* The shard that holds sample `index` of the file order. */
int32_t data_set_shard_of_priv(const data_set *set, int64_t index);

/* Samples [first, first + count) of shard k into `out` from place `at` on. scratch: bytes as
 * data_set_scratch_priv says. Errors: those of reading the index, ERR_CORRUPT when it is damaged. */
CORE_NODISCARD core_status data_set_read_samples_priv(const data_set *set, int32_t k, int64_t first,
                                                      int64_t count, uint8_t *scratch,
                                                      const data_samples *out, int64_t at);
int64_t data_set_scratch_priv(const data_set *set);
/* Runs of `count` lengths, which are sorted on the way; freed by the caller. And the most that `samples`
 * consecutive samples of a stream can have, who may reach over the end of an epoch. */
CORE_NODISCARD core_status data_runs_make_priv(uint64_t *length, int64_t count, data_length_run **run,
                                               int64_t *runs);
int64_t data_runs_most_priv(const data_set *set, const data_length_run *run, int64_t runs, int64_t samples);
void data_text_free_priv(data_text *text); /* NULL is allowed */
/* Samples of about 4 MiB of latents: a batch for passing over a modality once. */
int64_t data_set_moment_batch_priv(const data_set *set, int32_t m);

/* ---- opening, in parts ---- */

/* An empty set; data_set_close frees it, also when this fails in the middle. */
CORE_NODISCARD core_status data_set_create_priv(int32_t modalities, int32_t shards, data_set **out);
/* Sets the fingerprint from everything else. */
void data_set_seal_priv(data_set *set);
/* Opens from the headers of all shards, whether or not there is an index. */
CORE_NODISCARD core_status data_set_open_shards_priv(const char *directory, const char *split,
                                                     const char *const *modalities, int32_t modality_count,
                                                     data_set **out);
/* What lies in <directory>/<split>: number of shards, which every modality must have without a gap. */
CORE_NODISCARD core_status data_list_shards_priv(const char *directory, const char *split,
                                                 const char *const *modalities, int32_t modality_count,
                                                 int32_t *shards);
/* A set of one shard and its one modality, for looking at a file. */
CORE_NODISCARD core_status data_set_open_file_priv(const char *path, data_set **out);

#endif
