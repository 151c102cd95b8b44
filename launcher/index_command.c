/* antiphon index: one file for each split that stands for the headers of all its shards. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/stop.h"
#include "data/data.h"
#include "launcher/launcher.h"

typedef struct index_arguments {
  const char *directory, *split;
  bool values, help;
} index_arguments;

static core_status parse(int argc, char **argv, index_arguments *out) {
  *out = (index_arguments){0};
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
      out->help = true;
    } else if (strcmp(argv[i], "--values") == 0) {
      out->values = true;
    } else if (strcmp(argv[i], "--split") == 0) {
      CHECK(i + 1 < argc, CORE_ERR_USAGE, "--split needs a value");
      out->split = argv[++i];
    } else {
      CHECK(argv[i][0] != '-', CORE_ERR_USAGE, "unknown option %s", argv[i]);
      CHECK(out->directory == NULL, CORE_ERR_USAGE, "unexpected argument '%s'", argv[i]);
      out->directory = argv[i];
    }
  }
  CHECK(out->help || out->directory != NULL, CORE_ERR_USAGE,
        "usage: antiphon index DIRECTORY [--split NAME] [--values]");
  return CORE_OK;
}

static core_status poll_stop(void *context) {
  (void)context;
  CHECK(!core_stop_requested(), CORE_ERR_STOPPED, "stopped on request");
  return CORE_OK;
}

static core_status index_split(const index_arguments *arguments, const char *split) {
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  const data_index_options options = {.directory = arguments->directory,
                                      .split = split,
                                      .check_values = arguments->values,
                                      .threads = processors > 16  ? 16
                                                 : processors > 1 ? (int32_t)processors
                                                                  : 1,
                                      .tick = poll_stop};
  const double since = core_clock_now();
  data_index_result result;
  TRY(data_index_build(&options, &result));
  printf("%s/%s/shards.index: %lld samples in %d shards of %d modalities, %.1f MB, %.1f s%s",
         arguments->directory, split, (long long)result.samples, result.shards, result.modalities,
         (double)result.bytes / 1e6, core_clock_now() - since, arguments->values ? "" : "\n");
  if (arguments->values) printf("; %lld not finite\n", (long long)result.not_finite);
  return CORE_OK;
}

static core_status index_all(const index_arguments *arguments) {
  char names[DATA_MOST_SPLITS][CORE_NAME];
  int32_t count = 0;
  if (arguments->split != NULL) {
    TRY(index_split(arguments, arguments->split));
    return CORE_OK;
  }
  TRY(data_list_splits(arguments->directory, names, &count));
  for (int32_t i = 0; i < count; i++) TRY(index_split(arguments, names[i]));
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  index_arguments arguments;
  core_status status = parse(argc, argv, &arguments);
  if (status == CORE_OK && arguments.help) {
    printf("%s", command->help);
    return LAUNCH_DONE;
  }
  if (status == CORE_OK) status = index_all(&arguments);
  return launch_report(status, false, 0);
}

const launch_command launch_index_command = {
    "index", "makes a set of many shards open at once",
    "usage: antiphon index DIRECTORY [--split NAME] [--values]\n\n"
    "Writes DIRECTORY/<split>/shards.index for one split, or for each. A set with an index opens without a "
    "look\n"
    "into its shards; a shard that was changed, added or removed since is noticed, and then the index must "
    "be\n"
    "made again (or removed: a set without one opens by reading every header). `antiphon check DIRECTORY`\n"
    "compares an index with everything that the shards say.\n\n"
    "--values  also reads all latents and notes the samples that hold NaN or infinity, which\n"
    "          data.non_finite: skip needs\n",
    run};
