/* Opening: what is asked for, shards, sizes, model, checkpoint. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/log.h"
#include "trainer/serve/embed_impl.h"
#include "trainer/source.h"

/* ---- what is asked for ---- */

static core_status find_modality(const train_embedder *e, const char *name, int32_t *m) {
  char known[1024] = "";
  const train_settings *s = e->settings;
  *m = train_settings_modality(s, name);
  for (unsigned i = 0, at = 0; i < s->data.modalities_count && at < sizeof known; i++)
    at += (unsigned)snprintf(known + at, sizeof known - at, "%s'%s'", i ? ", " : "",
                             s->data.modalities[i].name);
  CHECK(*m >= 0, CORE_ERR_CONFIG, "the checkpoint has no modality '%s'; it has %s", name, known);
  return CORE_OK;
}

/* The first direction that the predicate's modalities fit; -1: none. from -1: any. */
static int32_t find_direction(const train_settings *s, int32_t from, int32_t toward) {
  for (unsigned d = 0; d < s->objective.directions_count; d++) {
    int32_t pair[2] = {-1, -1};
    if (!train_settings_direction(s, d, pair)) continue;
    if ((from < 0 || pair[0] == from) && pair[1] == toward) return (int32_t)d;
  }
  return -1;
}

static core_status resolve_query(train_embedder *e, const char *query) {
  char from[CORE_NAME];
  const char *colon = strchr(query, ':');
  CHECK(colon && colon > query && colon[1] && colon - query < CORE_NAME, CORE_ERR_USAGE,
        "'%s' is no direction; expected FROM:TOWARD, as in image:text", query);
  snprintf(from, sizeof from, "%.*s", (int)(colon - query), query);
  TRY(find_modality(e, from, &e->modality));
  TRY(find_modality(e, colon + 1, &e->toward));
  CHECK(e->settings->model.kind == TRAIN_KIND_CONNECTOR, CORE_ERR_CONFIG,
        "the checkpoint is of a tower, which has one kind of vector a modality: use --key %s", from);
  e->direction = find_direction(e->settings, e->modality, e->toward);
  CHECK(e->direction >= 0, CORE_ERR_CONFIG, "the checkpoint was not trained in the direction %s", query);
  e->about.kind = TRAIN_VECTORS_QUERY;
  return CORE_OK;
}

static core_status resolve_key(train_embedder *e, const char *key) {
  bool connector = e->settings->model.kind == TRAIN_KIND_CONNECTOR;
  TRY(find_modality(e, key, &e->modality));
  e->toward = -1;
  e->direction = connector ? find_direction(e->settings, -1, e->modality) : -1;
  CHECK(!connector || e->direction >= 0, CORE_ERR_CONFIG,
        "the checkpoint has no keys of '%s': no direction was trained toward it", key);
  e->about.kind = connector ? TRAIN_VECTORS_KEY : TRAIN_VECTORS_EMBEDDING;
  return CORE_OK;
}

core_status train_embed_resolve_priv(train_embedder *e) {
  const train_embed_options *o = &e->options;
  CHECK(!o->key != !o->query, CORE_ERR_USAGE, "expected either --key MODALITY or --query FROM:TOWARD");
  if (o->query)
    TRY(resolve_query(e, o->query));
  else
    TRY(resolve_key(e, o->key));
  snprintf(e->about.modality, CORE_NAME, "%s", e->settings->data.modalities[e->modality].name);
  if (e->toward >= 0)
    snprintf(e->about.toward, CORE_NAME, "%s", e->settings->data.modalities[e->toward].name);
  return CORE_OK;
}

/* ---- shards ---- */

/* A directory of shards is taken as it is; in one of splits, the split that validates unless told. */
static core_status find_shards(train_embedder *e) {
  const train_embed_options *o = &e->options;
  char shard[4608];
  const char *directory = o->directory ? o->directory : e->settings->data.path;
  CHECK(strlen(directory) < sizeof e->directory, CORE_ERR_ARGUMENT, "the path of the shards is too long");
  CHECK(!o->split || strlen(o->split) < CORE_NAME, CORE_ERR_ARGUMENT, "the name of the split is too long");
  snprintf(e->directory, sizeof e->directory, "%s", directory);
  snprintf(shard, sizeof shard, "%s/%s-00000.h5", directory, e->about.modality);
  bool flat = !o->split && core_file_exists(shard);
  snprintf(e->split, sizeof e->split, "%s", o->split ? o->split : flat ? "." : e->settings->data.validation);
  return CORE_OK;
}

static core_status open_set(train_embedder *e) {
  const char *name = e->about.modality;
  TRY(train_embed_resolve_priv(e));
  TRY(find_shards(e));
  TRY(data_set_open(e->directory, e->split, &name, 1, &e->set));
  e->samples = data_set_samples(e->set);
  CHECK(e->samples > 0, CORE_ERR_FORMAT, "%s/%s holds no samples", e->directory, e->split);
  e->block_samples = e->settings->evaluate.batch < e->samples ? e->settings->evaluate.batch : e->samples;
  e->blocks = (e->samples + e->block_samples - 1) / e->block_samples;
  e->about.rows = e->samples - data_set_modality(e->set, 0)->absent;
  e->about.dtype = CORE_FLOAT32;
  return CORE_OK;
}

/* ---- the model ---- */

/* Widths of all modalities: from the checkpoint, or (a model as it is initialised) as this one's. */
static core_status find_widths(train_embedder *e) {
  const data_modality_info *info = data_set_modality(e->set, 0);
  for (unsigned m = 0; m < e->settings->data.modalities_count; m++) {
    char name[2 * CORE_NAME];
    ckpt_tensor shift = {.shape = {info->width}};
    snprintf(name, sizeof name, "latent_shift/%s", e->settings->data.modalities[m].name);
    if (e->options.reader) TRY(ckpt_reader_find(e->options.reader, name, &shift));
    e->sizes.width[m] = shift.shape[0];
  }
  int64_t expected = e->sizes.width[e->modality];
  CHECK(info->width == expected, CORE_ERR_MISMATCH,
        "'%s' is %lld wide in %s/%s, the checkpoint was trained with %lld", info->name,
        (long long)info->width, e->directory, e->split, (long long)expected);
  return CORE_OK;
}

static core_status find_sizes(train_embedder *e) {
  const data_modality_info *info = data_set_modality(e->set, 0);
  const train_modality_settings *modality = &e->settings->data.modalities[e->modality];
  int32_t m = e->modality;
  TRY(find_widths(e));
  CHECK(modality->positions != TRAIN_POSITIONS_LEARNED || info->longest <= modality->length,
        CORE_ERR_MISMATCH,
        "the longest sample of %s/%s has %lld tokens of '%s', the checkpoint %lld positions", e->directory,
        e->split, (long long)info->longest, info->name, (long long)modality->length);
  e->sizes.segments[m] = e->block_samples;
  e->sizes.tokens[m] = data_set_most_rows(e->set, 0, e->block_samples);
  e->sizes.longest[m] = info->longest;
  e->sizes.latent_bytes[m] = core_dtype_size(info->dtype);
  return CORE_OK;
}

static core_status load(train_embedder *e) {
  train_session *session = e->session;
  session->env.step = e->options.step;
  if (e->options.reader) TRY(train_source_model(e->control, e->options.reader, session->model));
  return CORE_OK;
}

/* Without a checkpoint nothing was measured: latents pass as they are. */
static core_status stand_in(train_embedder *e) {
  for (unsigned m = 0; m < e->settings->data.modalities_count && !e->options.reader; m++) {
    train_connector_layer *layer = &e->session->model->connector[m];
    for (int64_t i = 0; i < layer->width; i++) {
      ((core_real *)layer->shift.host)[i] = 0;
      ((core_real *)layer->scale.host)[i] = 1;
    }
    TRY(train_mirror_up(&e->session->env, &layer->shift, layer->width));
    TRY(train_mirror_up(&e->session->env, &layer->scale, layer->width));
  }
  return CORE_OK;
}

static core_status take_memory(train_embedder *e) {
  size_t M = e->settings->data.modalities_count;
  size_t numbers = (size_t)e->block_samples * (size_t)e->session->model->Z;
  e->about.width = e->session->model->Z;
  e->part = calloc(M, sizeof *e->part);
  e->real = malloc(numbers * sizeof *e->real);
  e->rows = malloc(numbers * sizeof *e->rows);
  CHECK(e->part && e->real && e->rows, CORE_ERR_MEMORY, "no memory for blocks of %lld vectors",
        (long long)e->block_samples);
  TRY(stand_in(e));
  return CORE_OK;
}

static core_status open_all(train_embedder *e) {
  const train_embed_options *o = &e->options;
  train_session_options session = {
      .config = o->config, .comm = o->comm, .purpose = TRAIN_PURPOSE_EVALUATE, .sizes = &e->sizes};
  TRY(comm_agree(e->control, open_set(e)));
  TRY(comm_agree_value(e->control, "the list of shards", data_set_fingerprint(e->set)));
  TRY(comm_agree(e->control, find_sizes(e)));
  if (comm_rank(e->control) == 0)
    TRY(comm_agree(e->control, train_embed_index_priv(e)));
  else
    TRY(comm_agree(e->control, CORE_OK));
  TRY(comm_broadcast(e->control, 0, &e->about.rows, sizeof e->about.rows));
  TRY(train_session_open(&session, &e->session));
  TRY(load(e));
  TRY(comm_agree(e->control, take_memory(e)));
  return CORE_OK;
}

core_status train_embedder_open(const train_embed_options *options, train_embedder **out) {
  train_embedder *e = calloc(1, sizeof *e);
  CHECK(e, CORE_ERR_MEMORY, "no memory for the embedder");
  e->options = *options;
  e->settings = core_config_data(options->config);
  e->control = comm_control_group(options->comm);
  e->about.checkpoint = options->reader ? ckpt_reader_content_hash(options->reader) : 0;
  e->about.step = options->step;
  core_status status = open_all(e);
  if (status != CORE_OK) {
    train_embedder_close(e);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = e;
  return CORE_OK;
}

void train_embedder_close(train_embedder *e) {
  if (!e) return;
  data_stream_close(e->stream);
  train_session_close(e->session);
  data_set_close(e->set);
  free(e->block_row);
  free(e->id);
  free(e->label);
  free(e->present);
  free(e->part);
  free(e->real);
  free(e->rows);
  free(e);
}

const train_vectors_about *train_embedder_about(const train_embedder *embedder) {
  return &embedder->about;
}

int64_t train_embedder_samples(const train_embedder *embedder) {
  return embedder->samples;
}

const uint64_t *train_embedder_ids(const train_embedder *embedder) {
  return embedder->id;
}
