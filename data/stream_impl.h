/* The inside of a stream. Private to data/.
 *
 *   reader      plans batches in order, says for every piece of a band that they need where it will lie,
 * finds where its chunks lie in the file, and queues them; the only thread of the stream inside HDF5 workers
 * read stored chunks (pread, outside HDF5), undo their filters, look for NaN assembler   waits for the pieces
 * in the planned order and copies those that lie in the cache consumer    the caller of data_stream_get
 *
 * In shuffled order a band's rows belong to many batches: it is decoded into a slot of the cache and the
 * assembler copies. In file order a band whose rows all belong to one part of one batch is decoded straight
 * into it, and rows that need no decoding are read there; only what lies across a border goes through a slot.
 *
 * One lock guards everything below "shared". A slot with refs > 0 is pinned: the reader pinned it for a
 * segment that the assembler has not copied yet. The reader waits when no slot can be given; the assembler
 * copies in the order in which the reader pinned, and every pinned slot but the newest is already being read,
 * so neither waits for ever. How far the reader runs ahead is bounded by the plans, the segments, the jobs
 * and the cache (in file order: the batches), whichever is short first. */
#ifndef DATA_STREAM_IMPL_H
#define DATA_STREAM_IMPL_H

#include <pthread.h>

#include "core/arena.h"
#include "data/groups_impl.h"
#include "data/order_impl.h"

enum {
  DATA_MOST_THREADS = 256,
  DATA_MOST_QUEUE = 1024,
  DATA_HANDLES = 64,
  DATA_PLANS_AHEAD = 14,
  DATA_SEGMENTS = 1 << 15,
  DATA_JOBS = 128,
  DATA_JOBS_AT_ONCE =
      8, /* for which workers are woken together: a switch of threads costs as much as a small read */
  DATA_SLOTS_AT_ONCE = 8, /* of which the reader is told together, unless the assembler has nothing to do */
  DATA_LOADS_AT_ONCE = 4, /* that the assembler sleeps for */
  DATA_PLAIN_WINDOW = 1 << 14, /* samples whose columns are held at once in file order */
  DATA_SPAN = 1 << 10 /* neighbouring samples whose columns are read at once for homogeneous batches */
};

typedef enum data_load_state {
  DATA_LOAD_NONE,
  DATA_LOAD_UNDER_WAY,
  DATA_LOAD_DONE,
  DATA_LOAD_FAILED
} data_load_state;

/* Rows on their way into memory. */
typedef struct data_load {
  uint8_t *rows;
  int64_t count; /* rows */
  int32_t jobs_left;
  data_load_state state;
  int64_t sequence; /* in the order in which the assembler needs it */
  int64_t bad;      /* first value that is not finite, -1: none */
} data_load;

/* A band in memory. */
typedef struct data_slot {
  data_load load;
  int64_t band;         /* among the bands of the modality, -1: none */
  int32_t refs;         /* segments that wait for being copied */
  int64_t copied;       /* rows copied since it was read */
  int32_t newer, older; /* in the list of slots without refs */
} data_slot;

/* Decoded bands of one modality; the least recently used of those that this epoch still needs goes last. */
typedef struct data_cache {
  int32_t slots;
  int64_t bands;      /* of the modality */
  int64_t band_bytes; /* of the largest */
  bool whole;         /* every band has a slot: nothing is decoded twice */
  data_slot *slot;
  int32_t *slot_of; /* [bands], -1: not here */
  int32_t newest, oldest;
} data_cache;

/* `rows` rows of a part: from row `first` of the band in a slot, or (slot < 0) by a load of their own. */
typedef struct data_segment {
  int32_t slot, first, rows, m;
  data_load load;
} data_segment;

/* Which samples a batch has. */
typedef struct data_plan {
  int64_t samples, skipped;
  data_position before, after;
  int32_t batch; /* that it will fill; -1: not known before the assembler takes one */
  int64_t end;   /* segments pushed when it was walked; INT64_MAX: it is not yet */
  data_samples column;
} data_plan;

/* What a worker does for a load: one chunk; or rows [first, first + load->count) of a band that is stored as
 * it is; or (handle < 0) only the check of a band that the reader had to read. */
typedef struct data_job {
  const data_column *column;
  data_load *load;
  int32_t handle;
  int64_t first;
  data_tile tile;
} data_job;

/* An open file. Reader only, except for fd, which workers use while jobs > 0, and jobs, which is shared. */
typedef struct data_handle {
  const data_column *column; /* NULL: free */
  data_hdf5_file file;
  data_hdf5_dataset latent;
  int fd;
  int32_t jobs;
  int64_t used;
} data_handle;

/* Argument of a worker thread. */
typedef struct data_worker {
  data_stream *stream;
  data_decoder *decoder;
  uint8_t *stored; /* a stored chunk */
  uint8_t *tile;   /* a decoded chunk that has neighbours in its band; NULL without such */
} data_worker;

/* The columns of consecutive positions of an epoch (a shuffle buffer), and how they are permuted. Reader
 * only. */
typedef struct data_window {
  int64_t epoch, start, count; /* count 0: empty */
  int64_t capacity;
  int64_t order_epoch; /* of shard and begin; -1: none */
  int64_t *shard, *begin;
  int64_t *pick; /* [capacity] */
  data_samples column;
  uint8_t *scratch;
  /* of homogeneous batches: */
  int64_t *sample; /* [data_groups_most] of the epoch's order: which sample a position is */
  data_groups_scratch groups;
  data_samples span; /* [DATA_SPAN] columns of neighbouring samples */
} data_window;

struct data_stream {
  const data_set *set;
  data_stream_options options; /* completed */
  data_range *range, *text;    /* copies of options.range and options.text */
  core_arena *arena, *latents; /* all else; the latents of batches, where a device can fetch them */
  int64_t bytes;
  bool direct; /* file order: the reader knows the batch of a plan */

  /* reader only */
  data_window window;
  data_position position;
  data_handle handle[DATA_HANDLES];
  int64_t uses;
  uint8_t *verified; /* [modalities][shards], with an index: compared with it. NULL: nothing to compare */
  uint64_t *verify_scratch; /* [samples of the largest shard + 1] */

  /* workers only */
  data_worker *worker; /* [threads] */
  int64_t tile_bytes;  /* decoded bytes of the largest chunk */
  int64_t side_bytes;  /* of the largest chunk that has neighbours in its band, 0: none */

  /* shared */
  pthread_mutex_t lock;
  pthread_cond_t work;   /* workers: a job */
  pthread_cond_t room;   /* reader: a slot, a plan, a batch, a segment, a job, a handle */
  pthread_cond_t filled; /* assembler: a plan, a segment, the awaited load, a free batch */
  pthread_cond_t ready;  /* consumer: a batch, the end, an error */
  bool closing;
  bool broken;       /* a load failed: `error` says why; the reader stops */
  int64_t broken_at; /* sequence of that load: of several failures the first in order counts */
  int64_t sequence;  /* of the last load given */
  bool plans_ended;  /* no plan after `planned` */
  bool ended;        /* no batch after the ready ones; with `failed`, because of `error` */
  bool failed;
  core_error error;
  data_plan *plan; /* ring [plans] */
  int32_t plans;
  int64_t planned, assembled;
  data_segment *segment; /* ring [DATA_SEGMENTS] */
  int64_t pushed, popped;
  const data_load
      *awaited; /* the assembler sleeps until it is there; NULL: it waits for the reader, if at all */
  data_cache cache[CORE_MAX_MODALITIES];
  data_job *job; /* ring [DATA_JOBS] */
  int64_t queued, taken;
  int32_t idle;      /* workers that sleep */
  int32_t unsaid;    /* jobs queued since workers were last woken */
  int32_t freed;     /* slots since the reader was last told of room */
  data_batch *batch; /* [batches] */
  int32_t batches, batches_free, batches_lent;
  int32_t *batch_free;  /* stack */
  int32_t *batch_ready; /* ring [batches] */
  int64_t readied, given;
  double waited;
  int64_t skipped;

  /* threads */
  pthread_t reader, assembler, *thread; /* thread [threads] */
  bool has_reader, has_assembler;
  int32_t workers; /* started */
};

/* Samples that the stream takes from an epoch. */
int64_t data_stream_epoch_priv(const data_stream *stream, int64_t epoch);
/* Memory: sizes caches and carves everything from the arena, twice. */
CORE_NODISCARD core_status data_stream_plan_priv(data_stream *stream);

/* Bodies of the threads. */
void *data_stream_reader_priv(void *stream);
void *data_stream_worker_priv(void *worker); /* data_worker */
void *data_stream_assembler_priv(void *stream);

/* Rows that lie in the file as they will lie in memory: any of them can be read alone. */
bool data_column_is_plain_priv(const data_column *column);

/* Files, on the reader. With data_stream_find_priv the file's handle counts one more job. Retries ERR_IO,
 * opening the file afresh. */
CORE_NODISCARD core_status data_stream_find_priv(data_stream *stream, const data_column *column, int32_t m,
                                                 data_tile *tile, uint8_t *rows, int32_t *handle);
void data_stream_close_files_priv(data_stream *stream);

/* The columns of the next `count` positions from `at` of its epoch, into `out` from place `place` on. */
CORE_NODISCARD core_status data_window_read_priv(data_stream *stream, const data_position *at, int64_t count,
                                                 data_plan *out, int64_t place);

/* The cache. All under the lock. */
void data_cache_reset_priv(data_cache *cache, uint8_t *rows);
/* Pins the slot of `band`, giving it the least recently used one when it is not here (*fresh). -1: all are
 * pinned. */
int32_t data_cache_pin_priv(data_cache *cache, int64_t band, bool *fresh);
/* `copied` more rows of it are done with. True: nothing waits for it any more, another band may have it. */
bool data_cache_unpin_priv(data_cache *cache, int32_t slot, int64_t copied);

/* Keeps the calling thread's error record as the stream's, unless that of an earlier load is there, and wakes
 * everybody. Under the lock. */
void data_stream_break_priv(data_stream *stream, int64_t sequence);
/* Wakes as many sleeping workers as there are jobs for. Under the lock; the reader calls it before it waits.
 */
void data_stream_wake_workers_priv(data_stream *stream);
/* Closing, or broken. Takes the lock. */
bool data_stream_stopping_priv(data_stream *stream);

#endif
