#include "trainer/session_impl.h"

#include <sched.h> /* sched_getaffinity */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* sysconf */

#include "core/log.h"
#include "trainer/model/lora.h"

/* ---- opening data ---- */

/* The modalities [first, first + count). */
static core_status open_set(train_session *session, const train_session_options *options, const char *path,
                            const char *split, const train_span *modalities, data_set **out) {
  const train_settings *s = session->env.settings;
  int32_t mark[CORE_MAX_MODALITIES];
  const data_text_options text = {s->model.vocabulary, !options->without_responses, mark,
                                  s->data.use_count > 0 ? CORE_MAX_MODALITIES : 0};
  const char *names[CORE_MAX_MODALITIES];
  const int32_t first = (int32_t)modalities->first, count = (int32_t)modalities->count;
  for (int32_t m = 0; m < count; m++) {
    names[m] = s->data.modalities[first + m].name;
    mark[m] = (int32_t)s->data.modalities[first + m].mark;
  }
  TRY(data_set_open(path, split, names, count, out));
  if (data_set_samples(*out) == 0) FAIL(CORE_ERR_FORMAT, "%s/%s holds no samples", path, split);
  if (s->model.kind == TRAIN_KIND_DECODER) TRY(data_set_take_text(*out, &text));
  for (int32_t m = 0; m < count; m++) {
    const data_modality_info *info = data_set_modality(*out, m);
    char key[160];
    snprintf(key, sizeof key, "data.modalities.%.96s.length", names[m]);
    if (s->data.modalities[first + m].positions == TRAIN_POSITIONS_LEARNED &&
        info->longest > s->data.modalities[first + m].length)
      return core_config_refuse(
          session->env.config, key,
          "the longest sample of %s/%s has %lld tokens, so at least that many positions are needed", path,
          split, (long long)info->longest);
  }
  return CORE_OK;
}

static core_status check_widths(const train_session *session) {
  const data_set *a = session->training, *b = session->evaluation;
  for (int32_t m = 0; a && b && m < (int32_t)session->env.settings->data.modalities_count; m++) {
    int64_t first = data_set_modality(a, m)->width, second = data_set_modality(b, m)->width;
    CHECK(first == second, CORE_ERR_MISMATCH, "'%s' is %lld wide in the training split and %lld in the other",
          data_set_modality(a, m)->name, (long long)first, (long long)second);
  }
  return CORE_OK;
}

static core_status open_part(train_session *session, const train_session_options *options, int32_t i) {
  const train_part_options *wanted = &options->part[i];
  train_part *part = &session->part[i];
  session->part_count = i + 1;
  part->path = wanted->path;
  part->split = wanted->split;
  part->modality = wanted->modality;
  const train_span one = {wanted->modality, 1};
  TRY(open_set(session, options, wanted->path, wanted->split, &one, &part->set));
  const data_modality_info *info = data_set_modality(part->set, 0);
  CHECK(!options->width || info->width == options->width[wanted->modality], CORE_ERR_MISMATCH,
        "'%s' in %s/%s is %lld wide, the model's is %lld", info->name, wanted->path, wanted->split,
        (long long)info->width, (long long)options->width[wanted->modality]);
  return CORE_OK;
}

/* Training on batches of one signature each. */
static core_status group_set(const train_session *session, data_set *set) {
  const train_settings *s = session->env.settings;
  data_group_options options = {.batch = s->optimizer.batch,
                                .incomplete = s->data.incomplete == TRAIN_INCOMPLETE_DROP
                                                  ? DATA_INCOMPLETE_DROP
                                                  : DATA_INCOMPLETE_CARRY,
                                .non_finite = train_session_non_finite_priv(session)};
  for (int32_t m = 0; m < (int32_t)s->data.modalities_count; m++)
    if (s->data.modalities[m].connector == TRAIN_CONNECTOR_RESAMPLER)
      options.rows[m] = train_settings_item_rows(s, m, 1);
  if (s->data.batches == TRAIN_BATCHES_HOMOGENEOUS && session->purpose == TRAIN_PURPOSE_TRAIN)
    TRY(data_set_group(set, &options));
  return CORE_OK;
}

static core_status open_data_local(train_session *session, const train_session_options *options) {
  const train_settings *s = session->env.settings;
  const char *path = options->data_path ? options->data_path : s->data.path;
  TRY(kern_select(s->run.device, comm_local_rank(session->env.comm), &session->env.ops));
  session->env.active = s->run.precision == CORE_BFLOAT16 ? CORE_BFLOAT16 : CORE_REAL_DTYPE;
  const train_span all = {0, s->data.modalities_count};
  if (options->training_split)
    TRY(open_set(session, options, path, options->training_split, &all, &session->training));
  if (session->training) TRY(group_set(session, session->training));
  if (options->evaluation_split)
    TRY(open_set(session, options, path, options->evaluation_split, &all, &session->evaluation));
  TRY(check_widths(session));
  for (int32_t i = 0; i < options->part_count; i++) TRY(open_part(session, options, i));
  return CORE_OK;
}

static core_status open_data(train_session *session, const train_session_options *options) {
  comm_group *control = session->env.control;
  TRY(comm_agree(control, open_data_local(session, options)));
  if (session->training)
    TRY(comm_agree_value(control, "the list of training shards", data_set_fingerprint(session->training)));
  if (session->evaluation)
    TRY(comm_agree_value(control, "the list of evaluation shards",
                         data_set_fingerprint(session->evaluation)));
  for (int32_t i = 0; i < session->part_count; i++)
    TRY(comm_agree_value(control, "the list of shards", data_set_fingerprint(session->part[i].set)));
  return CORE_OK;
}

/* One that has all modalities; NULL: there is none. */
static const data_set *any_set(const train_session *session) {
  return session->training ? session->training : session->evaluation;
}

/* Sets that hold modality m, and its place in them. */
typedef struct holder {
  const data_set *set;
  int32_t place;
} holder;
enum { MOST_HOLDERS = 2 + TRAIN_MOST_PARTS };

static int32_t holders_of(const train_session *session, int32_t m, holder out[MOST_HOLDERS]) {
  int32_t count = 0;
  if (session->training) out[count++] = (holder){session->training, m};
  if (session->evaluation) out[count++] = (holder){session->evaluation, m};
  for (int32_t i = 0; i < session->part_count; i++)
    if (session->part[i].modality == m) out[count++] = (holder){session->part[i].set, 0};
  return count;
}

/* ---- layout and groups ---- */

/* Multiply-adds of one sample of modality m, roughly: its rows through the trunk (attention's projections,
 * and three matrices of a dense layer or of each chosen expert) and through the connector. Only the partition
 * hangs on it. */
static double sample_cost(const train_session *session, int32_t m) {
  const train_settings *s = session->env.settings;
  if (!any_set(session) || session->sizes) return 1; /* shared placement: nothing is partitioned */
  const data_modality_info *info = data_set_modality(any_set(session), m);
  double samples = (double)data_set_samples(any_set(session)), latents = (double)info->tokens / samples;
  double C = (double)s->model.width, tokens = latents, connector = latents * (double)info->width * C;
  double dense = s->model.hidden > 0 ? (double)s->model.hidden : 8.0 / 3 * C, trunk = 0;
  double expert =
      (double)s->model.moe.choose * (s->model.moe.hidden > 0 ? (double)s->model.moe.hidden : dense);
  for (int64_t l = 0; l < s->model.layers; l++)
    trunk += 4 * C * C +
             3 * C * (train_settings_moe_layer(s->model.moe.layers, s->model.layers, l) ? expert : dense);
  if (s->data.modalities[m].connector == TRAIN_CONNECTOR_RESAMPLER) {
    const train_modality_settings *r = &s->data.modalities[m];
    double W = r->hidden ? (double)r->hidden : C, depth = (double)r->depth;
    tokens = (double)r->queries * (samples - (double)info->absent) / samples;
    /* of a row of queries: 4 W^2 of each attention but the keys and values, 8 W^2 of the feed-forward */
    connector = depth * (tokens * 14 * W * W + latents * 2 * (double)info->width * W) + tokens * W * C;
  }
  return tokens * trunk + connector + C * C;
}

static core_status make_layout(train_session *session) {
  train_env *env = &session->env;
  double cost[CORE_MAX_MODALITIES];
  for (unsigned m = 0; m < env->settings->data.modalities_count; m++)
    cost[m] = sample_cost(session, (int32_t)m);
  TRY(train_layout_make(env->config, comm_size(env->world), comm_rank(env->world), cost, &env->layout));
  session->evaluation_layout = train_layout_with_batch(&env->layout, env->settings->evaluate.batch, 1);
  return CORE_OK;
}

/* Every group learns where the tensors lie. */
static core_status serve_device(train_env *env) {
  comm_device_transport transport = (comm_device_transport)env->settings->parallel.transport;
  enum { STAGING = 32 << 20 };
  comm_group *groups[3 + CORE_MAX_MODALITIES] = {env->world, env->expert, env->replica};
  for (int32_t m = 0; m < env->layout.modalities; m++) groups[3 + m] = env->modality[m];
  for (int32_t i = 0; i < 3 + env->layout.modalities; i++)
    if (groups[i]) TRY(comm_group_device(groups[i], env->ops->device, transport, STAGING));
  return CORE_OK;
}

static core_status make_groups(train_env *env) {
  const train_layout *layout = &env->layout;
  TRY(comm_group_create(env->comm, layout->group, "expert", &env->expert));
  TRY(comm_group_create(env->comm, layout->slot, "replica", &env->replica));
  for (int32_t m = 0; m < layout->modalities; m++) {
    char name[64];
    snprintf(name, sizeof name, "modality %.40s", env->settings->data.modalities[m].name);
    int32_t color = train_layout_holds(layout, layout->rank, m) ? 0 : -1;
    TRY(comm_group_create(env->comm, color, name, &env->modality[m]));
  }
  return serve_device(env);
}

/* ---- sizes ---- */

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* Most rows of the trunk of so many samples of modality m. */
static int64_t most_rows(const train_settings *s, holder in, int32_t m, int64_t samples) {
  if (s->data.modalities[m].connector != TRAIN_CONNECTOR_RESAMPLER)
    return data_set_most_rows(in.set, in.place, samples);
  return samples * train_settings_item_rows(s, m, data_set_modality(in.set, in.place)->longest);
}

/* Largest micro-batch of modality m in rows, here and in the whole expert group. */
static void add_limits(const train_settings *s, holder in, const train_layout *layout, int32_t m,
                       train_model_limits *limits, int64_t *group_rows) {
  int64_t own = train_layout_most_samples(layout, layout->rank, m), rows = 0;
  for (int32_t slot = 0; slot < layout->expert_ranks; slot++)
    rows += most_rows(s, in, m,
                      train_layout_most_samples(layout, layout->group * layout->expert_ranks + slot, m));
  limits->segments[m] = larger(limits->segments[m], own);
  limits->latents[m] = larger(limits->latents[m], data_set_most_rows(in.set, in.place, own));
  limits->tokens[m] = larger(limits->tokens[m], most_rows(s, in, m, own));
  *group_rows = larger(*group_rows, rows);
}

/* Likewise the tokens of a decoder. */
static void add_text(const data_set *set, const train_layout *layout, train_model_limits *limits,
                     int64_t *group_text) {
  if (!set) return;
  int64_t own = train_layout_most_samples(layout, layout->rank, 0), text = 0;
  for (int32_t slot = 0; slot < layout->expert_ranks; slot++)
    text +=
        data_set_most_text(set, DATA_TEXT_BOTH,
                           train_layout_most_samples(layout, layout->group * layout->expert_ranks + slot, 0));
  limits->text = larger(limits->text, data_set_most_text(set, DATA_TEXT_BOTH, own));
  limits->predictions = larger(limits->predictions, data_set_most_text(set, DATA_TEXT_TARGET, own));
  *group_text = larger(*group_text, text);
}

/* Rows of the longest sequence: of a modality, or of a decoder's sample. */
static int64_t longest_sequence(const train_session *session, const data_set *set) {
  bool decoder = session->env.settings->model.kind == TRAIN_KIND_DECODER;
  int64_t longest = set && decoder ? data_set_longest_text(set, DATA_TEXT_BOTH) : 0;
  for (int32_t m = 0; set && m < session->env.layout.modalities; m++) {
    int64_t rows = train_settings_item_rows(session->env.settings, m, data_set_modality(set, m)->longest);
    longest = decoder ? longest + rows : larger(longest, rows);
  }
  return longest;
}

/* Rows of the longest item of latents that any resampler reads. */
static int64_t longest_latents(const train_session *session) {
  int64_t longest = 0;
  for (int32_t m = 0; m < session->env.layout.modalities; m++) {
    holder in[MOST_HOLDERS];
    int32_t count = holders_of(session, m, in);
    if (session->env.settings->data.modalities[m].connector != TRAIN_CONNECTOR_RESAMPLER) continue;
    for (int32_t i = 0; i < count; i++)
      longest = larger(longest, data_set_modality(in[i].set, in[i].place)->longest);
  }
  return longest;
}

/* Bytes of a stored number of modality m, in the widest of the sets. */
static size_t stored_bytes(const train_session *session, int32_t m) {
  size_t bytes = 1;
  holder in[MOST_HOLDERS];
  int32_t count = holders_of(session, m, in);
  for (int32_t i = 0; i < count; i++) {
    size_t its = core_dtype_size(data_set_modality(in[i].set, in[i].place)->dtype);
    if (its > bytes) bytes = its;
  }
  return bytes;
}

/* Every rank passes items of its own through experts of its own. */
static train_model_limits stated_limits(const train_session *session) {
  const train_env *env = &session->env;
  const train_session_sizes *sizes = session->sizes;
  train_model_limits limits = {.training = false};
  int64_t segments = 0;
  memcpy(limits.width, sizes->width, sizeof limits.width);
  memcpy(limits.latents, sizes->tokens, sizeof limits.latents);
  memcpy(limits.segments, sizes->segments, sizeof limits.segments);
  memcpy(limits.latent_bytes, sizes->latent_bytes, sizeof limits.latent_bytes);
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    bool resampled = env->settings->data.modalities[m].connector == TRAIN_CONNECTOR_RESAMPLER;
    limits.tokens[m] =
        !resampled ? sizes->tokens[m] : sizes->segments[m] * train_settings_item_rows(env->settings, m, 1);
  }
  train_model_rows(env->settings, &limits, &limits.group_tokens, &segments);
  limits.expert_rows = larger(limits.group_tokens * env->settings->model.moe.choose, 1);
  return limits;
}

/* Of the experts of a layer that one rank holds: the most of any layer and rank. */
static double largest_share(const train_env *env) {
  const train_settings *s = env->settings;
  int64_t ranks = env->layout.expert_ranks, layers = s->model.moe.layer_experts_count;
  double largest = 0;
  for (int64_t i = 0; i < larger(layers, 1); i++) {
    int64_t experts = train_settings_experts(s, i);
    largest = fmax(largest, (double)((experts + ranks - 1) / ranks) / (double)experts);
  }
  return largest;
}

/* width: as train_session_options. */
static train_model_limits find_limits(const train_session *session, const int64_t *width) {
  if (session->sizes) return stated_limits(session);
  const train_env *env = &session->env;
  train_model_limits limits = {.training = session->purpose == TRAIN_PURPOSE_TRAIN};
  train_model_limits groups = {0}; /* tokens of a whole expert group */
  int64_t K = env->settings->model.moe.choose;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    int64_t group_rows = 0;
    holder in[MOST_HOLDERS];
    int32_t count = holders_of(session, m, in);
    for (int32_t i = 0; i < count; i++)
      add_limits(env->settings, in[i],
                 in[i].set == session->training ? &env->layout : &session->evaluation_layout, m, &limits,
                 &group_rows);
    limits.width[m] = width ? width[m] : data_set_modality(any_set(session), m)->width;
    limits.latent_bytes[m] = stored_bytes(session, m);
    groups.tokens[m] = group_rows;
  }
  if (env->settings->model.kind == TRAIN_KIND_DECODER) {
    add_text(session->training, &env->layout, &limits, &groups.text);
    add_text(session->evaluation, &session->evaluation_layout, &limits, &groups.text);
  }
  int64_t own = 0, segments = 0;
  train_model_rows(env->settings, &limits, &own, &segments);
  train_model_rows(env->settings, &groups, &limits.group_tokens, &segments);
  double share = (double)(limits.group_tokens * K) * largest_share(env) * env->settings->model.moe.buffer;
  int64_t most = limits.group_tokens * K, rows = (int64_t)share + 1;
  limits.expert_rows = env->layout.expert_ranks == 1 ? own * K : rows < most ? rows : most > 0 ? most : 1;
  return limits;
}

static int32_t threads_of(const train_env *env) {
  cpu_set_t set;
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  int mine = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)online;
  int threads = (int)env->settings->run.threads;
  if (threads == 0)
    threads = mine >= online ? mine / comm_local_size(env->comm) : mine; /* bound: all its own */
  return threads > 0 ? threads : 1;
}

static kern_limits kernel_limits(const train_session *session, const train_model_limits *limits) {
  const train_model *model = session->model;
  const train_settings *s = session->env.settings;
  int64_t F = larger(model->F, s->model.moe.hidden),
          all = s->model.dense_match == TRAIN_MATCH_TOTAL ? train_settings_most_experts(s)
                                                          : s->model.moe.choose,
          width = larger(model->C, 2 * F * (train_settings_dense(s) ? all : 1));
  kern_limits k = {.experts = larger(train_settings_most_experts(s), TRAIN_CALIBRATION_WIDTH),
                   .heads = model->H,
                   .threads = threads_of(&session->env)};
  width = larger(width, (model->H + 2 * model->G) * model->A);
  width = larger(width, larger(model->Z, s->evaluate.batch));
  for (int32_t m = 0; m < session->env.layout.modalities; m++) {
    width = larger(width, larger(limits->width[m], s->data.modalities[m].hidden));
    train_resampler_limits(model, m, limits, &k);
  }
  width = larger(width, k.width);
  k.sequence =
      larger(longest_sequence(session, session->training), longest_sequence(session, session->evaluation));
  for (int32_t m = 0; session->sizes && m < session->env.layout.modalities; m++)
    k.sequence = larger(k.sequence, larger(session->sizes->longest[m],
                                           train_settings_item_rows(s, m, session->sizes->longest[m])));
  for (int32_t i = 0; i < session->part_count; i++)
    k.sequence =
        larger(k.sequence, train_settings_item_rows(s, session->part[i].modality,
                                                    data_set_modality(session->part[i].set, 0)->longest));
  k.updates = model->parameters.count;
  k.sequence = larger(k.sequence, longest_latents(session));
  int64_t latents = k.rows; /* a resampler's may be more than the trunk's rows */
  train_model_rows(s, limits, &k.rows, &k.segments);
  k.segments = larger(k.segments + 1, session->env.layout.batch);
  k.rows = larger(larger(k.rows * s->model.moe.choose, limits->expert_rows), session->env.layout.batch);
  k.rows = larger(k.rows, latents);
  k.width = larger(width, session->env.layout.batch);
  return k;
}

/* ---- memory ---- */

static core_status plan(train_session *session, const train_model_limits *limits) {
  TRY(train_model_plan(session->model, limits, &session->arenas));
  if (session->purpose == TRAIN_PURPOSE_TRAIN) TRY(train_stepper_plan(&session->stepper, &session->arenas));
  return CORE_OK;
}

enum { ARENAS = 4 };

static core_status create_arenas(train_session *session) {
  train_arenas *arenas = &session->arenas;
  const core_device *device = session->env.ops->device;
  arenas->host_access = device->host_access;
  TRY(core_arena_create("parameters", device, &arenas->parameters));
  TRY(core_arena_create("activations", device, &arenas->activations));
  TRY(core_arena_create("objective", device, &arenas->objective));
  TRY(core_arena_create_staging("host", device, &arenas->host));
  return CORE_OK;
}

/* Says before anything is allocated that it will not fit, and what it is made of. Ranks of one host may share
 * a device; what is certain to fail is refused, the rest is the allocator's to say. */
static core_status check_memory(const train_session *session) {
  const train_env *env = &session->env;
  train_memory need = train_session_memory(session);
  size_t available = 0, total = 0, own = need.total - need.host;
  TRY(env->ops->device->memory(&available, &total));
  size_t most = env->ops->device->host_access ? total : available;
  enum { MEBIBYTE = 1 << 20 };
  CHECK(
      most == 0 || own <= most, CORE_ERR_MEMORY,
      "rank %d needs %zu MiB on %s, which has %zu MiB free of %zu: parameters and optimizer %zu, activations "
      "%zu, objective %zu, kernels %zu; a larger optimizer.accumulate, model.recompute, run.precision "
      "bfloat16, a larger parallel.experts or more ranks make it smaller",
      comm_rank(env->world), own / MEBIBYTE, env->ops->device->name, most / MEBIBYTE, total / MEBIBYTE,
      need.parameters / MEBIBYTE, need.activations / MEBIBYTE, need.objective / MEBIBYTE,
      need.kernels / MEBIBYTE);
  return CORE_OK;
}

static core_status allocate_local(train_session *session, const int64_t *width) {
  train_env *env = &session->env;
  train_model_limits limits = find_limits(session, width);
  kern_limits kernel;
  TRY(train_model_create(env, limits.width, &session->model));
  TRY(train_stepper_make(env, session->model, &session->stepper));
  TRY(create_arenas(session));
  TRY(plan(session, &limits));
  TRY(check_memory(session));
  kernel = kernel_limits(session, &limits);
  TRY(env->ops->context_create(&kernel, &env->kern));
  core_arena *const arenas[ARENAS] = {session->arenas.parameters, session->arenas.activations,
                                      session->arenas.objective, session->arenas.host};
  for (int i = 0; i < ARENAS; i++) TRY(core_arena_commit(arenas[i]));
  TRY(plan(session, &limits));
  for (int i = 0; i < ARENAS; i++) core_arena_seal(arenas[i]);
  TRY(train_model_prepare(session->model));
  return CORE_OK;
}

/* A pattern that names nothing on any rank is a mistake, where something is trained. */
static core_status check_patterns(train_session *session, const char *list, char *const *pattern,
                                  unsigned count) {
  for (unsigned i = 0; i < count && session->purpose == TRAIN_PURPOSE_TRAIN; i++) {
    const train_parameters *set = &session->model->parameters;
    int64_t matches = 0;
    for (int32_t k = 0; k < set->count; k++)
      matches += train_model_names(session->model, pattern[i], &set->list[k]);
    TRY(comm_all_reduce(session->env.control, COMM_SUM, CORE_INT64, &matches, 1));
    char key[64];
    snprintf(key, sizeof key, "optimizer.%s.%u", list, i);
    if (matches == 0)
      return core_config_refuse(session->env.config, key, "no parameter's name matches '%s'", pattern[i]);
  }
  return CORE_OK;
}

/* Likewise one that adapts nothing. */
static core_status check_adapted(train_session *session) {
  const train_settings *s = session->env.settings;
  for (unsigned i = 0; i < s->model.lora_count; i++) {
    int64_t matches = train_lora_matches(session->model, i);
    TRY(comm_all_reduce(session->env.control, COMM_SUM, CORE_INT64, &matches, 1));
    char key[64];
    snprintf(key, sizeof key, "model.lora.%u.parameters", i);
    if (matches == 0)
      return core_config_refuse(session->env.config, key,
                                "no linear map of a block or connector has a name that matches '%s'",
                                s->model.lora[i].parameters);
  }
  return CORE_OK;
}

/* What is trained decides how far gradients go down; it must be something. */
static core_status agree_trained(train_session *session) {
  train_model *model = session->model;
  int64_t trained = model->parameters.gradient_total;
  model->lowest = train_model_lowest(model);
  TRY(comm_all_reduce(session->env.control, COMM_MIN, CORE_INT64, &model->lowest, 1));
  TRY(comm_all_reduce(session->env.control, COMM_SUM, CORE_INT64, &trained, 1));
  if (trained == 0 && session->purpose == TRAIN_PURPOSE_TRAIN)
    return core_config_refuse(session->env.config, "optimizer.frozen", "nothing is left to train");
  return CORE_OK;
}

static core_status open_all(train_session *session, const train_session_options *options) {
  train_env *env = &session->env;
  const train_settings *s = env->settings;
  TRY(train_settings_check(options->config, comm_size(env->world)));
  TRY(open_data(session, options));
  TRY(comm_agree(env->control, make_layout(session)));
  TRY(make_groups(env));
  TRY(comm_agree(env->control, allocate_local(session, options->width)));
  TRY(check_patterns(session, "frozen", s->optimizer.frozen, s->optimizer.frozen_count));
  TRY(check_patterns(session, "trained", s->optimizer.trained, s->optimizer.trained_count));
  TRY(check_adapted(session));
  TRY(agree_trained(session));
  return CORE_OK;
}

core_status train_session_open(const train_session_options *options, train_session **out) {
  train_session *session = calloc(1, sizeof *session);
  CHECK(session, CORE_ERR_MEMORY, "no memory for the session");
  session->purpose = options->purpose;
  session->sizes = options->sizes;
  session->env = (train_env){.config = options->config,
                             .settings = core_config_data(options->config),
                             .comm = options->comm,
                             .world = comm_world_group(options->comm),
                             .control = comm_control_group(options->comm)};
  core_status status = open_all(session, options);
  if (status != CORE_OK) {
    train_session_close(session);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = session;
  return CORE_OK;
}

void train_session_close(train_session *session) {
  if (!session) return;
  data_set_close(session->training);
  data_set_close(session->evaluation);
  for (int32_t i = 0; i < session->part_count; i++) data_set_close(session->part[i].set);
  train_stepper_free(&session->stepper);
  train_model_destroy(session->model);
  core_arena_destroy(session->arenas.parameters);
  core_arena_destroy(session->arenas.activations);
  core_arena_destroy(session->arenas.objective);
  core_arena_destroy(session->arenas.host);
  comm_group_destroy(session->env.expert);
  comm_group_destroy(session->env.replica);
  for (int32_t m = 0; m < CORE_MAX_MODALITIES; m++) comm_group_destroy(session->env.modality[m]);
  if (session->env.kern) session->env.ops->context_destroy(session->env.kern);
  free(session);
}

/* ---- figures ---- */

train_memory train_session_memory(const train_session *session) {
  train_memory memory = {.parameters = core_arena_peak(session->arenas.parameters),
                         .activations = core_arena_peak(session->arenas.activations),
                         .objective = core_arena_peak(session->arenas.objective),
                         .host = core_arena_peak(session->arenas.host)};
  train_model_limits limits = session->model->limits;
  kern_limits kernel = kernel_limits(session, &limits);
  memory.kernels = session->env.ops->context_bytes(&kernel);
  memory.total = memory.parameters + memory.activations + memory.objective + memory.host + memory.kernels;
  return memory;
}

core_status train_session_counts(train_session *session, train_counts *out) {
  train_env *env = &session->env;
  const train_settings *s = env->settings;
  const train_parameters *set = &session->model->parameters;
  int64_t counts[4] = {0, 0, 0, 0}; /* all, not passed, frozen, of own trunks; each by its first holder */
  for (int32_t scope = 0; scope < 2 + env->layout.modalities; scope++) {
    comm_group *group = scope == 0 ? env->world : scope == 1 ? env->replica : env->modality[scope - 2];
    if (!group || comm_rank(group) != 0) continue;
    for (int32_t i = 0; i < set->count; i++) {
      const train_parameter *p = &set->list[i];
      int32_t its = p->scope == TRAIN_SCOPE_MODALITY ? 2 + p->modality : (int32_t)p->scope;
      if (its != scope) continue;
      counts[0] += p->count;
      counts[1] += p->expert >= s->model.moe.choose ? p->count : 0;
      counts[2] += p->frozen ? p->count : 0;
      counts[3] += strncmp(p->name, "trunk.", 6) == 0 ? p->count : 0;
    }
  }
  TRY(comm_all_reduce(env->world, COMM_SUM, CORE_INT64, counts, 4));
  out->frozen = counts[2];
  out->total = counts[0];
  out->active = counts[0] - counts[1] - counts[3] / env->layout.modalities * (env->layout.modalities - 1);
  return CORE_OK;
}

core_status train_session_arithmetic(const train_session *session, train_arithmetic *out) {
  int64_t width[CORE_MAX_MODALITIES];
  double tokens[CORE_MAX_MODALITIES];
  for (int32_t m = 0; m < session->env.layout.modalities; m++) {
    const data_modality_info *info = data_set_modality(any_set(session), m);
    int64_t present = data_set_samples(any_set(session)) - info->absent;
    width[m] = session->model->limits.width[m];
    tokens[m] = present > 0 ? (double)info->tokens / (double)present : 0;
  }
  TRY(train_arithmetic_make(session->env.settings, width, tokens, out));
  return CORE_OK;
}
