/* Request to stop: SIGTERM, SIGUSR1 and SIGINT set a flag that every loop polls. A second SIGINT ends the
 * process at once. Ranks agree on the flag at the step's end; nothing else may branch on it alone. */
#ifndef CORE_STOP_H
#define CORE_STOP_H

#include <stdbool.h>

#include "core/status.h"

CORE_NODISCARD core_status core_stop_install(void);
bool core_stop_requested(void);
/* Number of the signal that asked, 0 if none. */
int core_stop_signal(void);
/* For tests and for the agreement: sets the flag as a signal would. */
void core_stop_request(int signal_number);

#endif
