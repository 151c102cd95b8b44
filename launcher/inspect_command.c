/* antiphon inspect, antiphon check: what a shard, a set, a checkpoint or a configuration holds, and whether
 * it is sound. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint/checkpoint.h"
#include "data/data.h"
#include "launcher/launcher.h"
#include "trainer/arithmetic.h"
#include "trainer/serve/vectors.h"
#include "trainer/settings.h"

static bool is_directory(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static bool ends_with(const char *text, const char *end) {
  size_t length = strlen(text), tail = strlen(end);
  return length >= tail && strcmp(text + length - tail, end) == 0;
}

/* Widths and mean lengths of the training latents; false and zeros where they cannot be opened. */
static bool measure_data(const train_settings *s, int64_t *width, double *tokens) {
  const char *names[CORE_MAX_MODALITIES];
  int32_t M = (int32_t)s->data.modalities_count;
  data_set *set = NULL;
  for (int32_t m = 0; m < M; m++) names[m] = s->data.modalities[m].name;
  bool there = data_set_open(s->data.path, s->data.train, names, M, &set) == CORE_OK;
  if (!there) core_error_clear();
  for (int32_t m = 0; m < M; m++) {
    const data_modality_info *info = there ? data_set_modality(set, m) : NULL;
    int64_t present = there ? data_set_samples(set) - info->absent : 0;
    width[m] = there ? info->width : 0;
    tokens[m] = present > 0 ? (double)info->tokens / (double)present : 0;
  }
  if (there) data_set_close(set);
  return there;
}

/* What the model costs, as comments behind the configuration, or alone as JSON. */
static core_status print_arithmetic(const train_settings *s, bool json) {
  int64_t width[CORE_MAX_MODALITIES];
  double tokens[CORE_MAX_MODALITIES];
  train_arithmetic arithmetic;
  bool there = measure_data(s, width, tokens);
  if (!there && s->model.kind == TRAIN_KIND_CONNECTOR) {
    CHECK(!json, CORE_ERR_NOT_FOUND,
          "the size of a connector hangs on the widths of the latents; there are none in %s/%s", s->data.path,
          s->data.train);
    return CORE_OK;
  }
  TRY(train_arithmetic_make(s, width, tokens, &arithmetic));
  if (json) {
    train_arithmetic_json(&arithmetic, stdout);
  } else {
    if (!there) printf("# without connectors: there are no latents in %s/%s\n", s->data.path, s->data.train);
    train_arithmetic_print(&arithmetic, "# ", stdout);
  }
  train_arithmetic_free(&arithmetic);
  return CORE_OK;
}

static core_status describe_config(const core_config *config, bool json) {
  const train_settings *s = core_config_data(config);
  if (!json) printf("%s", core_config_text(config));
  /* A configuration that cannot be trained is shown all the same; its costs mean nothing. */
  if (train_settings_check(config, (int32_t)s->parallel.experts) == CORE_OK) {
    TRY(print_arithmetic(s, json));
    return CORE_OK;
  }
  if (json) return core_error_trace(core_error_get()->code, __func__, __FILE__, __LINE__);
  core_error_clear();
  return CORE_OK;
}

static core_status look_at_config(const char *path, const launch_arguments *arguments, bool deep) {
  core_config *config = NULL;
  TRY(core_config_load(train_settings_spec(), path, NULL, arguments->override, arguments->override_count,
                       &config));
  const train_settings *settings = core_config_data(config);
  core_status status = deep ? train_settings_check(config, (int32_t)settings->parallel.experts)
                            : describe_config(config, arguments->json);
  if (status == CORE_OK && deep) printf("%s: sound\n", path);
  core_config_destroy(config);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status look(const char *path, const launch_arguments *arguments, bool deep);

/* The index of a split, where there is one. */
static core_status check_index(const char *path) {
  char parent[4096];
  bool found = false;
  snprintf(parent, sizeof parent, "%s", path);
  for (size_t end = strlen(parent); end > 1 && parent[end - 1] == '/'; end--) parent[end - 1] = '\0';
  char *slash = strrchr(parent, '/');
  const char *split = slash ? slash + 1 : parent;
  if (slash) *slash = '\0';
  TRY(data_index_verify(slash ? parent : ".", split, &found));
  if (found) printf("%s: its index says what the shards say\n", path);
  return CORE_OK;
}

/* Shards, checkpoints and directories in it, by name. */
static core_status look_at_directory(const char *path, const launch_arguments *arguments, bool deep) {
  struct dirent **list = NULL;
  int count = scandir(path, &list, NULL, alphasort), looked = 0;
  CHECK(count >= 0, CORE_ERR_IO, "cannot read the directory %s", path);
  core_status status = CORE_OK;
  for (int i = 0; i < count && status == CORE_OK; i++) {
    char inner[4096];
    const char *name = list[i]->d_name;
    snprintf(inner, sizeof inner, "%s/%s", path, name);
    if (name[0] == '.' || ends_with(name, ".tmp") || strcmp(name, CKPT_BEST) == 0) continue;
    if (!is_directory(inner) && !ends_with(name, ".h5")) continue;
    looked++;
    status = look(inner, arguments, deep);
  }
  for (int i = 0; i < count; i++) free(list[i]);
  free(list);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  if (deep) TRY(check_index(path));
  CHECK(looked > 0, CORE_ERR_FORMAT, "%s holds neither latent shards nor checkpoints", path);
  return CORE_OK;
}

static core_status look(const char *path, const launch_arguments *arguments, bool deep) {
  struct stat info;
  CHECK(stat(path, &info) == 0, CORE_ERR_NOT_FOUND, "there is no %s", path);
  if (ckpt_is(path)) {
    if (deep)
      TRY(ckpt_verify(path, stdout));
    else
      TRY(ckpt_describe(path, stdout));
  } else if (is_directory(path)) {
    TRY(look_at_directory(path, arguments, deep));
  } else if (ends_with(path, ".yaml") || ends_with(path, ".yml")) {
    TRY(look_at_config(path, arguments, deep));
  } else if (train_vectors_is(path)) {
    TRY(train_vectors_describe(path, deep, stdout));
  } else {
    TRY(data_shard_describe(path, deep, stdout));
  }
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  launch_arguments arguments;
  core_status status = launch_parse(argc, argv, 1, &arguments);
  if (status == CORE_OK && arguments.help) {
    printf("%s", command->help);
    return LAUNCH_DONE;
  }
  if (status == CORE_OK && arguments.positional_count != 1)
    status = core_error_begin(CORE_ERR_USAGE, __func__, __FILE__, __LINE__, "usage: antiphon %s PATH",
                              command->name);
  if (status == CORE_OK)
    status = look(arguments.positional[0], &arguments, strcmp(command->name, "check") == 0);
  return launch_report(status, false, 0);
}

const launch_command launch_inspect_command = {
    "inspect", "says what a shard, a set, a checkpoint or a configuration holds",
    "usage: antiphon inspect PATH [--json] [--set KEY=VALUE]...\n\nPATH: a latent shard or vectors (.h5), a "
    "directory of shards, a checkpoint, a run "
    "directory, or a "
    "configuration\n(.yaml: printed with all defaults, and what the model costs: parameters and FLOPs by "
    "what a "
    "token\npasses).\n\n  --json            of a configuration: what the model costs, alone\n  --set "
    "KEY=VALUE   "
    "of a configuration: overrides a key; repeatable\n",
    run};

const launch_command launch_check_command = {
    "check", "says whether it is sound: every block, every value",
    "usage: antiphon check PATH\n\nReads all of a latent shard, a file of vectors, a directory of shards, a "
    "checkpoint, a run "
    "directory or a "
    "configuration and\nverifies it. Exit status 0: sound; 1: not, and why.\n",
    run};
