#include "trainer/state.h"

#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/source.h"

static ckpt_tensor *add(train_state_tensors *out, const char *prefix, const char *name) {
  ckpt_tensor *tensor = &out->list[out->count];
  memset(tensor, 0, sizeof *tensor);
  snprintf(out->names[out->count], CORE_NAME, "%s/%s", prefix, name);
  tensor->name = out->names[out->count++];
  for (int32_t i = 0; i < CORE_MAX_RANK; i++) tensor->shape[i] = 1;
  return tensor;
}

/* Adds `part` of parameter p, counted from its first element; data: where the part begins. */
static void add_part(const train_model *model, train_state_tensors *out, const char *prefix,
                     const train_parameter *p, train_span part, core_real *data) {
  if (part.count == 0) return;
  ckpt_tensor *tensor = add(out, prefix, p->name);
  tensor->dtype = CORE_REAL_DTYPE;
  tensor->rank = p->rank;
  memcpy(tensor->shape, p->shape, (size_t)p->rank * sizeof *p->shape);
  tensor->first = part.first;
  tensor->count = part.count;
  tensor->data = data;
  tensor->device = model->env->ops->device;
  tensor->owner = true;
}

/* The count belongs to the rank whose share begins the parameter. */
static void add_steps(train_state_tensors *out, train_parameter *p, bool owner) {
  ckpt_tensor *tensor = add(out, "adam_steps", p->name);
  tensor->dtype = CORE_INT64;
  tensor->rank = 1;
  tensor->count = 1;
  tensor->data = &p->steps;
  tensor->owner = owner;
}

/* What the optimizer knows of a trained parameter. */
static void add_moments(train_model *model, train_state_tensors *out, train_parameter *p, bool saves) {
  train_parameters *set = &model->parameters;
  int32_t scope = train_scope_number(p);
  train_span share = set->gradient_share[scope], update = set->update[scope];
  train_span part = train_gradient_within(p, saves ? share : update);
  int64_t at = set->state_first[scope] + (part.first - update.first);
  part.first -= p->gradient_first;
  add_part(model, out, "adam_m", p, part, set->m + at);
  add_part(model, out, "adam_v", p, part, set->v + at);
  bool begins = p->gradient_first >= share.first && p->gradient_first < share.first + share.count;
  if (begins || !saves) add_steps(out, p, begins);
}

static void add_parameter(train_model *model, train_state_tensors *out, train_parameter *p,
                          train_state_purpose purpose) {
  train_parameters *set = &model->parameters;
  bool saves = purpose == TRAIN_STATE_SAVE || purpose == TRAIN_STATE_SAVE_TRAINED;
  if (p->frozen && purpose == TRAIN_STATE_SAVE_TRAINED) return;
  train_span all = {p->first, p->count};
  train_span part = saves ? train_parameter_within(p, set->share[train_scope_number(p)]) : all;
  core_real *data = set->value + part.first;
  part.first -= p->first;
  add_part(model, out, "parameter", p, part, data);
  if (purpose != TRAIN_STATE_LOAD_MODEL && !p->frozen) add_moments(model, out, p, saves);
}

static void add_standardisation(train_model *model, train_state_tensors *out, int32_t m) {
  const train_connector_layer *layer = &model->connector[m];
  const train_mirror *parts[2] = {&layer->shift, &layer->scale};
  for (int i = 0; i < 2; i++) {
    ckpt_tensor *tensor =
        add(out, i == 0 ? "latent_shift" : "latent_scale", model->env->settings->data.modalities[m].name);
    tensor->dtype = CORE_REAL_DTYPE;
    tensor->rank = 1;
    tensor->shape[0] = tensor->count = layer->width;
    tensor->data = parts[i]->host;
    tensor->owner = comm_rank(model->env->modality[m]) == 0;
  }
}

static void add_alternation(const train_model *model, train_alternation *alternation,
                            train_state_tensors *out) {
  if (!alternation || alternation->kind != TRAIN_ALTERNATE_ADAPTIVE) return;
  for (int i = 0; i < 2; i++) {
    ckpt_tensor *tensor = add(out, "schedule", i == 0 ? "probability" : "taken");
    tensor->dtype = i == 0 ? CORE_FLOAT64 : CORE_INT64;
    tensor->rank = 1;
    tensor->shape[0] = tensor->count = alternation->directions;
    tensor->data = i == 0 ? (void *)alternation->probability : (void *)alternation->taken;
    tensor->owner = comm_rank(model->env->world) == 0;
  }
}

core_status train_state_list(train_model *model, train_alternation *alternation, train_state_purpose purpose,
                             train_state_tensors *out) {
  train_parameters *set = &model->parameters;
  memset(out, 0, sizeof *out);
  size_t most = (size_t)set->count * 4 + 2 * CORE_MAX_MODALITIES + 2;
  out->list = calloc(most, sizeof *out->list);
  out->names = calloc(most, sizeof *out->names);
  if (!out->list || !out->names) train_state_free(out);
  CHECK(out->list, CORE_ERR_MEMORY, "no memory for the list of %zu tensors", most);
  for (int32_t i = 0; i < set->count; i++) add_parameter(model, out, &set->list[i], purpose);
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    if (train_layout_holds(&model->env->layout, model->env->layout.rank, m))
      add_standardisation(model, out, m);
  if (purpose != TRAIN_STATE_LOAD_MODEL) add_alternation(model, alternation, out);
  return CORE_OK;
}

/* Whether a checkpoint, not its base, holds any of what the optimizer knows of a parameter. */
static bool holds_moments(const train_source *source, const char *name) {
  static const char *const kinds[] = {"adam_m", "adam_v", "adam_steps"};
  bool any = false;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    char full[2 * CORE_NAME];
    ckpt_tensor found;
    snprintf(full, sizeof full, "%s/%s", kinds[i], name);
    any = any || train_source_find(source, full, &found) == source->reader[0];
  }
  return any;
}

void train_state_match(const train_model *model, const train_source *source, train_state_tensors *wanted) {
  const train_parameters *set = &model->parameters;
  int32_t kept = 0, anew = 0, left = 0;
  for (int32_t i = 0; i < wanted->count; i++) {
    const char *name = wanted->list[i].name, *slash = strchr(name, '/');
    bool gone = strncmp(name, "adam_", 5) == 0 && slash && !holds_moments(source, slash + 1);
    anew += gone && strncmp(name, "adam_steps/", 11) == 0;
    if (!gone) wanted->list[kept++] = wanted->list[i];
  }
  wanted->count = kept;
  for (int32_t i = 0; i < set->count; i++)
    left += set->list[i].frozen && holds_moments(source, set->list[i].name);
  if (anew > 0)
    LOG_INFO("%d parameters were not trained in %s: their moments begin at 0", anew,
             ckpt_reader_path(source->reader[0]));
  if (left > 0)
    LOG_INFO("%d parameters that were trained in %s are frozen now: their moments are left behind", left,
             ckpt_reader_path(source->reader[0]));
}

core_status train_state_loaded(train_model *model) {
  train_parameters *set = &model->parameters;
  TRY(train_parameters_round(set, model->env, (train_span){0, set->total}));
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    const train_connector_layer *layer = &model->connector[m];
    TRY(train_mirror_up(model->env, &layer->shift, layer->shift.device.shape[0]));
    TRY(train_mirror_up(model->env, &layer->scale, layer->scale.device.shape[0]));
  }
  return CORE_OK;
}

void train_state_free(train_state_tensors *tensors) {
  free(tensors->list);
  free(tensors->names);
  memset(tensors, 0, sizeof *tensors);
}

/* 64-bit numbers go as text: JSON numbers are doubles. */
static void put_integer(cJSON *object, const char *name, int64_t value) {
  char text[32];
  snprintf(text, sizeof text, "%" PRId64, value);
  cJSON_AddStringToObject(object, name, text);
}

/* All digits: the number comes back bit for bit. */
static void put_real(cJSON *object, const char *name, double value) {
  char text[40];
  snprintf(text, sizeof text, "%.17g", value);
  cJSON_AddStringToObject(object, name, text);
}

static void put_stopping(cJSON *object, const train_early_stopping *s) {
  cJSON *part = cJSON_AddObjectToObject(object, "early_stopping");
  put_real(part, "best", s->best);
  put_integer(part, "best_step", s->best_step);
  put_real(part, "risen", s->risen);
  put_integer(part, "risen_step", s->risen_step);
  put_integer(part, "stale", s->stale);
  put_integer(part, "seen", s->seen);
}

static void put_base(cJSON *object, const train_base *base) {
  char text[32];
  cJSON *part = cJSON_AddObjectToObject(object, "base");
  snprintf(text, sizeof text, "%016" PRIx64, base->hash);
  cJSON_AddStringToObject(part, "path", base->path);
  cJSON_AddStringToObject(part, "relative", base->relative);
  cJSON_AddStringToObject(part, "content", text);
}

core_status train_state_meta_write(const train_state_meta *meta, char **json) {
  char text[32];
  cJSON *object = cJSON_CreateObject();
  put_integer(object, "step", meta->step);
  put_integer(object, "stage", meta->position.stage);
  put_integer(object, "epoch", meta->position.epoch);
  put_integer(object, "consumed", meta->position.consumed);
  snprintf(text, sizeof text, "%016" PRIx64, meta->fingerprint);
  cJSON_AddStringToObject(object, "fingerprint", text);
  put_integer(object, "ranks", meta->ranks);
  put_integer(object, "expert_ranks", meta->expert_ranks);
  put_stopping(object, &meta->stopping);
  if (meta->base.path[0]) put_base(object, &meta->base);
  cJSON_AddStringToObject(object, "config", meta->config);
  *json = cJSON_PrintUnformatted(object);
  cJSON_Delete(object);
  CHECK(*json, CORE_ERR_MEMORY, "no memory for the checkpoint's description");
  return CORE_OK;
}

static bool get_integer(const cJSON *object, const char *name, int64_t *out) {
  const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
  char *end = NULL;
  if (!text || !*text) return false;
  *out = strtoll(text, &end, 10);
  return *end == '\0';
}

static bool get_real(const cJSON *object, const char *name, double *out) {
  const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
  char *end = NULL;
  if (!text || !*text) return false;
  *out = strtod(text, &end);
  return *end == '\0';
}

static bool get_stopping(const cJSON *object, train_early_stopping *s) {
  const cJSON *part = cJSON_GetObjectItemCaseSensitive(object, "early_stopping");
  s->best_step = s->risen_step = s->seen = -1;
  if (!part) return true;
  return get_real(part, "best", &s->best) && get_integer(part, "best_step", &s->best_step) &&
         get_real(part, "risen", &s->risen) && get_integer(part, "risen_step", &s->risen_step) &&
         get_integer(part, "stale", &s->stale) && get_integer(part, "seen", &s->seen);
}

/* Absent in a whole checkpoint. */
static bool get_base(const cJSON *object, train_base *base) {
  const cJSON *part = cJSON_GetObjectItemCaseSensitive(object, "base");
  const char *path = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "path"));
  const char *relative = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "relative"));
  const char *content = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "content"));
  if (!part) return true;
  if (!path || !*path || !relative || !content) return false;
  if (strlen(path) >= TRAIN_BASE_PATH || strlen(relative) >= TRAIN_BASE_PATH) return false;
  snprintf(base->path, sizeof base->path, "%s", path);
  snprintf(base->relative, sizeof base->relative, "%s", relative);
  base->hash = strtoull(content, NULL, 16);
  return true;
}

core_status train_state_meta_read(const char *json, train_state_meta *out) {
  memset(out, 0, sizeof *out);
  cJSON *object = cJSON_Parse(json);
  const char *config = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, "config"));
  const char *print = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, "fingerprint"));
  bool good = config && print && get_integer(object, "step", &out->step) &&
              get_integer(object, "stage", &out->position.stage) &&
              get_integer(object, "epoch", &out->position.epoch) &&
              get_integer(object, "consumed", &out->position.consumed) &&
              get_integer(object, "ranks", &out->ranks) &&
              get_integer(object, "expert_ranks", &out->expert_ranks) &&
              get_stopping(object, &out->stopping) && get_base(object, &out->base);
  if (good) {
    out->fingerprint = strtoull(print, NULL, 16);
    out->config = strdup(config);
  }
  cJSON_Delete(object);
  CHECK(good, CORE_ERR_FORMAT, "the checkpoint's description lacks a field");
  CHECK(out->config, CORE_ERR_MEMORY, "no memory for the checkpoint's configuration");
  return CORE_OK;
}

/* ---- checkpoints that are made, not trained ---- */

core_status train_state_target(const char *directory, int64_t step) {
  char path[4096];
  int length = snprintf(path, sizeof path, "%s/step-%08" PRId64, directory, step);
  CHECK(length < (int)sizeof path, CORE_ERR_ARGUMENT, "a directory name of %d bytes", length);
  CHECK(!core_file_exists(path), CORE_ERR_ARGUMENT, "%s is there already", path);
  return CORE_OK;
}

core_status train_state_publish(comm_group *control, const char *directory, const train_state_meta *meta,
                                const ckpt_tensor *list, int32_t count) {
  char *json = NULL;
  ckpt_writer *writer = NULL;
  const ckpt_options options = {.directory = directory, .keep = 1 << 20};
  TRY(comm_agree(control, train_state_meta_write(meta, &json)));
  core_status status = ckpt_writer_create(control, &options, list, count, &writer);
  if (status == CORE_OK) status = ckpt_writer_begin(writer, meta->step, json);
  if (status == CORE_OK) status = ckpt_writer_commit(writer);
  ckpt_writer_destroy(writer);
  free(json);
  TRY(status);
  return CORE_OK;
}
