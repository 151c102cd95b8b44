/* Outline: the checkpoint's configuration with what says where it runs; a session of it; an evaluation, while
 * each layer's logits are looked at; the sums taken over. */
#include "trainer/measure.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/data.h"
#include "trainer/caption.h"
#include "trainer/health.h"
#include "trainer/retrieval.h"
#include "trainer/source.h"

enum { WORD = 1200, OWN = 14, USED = CORE_MAX_MODALITIES * (CORE_NAME + 4) };

/* ---- configuration ---- */

/* 'a''b': as YAML has it. */
static void put_text(const char *key, const char *value, char out[WORD]) {
  size_t used = (size_t)snprintf(out, WORD, "%s='", key);
  for (; *value && used + 4 < WORD; value++) {
    out[used++] = *value;
    if (*value == '\'') out[used++] = '\'';
  }
  snprintf(out + used, WORD - used, "'");
}

/* The modalities of the model that the split holds. */
static core_status put_used(const train_settings *run, const core_config *stored, const char *split,
                            char out[WORD]) {
  const train_settings *s = core_config_data(stored);
  char names[CORE_MAX_MODALITIES][CORE_NAME], list[USED] = "";
  int32_t count = 0;
  size_t used = 0;
  TRY(data_list_modalities(run->data.path, split, names, &count));
  for (unsigned m = 0; m < s->data.modalities_count; m++)
    for (int32_t i = 0; i < count; i++)
      if (strcmp(names[i], s->data.modalities[m].name) == 0)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", names[i]);
  CHECK(used > 0, CORE_ERR_NOT_FOUND, "%s/%s holds no modality of the model", run->data.path, split);
  CHECK(used + 16 < WORD, CORE_ERR_CONFIG, "the names of the modalities are too long");
  snprintf(out, WORD, "data.use=[%s]", list);
  return CORE_OK;
}

/* As `antiphon eval` runs a checkpoint, on the layout of the run. */
static int32_t put_place(const train_measure_options *o, const train_settings *run, char word[OWN][WORD]) {
  int32_t n = 0, ranks = comm_size(comm_world_group(o->comm));
  put_text("data.path", run->data.path, word[n++]);
  put_text("data.validation", o->split, word[n++]);
  put_text("run.device", run->run.device, word[n++]);
  snprintf(word[n++], WORD, "run.threads=%lld", (long long)run->run.threads);
  snprintf(word[n++], WORD, "evaluate.batch=%lld", (long long)run->evaluate.batch);
  snprintf(word[n++], WORD, "parallel.experts=%lld", (long long)run->parallel.experts);
  snprintf(word[n++], WORD, "optimizer.batch=%d", ranks);
  snprintf(word[n++], WORD, "optimizer.accumulate=1");
  snprintf(word[n++], WORD, "parallel.placement=shared");
  snprintf(word[n++], WORD, "model.moe.dispatch=dropless");
  snprintf(word[n++], WORD, "evaluate.capacity='none'");
  snprintf(word[n++], WORD, "objective.balance=0");
  snprintf(word[n++], WORD, "objective.pairs=[]"); /* one may be of a modality that the split lacks */
  return n;
}

static core_status load_config(const train_measure_options *o, const char *text, core_config **out) {
  const train_settings *run = core_config_data(o->run);
  char(*word)[WORD] = calloc(OWN, sizeof *word);
  const char **list = calloc(OWN + (size_t)o->model_count, sizeof *list);
  core_config *stored = NULL;
  core_status status = word && list ? CORE_OK
                                    : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                                       "no memory for a configuration");
  if (status == CORE_OK)
    status =
        core_config_load(train_settings_spec(), "the checkpoint's configuration", text, NULL, 0, &stored);
  if (status == CORE_OK) {
    int32_t n = put_place(o, run, word);
    status = put_used(run, stored, o->split, word[n++]);
    for (int32_t i = 0; i < n; i++) list[i] = word[i];
    for (int32_t i = 0; i < o->model_count; i++) list[n++] = o->model[i];
    if (status == CORE_OK)
      status = core_config_load(train_settings_spec(), "the checkpoint's configuration", text, list, n, out);
  }
  core_config_destroy(stored);
  free(word);
  free(list);
  TRY(status);
  return CORE_OK;
}

/* ---- what each layer's logits say ---- */

typedef struct observer {
  train_measurement *out;
  void *host; /* core_real [T][most]; grown as it is needed */
  size_t bytes;
} observer;

static core_status take_room(observer *o, size_t bytes) {
  if (bytes <= o->bytes) return CORE_OK;
  void *grown = realloc(o->host, bytes);
  CHECK(grown, CORE_ERR_MEMORY, "no memory for %zu bytes of logits", bytes);
  o->host = grown;
  o->bytes = bytes;
  return CORE_OK;
}

/* The K-th largest of E logits. */
static double kth_largest(const core_real *logits, int64_t E, int64_t K) {
  double best[CORE_MAX_CHOICES];
  int64_t n = 0;
  for (int64_t e = 0; e < E; e++) {
    double value = (double)logits[e];
    int64_t at = n < K ? n++ : K;
    for (; at > 0 && best[at - 1] < value; at--)
      if (at < K) best[at] = best[at - 1];
    if (at < K) best[at] = value;
  }
  return best[K - 1];
}

static core_status observe(void *context, train_model *model, const train_moe *moe, int64_t T) {
  observer *o = context;
  core_tensor logits = train_rows(moe->logits, T);
  int64_t E = moe->experts;
  size_t bytes = core_tensor_bytes(&logits);
  double *gap = o->out->gap + moe->index * o->out->most;
  if (T == 0) return CORE_OK;
  TRY(take_room(o, bytes));
  TRY(model->env->ops->device->copy(o->host, logits.data, bytes, NULL));
  TRY(model->env->ops->device->stream_wait(NULL));
  for (int64_t t = 0; t < T; t++) {
    const core_real *row = (const core_real *)o->host + t * E;
    double least = kth_largest(row, E, o->out->choose);
    for (int64_t e = 0; e < E; e++) gap[e] = fmin(gap[e], least - (double)row[e]);
  }
  return CORE_OK;
}

/* ---- taking over ---- */

static core_status take_shape(const train_session *session, train_measurement *out) {
  const train_settings *s = session->env.settings;
  const train_moe_sums *sums = &session->model->sums;
  int64_t L = out->layers = sums->layers, C = out->classes = train_settings_classes(s);
  int64_t E = out->most = train_settings_most_experts(s), at = 0;
  out->choose = s->model.moe.choose;
  out->decoder = s->model.kind == TRAIN_KIND_DECODER;
  for (int32_t c = 0; c < C; c++) snprintf(out->class[c], CORE_NAME, "%s", train_settings_class(s, c));
  out->experts = calloc((size_t)L + 1, sizeof *out->experts);
  out->added = calloc((size_t)L + 1, sizeof *out->added);
  out->block = calloc((size_t)L + 1, sizeof *out->block);
  out->tokens = calloc((size_t)(L * C) + 1, sizeof *out->tokens);
  out->count = calloc((size_t)(L * C * E) + 1, sizeof *out->count);
  out->gap = calloc((size_t)(L * E) + 1, sizeof *out->gap);
  CHECK(out->experts && out->added && out->block && out->tokens && out->count && out->gap, CORE_ERR_MEMORY,
        "no memory for the counts of %lld layers", (long long)L);
  for (int64_t i = 0; i < L * E; i++) out->gap[i] = INFINITY;
  for (int64_t l = 0; l < s->model.layers && at < L; l++)
    if (train_settings_moe_layer(s->model.moe.layers, s->model.layers, l)) out->block[at++] = l;
  for (int64_t i = 0; i < L; i++) {
    out->experts[i] = train_settings_experts(s, i);
    out->added[i] = train_settings_added(s, i);
  }
  return CORE_OK;
}

static void take_counts(const train_session *session, train_measurement *out) {
  const train_moe_sums *sums = &session->model->sums;
  for (int32_t c = 0; c <= out->classes; c++)
    out->fresh[c] = train_health_new(sums, session->env.settings, c < out->classes ? c : -1);
  for (int32_t l = 0; l < out->layers; l++)
    for (int32_t c = 0; c < out->classes; c++) {
      const int64_t *count = train_moe_counts(sums, l, c);
      int64_t E = out->experts[l], at = (int64_t)l * out->classes + c;
      out->tokens[at] = count[2 * E + 1];
      for (int64_t e = 0; e < E; e++) out->count[at * out->most + e] = count[e];
    }
}

static core_status evaluate(train_session *session, train_measurement *out) {
  if (out->decoder) {
    train_caption result;
    TRY(train_caption_run(session, &result));
    out->quality = result.loss;
    out->samples = result.samples;
    return CORE_OK;
  }
  train_retrieval *result = calloc(1, sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = train_retrieval_run(session, result);
  if (session->env.layout.modalities > 1) out->quality = train_retrieval_mean(result);
  out->samples = result->samples;
  free(result);
  TRY(status);
  return CORE_OK;
}

/* ---- the session ---- */

static core_status measure(train_session *session, const train_measure_options *o, train_measurement *out) {
  observer watch = {.out = out};
  TRY(comm_agree(session->env.control, take_shape(session, out)));
  TRY(train_source_model(session->env.control, o->checkpoint, session->model));
  session->model->observe = (train_route_observer){observe, &watch};
  core_status status = evaluate(session, out);
  free(watch.host);
  TRY(status);
  take_counts(session, out);
  TRY(comm_all_reduce(session->env.control, COMM_MIN, CORE_FLOAT64, out->gap, out->layers * out->most));
  return CORE_OK;
}

/* out NULL: only whether there is room. */
static core_status open_and_measure(const train_measure_options *o, train_measurement *out) {
  comm_group *control = comm_control_group(o->comm);
  train_state_meta meta = {0};
  core_config *config = NULL;
  train_session *session = NULL;
  core_status status = train_state_meta_read(ckpt_reader_meta(o->checkpoint), &meta);
  if (status == CORE_OK) status = load_config(o, meta.config, &config);
  status = comm_agree(control, status);
  const train_session_options options = {
      .config = config, .comm = o->comm, .purpose = TRAIN_PURPOSE_EVALUATE, .evaluation_split = o->split};
  if (status == CORE_OK) status = train_session_open(&options, &session);
  if (status == CORE_OK) session->env.step = meta.step;
  if (status == CORE_OK && out) status = measure(session, o, out);
  train_session_close(session);
  core_config_destroy(config);
  free(meta.config);
  TRY(status);
  return CORE_OK;
}

core_status train_measure(const train_measure_options *options, train_measurement *out) {
  *out = (train_measurement){.layers = 0};
  core_status status = open_and_measure(options, out);
  if (status != CORE_OK && status != CORE_ERR_STOPPED)
    status = core_error_context(status, "%s on the split '%s'", ckpt_reader_path(options->checkpoint),
                                options->split);
  TRY(status);
  return CORE_OK;
}

core_status train_measure_room(const train_measure_options *options) {
  TRY(open_and_measure(options, NULL));
  return CORE_OK;
}

void train_measurement_free(train_measurement *m) {
  free(m->experts), free(m->added), free(m->block);
  free(m->tokens), free(m->count), free(m->gap);
  *m = (train_measurement){.layers = 0};
}

/* ---- figures ---- */

int64_t train_measurement_count(const train_measurement *m, int32_t layer, int32_t c, int64_t e) {
  int64_t sum = 0;
  for (int32_t i = 0; i < m->classes; i++)
    if (c < 0 || i == c) sum += m->count[((int64_t)layer * m->classes + i) * m->most + e];
  return sum;
}

int32_t train_measurement_class(const train_measurement *m, const char *name) {
  for (int32_t c = 0; c < m->classes; c++)
    if (strcmp(m->class[c], name) == 0) return c;
  return -1;
}
