#include "core/stop.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h> /* _exit */

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) {
  if (number == SIGINT && stop_signal == SIGINT) _exit(128 + SIGINT);
  stop_signal = number;
}

core_status core_stop_install(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
    CHECK(sigaction(signals[i], &action, NULL) == 0, CORE_ERR_INTERNAL, "cannot handle signal %d: %s",
          signals[i], strerror(errno));
  return CORE_OK;
}

bool core_stop_requested(void) {
  return stop_signal != 0;
}

int core_stop_signal(void) {
  return stop_signal;
}

void core_stop_request(int signal_number) {
  stop_signal = signal_number;
}
