/* The model is declared as for a run in one process, and its parameters are counted: what is printed is what
 * is trained, not a second formula. */
#include "trainer/arithmetic.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/model/tower.h"

/* A model on paper: declared, never planned. */
typedef struct draft {
  train_env env;
  train_model *model;
  const double *tokens;
  const int64_t *width; /* as given: 0 not known */
} draft;

static core_status draft_make(const train_settings *settings, const int64_t *width, draft *out) {
  int64_t assumed[CORE_MAX_MODALITIES];
  train_layout *layout = &out->env.layout;
  out->env.settings = settings;
  layout->ranks = layout->expert_ranks = layout->groups = 1;
  layout->modalities = (int32_t)settings->data.modalities_count;
  for (int32_t m = 0; m < layout->modalities; m++) {
    layout->slot_count[m] = 1;
    assumed[m] = width[m] > 0 ? width[m] : 1;
    CHECK(width[m] > 0 || settings->model.kind != TRAIN_KIND_CONNECTOR, CORE_ERR_ARGUMENT,
          "the width of '%s' is not known", settings->data.modalities[m].name);
  }
  TRY(train_model_create(&out->env, assumed, &out->model));
  return CORE_OK;
}

static bool begins(const char *name, const char *prefix) {
  return strncmp(name, prefix, strlen(prefix)) == 0;
}

static bool ends(const char *name, const char *suffix) {
  size_t length = strlen(name), tail = strlen(suffix);
  return length >= tail && strcmp(name + length - tail, suffix) == 0;
}

/* The connector of a modality whose width nobody knows. */
static bool is_unknown(const draft *d, const train_parameter *p) {
  return p->scope == TRAIN_SCOPE_MODALITY && d->width[p->modality] == 0 && begins(p->name, "connector.");
}

/* A matrix of a resampler that latents meet, not the rows that they become. */
static bool is_per_latent(const char *name) {
  return begins(name, "connector.") && ends(name, ".cross.kv.weight");
}

/* Rows of modality m in an item with the mean number of latents, and the FLOPs of attention inside the
 * connector that each of them costs. */
static double rows_of(const draft *d, int32_t m, double *attention) {
  const train_resampler *resampler = d->model->connector[m].resampler;
  *attention = resampler ? train_resampler_attention(resampler, d->tokens[m]) : 0;
  return resampler && d->tokens[m] > 0 ? (double)resampler->Q : d->tokens[m];
}

/* Adds parameter p, which the path meets. Of a layer's experts a token passes K, all of one size: the first K
 * stand for them. views: times that a token passes the blocks. */
static void meet(const draft *d, const train_parameter *p, int64_t views, train_path *path) {
  if (p->expert >= d->env.settings->model.moe.choose) return;
  path->parameters += p->count;
  if (p->rank != 2 || ends(p->name, ".position") || ends(p->name, ".query"))
    return; /* added or multiplied by element */
  if (is_per_latent(p->name)) {
    path->item += 2 * (double)p->count * d->tokens[p->modality];
    return;
  }
  bool connector = d->env.settings->model.kind == TRAIN_KIND_CONNECTOR;
  bool of_item =
      !connector ? begins(p->name, "head.") : !begins(p->name, "adapter.") && !begins(p->name, "blocks.");
  double flops = 2 * (double)p->count;
  if (of_item)
    path->item += flops;
  else
    path->token += begins(p->name, "blocks.") ? flops * (double)views : flops;
}

/* Tokens of modality m through a tower: the shared trunk or its own. */
static void follow_modality(draft *d, int32_t m, train_path *path) {
  const train_model *model = d->model;
  snprintf(path->name, sizeof path->name, "%s", d->env.settings->data.modalities[m].name);
  double inside;
  path->tokens = rows_of(d, m, &inside);
  path->attention = 4 * path->tokens * (double)(model->H * model->A * model->L) + inside;
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    if ((p->scope == TRAIN_SCOPE_MODALITY && p->modality != m) || is_unknown(d, p)) continue;
    meet(d, p, 1, path);
  }
}

/* Class c of a decoder's tokens: the latents of a modality pass its connector, the tokens of the vocabulary
 * are looked up, and each may have to be predicted. */
static void follow_class(draft *d, int32_t c, train_path *path) {
  const train_model *model = d->model;
  bool vocabulary = c == d->env.layout.modalities;
  snprintf(path->name, sizeof path->name, "%s", train_settings_class(d->env.settings, c));
  /* attention is over whole sequences, whose lengths are not known; but for that inside a connector */
  path->tokens = vocabulary ? 0 : rows_of(d, c, &path->attention);
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    bool table = i == model->decoder.embedding || i == model->decoder.output;
    if (table && (!vocabulary || i != model->decoder.output)) continue;
    if ((p->scope == TRAIN_SCOPE_MODALITY && p->modality != c) || is_unknown(d, p)) continue;
    meet(d, p, 1, path);
  }
}

/* Direction i of a connector. */
static void follow_direction(draft *d, int32_t i, train_path *path) {
  const train_direction *direction = &d->model->alignment.direction[i];
  snprintf(path->name, sizeof path->name, "%s", d->env.settings->objective.directions[i]);
  path->tokens = d->tokens[direction->from];
  train_model_activate(d->model, i);
  for (int32_t n = 0; n < d->model->parameters.count; n++) {
    const train_parameter *p = &d->model->parameters.list[n];
    if (p->active) meet(d, p, TRAIN_VIEWS, path);
  }
}

static core_status count(draft *d, train_arithmetic *out) {
  const train_parameters *set = &d->model->parameters;
  int kind = d->env.settings->model.kind;
  void (*const follow)(draft *, int32_t, train_path *) = kind == TRAIN_KIND_TOWER     ? follow_modality
                                                         : kind == TRAIN_KIND_DECODER ? follow_class
                                                                                      : follow_direction;
  out->paths =
      kind == TRAIN_KIND_CONNECTOR ? d->model->alignment.directions : train_settings_classes(d->env.settings);
  out->path = calloc((size_t)out->paths, sizeof *out->path);
  CHECK(out->path, CORE_ERR_MEMORY, "no memory for %d paths", out->paths);
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    if (is_unknown(d, p)) continue;
    out->parameters += p->count;
    out->experts += p->scope == TRAIN_SCOPE_EXPERT ? p->count : 0;
  }
  for (int32_t i = 0; i < out->paths; i++) follow(d, i, &out->path[i]);
  return CORE_OK;
}

core_status train_arithmetic_make(const train_settings *settings, const int64_t *width, const double *tokens,
                                  train_arithmetic *out) {
  draft d = {.tokens = tokens, .width = width};
  memset(out, 0, sizeof *out);
  core_status status = draft_make(settings, width, &d);
  if (status == CORE_OK) status = count(&d, out);
  train_model_destroy(d.model);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

void train_arithmetic_free(train_arithmetic *arithmetic) {
  free(arithmetic->path);
  memset(arithmetic, 0, sizeof *arithmetic);
}

double train_path_item(const train_path *path) {
  return path->tokens * (path->token + path->attention) + path->item;
}

void train_path_describe(const train_path *path, char *out, size_t capacity) {
  int used = snprintf(out, capacity, "%s: %.4g M parameters, %.4g MFLOP a token", path->name,
                      (double)path->parameters / 1e6, path->token / 1e6);
  if (path->tokens <= 0 || used < 0 || (size_t)used >= capacity) return;
  snprintf(out + used, capacity - (size_t)used, " and %.4g of attention, %.4g MFLOP an item of %.4g tokens",
           path->attention / 1e6, train_path_item(path) / 1e6, path->tokens);
}

void train_arithmetic_print(const train_arithmetic *arithmetic, const char *prefix, FILE *out) {
  fprintf(out, "%s%" PRId64 " parameters, %" PRId64 " of them in experts; forward pass:\n", prefix,
          arithmetic->parameters, arithmetic->experts);
  for (int32_t i = 0; i < arithmetic->paths; i++) {
    char text[4 * CORE_NAME];
    train_path_describe(&arithmetic->path[i], text, sizeof text);
    fprintf(out, "%s  %s\n", prefix, text);
  }
}

void train_arithmetic_json(const train_arithmetic *arithmetic, FILE *out) {
  fprintf(out, "{\"parameters\":%" PRId64 ",\"experts\":%" PRId64 ",\"paths\":{", arithmetic->parameters,
          arithmetic->experts);
  for (int32_t i = 0; i < arithmetic->paths; i++) {
    const train_path *path = &arithmetic->path[i];
    fprintf(out,
            "%s\"%s\":{\"parameters\":%" PRId64
            ",\"tokens\":%.17g,\"token_flops\":%.17g,"
            "\"attention_flops\":%.17g,\"item_flops\":%.17g}",
            i ? "," : "", path->name, path->parameters, path->tokens, path->token, path->attention,
            path->item);
  }
  fprintf(out, "}}\n");
}
