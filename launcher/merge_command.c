/* antiphon merge */
#include "launcher/launcher.h"
#include "trainer/lora_merge.h"

static core_status merge(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  const char *output = launch_own(arguments, "-o");
  CHECK(output, CORE_ERR_USAGE, "merge needs -o DIRECTORY");
  TRY(train_lora_merge(comm_control_group(world), arguments->positional[0], output));
  return CORE_OK;
}

static int run_merge(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {{"-o", true}, {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 1, merge);
}

const launch_command launch_merge_command = {
    "merge", "adapters (model.lora) folded into the matrices that they adapt",
    "usage: antiphon merge CHECKPOINT -o DIRECTORY\n\n"
    "CHECKPOINT is a step-NNNNNNNN directory; where it holds what was trained alone, its base is read too. "
    "Writes\nDIRECTORY/step-NNNNNNNN, which must not be there yet: the same model without adapters, as "
    "large as the base,\nwithout the optimizer's state. It can be evaluated and exported, and\n\n"
    "  antiphon train FILE --from DIRECTORY/step-NNNNNNNN\n\n"
    "begins with it. Runs on one rank.\n",
    run_merge};
