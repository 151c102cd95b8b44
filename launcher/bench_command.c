/* antiphon bench: each part against its physical limit. */
#include <stdio.h>
#include <string.h>

#include "launcher/bench.h"
#include "launcher/launcher.h"

static const struct {
  const char *name;
  core_status (*run)(comm_world *world, const launch_arguments *arguments);
} benches[] = {
    {"step", launch_bench_step}, {"data", launch_bench_data}, {"checkpoint", launch_bench_checkpoint}};

static core_status dispatch(comm_world *world, const launch_arguments *arguments) {
  for (size_t i = 0; i < sizeof benches / sizeof *benches; i++)
    if (strcmp(arguments->positional[0], benches[i].name) == 0) {
      TRY(benches[i].run(world, arguments));
      return CORE_OK;
    }
  FAIL(CORE_ERR_USAGE, "there is no benchmark '%s'; there are step, data and checkpoint",
       arguments->positional[0]);
}

static int run(const launch_command *command, int argc, char **argv) {
  launch_arguments arguments;
  comm_world *world = NULL;
  core_status status = launch_parse(argc, argv, 2, &arguments);
  if (status == CORE_OK && arguments.help) {
    printf("%s", command->help);
    return LAUNCH_DONE;
  }
  if (status == CORE_OK && arguments.positional_count < 1)
    status = core_error_begin(CORE_ERR_USAGE, __func__, __FILE__, __LINE__, "usage: antiphon bench WHAT");
  if (status == CORE_OK) status = comm_start(NULL, &world);
  if (status != CORE_OK) return launch_report(status, false, 0);
  int32_t rank = comm_rank(comm_world_group(world));
  status = dispatch(world, &arguments);
  if (status == CORE_ERR_TIMEOUT || status == CORE_ERR_COMM) comm_fail_stop(world, status);
  int code = launch_report(status, true, rank);
  comm_finish(world);
  return code;
}

const launch_command launch_bench_command = {
    "bench", "measures steps, data and checkpoints against their physical limits",
    "usage: antiphon bench step [--set key=value]...\n"
    "       antiphon bench data DIRECTORY [--split NAME]\n"
    "       antiphon bench checkpoint DIRECTORY\n\n"
    "step        tokens/s of a training step on made-up latents, and the ratio of its time to that of its "
    "matrix\n"
    "            products alone; the model can be changed with --set model.width=1024 and so on\n"
    "data        streaming a latent set against reading and decompressing it with the same threads\n"
    "checkpoint  saving and loading in DIRECTORY against zstd -3 of the same bytes\n",
    run};
