#include "trainer/schedule/rate.h"

#include <math.h>

static int64_t steps_of(double value, int64_t steps) {
  return (int64_t)ceil((value < 1 ? value * (double)steps : value) - 1e-9); /* 0.07 * 100 is 7, not 8 */
}

double train_rate(const train_settings *settings, int64_t t, int64_t steps) {
  const double peak = settings->optimizer.rate, low = settings->optimizer.min_rate;
  int64_t warmup = steps_of(settings->optimizer.warmup, steps),
          cooldown = steps_of(settings->optimizer.cooldown, steps);
  if (t < warmup) return peak * (double)(t + 1) / (double)warmup;
  double past = (double)(t - warmup), rate = peak;
  if (settings->optimizer.schedule == TRAIN_RATE_COSINE) {
    double span = steps > warmup ? (double)(steps - warmup) : 1;
    return low + (peak - low) * 0.5 * (1 + cos(3.14159265358979323846 * fmin(past / span, 1)));
  }
  if (settings->optimizer.schedule == TRAIN_RATE_RSQRT) {
    rate = peak / sqrt(1 + past / settings->optimizer.timescale);
    if (t >= steps - cooldown && cooldown > 0) {
      double start =
          peak / sqrt(1 + fmax((double)(steps - cooldown - warmup), 0) / settings->optimizer.timescale);
      rate = low + (start - low) * (double)(steps - t) / (double)cooldown;
    }
  }
  return fmax(rate, low);
}
