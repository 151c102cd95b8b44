/* antiphon import, antiphon export */
#include <string.h>

#include "launcher/launcher.h"
#include "trainer/exchange.h"

static core_status import(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  const char *config = launch_own(arguments, "--config"), *output = launch_own(arguments, "-o");
  CHECK(config && output, CORE_ERR_USAGE, "import needs --config FILE and -o DIRECTORY");
  TRY(train_import(comm_control_group(world), arguments->positional[0], config, output));
  return CORE_OK;
}

static core_status export(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  const char *output = launch_own(arguments, "-o"), *type = launch_own(arguments, "--dtype");
  core_dtype dtype = type ? core_dtype_parse(type) : CORE_FLOAT32;
  CHECK(output, CORE_ERR_USAGE, "export needs -o DIRECTORY");
  CHECK(dtype == CORE_FLOAT32 || dtype == CORE_FLOAT16 || dtype == CORE_BFLOAT16, CORE_ERR_USAGE,
        "--dtype is float32, float16 or bfloat16, not '%s'", type);
  TRY(train_export(comm_control_group(world), arguments->positional[0], output, dtype));
  return CORE_OK;
}

static int run_import(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {{"--config", true}, {"-o", true}, {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 1, import);
}

static int run_export(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {{"-o", true}, {"--dtype", true}, {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 1, export);
}

const launch_command launch_import_command = {
    "import", "weights of a LLaMA or Qwen2 decoder, or an exported model, into a checkpoint",
    "usage: antiphon import SOURCE --config FILE -o DIRECTORY\n\n"
    "SOURCE is a directory with config.json and model.safetensors or model.safetensors.index.json, or one of "
    "these\nfiles, float32, float16 or bfloat16; or a directory that `antiphon export` wrote, with mixtures, "
    "connectors and\nall. Writes the checkpoint DIRECTORY/step-00000000 and FILE, its configuration: of the "
    "same decoder, in which `data` is\nto be filled in, or the one of the exported model; then\n\n"
    "  antiphon train FILE --from DIRECTORY/step-00000000 --set run.directory=RUN\n\n"
    "begins with these weights. Neither is overwritten; nothing half-written is left after a failure. Runs "
    "on one rank.\n",
    run_import};

const launch_command launch_export_command = {
    "export", "a checkpoint's parameters as safetensors",
    "usage: antiphon export CHECKPOINT -o DIRECTORY [--dtype float32|float16|bfloat16]\n\n"
    "CHECKPOINT is a step-NNNNNNNN directory. DIRECTORY, which must not be there yet, receives "
    "model.safetensors, config.yaml,\nand for a dense decoder the config.json of LlamaForCausalLM or "
    "Qwen2ForCausalLM. A decoder's tensors have the names of\nHugging Face files, mixtures as "
    "model.layers.I.mlp.gate and model.layers.I.mlp.experts.J; everything else keeps its own\nname behind "
    "\"antiphon.\". What was imported comes back bit for bit in the type that it had. Runs on one rank.\n",
    run_export};
