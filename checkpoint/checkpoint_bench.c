/* Speed and size of saving and loading against what anybody could do: memcpy of the state, and zstd of the
 * same bytes into a file, on the same disk, in the same run, at the same priority. Wall time and the
 * process's processor time. The rounds alternate, and each method shows its best one. */
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"

enum { WIDTH = 1024, KINDS = 3, PIECE = 1 << 20, ROUNDS = 5, THREADS = 2 };

static const char *const kind_name[KINDS] = {"parameter", "adam_m", "adam_v"};

/* One way of doing it: the best round's seconds, and the bytes it left. */
typedef struct figure {
  double wall, processor;
  int64_t bytes;
} figure;

typedef struct bench {
  ckpt_tensor tensor[KINDS];
  float *data;   /* the tensors one after another */
  int64_t count; /* elements of one tensor */
  size_t bytes;  /* of all */
  char directory[CKPT_PATH];
  char source[CKPT_PATH]; /* checkpoint that the state is of; empty: made up */
  figure copy, stall, zstd_1, zstd_3, save, load, load_2;
} bench;

typedef struct stopwatch {
  double wall, processor;
} stopwatch;

static double processor_now(void) {
  return (double)clock() / CLOCKS_PER_SEC;
}

static stopwatch start_watch(void) {
  return (stopwatch){core_clock_now(), processor_now()};
}

static void stop_watch(stopwatch start, int64_t bytes, figure *f) {
  double wall = core_clock_now() - start.wall, processor = processor_now() - start.processor;
  if (f->wall == 0 || wall < f->wall) f->wall = wall;
  if (f->processor == 0 || processor < f->processor) f->processor = processor;
  f->bytes = bytes;
}

/* ---- the state ---- */

/* A weight matrix and its Adam moments as they are after some steps: rows with gradients of different size,
 * first moments a sum of a few gradients, second moments a sum of their squares. */
static void make_up(bench *b) {
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

/* Fills `target` with the tensors of one kind, as often as it takes. */
static core_status take_kind(ckpt_reader *reader, const ckpt_manifest *m, const char *kind, float *target,
                             int64_t count) {
  int64_t done = 0, before = -1;
  while (done < count && done != before) {
    before = done;
    for (int32_t i = 0; i < m->items && done < count; i++) {
      const ckpt_item *item = &m->item[i];
      if (item->dtype != CORE_FLOAT32 || item->count == 0) continue;
      if (strncmp(item->name, kind, strlen(kind)) != 0 || item->name[strlen(kind)] != '/') continue;
      ckpt_tensor t;
      TRY(ckpt_reader_find(reader, item->name, &t));
      if (t.count > count - done) t.count = count - done;
      t.data = target + done;
      TRY(ckpt_reader_load(reader, &t, 1));
      done += t.count;
    }
  }
  CHECK(done == count, CORE_ERR_ARGUMENT, "%s has no float32 tensors \"%s/...\"", ckpt_reader_path(reader),
        kind);
  return CORE_OK;
}

static core_status take_state(bench *b, ckpt_reader *reader) {
  ckpt_manifest m = {0};
  char *text;
  int64_t count;
  TRY(ckpt_path(b->source, "%s", ckpt_reader_path(reader)));
  TRY(ckpt_manifest_text(b->source, &text, &count));
  core_status status = ckpt_manifest_take(b->source, text, count, &m);
  free(text);
  for (int k = 0; k < KINDS && status == CORE_OK; k++)
    status = take_kind(reader, &m, kind_name[k], b->data + k * b->count, b->count);
  ckpt_manifest_free(&m);
  TRY(status);
  return CORE_OK;
}

static core_status fill(bench *b, comm_group *control, const char *directory) {
  ckpt_reader *reader;
  TRY(ckpt_reader_newest(control, directory, 1, &reader));
  if (reader == NULL) make_up(b);
  core_status status = reader == NULL ? CORE_OK : take_state(b, reader);
  ckpt_reader_close(reader);
  TRY(status);
  return CORE_OK;
}

static core_status make(bench *b, comm_group *control, const char *directory, int64_t bytes) {
  static const char *const name[KINDS] = {"parameter/w", "adam_m/w", "adam_v/w"};
  int64_t rows = bytes / (KINDS * WIDTH * (int64_t)sizeof(float));
  CHECK(rows > 0, CORE_ERR_ARGUMENT, "%lld bytes are too few for a benchmark", (long long)bytes);
  TRY(ckpt_path(b->directory, "%s/bench", directory));
  b->count = rows * WIDTH;
  b->bytes = (size_t)b->count * KINDS * sizeof(float);
  b->data = malloc(b->bytes);
  CHECK(b->data != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes", b->bytes);
  for (int i = 0; i < KINDS; i++) {
    b->tensor[i] = (ckpt_tensor){.name = name[i],
                                 .dtype = CORE_FLOAT32,
                                 .rank = 2,
                                 .shape = {rows, WIDTH, 1, 1},
                                 .count = b->count,
                                 .data = b->data + i * b->count,
                                 .owner = true};
  }
  TRY(fill(b, control, directory));
  return CORE_OK;
}

/* ---- the others ---- */

static core_status compress(const bench *b, ZSTD_CCtx *context, void *out, int fd, const char *path,
                            int64_t *stored) {
  size_t done = 0, left = 1;
  while (left != 0) {
    size_t count = b->bytes - done < PIECE ? b->bytes - done : PIECE;
    ZSTD_inBuffer in = {(const char *)b->data + done, count, 0};
    ZSTD_EndDirective end = done + count == b->bytes ? ZSTD_e_end : ZSTD_e_continue;
    ZSTD_outBuffer target = {out, PIECE, 0};
    left = ZSTD_compressStream2(context, &target, &in, end);
    CHECK(!ZSTD_isError(left), CORE_ERR_INTERNAL, "zstd: %s", ZSTD_getErrorName(left));
    if (target.pos > 0) TRY(core_file_write(fd, path, out, target.pos));
    *stored += (int64_t)target.pos;
    done += in.pos;
    if (end == ZSTD_e_continue) left = 1;
  }
  TRY(core_file_sync(fd, path));
  return CORE_OK;
}

static core_status compress_file(const bench *b, int level, int threads, const char *path, int64_t *stored) {
  int fd = -1;
  core_status status = CORE_OK;
  TRY(core_file_open(path, O_WRONLY | O_CREAT | O_TRUNC, &fd));
  ZSTD_CCtx *context = ZSTD_createCCtx();
  void *out = malloc(PIECE);
  if (context == NULL || out == NULL) {
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for zstd");
  } else {
    (void)ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
    (void)ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    if (threads > 1 && ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_nbWorkers, threads)))
      status = core_error_begin(CORE_ERR_UNSUPPORTED, __func__, __FILE__, __LINE__,
                                "zstd is built without threads");
  }
  if (status == CORE_OK) status = compress(b, context, out, fd, path, stored);
  (void)ZSTD_freeCCtx(context);
  free(out);
  core_error saved;
  core_error_save(&saved);
  return core_keep_first(status, &saved, core_file_close(fd, path));
}

typedef struct zstd_run {
  const bench *b;
  int level, threads;
  figure *figure;
  core_status status;
  core_error error;
} zstd_run;

static core_status time_zstd_here(const zstd_run *run) {
  char path[CKPT_PATH];
  int64_t stored = 0;
  TRY(ckpt_path(path, "%s/state.zst", run->b->directory));
  stopwatch start = start_watch();
  TRY(compress_file(run->b, run->level, run->threads, path, &stored));
  stop_watch(start, stored, run->figure);
  TRY(core_file_remove(path));
  return CORE_OK;
}

static void *zstd_main(void *argument) {
  zstd_run *run = argument;
  ckpt_thread_give_way();
  run->status = time_zstd_here(run);
  core_error_save(&run->error);
  return NULL;
}

/* On a thread of the priority that the writer's threads have: what else runs must not favour either. */
static core_status time_zstd(const bench *b, int level, int threads, figure *f) {
  zstd_run run = {.b = b, .level = level, .threads = threads, .figure = f};
  pthread_t thread;
  TRY(ckpt_thread_start(&thread, zstd_main, &run));
  pthread_join(thread, NULL);
  if (run.status != CORE_OK) return core_error_restore(&run.error);
  return CORE_OK;
}

static core_status time_copy(bench *b) {
  char *target = malloc(b->bytes);
  CHECK(target != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes", b->bytes);
  memset(target, 1, b->bytes);
  stopwatch start = start_watch();
  memcpy(target, b->data, b->bytes);
  stop_watch(start, (int64_t)b->bytes, &b->copy);
  bool same = memcmp(target, b->data, b->bytes) == 0;
  free(target);
  CHECK(same, CORE_ERR_INTERNAL, "memcpy does not copy");
  return CORE_OK;
}

/* ---- ours ---- */

static core_status save_once(bench *b, ckpt_writer *writer, int64_t step) {
  ckpt_figures figures;
  stopwatch start = start_watch();
  TRY(ckpt_writer_begin(writer, step, "{}"));
  stop_watch(start, 0, &b->stall);
  TRY(ckpt_writer_commit(writer));
  ckpt_writer_figures(writer, &figures);
  stop_watch(start, figures.stored_bytes, &b->save);
  return CORE_OK;
}

/* From the begin to the return of the commit: copied, compressed, synced, read back, published. */
static core_status time_save(bench *b, comm_group *control, int64_t step) {
  const ckpt_options options = {.directory = b->directory, .keep = 2, .threads = THREADS};
  ckpt_writer *writer;
  TRY(ckpt_writer_create(control, &options, b->tensor, KINDS, &writer));
  core_status status = save_once(b, writer, step);
  ckpt_writer_destroy(writer);
  TRY(status);
  return CORE_OK;
}

static core_status load_once(bench *b, ckpt_reader *reader, figure *f) {
  int64_t last = (int64_t)(b->bytes / sizeof(float)) - 1;
  float keep[2] = {b->data[0], b->data[last]};
  memset(b->data, 0, b->bytes);
  stopwatch start = start_watch();
  TRY(ckpt_reader_load(reader, b->tensor, KINDS));
  stop_watch(start, (int64_t)b->bytes, f);
  CHECK(b->data[0] == keep[0] && b->data[last] == keep[1], CORE_ERR_INTERNAL, "loaded data differ");
  return CORE_OK;
}

/* Over the data, whose first and last element must come back. */
static core_status time_load(bench *b, comm_group *control, int32_t threads, figure *f) {
  ckpt_reader *reader;
  TRY(ckpt_reader_newest(control, b->directory, 1, &reader));
  CHECK(reader != NULL, CORE_ERR_INTERNAL, "the saved checkpoint is gone");
  core_status status = ckpt_reader_threads(reader, threads);
  if (status == CORE_OK) status = load_once(b, reader, f);
  ckpt_reader_close(reader);
  TRY(status);
  return CORE_OK;
}

static core_status clear(const bench *b) {
  ckpt_place *place;
  int32_t count;
  char path[CKPT_PATH];
  core_status status = CORE_OK;
  TRY(ckpt_places(b->directory, &place, &count));
  for (int32_t i = 0; i < count && status == CORE_OK; i++) {
    status = ckpt_place_path(b->directory, place[i].step, (ckpt_place_kind)place[i].kind, path);
    if (status == CORE_OK) status = ckpt_remove(path);
  }
  free(place);
  TRY(status);
  TRY(core_file_remove_directory(b->directory));
  return CORE_OK;
}

static core_status run(bench *b, comm_group *control, const char *directory, int64_t bytes) {
  TRY(make(b, control, directory, bytes));
  TRY(core_file_make_directories(b->directory));
  for (int64_t round = 0; round < ROUNDS; round++) {
    TRY(time_copy(b));
    TRY(time_zstd(b, 1, THREADS, &b->zstd_1));
    TRY(time_save(b, control, round));
    TRY(time_zstd(b, 3, 1, &b->zstd_3));
    TRY(time_load(b, control, 1, &b->load));
    TRY(time_load(b, control, THREADS, &b->load_2));
  }
  TRY(clear(b));
  return CORE_OK;
}

/* ---- report ---- */

typedef struct ratios {
  double stall, save_wall, save_processor, size, load; /* load: GB/s of one core */
} ratios;

static ratios compare(const bench *b) {
  return (ratios){.stall = b->stall.wall / b->copy.wall,
                  .save_wall = b->zstd_1.wall / b->save.wall,
                  .save_processor = b->zstd_1.processor / b->save.processor,
                  .size = (double)b->save.bytes / (double)b->zstd_3.bytes,
                  .load = (double)b->bytes * 1e-9 / b->load.processor};
}

static void print_line(const bench *b, const char *name, const figure *f, FILE *out) {
  double giga = (double)b->bytes * 1e-9;
  fprintf(out, "  %-34s %8.3f %10.3f %8.3f", name, f->wall, giga / f->wall, f->processor);
  if (f == &b->zstd_1 || f == &b->zstd_3 || f == &b->save)
    fprintf(out, " %8.4f", (double)f->bytes / (double)b->bytes);
  fputc('\n', out);
}

static void print_table(const bench *b, FILE *out) {
  ratios r = compare(b);
  fprintf(out, "checkpoint of %.2f GB float32 (%s), best of %d\n", (double)b->bytes * 1e-9,
          b->source[0] ? b->source : "made-up weights and Adam moments", ROUNDS);
  fprintf(out, "  %-34s %8s %10s %8s %8s\n", "", "seconds", "GB/s raw", "CPU s", "size");
  print_line(b, "memcpy", &b->copy, out);
  print_line(b, "stall of training", &b->stall, out);
  print_line(b, "zstd -1 -T2 into a file, synced", &b->zstd_1, out);
  print_line(b, "zstd -3 into a file, synced", &b->zstd_3, out);
  print_line(b, "save on 2 threads, published", &b->save, out);
  print_line(b, "verified load on 1 thread", &b->load, out);
  print_line(b, "verified load on 2 threads", &b->load_2, out);
  fprintf(out, "  stall / memcpy %.2f (bar 1.2)   save rate / zstd -1 -T2: wall %.2f, CPU %.2f (bar 1)\n",
          r.stall, r.save_wall, r.save_processor);
  fprintf(out, "  size / zstd -3 %.3f (bar 1)   verified load %.2f GB/s per core (bar 1)\n", r.size, r.load);
}

static void print_figure(const char *name, const figure *f, FILE *out) {
  fprintf(out, "\"%s\": {\"seconds\": %.6g, \"processor_seconds\": %.6g, \"bytes\": %lld}, ", name, f->wall,
          f->processor, (long long)f->bytes);
}

/* One line, for files of measurements. */
static void print_json(const bench *b, FILE *out) {
  ratios r = compare(b);
  fprintf(
      out,
      "{\"bench\": \"checkpoint\", \"state\": \"%s\", \"raw_bytes\": %zu, \"rounds\": %d, \"threads\": %d, ",
      b->source[0] ? "trained" : "made up", b->bytes, ROUNDS, THREADS);
  print_figure("memcpy", &b->copy, out);
  print_figure("stall", &b->stall, out);
  print_figure("zstd_1_T2", &b->zstd_1, out);
  print_figure("zstd_3", &b->zstd_3, out);
  print_figure("save", &b->save, out);
  print_figure("load_1_thread", &b->load, out);
  print_figure("load_2_threads", &b->load_2, out);
  fprintf(out,
          "\"stall_over_memcpy\": %.4f, \"save_rate_over_zstd_1_T2\": {\"wall\": %.4f, \"processor\": %.4f}, "
          "\"size_over_zstd_3\": %.4f, \"load_gigabytes_per_core_second\": %.4f}\n",
          r.stall, r.save_wall, r.save_processor, r.size, r.load);
}

core_status ckpt_bench(comm_group *control, const char *directory, int64_t bytes, ckpt_bench_format format,
                       FILE *out) {
  CHECK(comm_size(control) == 1, CORE_ERR_ARGUMENT, "the checkpoint benchmark runs on one rank, not on %d",
        comm_size(control));
  bench *b = calloc(1, sizeof *b);
  CHECK(b != NULL, CORE_ERR_MEMORY, "no memory for a benchmark");
  core_status status = run(b, control, directory, bytes);
  if (status == CORE_OK && format == CKPT_BENCH_JSON) print_json(b, out);
  if (status == CORE_OK && format == CKPT_BENCH_TABLE) print_table(b, out);
  free(b->data);
  free(b);
  TRY(status);
  return CORE_OK;
}
