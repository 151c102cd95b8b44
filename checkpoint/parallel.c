/* Threads of checkpoint/: they compute and use the local disk, and never communicate. */
#include <signal.h>
#include <string.h>
#include <sys/resource.h> /* setpriority */
#include <sys/syscall.h>
#include <unistd.h> /* syscall */

#include "checkpoint/checkpoint_impl.h"

core_status ckpt_thread_start(pthread_t *thread, void *(*function)(void *), void *argument) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(thread, NULL, function, argument);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  CHECK(error == 0, CORE_ERR_MEMORY, "cannot start a thread: %s", strerror(error));
  return CORE_OK;
}

void ckpt_thread_give_way(void) {
  enum {
    IO_OF_THREAD = 1,
    IO_BEST_EFFORT = 2 << 13,
    IO_LAST = 7
  }; /* of ioprio_set(2), which has no header */
  (void)setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + CKPT_NICE);
  (void)syscall(SYS_ioprio_set, IO_OF_THREAD, 0, IO_BEST_EFFORT | IO_LAST);
}

typedef struct parallel_run {
  ckpt_work work;
  void *context;
  int64_t items;
  atomic_llong next;
  atomic_int workers;
  pthread_mutex_t lock;
  int64_t failed; /* lowest item that failed, `items` if none; under the lock, with error */
  core_error error;
} parallel_run;

static void keep_lowest(parallel_run *run, int64_t item) {
  pthread_mutex_lock(&run->lock);
  if (item < run->failed) {
    run->failed = item;
    core_error_save(&run->error);
  }
  pthread_mutex_unlock(&run->lock);
}

static void *work_loop(void *argument) {
  parallel_run *run = argument;
  int32_t worker = atomic_fetch_add(&run->workers, 1);
  for (;;) {
    int64_t item = atomic_fetch_add(&run->next, 1);
    if (item >= run->items) return NULL;
    if (run->work(run->context, worker, item) == CORE_OK) continue;
    keep_lowest(run, item);
    atomic_store(&run->next, run->items);
  }
}

core_status ckpt_parallel(int32_t threads, int64_t items, ckpt_work work, void *context) {
  parallel_run run = {.work = work, .context = context, .items = items, .failed = items};
  pthread_t thread[CKPT_MAX_THREADS];
  pthread_mutex_init(&run.lock, NULL);
  int32_t started = 0;
  while (started + 1 < threads && started + 1 < items) {
    if (ckpt_thread_start(&thread[started], work_loop, &run) != CORE_OK) {
      core_error_clear(); /* fewer threads do the same work */
      break;
    }
    started++;
  }
  (void)work_loop(&run);
  for (int32_t t = 0; t < started; t++) pthread_join(thread[t], NULL);
  pthread_mutex_destroy(&run.lock);
  return run.failed < items ? core_error_restore(&run.error) : CORE_OK;
}
