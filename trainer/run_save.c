/* Saves of a run, and the name of the best one. */
#include "trainer/run_impl.h"

#include <stdlib.h>

#include "core/clock.h"
#include "core/log.h"
#include "trainer/source.h"

void train_run_mark_best_priv(const train_run_state *r) {
  if (!r->settings->checkpoint.keep_best || r->stopping.best_step < 0 || comm_rank(r->env->world) != 0)
    return;
  if (ckpt_mark_best(r->checkpoints, r->stopping.best_step) == CORE_OK) return;
  LOG_WARNING("the best checkpoint, of step %lld, cannot be marked: %s", (long long)r->stopping.best_step,
              core_error_get()->message);
  core_error_clear();
}

core_status train_run_begin_save_priv(train_run_state *r) {
  char *json = NULL;
  double start = core_clock_now();
  train_state_meta meta = {.step = r->env->step,
                           .position = r->position,
                           .fingerprint = data_set_fingerprint(r->session->training),
                           .ranks = r->env->layout.ranks,
                           .expert_ranks = r->env->layout.expert_ranks,
                           .stopping = r->stopping,
                           .config = (char *)(uintptr_t)core_config_text(r->env->config)};
  if (train_run_saves_trained_priv(r)) {
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

/* The oldest pending save. */
static core_status commit(train_run_state *r) {
  const int64_t step = ckpt_writer_oldest(r->writer);
  double start = core_clock_now();
  comm_note(r->env->comm, r->env->step, -1, "checkpoint");
  core_status status = ckpt_writer_commit(r->writer);
  r->save_seconds += core_clock_now() - start;
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  ckpt_figures figures;
  ckpt_writer_figures(r->writer, &figures);
  LOG_INFO("saved %s/step-%08lld (%.1f MiB of this rank, %.2f s in the background)", r->checkpoints,
           (long long)step, (double)figures.stored_bytes / 1048576, figures.write_seconds);
  train_run_mark_best_priv(r);
  return CORE_OK;
}

core_status train_run_warn_save_priv(train_run_state *r, int64_t step, core_status status) {
  if (status == CORE_OK) return CORE_OK;
  if (status == CORE_ERR_TIMEOUT || status == CORE_ERR_COMM)
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  LOG_WARNING("the checkpoint of step %lld failed, training goes on; the previous one is kept: %s",
              (long long)step, core_error_get()->message);
  if (r->saved_step == step) r->saved_step = -1; /* else another has been begun since */
  return CORE_OK;
}

core_status train_run_settle_save_priv(train_run_state *r) {
  const int64_t step = ckpt_writer_oldest(r->writer);
  TRY(train_run_warn_save_priv(r, step, commit(r)));
  return CORE_OK;
}

core_status train_run_settle_saves_priv(train_run_state *r, int64_t except) {
  while (ckpt_writer_busy(r->writer) && ckpt_writer_oldest(r->writer) != except)
    TRY(train_run_settle_save_priv(r));
  return CORE_OK;
}

core_status train_run_save_now_priv(train_run_state *r) {
  TRY(train_run_settle_saves_priv(r, TRAIN_NO_STEP));
  if (r->saved_step == r->env->step) return CORE_OK;
  TRY(train_run_begin_save_priv(r));
  TRY(commit(r));
  return CORE_OK;
}
