/* Latent shards: format, writer, streaming reader, sample order. See data/README.md for the file format.
 *
 * A *set* is a directory with one sub-directory per split (train/, validation/), each holding
 * <modality>-<NNNNN>.h5. Shard k of every modality holds the same sample ids in the same order.
 *
 * Threads: one thread per stream reads through HDF5 (raw chunks only, under one process-wide lock); a pool
 * decompresses; the trainer takes batches from a bounded queue. Nothing here communicates: each rank opens
 * the set for itself and the launcher compares data_set_fingerprint over ranks. */
#ifndef DATA_DATA_H
#define DATA_DATA_H

#include <stdbool.h>
#include <stdio.h>

#include "core/device.h"
#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h"

/* ---- writing ---- */

typedef enum data_filter {
  DATA_FILTER_NONE,
  DATA_FILTER_GZIP,
  DATA_FILTER_SHUFFLE_GZIP,
  DATA_FILTER_ZSTD,
  DATA_FILTER_SHUFFLE_ZSTD
} data_filter;

typedef struct data_writer data_writer;

typedef struct data_writer_options {
  const char *directory; /* of the split; made if missing */
  const char *modality;
  const char *encoder;
  core_dtype dtype; /* FLOAT16, BFLOAT16 or FLOAT32 as stored */
  int64_t width;
  int32_t shard; /* NNNNN */
  data_filter filter;
  int32_t level;       /* of the filter; 0: default */
  int64_t chunk_bytes; /* 0: 512 KiB */
  const char *origin;  /* attribute of this name: what it was made from. NULL: none */
} data_writer_options;

/* One sample. Arrays are borrowed during the call. */
typedef struct data_sample {
  uint64_t id;
  const float *latent;            /* [rows, width], converted to the stored dtype */
  const void *stored;             /* instead of latent: [rows, width] in the stored dtype */
  int64_t rows;                   /* 0: lacks this modality */
  int32_t label;                  /* -1: none */
  const char *key;                /* NULL: no key dataset (all or none of a shard) */
  const int32_t *prompt, *target; /* NULL: none (all or none of a shard) */
  int64_t prompt_count, target_count;
} data_sample;

CORE_NODISCARD core_status data_writer_open(const data_writer_options *options, data_writer **out);
/* After a failure the shard can only be abandoned; closing it then fails and publishes nothing. */
CORE_NODISCARD core_status data_writer_add(data_writer *writer, const data_sample *sample);
/* Finishes the shard under its final name (temporary until then) and frees the writer, also on failure. */
CORE_NODISCARD core_status data_writer_close(data_writer *writer);
/* Abandons: removes the temporary file. NULL is allowed. */
void data_writer_abandon(data_writer *writer);

/* ---- what a directory holds ---- */

enum { DATA_MOST_SPLITS = 32 };
/* Sorted by name. ERR_NOT_FOUND when there are none. */
CORE_NODISCARD core_status data_list_splits(const char *directory, char names[DATA_MOST_SPLITS][CORE_NAME],
                                            int32_t *count);
CORE_NODISCARD core_status data_list_modalities(const char *directory, const char *split,
                                                char names[CORE_MAX_MODALITIES][CORE_NAME], int32_t *count);

/* ---- a set, opened and checked ---- */

typedef struct data_set data_set;

typedef struct data_modality_info {
  char name[CORE_NAME];
  char encoder[CORE_NAME];
  core_dtype dtype;
  int64_t width;
  int64_t tokens;  /* rows in all shards */
  int64_t longest; /* rows of the longest sample */
  int64_t absent;  /* samples of zero rows */
} data_modality_info;

/* Opens <directory>/<split>, which must hold every named modality. Checks of every shard: format, version,
 * attributes, shapes and types of datasets, offsets (start 0, non-decreasing, end T), known filters, equal
 * ids over modalities, no id twice. Latents themselves are read and checked (finite) when streamed.
 * With an index (data_index_build) no shard is opened: those checks were made then, and name, size and time
 * of change of every file are compared; a stream compares ids and offsets when it opens a shard. An index
 * that does not fit is an error, never a reason to read on without: an unfinished copy must not go unnoticed,
 * and ranks must not open the set in different ways. Errors name the file and what was expected:
 * ERR_NOT_FOUND, ERR_FORMAT, ERR_CORRUPT, ERR_MISMATCH. */
CORE_NODISCARD core_status data_set_open(const char *directory, const char *split,
                                         const char *const *modalities, int32_t modality_count,
                                         data_set **out);
void data_set_close(data_set *set);
int64_t data_set_samples(const data_set *set);
int32_t data_set_shards(const data_set *set);
const data_modality_info *data_set_modality(const data_set *set, int32_t m);
/* Hash of format, modalities, widths, shard sizes and all ids: equal on every rank, stored in checkpoints. */
uint64_t data_set_fingerprint(const data_set *set);
/* Least upper bound of the rows that `samples` consecutive samples of a stream can have together in modality
 * m. They may reach over the end of an epoch, so that a sample comes twice. */
int64_t data_set_most_rows(const data_set *set, int32_t m, int64_t samples);
bool data_set_has_labels(const data_set *set);

/* ---- the tokens of a set ---- */

/* A shard of any modality may carry the prompts and responses of its samples; where several do, they must
 * agree. */
typedef struct data_text_options {
  int64_t vocabulary;  /* a token lies in [0, vocabulary); of a prompt also a mark, each at most once */
  bool responses;      /* every sample must have one */
  const int32_t *mark; /* [modalities] the token -1 - mark[m] marks modality m; NULL: -1 - m. In memory it is
                          -1 - m in either case */
  int32_t marks; /* marks of which those that are nobody's stand for nothing (DATA_MARK_NOBODY in memory);
                    0: only those of the set's modalities may come */
} data_text_options;
/* A mark in a prompt of a modality that the set was opened without. */
enum { DATA_MARK_NOBODY = INT32_MIN };

/* Reads the tokens of all shards into memory, where they stay until the set is closed: 4 bytes a token and 16
 * a sample. They then belong to the fingerprint. Errors name file and sample: ERR_FORMAT (no tokens, a sample
 * without response), ERR_CORRUPT (a token outside the vocabulary, a mark of no modality or twice),
 * ERR_MISMATCH (modalities that disagree), those of reading. */
CORE_NODISCARD core_status data_set_take_text(data_set *set, const data_text_options *options);
typedef enum data_text_kind { DATA_TEXT_PROMPT, DATA_TEXT_TARGET, DATA_TEXT_BOTH } data_text_kind;
/* As data_set_most_rows, in tokens (marks count). After data_set_take_text. */
int64_t data_set_most_text(const data_set *set, data_text_kind kind, int64_t samples);
/* Tokens of all samples; most of one sample. */
int64_t data_set_text_tokens(const data_set *set, data_text_kind kind);
int64_t data_set_longest_text(const data_set *set, data_text_kind kind);

/* Called now and then in a long operation; a failure ends it. */
typedef core_status (*data_tick)(void *context);

/* ---- the index of a split ---- */

typedef struct data_index_options {
  const char *directory, *split;
  bool check_values; /* read all latents and note the samples with values that are not finite */
  int32_t threads;   /* for that; 0: 1 */
  data_tick tick;    /* during that; NULL: none */
  void *context;
} data_index_options;

typedef struct data_index_result {
  int64_t samples;
  int32_t shards, modalities;
  int64_t not_finite; /* samples, each modality by itself */
  int64_t bytes;      /* of the index */
} data_index_result;

/* Opens every shard of the split, all modalities, and writes <directory>/<split>/shards.index atomically.
 * Memory: 12 bytes a sample and 8 a sample and modality. Errors: those of data_set_open and of writing. */
CORE_NODISCARD core_status data_index_build(const data_index_options *options, data_index_result *out);
/* Compares an index, where there is one (*found), with all that the shards' headers say. */
CORE_NODISCARD core_status data_index_verify(const char *directory, const char *split, bool *found);

/* What becomes of samples with values that are not finite. */
typedef enum data_non_finite {
  DATA_NON_FINITE_ERROR,  /* ERR_NON_FINITE, naming the first in order */
  DATA_NON_FINITE_SKIP,   /* lacks the modality, on every rank alike: needs an index made with check_values */
  DATA_NON_FINITE_DELIVER /* as it is */
} data_non_finite;

/* Per-feature mean and population standard deviation of modality m over all rows that `policy` delivers, in
 * double, fixed order; reads everything once. mean, deviation: double [width]. tick (NULL: none) is called
 * data_set_moment_steps times, so that ranks that wait for this one can wait for steps of a few MiB and not
 * for a whole set. */
CORE_NODISCARD core_status data_set_moments(data_set *set, int32_t m, data_non_finite policy, data_tick tick,
                                            void *context, double *mean, double *deviation);
int64_t data_set_moment_steps(const data_set *set, int32_t m);

/* ---- order: pure functions ---- */

/* State of a stream: all there is to resume. */
typedef struct data_position {
  int64_t stage, epoch;
  int64_t consumed; /* samples of this epoch consumed, in [0, N]; (e, N) and (e + 1, 0) are the same place.
                       With homogeneous batches N is data_set_epoch_samples of the epoch */
} data_position;

typedef struct data_order_options {
  uint64_t seed;
  int64_t shuffle_samples; /* size of the shuffle buffer; 0: file order */
} data_order_options;

/* The n-th sample of (stage, epoch), n in [0, N): its index in the set (file order). Whole epoch: order int64
 * [N]. Shuffle = permutation of shards, then of samples inside consecutive buffers of `shuffle_samples`.
 * Depends on nothing else, in particular not on the rank count. */
CORE_NODISCARD core_status data_set_order(const data_set *set, const data_order_options *options,
                                          int64_t stage, int64_t epoch, int64_t *order);

/* ---- homogeneous batches ---- */

/* What becomes of the samples that make no whole batch at the end of an epoch. */
typedef enum data_incomplete {
  DATA_INCOMPLETE_CARRY, /* they begin the next epoch's batches: no sample is lost */
  DATA_INCOMPLETE_DROP   /* they are left out of this epoch */
} data_incomplete;

typedef struct data_group_options {
  int64_t batch; /* B */
  data_incomplete incomplete;
  data_non_finite non_finite;        /* SKIP: a sample that the index lists lacks the modality */
  int64_t rows[CORE_MAX_MODALITIES]; /* that an item of each modality counts as in its sample's length, where
                                        a model makes so many of it; 0: as many as it has */
} data_group_options;

/* Sorts the samples by signature, the set of modalities that they have, for batches of one signature each (Li
 * et al. 2024, the sampler of their code: grouped by modality, sorted by length within a step's batch, dealt
 * out evenly). After data_set_take_text, whose tokens count in a sample's length. From then on
 * data_set_most_rows and its like allow for batches in which a rare sample comes several times. Keeps 6 bytes
 * a sample; a stream adds 16. ERR_ARGUMENT where nothing would be left; those of reading the index. */
CORE_NODISCARD core_status data_set_group(data_set *set, const data_group_options *options);
/* Samples that epoch `epoch` delivers: N; of a grouped set whole batches of them. */
int64_t data_set_epoch_samples(const data_set *set, int64_t epoch);
/* The order of an epoch of a grouped set: order int64 [data_set_epoch_samples]. The samples of a signature
 * come in the order of data_set_order, epoch after epoch, and every B of them in turn are a batch, which
 * belongs to the epoch that completes it; with CARRY each therefore comes once in every epoch of its own.
 * Batches are permuted within as many as fill the shuffle buffer. A pure function of the options and (stage,
 * epoch), whatever the ranks. */
CORE_NODISCARD core_status data_set_grouped_order(const data_set *set, const data_order_options *options,
                                                  int64_t stage, int64_t epoch, int64_t *order);

/* ---- streaming ---- */

/* Samples [lo, hi) of a global batch, counted from its first. */
typedef struct data_range {
  int64_t lo, hi;
} data_range;

typedef struct data_stream data_stream;

typedef struct data_stream_options {
  data_order_options order;
  data_position start;
  int64_t batch;             /* B samples of a global batch; batches run on over the end of an epoch */
  int32_t micro_batches;     /* accumulation */
  const data_range *range;   /* [micro_batches][modalities]: which samples this rank wants, per modality */
  const data_range *text;    /* [micro_batches]: whose tokens, after data_set_take_text; NULL: nobody's */
  int32_t queue;             /* batches read ahead; 0: 2 */
  int32_t threads;           /* that decompress; 0: 1 */
  int64_t cache_bytes;       /* decompressed chunks kept; 0: 256 MiB. Should hold the shuffle buffer */
  const core_device *device; /* that the latents of batches will be copied to; NULL: none */
  data_non_finite non_finite;
  bool grouped; /* homogeneous batches, of a grouped set: `batch` is that of the groups */
  bool repeat;  /* false: the stream ends with the epoch (evaluation); the last batch may be short */
} data_stream_options;

/* One modality of one micro-batch. */
typedef struct data_part {
  int64_t lo, hi;  /* sample positions in the global batch */
  int64_t *offset; /* [hi - lo + 1] rows; an absent sample is empty */
  void *latent;    /* [offset[hi - lo], width] in the stored dtype (bfloat16 as uint16) */
  core_dtype dtype;
  int64_t width;
} data_part;

/* Tokens of one micro-batch, in the order of its samples. */
typedef struct data_text_part {
  int64_t lo, hi;                         /* sample positions in the global batch */
  int64_t *prompt_offset, *target_offset; /* [hi - lo + 1], from 0 */
  int32_t *prompt, *target;
} data_text_part;

typedef struct data_batch {
  int64_t samples;             /* B, fewer only in a last batch without repeat */
  data_position before, after; /* before.consumed < N; after.consumed <= N, and is where to resume */
  uint64_t *id;                /* [samples] of the whole global batch */
  int32_t *label;              /* [samples] */
  uint8_t *present;            /* [modalities][samples] rows > 0 */
  int32_t micro_batches, modalities;
  data_part *part;      /* [micro_batches][modalities] */
  data_text_part *text; /* [micro_batches]; NULL: not asked for */
  int64_t skipped;      /* places in `present` that DATA_NON_FINITE_SKIP cleared; the same on every rank */
} data_batch;

CORE_NODISCARD core_status data_stream_open(data_set *set, const data_stream_options *options,
                                            data_stream **out);
/* Next global batch, lent until data_stream_put; *batch = NULL at the end of a stream without repeat. All
 * memory is planned at open: no allocation here. Errors are those of reading, with shard and chunk; NaN or
 * infinite latents are ERR_NON_FINITE. While it has to wait it polls core_stop_requested: ERR_STOPPED; a
 * batch that is ready is handed out all the same. What comes before a damaged chunk is delivered first; the
 * error then stays. get and put of one stream belong to one thread. */
CORE_NODISCARD core_status data_stream_get(data_stream *stream, data_batch **batch);
void data_stream_put(data_stream *stream, data_batch *batch);
/* Seconds that data_stream_get has waited in all. Call it on the thread of get. */
double data_stream_waited(const data_stream *stream);
/* Sum of `skipped` of the batches got so far. Call it on the thread of get. */
int64_t data_stream_skipped(const data_stream *stream);
/* Bytes planned at open: queue, cache, threads. */
int64_t data_stream_bytes(const data_stream *stream);
/* Stops and joins the threads. */
void data_stream_close(data_stream *stream);

/* ---- packing: features into shards, a set into another form ---- */

typedef struct data_pack_progress {
  int32_t done, kept, shards; /* finished; of which were there before; in all */
} data_pack_progress;

typedef struct data_pack_options {
  /* One of the two. */
  const char *from; /* .npy or .safetensors: [N, width], [N, rows, width], or with offsets [T, width] */
  const char *from_set, *from_split; /* a split of a set */
  const char *latent_name;           /* tensor of `from`; NULL: the only one */
  const char *offsets, *ids,
      *labels; /* arrays of integers; from a .safetensors the tensors offset, id, label. NULL: none */
  const char *modality, *encoder; /* encoder NULL: as the set says */
  const char *to;                 /* directory of the split */
  core_dtype dtype;               /* CORE_DTYPE_COUNT: as it is */
  data_filter filter;
  int32_t level;             /* 0: default */
  int64_t chunk_bytes;       /* 0: 512 KiB */
  int64_t samples_per_shard; /* 0: 4096 */
  int32_t threads;           /* 0: 1; each makes one shard at a time */
  /* After every shard, never by two threads at once; a failure (ERR_STOPPED) ends the packing when the shards
   * under way are finished. NULL: none. */
  core_status (*progress)(void *context, const data_pack_progress *progress);
  void *context;
} data_pack_options;

/* Each finished shard appears at once and whole, with an attribute `origin` that says what it was made from:
 * called again with the same options and unchanged sources, finished shards are kept and the rest is made.
 * Samples, their order, ids, labels and (of a set) keys and tokens stay what they are. Errors: those of
 * reading and writing; ERR_MISMATCH when a shard is there that was made from something else. */
CORE_NODISCARD core_status data_pack(const data_pack_options *options, data_pack_progress *out);

/* ---- measuring ---- */

enum { DATA_MOST_ROUNDS = 64 };

typedef struct data_bench_options {
  const char *directory, *split;
  const char *const *modalities;
  int32_t modality_count;
  int32_t threads;         /* of either side */
  int32_t rounds;          /* 1 to DATA_MOST_ROUNDS */
  int64_t shuffle_samples; /* 0: file order */
} data_bench_options;

/* For one pass over a split. The limit: threads that only pread chunks and undo their filters, nothing kept.
 * The stream: data_stream_get of everything, the caller doing nothing else. A ratio is limit / stream, the
 * median over rounds that run one after the other: of time that passed, and of the processor time of all
 * threads, which other programs on the machine disturb less. Rates are to be taken from the shortest times.
 */
typedef struct data_bench_result {
  int64_t samples, decoded_bytes, stored_bytes;
  double stream_seconds, limit_seconds; /* shortest */
  double wall_ratio, processor_ratio;
} data_bench_result;

CORE_NODISCARD core_status data_bench(const data_bench_options *options, data_bench_result *out);

/* ---- looking at one file: inspect, check ---- */

/* Human-readable description of a shard on `out` (a FILE *). deep: also reads and checks every chunk and
 * value except the keys. */
CORE_NODISCARD core_status data_shard_describe(const char *path, bool deep, FILE *out);
/* True when the file is HDF5 and says format = antiphon-latents. */
bool data_shard_is(const char *path);

#endif
