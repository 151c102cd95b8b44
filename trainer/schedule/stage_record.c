/* Outline: stage.json from rank 0 to all; what in it must still hold; the contents of sources. */
#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"
#include "core/file.h"
#include "trainer/schedule/stages_impl.h"

enum { LARGEST_RECORD = 1 << 24, LONGEST_EXTENSION = 4096 };

/* ---- the file ---- */

static void path_of(const train_stage *stage, char *out, size_t capacity) {
  snprintf(out, capacity, "%s/stage.json", stage->directory);
}

/* Rank 0's bytes on all ranks; *text NULL: there is no file. malloc'ed. */
static core_status fetch(comm_group *control, const char *path, char **text) {
  int64_t count = -1;
  core_status status = CORE_OK;
  *text = NULL;
  if (comm_rank(control) == 0 && core_file_exists(path))
    status = core_file_read_all(path, LARGEST_RECORD, text, &count);
  TRY(comm_agree(control, status));
  TRY(comm_broadcast(control, 0, &count, sizeof count));
  if (count < 0) return CORE_OK;
  if (!*text) *text = calloc((size_t)count + 1, 1);
  if (!*text)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for %s", path);
  TRY(comm_agree(control, status));
  TRY(comm_broadcast(control, 0, *text, (size_t)count));
  return CORE_OK;
}

static void put_hash(cJSON *object, const char *name, uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%016" PRIx64, value);
  cJSON_AddStringToObject(object, name, text);
}

static core_status write_local(const train_stage *stage) {
  char path[TRAIN_STAGE_PATH];
  path_of(stage, path, sizeof path);
  TRY(core_file_make_directories(stage->directory));
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "format", "antiphon-stage");
  cJSON_AddStringToObject(object, "state", stage->done ? "done" : "begun");
  if (stage->done) cJSON_AddNumberToObject(object, "step", (double)stage->step);
  if (stage->done) put_hash(object, "content", stage->content);
  cJSON *list = cJSON_AddArrayToObject(object, "sources");
  for (int32_t i = 0; i < stage->sources; i++) {
    cJSON *item = cJSON_CreateObject();
    cJSON_AddStringToObject(item, "from", stage->source[i].text);
    put_hash(item, "content", stage->source[i].content);
    cJSON_AddItemToArray(list, item);
  }
  cJSON_AddStringToObject(object, "config", core_config_text(stage->config));
  if (stage->settings->kind == TRAIN_STAGE_EXTEND) {
    char text[LONGEST_EXTENSION];
    train_stage_extension_text_priv(stage, text, sizeof text);
    cJSON_AddStringToObject(object, "extend", text);
  }
  char *json = cJSON_Print(object);
  cJSON_Delete(object);
  CHECK(json, CORE_ERR_MEMORY, "no memory for %s", path);
  core_status status = core_file_replace(path, json, strlen(json));
  free(json);
  TRY(status);
  return CORE_OK;
}

core_status train_stage_write_priv(comm_group *control, const train_stage *stage) {
  TRY(comm_agree(control, comm_rank(control) == 0 ? write_local(stage) : CORE_OK));
  return CORE_OK;
}

/* ---- what must still hold ---- */

/* What decides how and where a stage runs, and nothing of what it trains. */
static const char *const neutral[] = {"run.directory=.",
                                      "run.device=auto",
                                      "run.threads=0",
                                      "run.log=1",
                                      "run.deadline=600",
                                      "data.path=.",
                                      "data.threads=1",
                                      "data.queue=1",
                                      "data.cache=1",
                                      "model.recompute=false",
                                      "model.moe.buffer=1",
                                      "parallel.experts=1",
                                      "parallel.placement=shared",
                                      "parallel.shard_optimizer=true",
                                      "parallel.transport=auto",
                                      "parallel.overlap=auto",
                                      "parallel.bucket=16",
                                      "parallel.chunks=1",
                                      "optimizer.accumulate=1",
                                      "checkpoint.interval=0",
                                      "checkpoint.keep=1",
                                      "checkpoint.keep_every=0",
                                      "checkpoint.level=1",
                                      "checkpoint.threads=1",
                                      "checkpoint.buffers=1",
                                      "checkpoint.busy=delay",
                                      "evaluate.batch=1",
                                      "evaluate.forgetting=[]"};
enum { NEUTRAL = sizeof neutral / sizeof *neutral };

/* "optimizer: ...  rate: 0.1": line of `text` at `at`, with the key at the margin above it. */
static void describe_line(const char *text, const char *at, char *out, size_t capacity) {
  while (at > text && at[-1] != '\n') at--;
  const char *top = at;
  while (top > text && (*top == ' ' || *top == '-')) {
    for (top--; top > text && top[-1] != '\n';) top--;
  }
  const char *key = at + strspn(at, " ");
  if (top == at)
    snprintf(out, capacity, "%.*s", (int)strcspn(key, "\n"), key);
  else
    snprintf(out, capacity, "%.*s %.*s", (int)strcspn(top, "\n"), top, (int)strcspn(key, "\n"), key);
}

static core_status compare_texts(const train_stage *stage, const char *before, const char *now) {
  char then[256], today[256];
  int64_t at = 0;
  while (before[at] && before[at] == now[at]) at++;
  if (before[at] == now[at]) return CORE_OK;
  describe_line(before, before + at, then, sizeof then);
  describe_line(now, now + at, today, sizeof today);
  FAIL(CORE_ERR_CONFIG,
       "it is done, but was configured otherwise (%.180s; now %.180s); take the change back, or remove "
       "%.100s and what "
       "began from it to train them again",
       then, today, stage->directory);
}

/* Both texts go through the same mill. */
static core_status compare_config(const train_stage *stage, const char *stored) {
  core_config *before = NULL, *now = NULL;
  core_status status =
      core_config_load(train_settings_spec(), "the stored configuration", stored, neutral, NEUTRAL, &before);
  if (status == CORE_OK)
    status = core_config_load(train_settings_spec(), "the configuration", core_config_text(stage->config),
                              neutral, NEUTRAL, &now);
  if (status == CORE_OK) status = compare_texts(stage, core_config_text(before), core_config_text(now));
  core_config_destroy(before);
  core_config_destroy(now);
  TRY(status);
  return CORE_OK;
}

/* Likewise what was asked of an extension, which no run's configuration holds; also of one that was begun,
 * whose checkpoint may be there already. */
static core_status compare_extension(const train_stage *stage, const cJSON *object) {
  char now[LONGEST_EXTENSION];
  const char *then = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, "extend"));
  if (stage->settings->kind != TRAIN_STAGE_EXTEND) return CORE_OK;
  train_stage_extension_text_priv(stage, now, sizeof now);
  CHECK(then && strcmp(then, now) == 0, CORE_ERR_CONFIG,
        "it was begun as another extension (%.400s; now %.400s); take the change back, or remove %.100s "
        "and what began from it to make them again",
        then ? then : "none", now, stage->directory);
  return CORE_OK;
}

static bool get_hash(const cJSON *object, const char *name, uint64_t *out) {
  const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
  char *end = NULL;
  if (!text || strlen(text) != 16) return false;
  *out = strtoull(text, &end, 16);
  return *end == '\0';
}

/* The contents that the record names, of sources that it names in the same words. */
static bool get_sources(const cJSON *object, train_stage *stage) {
  const cJSON *list = cJSON_GetObjectItemCaseSensitive(object, "sources");
  if (!cJSON_IsArray(list)) return false;
  for (int32_t i = 0; i < stage->sources; i++) {
    const cJSON *item = cJSON_GetArrayItem(list, i);
    const char *from = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "from"));
    if (from && strcmp(from, stage->source[i].text) == 0 &&
        !get_hash(item, "content", &stage->source[i].content))
      return false;
  }
  return true;
}

static core_status take(const char *path, const cJSON *object, train_stage *stage) {
  const char *state = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, "state"));
  const char *config = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, "config"));
  const cJSON *step = cJSON_GetObjectItemCaseSensitive(object, "step");
  bool good = state && config && get_sources(object, stage);
  stage->begun = true;
  stage->done = good && strcmp(state, "done") == 0;
  if (stage->done)
    good = cJSON_IsNumber(step) && step->valuedouble >= 0 && step->valuedouble < 1e15 &&
           get_hash(object, "content", &stage->content);
  if (stage->done && good) stage->step = (int64_t)step->valuedouble;
  CHECK(good, CORE_ERR_FORMAT, "%s is no record of a stage; remove the directory to train it again", path);
  if (stage->done) TRY(compare_config(stage, config));
  TRY(compare_extension(stage, object));
  return CORE_OK;
}

core_status train_stage_read_priv(comm_group *control, train_stage *stage) {
  char path[TRAIN_STAGE_PATH], *text = NULL;
  path_of(stage, path, sizeof path);
  stage->begun = stage->done = false;
  core_status status = fetch(control, path, &text);
  if (status == CORE_OK && text) {
    cJSON *object = cJSON_Parse(text);
    status = comm_agree(control, take(path, object, stage));
    cJSON_Delete(object);
  }
  free(text);
  TRY(status);
  return CORE_OK;
}

/* ---- sources ---- */

core_status train_stage_open_sources_priv(comm_group *control, train_stage *stage) {
  for (int32_t i = 0; i < stage->sources; i++) {
    train_stage_source *source = &stage->source[i];
    ckpt_reader *reader = NULL;
    TRY(ckpt_reader_open(control, source->path, &reader));
    uint64_t content = ckpt_reader_content_hash(reader);
    ckpt_reader_close(reader);
    bool other = stage->begun && source->content != 0 && source->content != content;
    CHECK(!other, CORE_ERR_MISMATCH,
          "it began from a '%s' of content %016" PRIx64 ", which is now %016" PRIx64
          "; remove %.200s to begin anew",
          source->text, source->content, content, stage->directory);
    source->content = content;
  }
  return CORE_OK;
}
