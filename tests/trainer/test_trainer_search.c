/* Exact search against an exhaustive answer: equal scores, every batch, thread count and dtype. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/random.h"
#include "tests/support/test_unit.h"
#include "trainer/serve/search_impl.h"

enum { WIDTH = 40 };

typedef struct scene {
  int64_t rows, queries;
  float *gallery, *query;
  uint16_t *half;
  uint64_t *id;
} scene;

static uint64_t number(uint64_t stream, int64_t i) {
  return core_random_u64(3, stream, (uint64_t)i);
}

/* Ids in no order. */
static void scene_make(scene *s, int64_t rows, int64_t queries) {
  *s = (scene){.rows = rows, .queries = queries};
  s->gallery = malloc((size_t)(rows * WIDTH) * sizeof *s->gallery);
  s->half = malloc((size_t)(rows * WIDTH) * sizeof *s->half);
  s->query = malloc((size_t)(queries * WIDTH) * sizeof *s->query);
  s->id = malloc((size_t)rows * sizeof *s->id);
  int64_t *order = malloc((size_t)rows * sizeof *order);
  assert_true(s->gallery && s->half && s->query && s->id && order);
  core_random_permutation(5, 1, rows, order);
  for (int64_t i = 0; i < rows; i++) s->id[i] = (uint64_t)(1000 + 3 * order[i]);
  free(order);
}

static void scene_free(scene *s) {
  free(s->gallery);
  free(s->half);
  free(s->query);
  free(s->id);
}

/* Values of which every sum is exact in float32: whatever adds them up in whatever order gets the same. */
static void fill_coarse(scene *s) {
  for (int64_t i = 0; i < s->rows * WIDTH; i++) s->gallery[i] = (float)((int)(number(1, i) % 3) - 1) / 16;
  for (int64_t i = 0; i < s->queries * WIDTH; i++) s->query[i] = (float)((int)(number(2, i) % 3) - 1) / 16;
  for (int64_t i = 0; i < s->rows * WIDTH; i++) s->half[i] = core_half_from_float(s->gallery[i]);
}

static void fill_unit(float *row, uint64_t stream) {
  double square = 0;
  for (int64_t c = 0; c < WIDTH; c++) {
    row[c] = (float)core_random_normal(7, stream, (uint64_t)c);
    square += (double)row[c] * (double)row[c];
  }
  for (int64_t c = 0; c < WIDTH; c++) row[c] = (float)(row[c] / sqrt(square));
}

static int by_rank(const void *a, const void *b) {
  const train_hit *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? -1 : 1;
  return x->id < y->id ? -1 : 1;
}

/* All scores, sorted: a plain sum in float64. */
static train_hit *exhaustive(const scene *s, int64_t q) {
  train_hit *all = malloc((size_t)s->rows * sizeof *all);
  assert_non_null(all);
  for (int64_t i = 0; i < s->rows; i++) {
    double score = 0;
    for (int64_t c = 0; c < WIDTH; c++)
      score += (double)s->query[q * WIDTH + c] * (double)s->gallery[i * WIDTH + c];
    all[i] = (train_hit){score, s->id[i], i};
  }
  qsort(all, (size_t)s->rows, sizeof *all, by_rank);
  return all;
}

static train_gallery gallery_of(const scene *s, core_dtype dtype) {
  return (train_gallery){.memory = dtype == CORE_FLOAT16 ? (const void *)s->half : s->gallery,
                         .dtype = dtype,
                         .rows = s->rows,
                         .width = WIDTH,
                         .id = s->id};
}

static train_hit *search(const scene *s, core_dtype dtype, int64_t k, int64_t batch, int32_t threads) {
  train_gallery gallery = gallery_of(s, dtype);
  train_search_options options = {.threads = threads, .k = k, .batch = batch};
  train_search *engine = NULL;
  train_hit *hit = malloc((size_t)(s->queries * k) * sizeof *hit);
  assert_non_null(hit);
  assert_ok(train_search_create(&gallery, &options, &engine));
  assert_ok(train_search_run(engine, s->query, s->queries, hit));
  train_search_destroy(engine);
  return hit;
}

static void expect(const scene *s, core_dtype dtype, int64_t k, int64_t batch, int32_t threads) {
  train_hit *hit = search(s, dtype, k, batch, threads);
  for (int64_t q = 0; q < s->queries; q++) {
    train_hit *best = exhaustive(s, q);
    for (int64_t i = 0; i < k; i++) {
      const train_hit *got = &hit[q * k + i];
      if (got->id != best[i].id || got->row != best[i].row || fabs(got->score - best[i].score) > 1e-12)
        fail_msg(
            "k %lld, batch %lld, %d threads, query %lld, place %lld: expected id %llu (%.17g), got %llu "
            "(%.17g)",
            (long long)k, (long long)batch, threads, (long long)q, (long long)i,
            (unsigned long long)best[i].id, best[i].score, (unsigned long long)got->id, got->score);
    }
    free(best);
  }
  free(hit);
}

/* Scores are multiples of 1/256 between -0.16 and 0.16: dozens of equal ones around every place. */
static void equal_scores(void **state) {
  (void)state;
  static const int64_t ks[] = {1, 2, 10, 100};
  static const int64_t batches[] = {1, 5, 64};
  scene s;
  scene_make(&s, 3001, 37);
  fill_coarse(&s);
  for (int i = 0; i < 4; i++)
    for (int b = 0; b < 3; b++)
      for (int32_t threads = 1; threads <= 3; threads++) {
        expect(&s, CORE_FLOAT32, ks[i], batches[b], threads);
        expect(&s, CORE_FLOAT16, ks[i], batches[b], threads);
      }
  scene_free(&s);
}

/* More rows than one piece, real numbers, each vector five times in different places: float32 sums of equal
 * vectors may differ by where they lie, the order of answers may not. */
static void equal_vectors(void **state) {
  (void)state;
  enum { DISTINCT = 4000 };
  scene s;
  scene_make(&s, 5 * DISTINCT, 9);
  for (int64_t i = 0; i < s.rows; i++) fill_unit(s.gallery + i * WIDTH, (uint64_t)(i * 7 % DISTINCT));
  for (int64_t q = 0; q < s.queries; q++) fill_unit(s.query + q * WIDTH, (uint64_t)(DISTINCT + q));
  for (int32_t threads = 1; threads <= 2; threads++) {
    expect(&s, CORE_FLOAT32, 12, 1, threads);
    expect(&s, CORE_FLOAT32, 12, 4, threads);
    expect(&s, CORE_FLOAT32, 12, 64, threads);
  }
  scene_free(&s);
}

/* Distances far below what float32 sums resolve: 1e-8 of the score. */
static void close_scores(void **state) {
  (void)state;
  scene s;
  scene_make(&s, 6000, 3);
  for (int64_t q = 0; q < s.queries; q++) fill_unit(s.query + q * WIDTH, (uint64_t)q);
  for (int64_t i = 0; i < s.rows; i++) {
    fill_unit(s.gallery + i * WIDTH, 1);
    for (int64_t n = 0; n < 4; n++) {
      float *value = &s.gallery[i * WIDTH + (int64_t)(number(9, 4 * i + n) % WIDTH)];
      *value = nextafterf(*value, 0);
    }
  }
  expect(&s, CORE_FLOAT32, 50, 3, 2);
  scene_free(&s);
}

/* A gallery of one vector, over and over: the lowest ids. */
static void all_equal(void **state) {
  (void)state;
  scene s;
  scene_make(&s, 2500, 2);
  for (int64_t i = 0; i < s.rows; i++) fill_unit(s.gallery + i * WIDTH, 1);
  for (int64_t q = 0; q < s.queries; q++) fill_unit(s.query + q * WIDTH, (uint64_t)(2 + q));
  train_hit *hit = search(&s, CORE_FLOAT32, 7, 2, 2);
  for (int64_t i = 0; i < 14; i++) assert_int_equal(hit[i].id, 1000 + 3 * (i % 7));
  free(hit);
  scene_free(&s);
}

/* No vector of a gallery of several pieces is left out. */
static void each_finds_itself(void **state) {
  (void)state;
  enum { MANY = 15000 };
  scene s;
  scene_make(&s, MANY, MANY);
  for (int64_t i = 0; i < MANY; i++) fill_unit(s.gallery + i * WIDTH, (uint64_t)i);
  memcpy(s.query, s.gallery, (size_t)(MANY * WIDTH) * sizeof *s.query);
  train_hit *hit = search(&s, CORE_FLOAT32, 1, 64, 2);
  for (int64_t i = 0; i < MANY; i++)
    if (hit[i].row != i || hit[i].id != s.id[i] || fabs(hit[i].score - 1) > 1e-6)
      fail_msg("vector %lld finds row %lld (%.9g)", (long long)i, (long long)hit[i].row, hit[i].score);
  free(hit);
  scene_free(&s);
}

/* All of a small gallery, and more queries than are searched at a time. */
static void every_vector(void **state) {
  (void)state;
  scene s;
  scene_make(&s, 3, 2100);
  fill_coarse(&s);
  expect(&s, CORE_FLOAT32, 3, 64, 2);
  expect(&s, CORE_FLOAT32, 1, 4000, 2);
  scene_free(&s);
  scene_make(&s, 1, 1);
  fill_coarse(&s);
  expect(&s, CORE_FLOAT16, 1, 0, 0);
  scene_free(&s);
}

static void refused(void **state) {
  (void)state;
  scene s;
  train_search *engine = NULL;
  train_hit hit[8];
  scene_make(&s, 20, 4);
  fill_coarse(&s);
  train_gallery gallery = gallery_of(&s, CORE_FLOAT32);
  train_search_options options = {.threads = 1, .k = 0};
  assert_error(train_search_create(&gallery, &options, &engine), CORE_ERR_ARGUMENT, "expected 1 to 20");
  options.k = 21;
  assert_error(train_search_create(&gallery, &options, &engine), CORE_ERR_ARGUMENT, "expected 1 to 20");
  options.k = 2;
  options.batch = -1;
  assert_error(train_search_create(&gallery, &options, &engine), CORE_ERR_ARGUMENT, "batches of -1");
  options.batch = 0;
  gallery.rows = 0;
  assert_error(train_search_create(&gallery, &options, &engine), CORE_ERR_ARGUMENT, "empty gallery");
  gallery.rows = 20;
  assert_ok(train_search_create(&gallery, &options, &engine));
  s.query[2 * WIDTH + 5] = NAN;
  assert_error(train_search_run(engine, s.query, 4, hit), CORE_ERR_NON_FINITE, "query 2: coordinate 5");
  s.query[2 * WIDTH + 5] = -INFINITY;
  assert_error(train_search_run(engine, s.query, 4, hit), CORE_ERR_NON_FINITE, "query 2: coordinate 5");
  s.query[2 * WIDTH + 5] = 1.01F;
  assert_error(train_search_run(engine, s.query, 4, hit), CORE_ERR_ARGUMENT, "query 2 is longer than 1");
  assert_ok(train_search_run(engine, s.query, 2, hit));
  train_search_destroy(engine);
  scene_free(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(equal_scores), cmocka_unit_test(equal_vectors),     cmocka_unit_test(close_scores),
      cmocka_unit_test(all_equal),    cmocka_unit_test(each_finds_itself), cmocka_unit_test(every_vector),
      cmocka_unit_test(refused)};
  return cmocka_run_group_tests_name("exact search", tests, NULL, NULL);
}
