/* Learning rate: a pure function of the step. */
#ifndef TRAIN_RATE_H
#define TRAIN_RATE_H

#include "trainer/settings.h"

/* Rate of step t (from 0) of `steps`. Warm-up (t + 1) / w; then
 *   cosine   min + (rate - min) (1 + cos(pi (t - w) / (steps - w))) / 2     (Loshchilov and Hutter 2017)
 *   rsqrt    rate / sqrt(1 + (t - w) / timescale), the last `cooldown` steps linearly to min
 *   constant rate
 * Warm-up and cool-down below 1 are shares of the steps, rounded up. */
double train_rate(const train_settings *settings, int64_t t, int64_t steps);

#endif
