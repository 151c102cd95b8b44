/* antiphon bench: each part against its physical limit. */
#include <string.h>

#include "launcher/bench.h"
#include "launcher/launcher.h"

static const struct {
  const char *name;
  core_status (*run)(comm_world *world, const launch_arguments *arguments);
} benches[] = {{"step", launch_bench_step},
               {"gpu", launch_bench_gpu},
               {"data", launch_bench_data},
               {"open", launch_bench_open},
               {"checkpoint", launch_bench_checkpoint},
               {"search", launch_bench_search},
               {"embed", launch_bench_embed}};

/* Of search and embed. */
static const launch_option options[] = {
    {"--rows", true},  {"--width", true}, {"--batch", true}, {"-k", true}, {"--threads", true},
    {"--dtype", true}, {"--key", true},   {"--query", true}, {"-o", true}, {NULL, false}};

static core_status dispatch(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  for (size_t i = 0; i < sizeof benches / sizeof *benches; i++)
    if (strcmp(arguments->positional[0], benches[i].name) == 0) {
      TRY(benches[i].run(world, arguments));
      return CORE_OK;
    }
  FAIL(CORE_ERR_USAGE,
       "there is no benchmark '%s'; there are step, gpu, data, open, checkpoint, search and embed",
       arguments->positional[0]);
}

static int run(const launch_command *command, int argc, char **argv) {
  return launch_collective_own(command, options, argc, argv, 1, 3, dispatch);
}

const launch_command launch_bench_command = {
    "bench", "measures steps, data and checkpoints against their physical limits",
    "usage: antiphon bench step|gpu|data|open|checkpoint|search|embed [DIRECTORY] [OPTIONS]\n\n"
    "       antiphon bench step [--json] [--set key=value]...\n"
    "       antiphon bench gpu [--json] [--set key=value]...\n"
    "       antiphon bench data DIRECTORY [--split NAME] [--json]\n"
    "       antiphon bench open DIRECTORY [--split NAME] [--json]      (on any number of ranks)\n"
    "       antiphon bench checkpoint DIRECTORY [--json]\n"
    "       antiphon bench search [--rows N] [--width N] [--batch N] [-k N] [--threads N] [--dtype T] "
    "[--json]\n"
    "       antiphon bench embed CHECKPOINT [SHARDS] --key MODALITY|--query FROM:TOWARD -o FILE [--json]\n\n"
    "step        tokens/s of a training step on made-up latents, and the ratio of its time to that of its "
    "matrix\n"
    "            products alone; the model can be changed with --set model.width=1024 and so on\n"
    "gpu         the same on CUDA devices in bfloat16, with 16 experts of which 2 are chosen, at widths 512, "
    "2048, 4096\n"
    "data        streaming a latent set against reading and decompressing it with the same threads\n"
    "open        what opening a latent set takes every rank, with the index that it has or without\n"
    "checkpoint  saving and loading in DIRECTORY against memcpy and zstd of the same bytes: the state of "
    "the\n"
    "            newest checkpoint there, or a made-up one\n"
    "search      made-up vectors (1000000 of width 256): a batch of queries against its bare product, one "
    "query\n"
    "            against reading the vectors once, and answers against an exhaustive check\n"
    "embed       writing vectors against the forward passes alone (FILE is made and removed)\n",
    run};
