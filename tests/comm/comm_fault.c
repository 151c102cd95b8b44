/* comm_fault SCENARIO DIRECTORY: one job that goes wrong in one way. run_comm_fault.sh judges how it ends.
 * The rank that misbehaves is the last. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm.h"
#include "core/clock.h"
#include "core/log.h"

static comm_world *job;

/* The judge counts from here: how long mpirun takes to start ranks is not the matter. */
static void mark_begin(const char *directory) {
  char path[512];
  snprintf(path, sizeof path, "%s/began", directory);
  FILE *file = fopen(path, "w");
  if (file) fclose(file);
}

static core_status reduce(int64_t times) {
  double sum[3] = {1, 2, 3};
  for (int64_t i = 0; i < times; i++)
    TRY(comm_all_reduce(comm_world_group(job), COMM_SUM, CORE_FLOAT64, sum, 3));
  return CORE_OK;
}

/* The process stands still until somebody continues it. */
static core_status stand_still(double seconds) {
  pid_t stopped = getpid();
  if (seconds > 0 && fork() == 0) {
    core_clock_sleep(seconds);
    kill(stopped, SIGCONT);
    _exit(0);
  }
  raise(SIGSTOP);
  TRY(reduce(1));
  return CORE_OK;
}

static core_status late(bool last) {
  if (last) core_clock_sleep(60);
  TRY(reduce(1));
  return CORE_OK;
}

static core_status elsewhere(bool last) {
  if (last) { /* later, so that the others' deadline is the first to pass */
    core_clock_sleep(1);
    comm_note(job, 13, -1, "checkpoint");
    TRY(comm_barrier(comm_control_group(job)));
  }
  TRY(reduce(1));
  return CORE_OK;
}

static core_status stopped(bool last) {
  return last ? stand_still(0) : reduce(1);
}

static core_status paused(bool last) {
  return last ? stand_still(1) : reduce(1);
}

static core_status failing(bool last) {
  CHECK(!last, CORE_ERR_IO, "the disk of this rank is gone");
  TRY(comm_barrier(comm_world_group(job)));
  return CORE_OK;
}

static core_status killed(bool last) {
  if (last) raise(SIGKILL);
  TRY(reduce(1));
  return CORE_OK;
}

/* Before MPI is started, which gives itself no deadline. */
static void be_absent(void) {
  const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *size = getenv("OMPI_COMM_WORLD_SIZE");
  if (rank && size && atoi(rank) == atoi(size) - 1) core_clock_sleep(60);
}

static core_status absent(bool last) {
  (void)last;
  return CORE_OK;
}

/* The last rank sends rank 0 another number of bytes than it expects. */
static core_status send_unequal(bool last, int64_t sent, int64_t expected) {
  comm_group *group = comm_world_group(job);
  char data[100] = {0};
  comm_piece send = {0, data, sent}, recv = {comm_size(group) - 1, data, expected};
  TRY(comm_exchange(group, &send, last, &recv, comm_rank(group) == 0));
  TRY(comm_barrier(group));
  return CORE_OK;
}

static core_status longer(bool last) {
  TRY(send_unequal(last, 100, 50));
  return CORE_OK;
}

static core_status shorter(bool last) {
  TRY(send_unequal(last, 50, 100));
  return CORE_OK;
}

static const struct scenario {
  const char *name;
  double deadline;
  core_status (*run)(bool last);
} scenarios[] = {{"late", 2, late},      {"elsewhere", 2, elsewhere}, {"stopped", 2, stopped},
                 {"paused", 20, paused}, {"failing", 60, failing},    {"killed", 60, killed},
                 {"longer", 60, longer}, {"shorter", 60, shorter},    {"absent", 2, absent}};

int main(int argc, char **argv) {
  for (size_t i = 0; argc == 3 && i < sizeof scenarios / sizeof *scenarios; i++) {
    if (strcmp(argv[1], scenarios[i].name) != 0) continue;
    const comm_options options = {.deadline = scenarios[i].deadline, .directory = argv[2]};
    if (scenarios[i].run == absent) be_absent();
    if (comm_start(&options, &job) != CORE_OK) return 9;
    comm_group *group = comm_world_group(job);
    if (comm_rank(group) == 0) mark_begin(argv[2]);
    comm_note(job, 12, 3, "dispatch");
    core_status status = reduce(2);
    if (status == CORE_OK) status = scenarios[i].run(comm_rank(group) == comm_size(group) - 1);
    if (status != CORE_OK) comm_fail_stop(job, status);
    comm_finish(job);
    return 0;
  }
  fprintf(stderr, "usage: comm_fault SCENARIO DIRECTORY\n");
  return 2;
}
