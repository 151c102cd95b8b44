/* What writer.c (create, begin, destroy) and writer_commit.c share. Only they see the inside of a writer. */
#ifndef CKPT_SAVE_BUFFERS_IMPL_H
#define CKPT_SAVE_BUFFERS_IMPL_H

#include "checkpoint/checkpoint_impl.h"

/* One owned range and its places in the private copies. */
typedef struct ckpt_range {
  const ckpt_tensor *tensor; /* the writer's copy of the description */
  uint8_t *copy[CKPT_MOST_BUFFERS];
} ckpt_range;

/* One private copy of the state and the save that it is for, from its begin to its commit. */
typedef struct ckpt_buffer {
  ckpt_block *block; /* [save.blocks] */
  ckpt_save save;
  pthread_t thread;
  bool running; /* to be joined */
  int64_t step;
  char *meta; /* owned */
} ckpt_buffer;

struct ckpt_writer {
  comm_group *control;
  ckpt_options options;
  char directory[CKPT_PATH];
  core_arena *arena, *copies; /* working memory; the private copies */
  ckpt_tensor *tensor;        /* owned ranges with elements, in the order of the file: by name, first */
  char (*name)[CORE_NAME];
  ckpt_range *range;
  int32_t ranges;
  int64_t raw_bytes, blocks;
  ckpt_codec codec[CKPT_MAX_THREADS];
  int32_t codecs;                        /* opened */
  ckpt_manifest catalogue;               /* rank 0 */
  ckpt_buffer buffer[CKPT_MOST_BUFFERS]; /* ring [options.buffers] */
  int32_t oldest, pending; /* the first that was begun and not committed, and how many such there are */
  int64_t begun;
  atomic_llong finished; /* of the saves begun: their threads are through with scratch and disk */
  ckpt_figures figures;
};

#endif
