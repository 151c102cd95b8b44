/* Evaluations of a run, and what follows from them. */
#include "trainer/run_impl.h"

#include <stdlib.h>

#include "core/log.h"
#include "trainer/caption.h"
#include "trainer/health.h"

/* Adaptive alternation follows the recall of each direction. */
static void adapt_schedule(train_run_state *r, const train_retrieval *result) {
  double recall[TRAIN_MAX_DIRECTIONS] = {0};
  const train_alignment *a = &r->session->model->alignment;
  for (int32_t d = 0; d < a->directions; d++)
    recall[d] = train_retrieval_recall(result, a->direction[d].from, a->direction[d].toward, 0);
  train_alternation_adapt(&r->session->stepper.alternation, recall);
}

/* The best step must have a checkpoint: begun already where this is a step that is saved. */
static core_status follow(train_run_state *r, double recall) {
  bool keeps = r->settings->checkpoint.keep_best;
  /* an older save, perhaps of the best so far, is published and marked before another is the best */
  if (keeps) TRY(train_run_settle_saves_priv(r, r->env->step));
  bool best = train_early_stopping_observe(&r->stopping, r->env->step, recall);
  if (!best || !keeps) return CORE_OK;
  ckpt_writer_spare(r->writer, r->env->step); /* also where it cannot be marked */
  if (r->saved_step != r->env->step) {
    TRY(train_run_warn_save_priv(r, r->env->step, train_run_begin_save_priv(r)));
  } else if (!ckpt_writer_busy(r->writer)) {
    train_run_mark_best_priv(r);
  }
  return CORE_OK;
}

bool train_run_stops_early_priv(const train_run_state *r) {
  return train_early_stopping_due(&r->stopping);
}

static core_status evaluate_captions(train_run_state *r) {
  train_caption result;
  TRY(train_caption_run(r->session, &result));
  r->evaluated = r->env->step;
  LOG_INFO("step %lld: loss of %lld response tokens of %s %.4f (%.1f s)", (long long)r->env->step,
           (long long)result.predictions, r->settings->data.validation, result.loss, result.seconds);
  if (r->metrics && train_metrics_caption(r->metrics, r->env->step, &result) != CORE_OK)
    LOG_WARNING("the evaluation is not in the metrics: %s", core_error_get()->message);
  return CORE_OK;
}

core_status train_run_evaluate_priv(train_run_state *r, bool table) {
  if (r->settings->model.kind == TRAIN_KIND_DECODER) return evaluate_captions(r);
  train_retrieval *result = malloc(sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = train_retrieval_run(r->session, result);
  if (status == CORE_OK) {
    double recall = train_retrieval_mean(result);
    r->evaluated = r->env->step;
    adapt_schedule(r, result);
    status = follow(r, recall);
    table = table || (train_run_stops_early_priv(r) && r->settings->evaluate.at_end);
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
