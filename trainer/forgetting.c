#include "trainer/forgetting.h"

#include <cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/measure.h"
#include "trainer/settings.h"

static core_status measure(const train_forgetting *f, const char *path, const char *split,
                           train_measurement *out) {
  ckpt_reader *reader = NULL;
  *out = (train_measurement){.layers = 0};
  TRY(ckpt_reader_open(comm_control_group(f->comm), path, &reader));
  const train_measure_options options = {
      .comm = f->comm, .run = f->run, .checkpoint = reader, .split = split};
  core_status status = train_measure(&options, out);
  ckpt_reader_close(reader);
  TRY(status);
  return CORE_OK;
}

/* In the terms in which it is read: losses as they are, recalls in per cent. */
static void say(const char *split, const train_measurement *before, const train_measurement *after) {
  double unit = after->decoder ? 1 : 100;
  const char *what = after->decoder ? "loss" : "mean R@1 in %";
  char list[1024] = "";
  size_t used = 0;
  for (int32_t c = 0; c < after->classes && used + CORE_NAME + 16 < sizeof list; c++)
    used += (size_t)snprintf(list + used, sizeof list - used, ", %s %.2f %%", after->class[c],
                             100 * after -> fresh[c]);
  if (before)
    LOG_INFO("forgetting, %s: %s %.4f before, %.4f after (%+.4f)", split, what, unit * before->quality,
             unit * after->quality, unit * (after->quality - before->quality));
  else
    LOG_INFO("forgetting, %s: %s %.4f", split, what, unit * after->quality);
  LOG_INFO("forgetting, %s: tokens at new experts %.2f %%%s", split, 100 * after->fresh[after->classes],
           list);
}

static cJSON *describe(const char *split, const train_measurement *before, const train_measurement *after) {
  cJSON *item = cJSON_CreateObject();
  cJSON_AddStringToObject(item, "split", split);
  cJSON_AddStringToObject(item, "measure", after->decoder ? "loss" : "recall");
  cJSON_AddNumberToObject(item, "samples", (double)after->samples);
  if (before) cJSON_AddNumberToObject(item, "before", before->quality);
  cJSON_AddNumberToObject(item, "after", after->quality);
  cJSON *fresh = cJSON_AddObjectToObject(item, "new_experts");
  cJSON_AddNumberToObject(fresh, "all", after->fresh[after->classes]);
  for (int32_t c = 0; c < after->classes; c++)
    cJSON_AddNumberToObject(fresh, after->class[c], after -> fresh[c]);
  return item;
}

static core_status add_split(const train_forgetting *f, const char *split, cJSON *list) {
  train_measurement before = {.layers = 0}, after = {.layers = 0};
  core_status status = f->before ? measure(f, f->before, split, &before) : CORE_OK;
  if (status == CORE_OK) status = measure(f, f->after, split, &after);
  if (status == CORE_OK) say(split, f->before ? &before : NULL, &after);
  if (status == CORE_OK) cJSON_AddItemToArray(list, describe(split, f->before ? &before : NULL, &after));
  train_measurement_free(&before);
  train_measurement_free(&after);
  TRY(status);
  return CORE_OK;
}

static core_status write(const train_forgetting *f, const cJSON *object) {
  char *json = cJSON_Print(object);
  CHECK(json, CORE_ERR_MEMORY, "no memory for %s", f->report);
  core_status status = core_file_replace(f->report, json, strlen(json));
  free(json);
  TRY(status);
  return CORE_OK;
}

core_status train_forgetting_run(const train_forgetting *f) {
  const train_settings *s = core_config_data(f->run);
  comm_group *control = comm_control_group(f->comm);
  if (s->evaluate.forgetting_count == 0) return CORE_OK;
  cJSON *object = cJSON_CreateObject();
  if (f->before) cJSON_AddStringToObject(object, "before", f->before);
  cJSON_AddStringToObject(object, "after", f->after);
  cJSON *list = cJSON_AddArrayToObject(object, "splits");
  core_status status = CORE_OK;
  for (unsigned i = 0; i < s->evaluate.forgetting_count && status == CORE_OK; i++)
    status = add_split(f, s->evaluate.forgetting[i], list);
  if (status == CORE_OK) status = comm_agree(control, comm_rank(control) == 0 ? write(f, object) : CORE_OK);
  cJSON_Delete(object);
  TRY(status);
  return CORE_OK;
}
