/* comm_device_fault SCENARIO DIRECTORY: one job on emulated devices that goes wrong in one way.
 * run_comm_device_fault.sh judges how it ends. The rank that misbehaves is the last. */
#include <stdio.h>
#include <string.h>

#include "comm/comm.h"
#include "core/clock.h"
#include "kernels/kernels.h"
#include "tests/cuda_double/cuda_double.h"

static comm_world *job;
static comm_group *group;
static const core_device *device;
static void *data;

/* The judge counts from here: how long mpirun takes to start ranks is not the matter. */
static void mark_begin(const char *directory) {
  char path[512];
  snprintf(path, sizeof path, "%s/began", directory);
  FILE *file = fopen(path, "w");
  if (file) fclose(file);
}

static core_status reduce(int times) {
  for (int i = 0; i < times; i++) TRY(comm_device_all_reduce(group, COMM_MAX, CORE_FLOAT32, data, 64, NULL));
  return CORE_OK;
}

static core_status reduce_and_wait(int times) {
  TRY(reduce(times));
  TRY(device->stream_wait(NULL));
  return CORE_OK;
}

static core_status error(bool last) {
  if (last) cuda_double_fail_nccl(1);
  TRY(reduce_and_wait(1));
  return CORE_OK;
}

static core_status late(bool last) {
  if (last) core_clock_sleep(60);
  TRY(reduce_and_wait(1));
  return CORE_OK;
}

static core_status elsewhere(bool last) {
  if (last) { /* later, so that the others' deadline is the first to pass */
    core_clock_sleep(1);
    comm_note(job, 13, -1, "checkpoint");
    TRY(comm_barrier(comm_control_group(job)));
  }
  TRY(reduce_and_wait(1));
  return CORE_OK;
}

static core_status stuck(bool last) {
  if (last) cuda_double_leave_nccl(1);
  TRY(reduce_and_wait(1));
  return CORE_OK;
}

static core_status flood(bool last) {
  if (last) cuda_double_leave_nccl(1);
  TRY(reduce_and_wait(2000));
  return CORE_OK;
}

static core_status abort_hangs(bool last) {
  cuda_double_hang_abort(true);
  CHECK(!last, CORE_ERR_IO, "the disk of this rank is gone");
  TRY(comm_barrier(comm_world_group(job)));
  return CORE_OK;
}

static core_status well(bool last) {
  (void)last;
  TRY(reduce_and_wait(1000));
  return CORE_OK;
}

static const struct scenario {
  const char *name;
  double deadline;
  core_status (*run)(bool last);
} scenarios[] = {{"error", 60, error}, {"late", 2, late},   {"elsewhere", 2, elsewhere},
                 {"stuck", 2, stuck},  {"flood", 2, flood}, {"abort", 60, abort_hangs},
                 {"well", 20, well}};

/* Two operations go well: counting has begun when the third does not. */
static core_status prepare(void) {
  const kern_ops *ops = NULL;
  TRY(kern_cuda(comm_local_rank(job), &ops));
  device = ops->device;
  TRY(device->allocate(256, &data));
  TRY(device->fill(data, 0, 256, NULL));
  TRY(comm_group_create(job, 0, "expert", &group));
  TRY(comm_group_device(group, device, COMM_DEVICE_NCCL, 4096));
  return CORE_OK;
}

static core_status begin(void) {
  comm_note(job, 12, 3, "dispatch");
  TRY(reduce_and_wait(2));
  return CORE_OK;
}

int main(int argc, char **argv) {
  for (size_t i = 0; argc == 3 && i < sizeof scenarios / sizeof *scenarios; i++) {
    if (strcmp(argv[1], scenarios[i].name) != 0) continue;
    const comm_options options = {.deadline = scenarios[i].deadline, .directory = argv[2]};
    if (comm_start(&options, &job) != CORE_OK) return 9;
    bool last = comm_rank(comm_world_group(job)) == comm_size(comm_world_group(job)) - 1;
    core_status status = prepare();
    if (comm_rank(comm_world_group(job)) == 0) mark_begin(argv[2]);
    if (status == CORE_OK) status = begin();
    if (status == CORE_OK) status = scenarios[i].run(last);
    if (status != CORE_OK) comm_fail_stop(job, status);
    comm_finish(job);
    device->release(data);
    return 0;
  }
  fprintf(stderr, "usage: comm_device_fault SCENARIO DIRECTORY\n");
  return 2;
}
