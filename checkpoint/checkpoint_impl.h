/* Private parts of checkpoint/: the layout on disk, the block codec, the manifest, one rank's file, the
 * directory of checkpoints. README.md describes the format. Reading order: plane.c, rank_file.c,
 * manifest_write.c, manifest_read.c, catalogue.c, publish.c, save.c, save_buffers_impl.h, writer.c,
 * writer_commit.c, reader.c, inspect.c. */
#ifndef CKPT_CHECKPOINT_IMPL_H
#define CKPT_CHECKPOINT_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <zstd.h>

#include "checkpoint/checkpoint.h"
#include "core/arena.h" /* core_arena */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "checkpoints are read and written as they lie in memory");

#define CKPT_FORMAT "antiphon-checkpoint"
#define CKPT_MANIFEST "manifest.json"
#define CKPT_MAGIC "ANTICKPT"
#define CKPT_END_MAGIC "TPKCITNA"

enum {
  CKPT_VERSION = 1,
  CKPT_BYTE_ORDER = 0x01020304,
  CKPT_PLANES = 8,                                                /* most planes of one block */
  CKPT_BLOCK_BYTES = CKPT_CELL * 8,                               /* most raw bytes of one block */
  CKPT_STORED_BYTES = CKPT_BLOCK_BYTES + (CKPT_BLOCK_BYTES >> 6), /* room that encoding a block needs */
  CKPT_PATH = 4096,
  CKPT_MAX_THREADS = 64,
  CKPT_MAX_FILES = 1 << 20,
  CKPT_NO_STEP = -1
};

/* ---- plane.c: one block between raw and stored form ---- */

/* What the index says of one block. A plane whose stored size is its raw size is stored as it is, else as one
 * zstd frame. Unused sizes are 0. */
typedef struct ckpt_entry {
  uint64_t raw_hash;    /* XXH64 of the block's elements; also the cell's part in the content hash */
  uint64_t stored_hash; /* XXH64 of the stored bytes: finds flips that a decoder would not notice */
  uint32_t size[CKPT_PLANES];
} ckpt_entry;
_Static_assert(sizeof(ckpt_entry) == 48, "the index is written as it lies in memory");

/* Contexts and scratch of one thread. Owns the contexts; `plane` is lent. */
typedef struct ckpt_codec {
  ZSTD_CCtx *compress;
  ZSTD_DCtx *decompress;
  uint8_t *plane; /* [CKPT_BLOCK_BYTES] */
  int32_t level;
} ckpt_codec;

CORE_NODISCARD core_status ckpt_codec_open(ckpt_codec *codec, int32_t level, uint8_t *plane);
void ckpt_codec_close(ckpt_codec *codec);
/* Planes into which a block of this type is split: the element's bytes for floating point, else 1. */
int32_t ckpt_plane_count(core_dtype dtype);
/* Sum of the stored sizes. */
size_t ckpt_entry_bytes(const ckpt_entry *entry);
/* raw: [count] elements, 0 < count <= CKPT_CELL; out: CKPT_STORED_BYTES. Fills *entry. */
CORE_NODISCARD core_status ckpt_block_encode(ckpt_codec *codec, core_dtype dtype, const void *restrict raw,
                                             int64_t count, uint8_t *restrict out, ckpt_entry *entry);
/* Checks both hashes. stored: ckpt_entry_bytes(entry). raw: [count], not aliased. ERR_CORRUPT. */
CORE_NODISCARD core_status ckpt_block_decode(ckpt_codec *codec, core_dtype dtype, const ckpt_entry *entry,
                                             const uint8_t *restrict stored, int64_t count,
                                             void *restrict raw);

/* ---- manifest_write.c, manifest_read.c: the catalogue of a checkpoint ---- */

typedef struct ckpt_file {
  int64_t bytes, blocks;
  uint64_t index_hash;
} ckpt_file;

typedef struct ckpt_part {
  int32_t tensor, file;
  int64_t first, count; /* elements; first is a multiple of CKPT_CELL */
  int64_t block;        /* number of its first block in the file */
} ckpt_part;

typedef struct ckpt_item {
  char name[CORE_NAME];
  core_dtype dtype;
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
  int64_t count;       /* product of the shape */
  int64_t part, parts; /* its parts, ordered by `first`, cover it exactly once */
  uint64_t hash;
} ckpt_item;

/* Everything a manifest says. The writer's rank 0 makes one from what the ranks declare, the reader from the
 * file. Owns its arrays (malloc). */
typedef struct ckpt_manifest {
  int64_t step;
  char *meta;
  int32_t files, items;
  int64_t parts;
  ckpt_file *file;
  ckpt_item *item; /* ordered by name (strcmp), names distinct */
  ckpt_part *part; /* ordered by tensor, first */
  int64_t *order;  /* [parts] part numbers ordered by file, then as in `part`: the order in the file */
  int64_t *begin;  /* [files + 1] where each file's parts begin in `order` */
  uint64_t content_hash;
} ckpt_manifest;

void ckpt_manifest_free(ckpt_manifest *manifest); /* what it owns; NULL members are fine */
/* Checks names, shapes and coverage and derives item.part/parts, part.block, order, begin. *blocks, if not
 * NULL, receives the number of blocks of each file [files]. Code: what a violation is here. */
CORE_NODISCARD core_status ckpt_manifest_link(ckpt_manifest *manifest, core_status code, int64_t *blocks);
/* Product of a shape; -1 if a size is negative or the bytes exceed 2^62. */
int64_t ckpt_shape_count(core_dtype dtype, int32_t rank, const int64_t *shape);
bool ckpt_name_valid(const char *name);
int64_t ckpt_cells(int64_t count);
/* "[3, 4]" into out[96]; returns out. */
const char *ckpt_shape_text(int32_t rank, const int64_t *shape, char out[96]);

/* Hash of a tensor from the hashes of its cells: hash_of(context, part, cell) gives the raw hash. */
typedef uint64_t (*ckpt_cell_hash)(const void *context, const ckpt_part *part, int64_t cell);
uint64_t ckpt_item_hash(const ckpt_manifest *manifest, const ckpt_item *item, ckpt_cell_hash hash_of,
                        const void *context);
/* Hash over names, types, shapes and item hashes. */
uint64_t ckpt_content_hash(const ckpt_manifest *manifest);
/* The manifest as text, malloc'ed, its own hash at the end. */
CORE_NODISCARD core_status ckpt_manifest_print(const ckpt_manifest *manifest, char **text, size_t *count);
/* Parses and checks everything that needs no other file. Errors: ERR_CORRUPT, ERR_FORMAT, ERR_UNSUPPORTED. */
CORE_NODISCARD core_status ckpt_manifest_parse(const char *text, size_t count, ckpt_manifest *out);
/* Text of <path>/manifest.json, malloc'ed. ERR_NOT_FOUND when there is none. */
CORE_NODISCARD core_status ckpt_manifest_text(const char *path, char **text, int64_t *count);
/* Parses with errors that name the path, and checks the step against the directory's name. */
CORE_NODISCARD core_status ckpt_manifest_take(const char *path, const char *text, int64_t count,
                                              ckpt_manifest *out);

/* ---- rank_file.c: one rank's file ---- */

typedef struct ckpt_header {
  char magic[8];
  uint32_t version, byte_order;
  int64_t step;
  uint32_t file, files, cell;
  uint32_t reserved[7]; /* 0 */
} ckpt_header;
_Static_assert(sizeof(ckpt_header) == 64, "written as it lies in memory");

typedef struct ckpt_trailer {
  int64_t index_offset, blocks;
  uint64_t index_hash; /* XXH64 of header, index, index_offset and blocks */
  char magic[8];
} ckpt_trailer;
_Static_assert(sizeof(ckpt_trailer) == 32, "written as it lies in memory");

ckpt_header ckpt_header_make(int64_t step, int32_t file, int32_t files);
ckpt_trailer ckpt_trailer_make(const ckpt_header *header, const ckpt_entry *entry, int64_t blocks,
                               int64_t index_offset);

/* An open rank file with its index. */
typedef struct ckpt_rank_file {
  char path[CKPT_PATH];
  int fd;
  int32_t number;
  int64_t blocks;
  ckpt_entry *entry; /* [blocks] */
  int64_t *offset;   /* [blocks + 1] */
} ckpt_rank_file;

/* Opens file `number` of the checkpoint at `path` and checks header, trailer and index against the manifest.
 */
CORE_NODISCARD core_status ckpt_rank_file_open(const char *path, const ckpt_manifest *manifest,
                                               int32_t number, ckpt_rank_file *out);
void ckpt_rank_file_close(ckpt_rank_file *file); /* also after a failed open */
/* Reads cell `cell` of a part (numbered within the part) into raw. stored: scratch, CKPT_STORED_BYTES. */
CORE_NODISCARD core_status ckpt_rank_file_read(const ckpt_rank_file *file, const ckpt_manifest *manifest,
                                               const ckpt_part *part, int64_t cell, ckpt_codec *codec,
                                               uint8_t *stored, void *raw);

/* ---- verify.c ---- */

/* Work of this rank that the other ranks wait for. */
typedef struct ckpt_errand {
  atomic_bool done;
  atomic_llong progress; /* grows while it gets on */
} ckpt_errand;

/* Until every rank's errand is done. A long one is no reason to give the job up: the ranks meet again and
 * again while it gets on. One that is done sleeps in between: waiting for messages would take the processor
 * from those that still work. Collective. */
CORE_NODISCARD core_status ckpt_wait_for_all(comm_group *control, const ckpt_errand *errand);
/* Reads and checks every block of file `number` on `threads` threads. progress: counts blocks; optional.
 * Local. */
CORE_NODISCARD core_status ckpt_rank_file_verify(const char *path, const ckpt_manifest *manifest,
                                                 int32_t number, int32_t threads, atomic_llong *progress);
/* Recomputes every tensor's hash from the indices of all files. Local. */
CORE_NODISCARD core_status ckpt_verify_hashes(const char *path, const ckpt_manifest *manifest);
/* Both, the files divided among the ranks. The same status everywhere. Collective. */
CORE_NODISCARD core_status ckpt_verify_together(comm_group *control, const char *path,
                                                const ckpt_manifest *manifest, int32_t threads);

/* ---- catalogue.c: what the ranks declare ---- */

/* Checks one tensor of a caller. `need_data`: a range with elements must have memory. */
CORE_NODISCARD core_status ckpt_tensor_check(const ckpt_tensor *tensor);
/* Gathers all ranks' tensors on rank 0 and checks that their owned ranges cover everything exactly once.
 * *out is filled on rank 0, empty elsewhere. Collective. */
CORE_NODISCARD core_status ckpt_catalogue_gather(comm_group *control, const ckpt_tensor *tensor,
                                                 int32_t count, ckpt_manifest *out);

/* ---- publish.c: the directory of checkpoints ---- */

typedef enum ckpt_place_kind { CKPT_PUBLISHED, CKPT_REPLACED, CKPT_UNFINISHED } ckpt_place_kind;
/* step-X, step-X.old (being replaced by a newer save of the same step), step-X.tmp. */
typedef struct ckpt_place {
  int64_t step;
  int32_t kind;     /* ckpt_place_kind */
  int32_t manifest; /* 1 when there is a manifest.json */
} ckpt_place;

CORE_NODISCARD core_status ckpt_path(char out[CKPT_PATH], const char *format, ...) CORE_PRINTF(2, 3);
CORE_NODISCARD core_status ckpt_place_path(const char *directory, int64_t step, ckpt_place_kind kind,
                                           char out[CKPT_PATH]);
/* Step and kind that a directory's name tells; false for any other name. */
bool ckpt_place_parse(const char *name, ckpt_place *out);
/* Whether a checkpoint that fails with this status is passed over for an older one. */
bool ckpt_is_damage(core_status status);
/* All places, newest first, published before replaced; malloc'ed. A directory that does not exist has none.
 */
CORE_NODISCARD core_status ckpt_places(const char *directory, ckpt_place **out, int32_t *count);
/* Removes a checkpoint directory, manifest first; goes on after a failure and returns the first. Files that
 * are not ours stay, and so does the directory then. */
CORE_NODISCARD core_status ckpt_remove(const char *path);
/* Puts back a replaced checkpoint whose successor never arrived; removes what is unfinished, but for the save
 * of step `pending` (CKPT_NO_STEP: none), which is being written. */
CORE_NODISCARD core_status ckpt_clean(const char *directory, int64_t pending);
/* Makes an empty step-X.tmp. */
CORE_NODISCARD core_status ckpt_prepare(const char *directory, int64_t step);
/* Writes the manifest into step-X.tmp and makes it step-X. */
CORE_NODISCARD core_status ckpt_publish(const char *directory, const ckpt_manifest *manifest);
/* Removes what the options do not keep, among the steps up to `newest`, which was just published, and cleans
 * up as ckpt_clean does. */
CORE_NODISCARD core_status ckpt_retain(const ckpt_options *options, int64_t newest, int64_t pending);

/* ---- save.c: the writing thread ---- */

typedef struct ckpt_block {
  const uint8_t *raw; /* in the private copy */
  int32_t count, dtype;
} ckpt_block;

/* One save in the background. The main thread fills it in before the start and reads it after the join; in
 * between it touches the atomics only. */
typedef struct ckpt_save {
  char path[CKPT_PATH]; /* the rank's file */
  char directory[CKPT_PATH];
  ckpt_header header;
  const ckpt_block *block; /* [blocks] */
  int64_t blocks;
  ckpt_entry *entry; /* [blocks] out */
  int64_t *offset;   /* [blocks] out: where they begin in the file */
  ckpt_codec *codec; /* [threads] */
  uint8_t **slot;    /* [2 * threads], CKPT_STORED_BYTES each */
  int32_t threads;
  bool past_cache;    /* read back from the disk, not from the page cache */
  core_status status; /* out, with error */
  core_error error;
  ckpt_file file;         /* out */
  double seconds;         /* out */
  ckpt_errand errand;     /* gets on with every block written and read back */
  int64_t turn;           /* saves begun before this one: it begins when so many have finished */
  atomic_llong *finished; /* of the writer; grows when this one has ended, well or not */
  atomic_bool cancel;
  atomic_bool hold; /* tests: the thread waits before its first block */
} ckpt_save;

CORE_NODISCARD core_status ckpt_save_start(ckpt_save *save, pthread_t *thread);

/* Tests only: makes the writing thread wait before it reads the private copy. */
void ckpt_writer_hold_priv(ckpt_writer *writer, bool hold);

/* ---- parallel.c ---- */

/* Runs work(context, worker, item) for every item on `threads` threads, the caller's among them; after a
 * failure no new item is begun, and the failure of the lowest item is returned. */
typedef core_status (*ckpt_work)(void *context, int32_t worker, int64_t item);
CORE_NODISCARD core_status ckpt_parallel(int32_t threads, int64_t items, ckpt_work work, void *context);
/* From now on the calling thread, and those that it starts, give way to others: lower priority for processors
 * (nice) and for the disk. Best effort: nothing depends on it but speed. */
enum { CKPT_NICE = 10 };
void ckpt_thread_give_way(void);
/* pthread_create with all signals blocked: they belong to the main thread. */
CORE_NODISCARD core_status ckpt_thread_start(pthread_t *thread, void *(*function)(void *), void *argument);

#endif
