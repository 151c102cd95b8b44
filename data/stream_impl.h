/* The inside of a stream. Private to data/.
 *
 *   reader      plans batches in order, pins a slot of the cache for every piece of a band that they need,
 * and reads what is not there; the only thread of the stream that enters HDF5 decoders    turn stored chunks
 * into rows and look for NaN assembler   copies the pieces into batches, in the planned order consumer    the
 * caller of data_stream_get
 *
 * One lock guards everything below "shared". A slot with refs > 0 is pinned: the reader pinned it for a
 * segment that the assembler has not copied yet. The reader waits when no slot can be given; the assembler
 * copies in the order in which the reader pinned, and every pinned slot but the newest is already being read,
 * so neither waits for ever. How far the reader runs ahead is bounded by the plans, the segments and the
 * cache, whichever is short first. */
#ifndef DATA_STREAM_IMPL_H
#define DATA_STREAM_IMPL_H

#include <pthread.h>

#include "core/arena.h"
#include "data/set_impl.h"

enum {
  DATA_MOST_THREADS = 256,
  DATA_MOST_QUEUE = 1024,
  DATA_HANDLES = 64,
  DATA_PLANS_AHEAD = 14,
  DATA_SEGMENTS = 1 << 15,
  DATA_SPARE_JOBS = 64
};

typedef enum data_slot_state {
  DATA_SLOT_EMPTY,
  DATA_SLOT_LOADING,
  DATA_SLOT_LOADED,
  DATA_SLOT_FAILED
} data_slot_state;

/* A band in memory. */
typedef struct data_slot {
  uint8_t *rows;
  int64_t band; /* among the bands of the modality, -1: none */
  int32_t refs; /* segments that wait for being copied */
  int32_t tiles_left;
  data_slot_state state;
  int64_t sequence;      /* of its reading, in the order in which the assembler needs it */
  int64_t bad;           /* first value that is not finite, -1: none */
  int64_t count, copied; /* rows of the band, rows copied since it was read */
  int32_t newer, older;  /* in the list of slots without refs */
} data_slot;

/* Decoded bands of one modality; the least recently used of those that this epoch still needs goes last. */
typedef struct data_cache {
  int32_t slots;
  int64_t bands;      /* of the modality */
  int64_t band_bytes; /* of the largest */
  data_slot *slot;
  int32_t *slot_of; /* [bands], -1: not here */
  int32_t newest, oldest;
} data_cache;

/* Rows [first, first + rows) of the band in a slot. */
typedef struct data_segment {
  int32_t slot, first, rows;
} data_segment;

/* Which samples a batch has. */
typedef struct data_plan {
  int64_t samples;
  data_position before, after;
  int64_t *sample; /* [batch] indices in file order */
} data_plan;

/* One chunk to decode, or (raw < 0) a band that was read as it is and only needs to be checked. */
typedef struct data_job {
  const data_column *column;
  int32_t m, slot, raw;
  data_tile tile;
} data_job;

/* An open file of the reader. */
typedef struct data_handle {
  const data_column *column; /* NULL: free */
  data_hdf5_file file;
  data_hdf5_dataset latent;
  int64_t used;
} data_handle;

/* Argument of a decoder thread. */
typedef struct data_worker {
  data_stream *stream;
  int32_t index;
} data_worker;

struct data_stream {
  const data_set *set;
  data_stream_options options; /* completed */
  data_range *range;           /* copy of options.range */
  core_arena *arena, *latents; /* all else; the latents of batches, where a device can fetch them */
  int64_t bytes;

  /* reader only */
  int64_t *order, *shard_order, *shard_start;
  data_position position;
  int64_t order_epoch; /* -1: none */
  data_handle handle[DATA_HANDLES];
  int64_t uses;

  /* decoders only, one each */
  data_decoder **decoder; /* [threads] */
  uint8_t **tile_buffer;  /* [threads], NULL without tiles */
  int64_t tile_bytes;     /* decoded bytes of the largest chunk */
  int64_t side_bytes;     /* of the largest chunk that has neighbours in its band, 0: none */

  /* shared */
  pthread_mutex_t lock;
  pthread_cond_t work;   /* decoders: a job */
  pthread_cond_t room;   /* reader: a slot, a plan, a segment, a raw buffer */
  pthread_cond_t filled; /* assembler: a plan, a segment, a loaded slot, a free batch */
  pthread_cond_t ready;  /* consumer: a batch, the end, an error */
  bool closing;
  bool broken;       /* a slot failed: `error` says why; the reader stops */
  int64_t broken_at; /* sequence of that slot: of several failures the first in order counts */
  int64_t sequence;  /* of the last slot given */
  bool plans_ended;  /* no plan after `planned` */
  bool ended;        /* no batch after the ready ones; with `failed`, because of `error` */
  bool failed;
  core_error error;
  data_plan *plan; /* ring [plans] */
  int32_t plans;
  int64_t planned, assembled;
  data_segment *segment; /* ring [DATA_SEGMENTS] */
  int64_t pushed, popped;
  data_cache cache[CORE_MAX_MODALITIES];
  data_job *job; /* ring [jobs] */
  int32_t jobs;
  int64_t queued, taken;
  uint8_t *raw; /* [raws][raw_bytes] */
  int64_t raw_bytes;
  int32_t raws, raws_free;
  int32_t *raw_free; /* stack */
  data_batch *batch; /* [batches] */
  int32_t batches, batches_free, batches_lent;
  int32_t *batch_free;  /* stack */
  int32_t *batch_ready; /* ring [batches] */
  int64_t readied, given;
  double waited;

  /* threads */
  pthread_t reader, assembler, *worker;
  data_worker *worker_state;
  bool has_reader, has_assembler;
  int32_t workers; /* started */
};

/* Memory: sizes caches and carves everything from the arena, twice. */
CORE_NODISCARD core_status data_stream_plan_priv(data_stream *stream);

/* Bodies of the threads. */
void *data_stream_reader_priv(void *stream);
void *data_stream_decoder_priv(void *worker); /* data_worker */
void *data_stream_assembler_priv(void *stream);

/* The cache. All under the lock. */
void data_cache_reset_priv(data_cache *cache, uint8_t *rows);
/* Pins the slot of `band`, giving it the least recently used one when it is not here (*fresh). -1: all are
 * pinned. */
int32_t data_cache_pin_priv(data_cache *cache, int64_t band, bool *fresh);
/* `copied` more rows of it are done with. */
void data_cache_unpin_priv(data_cache *cache, int32_t slot, int64_t copied);

/* Keeps the calling thread's error record as the stream's, unless that of an earlier slot is there, and wakes
 * everybody. Under the lock. */
void data_stream_break_priv(data_stream *stream, int64_t sequence);
/* Closing, or broken. Takes the lock. */
bool data_stream_stopping_priv(data_stream *stream);

#endif
