/* Reading everything that a checkpoint's manifest speaks of: blocks on several threads, then the tensors'
 * hashes. Collectively: in the background, so that ranks which wait for others learn that these get on. */
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/file.h"

/* ---- meeting ---- */

static const double TURN_SECONDS = 0.05, POLL_SECONDS = 0.0005;

/* Until this rank's part is done, but at least `least` seconds; or for one turn in which it got on. A part
 * that stands still keeps its rank here, so that the others' deadline runs from its last sign of life. */
static void wait_turn(const ckpt_errand *errand, double least) {
  double start = core_clock_now();
  long long before = atomic_load(&errand->progress);
  for (;;) {
    double waited = core_clock_now() - start;
    if (atomic_load(&errand->done) && waited >= least) return;
    if (waited > TURN_SECONDS && atomic_load(&errand->progress) != before) return;
    core_clock_sleep(POLL_SECONDS);
  }
}

core_status ckpt_wait_for_all(comm_group *control, const ckpt_errand *errand) {
  double least = 0;
  for (int32_t missing = 1; missing; least = TURN_SECONDS) {
    wait_turn(errand, least);
    missing = !atomic_load(&errand->done);
    TRY(comm_all_reduce(control, COMM_MAX, CORE_INT32, &missing, 1));
  }
  return CORE_OK;
}

/* ---- blocks of one file ---- */

typedef struct verify_worker {
  ckpt_codec codec;
  uint8_t *memory;
} verify_worker;

typedef struct verify_run {
  const ckpt_manifest *manifest;
  ckpt_rank_file file;
  verify_worker worker[CKPT_MAX_THREADS];
  atomic_llong *progress;
} verify_run;

/* The part that a block belongs to: the last one of the file that begins at or before it. */
static const ckpt_part *part_of(const ckpt_manifest *m, int32_t file, int64_t block) {
  int64_t low = m->begin[file], high = m->begin[file + 1] - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (m->part[m->order[middle]].block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return &m->part[m->order[low]];
}

static core_status verify_block(void *context, int32_t worker, int64_t block) {
  verify_run *run = context;
  verify_worker *w = &run->worker[worker];
  const ckpt_part *part = part_of(run->manifest, run->file.number, block);
  TRY(ckpt_rank_file_read(&run->file, run->manifest, part, block - part->block, &w->codec,
                          w->memory + 2 * (size_t)CKPT_BLOCK_BYTES, w->memory + CKPT_BLOCK_BYTES));
  if (run->progress != NULL) atomic_fetch_add(run->progress, 1);
  return CORE_OK;
}

static core_status open_worker(verify_worker *w, int32_t file) {
  w->memory = malloc((size_t)CKPT_BLOCK_BYTES * 2 + CKPT_STORED_BYTES);
  CHECK(w->memory != NULL, CORE_ERR_MEMORY, "no memory for one block of rank-%05d.ckpt", file);
  TRY(ckpt_codec_open(&w->codec, 1, w->memory));
  return CORE_OK;
}

core_status ckpt_rank_file_verify(const char *path, const ckpt_manifest *manifest, int32_t number,
                                  int32_t threads, atomic_llong *progress) {
  core_status status = CORE_OK;
  verify_run *run = calloc(1, sizeof *run);
  CHECK(run != NULL, CORE_ERR_MEMORY, "no memory for verifying rank-%05d.ckpt", number);
  run->manifest = manifest;
  run->progress = progress;
  run->file.fd = -1;
  for (int32_t t = 0; t < threads; t++) TRY_OUT(open_worker(&run->worker[t], number), end);
  TRY_OUT(ckpt_rank_file_open(path, manifest, number, &run->file), end);
  TRY_OUT(ckpt_parallel(threads, run->file.blocks, verify_block, run), end);
end:
  ckpt_rank_file_close(&run->file);
  for (int32_t t = 0; t < threads && run->worker[t].memory != NULL; t++) {
    ckpt_codec_close(&run->worker[t].codec);
    free(run->worker[t].memory);
  }
  free(run);
  return status;
}

/* ---- hashes of tensors, from the indices of all files ---- */

static uint64_t hash_in_index(const void *context, const ckpt_part *part, int64_t cell) {
  const ckpt_rank_file *file = context;
  return file[part->file].entry[part->block + cell].raw_hash;
}

static core_status compare_hashes(const ckpt_manifest *m, const ckpt_rank_file *file) {
  for (int32_t i = 0; i < m->items; i++) {
    const ckpt_item *item = &m->item[i];
    uint64_t hash = ckpt_item_hash(m, item, hash_in_index, file);
    CHECK(hash == item->hash, CORE_ERR_CORRUPT, "tensor %s has hash %016llx, the manifest says %016llx",
          item->name, (unsigned long long)hash, (unsigned long long)item->hash);
  }
  return CORE_OK;
}

core_status ckpt_verify_hashes(const char *path, const ckpt_manifest *manifest) {
  core_status status = CORE_OK;
  ckpt_rank_file *file = calloc((size_t)manifest->files, sizeof *file);
  CHECK(file != NULL, CORE_ERR_MEMORY, "no memory for the indices of %d files", manifest->files);
  int32_t opened = 0;
  for (; opened < manifest->files && status == CORE_OK; opened++) {
    status = ckpt_rank_file_open(path, manifest, opened, &file[opened]);
    int fd = file[opened].fd;
    if (fd >= 0 && core_file_close(fd, file[opened].path) != CORE_OK) core_error_clear();
    file[opened].fd = -1; /* the index is enough; many files must not need many descriptors */
  }
  if (status == CORE_OK) status = compare_hashes(manifest, file);
  for (int32_t f = 0; f < opened; f++) ckpt_rank_file_close(&file[f]);
  free(file);
  TRY(status);
  return CORE_OK;
}

/* ---- a whole checkpoint, by all ranks ---- */

typedef struct verify_all {
  const char *path;
  const ckpt_manifest *manifest;
  int32_t rank, ranks, threads;
  ckpt_errand errand;
  core_status status;
  core_error error;
} verify_all;

static core_status verify_share(verify_all *all) {
  for (int32_t f = all->rank; f < all->manifest->files; f += all->ranks) {
    TRY(ckpt_rank_file_verify(all->path, all->manifest, f, all->threads, &all->errand.progress));
  }
  if (all->rank == 0) TRY(ckpt_verify_hashes(all->path, all->manifest));
  return CORE_OK;
}

static void *verify_main(void *argument) {
  verify_all *all = argument;
  all->status = verify_share(all);
  if (all->status != CORE_OK) core_error_save(&all->error);
  atomic_store(&all->errand.done, true);
  return NULL;
}

core_status ckpt_verify_together(comm_group *control, const char *path, const ckpt_manifest *manifest,
                                 int32_t threads) {
  verify_all all = {.path = path,
                    .manifest = manifest,
                    .rank = comm_rank(control),
                    .ranks = comm_size(control),
                    .threads = threads};
  pthread_t thread;
  bool apart = ckpt_thread_start(&thread, verify_main, &all) == CORE_OK;
  if (!apart) {
    core_error_clear(); /* the same work here, without signs of life */
    (void)verify_main(&all);
  }
  core_status status = ckpt_wait_for_all(control, &all.errand);
  if (apart) pthread_join(thread, NULL);
  TRY(status);
  TRY(comm_agree(control, all.status == CORE_OK ? CORE_OK : core_error_restore(&all.error)));
  return CORE_OK;
}
