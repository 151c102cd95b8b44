/* antiphon extend */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "launcher/launcher.h"
#include "trainer/extend.h"
#include "trainer/state.h"

static core_status find_init(const char *text, int *out) {
  static const struct {
    const char *word;
    int init;
  } words[] = {{"copy", TRAIN_EXTEND_COPY},
               {"copy_below", TRAIN_EXTEND_COPY_BELOW},
               {"zero", TRAIN_EXTEND_ZERO},
               {"mean", TRAIN_EXTEND_MEAN}};
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    if (strcmp(words[i].word, text) == 0) {
      *out = words[i].init;
      return CORE_OK;
    }
  FAIL(CORE_ERR_USAGE, "--init %s: expected copy, copy_below, zero or mean", text);
}

/* The words of the command line; `how` lends them. */
static core_status take_how(const launch_arguments *a, train_extend_settings *how) {
  static char every[] = "d", half[] = "0.5", empty[] = "";
  const char *layers = launch_own(a, "--layers"), *share = launch_own(a, "--share");
  const char *init = launch_own(a, "--init");
  *how = (train_extend_settings){.margin = 1e-3};
  how->layers = layers ? (char *)(uintptr_t)layers : every;
  how->share = share ? (char *)(uintptr_t)share : half;
  how->split = a->split ? (char *)(uintptr_t)a->split : empty;
  if (init) TRY(find_init(init, &how->init));
  int64_t thousandths = train_settings_thousandths(how->share);
  CHECK(thousandths >= 0 && thousandths <= 1000, CORE_ERR_USAGE,
        "--share %s: expected 0 to 1 with at most three decimals", how->share);
  return CORE_OK;
}

/* Paths of checkpoints, found where run directories are given. Collective. */
static core_status find_path(comm_world *world, const char *text, char out[1024], core_config **config,
                             const launch_arguments *arguments) {
  ckpt_reader *reader = NULL;
  train_state_meta meta = {0};
  TRY(launch_checkpoint_open(world, text, &reader));
  core_status status = CORE_OK;
  if (snprintf(out, 1024, "%s", ckpt_reader_path(reader)) >= 1024)
    status = core_error_begin(CORE_ERR_ARGUMENT, __func__, __FILE__, __LINE__,
                              "the path %.100s... is too long", text);
  if (status == CORE_OK && config) status = train_state_meta_read(ckpt_reader_meta(reader), &meta);
  if (status == CORE_OK && config)
    status = launch_config(world, "the checkpoint's configuration", meta.config, arguments, config);
  free(meta.config);
  ckpt_reader_close(reader);
  TRY(status);
  return CORE_OK;
}

static core_status make(comm_world *world, const launch_arguments *arguments, train_extension *extension) {
  char original[1024], tuned[1024], report[1100];
  core_config *config = NULL;
  const char *second = launch_own(arguments, "--tuned");
  comm_group *control = comm_control_group(world);
  TRY(comm_agree(control,
                 comm_rank(control) == 0 ? core_file_make_directories(extension->directory) : CORE_OK));
  snprintf(report, sizeof report, "%.1000s/extend.json", extension->directory);
  if (second) TRY(find_path(world, second, tuned, NULL, arguments));
  core_status status = find_path(world, arguments->positional[0], original, &config, arguments);
  extension->run = config;
  extension->original = original;
  extension->tuned = second ? tuned : NULL;
  extension->report = report;
  if (status == CORE_OK) status = train_extend(extension);
  core_config_destroy(config);
  TRY(status);
  return CORE_OK;
}

static core_status extend(comm_world *world, launch_arguments *arguments, int *code) {
  train_extend_settings how;
  launch_checkpoint_words words;
  (void)code;
  CHECK(launch_own(arguments, "-o"), CORE_ERR_USAGE, "extend needs -o DIRECTORY");
  TRY(take_how(arguments, &how));
  launch_checkpoint_defaults(arguments, NULL, &words, comm_size(comm_world_group(world)));
  train_extension extension = {.comm = world, .how = &how, .directory = launch_own(arguments, "-o")};
  TRY(make(world, arguments, &extension));
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {{"--tuned", true}, {"--layers", true}, {"--share", true},
                                      {"--init", true},  {"-o", true},       {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 1, extend);
}

const launch_command launch_extend_command = {
    "extend", "adds experts to the mixtures of a trained model",
    "usage: antiphon extend CHECKPOINT [--tuned CHECKPOINT] -o DIRECTORY [--split NAME] [--layers RULE]\n"
    "                       [--share P] [--init copy] [--set key=value]...\n\n"
    "Writes DIRECTORY/step-00000000, the model of CHECKPOINT with one more expert in some of its mixtures, "
    "and\n"
    "DIRECTORY/extend.json: each layer's d, whether it was extended and why, the choices counted, and a hash "
    "of\n"
    "every old tensor, which keep their bits. A checkpoint may be a run directory (its newest sound one).\n\n"
    "  --tuned CHECKPOINT  the same model after its routers alone were trained on the new task; d of a layer "
    "is\n"
    "                      the deviation of what that changes in the shares of its experts\n"
    "  --split NAME        held-out samples of data.path whose choices are counted; left out, the validation "
    "split\n"
    "  --layers RULE       d (the largest), lowest, random; or of the MoE layers all, first half, second "
    "half,\n"
    "                      every N, or a list 0,2,3 (d)\n"
    "  --share P           of the MoE layers that d, lowest and random take, rounded down (0.5)\n"
    "  --init WORD         the router's new column: copy of the most chosen expert's; copy_below, with a "
    "bias that\n"
    "                      keeps it from being chosen on any held-out token; zero; mean (copy)\n\n"
    "  antiphon train CONFIG --from DIRECTORY/step-00000000\n\n"
    "goes on with it; CONFIG names the layers' experts (model.moe.layer_experts, model.moe.added) as "
    "extend.json\n"
    "does. Nothing half-written is left after a failure.\n",
    run};
