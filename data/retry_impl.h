/* Patience with the system: network file systems refuse a read now and then, and grant it a moment later.
 * Damage does not heal by waiting, so only ERR_IO is worth another attempt. Private to data/. */
#ifndef DATA_RETRY_IMPL_H
#define DATA_RETRY_IMPL_H

#include "core/clock.h"
#include "core/status.h"

enum { DATA_RETRIES = 3 };

typedef struct data_patience {
  int retries; /* attempts made beyond the first; begin with 0 */
} data_patience;

/* After an attempt: whether to make another one. Sleeps first: 10, 40, 160 ms. */
static inline bool data_try_again_priv(data_patience *patience, core_status status) {
  if (status != CORE_ERR_IO || patience->retries == DATA_RETRIES) return false;
  core_clock_sleep(0.01 * (double)(1 << 2 * patience->retries++));
  return true;
}

#endif
