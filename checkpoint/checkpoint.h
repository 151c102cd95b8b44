/* Checkpoints: named, globally indexed tensors in verified zstd files. See checkpoint/README.md for the
 * format.
 *
 *   <directory>/step-00000123/          published: complete, fsynced, renamed from step-00000123.tmp
 *     rank-00000.ckpt ...               blocks of ~1 MiB, each an independent zstd frame with checksum
 *     manifest.json                     written last: files, sizes, checksums, tensors, meta
 *
 * A tensor is known by its global name, dtype and shape; a rank holds a flat range of its elements. What is
 * saved at one layout can therefore be loaded at any other. */
#ifndef CKPT_CHECKPOINT_H
#define CKPT_CHECKPOINT_H

#include <stdbool.h>
#include <stdio.h>

#include "comm/comm.h"
#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h"

/* An owned range of a tensor that begins inside it must begin at a multiple of this many elements: a cell is
 * the unit of storage and of the content hash. */
enum { CKPT_CELL = 1 << 18 };
/* Private copies of the state that a writer may hold. */
enum { CKPT_MOST_BUFFERS = 2 };

typedef struct ckpt_tensor {
  const char *name; /* "parameter/blocks.1.experts.5.w_in", at most CORE_NAME - 1 bytes; borrowed */
  core_dtype dtype;
  int32_t rank;
  int64_t shape[CORE_MAX_RANK]; /* of the whole tensor */
  int64_t first, count;         /* elements this rank holds */
  void *data;                   /* [count] */
  const core_device *device;    /* where data lie; NULL: host memory */
  bool owner;                   /* this rank writes the range (exactly one rank must); others only load it */
} ckpt_tensor;

typedef struct ckpt_options {
  const char *directory; /* of all checkpoints; made if missing */
  int32_t keep;          /* published checkpoints kept, >= 1; 0: 3 */
  int32_t level;         /* zstd; 0: 1 */
  int32_t threads;       /* that compress; 0: 1 */
  int32_t buffers;       /* private copies, of all owned bytes each: saves that may be pending; 0: 1 */
  /* The first from each multiple of this on is never removed (a save may be late); 0: none. */
  int64_t keep_every;
  int64_t spare; /* this step is not removed either; 0: none */
} ckpt_options;

/* ---- saving ---- */

typedef struct ckpt_writer ckpt_writer;

/* Plans and touches the private copies (all owned bytes, `buffers` times), makes the directory and clears
 * what a crash left in it. Descriptions and names are copied; the data stay borrowed until the writer is
 * destroyed. Coverage is checked: every element of every tensor is owned exactly once over all ranks, else
 * ERR_INTERNAL; an owned range ends at the tensor's end or at a multiple of CKPT_CELL. Collective over
 * `control`. */
CORE_NODISCARD core_status ckpt_writer_create(comm_group *control, const ckpt_options *options,
                                              const ckpt_tensor *tensor, int32_t count, ckpt_writer **out);
/* Copies the owned ranges (data may change afterwards) and writes in the background, behind the save that is
 * being written, if there is one. `meta` is JSON text (rank 0's is stored, verbatim). Where no copy is free,
 * or a save of this step is pending, the saves before are finished and published first, until that is no
 * longer so; if one of them fails, its error is returned and nothing is begun. A published checkpoint of the
 * same step is replaced at the commit. Collective. */
CORE_NODISCARD core_status ckpt_writer_begin(ckpt_writer *writer, int64_t step, const char *meta);
/* True while a save is pending: begun and not yet committed. Equal on all ranks. */
bool ckpt_writer_busy(const ckpt_writer *writer);
/* True while no copy is free for another save. Equal on all ranks. */
bool ckpt_writer_full(const ckpt_writer *writer);
/* Step of the oldest pending save, which is committed next; -1: none is pending. Equal on all ranks. */
int64_t ckpt_writer_oldest(const ckpt_writer *writer);
/* This rank's part of the oldest pending save is written and synced (or failed), or none is pending. Local:
 * agree on it before ckpt_writer_commit. */
bool ckpt_writer_ready(ckpt_writer *writer);
/* Of the oldest pending save: waits for this rank's part, agrees on the outcome, publishes, retains. So saves
 * are published in the order of their begins. On failure its temporary directory is removed, earlier
 * checkpoints and the save behind it are untouched and the error is returned on all ranks: the caller may go
 * on training and save again. Old checkpoints that cannot be removed are a warning, not an error. With keep =
 * 1 the file is read back from the disk before the older one goes. Collective. */
CORE_NODISCARD core_status ckpt_writer_commit(ckpt_writer *writer);
/* Seconds that the last ckpt_writer_begin stalled for the copy; of the last save committed, seconds of
 * writing in the background and bytes raw and stored on this rank. */
typedef struct ckpt_figures {
  double stall_seconds, write_seconds;
  int64_t raw_bytes, stored_bytes;
} ckpt_figures;
void ckpt_writer_figures(const ckpt_writer *writer, ckpt_figures *out);
/* From now on `step` is the one that retention spares. Local, rank 0's counts. */
void ckpt_writer_spare(ckpt_writer *writer, int64_t step);
int64_t ckpt_writer_bytes(const ckpt_writer *writer); /* memory planned */
/* Joins the threads; saves that were begun and not committed are abandoned (their .tmp removed). Local. */
void ckpt_writer_destroy(ckpt_writer *writer);

/* The name under which a directory of checkpoints shows its best one: a link to step-<NNNNNNNN> that
 * retention leaves alone. It is a checkpoint's path like any other. */
#define CKPT_BEST "best"

/* Makes the published checkpoint of `step` the best one, atomically and durably: at any moment the name is
 * the old one's or the new one's. Does nothing where it is already, or where no such step is published. Call
 * it while no save is being committed, on one rank. ERR_IO. Local. */
CORE_NODISCARD core_status ckpt_mark_best(const char *directory, int64_t step);

/* ---- loading ---- */

typedef struct ckpt_reader ckpt_reader;

/* Opens one published checkpoint: rank 0 reads the manifest, all check it. ERR_NOT_FOUND. Collective. */
CORE_NODISCARD core_status ckpt_reader_open(comm_group *control, const char *path, ckpt_reader **out);
/* Newest checkpoint under `directory` that verifies (all blocks, shared out over the ranks); says on the log
 * which ones were passed over and why. *out = NULL when there is none at all; ERR_CORRUPT when there are some
 * and none is sound; ERR_UNSUPPORTED when the newest is sound but of a later format: going back would lose
 * work. What cannot be read is tried four times before it is passed over. threads: of this rank, as
 * ckpt_reader_threads, for verifying and then for loading. Collective. */
CORE_NODISCARD core_status ckpt_reader_newest(comm_group *control, const char *directory, int32_t threads,
                                              ckpt_reader **out);
const char *ckpt_reader_meta(const ckpt_reader *reader); /* JSON text, lent */
const char *ckpt_reader_path(const ckpt_reader *reader);
int64_t ckpt_reader_step(const ckpt_reader *reader);
/* Fills every given range, which may begin and end anywhere. ERR_MISMATCH names the first tensor that is
 * missing or of another dtype or shape. ERR_CORRUPT names file and block; the data are then undefined.
 * Tensors that nobody asks for are ignored. Reads only the blocks needed, verifies each. Collective. */
CORE_NODISCARD core_status ckpt_reader_load(ckpt_reader *reader, const ckpt_tensor *tensor, int32_t count);
/* Looks a tensor up: its dtype and shape. ERR_NOT_FOUND. Local. */
CORE_NODISCARD core_status ckpt_reader_find(const ckpt_reader *reader, const char *name, ckpt_tensor *out);
/* Number of tensors, and tensor i, ordered by name, as ckpt_reader_find describes one; the name is lent.
 * Local.
 */
int32_t ckpt_reader_count(const ckpt_reader *reader);
void ckpt_reader_at(const ckpt_reader *reader, int32_t i, ckpt_tensor *out);
/* Canonical hash over names, shapes and contents: equal whatever layout wrote it. */
uint64_t ckpt_reader_content_hash(const ckpt_reader *reader);
/* Threads of this rank that read, decompress and verify; 1 unless told. ERR_ARGUMENT. Local. */
CORE_NODISCARD core_status ckpt_reader_threads(ckpt_reader *reader, int32_t threads);
void ckpt_reader_close(ckpt_reader *reader);

/* ---- inspect, check (one process) ---- */

bool ckpt_is(const char *path); /* a directory with a manifest.json that names our format */
CORE_NODISCARD core_status ckpt_describe(const char *path, FILE *out);
/* Every block, every checksum, coverage. What was checked goes to `out`, which may be NULL. */
CORE_NODISCARD core_status ckpt_verify(const char *path, FILE *out);

typedef enum ckpt_bench_format { CKPT_BENCH_TABLE, CKPT_BENCH_JSON } ckpt_bench_format;
/* Saves and loads about `bytes` of float32 state in `directory`/bench and prints sizes, wall and processor
 * time and their ratios to memcpy and zstd of the same bytes, as a table or as one line of JSON. The state is
 * that of the newest checkpoint in `directory` (kinds parameter, adam_m and adam_v, repeated as often as it
 * takes); made up when there is none. One rank. */
CORE_NODISCARD core_status ckpt_bench(comm_group *control, const char *directory, int64_t bytes,
                                      ckpt_bench_format format, FILE *out);

#endif
