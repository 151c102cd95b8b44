#include "trainer/schedule/alternation.h"

#include <math.h>
#include <string.h>

#include "core/random.h"

void train_alternation_make(const train_settings *settings, train_alternation *out) {
  memset(out, 0, sizeof *out);
  out->kind = (train_alternate)settings->schedule.alternate;
  out->directions = (int32_t)settings->objective.directions_count;
  out->seed = settings->run.seed;
  out->gain = settings->schedule.gain;
  out->most = settings->schedule.most;
  double D = out->directions > 0 ? out->directions : 1;
  out->least = settings->schedule.least > 0 ? settings->schedule.least : 0.1 / D;
  for (int32_t d = 0; d < out->directions; d++) {
    bool blocks = out->kind == TRAIN_ALTERNATE_BLOCK && d < (int32_t)settings->schedule.steps_count;
    out->block[d] = blocks ? settings->schedule.steps[d] : 1;
    out->cycle += out->block[d];
    out->probability[d] = 1 / D;
  }
}

/* Where in the cycle direction d begins. */
static int64_t begin_of(const train_alternation *a, int32_t d) {
  int64_t begin = 0;
  for (int32_t i = 0; i < d; i++) begin += a->block[i];
  return begin;
}

static int32_t drawn(const train_alternation *a, int64_t step) {
  double at = core_random_uniform(a->seed, core_random_stream(CORE_RANDOM_SCHEDULE, 0, 0), (uint64_t)step);
  for (int32_t d = 0; d < a->directions - 1; d++) {
    if (at < a->probability[d]) return d;
    at -= a->probability[d];
  }
  return a->directions - 1;
}

int32_t train_alternation_direction(const train_alternation *a, int64_t step) {
  if (a->kind == TRAIN_ALTERNATE_NONE || a->directions == 0) return -1;
  if (a->kind == TRAIN_ALTERNATE_ADAPTIVE) return drawn(a, step);
  int64_t at = step % a->cycle;
  int32_t d = 0;
  while (at >= a->block[d]) at -= a->block[d++];
  return d;
}

int64_t train_alternation_own(const train_alternation *a, int32_t d, int64_t step) {
  if (a->kind == TRAIN_ALTERNATE_NONE || a->directions == 0) return step;
  if (a->kind == TRAIN_ALTERNATE_ADAPTIVE) return a->taken[d];
  int64_t inside = step % a->cycle - begin_of(a, d);
  int64_t rest = inside < 0 ? 0 : inside < a->block[d] ? inside : a->block[d];
  return step / a->cycle * a->block[d] + rest;
}

int64_t train_alternation_total(const train_alternation *a, int32_t d, int64_t steps) {
  if (a->kind == TRAIN_ALTERNATE_ADAPTIVE) return (steps + a->directions - 1) / a->directions;
  return train_alternation_own(a, d, steps);
}

void train_alternation_done(train_alternation *a, int32_t d) {
  if (a->kind == TRAIN_ALTERNATE_ADAPTIVE) a->taken[d]++;
}

void train_alternation_adapt(train_alternation *a, const double *recall) {
  double mean = 0, total = 0;
  if (a->kind != TRAIN_ALTERNATE_ADAPTIVE) return;
  for (int32_t d = 0; d < a->directions; d++) mean += recall[d] / a->directions;
  for (int32_t d = 0; d < a->directions; d++) {
    double wanted = 1.0 / a->directions + a->gain * (mean - recall[d]);
    a->probability[d] = fmin(fmax(wanted, a->least), a->most);
    total += a->probability[d];
  }
  for (int32_t d = 0; d < a->directions; d++) a->probability[d] /= total;
}
