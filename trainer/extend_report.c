/* What an extension says: a line for each layer on the log, and extend.json. */
#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/extend_impl.h"

enum { WHY = 256 };

void train_extension_print_priv(const train_extension_work *work) {
  const train_extension_choice *choice = &work->choice;
  LOG_INFO("MoE layer  block  experts          d  extended  most chosen (share)  why");
  for (int32_t j = 0; j < choice->layers; j++) {
    const train_extension_layer *l = &choice->layer[j];
    char why[WHY], d[32] = "-";
    train_extension_why(work->extension->how, choice, j, why, sizeof why);
    if (work->tuned) snprintf(d, sizeof d, "%.6f", l->d);
    LOG_INFO("%9d %6lld %8lld %10s  %8s %12lld (%.3f)  %s", j, (long long)l->block, (long long)l->experts, d,
             l->chosen ? "yes" : "no", (long long)l->source, l->share, why);
  }
}

static void put_hash(cJSON *object, const char *name, uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%016" PRIx64, value);
  cJSON_AddStringToObject(object, name, text);
}

/* Tokens that chose each expert: below 2^53. */
static void put_counts(cJSON *object, const char *name, const train_measurement *m, int32_t j) {
  cJSON *list = cJSON_AddArrayToObject(object, name);
  for (int64_t e = 0; e < m->experts[j]; e++)
    cJSON_AddItemToArray(list, cJSON_CreateNumber((double)train_measurement_count(m, j, -1, e)));
}

static void put_layer(cJSON *list, const train_extension_work *work, int32_t j) {
  const train_extension_layer *l = &work->choice.layer[j];
  char why[WHY];
  cJSON *item = cJSON_CreateObject();
  train_extension_why(work->extension->how, &work->choice, j, why, sizeof why);
  cJSON_AddNumberToObject(item, "mixture", j);
  cJSON_AddNumberToObject(item, "block", (double)l->block);
  cJSON_AddNumberToObject(item, "experts", (double)l->experts);
  if (work->tuned) cJSON_AddNumberToObject(item, "d", l->d);
  cJSON_AddBoolToObject(item, "extended", l->chosen);
  cJSON_AddStringToObject(item, "why", why);
  cJSON_AddNumberToObject(item, "source", (double)l->source);
  cJSON_AddNumberToObject(item, "source_share", l->share);
  if (l->chosen && work->extension->how->init == TRAIN_EXTEND_COPY_BELOW)
    cJSON_AddNumberToObject(item, "bias", train_extension_below(work, j));
  put_counts(item, "before", &work->before, j);
  if (work->tuned) put_counts(item, "after", &work->after, j);
  cJSON_AddItemToArray(list, item);
}

static void put_tensors(cJSON *object, char *lines) {
  cJSON *old = cJSON_AddObjectToObject(object, "old");
  for (char *save = NULL, *line = strtok_r(lines, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
    char *name = strchr(line, ' ');
    if (!name) continue;
    *name++ = '\0';
    cJSON_AddStringToObject(old, name, line);
  }
}

core_status train_extension_report_priv(const train_extension_work *work, char *lines) {
  const train_extension *x = work->extension;
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "original", x->original);
  put_hash(object, "original_content", ckpt_reader_content_hash(work->original));
  if (work->tuned) cJSON_AddStringToObject(object, "tuned", x->tuned);
  if (work->tuned) put_hash(object, "tuned_content", ckpt_reader_content_hash(work->tuned));
  cJSON_AddStringToObject(object, "rule", x->how->layers);
  cJSON_AddStringToObject(object, "share", x->how->share);
  cJSON *list = cJSON_AddArrayToObject(object, "layers");
  for (int32_t j = 0; j < work->choice.layers; j++) put_layer(list, work, j);
  cJSON *fresh = cJSON_AddArrayToObject(object, "new");
  for (int32_t i = 0; i < work->tensors; i++)
    if (work->tensor[i].kind != TRAIN_EXTENSION_OLD)
      cJSON_AddItemToArray(fresh, cJSON_CreateString(work->tensor[i].name));
  put_tensors(object, lines);
  char *json = cJSON_Print(object);
  cJSON_Delete(object);
  CHECK(json, CORE_ERR_MEMORY, "no memory for %s", x->report);
  core_status status = core_file_replace(x->report, json, strlen(json));
  free(json);
  TRY(status);
  return CORE_OK;
}
