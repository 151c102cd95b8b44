#include "trainer/schedule/early_stopping.h"

void train_early_stopping_make(const train_settings *settings, train_early_stopping *out) {
  *out = (train_early_stopping){.patience = settings->run.early_stopping.patience,
                                .min_delta = settings->run.early_stopping.min_delta,
                                .best_step = -1,
                                .risen_step = -1,
                                .seen = -1};
}

bool train_early_stopping_observe(train_early_stopping *s, int64_t step, double recall) {
  if (step <= s->seen) return step == s->best_step;
  s->seen = step;
  if (s->risen_step < 0 || recall > s->risen + s->min_delta) {
    s->risen = recall;
    s->risen_step = step;
    s->stale = 0;
  } else {
    s->stale++;
  }
  if (s->best_step >= 0 && !(recall > s->best)) return false;
  s->best = recall;
  s->best_step = step;
  return true;
}

bool train_early_stopping_due(const train_early_stopping *s) {
  return s->patience > 0 && s->stale >= s->patience;
}
