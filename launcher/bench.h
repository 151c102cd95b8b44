/* The benchmarks behind `antiphon bench`. Each prints what it measured and the ratio that the design sets a
 * bar for. Collective over the world. */
#ifndef LAUNCH_BENCH_H
#define LAUNCH_BENCH_H

#include "launcher/launcher.h"

core_status launch_bench_step(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_gpu(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_data(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_open(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_checkpoint(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_search(comm_world *world, const launch_arguments *arguments);
core_status launch_bench_embed(comm_world *world, const launch_arguments *arguments);

#endif
