/* Outline: every rank tells of the parameters that it is the first to hold, in lines "kind name trained
 * frozen"; rank 0 adds them up by group and writes. */
#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "core/random.h" /* core_hash */
#include "trainer/run_impl.h"

enum { LARGEST_MANIFEST = 1 << 24, SHOWN = 8 };

typedef struct row {
  char name[CORE_NAME];
  int64_t trained, frozen;
  uint64_t hash, set; /* of the frozen ones, and of their names: sums over them, whatever rank holds them */
} row;

typedef struct table {
  row *list;
  int32_t count, capacity;
} table;

/* Memory of a rank for its parameters, in bytes. */
typedef struct memory {
  int64_t values, gradients, moments;
} memory;

/* "blocks.3.experts.5.in.weight" -> "blocks.*.experts.*.in": numbers are one, and so are weight and bias. */
static void group_of(const char *name, char out[CORE_NAME]) {
  size_t used = 0;
  const char *last = strrchr(name, '.'), *end = last ? last : name + strlen(name);
  for (const char *at = name; at < end;) {
    size_t length = strcspn(at, ".");
    bool number = length > 0 && strspn(at, "0123456789") == length;
    used += (size_t)snprintf(out + used, CORE_NAME - used, "%s%.*s", used ? "." : "",
                             number ? 1 : (int)length, number ? "*" : at);
    at += length + (at[length] == '.');
  }
  out[used] = '\0';
}

static core_status add_row(table *t, const char *name, const row *more) {
  int32_t i = 0;
  while (i < t->count && strcmp(t->list[i].name, name) != 0) i++;
  if (i == t->count) {
    if (t->count == t->capacity) {
      int32_t capacity = 2 * t->capacity + 32;
      row *grown = realloc(t->list, (size_t)capacity * sizeof *grown);
      CHECK(grown, CORE_ERR_MEMORY, "no memory for the manifest");
      t->list = grown;
      t->capacity = capacity;
    }
    t->list[t->count++] = (row){.trained = 0};
    snprintf(t->list[i].name, sizeof t->list[i].name, "%s", name);
  }
  t->list[i].trained += more->trained;
  t->list[i].frozen += more->frozen;
  t->list[i].hash += more->hash;
  t->list[i].set += more->set;
  return CORE_OK;
}

/* Of a frozen parameter's name and bytes. */
static core_status hash_of(const train_run_state *r, const train_parameter *p, uint64_t *out) {
  const core_device *device = r->env->ops->device;
  const core_real *value = r->session->model->parameters.value + p->first;
  size_t bytes = (size_t)p->count * sizeof *value;
  void *copy = device->host_access ? NULL : malloc(bytes);
  CHECK(device->host_access || copy, CORE_ERR_MEMORY, "no memory for the %zu bytes of '%s'", bytes, p->name);
  core_status status = copy ? device->copy(copy, value, bytes, NULL) : CORE_OK;
  *out = core_hash(copy ? copy : (const void *)value, bytes, core_hash_text(p->name));
  free(copy);
  TRY(status);
  return CORE_OK;
}

/* Those that this rank holds and no rank before it in their group. */
static core_status add_own(const train_run_state *r, table *t) {
  const train_parameters *set = &r->session->model->parameters;
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    char group[CORE_NAME];
    const comm_group *holders = train_scope_group(r->env, train_scope_number(p));
    if (!holders || comm_rank(holders) != 0) continue;
    group_of(p->name, group);
    row one = {.trained = p->frozen ? 0 : p->count, .frozen = p->frozen ? p->count : 0};
    if (p->frozen) TRY(hash_of(r, p, &one.hash));
    if (p->frozen) one.set = core_hash_text(p->name);
    TRY(add_row(t, group, &one));
  }
  return CORE_OK;
}

static memory own_memory(const train_run_state *r) {
  const train_parameters *set = &r->session->model->parameters;
  const int64_t real = (int64_t)sizeof(core_real);
  return (memory){.values = set->total * (real + (set->copy ? (int64_t)sizeof *set->copy : 0)),
                  .gradients = set->gradient_total * real,
                  .moments = 2 * set->state_first[TRAIN_SCOPES] * real};
}

/* ---- to rank 0 ---- */

/* "group NAME TRAINED FROZEN HASH SET" and "new NAME" lines; malloc'ed. */
static core_status write_lines(const train_run_state *r, char **out) {
  table t = {0};
  const char *fresh = r->begun.fresh ? r->begun.fresh : "";
  core_status status = add_own(r, &t);
  size_t used = 0, capacity = (size_t)(t.count + 1) * (CORE_NAME + 64) + 2 * strlen(fresh) + 1;
  char *text = malloc(capacity);
  if (status == CORE_OK && !text)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for the manifest");
  if (text) text[0] = '\0';
  for (int32_t i = 0; status == CORE_OK && i < t.count; i++)
    used += (size_t)snprintf(
        text + used, capacity - used, "group %s %" PRId64 " %" PRId64 " %016" PRIx64 " %016" PRIx64 "\n",
        t.list[i].name, t.list[i].trained, t.list[i].frozen, t.list[i].hash, t.list[i].set);
  for (const char *line = fresh; status == CORE_OK && *line; line += strcspn(line, "\n") + 1)
    used += (size_t)snprintf(text + used, capacity - used, "new %.*s\n", (int)strcspn(line, "\n"), line);
  free(t.list);
  if (status != CORE_OK) free(text);
  TRY(status);
  *out = text;
  return CORE_OK;
}

/* Takes the lines of all ranks apart. */
static core_status read_lines(char *all, table *groups, table *fresh) {
  for (char *save = NULL, *line = strtok_r(all, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
    char name[CORE_NAME];
    row one = {.trained = 0};
    if (sscanf(line, "group %95s %" SCNd64 " %" SCNd64 " %" SCNx64 " %" SCNx64, name, &one.trained,
               &one.frozen, &one.hash, &one.set) == 5)
      TRY(add_row(groups, name, &one));
    else if (sscanf(line, "new %95s", name) == 1)
      TRY(add_row(fresh, name, &one));
  }
  return CORE_OK;
}

/* ---- on rank 0 ---- */

static void print(const table *groups, const table *fresh, const memory *each, int32_t ranks) {
  int64_t trained = 0, frozen = 0;
  for (int32_t i = 0; i < groups->count; i++) {
    trained += groups->list[i].trained;
    frozen += groups->list[i].frozen;
  }
  LOG_INFO("trains %lld of %lld parameters:", (long long)trained, (long long)(trained + frozen));
  for (int32_t i = 0; i < groups->count; i++) {
    const row *g = &groups->list[i];
    LOG_INFO("  %-40s %12lld trained %12lld frozen", g->name, (long long)g->trained, (long long)g->frozen);
  }
  for (int32_t i = 0; i < ranks; i++)
    LOG_INFO("  rank %d: values %.2f MiB, gradients %.2f MiB, optimizer state %.2f MiB", i,
             (double)each[i].values / 1048576, (double)each[i].gradients / 1048576,
             (double)each[i].moments / 1048576);
  for (int32_t i = 0; i < fresh->count && i < SHOWN; i++) LOG_INFO("  new: %s", fresh->list[i].name);
  if (fresh->count > SHOWN) LOG_INFO("  new: %d more, listed in manifest.json", fresh->count - SHOWN);
}

static void put_hash(cJSON *object, const char *name, uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%016" PRIx64, value);
  cJSON_AddStringToObject(object, name, text);
}

static bool has_hash(const cJSON *object, const char *name, uint64_t value) {
  char text[24];
  const char *its = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
  snprintf(text, sizeof text, "%016" PRIx64, value);
  return its && strcmp(its, text) == 0;
}

/* What a group's frozen parameters were when the run began: as the file has it, where the same ones were
 * frozen; else as they are. */
static void put_begun(cJSON *object, const cJSON *old, const row *group) {
  const cJSON *item = NULL;
  cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(old, "groups")) {
    const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "name"));
    const char *hash = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "frozen_begun"));
    if (!name || !hash || strcmp(name, group->name) != 0 || !has_hash(item, "frozen_set", group->set))
      continue;
    cJSON_AddStringToObject(object, "frozen_begun", hash);
    return;
  }
  put_hash(object, "frozen_begun", group->hash);
}

/* Numbers of parameters are far below 2^53. old: what the file held, or NULL. */
static void put_groups(cJSON *object, const table *groups, const cJSON *old) {
  cJSON *list = cJSON_AddArrayToObject(object, "groups");
  int64_t trained = 0, frozen = 0;
  for (int32_t i = 0; i < groups->count; i++) {
    cJSON *item = cJSON_CreateObject();
    cJSON_AddStringToObject(item, "name", groups->list[i].name);
    cJSON_AddNumberToObject(item, "trained", (double)groups->list[i].trained);
    cJSON_AddNumberToObject(item, "frozen", (double)groups->list[i].frozen);
    if (groups->list[i].frozen > 0) {
      put_begun(item, old, &groups->list[i]);
      put_hash(item, "frozen_now", groups->list[i].hash);
      put_hash(item, "frozen_set", groups->list[i].set);
    }
    cJSON_AddItemToArray(list, item);
    trained += groups->list[i].trained;
    frozen += groups->list[i].frozen;
  }
  cJSON_AddNumberToObject(object, "trained", (double)trained);
  cJSON_AddNumberToObject(object, "frozen", (double)frozen);
}

static void put_memory(cJSON *object, const memory *each, int32_t ranks) {
  cJSON *list = cJSON_AddArrayToObject(object, "bytes_of_rank");
  for (int32_t i = 0; i < ranks; i++) {
    cJSON *item = cJSON_CreateObject();
    cJSON_AddNumberToObject(item, "values", (double)each[i].values);
    cJSON_AddNumberToObject(item, "gradients", (double)each[i].gradients);
    cJSON_AddNumberToObject(item, "optimizer_state", (double)each[i].moments);
    cJSON_AddItemToArray(list, item);
  }
}

static cJSON *describe_begun(const train_begun *begun, const table *fresh) {
  if (!begun->path[0]) return cJSON_CreateNull();
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "from", begun->path);
  cJSON_AddNumberToObject(object, "step", (double)begun->step);
  put_hash(object, "content", begun->content);
  cJSON *list = cJSON_AddArrayToObject(object, "new");
  for (int32_t i = 0; i < fresh->count; i++)
    cJSON_AddItemToArray(list, cJSON_CreateString(fresh->list[i].name));
  return object;
}

/* The file as it is; NULL where it cannot be read: that is no reason to end. */
static cJSON *read_file(const char *path) {
  char *text = NULL;
  int64_t count = 0;
  if (!core_file_exists(path) || core_file_read_all(path, LARGEST_MANIFEST, &text, &count) != CORE_OK) {
    core_error_clear();
    return NULL;
  }
  cJSON *object = cJSON_Parse(text);
  free(text);
  return object;
}

/* What is frozen is what it was. */
static core_status check_frozen(const cJSON *object, const char *path) {
  const cJSON *item = NULL;
  cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(object, "groups")) {
    const char *begun = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "frozen_begun"));
    const char *now = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "frozen_now"));
    CHECK(!begun || !now || strcmp(begun, now) == 0, CORE_ERR_INTERNAL,
          "%s: frozen parameters of '%s' had the hash %s when the run began, and have %s", path,
          cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "name")), begun, now);
  }
  return CORE_OK;
}

/* At the end the model is saved: what cannot be written is not worth an error. */
static core_status put_file(train_manifest_moment moment, const char *path, const char *json) {
  core_status status = core_file_replace(path, json, strlen(json));
  if (status != CORE_OK && moment == TRAIN_MANIFEST_END) {
    LOG_WARNING("the manifest is as it was when the run began: %s", core_error_get()->message);
    core_error_clear();
    return CORE_OK;
  }
  TRY(status);
  return CORE_OK;
}

static core_status write_file(const train_run_state *r, train_manifest_moment moment, const table *groups,
                              const table *fresh, const memory *each, int32_t ranks) {
  char path[TRAIN_RUN_PATH + 32];
  snprintf(path, sizeof path, "%s/manifest.json", r->directory);
  bool goes_on = r->resumed || moment == TRAIN_MANIFEST_END;
  cJSON *object = cJSON_CreateObject(), *old = goes_on ? read_file(path) : NULL;
  cJSON *begun = cJSON_DetachItemFromObjectCaseSensitive(old, "began");
  if (r->stage) cJSON_AddStringToObject(object, "stage", r->stage);
  cJSON_AddItemToObject(object, "began",
                        begun     ? begun
                        : goes_on ? cJSON_CreateNull()
                                  : describe_begun(&r->begun, fresh));
  put_groups(object, groups, old);
  put_memory(object, each, ranks);
  char *json = cJSON_Print(object);
  core_status status = moment == TRAIN_MANIFEST_END ? check_frozen(object, path) : CORE_OK;
  cJSON_Delete(object);
  cJSON_Delete(old);
  if (status == CORE_OK && !json)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for the manifest");
  if (status == CORE_OK) status = put_file(moment, path, json);
  free(json);
  TRY(status);
  return CORE_OK;
}

static core_status report(const train_run_state *r, train_manifest_moment moment, char *all,
                          const memory *each, int32_t ranks) {
  table groups = {0}, fresh = {0};
  core_status status = read_lines(all, &groups, &fresh);
  if (status == CORE_OK) {
    if (moment == TRAIN_MANIFEST_BEGIN) print(&groups, &fresh, each, ranks);
    status = write_file(r, moment, &groups, &fresh, each, ranks);
  }
  free(groups.list);
  free(fresh.list);
  TRY(status);
  return CORE_OK;
}

core_status train_run_manifest_priv(const train_run_state *r, train_manifest_moment moment) {
  comm_group *control = r->env->control;
  char *lines = NULL, *all = NULL;
  int64_t *offset = NULL;
  int32_t ranks = comm_size(control);
  memory *each = calloc((size_t)ranks, sizeof *each), own = own_memory(r);
  int64_t *bytes = calloc((size_t)ranks, sizeof *bytes);
  for (int32_t i = 0; bytes && i < ranks; i++) bytes[i] = sizeof own;
  core_status status = write_lines(r, &lines);
  if (status == CORE_OK && !(each && bytes))
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for the manifest");
  status = comm_agree(control, status);
  if (status == CORE_OK) status = comm_all_gather(control, &own, bytes, each);
  if (status == CORE_OK) status = comm_gather_bytes(control, 0, lines, (int64_t)strlen(lines), &all, &offset);
  if (status == CORE_OK) status = comm_agree(control, all ? report(r, moment, all, each, ranks) : CORE_OK);
  free(each);
  free(bytes);
  free(lines);
  free(all);
  free(offset);
  TRY(status);
  return CORE_OK;
}
