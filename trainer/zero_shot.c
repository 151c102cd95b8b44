#include "trainer/zero_shot.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/stop.h"
#include "trainer/item_vectors.h"

static const int64_t top_at[TRAIN_TOPS] = {1, 5};
enum { BLOCK = 128 }; /* items classified at a time */

typedef struct classes {
  int64_t count;
  int32_t *label;     /* [count] ascending */
  int64_t *prompts;   /* [count] */
  double *sum;        /* [count, Z] of the prompts' vectors */
  core_tensor centre; /* [count, Z], device */
  core_tensor score;  /* [BLOCK, count], device */
  core_real *host;    /* [max(count, prompts), Z] and [BLOCK, count], where the host reads or writes */
  core_real *host_score;
} classes;

static int by_value(const void *left, const void *right) {
  int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
  return (a > b) - (a < b);
}

/* Place of a label among the classes, -1 if it is none. */
static int64_t class_of(const classes *c, int32_t label) {
  const int32_t *found = bsearch(&label, c->label, (size_t)c->count, sizeof label, by_value);
  return found ? found - c->label : -1;
}

static core_status on_device(const core_device *device, int64_t rows, int64_t columns, core_tensor *out) {
  *out = core_tensor_2(NULL, CORE_REAL_DTYPE, rows, columns);
  TRY(device->allocate(core_tensor_bytes(out), &out->data));
  return CORE_OK;
}

static core_status find_labels(const train_part *part, const train_item_vectors *prompts, classes *c) {
  int64_t n = prompts->samples;
  c->label = calloc((size_t)n, sizeof *c->label);
  CHECK(c->label, CORE_ERR_MEMORY, "no memory for the labels of %lld prompts", (long long)n);
  for (int64_t i = 0; i < n; i++) {
    CHECK(prompts->label[i] >= 0, CORE_ERR_FORMAT,
          "sample %" PRIu64 " of %s/%s has no label; the label of a prompt names its class", prompts->id[i],
          part->path, part->split);
    c->label[i] = prompts->label[i];
  }
  qsort(c->label, (size_t)n, sizeof *c->label, by_value);
  for (int64_t i = 0; i < n; i++)
    if (i == 0 || c->label[i] != c->label[i - 1]) c->label[c->count++] = c->label[i];
  return CORE_OK;
}

static core_status plan_classes(const train_env *env, int64_t prompts, int64_t Z, classes *c) {
  size_t rows = (size_t)(prompts > c->count ? prompts : c->count);
  c->sum = calloc((size_t)(c->count * Z), sizeof *c->sum);
  c->prompts = calloc((size_t)c->count, sizeof *c->prompts);
  c->host = calloc(rows * (size_t)Z, sizeof *c->host);
  c->host_score = calloc((size_t)c->count * BLOCK, sizeof *c->host_score);
  CHECK(c->sum && c->prompts && c->host && c->host_score, CORE_ERR_MEMORY, "no memory for %lld classes",
        (long long)c->count);
  TRY(on_device(env->ops->device, c->count, Z, &c->centre));
  TRY(on_device(env->ops->device, BLOCK, c->count, &c->score));
  return CORE_OK;
}

/* The mean's direction is the sum's. */
static void normalise(classes *c, int64_t Z) {
  for (int64_t i = 0; i < c->count; i++) {
    double square = 0;
    for (int64_t z = 0; z < Z; z++) square += c->sum[i * Z + z] * c->sum[i * Z + z];
    double norm = fmax(sqrt(square), 1e-12);
    for (int64_t z = 0; z < Z; z++) c->host[i * Z + z] = (core_real)(c->sum[i * Z + z] / norm);
  }
}

static core_status make_classes(const train_session *session, const train_item_vectors *prompts, classes *c) {
  const train_part *part = &session->part[1];
  const core_device *device = session->env.ops->device;
  int64_t Z = session->model->Z;
  TRY(find_labels(part, prompts, c));
  TRY(plan_classes(&session->env, prompts->samples, Z, c));
  TRY(device->copy(c->host, prompts->z.data, core_tensor_bytes(&prompts->z), NULL));
  for (int64_t i = 0; i < prompts->samples; i++) {
    if (!prompts->present[i]) continue;
    int64_t its = class_of(c, prompts->label[i]);
    c->prompts[its]++;
    for (int64_t z = 0; z < Z; z++) c->sum[its * Z + z] += (double)c->host[i * Z + z];
  }
  for (int64_t i = 0; i < c->count; i++)
    CHECK(c->prompts[i] > 0, CORE_ERR_FORMAT, "class %d of %s/%s has no prompt: all its samples are empty",
          c->label[i], part->path, part->split);
  normalise(c, Z);
  TRY(device->copy(c->centre.data, c->host, core_tensor_bytes(&c->centre), NULL));
  return CORE_OK;
}

static void free_classes(const core_device *device, classes *c) {
  device->release(c->centre.data);
  device->release(c->score.data);
  free(c->label);
  free(c->prompts);
  free(c->sum);
  free(c->host);
  free(c->host_score);
}

/* ---- items ---- */

static core_status check_items(const train_session *session, const train_item_vectors *items,
                               const classes *c, train_zero_shot *out) {
  const train_part *part = &session->part[0], *prompts = &session->part[1];
  for (int64_t i = 0; i < items->samples; i++) {
    int32_t label = items->label[i];
    CHECK(label < 0 || class_of(c, label) >= 0, CORE_ERR_MISMATCH,
          "sample %" PRIu64 " of %s/%s is of class %d, for which %s/%s has no prompt", items->id[i],
          part->path, part->split, label, prompts->path, prompts->split);
    out->unlabelled += label < 0;
    out->absent += label >= 0 && !items->present[i];
  }
  out->items = items->samples - out->unlabelled - out->absent;
  CHECK(out->unlabelled < items->samples, CORE_ERR_FORMAT,
        "no sample of %s/%s has a label; the label tells the class of an item", part->path, part->split);
  return CORE_OK;
}

static void judge(const classes *c, int64_t own, const core_real *score, train_zero_shot *out) {
  int64_t above = 0;
  for (int64_t i = 0; i < c->count; i++) above += i != own && !(score[i] < score[own]);
  for (int k = 0; k < TRAIN_TOPS; k++) out->hits[k] += above < top_at[k];
}

/* This rank's share of the items. Local. */
static core_status classify(train_session *session, const train_item_vectors *items, const classes *c,
                            train_zero_shot *out) {
  train_env *env = &session->env;
  int64_t first = items->samples * env->layout.rank / env->layout.ranks;
  int64_t last = items->samples * (env->layout.rank + 1) / env->layout.ranks;
  for (int64_t lo = first; lo < last; lo += BLOCK) {
    CHECK(!core_stop_requested(), CORE_ERR_STOPPED, "stopped during evaluation");
    int64_t n = last - lo < BLOCK ? last - lo : BLOCK;
    core_tensor score = train_rows(c->score, n);
    KERN(env, gemm, KERN_NT, train_slice(items->z, lo, n), c->centre, KERN_SET, score);
    TRY(env->ops->device->copy(c->host_score, score.data, core_tensor_bytes(&score), NULL));
    for (int64_t i = lo; i < lo + n; i++)
      if (items->label[i] >= 0 && items->present[i])
        judge(c, class_of(c, items->label[i]), c->host_score + (i - lo) * c->count, out);
  }
  return CORE_OK;
}

/* The direction that asks the prompts; -1 of a tower. */
static core_status find_direction(const train_session *session, int32_t *out) {
  const train_settings *s = session->env.settings;
  int32_t pair[2], from = session->part[0].modality, toward = session->part[1].modality;
  *out = -1;
  if (s->model.kind == TRAIN_KIND_TOWER) return CORE_OK;
  for (unsigned d = 0; d < s->objective.directions_count; d++)
    if (train_settings_direction(s, d, pair) && pair[0] == from && pair[1] == toward) *out = (int32_t)d;
  CHECK(*out >= 0, CORE_ERR_MISMATCH, "the connector has no direction %s:%s", s->data.modalities[from].name,
        s->data.modalities[toward].name);
  return CORE_OK;
}

static core_status run(train_session *session, train_item_vectors vectors[2], classes *c,
                       train_zero_shot *out) {
  comm_group *control = session->env.control;
  int32_t direction;
  TRY(comm_agree(control, find_direction(session, &direction)));
  TRY(train_item_vectors_make(session, &session->part[1], direction, &vectors[1]));
  TRY(comm_agree(control, make_classes(session, &vectors[1], c)));
  TRY(train_item_vectors_make(session, &session->part[0], direction, &vectors[0]));
  TRY(comm_agree(control, check_items(session, &vectors[0], c, out)));
  TRY(comm_agree(control, classify(session, &vectors[0], c, out)));
  TRY(comm_all_reduce(session->env.world, COMM_SUM, CORE_INT64, out->hits, TRAIN_TOPS));
  out->prompts = vectors[1].samples;
  out->classes = c->count;
  return CORE_OK;
}

core_status train_zero_shot_run(train_session *session, train_zero_shot *out) {
  train_item_vectors vectors[2] = {{0}, {0}};
  classes c = {0};
  double start = core_clock_now();
  memset(out, 0, sizeof *out);
  core_status status =
      comm_agree(session->env.control, train_moe_sums_clear(&session->env, &session->model->sums));
  if (status == CORE_OK) status = run(session, vectors, &c, out);
  out->seconds = core_clock_now() - start;
  free_classes(session->env.ops->device, &c);
  for (int i = 0; i < 2; i++) train_item_vectors_free(&vectors[i]);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- saying ---- */

double train_zero_shot_share(int64_t hits, int64_t n, double interval[2]) {
  const double z = 1.959963984540054; /* 97.5 % of the normal distribution lie below */
  interval[0] = 0;
  interval[1] = 1;
  if (n <= 0) return 0;
  double N = (double)n, p = (double)hits / N, centre = (p + z * z / (2 * N)) / (1 + z * z / N);
  double half = z / (1 + z * z / N) * sqrt(p * (1 - p) / N + z * z / (4 * N * N));
  interval[0] = fmax(centre - half, 0);
  interval[1] = fmin(centre + half, 1);
  return p;
}

static double chance(const train_zero_shot *result, int k) {
  return top_at[k] < result->classes ? (double)top_at[k] / (double)result->classes : 1;
}

void train_zero_shot_print(const train_zero_shot *result, const char *const names[2], FILE *out) {
  fprintf(out, "%s by %lld prompts of %s for %lld classes: %lld items", names[0], (long long)result->prompts,
          names[1], (long long)result->classes, (long long)result->items);
  if (result->unlabelled > 0) fprintf(out, ", %lld without a label left out", (long long)result->unlabelled);
  if (result->absent > 0) fprintf(out, ", %lld without %s left out", (long long)result->absent, names[0]);
  fprintf(out, "\n%-8s %9s %20s %9s\n", "", "accuracy", "95 % interval", "chance");
  for (int k = 0; k < TRAIN_TOPS; k++) {
    double interval[2], share = train_zero_shot_share(result->hits[k], result->items, interval);
    fprintf(out, "top-%-4lld %8.2f%% %9.2f%% - %6.2f%% %8.2f%%\n", (long long)top_at[k], 100 * share,
            100 * interval[0], 100 * interval[1], 100 * chance(result, k));
  }
}

void train_zero_shot_json(const train_zero_shot *result, const char *const names[2], FILE *out) {
  fprintf(out,
          "\"modality\":\"%s\",\"prompts\":{\"modality\":\"%s\",\"count\":%" PRId64 "},\"classes\":%" PRId64
          ",\"items\":%" PRId64 ",\"unlabelled\":%" PRId64 ",\"absent\":%" PRId64,
          names[0], names[1], result->prompts, result->classes, result->items, result->unlabelled,
          result->absent);
  for (int k = 0; k < TRAIN_TOPS; k++) {
    double interval[2], share = train_zero_shot_share(result->hits[k], result->items, interval);
    fprintf(out,
            ",\"top%" PRId64 "\":{\"hits\":%" PRId64
            ",\"share\":%.9g,\"interval\":[%.9g,%.9g],\"chance\":%.9g}",
            top_at[k], result->hits[k], share, interval[0], interval[1], chance(result, k));
  }
}
