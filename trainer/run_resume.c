/* Where a run begins: at its own newest checkpoint, at one that is named, or anew, perhaps with the
 * parameters of another. */
#include "trainer/run_impl.h"

#include <limits.h> /* PATH_MAX */
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "trainer/source.h"

/* A changed configuration is the user's right, but some changes deserve a word. */
static void compare_config(const train_run_state *r, const char *stored, const char *path) {
  core_config *old = NULL;
  if (strcmp(stored, core_config_text(r->env->config)) == 0) return;
  LOG_INFO("the configuration differs from the one stored in %s; the present one holds", path);
  if (core_config_load(train_settings_spec(), "the stored configuration", stored, NULL, 0, &old) != CORE_OK)
    return;
  const train_settings *before = core_config_data(old);
  if (before->run.seed != r->settings->run.seed || before->data.shuffle != r->settings->data.shuffle ||
      before->data.batches != r->settings->data.batches ||
      before->data.incomplete != r->settings->data.incomplete)
    LOG_WARNING(
        "run.seed, data.shuffle, data.batches or data.incomplete has changed: the rest of this epoch comes "
        "in another order, so some of its "
        "samples are seen twice and some not at all");
  core_config_destroy(old);
}

static core_status check_meta(const train_run_state *r, const train_state_meta *meta, const char *path) {
  uint64_t now = data_set_fingerprint(r->session->training);
  CHECK(meta->fingerprint == now, CORE_ERR_MISMATCH,
        "the training shards are not those of the checkpoint %s (fingerprint %016llx, now %016llx): the "
        "place in the "
        "data would mean nothing",
        path, (unsigned long long)meta->fingerprint, (unsigned long long)now);
  compare_config(r, meta->config, path);
  return CORE_OK;
}

bool train_run_saves_trained_priv(const train_run_state *r) {
  return r->settings->checkpoint.contents == TRAIN_CONTENTS_TRAINED;
}

static core_status load_tensors(train_run_state *r, const train_source *source) {
  train_state_tensors wanted;
  TRY(comm_agree(r->env->control, train_run_saves_trained_priv(r)
                                      ? train_base_resume(r->session->model, source, &r->base)
                                      : CORE_OK));
  TRY(comm_agree(r->env->control, train_state_list(r->session->model, &r->session->stepper.alternation,
                                                   TRAIN_STATE_LOAD, &wanted)));
  train_state_match(r->session->model, source, &wanted);
  core_status status = ckpt_reader_threads(source->reader[0], (int32_t)r->settings->checkpoint.threads);
  if (status == CORE_OK) status = train_source_load(source, wanted.list, wanted.count);
  train_state_free(&wanted);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  TRY(comm_agree(r->env->control, train_state_loaded(r->session->model)));
  return CORE_OK;
}

static core_status load(train_run_state *r, ckpt_reader *reader) {
  train_state_meta meta;
  TRY(train_state_meta_read(ckpt_reader_meta(reader), &meta));
  core_status status = check_meta(r, &meta, ckpt_reader_path(reader));
  free(meta.config);
  TRY(comm_agree(r->env->control, status));
  train_source source;
  TRY(train_source_open(r->env->control, reader, &source));
  status = load_tensors(r, &source);
  train_source_close(&source);
  TRY(status);
  r->env->step = meta.step;
  r->position = meta.position;
  meta.stopping.patience = r->stopping.patience; /* the present configuration's */
  meta.stopping.min_delta = r->stopping.min_delta;
  r->stopping = meta.stopping;
  LOG_INFO("resumed at step %lld from %s (written by %lld ranks, expert-parallel size %lld)",
           (long long)meta.step, ckpt_reader_path(reader), (long long)meta.ranks,
           (long long)meta.expert_ranks);
  return CORE_OK;
}

static bool same_place(const char *checkpoint, const char *directory) {
  char one[PATH_MAX], other[PATH_MAX];
  if (!realpath(checkpoint, one) || !realpath(directory, other)) return false;
  char *slash = strrchr(one, '/');
  if (slash) *slash = '\0';
  return strcmp(one, other) == 0;
}

/* Chooses between the run's own newest checkpoint and the one asked for by path. Going back inside a run
 * would leave later checkpoints that the next start would prefer: refused. A checkpoint from elsewhere is
 * where a run starts from; once it has checkpoints of its own it goes on from those, so that a restarted job
 * is not thrown back. */
static core_status choose(const train_run_state *r, const char *path, ckpt_reader **own) {
  ckpt_reader *asked = NULL;
  TRY(ckpt_reader_open(r->env->control, path, &asked));
  int32_t inside = same_place(path, r->checkpoints);
  TRY(comm_broadcast(r->env->control, 0, &inside, sizeof inside));
  if (*own && !inside) {
    LOG_INFO("%s already holds checkpoints and goes on from them, not from %s", r->checkpoints, path);
    ckpt_reader_close(asked);
    return CORE_OK;
  }
  bool back = *own && ckpt_reader_step(asked) < ckpt_reader_step(*own);
  int64_t newest = *own ? ckpt_reader_step(*own) : 0;
  ckpt_reader_close(*own);
  *own = asked;
  if (back)
    FAIL(CORE_ERR_ARGUMENT,
         "%s holds later checkpoints, the newest step-%08lld; remove them, or resume %s in another "
         "run.directory",
         r->checkpoints, (long long)newest, path);
  return CORE_OK;
}

static core_status find_checkpoint(const train_run_state *r, const char *resume, ckpt_reader **reader) {
  TRY(ckpt_reader_newest(r->env->control, r->checkpoints, (int32_t)r->settings->checkpoint.threads, reader));
  if (strcmp(resume, "auto") == 0) return CORE_OK;
  if (strcmp(resume, "never") != 0) {
    TRY(choose(r, resume, reader));
    return CORE_OK;
  }
  CHECK(!*reader, CORE_ERR_ARGUMENT,
        "%s already holds checkpoints; use --resume auto, or another run.directory", r->checkpoints);
  return CORE_OK;
}

/* Keeps of `wanted` what the checkpoint has. Equal name and another shape is no new parameter but a mistake.
 */
static core_status keep_known(const train_source *source, train_state_tensors *wanted, train_begun *begun) {
  int32_t kept = 0;
  size_t used = 0;
  begun->fresh = calloc((size_t)wanted->count + 1, CORE_NAME);
  CHECK(begun->fresh, CORE_ERR_MEMORY, "no memory for the names of %d tensors", wanted->count);
  for (int32_t i = 0; i < wanted->count; i++) {
    ckpt_tensor found;
    if (!train_source_find(source, wanted->list[i].name, &found)) {
      begun->fresh_count++;
      used += (size_t)snprintf(begun->fresh + used, CORE_NAME, "%s\n", wanted->list[i].name);
    } else {
      wanted->list[kept++] = wanted->list[i];
    }
  }
  wanted->count = kept;
  return CORE_OK;
}

/* A new run with the parameters of another: what that one has is taken (its standardisation too), what it
 * lacks is initialised, the optimizer begins anew. */
static core_status take_from(train_run_state *r, const train_source *source, const char *path) {
  train_state_tensors wanted = {0};
  TRY(comm_agree(r->env->control, train_run_saves_trained_priv(r)
                                      ? train_base_begin(r->session->model, source, &r->base)
                                      : CORE_OK));
  core_status status =
      comm_agree(r->env->control, train_state_list(r->session->model, NULL, TRAIN_STATE_LOAD_MODEL, &wanted));
  if (status == CORE_OK) status = comm_agree(r->env->control, keep_known(source, &wanted, &r->begun));
  if (status == CORE_OK) status = train_source_load(source, wanted.list, wanted.count);
  if (status == CORE_OK) status = comm_agree(r->env->control, train_state_loaded(r->session->model));
  if (status == CORE_OK)
    LOG_INFO("began with %d tensors of %s; %lld are new", wanted.count, path,
             (long long)r->begun.fresh_count);
  train_state_free(&wanted);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status begin_from(train_run_state *r, const char *path) {
  ckpt_reader *reader = NULL;
  train_source source = {.count = 0};
  TRY(train_session_standardise(r->session));
  TRY(ckpt_reader_open(r->env->control, path, &reader));
  snprintf(r->begun.path, sizeof r->begun.path, "%s", path);
  r->begun.step = ckpt_reader_step(reader);
  r->begun.content = ckpt_reader_content_hash(reader);
  core_status status = train_source_open(r->env->control, reader, &source);
  if (status == CORE_OK) status = take_from(r, &source, path);
  train_source_close(&source);
  ckpt_reader_close(reader);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status start(train_run_state *r, const char *from) {
  if (!from && train_run_saves_trained_priv(r))
    return core_config_refuse(r->env->config, "checkpoint.contents",
                              "what is frozen stays in the checkpoint that a run begins with: expected all, "
                              "or --from CHECKPOINT");
  TRY(from ? begin_from(r, from) : train_session_standardise(r->session));
  return CORE_OK;
}

core_status train_run_start_or_resume_priv(train_run_state *r, const char *resume, const char *from) {
  ckpt_reader *reader = NULL;
  core_status status = find_checkpoint(r, resume, &reader);
  if (status == CORE_OK) status = reader ? load(r, reader) : start(r, from);
  int32_t own = status == CORE_OK && reader && same_place(ckpt_reader_path(reader), r->checkpoints);
  ckpt_reader_close(reader);
  if (status == CORE_OK)
    status = comm_broadcast(r->env->control, 0, &own, sizeof own); /* one answer for all */
  if (own) r->saved_step = r->env->step;
  r->resumed = own;
  if (own && r->settings->checkpoint.keep_best) ckpt_writer_spare(r->writer, r->stopping.best_step);
  if (own) train_run_mark_best_priv(r); /* a crash may have come between publishing and marking */
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}
