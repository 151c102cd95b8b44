/* The loops over gallery and queries. Each thread takes pieces of the gallery, as they come, multiplies them
 * with a batch of queries after the other while the piece lies in its cache, and keeps the best of its own;
 * in the end those of all threads are put together. */
#include "trainer/serve/search.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "core/stop.h"
#include "kernels/kernels.h"
#include "trainer/serve/search_impl.h"

enum {
  BATCH = 64,
  GROUP = 1024,           /* queries for which a file is read once */
  MOST_MATCHES = 1 << 24, /* kept at a time by all threads: 384 MiB */
  PIECE_BYTES = 1 << 20   /* of core_real, about */
};

/* What a thread works with. */
typedef struct worker {
  kern_context *kern;
  core_real *rows;  /* [piece_rows, width] where vectors are not used as they lie */
  void *stored;     /* the same, as stored in a file */
  core_real *score; /* [batch, piece_rows] */
  train_hit *match; /* [group, k] */
  train_best *best; /* [group] */
} worker;

struct train_search {
  train_gallery gallery;
  int64_t k, batch, group, pieces, piece_rows; /* rows: of the largest piece */
  int64_t *piece;                              /* [pieces + 1] first row, or first block of a file */
  int32_t threads;
  double slack;
  core_real *query;      /* [group, width] */
  core_tensor zero, one; /* [width]: standardize with them widens */
  core_real *constant;
  worker *worker; /* [threads] */
};

/* ---- memory ---- */

/* Pieces of about PIECE_BYTES: rows of memory, or whole blocks of a file. */
static core_status cut_pieces(train_search *s) {
  const train_gallery *g = &s->gallery;
  int64_t rows = PIECE_BYTES / ((int64_t)sizeof(core_real) * g->width), at = 0;
  rows = rows < 64 ? 64 : rows;
  int64_t units = g->file ? train_vectors_blocks(g->file) : (g->rows + rows - 1) / rows;
  s->piece = malloc((size_t)(units + 1) * sizeof *s->piece);
  CHECK(s->piece, CORE_ERR_MEMORY, "no memory for %lld pieces of the gallery", (long long)units);
  s->piece[0] = 0;
  for (int64_t u = 0; u < units; u++) {
    int64_t end = g->file         ? train_vectors_block_row(g->file, u + 1)
                  : u + 1 < units ? (u + 1) * rows
                                  : g->rows;
    if (end - at < rows && u + 1 < units) continue;
    s->piece[++s->pieces] = g->file ? u + 1 : end;
    if (end - at > s->piece_rows) s->piece_rows = end - at;
    at = end;
  }
  return CORE_OK;
}

static core_status take_worker(train_search *s, worker *w) {
  const train_gallery *g = &s->gallery;
  size_t piece = (size_t)(s->piece_rows * g->width), matches = (size_t)(s->group * s->k);
  bool widens = g->file || g->dtype != CORE_REAL_DTYPE;
  kern_limits limits = {.rows = s->batch, .width = g->width, .threads = 1};
  TRY(kern_cpu()->context_create(&limits, &w->kern));
  w->rows = malloc(widens ? piece * sizeof *w->rows : 1);
  w->stored = malloc(g->file ? piece * core_dtype_size(g->dtype) : 1);
  w->score = malloc((size_t)(s->batch * s->piece_rows) * sizeof *w->score);
  w->match = malloc(matches * sizeof *w->match);
  w->best = malloc((size_t)s->group * sizeof *w->best);
  CHECK(w->rows && w->stored && w->score && w->match && w->best, CORE_ERR_MEMORY,
        "no memory to search %lld vectors at a time for the best %lld of %lld queries",
        (long long)s->piece_rows, (long long)s->k, (long long)s->group);
  return CORE_OK;
}

static core_status take_memory(train_search *s) {
  int64_t width = s->gallery.width;
  s->worker = calloc((size_t)s->threads, sizeof *s->worker);
  s->query = malloc((size_t)(s->group * width) * sizeof *s->query);
  s->constant = calloc((size_t)(2 * width), sizeof *s->constant);
  CHECK(s->worker && s->query && s->constant, CORE_ERR_MEMORY, "no memory for %lld queries",
        (long long)s->group);
  for (int64_t i = 0; i < width; i++) s->constant[width + i] = 1;
  s->zero = core_tensor_1(s->constant, CORE_REAL_DTYPE, width);
  s->one = core_tensor_1(s->constant + width, CORE_REAL_DTYPE, width);
  TRY(cut_pieces(s));
  for (int32_t t = 0; t < s->threads; t++) TRY(take_worker(s, &s->worker[t]));
  return CORE_OK;
}

static core_status check_options(const train_gallery *g, const train_search_options *o) {
  CHECK(g->rows > 0 && g->width > 0, CORE_ERR_ARGUMENT, "an empty gallery: %lld vectors of width %lld",
        (long long)g->rows, (long long)g->width);
  CHECK(o->k >= 1 && o->k <= g->rows, CORE_ERR_ARGUMENT, "the best %lld of %lld vectors: expected 1 to %lld",
        (long long)o->k, (long long)g->rows, (long long)g->rows);
  CHECK(o->k <= MOST_MATCHES, CORE_ERR_ARGUMENT, "the best %lld vectors: at most %d", (long long)o->k,
        (int)MOST_MATCHES);
  CHECK(o->batch >= 0 && o->batch <= 65536 && o->threads >= 0 && o->threads <= 1024, CORE_ERR_ARGUMENT,
        "batches of %lld queries on %d threads: expected at most 65536 and 1024", (long long)o->batch,
        o->threads);
  return CORE_OK;
}

core_status train_search_create(const train_gallery *gallery, const train_search_options *options,
                                train_search **out) {
  TRY(check_options(gallery, options));
  train_search *s = calloc(1, sizeof *s);
  CHECK(s, CORE_ERR_MEMORY, "no memory to search");
  s->gallery = *gallery;
  s->k = options->k;
  s->batch = options->batch ? options->batch : BATCH;
  s->threads = options->threads ? options->threads : omp_get_max_threads();
  s->group = s->batch > GROUP ? s->batch : GROUP / s->batch * s->batch;
  if (s->group > MOST_MATCHES / s->k / s->threads) s->group = MOST_MATCHES / s->k / s->threads;
  if (s->group < 1) s->group = 1;
  if (s->batch > s->group) s->batch = s->group;
  /* Twice the bound for vectors of 1 + 1e-3 at most, and the rounding of the threshold itself. */
  s->slack = 2.1 * ((double)gallery->width + 4) * (sizeof(core_real) == 4 ? 0x1p-24 : 0x1p-53);
  core_status status = take_memory(s);
  if (status != CORE_OK) {
    train_search_destroy(s);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = s;
  return CORE_OK;
}

void train_search_destroy(train_search *s) {
  if (!s) return;
  for (int32_t t = 0; s->worker && t < s->threads; t++) {
    worker *w = &s->worker[t];
    kern_cpu()->context_destroy(w->kern);
    free(w->rows);
    free(w->stored);
    free(w->score);
    free(w->match);
    free(w->best);
  }
  free(s->worker);
  free(s->query);
  free(s->constant);
  free(s->piece);
  free(s);
}

int64_t train_search_group(const train_search *search) {
  return search->group;
}

int32_t train_search_threads(const train_search *search) {
  return search->threads;
}

/* ---- one piece of the gallery ---- */

static core_status widen(const train_search *s, worker *w, const void *stored, int64_t n) {
  const kern_ops *ops = kern_cpu();
  int64_t width = s->gallery.width;
  core_tensor x = core_tensor_2((void *)stored, s->gallery.dtype, n, width);
  TRY(ops->standardize(w->kern, x, s->zero, s->one, core_tensor_2(w->rows, CORE_REAL_DTYPE, n, width)));
  return CORE_OK;
}

/* The rows of piece p, as numbers to compute with. */
static core_status fetch(const train_search *s, worker *w, int64_t p, const core_real **rows, int64_t *first,
                         int64_t *n) {
  const train_gallery *g = &s->gallery;
  int64_t lo = s->piece[p], hi = s->piece[p + 1];
  if (g->file) {
    *first = train_vectors_block_row(g->file, lo);
    *n = train_vectors_block_row(g->file, hi) - *first;
    TRY(train_vectors_read(g->file, lo, hi, w->stored));
    TRY(widen(s, w, w->stored, *n));
    *rows = w->rows;
    int64_t bad = train_first_bad_priv(*rows, *n, g->width);
    CHECK(bad == *n, CORE_ERR_CORRUPT, "%s: vector %lld is not of unit length", train_vectors_path(g->file),
          (long long)(*first + bad));
    return CORE_OK;
  }
  *first = lo;
  *n = hi - lo;
  const char *at = (const char *)g->memory + lo * g->width * (int64_t)core_dtype_size(g->dtype);
  *rows = g->dtype == CORE_REAL_DTYPE ? (const core_real *)(const void *)at : w->rows;
  if (g->dtype != CORE_REAL_DTYPE) TRY(widen(s, w, at, *n));
  return CORE_OK;
}

/* One query at a time: the vectors are the matrix, the query the vector. */
static core_status multiply(const train_search *s, worker *w, const core_real *rows, int64_t n,
                            const core_real *query, int64_t count) {
  int64_t width = s->gallery.width;
  core_tensor x = core_tensor_2((core_real *)rows, CORE_REAL_DTYPE, n, width);
  core_tensor q = core_tensor_2((core_real *)query, CORE_REAL_DTYPE, count, width);
  if (count == 1)
    TRY(kern_cpu()->gemm(w->kern, KERN_NT, x, q, KERN_SET, core_tensor_2(w->score, CORE_REAL_DTYPE, n, 1)));
  else
    TRY(kern_cpu()->gemm(w->kern, KERN_NT, q, x, KERN_SET,
                         core_tensor_2(w->score, CORE_REAL_DTYPE, count, n)));
  return CORE_OK;
}

static core_status search_piece(const train_search *s, worker *w, int64_t p, int64_t count) {
  const core_real *rows = NULL;
  int64_t first = 0, n = 0, width = s->gallery.width;
  CHECK(!core_stop_requested(), CORE_ERR_STOPPED, "stopped while searching");
  TRY(fetch(s, w, p, &rows, &first, &n));
  for (int64_t lo = 0; lo < count; lo += s->batch) {
    int64_t here = count - lo < s->batch ? count - lo : s->batch;
    TRY(multiply(s, w, rows, n, s->query + lo * width, here));
    for (int64_t q = 0; q < here; q++) {
      train_scores scores = {.score = w->score + q * n,
                             .query = s->query + (lo + q) * width,
                             .row = rows,
                             .n = n,
                             .width = width,
                             .first = first,
                             .id = s->gallery.id,
                             .slack = s->slack};
      train_best_select_priv(&w->best[lo + q], &scores);
    }
  }
  return CORE_OK;
}

/* ---- all of it ---- */

/* Errors of several threads: that of the first piece. */
static core_status search_pieces(train_search *s, int64_t count) {
  core_status first = CORE_OK;
  int64_t failed = s->pieces;
  core_error record;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
  for (int64_t p = 0; p < s->pieces; p++) {
    int64_t limit;
#pragma omp atomic read
    limit = failed;
    if (p > limit) continue;
    core_status status = search_piece(s, &s->worker[omp_get_thread_num()], p, count);
    if (status == CORE_OK) continue;
#pragma omp critical(train_search)
    if (p < failed) {
#pragma omp atomic write
      failed = p;
      first = status;
      core_error_save(&record);
    }
  }
  return first == CORE_OK ? CORE_OK : core_error_restore(&record);
}

/* The best of all threads, put into the first one's heap. */
static void gather(train_search *s, int64_t q, train_hit *match) {
  train_best *best = &s->worker[0].best[q];
  for (int32_t t = 1; t < s->threads; t++) {
    const train_best *other = &s->worker[t].best[q];
    for (int64_t i = 0; i < other->count; i++) train_best_offer_priv(best, other->heap[i]);
  }
  train_best_sort_priv(best);
  memcpy(match, best->heap, (size_t)best->count * sizeof *match);
}

static core_status take_queries(train_search *s, const float *query, int64_t first, int64_t count) {
  int64_t width = s->gallery.width;
  for (int64_t i = 0; i < count * width; i++) s->query[i] = query[i];
  for (int64_t i = 0; i < count * width; i++)
    CHECK(isfinite(query[i]), CORE_ERR_NON_FINITE, "query %lld: coordinate %lld is %g",
          (long long)(first + i / width), (long long)(i % width), (double)query[i]);
  int64_t bad = train_first_bad_priv(s->query, count, width);
  CHECK(bad == count, CORE_ERR_ARGUMENT, "query %lld is longer than 1; vectors are normalised",
        (long long)(first + bad));
  for (int32_t t = 0; t < s->threads; t++)
    for (int64_t q = 0; q < count; q++)
      s->worker[t].best[q] = (train_best){.heap = s->worker[t].match + q * s->k, .k = s->k};
  return CORE_OK;
}

core_status train_search_run(train_search *s, const float *query, int64_t count, train_hit *match) {
  for (int64_t lo = 0; lo < count; lo += s->group) {
    int64_t here = count - lo < s->group ? count - lo : s->group;
    TRY(take_queries(s, query + lo * s->gallery.width, lo, here));
    TRY(search_pieces(s, here));
    for (int64_t q = 0; q < here; q++) gather(s, q, match + (lo + q) * s->k);
  }
  return CORE_OK;
}
