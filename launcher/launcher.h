/* The `antiphon` command: what its subcommands share. One file per subcommand; main.c dispatches. */
#ifndef LAUNCH_LAUNCHER_H
#define LAUNCH_LAUNCHER_H

#include "checkpoint/checkpoint.h" /* ckpt_reader */
#include "comm/comm.h"
#include "core/config.h"
#include "core/status.h"

/* Exit statuses, documented in --help. */
enum { LAUNCH_DONE = 0, LAUNCH_FAILED = 1, LAUNCH_USAGE = 2, LAUNCH_STOPPED = 75 };
enum { LAUNCH_MOST_OVERRIDES = 128, LAUNCH_MOST_OWN = 16 };

/* An option that one subcommand alone has. */
typedef struct launch_option {
  const char *name; /* "--key"; NULL ends a list */
  bool takes_value;
} launch_option;

/* A subcommand gets its own arguments, argv[0] being its name; returns the exit status. */
typedef struct launch_command {
  const char *name, *summary, *help;
  int (*run)(const struct launch_command *command, int argc, char **argv);
} launch_command;

extern const launch_command launch_train_command, launch_eval_command, launch_inspect_command,
    launch_check_command, launch_bench_command, launch_index_command, launch_pack_command,
    launch_embed_command, launch_search_command, launch_import_command, launch_export_command,
    launch_assemble_command, launch_merge_command, launch_extend_command;

/* Arguments of a subcommand, parsed. */
typedef struct launch_arguments {
  const char *positional[4];
  int positional_count;
  const char *override[LAUNCH_MOST_OVERRIDES]; /* --set */
  int32_t override_count;
  const char *resume, *split, *from;
  bool help, json;
  struct {
    const char *name, *value;
  } own[LAUNCH_MOST_OWN]; /* options of the subcommand alone */
  int32_t own_count;
} launch_arguments;

/* Reads the options of all subcommands (--help, --set, --resume, --split, --json, ...). ERR_USAGE for
 * anything else beginning with '-', and for too many positional arguments. */
CORE_NODISCARD core_status launch_parse(int argc, char **argv, int most_positional, launch_arguments *out);
/* The same with options of the subcommand's own. */
CORE_NODISCARD core_status launch_parse_own(const launch_option *own, int argc, char **argv,
                                            int most_positional, launch_arguments *out);
/* Value of an option of the subcommand's own, "" where it takes none; NULL when it was not given. */
const char *launch_own(const launch_arguments *arguments, const char *name);
/* The same as a number in [least, most]; `otherwise` when it was not given. ERR_USAGE. */
CORE_NODISCARD core_status launch_own_number(const launch_arguments *arguments, const char *name,
                                             int64_t least, int64_t most, int64_t otherwise, int64_t *out);
/* Prints the record for a person: the message, then what to do; frames with ANTIPHON_TRACE=1. Rank 0 speaks
 * for all when `agreed`. Returns the exit status. */
int launch_report(core_status status, bool agreed, int32_t rank);
/* What a subcommand does once communication is up. *code: exit status when nothing fails, LAUNCH_DONE on
 * entry. */
typedef core_status (*launch_body)(comm_world *world, launch_arguments *arguments, int *code);
/* The frame of a subcommand that runs on all ranks: parses (least to most positional arguments), answers
 * --help, starts communication, runs the body, reports, ends. Returns the exit status. */
int launch_collective(const launch_command *command, int argc, char **argv, int least, int most,
                      launch_body body);
/* The same with options of the subcommand's own. */
int launch_collective_own(const launch_command *command, const launch_option *own, int argc, char **argv,
                          int least, int most, launch_body body);
/* Loads a configuration on every rank and agrees that it is the same one. text: NULL to read `path`.
 * Collective. */
CORE_NODISCARD core_status launch_config(comm_world *world, const char *path, const char *text,
                                         const launch_arguments *arguments, core_config **out);

/* ---- commands that take a checkpoint ---- */

/* Settings made here, lent until the configuration is loaded. */
typedef struct launch_checkpoint_words {
  char batch[64], capacity[64];
} launch_checkpoint_words;
/* A stored configuration describes training; here every rank holds all experts, takes whole samples and drops
 * nothing, unless `capacity` (NULL: none) is given. What the user overrides comes later in the list and so
 * wins. */
void launch_checkpoint_defaults(launch_arguments *arguments, const char *capacity,
                                launch_checkpoint_words *words, int32_t ranks);
/* A checkpoint, or the newest sound one of a run directory. Collective. */
CORE_NODISCARD core_status launch_checkpoint_open(comm_world *world, const char *path, ckpt_reader **out);

#endif
