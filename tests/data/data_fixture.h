/* Sets of latents whose every value is known: value, rows and label are functions of (modality, sample id),
 * exactly representable in all stored types. */
#ifndef DATA_FIXTURE_H
#define DATA_FIXTURE_H

#include "data/data.h"

/* A fresh directory under the build's temporary directory; removed with all it holds by fixture_remove. */
void fixture_directory(char path[256]);
void fixture_remove(const char *path);

typedef struct fixture {
  char directory[256];
  int32_t modalities;
  const char *const *names;
  int64_t width[3];
  int64_t most_rows; /* of a sample; a fifth of the samples has none */
  core_dtype dtype;
  data_filter filter;
  int64_t chunk_bytes;
  int32_t shards;
  int64_t shard_samples; /* the last shard has half of them */
} fixture;

/* Small defaults: three modalities, three shards, zstd, chunks of 1 KiB. */
fixture fixture_small(void);
/* Writes <directory>/<split>. */
void fixture_write(const fixture *f, const char *split);
data_set *fixture_open(const fixture *f, const char *split);

uint64_t fixture_id(int64_t index); /* of the index-th sample in file order: neither sorted nor dense */
int64_t fixture_rows(const fixture *f, int32_t m, uint64_t id);
int32_t fixture_label(uint64_t id);
float fixture_value(int32_t m, uint64_t id, int64_t row, int64_t feature);
/* The samples of f in all. */
int64_t fixture_samples(const fixture *f);

float fixture_stored(core_dtype dtype, const void *values, int64_t index);
/* Asserts that ids, labels, presence and every latent of the batch are right; order: int64 [batch->samples]
 * indices. */
void fixture_check_batch(const fixture *f, const data_batch *batch, const int64_t *order);

/* Asserts the code, and that the message contains every one of the texts (NULL: none). */
void fixture_expect(core_status status, core_status code, const char *first, const char *second);

#endif
