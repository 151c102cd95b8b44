/* antiphon assemble */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launcher/launcher.h"
#include "trainer/assemble.h"
#include "trainer/settings.h"

/* Lists of the command line, taken apart; what they point to is in `text`. */
typedef struct lists {
  char *text[2];
  const char **slot; /* [slots] */
  int32_t *layer;    /* [layers of the model] slots of each; NULL: one list for all */
  int32_t slots;
  const char *connector[CORE_MAX_MODALITIES];
} lists;

/* "a,b,base": as many paths as words. */
static core_status take_slots(lists *l, const char *base, char *line, int32_t *count) {
  char *save = NULL;
  for (char *word = strtok_r(line, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
    const char **grown = realloc(l->slot, (size_t)(l->slots + 1) * sizeof *grown);
    CHECK(grown, CORE_ERR_MEMORY, "no memory for the slots");
    l->slot = grown;
    grown[l->slots++] = strcmp(word, "base") == 0 ? base : word;
    ++*count;
  }
  return CORE_OK;
}

/* One list, or one for each layer with a mixture, with semicolons between. */
static core_status take_layers(lists *l, const train_settings *s, const char *base, const char *text) {
  int32_t all = 0;
  l->text[0] = strdup(text);
  CHECK(l->text[0], CORE_ERR_MEMORY, "no memory for the slots");
  if (!strchr(text, ';')) {
    TRY(take_slots(l, base, l->text[0], &all));
    return CORE_OK;
  }
  l->layer = calloc((size_t)s->model.layers, sizeof *l->layer);
  CHECK(l->layer, CORE_ERR_MEMORY, "no memory for the slots");
  char *at = l->text[0];
  for (int64_t i = 0; i < s->model.layers; i++) {
    if (!train_settings_moe_layer(s->model.moe.layers, s->model.layers, i)) continue;
    CHECK(at, CORE_ERR_USAGE, "--slots %s: fewer lists than layers with a mixture", text);
    TRY(take_slots(l, base, strsep(&at, ";"), &l->layer[i]));
  }
  CHECK(!at, CORE_ERR_USAGE, "--slots %s: more lists than layers with a mixture", text);
  return CORE_OK;
}

/* "image=path,speech=path" */
static core_status take_connectors(lists *l, const train_settings *s, const char *text) {
  char *save = NULL;
  l->text[1] = strdup(text);
  CHECK(l->text[1], CORE_ERR_MEMORY, "no memory for the connectors");
  for (char *word = strtok_r(l->text[1], ",", &save); word; word = strtok_r(NULL, ",", &save)) {
    char *path = word, *name = strsep(&path, "=");
    int32_t m = train_settings_modality(s, name);
    CHECK(path && m >= 0, CORE_ERR_USAGE,
          "--connectors: '%s' is not a modality of the configuration with =CHECKPOINT", name);
    l->connector[m] = path;
  }
  return CORE_OK;
}

static core_status take_lists(lists *l, const train_settings *s, const launch_arguments *arguments) {
  const char *base = launch_own(arguments, "--base"), *slots = launch_own(arguments, "--slots");
  const char *connectors = launch_own(arguments, "--connectors");
  TRY(take_layers(l, s, base, slots));
  if (connectors) TRY(take_connectors(l, s, connectors));
  return CORE_OK;
}

static core_status run_config(comm_world *world, const launch_arguments *arguments,
                              const core_config *config) {
  const train_settings *s = core_config_data(config);
  comm_group *control = comm_control_group(world);
  lists l = {.slots = 0};
  core_status status = train_settings_check(config, comm_size(control));
  if (status == CORE_OK) status = take_lists(&l, s, arguments);
  status = comm_agree(control, status);
  const train_assembly assembly = {.config = config,
                                   .control = control,
                                   .base = launch_own(arguments, "--base"),
                                   .slot = l.slot,
                                   .layer_slots = l.layer,
                                   .slots = l.slots,
                                   .layers = l.layer ? (int32_t)s->model.layers : 0,
                                   .connector = l.connector,
                                   .directory = launch_own(arguments, "-o")};
  if (status == CORE_OK) status = train_assemble(&assembly);
  free(l.text[0]);
  free(l.text[1]);
  free(l.slot);
  free(l.layer);
  TRY(status);
  return CORE_OK;
}

static core_status assemble(comm_world *world, launch_arguments *arguments, int *code) {
  core_config *config = NULL;
  (void)code;
  CHECK(launch_own(arguments, "--base") && launch_own(arguments, "--slots") && launch_own(arguments, "-o"),
        CORE_ERR_USAGE, "assemble needs --base CHECKPOINT, --slots CHECKPOINT,... and -o DIRECTORY");
  TRY(launch_config(world, arguments->positional[0], NULL, arguments, &config));
  core_status status = run_config(world, arguments, config);
  core_config_destroy(config);
  TRY(status);
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {
      {"--base", true}, {"--slots", true}, {"--connectors", true}, {"-o", true}, {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 1, assemble);
}

const launch_command launch_assemble_command = {
    "assemble", "dense decoders of one base into one with mixtures",
    "usage: antiphon assemble CONFIG --base CHECKPOINT --slots CHECKPOINT,... -o DIRECTORY\n"
    "                         [--connectors MODALITY=CHECKPOINT,...] [--set key=value]...\n\n"
    "Writes DIRECTORY/step-00000000, a checkpoint of CONFIG's decoder, whose expert J of every layer with a "
    "mixture is\n"
    "the feed-forward of the J-th checkpoint of --slots. One may stand in several slots, and the word `base` "
    "for the\n"
    "base; lists for each layer in turn have semicolons between. Attention, norms, embedding and head are "
    "the base's,\n"
    "and must be the same bits in every checkpoint; connectors come from --connectors, else from the base; "
    "routers are\n"
    "new. With `base` in every slot the result is the control that computes what the base does.\n\n"
    "  antiphon train CONFIG --from DIRECTORY/step-00000000\n\n"
    "goes on with it. Every rank reads, compares and writes its part. Nothing half-written is left after a "
    "failure.\n",
    run};
