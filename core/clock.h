/* Monotonic time and waiting. */
#ifndef CORE_CLOCK_H
#define CORE_CLOCK_H

#include <stdint.h>

/* Seconds since an arbitrary fixed point; never goes back. */
double core_clock_now(void);
void core_clock_sleep(double seconds);

#endif
