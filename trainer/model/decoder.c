/* Outline: the two tables; memory; a micro-batch's sequences, laid out on the host: which row is which token
 * or latent, what predicts what, rows by class and tokens by number. */
#include "trainer/model/decoder.h"

#include <string.h>

#include "trainer/model/tower.h"

/* ---- parameters ---- */

core_status train_decoder_declare(train_model *model) {
  const train_settings *s = model->env->settings;
  train_decoder *d = &model->decoder;
  train_parameter table = {.rank = 2,
                           .shape = {s->model.vocabulary, model->C},
                           .init = TRAIN_INIT_NORMAL,
                           .init_value = 0.02}; /* an embedding does not decay */
  d->V = s->model.vocabulary;
  for (int32_t m = 0; m < model->env->layout.modalities; m++) TRY(train_connector_declare(model, m));
  TRY(train_declare(model, table, &d->embedding, "embedding.weight"));
  TRY(train_trunk_declare(model, 0));
  d->output = d->embedding;
  table.decay = true;
  if (!s->model.tied) TRY(train_declare(model, table, &d->output, "output.weight"));
  return CORE_OK;
}

/* ---- memory ---- */

/* Logits of a block of rows: 64 MiB of float32, or what so many rows take that products of a block still have
 * work for each element of the table and of its gradient that they read. */
enum { LOGITS = 1 << 24, LEAST_BLOCK = 1 << 7 };

/* Rows of a block, of R predictions. */
static int64_t block_rows(int64_t R, int64_t V) {
  int64_t rows = LOGITS / V > LEAST_BLOCK ? LOGITS / V : LEAST_BLOCK;
  if (R < 1) return 1;
  return R < rows ? R : rows;
}

static core_status plan_items(const train_model *model, const train_arenas *arenas) {
  train_decoder *d = (train_decoder *)&model->decoder;
  core_arena *arena = arenas->activations;
  int64_t T = model->T, texts = model->limits.text, R = model->limits.predictions;
  const struct {
    train_mirror *mirror;
    int64_t rows;
  } list[] = {{&d->token, T},       {&d->latent_slot, T},    {&d->order, T},
              {&d->place, T},       {&d->lookup_row, texts}, {&d->lookup_entry, texts},
              {&d->predict_row, R}, {&d->target, R},         {&d->predict_slot, T}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    TRY(train_mirror_plan(arenas, arena, CORE_INT32, list[i].rows, 1, list[i].mirror));
  TRY(train_mirror_plan(arenas, arena, CORE_INT64, texts + 1, 1, &d->lookup_offset));
  TRY(train_mirror_plan(arenas, arena, CORE_UINT64, T - texts, 1, &d->latent_key));
  TRY(ARENA_TAKE(arenas->host, d->V + 1, &d->tally));
  return CORE_OK;
}

core_status train_decoder_plan(train_model *model, const train_arenas *arenas) {
  train_decoder *d = &model->decoder;
  core_arena *arena = arenas->activations;
  bool training = model->limits.training;
  int64_t C = model->C, R = model->limits.predictions, latents = model->T - model->limits.text;
  int64_t block = block_rows(R, d->V);
  TRY(plan_items(model, arenas));
  TRY(train_take_active(model, arena, latents, C, &d->latent));
  TRY(train_take_active(model, arena, R, C, &d->hidden));
  TRY(train_take(arena, CORE_REAL_DTYPE, block, d->V, &d->logits));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, R, 1, &d->lse));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, R, 1, &d->positive));
  if (!training) return CORE_OK;
  TRY(train_take_active(model, arena, R, C, &d->d_hidden));
  d->d_logits = d->logits; /* in place, where products take float32 */
  if (model->env->active != CORE_REAL_DTYPE) TRY(train_take_active(model, arena, block, d->V, &d->d_logits));
  return CORE_OK;
}

/* ---- items ---- */

/* Where the next row goes, and the next of each kind. */
typedef struct cursor {
  int64_t row, text, prediction;
} cursor;

static int32_t *numbers(const train_mirror *mirror) {
  return mirror->host;
}

static void put_row(train_decoder *d, int64_t row, int32_t token, int64_t place) {
  numbers(&d->token)[row] = token;
  numbers(&d->latent_slot)[row] = token < 0 ? (int32_t)place : -1;
  numbers(&d->predict_slot)[row] = -1;
  numbers(&d->order)[place] = (int32_t)row;
  numbers(&d->place)[row] = (int32_t)place;
}

/* What the latents of sample i of modality m have become. */
static void put_latents(train_model *model, int32_t m, int64_t i, cursor *at) {
  const int64_t *offset = model->items.part_offset[m].host, first = model->items.row_first[m];
  for (int64_t t = offset[i]; t < offset[i + 1]; t++) put_row(&model->decoder, at->row++, -1, first + t);
}

static void put_token(train_decoder *d, int32_t token, cursor *at) {
  put_row(d, at->row++, token, d->latents + at->text++);
}

/* What lies before the response of sample i. */
static void put_prompt(train_model *model, const data_text_part *text, int64_t i, cursor *at) {
  train_decoder *d = &model->decoder;
  const int32_t *prompt = text->prompt + text->prompt_offset[i];
  int64_t count = text->prompt_offset[i + 1] - text->prompt_offset[i];
  for (int32_t m = 0; m < model->env->layout.modalities; m++) {
    bool marked = false;
    for (int64_t p = 0; p < count; p++) marked = marked || prompt[p] == -1 - m;
    if (!marked) put_latents(model, m, i, at);
  }
  for (int64_t p = 0; p < count; p++) {
    if (prompt[p] >= 0)
      put_token(d, prompt[p], at);
    else if (prompt[p] != DATA_MARK_NOBODY)
      put_latents(model, -1 - prompt[p], i, at);
  }
}

/* Each token of the response is predicted by the row before it, where there is one in the sequence. */
static void put_response(train_decoder *d, const data_text_part *text, int64_t i, int64_t begin, cursor *at) {
  for (int64_t t = text->target_offset[i]; t < text->target_offset[i + 1]; t++) {
    if (at->row > begin) {
      numbers(&d->predict_row)[at->prediction] = (int32_t)(at->row - 1);
      numbers(&d->predict_slot)[at->row - 1] = (int32_t)at->prediction;
      numbers(&d->target)[at->prediction++] = text->target[t];
    }
    put_token(d, text->target[t], at);
  }
}

/* Rows of tokens, listed by token: a counting sort, stable, so that each entry's rows are in order. */
static void list_lookups(train_decoder *d) {
  const int32_t *row = numbers(&d->order) + d->latents, *token = numbers(&d->token);
  int64_t *tally = d->tally, *offset = d->lookup_offset.host;
  memset(tally, 0, (size_t)(d->V + 1) * sizeof *tally);
  for (int64_t i = 0; i < d->texts; i++) tally[token[row[i]] + 1]++;
  d->lookups = 0;
  offset[0] = 0;
  for (int64_t v = 0; v < d->V; v++) {
    if (tally[v + 1] > 0) {
      numbers(&d->lookup_entry)[d->lookups] = (int32_t)v;
      offset[++d->lookups] = tally[v] + tally[v + 1];
    }
    tally[v + 1] += tally[v];
  }
  for (int64_t i = 0; i < d->texts; i++) numbers(&d->lookup_row)[tally[token[row[i]]]++] = row[i];
}

static int64_t text_rows(const train_decoder *d, const data_text_part *text) {
  int64_t n = text->hi - text->lo, rows = n > 0 && !d->prompts_only ? text->target_offset[n] : 0;
  for (int64_t p = 0; n > 0 && p < text->prompt_offset[n]; p++) rows += text->prompt[p] >= 0;
  return rows;
}

int64_t train_decoder_predictions(const train_model *model, const data_batch *batch, int64_t micro) {
  int32_t M = model->env->layout.modalities;
  const data_part *part = &batch->part[micro * M];
  const data_text_part *text = &batch->text[micro];
  int64_t count = 0;
  for (int64_t i = 0; i < text->hi - text->lo; i++) {
    int64_t before = 0, targets = text->target_offset[i + 1] - text->target_offset[i];
    for (int32_t m = 0; m < M; m++) before += part[m].offset[i + 1] - part[m].offset[i];
    for (int64_t p = text->prompt_offset[i]; p < text->prompt_offset[i + 1]; p++)
      before += text->prompt[p] >= 0;
    count += targets - (before == 0 && targets > 0);
  }
  return count;
}

/* Class by class: the latents of each modality, then the tokens. */
static core_status take_parts(train_model *model, const data_part *part, const data_text_part *text) {
  train_items *items = &model->items;
  train_decoder *d = &model->decoder;
  int32_t M = model->env->layout.modalities;
  items->row_first[0] = 0;
  for (int32_t m = 0; m < M; m++) {
    TRY(train_items_take_part(model, &part[m], m));
    CHECK(part[m].lo == text->lo && part[m].hi == text->hi, CORE_ERR_INTERNAL,
          "samples %lld to %lld of '%s', tokens of %lld to %lld", (long long)part[m].lo,
          (long long)part[m].hi, model->env->settings->data.modalities[m].name, (long long)text->lo,
          (long long)text->hi);
    items->row_first[m + 1] =
        items->row_first[m] + ((const int64_t *)items->part_offset[m].host)[items->part_count[m]];
  }
  d->latents = items->row_first[M];
  d->texts = text_rows(d, text);
  items->row_first[M + 1] = items->tokens = d->latents + d->texts;
  items->segments = text->hi - text->lo;
  CHECK(items->tokens <= model->T && d->texts <= model->limits.text, CORE_ERR_INTERNAL,
        "a micro-batch has %lld rows, %lld of them tokens; %lld and %lld were planned",
        (long long)items->tokens, (long long)d->texts, (long long)model->T, (long long)model->limits.text);
  return CORE_OK;
}

static void describe_rows(train_model *model, int64_t sample, int64_t begin, int64_t end) {
  uint64_t place = ((uint64_t)sample * (uint64_t)model->env->layout.modalities) << 24;
  for (int64_t row = begin; row < end; row++) {
    ((uint64_t *)model->items.key.host)[row] = place | (uint64_t)(row - begin);
    ((int32_t *)model->items.position.host)[row] = (int32_t)(row - begin);
    int32_t latent = numbers(&model->decoder.latent_slot)[row];
    if (latent >= 0) ((uint64_t *)model->decoder.latent_key.host)[latent] = place | (uint64_t)(row - begin);
  }
}

static core_status send_items(train_model *model) {
  const train_env *env = model->env;
  const train_items *items = &model->items;
  const train_decoder *d = &model->decoder;
  const struct {
    const train_mirror *mirror;
    int64_t rows;
  } list[] = {{&items->offset, items->segments + 1},
              {&items->key, items->tokens},
              {&d->latent_key, d->latents},
              {&items->position, items->tokens},
              {&d->token, items->tokens},
              {&d->latent_slot, items->tokens},
              {&d->order, items->tokens},
              {&d->place, items->tokens},
              {&d->lookup_row, d->texts},
              {&d->lookup_entry, d->lookups},
              {&d->lookup_offset, d->lookups + 1},
              {&d->predict_row, d->predicted},
              {&d->predict_slot, items->tokens},
              {&d->target, d->predicted}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    TRY(train_mirror_up(env, list[i].mirror, list[i].rows));
  return CORE_OK;
}

core_status train_decoder_take(train_model *model, const data_batch *batch, int64_t micro) {
  train_items *items = &model->items;
  train_decoder *d = &model->decoder;
  const data_part *part = &batch->part[micro * model->env->layout.modalities];
  const data_text_part *text = &batch->text[micro];
  int64_t *offset = items->offset.host;
  cursor at = {0, 0, 0};
  TRY(take_parts(model, part, text));
  for (int64_t i = 0; i < items->segments; i++) {
    int64_t begin = offset[i] = at.row;
    put_prompt(model, text, i, &at);
    if (!d->prompts_only) put_response(d, text, i, begin, &at);
    describe_rows(model, text->lo + i, begin, at.row);
  }
  offset[items->segments] = at.row;
  d->predicted = at.prediction;
  list_lookups(d);
  TRY(send_items(model));
  TRY(train_moe_groups_take(model));
  return CORE_OK;
}

/* ---- one new row a sequence ---- */

void train_decoder_put_step(train_model *model, int64_t row, int32_t token, int64_t position) {
  put_row(&model->decoder, row, token, row);
  ((int32_t *)model->items.position.host)[row] = (int32_t)position;
  ((uint64_t *)model->items.key.host)[row] = (uint64_t)row << 24;
  ((int64_t *)model->items.offset.host)[row] = row;
}

core_status train_decoder_take_step(train_model *model, int64_t n) {
  train_items *items = &model->items;
  train_decoder *d = &model->decoder;
  int32_t M = model->env->layout.modalities;
  CHECK(n <= model->T && n <= model->S, CORE_ERR_INTERNAL, "%lld rows; %lld and %lld were planned",
        (long long)n, (long long)model->T, (long long)model->S);
  for (int32_t m = 0; m < M; m++) {
    items->row_first[m] = items->part_count[m] = items->latent[m].shape[0] = 0;
    ((int64_t *)items->part_offset[m].host)[0] = 0;
  }
  items->row_first[M] = 0;
  items->row_first[M + 1] = items->tokens = items->segments = d->texts = n;
  ((int64_t *)items->offset.host)[n] = n;
  d->latents = d->predicted = d->lookups = 0;
  TRY(send_items(model));
  return CORE_OK;
}
