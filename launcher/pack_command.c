/* antiphon pack: latents from .npy and .safetensors files into shards; a set into one of other chunks,
 * filters or sizes of shards. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/stop.h"
#include "data/data.h"
#include "launcher/launcher.h"

typedef struct pack_arguments {
  data_pack_options options;
  const char *dtype, *filter, *split; /* as given */
  int64_t level, chunk_kib, samples, threads;
  bool help;
} pack_arguments;

/* An option that takes text, or a whole number. */
typedef struct pack_option {
  const char *name;
  const char **text;
  int64_t *number;
} pack_option;

static core_status set_option(const pack_option *option, const char *value) {
  if (option->text != NULL) {
    *option->text = value;
    return CORE_OK;
  }
  char *end = NULL;
  *option->number = strtoll(value, &end, 10);
  CHECK(end != value && *end == '\0' && *option->number >= 1 && *option->number <= INT32_MAX, CORE_ERR_USAGE,
        "%s %s: expected a whole number from 1 on", option->name, value);
  return CORE_OK;
}

static core_status parse(int argc, char **argv, pack_arguments *out) {
  *out = (pack_arguments){.options = {.dtype = CORE_DTYPE_COUNT}};
  data_pack_options *o = &out->options;
  const pack_option known[] = {{"--from", &o->from, NULL},
                               {"--from-set", &o->from_set, NULL},
                               {"--latents", &o->latent_name, NULL},
                               {"--offsets", &o->offsets, NULL},
                               {"--ids", &o->ids, NULL},
                               {"--labels", &o->labels, NULL},
                               {"--modality", &o->modality, NULL},
                               {"--encoder", &o->encoder, NULL},
                               {"--to", &o->to, NULL},
                               {"--split", &out->split, NULL},
                               {"--dtype", &out->dtype, NULL},
                               {"--filter", &out->filter, NULL},
                               {"--level", NULL, &out->level},
                               {"--chunk-kib", NULL, &out->chunk_kib},
                               {"--samples-per-shard", NULL, &out->samples},
                               {"--threads", NULL, &out->threads}};
  for (int i = 1; i < argc; i++) {
    const pack_option *option = NULL;
    out->help = out->help || strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0;
    if (out->help) return CORE_OK;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
      if (strcmp(argv[i], known[k].name) == 0) option = &known[k];
    CHECK(option != NULL, CORE_ERR_USAGE, "unknown option %s; `antiphon pack --help` tells more", argv[i]);
    CHECK(i + 1 < argc, CORE_ERR_USAGE, "%s needs a value", argv[i]);
    TRY(set_option(option, argv[++i]));
  }
  return CORE_OK;
}

static core_status choose_filter(const char *name, data_filter *out) {
  static const char *const names[] = {"none", "gzip", "shuffle+gzip", "zstd", "shuffle+zstd"};
  *out = DATA_FILTER_SHUFFLE_ZSTD;
  for (int i = 0; name != NULL && i < 5; i++)
    if (strcmp(name, names[i]) == 0) {
      *out = (data_filter)i;
      return CORE_OK;
    }
  CHECK(name == NULL, CORE_ERR_USAGE, "--filter %s: expected none, gzip, shuffle+gzip, zstd or shuffle+zstd",
        name);
  return CORE_OK;
}

static core_status complete(pack_arguments *arguments) {
  data_pack_options *o = &arguments->options;
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  CHECK((o->from == NULL) != (o->from_set == NULL) && o->to != NULL, CORE_ERR_USAGE,
        "usage: antiphon pack --from FILE|--from-set DIRECTORY --to DIRECTORY [OPTIONS]");
  CHECK(o->from == NULL || (o->modality != NULL && o->encoder != NULL), CORE_ERR_USAGE,
        "--from needs --modality and --encoder");
  CHECK(o->from == NULL || arguments->split == NULL, CORE_ERR_USAGE, "--split is for --from-set");
  if (arguments->dtype != NULL) {
    o->dtype = core_dtype_parse(arguments->dtype);
    CHECK(o->dtype == CORE_FLOAT16 || o->dtype == CORE_BFLOAT16 || o->dtype == CORE_FLOAT32, CORE_ERR_USAGE,
          "--dtype %s: expected float16, bfloat16 or float32", arguments->dtype);
  }
  TRY(choose_filter(arguments->filter, &o->filter));
  o->level = (int32_t)arguments->level;
  o->chunk_bytes = arguments->chunk_kib * 1024;
  o->samples_per_shard = arguments->samples;
  o->threads = arguments->threads > 0 ? (int32_t)arguments->threads
               : processors > 1       ? (int32_t)processors
                                      : 1;
  return CORE_OK;
}

/* ---- running ---- */

typedef struct pack_watch {
  const char *name;
  double started, said;
} pack_watch;

/* Says now and then how far it is, and ends it when a stop was asked for. */
static core_status watch(void *context, const data_pack_progress *progress) {
  pack_watch *state = context;
  const double now = core_clock_now();
  if (core_log_is_terminal()) {
    core_log_progress("%s: %d of %d shards", state->name, progress->done, progress->shards);
  } else if (now - state->said > 10) {
    LOG_INFO("%s: %d of %d shards", state->name, progress->done, progress->shards);
    state->said = now;
  }
  CHECK(!core_stop_requested() || progress->done == progress->shards, CORE_ERR_STOPPED, "stopped on request");
  return CORE_OK;
}

static core_status pack_one(const data_pack_options *options) {
  data_pack_options own = *options;
  data_pack_progress result;
  pack_watch state = {.name = options->modality, .started = core_clock_now()};
  state.said = state.started;
  own.progress = watch;
  own.context = &state;
  const core_status status = data_pack(&own, &result);
  core_log_progress("%s", "");
  if (status == CORE_ERR_STOPPED)
    LOG_INFO("stopped on request with %d of %d shards; the same command goes on", result.done, result.shards);
  TRY(status);
  printf("%s: %s, %d shards (%d were there), %.1f s\n", own.to, own.modality, result.shards, result.kept,
         core_clock_now() - state.started);
  return CORE_OK;
}

/* Every modality of a split, or the one that was named. */
static core_status pack_split(const pack_arguments *arguments, const char *split) {
  char names[CORE_MAX_MODALITIES][CORE_NAME], to[4096];
  int32_t count = 0;
  data_pack_options own = arguments->options;
  CHECK(snprintf(to, sizeof to, "%s/%s", own.to, split) < (int)sizeof to, CORE_ERR_USAGE, "--to %s: too long",
        own.to);
  own.to = to;
  own.from_split = split;
  TRY(data_list_modalities(own.from_set, split, names, &count));
  for (int32_t m = 0; m < count; m++) {
    if (arguments->options.modality != NULL && strcmp(arguments->options.modality, names[m]) != 0) continue;
    own.modality = names[m];
    TRY(pack_one(&own));
  }
  return CORE_OK;
}

static core_status pack(pack_arguments *arguments) {
  char names[DATA_MOST_SPLITS][CORE_NAME];
  int32_t count = 0;
  TRY(complete(arguments));
  if (arguments->options.from != NULL) {
    TRY(pack_one(&arguments->options));
  } else if (arguments->split != NULL) {
    TRY(pack_split(arguments, arguments->split));
  } else {
    TRY(data_list_splits(arguments->options.from_set, names, &count));
    for (int32_t i = 0; i < count; i++) TRY(pack_split(arguments, names[i]));
  }
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  pack_arguments arguments;
  core_status status = parse(argc, argv, &arguments);
  if (status == CORE_OK && arguments.help) {
    printf("%s", command->help);
    return LAUNCH_DONE;
  }
  if (status == CORE_OK) status = pack(&arguments);
  return status == CORE_ERR_STOPPED ? LAUNCH_STOPPED : launch_report(status, false, 0);
}

const launch_command launch_pack_command = {
    "pack", "makes latent shards of features, or of another set",
    "usage: antiphon pack --from FILE|--from-set DIRECTORY --to DIRECTORY [OPTIONS]\n\n"
    "From features: FILE is a .npy or .safetensors file of [samples, width], [samples, rows, width], or "
    "with\n"
    "--offsets [rows, width]; --to is the directory of the split (my-set/train).\n"
    "  --modality NAME --encoder TEXT   needed\n"
    "  --latents NAME                   which tensor of a .safetensors file\n"
    "  --offsets FILE                   [samples + 1]: sample i has the rows from offset[i] to offset[i + "
    "1]\n"
    "  --ids FILE, --labels FILE        one whole number a sample; without: 0, 1, 2, ... and none\n"
    "  (each .npy, or .safetensors with the tensor offset, id or label)\n\n"
    "From a set: every split and modality, in the order and with the ids, labels, keys and tokens that it "
    "has.\n"
    "  --split NAME, --modality NAME    only these\n"
    "  --encoder TEXT                   without: as it is\n\n"
    "Either:\n"
    "  --dtype float16|bfloat16|float32 without: as it is\n"
    "  --filter none|gzip|shuffle+gzip|zstd|shuffle+zstd      without: shuffle+zstd\n"
    "  --level N                        of the filter\n"
    "  --chunk-kib N                    without: 512\n"
    "  --samples-per-shard N            without: 4096\n"
    "  --threads N                      without: one for every processor; each makes one shard at a time\n\n"
    "Shards appear when they are whole. Stopped (exit status 75) or killed, the same command goes on: "
    "finished\n"
    "shards are kept when they say that they were made from just this, and are never overwritten.\n",
    run};
