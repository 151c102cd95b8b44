/* Private to trainer/serve: the best k of a stream of scores. */
#ifndef TRAIN_SEARCH_IMPL_H
#define TRAIN_SEARCH_IMPL_H

#include "trainer/serve/search.h"

/* The best so far of one query: a heap whose first is the worst. */
typedef struct train_best {
  train_hit *heap; /* [k] */
  int64_t k, count;
} train_best;

static inline bool train_hit_before(const train_hit *a, const train_hit *b) {
  return a->score > b->score || (a->score == b->score && a->id < b->id);
}
/* Takes a match that is among the best k so far, giving up the worst. */
void train_best_offer_priv(train_best *best, train_hit match);
/* Best first; afterwards nothing can be offered. */
void train_best_sort_priv(train_best *best);
/* The score of the definition in search.h. */
double train_score_priv(const core_real *query, const core_real *row, int64_t width);

/* Offers those of scores[n] (approximate, off by at most `slack`) that may be among the best. row: [n, width]
 * in memory; first: the gallery's row of the first one; id: of the gallery. */
typedef struct train_scores {
  const core_real *score, *query, *row;
  int64_t n, width, first;
  const uint64_t *id;
  double slack;
} train_scores;
void train_best_select_priv(train_best *best, const train_scores *scores);

/* First of n rows that is longer than 1 (but for rounding) or not finite; n: none. */
int64_t train_first_bad_priv(const core_real *rows, int64_t n, int64_t width);

#endif
