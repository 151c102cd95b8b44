/* antiphon bench gpu: the training steps that GPUs are judged by, each as `antiphon bench step` measures it:
 * bound by launches, by products, by memory. What the user sets holds for all of them. */
#include <string.h>

#include "launcher/bench.h"

/* About 32000 tokens a step, at the largest width half as many. */
static const char *const shapes[][4] = {
    {"model.width=512", "model.heads=8", "model.layers=8", "optimizer.batch=1640"},
    {"model.width=2048", "model.heads=16", "model.layers=6", "optimizer.batch=1640"},
    {"model.width=4096", "model.heads=32", "model.layers=2", "optimizer.batch=820"}};
static const char *const all[] = {"run.device=cuda", "run.precision=bfloat16", "model.moe.experts=16",
                                  "model.moe.choose=2"};
enum { ALL = sizeof all / sizeof *all, SHAPE = sizeof shapes[0] / sizeof *shapes[0] };

core_status launch_bench_gpu(comm_world *world, const launch_arguments *arguments) {
  CHECK(arguments->override_count + ALL + SHAPE <= LAUNCH_MOST_OVERRIDES, CORE_ERR_USAGE,
        "more than %d settings", LAUNCH_MOST_OVERRIDES - ALL - SHAPE);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    launch_arguments step = *arguments;
    memcpy(step.override, all, sizeof all);
    memcpy(step.override + ALL, shapes[i], sizeof shapes[i]);
    memcpy(step.override + ALL + SHAPE, arguments->override,
           (size_t)arguments->override_count * sizeof *step.override);
    step.override_count = arguments->override_count + ALL + SHAPE;
    TRY(launch_bench_step(world, &step));
  }
  return CORE_OK;
}
