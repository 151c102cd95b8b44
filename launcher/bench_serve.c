/* antiphon bench search, antiphon bench embed: what serving takes beside the least that it could take. Both
 * sides of every ratio are measured in one run, in turn, and the shortest of several rounds is taken, of
 * embedding the median ratio. */
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/random.h"
#include "kernels/kernels.h"
#include "launcher/bench.h"
#include "launcher/embedder.h"
#include "trainer/serve/search.h"

enum { ROUNDS = 7 };

static void keep_shortest(double *shortest, double start, int round) {
  double seconds = core_clock_now() - start;
  if (round == 0 || seconds < *shortest) *shortest = seconds;
}

/* ---- search ---- */

typedef struct search_bench {
  int64_t rows, width, batch, k;
  core_dtype dtype;
  int32_t threads;
  float *gallery, *query, *score; /* [rows, width], [batch, width], [batch, rows] */
  uint16_t *half;                 /* the gallery as float16; NULL: it is float32 */
  uint64_t *id;
  train_hit *hit;
  /* seconds: the search, its product in one piece and in pieces; one query, reading the gallery once */
  double search, product, pieces, one, read;
  float sum; /* of the gallery: nobody may leave the reading out */
  int64_t wrong;
} search_bench;

/* Uniform in all directions near enough, of unit length. */
static void fill_row(float *row, int64_t width, uint64_t stream) {
  double square = 0;
  for (int64_t i = 0; i < width; i += 4) {
    core_random_block block = core_random_at(1, stream, (uint64_t)i);
    for (int64_t l = 0; l < 4 && i + l < width; l++) {
      row[i + l] = (float)block.word[l] * 0x1p-31F - 1;
      square += (double)row[i + l] * (double)row[i + l];
    }
  }
  for (int64_t i = 0; i < width; i++) row[i] = (float)(row[i] / sqrt(square));
}

static core_status make_vectors(search_bench *b) {
  size_t numbers = (size_t)(b->rows * b->width);
  b->gallery = aligned_alloc(64, (numbers * sizeof *b->gallery + 63) / 64 * 64);
  b->query = malloc((size_t)(b->batch * b->width) * sizeof *b->query);
  b->score = malloc((size_t)(b->batch * b->rows) * sizeof *b->score);
  b->id = malloc((size_t)b->rows * sizeof *b->id);
  b->hit = malloc((size_t)(b->batch * b->k) * sizeof *b->hit);
  if (b->dtype == CORE_FLOAT16) b->half = malloc(numbers * sizeof *b->half);
  CHECK(b->gallery && b->query && b->score && b->id && b->hit && (b->half || b->dtype != CORE_FLOAT16),
        CORE_ERR_MEMORY, "no memory for %lld vectors of width %lld", (long long)b->rows, (long long)b->width);
#pragma omp parallel for num_threads(b->threads)
  for (int64_t i = 0; i < b->rows; i++) {
    fill_row(b->gallery + i * b->width, b->width, (uint64_t)i);
    b->id[i] = (uint64_t)(b->rows - i);
    for (int64_t c = i * b->width; b->half && c < (i + 1) * b->width; c++)
      b->half[c] = core_half_from_float(b->gallery[c]);
  }
  for (int64_t i = 0; i < b->batch; i++) fill_row(b->query + i * b->width, b->width, (uint64_t)(b->rows + i));
  return CORE_OK;
}

static void free_vectors(search_bench *b) {
  free(b->gallery);
  free(b->query);
  free(b->score);
  free(b->id);
  free(b->hit);
  free(b->half);
}

/* All threads of one context, `piece` rows of the gallery at a time. */
static core_status multiply(const search_bench *b, kern_context *kern, int64_t piece) {
  core_tensor q = core_tensor_2(b->query, CORE_FLOAT32, b->batch, b->width);
  for (int64_t lo = 0; lo < b->rows; lo += piece) {
    int64_t n = b->rows - lo < piece ? b->rows - lo : piece;
    core_tensor x = core_tensor_2(b->gallery + lo * b->width, CORE_FLOAT32, n, b->width);
    TRY(kern_cpu()->gemm(kern, KERN_NT, q, x, KERN_SET,
                         core_tensor_2(b->score + lo * b->batch, CORE_FLOAT32, b->batch, n)));
  }
  return CORE_OK;
}

/* The same with pieces dealt to threads, each multiplying by itself: how the search multiplies. */
static core_status multiply_apart(const search_bench *b, kern_context *const *kern, int64_t piece) {
  core_status failed = CORE_OK;
#pragma omp parallel for schedule(dynamic) num_threads(b->threads)
  for (int64_t lo = 0; lo < b->rows; lo += piece) {
    int64_t n = b->rows - lo < piece ? b->rows - lo : piece;
    int thread = omp_get_thread_num();
    core_tensor q = core_tensor_2(b->query, CORE_FLOAT32, b->batch, b->width);
    core_tensor x = core_tensor_2(b->gallery + lo * b->width, CORE_FLOAT32, n, b->width);
    core_status status =
        kern_cpu()->gemm(kern[thread], KERN_NT, q, x, KERN_SET,
                         core_tensor_2(b->score + thread * piece * b->batch, CORE_FLOAT32, b->batch, n));
#pragma omp critical(launch_bench)
    if (status != CORE_OK) failed = status;
  }
  return failed;
}

static void read_once(search_bench *b) {
  const float *from = b->half ? (const float *)(const void *)b->half : b->gallery;
  int64_t numbers = b->rows * b->width / (b->half ? 2 : 1);
  float sum = 0;
#pragma omp parallel for simd schedule(static) num_threads(b->threads) reduction(+ : sum)
  for (int64_t i = 0; i < numbers; i++) sum += from[i];
  b->sum += sum;
}

static core_status time_products(search_bench *b, kern_context *whole, kern_context *const *apart,
                                 int round) {
  enum { PIECE = 1024 };
  double start = core_clock_now();
  TRY(multiply(b, whole, b->rows));
  keep_shortest(&b->product, start, round);
  start = core_clock_now();
  TRY(multiply_apart(b, apart, PIECE));
  keep_shortest(&b->pieces, start, round);
  start = core_clock_now();
  read_once(b);
  keep_shortest(&b->read, start, round);
  return CORE_OK;
}

/* The exhaustive answer to some queries: scores in float64, the best k by insertion. */
static core_status verify(search_bench *b, const train_hit *hit, int64_t queries) {
  train_hit *best = calloc((size_t)b->k + 1, sizeof *best);
  CHECK(best, CORE_ERR_MEMORY, "no memory to verify");
  for (int64_t q = 0; q < queries; q++) {
    int64_t count = 0;
    for (int64_t i = 0; i < b->rows; i++) {
      double score = 0;
      for (int64_t c = 0; c < b->width; c++) {
        float x = b->half ? core_float_from_half(b->half[i * b->width + c]) : b->gallery[i * b->width + c];
        score += (double)b->query[q * b->width + c] * (double)x;
      }
      int64_t at = count < b->k ? count++ : b->k;
      for (; at > 0 &&
             (best[at - 1].score < score || (best[at - 1].score == score && best[at - 1].id > b->id[i]));
           at--)
        best[at] = best[at - 1];
      best[at] = (train_hit){score, b->id[i], i};
    }
    for (int64_t i = 0; i < b->k; i++) b->wrong += best[i].id != hit[q * b->k + i].id;
  }
  free(best);
  return CORE_OK;
}

static core_status time_searches(search_bench *b, train_search *batched, train_search *single,
                                 kern_context *whole, kern_context *const *apart) {
  for (int round = 0; round < ROUNDS; round++) {
    TRY(time_products(b, whole, apart, round));
    double start = core_clock_now();
    TRY(train_search_run(single, b->query, 1, b->hit));
    keep_shortest(&b->one, start, round);
    start = core_clock_now();
    TRY(train_search_run(batched, b->query, b->batch, b->hit));
    keep_shortest(&b->search, start, round);
  }
  TRY(verify(b, b->hit, b->batch < 4 ? b->batch : 4));
  return CORE_OK;
}

static core_status with_searches(search_bench *b, kern_context *whole, kern_context *const *apart) {
  train_gallery gallery = {.memory = b->half ? (const void *)b->half : b->gallery,
                           .dtype = b->dtype,
                           .rows = b->rows,
                           .width = b->width,
                           .id = b->id};
  train_search_options options = {.threads = b->threads, .k = b->k, .batch = b->batch};
  train_search *batched = NULL, *single = NULL;
  core_status status = train_search_create(&gallery, &options, &batched);
  options.batch = 1;
  if (status == CORE_OK) status = train_search_create(&gallery, &options, &single);
  if (status == CORE_OK) status = time_searches(b, batched, single, whole, apart);
  train_search_destroy(batched);
  train_search_destroy(single);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status with_contexts(search_bench *b) {
  enum { MOST = 256 };
  kern_context *whole = NULL, *apart[MOST] = {NULL};
  kern_limits limits = {.rows = b->batch, .width = b->width, .threads = b->threads};
  core_status status = kern_cpu()->context_create(&limits, &whole);
  limits.threads = 1;
  CHECK(b->threads <= MOST, CORE_ERR_USAGE, "at most %d threads", MOST);
  for (int32_t t = 0; t < b->threads && status == CORE_OK; t++)
    status = kern_cpu()->context_create(&limits, &apart[t]);
  if (status == CORE_OK) status = with_searches(b, whole, apart);
  kern_cpu()->context_destroy(whole);
  for (int32_t t = 0; t < b->threads; t++) kern_cpu()->context_destroy(apart[t]);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static void print_search(const search_bench *b, bool json) {
  double bytes = (double)(b->rows * b->width) * (double)core_dtype_size(b->dtype);
  double flops = 2.0 * (double)b->batch * (double)b->rows * (double)b->width;
  double product = b->product < b->pieces ? b->product : b->pieces;
  if (json) {
    printf(
        "{\"bench\": \"search\", \"rows\": %lld, \"width\": %lld, \"dtype\": \"%s\", \"batch\": %lld, \"k\": "
        "%lld, \"threads\": %d, \"search_seconds\": %.6g, \"product_seconds\": %.6g, "
        "\"product_in_pieces_seconds\": %.6g, \"search_over_product\": %.4f, \"one_seconds\": %.6g, "
        "\"read_seconds\": %.6g, \"one_over_read\": %.4f, \"wrong\": %lld}\n",
        (long long)b->rows, (long long)b->width, core_dtype_text(b->dtype), (long long)b->batch,
        (long long)b->k, b->threads, b->search, b->product, b->pieces, b->search / product, b->one, b->read,
        b->one / b->read, (long long)b->wrong);
    return;
  }
  printf("%lld vectors of width %lld, %s, %d threads; the best %lld\n", (long long)b->rows,
         (long long)b->width, core_dtype_text(b->dtype), b->threads, (long long)b->k);
  printf(
      "%lld queries %.1f ms; their float32 product alone %.1f ms in one piece, %.1f in pieces (%.0f "
      "GFLOP/s): %.3f\n",
      (long long)b->batch, 1e3 * b->search, 1e3 * b->product, 1e3 * b->pieces, flops / product / 1e9,
      b->search / product);
  printf("one query %.1f ms; reading the vectors once %.1f ms (%.1f GB/s): %.3f\n", 1e3 * b->one,
         1e3 * b->read, bytes / b->read / 1e9, b->one / b->read);
  printf("against an exhaustive check: %lld differ\n", (long long)b->wrong);
}

core_status launch_bench_search(comm_world *world, const launch_arguments *arguments) {
  search_bench b = {0};
  int64_t threads = 0;
  const char *dtype = launch_own(arguments, "--dtype");
  CHECK(comm_size(comm_world_group(world)) == 1, CORE_ERR_USAGE, "bench search is for one rank");
  CHECK(sizeof(core_real) == sizeof(float), CORE_ERR_UNSUPPORTED, "bench search is for the float32 build");
  TRY(launch_own_number(arguments, "--rows", 1, INT64_C(1) << 32, 1000000, &b.rows));
  TRY(launch_own_number(arguments, "--width", 1, 65536, 256, &b.width));
  TRY(launch_own_number(arguments, "--batch", 1, 65536, 64, &b.batch));
  TRY(launch_own_number(arguments, "-k", 1, b.rows, b.rows < 10 ? b.rows : 10, &b.k));
  TRY(launch_own_number(arguments, "--threads", 1, 256, omp_get_max_threads(), &threads));
  b.threads = (int32_t)threads;
  b.dtype = dtype ? core_dtype_parse(dtype) : CORE_FLOAT32;
  CHECK(b.dtype == CORE_FLOAT32 || b.dtype == CORE_FLOAT16, CORE_ERR_USAGE,
        "--dtype %s: expected float16 or float32", dtype);
  core_status status = make_vectors(&b);
  if (status == CORE_OK) status = with_contexts(&b);
  if (status == CORE_OK) print_search(&b, arguments->json);
  free_vectors(&b);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  CHECK(b.wrong == 0 && isfinite(b.sum), CORE_ERR_INTERNAL, "%lld answers are wrong", (long long)b.wrong);
  return CORE_OK;
}

/* ---- embed ---- */

enum { EMBED_ROUNDS = 5 };

typedef struct embed_bench {
  double embed;               /* seconds of the slowest rank, shortest of the rounds */
  train_embed_parts parts;    /* the same of each */
  double ratio[EMBED_ROUNDS]; /* embed / forward of each round, sorted */
} embed_bench;

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* A round's two sides follow one another: what else the machine does disturbs both. */
static core_status time_embedding(comm_world *world, train_embedder *embedder, const char *path,
                                  embed_bench *b) {
  for (int round = 0; round < EMBED_ROUNDS; round++) {
    train_embed_parts parts;
    train_embed_figures figures;
    TRY(train_embedder_parts(embedder, &parts));
    TRY(train_embedder_write(embedder, path, CORE_FLOAT32, &figures));
    if (comm_rank(comm_world_group(world)) == 0) (void)unlink(path);
    TRY(comm_all_reduce(comm_world_group(world), COMM_MAX, CORE_FLOAT64, &figures.seconds, 1));
    if (round == 0 || figures.seconds < b->embed) b->embed = figures.seconds;
    if (round == 0 || parts.forward < b->parts.forward) b->parts.forward = parts.forward;
    if (round == 0 || parts.stream < b->parts.stream) b->parts.stream = parts.stream;
    b->ratio[round] = figures.seconds / parts.forward;
  }
  qsort(b->ratio, EMBED_ROUNDS, sizeof *b->ratio, by_value);
  return CORE_OK;
}

static void print_embed(const train_embedder *embedder, const embed_bench *b, int32_t ranks, bool json) {
  const train_vectors_about *about = train_embedder_about(embedder);
  double samples = (double)train_embedder_samples(embedder);
  const char *kind = train_vectors_kind_text(about->kind);
  if (json)
    printf(
        "{\"bench\": \"embed\", \"kind\": \"%s\", \"samples\": %.0f, \"width\": %lld, \"ranks\": %d, "
        "\"embed_seconds\": %.6g, \"forward_seconds\": %.6g, \"stream_seconds\": %.6g, "
        "\"embed_over_forward\": %.4f}\n",
        kind, samples, (long long)about->width, ranks, b->embed, b->parts.forward, b->parts.stream,
        b->ratio[EMBED_ROUNDS / 2]);
  else
    printf(
        "%.0f samples to %s vectors of width %lld on %d rank%s in %.3f s (%.1f k samples/s)\n"
        "streaming their latents alone %.3f s, the forward passes alone %.3f s; embedding / forward passes = "
        "%.3f\n",
        samples, kind, (long long)about->width, ranks, ranks == 1 ? "" : "s", b->embed,
        samples / b->embed / 1e3, b->parts.stream, b->parts.forward, b->ratio[EMBED_ROUNDS / 2]);
}

core_status launch_bench_embed(comm_world *world, const launch_arguments *arguments) {
  launch_arguments changed = *arguments;
  launch_embedder e;
  embed_bench b = {0};
  char path[4096];
  CHECK(arguments->positional_count >= 2 && launch_own(arguments, "-o"), CORE_ERR_USAGE,
        "usage: antiphon bench embed CHECKPOINT [SHARDS] --key MODALITY|--query FROM:TOWARD -o FILE");
  launch_embed want = {.checkpoint = arguments->positional[1],
                       .shards = arguments->positional_count > 2 ? arguments->positional[2] : NULL,
                       .key = launch_own(arguments, "--key"),
                       .query = launch_own(arguments, "--query")};
  snprintf(path, sizeof path, "%s", launch_own(arguments, "-o"));
  CHECK(access(path, F_OK) != 0, CORE_ERR_USAGE, "%s is there already; it would be removed", path);
  TRY(launch_embedder_open(world, &want, &changed, &e));
  core_status status = time_embedding(world, e.embedder, path, &b);
  if (status == CORE_OK && comm_rank(comm_world_group(world)) == 0)
    print_embed(e.embedder, &b, comm_size(comm_world_group(world)), arguments->json);
  launch_embedder_close(&e);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}
