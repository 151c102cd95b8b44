/* bench_checkpoint DIRECTORY [MiB]: prints the figures of ckpt_bench. Not a test: it is run by hand. */
#include <stdio.h>
#include <stdlib.h>

#include "checkpoint/checkpoint.h"

int main(int count, char **argument) {
  comm_world *world;
  core_status status;
  if (count < 2) {
    fprintf(stderr, "usage: %s DIRECTORY [MiB]\n", argument[0]);
    return 2;
  }
  int64_t mib = count > 2 ? strtoll(argument[2], NULL, 10) : 256;
  status = comm_start(&(comm_options){0}, &world);
  if (status == CORE_OK) {
    status = ckpt_bench(comm_control_group(world), argument[1], mib << 20, CKPT_BENCH_TABLE, stdout);
    if (status != CORE_OK) fprintf(stderr, "%s\n", core_error_get()->message);
    comm_finish(world);
  }
  return status == CORE_OK ? 0 : 1;
}
