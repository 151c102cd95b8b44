/* The writer is a buffer and a few put_ functions: a JSON library would allocate in every step. */
#include "trainer/metrics.h"

#include <errno.h>
#include <fcntl.h> /* O_APPEND */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/health.h"

struct train_metrics {
  const train_model *model;
  char path[1024];
  int file;
  char *line;
  size_t used, capacity;
};

static void put(train_metrics *w, const char *format, ...) CORE_PRINTF(2, 3);
static void put(train_metrics *w, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(w->line + w->used, w->capacity - w->used, format, arguments);
  va_end(arguments);
  w->used += (size_t)length;
  if (w->used >= w->capacity) w->used = w->capacity - 1;
}

/* JSON has no infinity and no NaN. */
static void put_number(train_metrics *w, const char *name, double value) {
  if (isfinite(value))
    put(w, "\"%s\":%.9g,", name, value);
  else
    put(w, "\"%s\":null,", name);
}

/* Replaces the last comma. */
static void close_with(train_metrics *w, char bracket) {
  if (w->used > 0 && w->line[w->used - 1] == ',') w->used--;
  put(w, "%c,", bracket);
}

/* A line is there whole or not at all: what a full disk took of it is cut off again. */
static core_status finish_line(train_metrics *w) {
  close_with(w, '}');
  w->line[w->used - 1] = '\n';
  off_t before = lseek(w->file, 0, SEEK_END);
  core_status status = core_file_write(w->file, w->path, w->line, w->used);
  if (status == CORE_OK) return CORE_OK;
  if (before >= 0 && ftruncate(w->file, before) != 0) LOG_WARNING("%s ends with a torn line", w->path);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

/* The longest line that there can be. */
static core_status plan_line(train_metrics *w) {
  const train_moe_sums *sums = &w->model->sums;
  size_t modality = 640 + (size_t)sums->choices * 16 + (size_t)sums->experts * 48;
  w->capacity =
      65536 + (size_t)sums->layers * (384 + (size_t)sums->experts * 24 + (size_t)sums->modalities * modality);
  w->line = malloc(w->capacity);
  CHECK(w->line, CORE_ERR_MEMORY, "no memory for lines of %zu bytes", w->capacity);
  return CORE_OK;
}

static const char *modality_name(const train_metrics *w, int32_t m) {
  return train_settings_class(w->model->env->settings, m);
}

/* ---- a step ---- */

/* Of a connector: what was trained, and the regression of each direction. */
static void put_directions(train_metrics *w, const train_report *r) {
  const train_alignment *a = &w->model->alignment;
  if (a->directions == 0) return;
  put(w, "\"direction\":%d,\"regression\":{", r->direction);
  for (int32_t d = 0; d < a->directions; d++) {
    char name[2 * CORE_NAME];
    snprintf(name, sizeof name, "%s:%s", modality_name(w, a->direction[d].from),
             modality_name(w, a->direction[d].toward));
    put_number(w, name, r->regression[d]);
  }
  close_with(w, '}');
}

static void put_losses(train_metrics *w, const train_report *r, const train_contrastive *c) {
  put_number(w, "loss", r->loss);
  if (w->model->env->settings->model.kind == TRAIN_KIND_DECODER) {
    put_number(w, "next_token", r->next_token);
    put(w, "\"predictions\":%" PRId64 ",", r->predictions);
  }
  put_number(w, "contrastive", r->contrastive);
  put(w, "\"pairs\":{");
  for (int32_t p = 0; p < c->pairs; p++) {
    char name[2 * CORE_NAME];
    snprintf(name, sizeof name, "%s:%s", modality_name(w, c->first[p]), modality_name(w, c->second[p]));
    put_number(w, name, r->pair[p]);
  }
  close_with(w, '}');
  put_directions(w, r);
  put(w, "\"router\":{");
  put_number(w, "importance", r->router.importance);
  put_number(w, "load", r->router.load);
  put_number(w, "z", r->router.z);
  put_number(w, "local", r->router.local);
  put_number(w, "global", r->router.global);
  put_number(w, "balance", r->router.balance);
  close_with(w, '}');
  put_number(w, "scale", r->scale);
  put_number(w, "rate", r->rate);
  put_number(w, "gradient_norm", r->norm);
  put_number(w, "clip", r->clip);
  put(w, "\"skipped\":%s,", r->skipped ? "true" : "false");
}

static void put_speed(train_metrics *w, const train_report *r) {
  int32_t M = train_settings_classes(w->model->env->settings);
  put(w, "\"tokens\":{");
  for (int32_t m = 0; m < M; m++) put(w, "\"%s\":%" PRId64 ",", modality_name(w, m), r->tokens[m]);
  close_with(w, '}');
  put(w, "\"items\":{");
  for (int32_t m = 0; m < M; m++) put(w, "\"%s\":%" PRId64 ",", modality_name(w, m), r->items[m]);
  close_with(w, '}');
  put(w, "\"tokens_per_second\":{");
  for (int32_t m = 0; m < M; m++) put_number(w, modality_name(w, m), (double)r->tokens[m] / r->wall);
  close_with(w, '}');
  put(w, "\"seconds\":{");
  put_number(w, "step", r->wall);
  for (int i = 0; i < TRAIN_PHASE_COUNT; i++) put_number(w, train_phase_name((train_phase)i), r->seconds[i]);
  close_with(w, '}');
}

static void put_counts(train_metrics *w, const char *name, const int64_t *count, int64_t n) {
  put(w, "\"%s\":[", name);
  for (int64_t i = 0; i < n; i++) put(w, "%" PRId64 ",", count[i]);
  close_with(w, ']');
}

static void put_numbers(train_metrics *w, const char *name, const double *value, int64_t n) {
  put(w, "\"%s\":[", name);
  for (int64_t i = 0; i < n; i++) isfinite(value[i]) ? put(w, "%.6g,", value[i]) : put(w, "null,");
  close_with(w, ']');
}

static void put_health(train_metrics *w, const train_moe_sums *sums, int32_t layer, int32_t m) {
  const int64_t *count = train_moe_counts(sums, layer, m);
  train_health h = train_health_of(sums, layer, m);
  put(w, "\"%s\":{", modality_name(w, m));
  put_number(w, "success", h.success);
  put_number(w, "dropped", h.dropped);
  put_number(w, "kept_choices", h.kept_choices);
  put_number(w, "entropy", h.entropy);
  put_number(w, "entropy_of_mean", h.entropy_of_mean);
  put_number(w, "effective_experts", h.effective_experts);
  put_number(w, "entropy_of_choices", h.entropy_of_choices);
  put_numbers(w, "gate", h.gate, sums->choices);
  int64_t E = train_moe_layer_experts(sums, layer);
  put_counts(w, "before", count, E);
  put_counts(w, "after", count + E, E);
  close_with(w, '}');
}

static void put_layer(train_metrics *w, const train_moe_sums *sums, int32_t layer) {
  int64_t E = train_moe_layer_experts(sums, layer), load[CORE_MAX_EXPERTS] = {0};
  train_layer_health h = train_health_of_layer(sums, layer);
  for (int32_t m = 0; m < sums->modalities; m++)
    for (int64_t e = 0; e < E; e++) load[e] += train_moe_counts(sums, layer, m)[E + e];
  put(w, "{");
  put_counts(w, "load", load, E);
  put_number(w, "max_over_mean", h.max_over_mean);
  put_number(w, "importance_cv2", h.importance);
  put_number(w, "load_cv2", h.load);
  put(w, "\"dead\":%" PRId64 ",\"modalities\":{", h.dead);
  for (int32_t m = 0; m < sums->modalities; m++) put_health(w, sums, layer, m);
  close_with(w, '}');
  close_with(w, '}');
}

static void put_layers(train_metrics *w) {
  const train_moe_sums *sums = &w->model->sums;
  put(w, "\"layers\":[");
  for (int32_t layer = 0; layer < sums->layers; layer++) put_layer(w, sums, layer);
  close_with(w, ']');
}

core_status train_metrics_step(train_metrics *w, const train_report *report,
                               const train_contrastive *contrastive, const data_position *position) {
  w->used = 0;
  put(w, "{\"step\":%" PRId64 ",\"epoch\":%" PRId64 ",\"consumed\":%" PRId64 ",", report->step,
      position->epoch, position->consumed);
  put_losses(w, report, contrastive);
  put_speed(w, report);
  put_layers(w);
  TRY(finish_line(w));
  return CORE_OK;
}

/* ---- an evaluation ---- */

static void put_retrieval(train_metrics *w, const train_retrieval *result, int32_t a, int32_t b) {
  static const char *const names[TRAIN_RECALLS] = {"r1", "r5", "r10"};
  if (result->queries[a][b] == 0) return;
  put(w, "\"%s:%s\":{\"queries\":%" PRId64 ",", modality_name(w, a), modality_name(w, b),
      result->queries[a][b]);
  for (int32_t k = 0; k < TRAIN_RECALLS; k++)
    put_number(w, names[k], train_retrieval_recall(result, a, b, k));
  put_number(w, "chance_r1", result->chance[a][b][0]);
  close_with(w, '}');
}

static void put_evaluation(train_metrics *w, int64_t step, const train_retrieval *result) {
  w->used = 0;
  put(w, "{\"step\":%" PRId64 ",\"evaluation\":{\"samples\":%" PRId64 ",", step, result->samples);
  put_number(w, "mean_r1", train_retrieval_mean(result));
  put_number(w, "seconds", result->seconds);
  put(w, "\"retrieval\":{");
  for (int32_t a = 0; a < w->model->env->layout.modalities; a++)
    for (int32_t b = 0; b < w->model->env->layout.modalities; b++) put_retrieval(w, result, a, b);
  close_with(w, '}');
  put_layers(w);
  close_with(w, '}');
}

core_status train_metrics_evaluation(train_metrics *w, int64_t step, const train_retrieval *result) {
  put_evaluation(w, step, result);
  TRY(finish_line(w));
  return CORE_OK;
}

core_status train_metrics_print(const train_model *model, int64_t step, const train_retrieval *result,
                                FILE *out) {
  train_metrics w = {.model = model, .file = -1};
  TRY(plan_line(&w));
  put_evaluation(&w, step, result);
  close_with(&w, '}');
  w.line[w.used - 1] = '\n';
  bool good = fwrite(w.line, 1, w.used, out) == w.used;
  free(w.line);
  CHECK(good, CORE_ERR_IO, "cannot write the evaluation: %s", strerror(errno));
  return CORE_OK;
}

core_status train_metrics_caption(train_metrics *w, int64_t step, const train_caption *result) {
  w->used = 0;
  put(w, "{\"step\":%" PRId64 ",\"evaluation\":{\"samples\":%" PRId64 ",\"predictions\":%" PRId64 ",", step,
      result->samples, result->predictions);
  put_number(w, "next_token", result->loss);
  put_number(w, "seconds", result->seconds);
  put_layers(w);
  close_with(w, '}');
  TRY(finish_line(w));
  return CORE_OK;
}

/* ---- opening ---- */

/* A line of a later step, or an evaluation of this one, which will be made again. */
static bool is_later(const char *line, const char *end, int64_t step) {
  char *after = NULL;
  if (strncmp(line, "{\"step\":", 8) != 0) return true;
  int64_t its = strtoll(line + 8, &after, 10);
  bool evaluation = after + 14 < end && strncmp(after, ",\"evaluation\":", 14) == 0;
  return its > step || (evaluation && its >= step);
}

/* Where the first line begins that does not stay; lines are in the order of their steps, so none stays behind
 * it. A torn last line does not stay either. */
static int64_t kept_bytes(FILE *file, int64_t step) {
  char *line = NULL;
  size_t capacity = 0;
  int64_t kept = 0;
  for (ssize_t length; (length = getline(&line, &capacity, file)) > 0; kept += length)
    if (line[length - 1] != '\n' || is_later(line, line + length, step)) break;
  free(line);
  return kept;
}

static core_status cut_after(const char *path, int64_t step) {
  FILE *file = fopen(path, "re");
  if (!file && errno == ENOENT) return CORE_OK;
  CHECK(file, CORE_ERR_IO, "cannot open %s: %s", path, strerror(errno));
  int64_t kept = kept_bytes(file, step);
  fclose(file);
  CHECK(truncate(path, kept) == 0, CORE_ERR_IO, "cannot cut %s at %lld bytes: %s", path, (long long)kept,
        strerror(errno));
  return CORE_OK;
}

core_status train_metrics_open(const char *directory, int64_t step, const train_model *model,
                               train_metrics **out) {
  train_metrics *w = calloc(1, sizeof *w);
  CHECK(w, CORE_ERR_MEMORY, "no memory for metrics");
  w->model = model;
  w->file = -1;
  snprintf(w->path, sizeof w->path, "%s/metrics.jsonl", directory);
  core_status status = plan_line(w);
  if (status == CORE_OK) status = cut_after(w->path, step);
  if (status == CORE_OK) status = core_file_open(w->path, O_WRONLY | O_APPEND | O_CREAT, &w->file);
  if (status != CORE_OK) {
    train_metrics_close(w);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = w;
  return CORE_OK;
}

void train_metrics_close(train_metrics *w) {
  if (!w) return;
  if (w->file >= 0) close(w->file);
  free(w->line);
  free(w);
}
