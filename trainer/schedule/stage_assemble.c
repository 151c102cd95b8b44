/* Outline: a stage of kind assemble: its sources (the base, then each slot of each layer, then connectors),
 * and what is made of them. */
#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/assemble.h"
#include "trainer/schedule/stages_impl.h"

/* ---- sources ---- */

static core_status refuse(const train_stages *stages, int32_t i, const char *key, const char *text,
                          const char *expected) {
  return core_config_refuse(stages->config, "stages", "'%s' has assemble.%s '%s': expected %s",
                            stages->list[i].settings->name, key, text, expected);
}

/* A slot: `base` is the base. */
static core_status add_slot(train_stages *stages, int32_t i, const char *text) {
  const char *base = stages->list[i].settings->assemble.base;
  TRY(train_stage_add_source_priv(stages, i, strcmp(text, "base") == 0 ? base : text));
  stages->list[i].slots++;
  return CORE_OK;
}

/* "a, b, base": the words are cut out of `line`, which sources then point into. */
static core_status add_layer(train_stages *stages, int32_t i, char *line, int32_t *slots) {
  char *save = NULL;
  for (char *word = strtok_r(line, ", ", &save); word; word = strtok_r(NULL, ", ", &save)) {
    TRY(add_slot(stages, i, word));
    ++*slots;
  }
  return CORE_OK;
}

static core_status add_layers(train_stages *stages, int32_t i) {
  train_stage *stage = &stages->list[i];
  const train_stage_settings *s = stage->settings;
  const train_settings *target = core_config_data(stage->config);
  unsigned mixtures = 0;
  stage->layer_slots = calloc((size_t)target->model.layers, sizeof *stage->layer_slots);
  stage->lines = calloc((size_t)s->assemble.layers_count, sizeof *stage->lines);
  CHECK(stage->layer_slots && stage->lines, CORE_ERR_MEMORY, "no memory for the slots of %lld layers",
        (long long)target->model.layers);
  for (int64_t l = 0; l < target->model.layers; l++) {
    if (!train_settings_moe_layer(target->model.moe.layers, target->model.layers, l)) continue;
    if (mixtures++ >= s->assemble.layers_count) continue;
    char **line = &stage->lines[mixtures - 1];
    *line = strdup(s->assemble.layers[mixtures - 1]);
    CHECK(*line, CORE_ERR_MEMORY, "no memory for the slots of a layer");
    TRY(add_layer(stages, i, *line, &stage->layer_slots[l]));
  }
  CHECK(mixtures == s->assemble.layers_count, CORE_ERR_CONFIG,
        "assemble.layers fills the slots of %u layers, the model has %u with a mixture",
        s->assemble.layers_count, mixtures);
  return CORE_OK;
}

/* "image:source" */
static core_status add_connectors(train_stages *stages, int32_t i) {
  train_stage *stage = &stages->list[i];
  const train_stage_settings *s = stage->settings;
  const train_settings *target = core_config_data(stage->config);
  for (unsigned k = 0; k < s->assemble.connectors_count; k++) {
    const char *text = s->assemble.connectors[k], *colon = strchr(text, ':');
    char name[CORE_NAME];
    snprintf(name, sizeof name, "%.*s", colon ? (int)(colon - text) : 0, text);
    int32_t m = train_settings_modality(target, name);
    if (!colon || m < 0 || stage->connector[m] >= 0)
      return refuse(stages, i, "connectors", text, "a modality, once, with its source: image:stage");
    TRY(train_stage_add_source_priv(stages, i, colon + 1));
    stage->connector[m] = stage->sources - 1;
  }
  return CORE_OK;
}

core_status train_stage_assembly_sources_priv(train_stages *stages, int32_t i) {
  train_stage *stage = &stages->list[i];
  const train_stage_settings *s = stage->settings;
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; m++) stage->connector[m] = -1;
  if (strcmp(s->from, "none") != 0)
    return core_config_refuse(stages->config, "stages",
                              "'%s' is an assembly: it has assemble.base, no `from`", s->name);
  if (strcmp(s->assemble.base, "none") == 0) return refuse(stages, i, "base", "none", "a source");
  if ((s->assemble.slots_count > 0) == (s->assemble.layers_count > 0))
    return refuse(stages, i, "slots", s->assemble.slots_count > 0 ? s->assemble.slots[0] : "",
                  "either slots, for all layers, or layers, the slots of each");
  TRY(train_stage_add_source_priv(stages, i, s->assemble.base));
  for (unsigned k = 0; k < s->assemble.slots_count; k++) TRY(add_slot(stages, i, s->assemble.slots[k]));
  if (s->assemble.layers_count > 0) TRY(add_layers(stages, i));
  TRY(add_connectors(stages, i));
  return CORE_OK;
}

/* ---- the assembly ---- */

static void put_source(cJSON *list, const char *what, const train_stage_source *source) {
  char content[24];
  cJSON *item = cJSON_CreateObject();
  snprintf(content, sizeof content, "%016" PRIx64, source->content);
  cJSON_AddStringToObject(item, "for", what);
  cJSON_AddStringToObject(item, "from", source->path);
  cJSON_AddStringToObject(item, "content", content);
  cJSON_AddItemToArray(list, item);
}

/* What came from where; tells it too. */
static core_status write_manifest(const train_stage *stage) {
  char path[TRAIN_STAGE_PATH], what[CORE_NAME + 16];
  const train_settings *target = core_config_data(stage->config);
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "stage", stage->settings->name);
  cJSON *list = cJSON_AddArrayToObject(object, "assembled");
  put_source(list, "base", &stage->source[0]);
  for (int32_t k = 0; k < stage->slots; k++) {
    snprintf(what, sizeof what, "slot %d", k);
    put_source(list, what, &stage->source[1 + k]);
    LOG_INFO("%s: %s", what, stage->source[1 + k].path);
  }
  for (unsigned m = 0; m < target->data.modalities_count; m++) {
    if (stage->connector[m] < 0) continue;
    snprintf(what, sizeof what, "connector.%.80s", target->data.modalities[m].name);
    put_source(list, what, &stage->source[stage->connector[m]]);
    LOG_INFO("%s: %s", what, stage->source[stage->connector[m]].path);
  }
  cJSON *fresh = cJSON_AddArrayToObject(object, "new");
  cJSON_AddItemToArray(fresh, cJSON_CreateString("blocks.*.router"));
  char *json = cJSON_Print(object);
  cJSON_Delete(object);
  CHECK(json, CORE_ERR_MEMORY, "no memory for the manifest");
  snprintf(path, sizeof path, "%s/manifest.json", stage->directory);
  core_status status = core_file_replace(path, json, strlen(json));
  free(json);
  TRY(status);
  return CORE_OK;
}

static core_status write_files(const train_stage *stage) {
  char path[TRAIN_STAGE_PATH];
  const char *text = core_config_text(stage->config);
  snprintf(path, sizeof path, "%s/config.yaml", stage->directory);
  TRY(core_file_replace(path, text, strlen(text)));
  TRY(write_manifest(stage));
  return CORE_OK;
}

/* A checkpoint that was published before the stage could be recorded as done is the one that would be made.
 */
core_status train_stage_is_made_priv(comm_group *control, const char *directory, int32_t *made) {
  char path[TRAIN_STAGE_PATH + 32];
  snprintf(path, sizeof path, "%s/step-00000000", directory);
  *made = core_file_exists(path);
  TRY(comm_broadcast(control, 0, made, sizeof *made));
  return CORE_OK;
}

core_status train_stage_assemble_priv(comm_group *control, const train_stage *stage) {
  char directory[TRAIN_STAGE_PATH];
  const char **slot = calloc((size_t)stage->slots + 1, sizeof *slot), *connector[CORE_MAX_MODALITIES];
  const train_settings *target = core_config_data(stage->config);
  int32_t made = 0;
  snprintf(directory, sizeof directory, "%s/checkpoints", stage->directory);
  for (int32_t k = 0; slot && k < stage->slots; k++) slot[k] = stage->source[1 + k].path;
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; m++)
    connector[m] = stage->connector[m] >= 0 ? stage->source[stage->connector[m]].path : NULL;
  const train_assembly assembly = {.config = stage->config,
                                   .control = control,
                                   .base = stage->source[0].path,
                                   .slot = slot,
                                   .slots = stage->slots,
                                   .layer_slots = stage->layer_slots,
                                   .layers = stage->layer_slots ? (int32_t)target->model.layers : 0,
                                   .connector = connector,
                                   .directory = directory};
  core_status status = slot ? CORE_OK
                            : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                               "no memory for the slots of an assembly");
  if (status == CORE_OK && comm_rank(control) == 0) status = write_files(stage);
  status = comm_agree(control, status);
  if (status == CORE_OK) status = train_stage_is_made_priv(control, directory, &made);
  if (status == CORE_OK && !made) status = train_assemble(&assembly);
  free(slot);
  TRY(status);
  return CORE_OK;
}
