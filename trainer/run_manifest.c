/* Outline: every rank tells of the parameters that it is the first to hold, in lines "kind name trained
 * frozen"; rank 0 adds them up by group and writes. */
#include <cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/run_impl.h"

enum { LARGEST_MANIFEST = 1 << 24, SHOWN = 8 };

typedef struct row {
  char name[CORE_NAME];
  int64_t trained, frozen;
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

static core_status add_row(table *t, const char *name, int64_t trained, int64_t frozen) {
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
  t->list[i].trained += trained;
  t->list[i].frozen += frozen;
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
    TRY(add_row(t, group, p->frozen ? 0 : p->count, p->frozen ? p->count : 0));
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

/* "group NAME TRAINED FROZEN" and "new NAME" lines; malloc'ed. */
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
    used += (size_t)snprintf(text + used, capacity - used, "group %s %" PRId64 " %" PRId64 "\n",
                             t.list[i].name, t.list[i].trained, t.list[i].frozen);
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
    int64_t trained = 0, frozen = 0;
    if (sscanf(line, "group %95s %" SCNd64 " %" SCNd64, name, &trained, &frozen) == 3)
      TRY(add_row(groups, name, trained, frozen));
    else if (sscanf(line, "new %95s", name) == 1)
      TRY(add_row(fresh, name, 0, 0));
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

/* Numbers of parameters are far below 2^53. */
static void put_groups(cJSON *object, const table *groups) {
  cJSON *list = cJSON_AddArrayToObject(object, "groups");
  int64_t trained = 0, frozen = 0;
  for (int32_t i = 0; i < groups->count; i++) {
    cJSON *item = cJSON_CreateObject();
    cJSON_AddStringToObject(item, "name", groups->list[i].name);
    cJSON_AddNumberToObject(item, "trained", (double)groups->list[i].trained);
    cJSON_AddNumberToObject(item, "frozen", (double)groups->list[i].frozen);
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
  char content[24];
  if (!begun->path[0]) return cJSON_CreateNull();
  cJSON *object = cJSON_CreateObject();
  snprintf(content, sizeof content, "%016" PRIx64, begun->content);
  cJSON_AddStringToObject(object, "from", begun->path);
  cJSON_AddNumberToObject(object, "step", (double)begun->step);
  cJSON_AddStringToObject(object, "content", content);
  cJSON *list = cJSON_AddArrayToObject(object, "new");
  for (int32_t i = 0; i < fresh->count; i++)
    cJSON_AddItemToArray(list, cJSON_CreateString(fresh->list[i].name));
  return object;
}

/* What stood there when the run began; nothing where that cannot be read: it is no reason to end. */
static cJSON *read_begun(const char *path) {
  char *text = NULL;
  int64_t count = 0;
  if (!core_file_exists(path) || core_file_read_all(path, LARGEST_MANIFEST, &text, &count) != CORE_OK) {
    core_error_clear();
    return cJSON_CreateNull();
  }
  cJSON *object = cJSON_Parse(text);
  cJSON *begun = cJSON_DetachItemFromObjectCaseSensitive(object, "began");
  cJSON_Delete(object);
  free(text);
  return begun ? begun : cJSON_CreateNull();
}

static core_status write_file(const train_run_state *r, const table *groups, const table *fresh,
                              const memory *each, int32_t ranks) {
  char path[TRAIN_RUN_PATH + 32];
  snprintf(path, sizeof path, "%s/manifest.json", r->directory);
  cJSON *object = cJSON_CreateObject();
  if (r->stage) cJSON_AddStringToObject(object, "stage", r->stage);
  cJSON_AddItemToObject(object, "began", r->resumed ? read_begun(path) : describe_begun(&r->begun, fresh));
  put_groups(object, groups);
  put_memory(object, each, ranks);
  char *json = cJSON_Print(object);
  cJSON_Delete(object);
  CHECK(json, CORE_ERR_MEMORY, "no memory for the manifest");
  core_status status = core_file_replace(path, json, strlen(json));
  free(json);
  TRY(status);
  return CORE_OK;
}

static core_status report(const train_run_state *r, char *all, const memory *each, int32_t ranks) {
  table groups = {0}, fresh = {0};
  core_status status = read_lines(all, &groups, &fresh);
  if (status == CORE_OK) {
    print(&groups, &fresh, each, ranks);
    status = write_file(r, &groups, &fresh, each, ranks);
  }
  free(groups.list);
  free(fresh.list);
  TRY(status);
  return CORE_OK;
}

core_status train_run_manifest_priv(const train_run_state *r) {
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
  if (status == CORE_OK) status = comm_agree(control, all ? report(r, all, each, ranks) : CORE_OK);
  free(each);
  free(bytes);
  free(lines);
  free(all);
  free(offset);
  TRY(status);
  return CORE_OK;
}
