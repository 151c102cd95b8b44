/* Speed and size of saving and loading against what anybody could do: `zstd -3` of the same bytes into a
 * file, on the same disk, in the same run, on one core. */
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"

enum { WIDTH = 1024, BENCH_TENSORS = 3, PIECE = 1 << 20, ROUNDS = 3 };

typedef struct bench {
  ckpt_tensor tensor[BENCH_TENSORS];
  float *data;   /* the tensors one after another */
  int64_t count; /* elements of one tensor */
  size_t bytes;  /* of all */
  const char *directory;
  double zstd_seconds, write_seconds, stall_seconds, copy_seconds, load_seconds;
  int64_t zstd_bytes, stored_bytes;
} bench;

/* A weight matrix and its Adam moments as they are after some steps: rows with gradients of different size,
 * first moments a sum of a few gradients, second moments a sum of their squares. */
static void fill(bench *b) {
  float *weight = b->data, *m = weight + b->count, *v = m + b->count;
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, 1, 0),
           rows = core_random_stream(CORE_RANDOM_TEST, 2, 0);
  for (int64_t i = 0; i < b->count; i++) {
    uint64_t at = (uint64_t)i;
    double scale = 1e-4 * exp(core_random_normal(1, rows, at / WIDTH));
    double g0 = core_random_normal(1, stream, 3 * at), g1 = core_random_normal(1, stream, 3 * at + 1);
    weight[i] = (float)(0.02 * core_random_normal(1, stream, 3 * at + 2));
    m[i] = (float)(scale * (0.3 * g0 + 0.2 * g1));
    v[i] = (float)(scale * scale * (0.03 * g0 * g0 + 0.02 * g1 * g1));
  }
}

static core_status make(bench *b, int64_t bytes) {
  static const char *const name[BENCH_TENSORS] = {"parameter/w", "adam_m/w", "adam_v/w"};
  int64_t rows = bytes / (BENCH_TENSORS * WIDTH * (int64_t)sizeof(float));
  CHECK(rows > 0, CORE_ERR_ARGUMENT, "%lld bytes are too few for a benchmark", (long long)bytes);
  b->count = rows * WIDTH;
  b->bytes = (size_t)b->count * BENCH_TENSORS * sizeof(float);
  b->data = malloc(b->bytes);
  CHECK(b->data != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes", b->bytes);
  for (int i = 0; i < BENCH_TENSORS; i++) {
    b->tensor[i] = (ckpt_tensor){.name = name[i],
                                 .dtype = CORE_FLOAT32,
                                 .rank = 2,
                                 .shape = {rows, WIDTH, 1, 1},
                                 .count = b->count,
                                 .data = b->data + i * b->count,
                                 .owner = true};
  }
  fill(b);
  return CORE_OK;
}

static core_status zstd_pieces(const bench *b, ZSTD_CCtx *context, void *out, int fd, const char *path,
                               int64_t *stored) {
  size_t done = 0, left = 1;
  while (left != 0) {
    size_t count = b->bytes - done < PIECE ? b->bytes - done : PIECE;
    ZSTD_inBuffer in = {(const char *)b->data + done, count, 0};
    ZSTD_EndDirective end = done + count == b->bytes ? ZSTD_e_end : ZSTD_e_continue;
    ZSTD_outBuffer target = {out, PIECE, 0};
    left = ZSTD_compressStream2(context, &target, &in, end);
    CHECK(!ZSTD_isError(left), CORE_ERR_INTERNAL, "zstd: %s", ZSTD_getErrorName(left));
    TRY(core_file_write(fd, path, out, target.pos));
    *stored += (int64_t)target.pos;
    done += in.pos;
    if (end == ZSTD_e_continue) left = 1;
  }
  TRY(core_file_sync(fd, path));
  return CORE_OK;
}

static core_status time_zstd(bench *b) {
  char path[CKPT_PATH];
  int fd = -1;
  core_status status = CORE_OK;
  TRY(ckpt_path(path, "%s/bench.zst", b->directory));
  TRY(core_file_open(path, O_WRONLY | O_CREAT | O_TRUNC, &fd));
  ZSTD_CCtx *context = ZSTD_createCCtx();
  void *out = malloc(PIECE);
  double start = core_clock_now();
  b->zstd_bytes = 0;
  if (context == NULL || out == NULL) {
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for zstd");
  }
  if (status == CORE_OK) {
    (void)ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 3);
    (void)ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    status = zstd_pieces(b, context, out, fd, path, &b->zstd_bytes);
  }
  double seconds = core_clock_now() - start;
  if (b->zstd_seconds == 0 || seconds < b->zstd_seconds) b->zstd_seconds = seconds;
  (void)ZSTD_freeCCtx(context);
  free(out);
  core_error saved;
  core_error_save(&saved);
  status = core_keep_first(status, &saved, core_file_close(fd, path));
  if (status == CORE_OK) status = core_file_remove(path);
  TRY(status);
  return CORE_OK;
}

static core_status time_save(bench *b, comm_group *control, int64_t step) {
  const ckpt_options options = {.directory = b->directory, .keep = 2};
  ckpt_writer *writer;
  ckpt_figures figures;
  TRY(ckpt_writer_create(control, &options, b->tensor, BENCH_TENSORS, &writer));
  core_status status = ckpt_writer_begin(writer, step, "{}");
  if (status == CORE_OK) status = ckpt_writer_commit(writer);
  ckpt_writer_figures(writer, &figures);
  ckpt_writer_destroy(writer);
  TRY(status);
  b->stored_bytes = figures.stored_bytes;
  if (b->write_seconds == 0 || figures.write_seconds < b->write_seconds)
    b->write_seconds = figures.write_seconds;
  if (b->stall_seconds == 0 || figures.stall_seconds < b->stall_seconds)
    b->stall_seconds = figures.stall_seconds;
  return CORE_OK;
}

/* Loads over the data, whose first and last element must come back. */
static core_status time_load(bench *b, comm_group *control) {
  ckpt_reader *reader;
  int64_t last = (int64_t)(b->bytes / sizeof(float)) - 1;
  float keep[2] = {b->data[0], b->data[last]};
  TRY(ckpt_reader_newest(control, b->directory, &reader));
  CHECK(reader != NULL, CORE_ERR_INTERNAL, "the saved checkpoint is gone");
  memset(b->data, 0, b->bytes);
  double start = core_clock_now();
  core_status status = ckpt_reader_load(reader, b->tensor, BENCH_TENSORS);
  double seconds = core_clock_now() - start;
  if (b->load_seconds == 0 || seconds < b->load_seconds) b->load_seconds = seconds;
  ckpt_reader_close(reader);
  TRY(status);
  CHECK(b->data[0] == keep[0] && b->data[last] == keep[1], CORE_ERR_INTERNAL, "loaded data differ");
  return CORE_OK;
}

static core_status time_copy(bench *b) {
  char *target = malloc(b->bytes);
  CHECK(target != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes", b->bytes);
  memset(target, 1, b->bytes);
  double start = core_clock_now();
  memcpy(target, b->data, b->bytes);
  double seconds = core_clock_now() - start;
  bool same = memcmp(target, b->data, b->bytes) == 0;
  free(target);
  if (b->copy_seconds == 0 || seconds < b->copy_seconds) b->copy_seconds = seconds;
  CHECK(same, CORE_ERR_INTERNAL, "memcpy does not copy");
  return CORE_OK;
}

static void report(const bench *b, FILE *out) {
  double giga = (double)b->bytes * 1e-9, raw = (double)b->bytes;
  fprintf(out, "checkpoint of %.2f GB float32 (weights, Adam moments), one core, best of %d\n", giga, ROUNDS);
  fprintf(out, "  %-30s %8s %10s %8s\n", "", "seconds", "GB/s raw", "size");
  fprintf(out, "  %-30s %8.3f %10.3f\n", "memcpy", b->copy_seconds, giga / b->copy_seconds);
  fprintf(out, "  %-30s %8.3f %10.3f\n", "stall of training", b->stall_seconds, giga / b->stall_seconds);
  fprintf(out, "  %-30s %8.3f %10.3f %8.4f\n", "zstd -3 into a file, fsync", b->zstd_seconds,
          giga / b->zstd_seconds, (double)b->zstd_bytes / raw);
  fprintf(out, "  %-30s %8.3f %10.3f %8.4f\n", "write, fsync", b->write_seconds, giga / b->write_seconds,
          (double)b->stored_bytes / raw);
  fprintf(out, "  %-30s %8.3f %10.3f\n", "verified load", b->load_seconds, giga / b->load_seconds);
  fprintf(out, "  stall / memcpy %.2f   size / zstd -3 %.3f (bar < 1)   time / zstd -3 %.3f (bar < 1)\n",
          b->stall_seconds / b->copy_seconds, (double)b->stored_bytes / (double)b->zstd_bytes,
          b->write_seconds / b->zstd_seconds);
  fprintf(out, "  verified load %.2f GB/s per core (bar >= 1)\n", giga / b->load_seconds);
}

static core_status run(bench *b, comm_group *control, int64_t bytes) {
  TRY(make(b, bytes));
  TRY(core_file_make_directories(b->directory));
  for (int64_t round = 0; round < ROUNDS; round++) {
    TRY(time_copy(b));
    TRY(time_zstd(b));
    TRY(time_save(b, control, round));
    TRY(time_load(b, control));
  }
  char path[CKPT_PATH];
  for (int64_t round = ROUNDS - 2; round < ROUNDS; round++) {
    TRY(ckpt_place_path(b->directory, round, CKPT_PUBLISHED, path));
    TRY(ckpt_remove(path));
  }
  return CORE_OK;
}

core_status ckpt_bench(comm_group *control, const char *directory, int64_t bytes, FILE *out) {
  bench b = {.directory = directory};
  CHECK(comm_size(control) == 1, CORE_ERR_ARGUMENT, "the checkpoint benchmark runs on one rank, not on %d",
        comm_size(control));
  core_status status = run(&b, control, bytes);
  free(b.data);
  TRY(status);
  report(&b, out);
  return CORE_OK;
}
