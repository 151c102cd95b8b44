/* Vectors file: what `antiphon embed` writes and `antiphon search` reads. An HDF5 file for everybody else
 * (README.md of this folder), with a block of our own before it, so that reading needs no HDF5: the thread of
 * a latent stream may be inside that library at the same time, and every number read here was checked
 * against a checksum first.
 *
 * A block is what came of `block_samples` consecutive samples of a split: the unit of work, of resuming and
 * of the checksums. Rows follow the order of the samples; samples without the modality have none. */
#ifndef TRAIN_VECTORS_H
#define TRAIN_VECTORS_H

#include <stdbool.h>
#include <stdio.h>

#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h"

/* A connector's keys of a modality and queries of a direction; a tower has one kind. */
typedef enum train_vectors_kind {
  TRAIN_VECTORS_KEY,
  TRAIN_VECTORS_QUERY,
  TRAIN_VECTORS_EMBEDDING
} train_vectors_kind;
const char *train_vectors_kind_text(train_vectors_kind kind);

/* What vectors are, and of what. */
typedef struct train_vectors_about {
  uint64_t checkpoint; /* ckpt_reader_content_hash */
  int64_t step;        /* of the checkpoint */
  train_vectors_kind kind;
  char modality[CORE_NAME]; /* whose latents went in */
  char toward[CORE_NAME];   /* of a query: the modality that it asks for; else empty */
  core_dtype dtype;         /* FLOAT16 or FLOAT32 */
  int64_t rows, width;      /* N, Z */
} train_vectors_about;

/* ---- writing ---- */

/* The whole file but for the vectors. Arrays are borrowed during the call. */
typedef struct train_vectors_plan {
  train_vectors_about about;
  uint64_t identity; /* of the work: equal for the same command on the same things */
  int64_t samples, block_samples, blocks;
  const uint64_t *block_row; /* [blocks + 1] first row of each block */
  const uint64_t *id;        /* [rows] */
  const int32_t *label;      /* [rows]; NULL: none */
  int64_t key_bytes;         /* of the longest key; 0: none */
} train_vectors_plan;

typedef struct train_vectors_writer train_vectors_writer;

/* How train_vectors_begin found things. */
typedef enum train_vectors_state {
  TRAIN_VECTORS_FRESH,   /* PATH.part was made */
  TRAIN_VECTORS_RESUMED, /* PATH.part was there */
  TRAIN_VECTORS_DONE     /* PATH is there already, whole: *out is NULL */
} train_vectors_state;

/* Makes PATH.part with everything but keys and vectors, or takes up the one that is there, and keeps other
 * processes from it. ERR_MISMATCH when PATH or PATH.part is of another identity; ERR_IO when another process
 * writes it. No latent stream may be open. Local: by one rank. */
CORE_NODISCARD core_status train_vectors_begin(const char *path, const train_vectors_plan *plan,
                                               train_vectors_state *state, train_vectors_writer **out);
/* Opens what the first rank has begun. Local. */
CORE_NODISCARD core_status train_vectors_attach(const char *path, train_vectors_writer **out);
/* done[b] = whether block b is there and matches its checksum; reads all of them. uint8 [blocks]. Local. */
CORE_NODISCARD core_status train_vectors_done(const train_vectors_writer *writer, uint8_t *done);
/* Keys of `count` rows from `row` on: char [count, key_bytes], padded with zero bytes. Local. */
CORE_NODISCARD core_status train_vectors_put_keys(const train_vectors_writer *writer, int64_t row,
                                                  int64_t count, const char *keys);
/* Rows of block b: [its rows, width] of the file's dtype. Different blocks may be put by different processes
 * at the same time. Local. */
CORE_NODISCARD core_status train_vectors_put(const train_vectors_writer *writer, int64_t block,
                                             const void *rows);
/* Bytes to the disk. Local; every rank before the first one publishes. */
CORE_NODISCARD core_status train_vectors_sync(const train_vectors_writer *writer);
/* ERR_INTERNAL unless every block was put. Completes the header and gives the file its name. Local. */
CORE_NODISCARD core_status train_vectors_publish(const train_vectors_writer *writer);
/* Closes; the file stays as it is. NULL is allowed. */
void train_vectors_leave(train_vectors_writer *writer);

/* ---- keys of latent shards ---- */

/* Strings of `key` in shard `shard` of a modality: *keys is malloc'ed [samples, *key_bytes], padded with zero
 * bytes, NULL where the shard has no keys. ERR_UNSUPPORTED beyond TRAIN_MOST_KEY bytes. No latent stream may
 * be open. Local. */
enum { TRAIN_MOST_KEY = 1024 };
CORE_NODISCARD core_status train_shard_keys(const char *directory, const char *split, const char *modality,
                                            int32_t shard, char **keys, int64_t *samples, int64_t *key_bytes);

/* ---- reading ---- */

typedef struct train_vectors train_vectors;

/* Checks header, sizes, ids, labels and keys. ERR_NOT_FOUND, ERR_FORMAT (not of this format, or not
 * finished), ERR_CORRUPT. Local. */
CORE_NODISCARD core_status train_vectors_open(const char *path, train_vectors **out);
void train_vectors_close(train_vectors *vectors);
const train_vectors_about *train_vectors_info(const train_vectors *vectors);
const char *train_vectors_path(const train_vectors *vectors);
const uint64_t *train_vectors_ids(const train_vectors *vectors);   /* [rows] */
const int32_t *train_vectors_labels(const train_vectors *vectors); /* [rows] or NULL */
int64_t train_vectors_blocks(const train_vectors *vectors);
/* First row of block b; b == blocks: the number of rows. */
int64_t train_vectors_block_row(const train_vectors *vectors, int64_t block);
/* Rows of blocks [first, last) as stored, into out; ERR_CORRUPT where one does not match its checksum. Safe
 * to call by several threads at once. Local. */
CORE_NODISCARD core_status train_vectors_read(const train_vectors *vectors, int64_t first, int64_t last,
                                              void *out);
/* Key of a row as text; empty where there are none. */
CORE_NODISCARD core_status train_vectors_key(const train_vectors *vectors, int64_t row,
                                             char text[TRAIN_MOST_KEY + 1]);

/* ---- inspect, check ---- */

/* Whether a file says at its beginning that it is one. */
bool train_vectors_is(const char *path);
/* What it holds, on `out`; deep: every block is read and compared with its checksum. */
CORE_NODISCARD core_status train_vectors_describe(const char *path, bool deep, FILE *out);

#endif
