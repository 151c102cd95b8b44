/* MPI gives its start no deadline: a rank that was lost while the ranks find one another leaves the others
 * waiting for ever. A thread of its own counts the seconds; it makes no call of MPI. */
#include <errno.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h> /* _exit */

#include "comm/comm_impl.h"

static void *watch(void *argument) {
  comm_start_guard *guard = argument;
  struct timespec end;
  clock_gettime(CLOCK_MONOTONIC, &end); /* a clock that is set does not fire it */
  end.tv_sec += (time_t)guard->deadline + 1;
  int result = 0;
  pthread_mutex_lock(&guard->lock);
  while (!guard->started && result != ETIMEDOUT)
    result = pthread_cond_timedwait(&guard->change, &guard->lock, &end);
  bool late = !guard->started;
  pthread_mutex_unlock(&guard->lock);
  if (!late) return NULL;
  /* Nothing can be agreed or ended in order before MPI has started: its launcher sees this process end. */
  (void)fprintf(
      stderr,
      "error: the ranks have not found one another within %.0f s: one of them was lost or stands still, or "
      "the hosts cannot reach one another (ERR_TIMEOUT)\n",
      guard->deadline);
  _exit(1);
}

core_status comm_start_guard_begin_priv(comm_start_guard *guard, double deadline) {
  pthread_condattr_t clock;
  *guard = (comm_start_guard){.deadline = deadline};
  pthread_mutex_init(&guard->lock, NULL);
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_cond_init(&guard->change, &clock);
  pthread_condattr_destroy(&clock);
  CHECK(pthread_create(&guard->thread, NULL, watch, guard) == 0, CORE_ERR_MEMORY, "cannot start a thread");
  guard->running = true;
  return CORE_OK;
}

void comm_start_guard_end_priv(comm_start_guard *guard) {
  if (!guard->running) return;
  pthread_mutex_lock(&guard->lock);
  guard->started = true;
  pthread_cond_signal(&guard->change);
  pthread_mutex_unlock(&guard->lock);
  pthread_join(guard->thread, NULL);
  pthread_cond_destroy(&guard->change);
  pthread_mutex_destroy(&guard->lock);
  guard->running = false;
}
