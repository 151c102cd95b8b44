/* Outline: open the session, take the run directory, resume or start, loop. Ranks agree once a step, when
 * their batch is ready: on errors, on the request to stop, and on whether the checkpoint in progress is
 * written everywhere. */
#include "trainer/run.h"

#include <fcntl.h>
#include <limits.h> /* PATH_MAX */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h> /* flock */
#include <sys/resource.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/log.h"
#include "core/stop.h"
#include "trainer/caption.h"
#include "trainer/health.h"
#include "trainer/metrics.h"
#include "trainer/session.h"
#include "trainer/source.h"
#include "trainer/state.h"

enum { PATH = 1024 };

typedef struct run {
  train_session *session;
  train_env *env;
  const train_settings *settings;
  char directory[PATH], checkpoints[PATH];
  int lock;
  data_stream *stream;
  data_position position;
  int64_t saved_step; /* step of the newest checkpoint begun, -1 none */
  bool save_due;      /* since a step when the writer was still at the save before */
  int64_t failures;   /* non-finite steps in a row */
  train_early_stopping stopping;
  int64_t evaluated;         /* step of the last evaluation of this process, -1 none */
  train_state_tensors saved; /* what the writer writes */
  train_base base;           /* of a run that saves what is trained alone */
  ckpt_writer *writer;
  train_metrics *metrics;   /* rank 0 */
  double process_mebibytes; /* resident beside what is planned: libraries, MPI, the index of the shards */
  bool metrics_failed;      /* the last line could not be written */
  double started, last_line;
  int64_t first_step;
  double waited, save_seconds; /* since the last step */
  double rate_tokens;          /* tokens per second, smoothed, for the progress line */
} run;

/* ---- the run directory ---- */

static core_status take_directory(run *r) {
  char path[PATH + 32];
  TRY(core_file_make_directories(r->directory));
  TRY(core_file_make_directories(r->checkpoints));
  snprintf(path, sizeof path, "%s/lock", r->directory);
  TRY(core_file_open(path, O_RDWR | O_CREAT, &r->lock));
  if (flock(r->lock, LOCK_EX | LOCK_NB) != 0)
    FAIL(CORE_ERR_IO,
         "another process is running in %s (its lock is held); wait for it or choose another run.directory",
         r->directory);
  snprintf(path, sizeof path, "%s/log.txt", r->directory);
  TRY(core_log_open(path));
  return CORE_OK;
}

static core_status prepare_directory(run *r) {
  int32_t rank = comm_rank(r->env->world);
  TRY(comm_agree(r->env->control, rank == 0 ? take_directory(r) : CORE_OK));
  comm_options options = {.deadline = r->settings->run.deadline, .directory = r->directory};
  TRY(comm_configure(r->env->comm, &options));
  return CORE_OK;
}

/* ---- the best checkpoint ---- */

/* Shows the best step's checkpoint under its name, once it is published. What cannot be marked is tried again
 * after the next save. */
static void mark_best(const run *r) {
  if (!r->settings->checkpoint.keep_best || r->stopping.best_step < 0 || comm_rank(r->env->world) != 0)
    return;
  if (ckpt_mark_best(r->checkpoints, r->stopping.best_step) == CORE_OK) return;
  LOG_WARNING("the best checkpoint, of step %lld, cannot be marked: %s", (long long)r->stopping.best_step,
              core_error_get()->message);
  core_error_clear();
}

/* ---- resume ---- */

/* A changed configuration is the user's right, but some changes deserve a word. */
static void compare_config(const run *r, const char *stored, const char *path) {
  core_config *old = NULL;
  if (strcmp(stored, core_config_text(r->env->config)) == 0) return;
  LOG_INFO("the configuration differs from the one stored in %s; the present one holds", path);
  if (core_config_load(train_settings_spec(), "the stored configuration", stored, NULL, 0, &old) != CORE_OK)
    return;
  const train_settings *before = core_config_data(old);
  if (before->run.seed != r->settings->run.seed || before->data.shuffle != r->settings->data.shuffle)
    LOG_WARNING(
        "run.seed or data.shuffle has changed: the rest of this epoch comes in another order, so some of its "
        "samples are seen twice and some not at all");
  core_config_destroy(old);
}

static core_status check_meta(const run *r, const train_state_meta *meta, const char *path) {
  uint64_t now = data_set_fingerprint(r->session->training);
  CHECK(meta->fingerprint == now, CORE_ERR_MISMATCH,
        "the training shards are not those of the checkpoint %s (fingerprint %016llx, now %016llx): the "
        "place in the "
        "data would mean nothing",
        path, (unsigned long long)meta->fingerprint, (unsigned long long)now);
  compare_config(r, meta->config, path);
  return CORE_OK;
}

static bool saves_trained(const run *r) {
  return r->settings->checkpoint.contents == TRAIN_CONTENTS_TRAINED;
}

static core_status load_tensors(run *r, const train_source *source) {
  train_state_tensors wanted;
  TRY(comm_agree(r->env->control,
                 saves_trained(r) ? train_base_resume(r->session->model, source, &r->base) : CORE_OK));
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

static core_status load(run *r, ckpt_reader *reader) {
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
static core_status choose(const run *r, const char *path, ckpt_reader **own) {
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

static core_status find_checkpoint(const run *r, const char *resume, ckpt_reader **reader) {
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
static core_status keep_known(const train_source *source, train_state_tensors *wanted, int64_t *fresh) {
  int32_t kept = 0;
  for (int32_t i = 0; i < wanted->count; i++) {
    ckpt_tensor found;
    if (!train_source_find(source, wanted->list[i].name, &found)) {
      if (++*fresh <= 8) LOG_INFO("new: %s", wanted->list[i].name);
    } else {
      wanted->list[kept++] = wanted->list[i];
    }
  }
  wanted->count = kept;
  return CORE_OK;
}

/* A new run with the parameters of another: what that one has is taken (its standardisation too), what it
 * lacks is initialised, the optimizer begins anew. */
static core_status take_from(run *r, const train_source *source, const char *path) {
  train_state_tensors wanted = {0};
  int64_t fresh = 0;
  TRY(comm_agree(r->env->control,
                 saves_trained(r) ? train_base_begin(r->session->model, source, &r->base) : CORE_OK));
  core_status status =
      comm_agree(r->env->control, train_state_list(r->session->model, NULL, TRAIN_STATE_LOAD_MODEL, &wanted));
  if (status == CORE_OK) status = comm_agree(r->env->control, keep_known(source, &wanted, &fresh));
  if (status == CORE_OK) status = train_source_load(source, wanted.list, wanted.count);
  if (status == CORE_OK) status = comm_agree(r->env->control, train_state_loaded(r->session->model));
  if (status == CORE_OK)
    LOG_INFO("began with %d tensors of %s; %lld are new", wanted.count, path, (long long)fresh);
  train_state_free(&wanted);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status begin_from(run *r, const char *path) {
  ckpt_reader *reader = NULL;
  train_source source = {.count = 0};
  TRY(train_session_standardise(r->session));
  TRY(ckpt_reader_open(r->env->control, path, &reader));
  core_status status = train_source_open(r->env->control, reader, &source);
  if (status == CORE_OK) status = take_from(r, &source, path);
  train_source_close(&source);
  ckpt_reader_close(reader);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status start(run *r, const char *from) {
  if (!from && saves_trained(r))
    return core_config_refuse(r->env->config, "checkpoint.contents",
                              "what is frozen stays in the checkpoint that a run begins with: expected all, "
                              "or --from CHECKPOINT");
  TRY(from ? begin_from(r, from) : train_session_standardise(r->session));
  return CORE_OK;
}

static core_status start_or_resume(run *r, const char *resume, const char *from) {
  ckpt_reader *reader = NULL;
  core_status status = find_checkpoint(r, resume, &reader);
  if (status == CORE_OK) status = reader ? load(r, reader) : start(r, from);
  int32_t own = status == CORE_OK && reader && same_place(ckpt_reader_path(reader), r->checkpoints);
  ckpt_reader_close(reader);
  if (status == CORE_OK)
    status = comm_broadcast(r->env->control, 0, &own, sizeof own); /* one answer for all */
  if (own) r->saved_step = r->env->step;
  if (own && r->settings->checkpoint.keep_best) ckpt_writer_spare(r->writer, r->stopping.best_step);
  if (own) mark_best(r); /* a crash may have come between publishing and marking */
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- saving ---- */

static core_status begin_save(run *r) {
  char *json = NULL;
  double start = core_clock_now();
  train_state_meta meta = {.step = r->env->step,
                           .position = r->position,
                           .fingerprint = data_set_fingerprint(r->session->training),
                           .ranks = r->env->layout.ranks,
                           .expert_ranks = r->env->layout.expert_ranks,
                           .stopping = r->stopping,
                           .config = (char *)(uintptr_t)core_config_text(r->env->config)};
  if (saves_trained(r)) {
    meta.base = r->base;
    train_base_relate(&meta.base, r->directory);
  }
  comm_note(r->env->comm, r->env->step, -1, "checkpoint");
  TRY(train_state_meta_write(&meta, &json));
  core_status status = ckpt_writer_begin(r->writer, r->env->step, json);
  free(json);
  r->save_seconds += core_clock_now() - start;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  r->saved_step = r->env->step;
  return CORE_OK;
}

static core_status commit_save(run *r) {
  if (!ckpt_writer_busy(r->writer)) return CORE_OK;
  double start = core_clock_now();
  comm_note(r->env->comm, r->env->step, -1, "checkpoint");
  core_status status = ckpt_writer_commit(r->writer);
  r->save_seconds += core_clock_now() - start;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  ckpt_figures figures;
  ckpt_writer_figures(r->writer, &figures);
  LOG_INFO("saved %s/step-%08lld (%.1f MiB of this rank, %.2f s in the background)", r->checkpoints,
           (long long)r->saved_step, (double)figures.stored_bytes / 1048576, figures.write_seconds);
  mark_best(r);
  return CORE_OK;
}

/* A save that fails does not stop training: the previous checkpoint is still there. But ranks that no longer
 * understand one another cannot go on. */
static core_status warn_save(run *r, int64_t step, core_status status) {
  if (status == CORE_OK) return CORE_OK;
  if (status == CORE_ERR_TIMEOUT || status == CORE_ERR_COMM)
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  LOG_WARNING("the checkpoint of step %lld failed, training goes on; the previous one is kept: %s",
              (long long)step, core_error_get()->message);
  r->saved_step = -1;
  return CORE_OK;
}

/* Now and to the end; used when the run ends. */
static core_status save_now(run *r) {
  if (ckpt_writer_busy(r->writer)) TRY(warn_save(r, r->saved_step, commit_save(r)));
  if (r->saved_step == r->env->step) return CORE_OK;
  TRY(begin_save(r));
  TRY(commit_save(r));
  return CORE_OK;
}

/* ---- evaluation ---- */

/* Adaptive alternation follows the recall of each direction. */
static void adapt_schedule(run *r, const train_retrieval *result) {
  double recall[TRAIN_MAX_DIRECTIONS] = {0};
  const train_alignment *a = &r->session->model->alignment;
  for (int32_t d = 0; d < a->directions; d++)
    recall[d] = train_retrieval_recall(result, a->direction[d].from, a->direction[d].toward, 0);
  train_alternation_adapt(&r->session->stepper.alternation, recall);
}

/* The best step must have a checkpoint: begun already where this is a step that is saved. */
static core_status follow(run *r, double recall) {
  bool keeps = r->settings->checkpoint.keep_best;
  /* an older save, perhaps of the best so far, is published and marked before another is the best */
  if (keeps && ckpt_writer_busy(r->writer) && r->saved_step != r->env->step)
    TRY(warn_save(r, r->saved_step, commit_save(r)));
  bool best = train_early_stopping_observe(&r->stopping, r->env->step, recall);
  if (!best || !keeps) return CORE_OK;
  ckpt_writer_spare(r->writer, r->env->step); /* also where it cannot be marked */
  if (r->saved_step != r->env->step) {
    TRY(warn_save(r, r->env->step, begin_save(r)));
  } else if (!ckpt_writer_busy(r->writer)) {
    mark_best(r);
  }
  return CORE_OK;
}

static bool stops_early(const run *r) {
  return train_early_stopping_due(&r->stopping);
}

static core_status evaluate_captions(run *r) {
  train_caption result;
  TRY(train_caption_run(r->session, &result));
  r->evaluated = r->env->step;
  LOG_INFO("step %lld: loss of %lld response tokens of %s %.4f (%.1f s)", (long long)r->env->step,
           (long long)result.predictions, r->settings->data.validation, result.loss, result.seconds);
  if (r->metrics && train_metrics_caption(r->metrics, r->env->step, &result) != CORE_OK)
    LOG_WARNING("the evaluation is not in the metrics: %s", core_error_get()->message);
  return CORE_OK;
}

/* table: print it, if the run prints one at its end and this is it. */
static core_status evaluate(run *r, bool table) {
  if (r->settings->model.kind == TRAIN_KIND_DECODER) return evaluate_captions(r);
  train_retrieval *result = malloc(sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = train_retrieval_run(r->session, result);
  if (status == CORE_OK) {
    double recall = train_retrieval_mean(result);
    r->evaluated = r->env->step;
    adapt_schedule(r, result);
    status = follow(r, recall);
    table = table || (stops_early(r) && r->settings->evaluate.at_end);
    LOG_INFO("step %lld: mean R@1 on %s %.2f %% (%.1f s)%s", (long long)r->env->step,
             r->settings->data.validation, 100 * recall, result->seconds,
             r->stopping.best_step == r->env->step ? ", the best so far" : "");
    if (r->metrics) {
      if (train_metrics_evaluation(r->metrics, r->env->step, result) != CORE_OK)
        LOG_WARNING("the evaluation is not in the metrics: %s", core_error_get()->message);
      if (table) train_retrieval_print(result, r->settings, stdout);
      if (table) train_health_print(&r->session->model->sums, r->settings, stdout);
    }
  }
  free(result);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- the loop ---- */

/* What ranks agree on before each step. */
typedef struct agreement {
  bool stop, saved; /* any rank was asked to stop; the save in progress is written on all ranks */
} agreement;

static core_status agree(run *r, core_status status, agreement *out) {
  bool stopped = core_stop_requested() || status == CORE_ERR_STOPPED;
  int64_t flags[3] = {status != CORE_OK && status != CORE_ERR_STOPPED, stopped,
                      !ckpt_writer_ready(r->writer)};
  TRY(comm_all_reduce(r->env->control, COMM_MAX, CORE_INT64, flags, 3));
  if (flags[0]) TRY(comm_agree(r->env->control, status == CORE_ERR_STOPPED ? CORE_OK : status));
  out->stop = flags[1];
  out->saved = !flags[2];
  return CORE_OK;
}

static void show_progress(run *r, const train_report *report) {
  const train_settings *s = r->settings;
  int64_t tokens = 0, done = report->step - r->first_step;
  double now = core_clock_now(), elapsed = now - r->started;
  for (int32_t c = 0; c < train_settings_classes(s); c++) tokens += report->tokens[c];
  r->rate_tokens = r->rate_tokens == 0 ? (double)tokens / report->wall
                                       : 0.9 * r->rate_tokens + 0.1 * (double)tokens / report->wall;
  double left = done > 0 ? elapsed / (double)done * (double)(s->run.steps - report->step) : 0;
  char line[256];
  snprintf(line, sizeof line,
           "step %lld/%lld  loss %.4f  norm %.3g  rate %.3g  %.1fk tokens/s  wait %.1f %%  ETA %d:%02d",
           (long long)report->step, (long long)s->run.steps, report->loss, report->norm, report->rate,
           r->rate_tokens / 1000, 100 * report->seconds[TRAIN_PHASE_DATA] / report->wall, (int)left / 60,
           (int)left % 60);
  bool last = report->step == s->run.steps, due = report->step % s->run.log == 0 || last;
  if (core_log_is_terminal() && !last) {
    if (now - r->last_line > 0.1) core_log_progress("%s", line);
    if (now - r->last_line > 0.1) r->last_line = now;
  } else if (due) {
    LOG_INFO("%s", line);
  }
}

static core_status judge(run *r, const train_report *report) {
  r->failures = report->skipped ? r->failures + 1 : 0;
  if (!report->skipped) return CORE_OK;
  bool stop =
      r->settings->run.non_finite == TRAIN_NON_FINITE_STOP || r->failures >= r->settings->run.failures;
  CHECK(!stop, CORE_ERR_NON_FINITE,
        "step %lld: loss %g, gradient norm %g; nothing was updated (%lld such steps in a row)",
        (long long)report->step, report->loss, report->norm, (long long)r->failures);
  LOG_WARNING("step %lld: loss %g, gradient norm %g: the step is skipped", (long long)report->step,
              report->loss, report->norm);
  return CORE_OK;
}

/* Metrics that cannot be written (a full disk) are missed, but they are not worth the run. */
static void after_step(run *r, const train_report *report) {
  if (!r->metrics) return;
  show_progress(r, report);
  const train_stepper *stepper = &r->session->stepper;
  bool connector = r->settings->model.kind == TRAIN_KIND_CONNECTOR;
  core_status status = train_metrics_step(
      r->metrics, report, connector ? &stepper->alignment.contrastive : &stepper->contrastive, &r->position);
  if (status != CORE_OK && !r->metrics_failed)
    LOG_WARNING("metrics are being lost: %s", core_error_get()->message);
  r->metrics_failed = status != CORE_OK;
}

/* One step with a batch in hand. A failure here is local and in the middle of collectives: it ends the job.
 */
static core_status do_step(run *r, data_batch *batch, double started) {
  train_env *env = r->env;
  train_report report = {0};
  memset(env->seconds, 0, sizeof env->seconds);
  core_status status = train_stepper_run(&r->session->stepper, batch, &report);
  if (status != CORE_OK && comm_size(env->world) > 1) comm_fail_stop(env->comm, status);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  r->position = batch->after;
  env->step++;
  env->seconds[TRAIN_PHASE_DATA] = r->waited;
  env->seconds[TRAIN_PHASE_CHECKPOINT] = r->save_seconds;
  r->save_seconds = 0;
  memcpy(report.seconds, env->seconds, sizeof report.seconds);
  report.wall = core_clock_now() - started;
  after_step(r, &report);
  TRY(judge(r, &report));
  return CORE_OK;
}

static bool evaluation_due(const run *r) {
  int64_t step = r->env->step, interval = r->settings->evaluate.interval;
  return interval > 0 && step > 0 && step % interval == 0 && step < r->settings->run.steps;
}

static core_status save_and_evaluate_when_due(run *r) {
  const train_settings *s = r->settings;
  int64_t step = r->env->step;
  if (s->checkpoint.interval > 0 && step % s->checkpoint.interval == 0) r->save_due = true;
  if (r->save_due && step < s->run.steps) { /* the last step is saved when the run ends */
    if (s->checkpoint.busy == TRAIN_BUSY_WAIT && ckpt_writer_busy(r->writer))
      TRY(warn_save(r, r->saved_step, commit_save(r)));
    r->save_due = ckpt_writer_busy(r->writer);
    if (!r->save_due) TRY(warn_save(r, step, begin_save(r)));
  }
  if (evaluation_due(r)) TRY(evaluate(r, false));
  return CORE_OK;
}

/* An agreed error ends the run; a checkpoint that is being written is still worth having. */
static core_status end_with(run *r, core_status status) {
  core_error saved;
  core_error_save(&saved);
  bool whole =
      status != CORE_ERR_TIMEOUT && status != CORE_ERR_COMM; /* the ranks still understand one another */
  if (whole && ckpt_writer_busy(r->writer) && warn_save(r, r->saved_step, commit_save(r)) != CORE_OK)
    core_error_clear(); /* the first error is the one that counts */
  (void)core_error_restore(&saved);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

static core_status loop(run *r, train_outcome *outcome) {
  train_env *env = r->env;
  r->started = core_clock_now();
  r->first_step = env->step;
  *outcome = TRAIN_FINISHED;
  /* The evaluation of the resumed step may have been interrupted; its line was cut from the metrics. */
  core_status again = evaluation_due(r) ? evaluate(r, false) : CORE_OK;
  if (again != CORE_OK && again != CORE_ERR_STOPPED)
    return core_error_trace(again, __func__, __FILE__, __LINE__);
  while (env->step < r->settings->run.steps && !stops_early(r)) {
    double started = core_clock_now();
    data_batch *batch = NULL;
    agreement agreed = {false, false};
    comm_note(env->comm, env->step, -1, "data");
    core_status status = data_stream_get(r->stream, &batch);
    r->waited = core_clock_now() - started;
    status = agree(r, status, &agreed);
    if (status == CORE_OK && agreed.saved && ckpt_writer_busy(r->writer))
      status = warn_save(r, r->saved_step, commit_save(r));
    if (status == CORE_OK && !agreed.stop) status = do_step(r, batch, started);
    if (batch) data_stream_put(r->stream, batch);
    if (status != CORE_OK) return end_with(r, status);
    if (agreed.stop) {
      *outcome = TRAIN_STOPPED;
      return CORE_OK;
    }
    status = save_and_evaluate_when_due(r);
    if (status == CORE_ERR_STOPPED) continue; /* the top of the loop sees the request */
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

/* ---- start and end ---- */

static double peak_mebibytes(void) {
  struct rusage usage;
  return getrusage(RUSAGE_SELF, &usage) == 0 ? (double)usage.ru_maxrss / 1024 : 0;
}

/* What an item of each modality, or of each direction, passes. */
static core_status describe_arithmetic(const run *r) {
  train_arithmetic arithmetic;
  TRY(train_session_arithmetic(r->session, &arithmetic));
  for (int32_t i = 0; i < arithmetic.paths; i++) {
    char text[4 * CORE_NAME];
    train_path_describe(&arithmetic.path[i], text, sizeof text);
    LOG_INFO("forward pass of %s", text);
  }
  train_arithmetic_free(&arithmetic);
  return CORE_OK;
}

static core_status describe(run *r) {
  char layout[512];
  train_memory memory = train_session_memory(r->session);
  train_counts counts;
  TRY(train_session_counts(r->session, &counts));
  train_layout_describe(&r->env->layout, r->settings, layout, sizeof layout);
  int64_t bytes = ckpt_writer_bytes(r->writer) + data_stream_bytes(r->stream);
  bool device = !r->session->arenas.host_access;
  LOG_INFO("%s; %s, %s, %d threads a rank, transport %s%s%s", layout, r->env->ops->device->name,
           core_dtype_text(r->env->active), r->env->ops->context_threads(r->env->kern),
           comm_transport_name(r->env->world), device ? ", between devices " : "",
           device ? comm_device_transport_name(r->env->world) : "");
  LOG_INFO("%.2f M parameters, %.2f M active, %.2f M frozen; %lld training samples, %lld held out",
           (double)counts.total / 1e6, (double)counts.active / 1e6, (double)counts.frozen / 1e6,
           (long long)data_set_samples(r->session->training),
           (long long)(r->session->evaluation ? data_set_samples(r->session->evaluation) : 0));
  TRY(describe_arithmetic(r));
  /* The arenas' pages are all there; what is resident beside them are libraries, MPI and the index of the
   * shards. */
  double arenas = (double)memory.total / 1048576, process = r->process_mebibytes;
  LOG_INFO(
      "planned memory of rank 0: %.1f MiB (process %.1f, parameters and optimizer %.1f, activations %.1f, "
      "objective %.1f, host %.1f, kernels %.1f, data and checkpoint %.1f)",
      process + arenas + (double)bytes / 1048576, process, (double)memory.parameters / 1048576,
      (double)memory.activations / 1048576, (double)memory.objective / 1048576, (double)memory.host / 1048576,
      (double)memory.kernels / 1048576, (double)bytes / 1048576);
  return CORE_OK;
}

/* Once it is certain that this run goes on here: a refused start must leave the directory as it was. */
static core_status write_config(const run *r) {
  char path[PATH + 32];
  snprintf(path, sizeof path, "%s/config.yaml", r->directory);
  const char *text = core_config_text(r->env->config);
  TRY(core_file_replace(path, text, strlen(text)));
  return CORE_OK;
}

static core_status open_local(run *r) {
  if (comm_rank(r->env->world) == 0) TRY(write_config(r));
  if (comm_rank(r->env->world) == 0)
    TRY(train_metrics_open(r->directory, r->env->step, r->session->model, &r->metrics));
  TRY(train_session_stream(r->session, r->session->training, &r->env->layout, &r->position, true,
                           &r->stream));
  return CORE_OK;
}

static core_status open_run(run *r, const train_run_options *options) {
  const train_settings *s = core_config_data(options->config);
  bool evaluates = s->evaluate.interval > 0 || s->evaluate.at_end;
  train_session_options session = {.config = options->config,
                                   .comm = options->comm,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .training_split = s->data.train,
                                   .evaluation_split = evaluates ? s->data.validation : NULL};
  TRY(train_session_open(&session, &r->session));
  /* the arenas' pages are all there by now, streams and checkpoints are still to come */
  r->process_mebibytes = peak_mebibytes() - (double)train_session_memory(r->session).total / 1048576;
  r->env = &r->session->env;
  r->settings = s;
  train_early_stopping_make(s, &r->stopping);
  CHECK(strlen(s->run.directory) + 64 < PATH, CORE_ERR_CONFIG, "run.directory is too long");
  snprintf(r->directory, sizeof r->directory, "%s", s->run.directory);
  snprintf(r->checkpoints, sizeof r->checkpoints, "%.900s/checkpoints", s->run.directory);
  TRY(prepare_directory(r));
  TRY(comm_agree(
      r->env->control,
      train_state_list(r->session->model, &r->session->stepper.alternation,
                       saves_trained(r) ? TRAIN_STATE_SAVE_TRAINED : TRAIN_STATE_SAVE, &r->saved)));
  ckpt_options saving = {.directory = r->checkpoints,
                         .keep = (int32_t)s->checkpoint.keep,
                         .level = (int32_t)s->checkpoint.level,
                         .threads = (int32_t)s->checkpoint.threads,
                         .keep_every = s->checkpoint.keep_every};
  TRY(ckpt_writer_create(r->env->control, &saving, r->saved.list, r->saved.count, &r->writer));
  TRY(start_or_resume(r, options->resume, options->from));
  TRY(comm_agree(r->env->control, open_local(r)));
  TRY(describe(r));
  return CORE_OK;
}

static core_status end_run(run *r, train_outcome *outcome) {
  TRY(save_now(r));
  if (*outcome == TRAIN_STOPPED) {
    LOG_INFO("stopped on request at step %lld; the state is saved, start again to go on",
             (long long)r->env->step);
    return CORE_OK;
  }
  if (stops_early(r))
    LOG_INFO(
        "stopping early at step %lld: mean R@1 has not risen by more than %.4g %% above the %.2f %% of "
        "step %lld in %lld evaluations",
        (long long)r->env->step, 100 * r->stopping.min_delta, 100 * r->stopping.risen,
        (long long)r->stopping.risen_step, (long long)r->stopping.stale);
  if (r->settings->evaluate.at_end && r->evaluated != r->env->step) {
    core_status status = evaluate(r, true);
    if (status == CORE_ERR_STOPPED) *outcome = TRAIN_STOPPED;
    if (status != CORE_OK && status != CORE_ERR_STOPPED)
      return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static void report_end(const run *r) {
  LOG_INFO("done: %lld steps in %.1f s; peak memory of rank 0: %.1f MiB",
           (long long)(r->env->step - r->first_step), core_clock_now() - r->started, peak_mebibytes());
}

static void close_run(run *r) {
  core_log_progress("%s", "");
  ckpt_writer_destroy(r->writer);
  data_stream_close(r->stream);
  train_metrics_close(r->metrics);
  train_state_free(&r->saved);
  if (r->lock >= 0) close(r->lock);
  train_session_close(r->session);
  core_log_close();
}

core_status train_run(const train_run_options *options, train_outcome *outcome) {
  run *r = calloc(1, sizeof *r);
  CHECK(r, CORE_ERR_MEMORY, "no memory for the run");
  r->lock = -1;
  r->saved_step = r->evaluated = -1;
  core_status status = open_run(r, options);
  if (status == CORE_OK) status = loop(r, outcome);
  if (status == CORE_OK) status = end_run(r, outcome);
  if (status == CORE_OK) report_end(r);
  core_error saved;
  core_error_save(&saved);
  close_run(r);
  free(r);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
