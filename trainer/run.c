/* Outline: open the session, take the run directory, resume or start, loop. Ranks agree once a step, when
 * their batch is ready: on errors, on the request to stop, and on whether the oldest checkpoint in progress
 * is written everywhere. */
#include "trainer/run_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/clock.h"
#include "core/log.h"
#include "core/stop.h"

/* What ranks agree on before each step. */
typedef struct agreement {
  bool stop, saved; /* any rank was asked to stop; the oldest pending save is written on all ranks */
} agreement;

static core_status agree(train_run_state *r, core_status status, agreement *out) {
  bool stopped = core_stop_requested() || status == CORE_ERR_STOPPED;
  int64_t flags[3] = {status != CORE_OK && status != CORE_ERR_STOPPED, stopped,
                      !ckpt_writer_ready(r->writer)};
  TRY(comm_all_reduce(r->env->control, COMM_MAX, CORE_INT64, flags, 3));
  if (flags[0]) TRY(comm_agree(r->env->control, status == CORE_ERR_STOPPED ? CORE_OK : status));
  out->stop = flags[1];
  out->saved = !flags[2];
  return CORE_OK;
}

static void show_progress(train_run_state *r, const train_report *report) {
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

static core_status judge(train_run_state *r, const train_report *report) {
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
static void after_step(train_run_state *r, const train_report *report) {
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
static core_status do_step(train_run_state *r, data_batch *batch, double started) {
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

static bool evaluation_due(const train_run_state *r) {
  int64_t step = r->env->step, interval = r->settings->evaluate.interval;
  return interval > 0 && step > 0 && step % interval == 0 && step < r->settings->run.steps;
}

static core_status save_and_evaluate_when_due(train_run_state *r) {
  const train_settings *s = r->settings;
  int64_t step = r->env->step;
  if (s->checkpoint.interval > 0 && step % s->checkpoint.interval == 0) r->save_due = true;
  if (r->save_due && step < s->run.steps) { /* the last step is saved when the run ends */
    if (s->checkpoint.busy == TRAIN_BUSY_WAIT && ckpt_writer_full(r->writer))
      TRY(train_run_settle_save_priv(r));
    r->save_due = ckpt_writer_full(r->writer);
    if (!r->save_due) TRY(train_run_warn_save_priv(r, step, train_run_begin_save_priv(r)));
  }
  if (evaluation_due(r)) TRY(train_run_evaluate_priv(r, false));
  return CORE_OK;
}

/* An agreed error ends the run; checkpoints that are being written are still worth having. */
static core_status end_with(train_run_state *r, core_status status) {
  core_error saved;
  core_error_save(&saved);
  bool whole =
      status != CORE_ERR_TIMEOUT && status != CORE_ERR_COMM; /* the ranks still understand one another */
  if (whole && train_run_settle_saves_priv(r, TRAIN_NO_STEP) != CORE_OK)
    core_error_clear(); /* the first error is the one that counts */
  (void)core_error_restore(&saved);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

static core_status loop(train_run_state *r, train_outcome *outcome) {
  train_env *env = r->env;
  r->started = core_clock_now();
  r->first_step = env->step;
  *outcome = TRAIN_FINISHED;
  /* The evaluation of the resumed step may have been interrupted; its line was cut from the metrics. */
  core_status again = evaluation_due(r) ? train_run_evaluate_priv(r, false) : CORE_OK;
  if (again != CORE_OK && again != CORE_ERR_STOPPED)
    return core_error_trace(again, __func__, __FILE__, __LINE__);
  while (env->step < r->settings->run.steps && !train_run_stops_early_priv(r)) {
    double started = core_clock_now();
    data_batch *batch = NULL;
    agreement agreed = {false, false};
    comm_note(env->comm, env->step, -1, "data");
    core_status status = data_stream_get(r->stream, &batch);
    r->waited = core_clock_now() - started;
    status = agree(r, status, &agreed);
    if (status == CORE_OK && agreed.saved && ckpt_writer_busy(r->writer))
      status = train_run_settle_save_priv(r);
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

static core_status end_run(train_run_state *r, train_outcome *outcome) {
  TRY(train_run_save_now_priv(r));
  TRY(train_run_manifest_priv(r, TRAIN_MANIFEST_END));
  if (*outcome == TRAIN_STOPPED) {
    LOG_INFO("stopped on request at step %lld; the state is saved, start again to go on",
             (long long)r->env->step);
    return CORE_OK;
  }
  if (train_run_stops_early_priv(r))
    LOG_INFO(
        "stopping early at step %lld: mean R@1 has not risen by more than %.4g %% above the %.2f %% of "
        "step %lld in %lld evaluations",
        (long long)r->env->step, 100 * r->stopping.min_delta, 100 * r->stopping.risen,
        (long long)r->stopping.risen_step, (long long)r->stopping.stale);
  if (r->settings->evaluate.at_end && r->evaluated != r->env->step) {
    core_status status = train_run_evaluate_priv(r, true);
    if (status == CORE_ERR_STOPPED) *outcome = TRAIN_STOPPED;
    if (status != CORE_OK && status != CORE_ERR_STOPPED)
      return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static void report_end(const train_run_state *r) {
  LOG_INFO("done: %lld steps in %.1f s; peak memory of rank 0: %.1f MiB",
           (long long)(r->env->step - r->first_step), core_clock_now() - r->started,
           train_run_peak_mebibytes_priv());
}

core_status train_run(const train_run_options *options, train_outcome *outcome) {
  train_run_state *r = calloc(1, sizeof *r);
  CHECK(r, CORE_ERR_MEMORY, "no memory for the run");
  r->lock = -1;
  r->saved_step = r->evaluated = -1;
  core_status status = train_run_open_priv(r, options);
  if (status == CORE_OK) status = loop(r, outcome);
  if (status == CORE_OK) status = end_run(r, outcome);
  if (status == CORE_OK) report_end(r);
  core_error saved;
  core_error_save(&saved);
  train_run_close_priv(r);
  free(r);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}
