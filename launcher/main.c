#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/random.h" /* core_hash */
#include "core/stop.h"
#include "launcher/launcher.h"
#include "trainer/settings.h"

static const launch_command *const commands[] = {
    &launch_train_command,  &launch_eval_command,   &launch_inspect_command, &launch_check_command,
    &launch_bench_command,  &launch_index_command,  &launch_pack_command,    &launch_embed_command,
    &launch_search_command, &launch_import_command, &launch_export_command,  &launch_assemble_command,
    &launch_merge_command,  &launch_extend_command};
enum { COMMANDS = sizeof commands / sizeof *commands };

core_status launch_parse(int argc, char **argv, int most_positional, launch_arguments *out) {
  TRY(launch_parse_own(NULL, argc, argv, most_positional, out));
  return CORE_OK;
}

/* Takes argv[*i] when it is an option of the subcommand's own, and its value with it. */
static core_status take_own(const launch_option *own, int argc, char **argv, int *i, launch_arguments *out,
                            bool *taken) {
  *taken = false;
  for (; own && own->name && !*taken; own++) {
    if (strcmp(argv[*i], own->name) != 0) continue;
    CHECK(!own->takes_value || *i + 1 < argc, CORE_ERR_USAGE, "%s needs a value", own->name);
    CHECK(!launch_own(out, own->name) && out->own_count < LAUNCH_MOST_OWN, CORE_ERR_USAGE,
          "%s is given twice", own->name);
    out->own[out->own_count].name = own->name;
    out->own[out->own_count++].value = own->takes_value ? argv[++*i] : "";
    *taken = true;
  }
  return CORE_OK;
}

const char *launch_own(const launch_arguments *arguments, const char *name) {
  for (int32_t i = 0; i < arguments->own_count; i++)
    if (strcmp(arguments->own[i].name, name) == 0) return arguments->own[i].value;
  return NULL;
}

core_status launch_own_number(const launch_arguments *arguments, const char *name, int64_t least,
                              int64_t most, int64_t otherwise, int64_t *out) {
  const char *text = launch_own(arguments, name);
  char *end = NULL;
  *out = otherwise;
  if (!text) return CORE_OK;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  CHECK(end != text && *end == '\0' && errno == 0 && value >= least && value <= most, CORE_ERR_USAGE,
        "%s %s: expected a number from %lld to %lld", name, text, (long long)least, (long long)most);
  *out = value;
  return CORE_OK;
}

core_status launch_parse_own(const launch_option *own, int argc, char **argv, int most_positional,
                             launch_arguments *out) {
  memset(out, 0, sizeof *out);
  for (int i = 1; i < argc; i++) {
    const char *word = argv[i];
    bool taken = false;
    TRY(take_own(own, argc, argv, &i, out, &taken));
    if (taken) continue;
    bool takes_value = strcmp(word, "--set") == 0 || strcmp(word, "--resume") == 0 ||
                       strcmp(word, "--split") == 0 || strcmp(word, "--from") == 0;
    if (takes_value) {
      CHECK(i + 1 < argc, CORE_ERR_USAGE, "%s needs a value", word);
      const char *value = argv[++i];
      CHECK(word[2] != 's' || word[3] != 'e' || out->override_count < LAUNCH_MOST_OVERRIDES, CORE_ERR_USAGE,
            "more than %d --set", LAUNCH_MOST_OVERRIDES);
      if (strcmp(word, "--set") == 0) out->override[out->override_count++] = value;
      if (strcmp(word, "--resume") == 0) out->resume = value;
      if (strcmp(word, "--split") == 0) out->split = value;
      if (strcmp(word, "--from") == 0) out->from = value;
    } else if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
      out->help = true;
    } else if (strcmp(word, "--json") == 0) {
      out->json = true;
    } else {
      CHECK(word[0] != '-', CORE_ERR_USAGE, "unknown option %s", word);
      CHECK(out->positional_count < most_positional, CORE_ERR_USAGE, "unexpected argument '%s'", word);
      out->positional[out->positional_count++] = word;
    }
  }
  return CORE_OK;
}

/* Before communication is up: whether this process is the first of its job, as the starter says. */
static bool is_first(void) {
  static const char *const names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *rank = getenv(names[i]);
    if (rank) return strcmp(rank, "0") == 0;
  }
  return true;
}

int launch_report(core_status status, bool agreed, int32_t rank) {
  char text[8192];
  if (status == CORE_OK) return LAUNCH_DONE;
  if (status == CORE_ERR_STOPPED) {
    if (rank == 0) LOG_INFO("stopped on request before the first step");
    return LAUNCH_STOPPED;
  }
  if (agreed ? rank == 0 : is_first()) {
    const char *trace = getenv("ANTIPHON_TRACE");
    core_error_format(core_error_get(), trace && trace[0] == '1', text, sizeof text);
    LOG_ERROR("%s", text);
  }
  return status == CORE_ERR_USAGE ? LAUNCH_USAGE : LAUNCH_FAILED;
}

core_status launch_config(comm_world *world, const char *path, const char *text,
                          const launch_arguments *arguments, core_config **out) {
  comm_group *control = comm_control_group(world);
  *out = NULL;
  core_status status = core_config_load(train_settings_spec(), path, text, arguments->override,
                                        arguments->override_count, out);
  TRY(comm_agree(control, status));
  const char *merged = core_config_text(*out);
  TRY(comm_agree_value(control, "the configuration", core_hash(merged, strlen(merged), 0)));
  return CORE_OK;
}

/* The first line of a command's help is its usage. */
static core_status check_usage(const launch_command *command, const launch_arguments *arguments, int least) {
  int usage = (int)strcspn(command->help, "\n");
  CHECK(arguments->positional_count >= least, CORE_ERR_USAGE, "%.*s", usage, command->help);
  return CORE_OK;
}

int launch_collective(const launch_command *command, int argc, char **argv, int least, int most,
                      launch_body body) {
  return launch_collective_own(command, NULL, argc, argv, least, most, body);
}

int launch_collective_own(const launch_command *command, const launch_option *own, int argc, char **argv,
                          int least, int most, launch_body body) {
  launch_arguments arguments;
  comm_world *world = NULL;
  core_status status = launch_parse_own(own, argc, argv, most, &arguments);
  if (status == CORE_OK && arguments.help) {
    printf("%s", command->help);
    return LAUNCH_DONE;
  }
  if (status == CORE_OK) status = check_usage(command, &arguments, least);
  if (status == CORE_OK) status = comm_start(NULL, &world);
  if (status != CORE_OK) return launch_report(status, false, 0);
  int code = LAUNCH_DONE;
  int32_t rank = comm_rank(comm_world_group(world));
  status = body(world, &arguments, &code);
  /* After a deadline or a broken connection MPI cannot be ended in order. */
  if (status == CORE_ERR_TIMEOUT || status == CORE_ERR_COMM) comm_fail_stop(world, status);
  if (status != CORE_OK) code = launch_report(status, true, rank);
  comm_finish(world);
  return code;
}

static void print_help(FILE *out) {
  fprintf(
      out,
      "antiphon %s: trains multimodal mixture-of-experts models on latents of frozen encoders\n\n"
      "usage: antiphon COMMAND [ARGUMENTS]      (under mpirun or srun for more than one rank)\n\ncommands:\n",
      ANTIPHON_VERSION);
  for (int i = 0; i < COMMANDS; i++) fprintf(out, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
  fprintf(
      out,
      "\n`antiphon COMMAND --help` tells more.\n\nexit status:\n  0   done\n  1   failed; the reason is on "
      "standard "
      "error\n  2   wrong command line\n  75  stopped on request (SIGTERM, SIGUSR1, SIGINT); run the same "
      "command "
      "again to go on\n\nenvironment:\n  ANTIPHON_TRACE=1   errors show the functions they passed through\n");
}

int main(int argc, char **argv) {
  if (argc < 2) {
    if (is_first()) print_help(stderr);
    return LAUNCH_USAGE;
  }
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
    print_help(stdout);
    return LAUNCH_DONE;
  }
  if (strcmp(argv[1], "--version") == 0) {
    printf("antiphon %s\n", ANTIPHON_VERSION);
    return LAUNCH_DONE;
  }
  core_status status = core_stop_install();
  if (status != CORE_OK) return launch_report(status, false, 0);
  for (int i = 0; i < COMMANDS; i++)
    if (strcmp(argv[1], commands[i]->name) == 0) return commands[i]->run(commands[i], argc - 1, argv + 1);
  if (is_first()) fprintf(stderr, "error: there is no command '%s'; `antiphon --help` lists them\n", argv[1]);
  return LAUNCH_USAGE;
}
