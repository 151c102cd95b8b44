/* Outline: names and sources; each stage's configuration, derived from the one text; which ranks it gets;
 * whether the data is there. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h" /* CKPT_BEST */
#include "data/data.h"
#include "trainer/schedule/stages_impl.h"

/* ---- names ---- */

static core_status check_name(const train_stages *stages, int32_t i) {
  const train_stage_settings *s = stages->list[i].settings;
  char key[64];
  snprintf(key, sizeof key, "stages.%d.name", i);
  size_t length = strlen(s->name);
  if (length == 0 || length > 48 || strpbrk(s->name, "/.:@ \t") || strcmp(s->name, "none") == 0 ||
      (s->name[0] >= '0' && s->name[0] <= '9'))
    return core_config_refuse(stages->config, key,
                              "a stage's name is 1 to 48 characters, without blank, point, colon, slash and "
                              "@, not beginning with a "
                              "digit, and not 'none'; got '%s'",
                              s->name);
  for (int32_t k = 0; k < i; k++)
    if (strcmp(stages->list[k].settings->name, s->name) == 0)
      return core_config_refuse(stages->config, key, "there are two stages '%s'", s->name);
  return CORE_OK;
}

int32_t train_stages_group_end_priv(const train_stages *stages, int32_t i) {
  const char *group = stages->list[i].settings->group;
  int32_t end = i + 1;
  while (group[0] && end < stages->count && strcmp(stages->list[end].settings->group, group) == 0) end++;
  return end;
}

static int32_t group_start(const train_stages *stages, int32_t i) {
  while (i > 0 && train_stages_group_end_priv(stages, i - 1) > i) i--;
  return i;
}

/* ---- sources ---- */

static core_status refuse_source(const train_stages *stages, int32_t i, const char *text, const char *why) {
  return core_config_refuse(stages->config, "stages",
                            "'%s' names the source '%s': %s; expected a stage before it, with @best its best "
                            "checkpoint, or the path of a checkpoint, with a slash in it",
                            stages->list[i].settings->name, text, why);
}

static core_status find_source(const train_stages *stages, int32_t i, const char *text,
                               train_stage_source *out) {
  size_t length = strcspn(text, "@");
  *out = (train_stage_source){.text = text, .stage = -1, .best = strcmp(text + length, "@best") == 0};
  if (strchr(text, '/')) {
    if (strlen(text) >= sizeof out->path) return refuse_source(stages, i, text, "the path is too long");
    out->best = false;
    snprintf(out->path, sizeof out->path, "%s", text);
    return CORE_OK;
  }
  if (text[length] && !out->best) return refuse_source(stages, i, text, "nothing but @best may follow");
  for (int32_t k = 0; k < stages->count && out->stage < 0; k++) {
    const char *name = stages->list[k].settings->name;
    if (strlen(name) == length && strncmp(name, text, length) == 0) out->stage = k;
  }
  if (out->stage < 0) return refuse_source(stages, i, text, "there is no such stage");
  if (out->stage >= group_start(stages, i)) return refuse_source(stages, i, text, "it is not done before");
  const train_stage *from = &stages->list[out->stage];
  const train_settings *s = core_config_data(from->config);
  bool kept = from->settings->kind == TRAIN_STAGE_TRAIN && s->checkpoint.keep_best;
  if (out->best && !kept) return refuse_source(stages, i, text, "it has no checkpoint.keep_best");
  if (out->best) snprintf(out->path, sizeof out->path, "%s/checkpoints/" CKPT_BEST, from->directory);
  return CORE_OK;
}

core_status train_stage_add_source_priv(train_stages *stages, int32_t i, const char *text) {
  train_stage *stage = &stages->list[i];
  train_stage_source *grown = realloc(stage->source, (size_t)(stage->sources + 1) * sizeof *grown);
  CHECK(grown, CORE_ERR_MEMORY, "no memory for the sources of a stage");
  stage->source = grown;
  TRY(find_source(stages, i, text, &grown[stage->sources]));
  int32_t from = grown[stage->sources++].stage;
  if (from >= 0 && stages->list[from].depth >= stage->depth) stage->depth = stages->list[from].depth + 1;
  return CORE_OK;
}

static core_status find_sources(train_stages *stages, int32_t i) {
  const train_stage_settings *s = stages->list[i].settings;
  if (s->kind == TRAIN_STAGE_ASSEMBLE) {
    TRY(train_stage_assembly_sources_priv(stages, i));
  } else if (s->kind == TRAIN_STAGE_EXTEND) {
    TRY(train_stage_extension_sources_priv(stages, i));
  } else if (strcmp(s->from, "none") != 0) {
    TRY(train_stage_add_source_priv(stages, i, s->from));
  }
  return CORE_OK;
}

/* ---- configurations ---- */

/* As a value of --set, whatever it contains. */
static void quote(const char *key, const char *value, char *out, size_t capacity) {
  size_t used = (size_t)snprintf(out, capacity, "%s='", key);
  for (; *value && used + 4 < capacity; value++) {
    out[used++] = *value;
    if (*value == '\'') out[used++] = '\'';
  }
  snprintf(out + used, capacity - used, "'");
}

static core_status check_set(const train_stages *stages, const train_stage_settings *s) {
  for (unsigned k = 0; k < s->set_count; k++)
    if (strncmp(s->set[k], "run.directory", 13) == 0 || strncmp(s->set[k], "stages", 6) == 0)
      return core_config_refuse(
          stages->config, "stages",
          "'%s' sets %s: its directory is its name in run.directory, and it has no stages", s->name,
          s->set[k]);
  return CORE_OK;
}

core_status train_stage_resolve_priv(train_stages *stages, int32_t i, const char *const *more,
                                     int32_t more_count, core_config **out) {
  train_stage *stage = &stages->list[i];
  const train_stage_settings *s = stage->settings;
  char directory[2 * TRAIN_STAGE_PATH + 32];
  int32_t n = 0;
  TRY(check_set(stages, s));
  const char **set = calloc((size_t)s->set_count + (size_t)more_count + 2, sizeof *set);
  CHECK(set, CORE_ERR_MEMORY, "no memory for a stage");
  snprintf(stage->directory, sizeof stage->directory, "%s/%s", stages->settings->run.directory, s->name);
  quote("run.directory", stage->directory, directory, sizeof directory);
  for (unsigned k = 0; k < s->set_count; k++) set[n++] = s->set[k];
  for (int32_t k = 0; k < more_count; k++) set[n++] = more[k];
  set[n++] = directory;
  set[n++] = "stages=[]";
  core_status status = core_config_derive(stages->config, set, n, out);
  free(set);
  TRY(status);
  return CORE_OK;
}

/* ---- ranks ---- */

/* Side by side where every stage of the group gets a rank, or all that it asks for; else one after the other,
 * each on all ranks. */
static core_status place_group(train_stages *stages, int32_t begin, int32_t end, int32_t ranks) {
  int64_t asked = 0, given = 0, n = end - begin;
  for (int32_t i = begin; i < end; i++) {
    int64_t want = stages->list[i].settings->ranks;
    if (want < 0 || want > 1 << 20 || (want > 0 && n == 1))
      return core_config_refuse(stages->config, "stages",
                                "'%s' asks for %lld ranks: expected 1 or more, in a group",
                                stages->list[i].settings->name, (long long)want);
    asked += want;
    given += want > 0;
  }
  if (given > 0 && given < n)
    return core_config_refuse(stages->config, "stages",
                              "give `ranks` for every stage of the group '%s', or for none",
                              stages->list[begin].settings->group);
  bool together = n > 1 && ranks >= (given > 0 ? asked : n);
  for (int32_t i = begin, first = 0; i < end; i++) {
    train_stage *stage = &stages->list[i];
    int64_t even = ranks * (int64_t)(i - begin + 1) / n - ranks * (int64_t)(i - begin) / n;
    stage->first_rank = first;
    stage->ranks = !together ? ranks : (int32_t)(given > 0 ? stage->settings->ranks : even);
    if (together) first += stage->ranks;
  }
  return CORE_OK;
}

/* ---- data ---- */

static core_status check_split(const train_settings *s, const char *split) {
  char names[CORE_MAX_MODALITIES][CORE_NAME];
  int32_t count = 0;
  TRY(data_list_modalities(s->data.path, split, names, &count));
  for (unsigned m = 0; m < s->data.modalities_count; m++) {
    bool found = false;
    for (int32_t i = 0; i < count; i++) found = found || strcmp(names[i], s->data.modalities[m].name) == 0;
    CHECK(found, CORE_ERR_NOT_FOUND,
          "%s/%s holds no shards of '%s' (data.use names the modalities that take part)", s->data.path, split,
          s->data.modalities[m].name);
  }
  return CORE_OK;
}

static core_status check_data(const train_stage *stage) {
  const train_settings *s = core_config_data(stage->config);
  const char *held_out = stage->settings->extend.split;
  char names[CORE_MAX_MODALITIES][CORE_NAME];
  int32_t count = 0;
  if (stage->settings->kind == TRAIN_STAGE_EXTEND) /* some of the modalities are enough */
    TRY(data_list_modalities(s->data.path, held_out[0] ? held_out : s->data.validation, names, &count));
  if (stage->settings->kind != TRAIN_STAGE_TRAIN) return CORE_OK;
  TRY(check_split(s, s->data.train));
  if (s->evaluate.interval > 0 || s->evaluate.at_end) TRY(check_split(s, s->data.validation));
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status plan_stage(train_stages *stages, int32_t i) {
  TRY(train_stage_resolve_priv(stages, i, NULL, 0, &stages->list[i].config));
  TRY(find_sources(stages, i));
  TRY(train_stage_expect_extension_priv(stages, i));
  TRY(train_settings_check(stages->list[i].config, stages->list[i].ranks));
  return CORE_OK;
}

static core_status check_all_data(const train_stages *stages) {
  for (int32_t i = 0; i < stages->count; i++) {
    core_status status = check_data(&stages->list[i]);
    if (status != CORE_OK) status = core_error_context(status, "stage '%s'", stages->list[i].settings->name);
    TRY(status);
  }
  return CORE_OK;
}

core_status train_stages_plan_priv(train_stages *stages, int32_t ranks) {
  const train_settings *s = stages->settings;
  if (strlen(s->run.directory) == 0 || strlen(s->run.directory) > 800)
    return core_config_refuse(stages->config, "run.directory",
                              "expected the name of a directory, of at most 800 bytes");
  stages->count = (int32_t)s->stages_count;
  stages->list = calloc((size_t)s->stages_count, sizeof *stages->list);
  CHECK(stages->list, CORE_ERR_MEMORY, "no memory for %u stages", s->stages_count);
  for (int32_t i = 0; i < stages->count; i++) stages->list[i].settings = &s->stages[i];
  for (int32_t i = 0; i < stages->count; i++) TRY(check_name(stages, i));
  for (int32_t i = 0, end; i < stages->count; i = end) {
    end = train_stages_group_end_priv(stages, i);
    TRY(place_group(stages, i, end, ranks));
  }
  for (int32_t i = 0; i < stages->count; i++) {
    core_status status = plan_stage(stages, i);
    if (status != CORE_OK) status = core_error_context(status, "stage '%s'", s->stages[i].name);
    TRY(status);
  }
  TRY(check_all_data(stages));
  return CORE_OK;
}

void train_stages_free_priv(train_stages *stages) {
  for (int32_t i = 0; stages->list && i < stages->count; i++) {
    core_config_destroy(stages->list[i].config);
    free(stages->list[i].source);
    free(stages->list[i].layer_slots);
    for (unsigned k = 0; stages->list[i].lines && k < stages->list[i].settings->assemble.layers_count; k++)
      free(stages->list[i].lines[k]);
    free(stages->list[i].lines);
  }
  free(stages->list);
}
