/* Outline: a batch's prompts go through the model as in training, each block keeping its rows; from then on
 * one row a sample that is not finished. */
#include "trainer/generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "core/stop.h"

typedef struct sequence {
  uint64_t id;
  int64_t rows; /* kept so far */
  int32_t last; /* token that is not kept yet */
  int64_t count;
  bool open;
} sequence;

typedef struct generation {
  train_session *session;
  const train_generate_options *options;
  train_cache cache;
  int64_t samples, capacity, V; /* of a batch; rows of a sample; tokens */
  sequence *list;               /* [samples] */
  int32_t *token;               /* [samples, options.tokens] generated */
  int32_t *number;              /* [most rows] host, of whatever goes up */
  int64_t numbers;
  core_tensor index, hidden, logits; /* int32 [samples], [samples, C], [samples, V] Real; device */
  core_real *host_logits;
} generation;

/* ---- memory ---- */

static core_status on_device(const core_device *device, core_tensor *out) {
  TRY(device->allocate(core_tensor_bytes(out) + 1, &out->data));
  TRY(device->fill(out->data, 0, core_tensor_bytes(out), NULL));
  return CORE_OK;
}

static core_status make_cache(generation *g) {
  const train_env *env = &g->session->env;
  const train_model *model = g->session->model;
  int64_t rows = g->samples * g->capacity, row = (model->H + 2 * model->G) * model->A;
  CHECK(rows <= INT32_MAX, CORE_ERR_ARGUMENT,
        "%lld samples of %lld rows each are too many; a smaller evaluate.batch", (long long)g->samples,
        (long long)g->capacity);
  g->cache.layer = calloc((size_t)model->L, sizeof *g->cache.layer);
  CHECK(g->cache.layer, CORE_ERR_MEMORY, "no memory for %lld layers", (long long)model->L);
  for (int64_t l = 0; l < model->L; l++) {
    g->cache.layer[l] = core_tensor_2(NULL, env->active, rows, row);
    TRY(on_device(env->ops->device, &g->cache.layer[l]));
  }
  g->cache.slot = core_tensor_2(NULL, CORE_INT32, model->T, 1);
  g->cache.first = g->cache.length = g->index = core_tensor_1(NULL, CORE_INT32, g->samples);
  core_tensor *const lists[] = {&g->cache.slot, &g->cache.first, &g->cache.length, &g->index};
  for (int i = 0; i < 4; i++) TRY(on_device(env->ops->device, lists[i]));
  return CORE_OK;
}

static core_status make(generation *g) {
  train_session *session = g->session;
  const train_model *model = session->model;
  const core_device *device = session->env.ops->device;
  g->samples = train_layout_most_samples(&session->evaluation_layout, 0, 0);
  g->capacity = data_set_longest_text(session->evaluation, DATA_TEXT_PROMPT) + g->options->tokens;
  for (int32_t m = 0; m < session->env.layout.modalities; m++)
    g->capacity += train_settings_item_rows(session->env.settings, m,
                                            data_set_modality(session->evaluation, m)->longest);
  g->V = model->decoder.V;
  g->numbers = model->T > g->samples ? model->T : g->samples;
  TRY(make_cache(g));
  g->hidden = core_tensor_2(NULL, session->env.active, g->samples, model->C);
  g->logits = core_tensor_2(NULL, CORE_REAL_DTYPE, g->samples, g->V);
  TRY(on_device(device, &g->hidden));
  TRY(on_device(device, &g->logits));
  g->list = calloc((size_t)g->samples, sizeof *g->list);
  g->token = calloc((size_t)(g->samples * g->options->tokens), sizeof *g->token);
  g->number = calloc((size_t)g->numbers + 1, sizeof *g->number);
  g->host_logits = malloc(core_tensor_bytes(&g->logits));
  CHECK(g->list && g->token && g->number && g->host_logits, CORE_ERR_MEMORY,
        "no memory to continue %lld prompts by %lld tokens", (long long)g->samples,
        (long long)g->options->tokens);
  return CORE_OK;
}

static void release(generation *g) {
  const core_device *device = g->session->env.ops->device;
  for (int64_t l = 0; g->cache.layer && l < g->session->model->L; l++)
    device->release(g->cache.layer[l].data);
  void *const on[] = {g->cache.slot.data, g->cache.first.data, g->cache.length.data,
                      g->index.data,      g->hidden.data,      g->logits.data};
  for (size_t i = 0; i < sizeof on / sizeof *on; i++) device->release(on[i]);
  free(g->cache.layer), free(g->list), free(g->token), free(g->number), free(g->host_logits);
}

/* ---- choosing ---- */

static int32_t likeliest(const core_real *logits, int64_t V) {
  int64_t best = 0;
  for (int64_t v = 1; v < V; v++)
    if (logits[v] > logits[best]) best = v;
  return (int32_t)best;
}

/* The smallest token at which the running sum of probabilities passes a uniform number. */
static int32_t draw(const generation *g, const sequence *s, const core_real *logits) {
  double sum = 0, most = (double)logits[likeliest(logits, g->V)], t = g->options->temperature;
  for (int64_t v = 0; v < g->V; v++) sum += exp(((double)logits[v] - most) / t);
  uint64_t stream = core_random_stream(CORE_RANDOM_SAMPLE, s->id, 0);
  double left = sum * core_random_uniform(g->session->env.settings->run.seed, stream, (uint64_t)s->count);
  for (int64_t v = 0; v < g->V; v++) {
    left -= exp(((double)logits[v] - most) / t);
    if (left < 0) return (int32_t)v;
  }
  return likeliest(logits, g->V);
}

static void take_token(generation *g, sequence *s, int32_t token) {
  s->last = token;
  s->open = token != g->options->stop;
  if (s->open) g->token[(s - g->list) * g->options->tokens + s->count++] = token;
  if (s->count == g->options->tokens) s->open = false;
}

/* ---- passes ---- */

static core_status send(generation *g, core_tensor to, int64_t count) {
  TRY(g->session->env.ops->device->copy(to.data, g->number, (size_t)count * sizeof *g->number, NULL));
  return CORE_OK;
}

/* Next tokens of the open sequences, whose last rows `number` names in their order. */
static core_status choose(generation *g, int64_t open) {
  train_env *env = &g->session->env;
  const train_model *model = g->session->model;
  core_tensor logits = train_rows(g->logits, open), hidden = train_rows(g->hidden, open);
  int64_t row = 0;
  TRY(send(g, g->index, open));
  KERN(env, gather_rows, train_rows(model->final_norm[0].out, model->items.tokens),
       train_rows(g->index, open), hidden);
  TRY(train_decoder_logits(g->session->model, hidden, logits));
  TRY(env->ops->device->copy(g->host_logits, logits.data, core_tensor_bytes(&logits), NULL));
  for (int64_t i = 0; i < g->samples; i++) {
    sequence *s = &g->list[i];
    if (!s->open) continue;
    const core_real *own = g->host_logits + row++ * g->V;
    take_token(g, s, g->options->temperature > 0 ? draw(g, s, own) : likeliest(own, g->V));
  }
  return CORE_OK;
}

/* The prompts of a batch: rows of sample i are kept from i * capacity on. */
static core_status read_prompts(generation *g, const data_batch *batch) {
  train_model *model = g->session->model;
  const int64_t *offset = model->items.offset.host;
  int64_t open = 0;
  g->cache.stepping = false;
  TRY(train_model_take(model, batch, 0, -1));
  int64_t samples = model->items.segments;
  for (int64_t i = 0; i < samples; i++)
    for (int64_t row = offset[i]; row < offset[i + 1]; row++)
      g->number[row] = (int32_t)(i * g->capacity + row - offset[i]);
  TRY(send(g, g->cache.slot, model->items.tokens));
  TRY(train_model_forward(model, TRAIN_MODE_EVALUATE));
  for (int64_t i = 0; i < g->samples; i++) {
    int64_t rows = i < samples ? offset[i + 1] - offset[i] : 0;
    g->list[i] = (sequence){.id = i < samples ? batch->id[i] : 0, .rows = rows, .open = rows > 0};
    if (rows > 0) g->number[open++] = (int32_t)(offset[i + 1] - 1);
  }
  TRY(choose(g, open));
  return CORE_OK;
}

/* What attention needs of each open sequence: where its new row is kept, and the rows that it then has. */
static core_status place_rows(generation *g, int64_t *open) {
  core_tensor *const lists[] = {&g->cache.slot, &g->cache.first, &g->cache.length};
  for (int which = 0; which < 3; which++) {
    *open = 0;
    for (int64_t i = 0; i < g->samples; i++) {
      const sequence *s = &g->list[i];
      int64_t first = i * g->capacity;
      if (s->open)
        g->number[(*open)++] = (int32_t)(which == 0 ? first + s->rows : which == 1 ? first : s->rows + 1);
    }
    TRY(send(g, *lists[which], *open));
  }
  return CORE_OK;
}

static core_status step(generation *g, bool *more) {
  train_model *model = g->session->model;
  int64_t open = 0, row = 0;
  TRY(place_rows(g, &open));
  *more = open > 0;
  if (open == 0) return CORE_OK;
  for (int64_t i = 0; i < g->samples; i++)
    if (g->list[i].open) train_decoder_put_step(model, row++, g->list[i].last, g->list[i].rows++);
  g->cache.stepping = true;
  TRY(train_decoder_take_step(model, open));
  TRY(train_model_forward(model, TRAIN_MODE_EVALUATE));
  for (int64_t i = 0; i < open; i++) g->number[i] = (int32_t)i;
  TRY(choose(g, open));
  return CORE_OK;
}

static core_status continue_batch(generation *g, const data_batch *batch, train_generate_sink sink,
                                  void *context) {
  bool more = true;
  TRY(read_prompts(g, batch));
  while (more) {
    CHECK(!core_stop_requested(), CORE_ERR_STOPPED, "stopped during generation");
    TRY(step(g, &more));
  }
  for (int64_t i = 0; i < batch->samples; i++)
    TRY(sink(context, g->list[i].id, g->token + i * g->options->tokens, g->list[i].count));
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status continue_all(generation *g, data_stream *stream, train_generate_sink sink, void *context) {
  for (;;) {
    data_batch *batch = NULL;
    TRY(data_stream_get(stream, &batch));
    if (!batch) return CORE_OK;
    core_status status = continue_batch(g, batch, sink, context);
    data_stream_put(stream, batch);
    TRY(status);
  }
}

static core_status run(generation *g, train_generate_sink sink, void *context) {
  train_session *session = g->session;
  data_stream *stream = NULL;
  data_position start = {0, 0, 0};
  TRY(make(g));
  TRY(train_session_stream(session, session->evaluation, &session->evaluation_layout, &start, false,
                           &stream));
  session->model->cache = &g->cache;
  session->model->decoder.prompts_only = true;
  core_status status = continue_all(g, stream, sink, context);
  session->model->cache = NULL;
  session->model->decoder.prompts_only = false;
  data_stream_close(stream);
  TRY(status);
  return CORE_OK;
}

core_status train_generate_run(train_session *session, const train_generate_options *options,
                               train_generate_sink sink, void *context) {
  generation g = {.session = session, .options = options};
  CHECK(comm_size(session->env.world) == 1, CORE_ERR_ARGUMENT, "generation runs on one rank, not on %d",
        comm_size(session->env.world));
  CHECK(options->tokens > 0 && options->tokens <= 1 << 20 && options->temperature >= 0, CORE_ERR_ARGUMENT,
        "%lld tokens at temperature %g; expected 1 to %d, and 0 or more", (long long)options->tokens,
        options->temperature, 1 << 20);
  core_status status = run(&g, sink, context);
  core_error saved;
  core_error_save(&saved);
  release(&g);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
