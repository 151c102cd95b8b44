/* Selection: which scores may matter, their exact values, the best k of them. */
#include <math.h>
#include <stdlib.h>

#include "trainer/serve/search_impl.h"

static void sift_down(train_hit *heap, int64_t count, int64_t at) {
  for (;;) {
    int64_t worst = at;
    for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < count; child++)
      if (train_hit_before(&heap[worst], &heap[child])) worst = child;
    if (worst == at) return;
    train_hit moved = heap[at];
    heap[at] = heap[worst];
    heap[worst] = moved;
    at = worst;
  }
}

void train_best_offer_priv(train_best *best, train_hit match) {
  train_hit *heap = best->heap;
  if (best->count == best->k) {
    if (!train_hit_before(&match, &heap[0])) return;
    heap[0] = match;
    sift_down(heap, best->count, 0);
    return;
  }
  int64_t at = best->count++;
  for (; at > 0 && train_hit_before(&heap[(at - 1) / 2], &match); at = (at - 1) / 2)
    heap[at] = heap[(at - 1) / 2];
  heap[at] = match;
}

static int compare(const void *a, const void *b) {
  const train_hit *x = a, *y = b;
  return train_hit_before(x, y) ? -1 : train_hit_before(y, x) ? 1 : 0;
}

void train_best_sort_priv(train_best *best) {
  qsort(best->heap, (size_t)best->count, sizeof *best->heap, compare);
}

/* Eight sums, so that the compiler need not keep one order of additions to keep the result. */
double train_score_priv(const core_real *query, const core_real *row, int64_t width) {
  enum { LANES = 8 };
  double sum[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    for (int l = 0; l < LANES; l++) sum[l] += (double)query[i + l] * (double)row[i + l];
  for (int l = 0; i + l < width; l++) sum[l] += (double)query[i + l] * (double)row[i + l];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

/* Scores from here on may be among the best. */
static core_real threshold_of(const train_best *best, double slack) {
  if (best->count < best->k) return -INFINITY;
  return (core_real)(best->heap[0].score - slack); /* slack has room for this rounding */
}

static int any_above(const core_real *score, int64_t n, core_real threshold) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < n; i++) any |= score[i] >= threshold;
  return any;
}

void train_best_select_priv(train_best *best, const train_scores *s) {
  enum { RUN = 256 };
  core_real threshold = threshold_of(best, s->slack);
  for (int64_t lo = 0; lo < s->n; lo += RUN) {
    int64_t n = s->n - lo < RUN ? s->n - lo : RUN;
    if (!any_above(s->score + lo, n, threshold)) continue;
    for (int64_t i = lo; i < lo + n; i++) {
      if (!(s->score[i] >= threshold)) continue;
      double score = train_score_priv(s->query, s->row + i * s->width, s->width);
      train_best_offer_priv(best, (train_hit){score, s->id[s->first + i], s->first + i});
      threshold = threshold_of(best, s->slack);
    }
  }
}
