/* antiphon train */
#include "launcher/launcher.h"
#include "trainer/run.h"
#include "trainer/schedule/stages.h"
#include "trainer/settings.h"

static core_status run_config(comm_world *world, const launch_arguments *arguments, const core_config *config,
                              train_outcome *outcome) {
  const train_settings *settings = core_config_data(config);
  const char *resume = arguments->resume ? arguments->resume : "auto";
  if (settings->stages_count > 0) {
    const train_stages_options options = {.config = config, .comm = world, .resume = resume};
    CHECK(!arguments->from, CORE_ERR_USAGE, "--from %s: each stage says by itself where it begins from",
          arguments->from);
    TRY(train_stages_run(&options, outcome));
    return CORE_OK;
  }
  const train_run_options options = {
      .config = config, .comm = world, .resume = resume, .from = arguments->from};
  TRY(train_run(&options, outcome));
  return CORE_OK;
}

static core_status train(comm_world *world, launch_arguments *arguments, int *code) {
  core_config *config = NULL;
  train_outcome outcome = TRAIN_FINISHED;
  TRY(launch_config(world, arguments->positional[0], NULL, arguments, &config));
  core_status status = run_config(world, arguments, config, &outcome);
  core_config_destroy(config);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  if (outcome == TRAIN_STOPPED) *code = LAUNCH_STOPPED;
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  return launch_collective(command, argc, argv, 1, 1, train);
}

const launch_command launch_train_command = {
    "train", "trains a model; goes on from the newest checkpoint of its run directory",
    "usage: antiphon train CONFIG [--resume auto|never|PATH] [--from PATH] [--set key=value]...\n\n"
    "Trains as CONFIG (YAML) says, on as many ranks as mpirun or srun started; alone, on one.\n\n"
    "  --resume auto    (default) go on from the newest sound checkpoint of run.directory, or start\n"
    "  --resume never   start; refused when the directory already holds checkpoints\n"
    "  --resume PATH    go on from this checkpoint, whatever layout wrote it\n"
    "  --from PATH      begin a new run with the parameters of this checkpoint: what it lacks (a new "
    "modality, a new\n"
    "                   direction) is initialised, the optimizer begins anew; optimizer.frozen keeps what is "
    "old\n"
    "  --set key=value  overrides a key of CONFIG, for example --set optimizer.rate=0.0005\n"
    "                   or --set data.modalities.image.connector=mlp\n\n"
    "The run directory receives config.yaml, metrics.jsonl (a line a step), log.txt, manifest.json (what "
    "trains, what\n"
    "is frozen, what it began from) and checkpoints/. With `stages` in CONFIG each stage is such a run in\n"
    "RUN_DIRECTORY/NAME: they run in order, those that are done are passed over.\n"
    "SIGTERM, SIGUSR1 or SIGINT: the state is saved and the exit status is 75; the same command goes on.\n",
    run};
