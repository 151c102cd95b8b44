/* Outline of train_stepper_gradients. Losses need the whole global batch: contrastive denominators all
 * embeddings, router losses all sums. With one micro-batch: forward, losses, backward. With several: a first
 * forward pass over all of them collects embeddings and sums, the losses are formed once, and a second
 * forward pass, equal bit for bit, feeds each backward (Gao et al. 2021, "Scaling deep contrastive learning
 * batch size under memory limited setup"). So the accumulated gradient is that of the whole batch. */
#include "trainer/step.h"

#include <math.h>
#include <string.h>

#include "core/clock.h"
#include "trainer/schedule/rate.h"

static bool is_decoder(const train_stepper *stepper) {
  return stepper->env->settings->model.kind == TRAIN_KIND_DECODER;
}

static bool is_connector(const train_stepper *stepper) {
  return stepper->env->settings->model.kind == TRAIN_KIND_CONNECTOR;
}

/* Sums of a step's losses: of each pair, or the contrastive and the regression part of each direction, or the
 * one of a decoder. */
static int64_t loss_parts(const train_stepper *stepper) {
  if (is_decoder(stepper)) return 1;
  return is_connector(stepper) ? 2 * stepper->model->alignment.directions : stepper->contrastive.pairs;
}

static int32_t classes(const train_stepper *stepper) {
  return train_settings_classes(stepper->env->settings);
}

core_status train_stepper_make(train_env *env, train_model *model, train_stepper *out) {
  memset(out, 0, sizeof *out);
  out->env = env;
  out->model = model;
  train_alternation_make(env->settings, &out->alternation);
  TRY(train_reduction_make(model, &out->reduction));
  if (is_decoder(out)) return CORE_OK;
  TRY(is_connector(out) ? train_alignment_loss_make(env, model, &out->alignment)
                        : train_contrastive_make(env, model->Z, &out->contrastive));
  return CORE_OK;
}

core_status train_stepper_plan(train_stepper *stepper, const train_arenas *arenas) {
  const train_moe_sums *sums = &stepper->model->sums;
  int64_t cells = (int64_t)sums->layers * sums->modalities, M = classes(stepper);
  if (!is_decoder(stepper))
    TRY(is_connector(stepper) ? train_alignment_loss_plan(&stepper->alignment, stepper->model, arenas)
                              : train_contrastive_plan(&stepper->contrastive, arenas));
  TRY(train_router_plan(&stepper->router, stepper->env, stepper->model->moe_layers, arenas));
  TRY(train_reduction_plan(&stepper->reduction, arenas));
  TRY(train_optimizer_plan(&stepper->optimizer, stepper->model, arenas));
  stepper->reduced_count = loss_parts(stepper) + cells * train_moe_value_stride(sums) +
                           train_moe_gate_count(sums) + train_moe_balance_count(sums);
  stepper->counted_count = 2 * M + cells * train_moe_count_stride(sums);
  TRY(ARENA_TAKE(arenas->host, stepper->reduced_count, &stepper->reduced));
  TRY(ARENA_TAKE(arenas->host, stepper->counted_count, &stepper->counted));
  return CORE_OK;
}

void train_stepper_free(train_stepper *stepper) {
  train_reduction_free(&stepper->reduction);
}

const char *train_phase_name(train_phase phase) {
  static const char *const names[TRAIN_PHASE_COUNT] = {"data",     "forward", "exchange",  "loss",
                                                       "backward", "reduce",  "optimizer", "checkpoint"};
  return names[phase];
}

/* Time since *mark goes to a phase; exchanges inside it have been counted by themselves. */
static void charge(train_env *env, train_phase phase, double *mark, double *exchanged) {
  double now = core_clock_now(), inside = env->seconds[TRAIN_PHASE_EXCHANGE] - *exchanged;
  env->seconds[phase] += now - *mark - inside;
  *mark = now;
  *exchanged = env->seconds[TRAIN_PHASE_EXCHANGE];
}

static void count_items(train_stepper *stepper) {
  const train_items *items = &stepper->model->items;
  const int64_t *offset = items->offset.host;
  int32_t M = stepper->env->layout.modalities;
  for (int32_t m = 0; m < M; m++) {
    stepper->counted[m] += items->row_first[m + 1] - items->row_first[m];
    for (int64_t s = items->segment_first[m]; s < items->segment_first[m + 1]; s++)
      stepper->counted[M + m] += offset[s + 1] > offset[s];
  }
}

static core_status forward_pass(train_stepper *stepper, const data_batch *batch) {
  TRY(train_moe_sums_clear(stepper->env, &stepper->model->sums));
  memset(stepper->counted, 0, (size_t)stepper->counted_count * sizeof *stepper->counted);
  for (int64_t micro = 0; micro < stepper->env->layout.micro_batches; micro++) {
    TRY(train_model_take(stepper->model, batch, micro, -1));
    TRY(train_model_forward(stepper->model, TRAIN_MODE_TRAIN));
    TRY(train_contrastive_put(&stepper->contrastive, stepper->model, micro));
    count_items(stepper);
  }
  return CORE_OK;
}

/* Of one micro-batch. The last one's makes gradients final, block by block, and they are reduced meanwhile.
 */
static core_status backward(train_stepper *stepper, int64_t micro, core_tensor router) {
  train_model *model = stepper->model;
  bool last = micro == stepper->env->layout.micro_batches - 1;
  model->passed = last ? train_reduction_observer(&stepper->reduction) : (train_pass_observer){NULL, NULL};
  TRY(train_model_backward(model, router));
  model->passed = (train_pass_observer){NULL, NULL};
  return CORE_OK;
}

static core_status backward_pass(train_stepper *stepper, const data_batch *batch, double *mark,
                                 double *exchanged) {
  train_env *env = stepper->env;
  for (int64_t micro = 0; micro < env->layout.micro_batches; micro++) {
    if (env->layout.micro_batches > 1) {
      TRY(train_model_take(stepper->model, batch, micro, -1));
      TRY(train_model_forward(stepper->model, TRAIN_MODE_AGAIN));
      charge(env, TRAIN_PHASE_FORWARD, mark, exchanged);
    }
    TRY(train_contrastive_get(&stepper->contrastive, stepper->model, micro));
    TRY(backward(stepper, micro, stepper->router.weights.device));
    charge(env, TRAIN_PHASE_BACKWARD, mark, exchanged);
  }
  return CORE_OK;
}

static void put_losses(train_stepper *stepper) {
  const train_alignment_loss *alignment = &stepper->alignment;
  if (is_decoder(stepper)) {
    stepper->reduced[0] = stepper->model->decoder.loss;
    return;
  }
  if (!is_connector(stepper)) {
    memcpy(stepper->reduced, stepper->contrastive.loss, (size_t)loss_parts(stepper) * sizeof(double));
    return;
  }
  int32_t D = stepper->model->alignment.directions;
  memcpy(stepper->reduced, alignment->contrastive.loss, (size_t)D * sizeof(double));
  memcpy(stepper->reduced + D, alignment->regression, (size_t)D * sizeof(double));
}

/* One reduction for all real sums of the step, one for all counts. */
static core_status reduce_sums(train_stepper *stepper) {
  train_moe_sums *sums = &stepper->model->sums;
  TRY(train_moe_sums_down(stepper->env, sums));
  int64_t pairs = loss_parts(stepper), gates = train_moe_gate_count(sums);
  int64_t balances = train_moe_balance_count(sums);
  int64_t values = stepper->reduced_count - pairs - gates - balances;
  double *reduced_gates = stepper->reduced + pairs + values, *reduced_balances = reduced_gates + gates;
  int64_t M2 = 2 * classes(stepper), counts = stepper->counted_count - M2;
  put_losses(stepper);
  if (values > 0) memcpy(stepper->reduced + pairs, sums->value.host, (size_t)values * sizeof(double));
  if (gates > 0) memcpy(reduced_gates, sums->gate_sum, (size_t)gates * sizeof(double));
  if (balances > 0) memcpy(reduced_balances, sums->balance.host, (size_t)balances * sizeof(double));
  if (counts > 0) memcpy(stepper->counted + M2, sums->count.host, (size_t)counts * sizeof(int64_t));
  TRY(comm_all_reduce(stepper->env->world, COMM_SUM, CORE_FLOAT64, stepper->reduced, stepper->reduced_count));
  TRY(comm_all_reduce(stepper->env->world, COMM_SUM, CORE_INT64, stepper->counted, stepper->counted_count));
  if (values > 0) memcpy(sums->value.host, stepper->reduced + pairs, (size_t)values * sizeof(double));
  if (gates > 0) memcpy(sums->gate_sum, reduced_gates, (size_t)gates * sizeof(double));
  if (balances > 0) memcpy(sums->balance.host, reduced_balances, (size_t)balances * sizeof(double));
  if (counts > 0) memcpy(sums->count.host, stepper->counted + M2, (size_t)counts * sizeof(int64_t));
  return CORE_OK;
}

static void fill_counts(train_stepper *stepper, train_report *report) {
  for (int32_t c = 0; c < classes(stepper); c++) {
    report->tokens[c] = stepper->counted[c];
    report->items[c] = stepper->counted[classes(stepper) + c];
  }
}

static core_status fill_losses(train_stepper *stepper, train_report *report) {
  const train_contrastive *c = &stepper->contrastive;
  report->contrastive = train_contrastive_total(c, stepper->reduced);
  for (int32_t p = 0; p < c->pairs; p++)
    report->pair[p] = c->count[p] > 0 ? stepper->reduced[p] / (double)c->count[p] : 0;
  TRY(train_router_evaluate(&stepper->router, &stepper->model->sums, &report->router));
  report->loss = report->contrastive + train_router_loss_total(&report->router);
  fill_counts(stepper, report);
  return CORE_OK;
}

/* The one number that the host reads before the forward pass, and the gradient that it writes. */
static core_status read_scale(train_stepper *stepper, double *scale) {
  core_tensor value = train_parameter_value(&stepper->model->parameters, stepper->model->log_scale);
  core_real number;
  TRY(stepper->env->ops->device->copy(&number, value.data, sizeof number, NULL));
  *scale = exp((double)number);
  return CORE_OK;
}

static core_status write_scale_gradient(train_stepper *stepper, double scale) {
  core_tensor gradient = train_parameter_gradient(&stepper->model->parameters, stepper->model->log_scale);
  if (!gradient.data) return CORE_OK;
  core_real number = (core_real)(*(double *)stepper->contrastive.d_scale.host * scale);
  TRY(stepper->env->ops->device->copy(gradient.data, &number, sizeof number, NULL));
  return CORE_OK;
}

/* ---- a tower ---- */

static core_status tower_gradients(train_stepper *stepper, const data_batch *batch, train_report *report,
                                   double *mark, double *exchanged) {
  train_env *env = stepper->env;
  TRY(read_scale(stepper, &report->scale));
  TRY(forward_pass(stepper, batch));
  charge(env, TRAIN_PHASE_FORWARD, mark, exchanged);
  comm_note(env->comm, env->step, -1, "objective");
  TRY(train_contrastive_evaluate(&stepper->contrastive, batch, report->scale));
  TRY(reduce_sums(stepper));
  TRY(fill_losses(stepper, report));
  charge(env, TRAIN_PHASE_LOSS, mark, exchanged);
  TRY(backward_pass(stepper, batch, mark, exchanged));
  TRY(write_scale_gradient(stepper, report->scale));
  return CORE_OK;
}

/* ---- a decoder ---- */

/* Rows of each class, and samples that have any. */
static void count_rows(train_stepper *stepper, const data_batch *batch, int64_t micro) {
  const train_items *items = &stepper->model->items;
  int32_t M = stepper->env->layout.modalities, C = classes(stepper);
  const data_text_part *text = &batch->text[micro];
  for (int32_t c = 0; c < C; c++) stepper->counted[c] += items->row_first[c + 1] - items->row_first[c];
  for (int32_t m = 0; m < M; m++) {
    const int64_t *offset = items->part_offset[m].host;
    for (int64_t i = 0; i < items->part_count[m]; i++) stepper->counted[C + m] += offset[i + 1] > offset[i];
  }
  for (int64_t i = 0; i < text->hi - text->lo; i++)
    stepper->counted[C + M] += text->target_offset[i + 1] > text->target_offset[i];
}

static core_status count_predictions(train_stepper *stepper, const data_batch *batch, int64_t *count) {
  *count = 0;
  for (int64_t micro = 0; micro < stepper->env->layout.micro_batches; micro++)
    *count += train_decoder_predictions(stepper->model, batch, micro);
  TRY(comm_all_reduce(stepper->env->world, COMM_SUM, CORE_INT64, count, 1));
  return CORE_OK;
}

/* Forward, or both passes of every micro-batch one after the other. */
static core_status decoder_passes(train_stepper *stepper, const data_batch *batch, train_mode mode,
                                  bool forwards, bool backwards, double *mark, double *exchanged) {
  train_env *env = stepper->env;
  core_tensor router =
      train_settings_router_losses(env->settings) ? stepper->router.weights.device : train_none();
  for (int64_t micro = 0; micro < env->layout.micro_batches; micro++) {
    if (forwards) {
      TRY(train_model_take(stepper->model, batch, micro, -1));
      TRY(train_model_forward(stepper->model, mode));
      if (mode == TRAIN_MODE_TRAIN) count_rows(stepper, batch, micro);
      charge(env, TRAIN_PHASE_FORWARD, mark, exchanged);
    }
    if (backwards) TRY(backward(stepper, micro, router));
    charge(env, TRAIN_PHASE_BACKWARD, mark, exchanged);
  }
  return CORE_OK;
}

static core_status fill_decoder_losses(train_stepper *stepper, train_report *report) {
  double count = report->predictions > 0 ? (double)report->predictions : 1;
  TRY(reduce_sums(stepper));
  TRY(train_router_evaluate(&stepper->router, &stepper->model->sums, &report->router));
  report->next_token = stepper->reduced[0] / count;
  report->loss = report->next_token + train_router_loss_total(&report->router);
  fill_counts(stepper, report);
  return CORE_OK;
}

/* A token's loss needs nothing of other samples, only the losses on the router's sums need all of them:
 * without such losses each micro-batch goes forward and back at once, otherwise as a tower's. */
static core_status decoder_gradients(train_stepper *stepper, const data_batch *batch, train_report *report,
                                     double *mark, double *exchanged) {
  train_env *env = stepper->env;
  bool waits = train_settings_router_losses(env->settings), several = env->layout.micro_batches > 1;
  TRY(train_moe_sums_clear(env, &stepper->model->sums));
  memset(stepper->counted, 0, (size_t)stepper->counted_count * sizeof *stepper->counted);
  stepper->model->decoder.loss = 0;
  TRY(count_predictions(stepper, batch, &report->predictions));
  stepper->model->decoder.weight = report->predictions > 0 ? 1 / (double)report->predictions : 0;
  stepper->model->decoder.loss_alone = waits && several;
  TRY(decoder_passes(stepper, batch, TRAIN_MODE_TRAIN, true, !waits, mark, exchanged));
  stepper->model->decoder.loss_alone = false;
  comm_note(env->comm, env->step, -1, "objective");
  TRY(fill_decoder_losses(stepper, report));
  charge(env, TRAIN_PHASE_LOSS, mark, exchanged);
  if (waits) TRY(decoder_passes(stepper, batch, TRAIN_MODE_AGAIN, several, true, mark, exchanged));
  return CORE_OK;
}

/* ---- a connector: each direction by itself, gradients added ---- */

/* Latents that were read, not the rows of both views. */
static void count_latents(train_stepper *stepper, int32_t m) {
  const train_items *items = &stepper->model->items;
  const int64_t *offset = items->part_offset[m].host;
  int64_t count = items->part_count[m];
  stepper->counted[m] += count > 0 ? offset[count] : 0;
  for (int64_t i = 0; i < count; i++)
    stepper->counted[stepper->env->layout.modalities + m] += offset[i + 1] > offset[i];
}

static core_status direction_gradients(train_stepper *stepper, const data_batch *batch, int32_t d,
                                       double *mark, double *exchanged) {
  train_env *env = stepper->env;
  train_model *model = stepper->model;
  int64_t micros = env->layout.micro_batches;
  for (int64_t micro = 0; micro < micros; micro++) {
    TRY(train_model_take(model, batch, micro, d));
    TRY(train_model_forward(model, TRAIN_MODE_TRAIN));
    TRY(train_alignment_loss_put(&stepper->alignment, model, micro));
    count_latents(stepper, model->alignment.direction[d].from);
    count_latents(stepper, model->alignment.direction[d].toward);
  }
  charge(env, TRAIN_PHASE_FORWARD, mark, exchanged);
  comm_note(env->comm, env->step, -1, "objective");
  TRY(train_alignment_loss_evaluate(&stepper->alignment, model, batch, d));
  charge(env, TRAIN_PHASE_LOSS, mark, exchanged);
  for (int64_t micro = 0; micro < micros; micro++) {
    if (micros > 1) {
      TRY(train_model_take(model, batch, micro, d));
      TRY(train_model_forward(model, TRAIN_MODE_AGAIN));
      charge(env, TRAIN_PHASE_FORWARD, mark, exchanged);
    }
    TRY(train_alignment_loss_get(&stepper->alignment, model, micro));
    TRY(train_model_backward(model, train_none()));
    charge(env, TRAIN_PHASE_BACKWARD, mark, exchanged);
  }
  return CORE_OK;
}

static core_status connector_gradients(train_stepper *stepper, const data_batch *batch, train_report *report,
                                       double *mark, double *exchanged) {
  const train_settings *s = stepper->env->settings;
  int32_t D = stepper->model->alignment.directions;
  train_alignment_loss *loss = &stepper->alignment;
  TRY(train_moe_sums_clear(stepper->env, &stepper->model->sums));
  memset(stepper->counted, 0, (size_t)stepper->counted_count * sizeof *stepper->counted);
  memset(loss->contrastive.loss, 0, sizeof loss->contrastive.loss);
  memset(loss->contrastive.count, 0, sizeof loss->contrastive.count);
  memset(loss->regression, 0, sizeof loss->regression);
  for (int32_t d = 0; d < D; d++)
    if (report->direction < 0 || report->direction == d)
      TRY(direction_gradients(stepper, batch, d, mark, exchanged));
  TRY(reduce_sums(stepper));
  report->scale = 1 / s->objective.temperature;
  report->loss = report->contrastive = 0;
  for (int32_t d = 0; d < D; d++) {
    double count = loss->contrastive.count[d] > 0 ? (double)loss->contrastive.count[d] : 1;
    report->pair[d] = stepper->reduced[d] / count;
    report->regression[d] = stepper->reduced[D + d] / count;
    report->contrastive += (1 - s->objective.alpha) * report->pair[d];
    report->loss += s->objective.alpha * report->regression[d];
  }
  report->loss += report->contrastive;
  fill_counts(stepper, report);
  return CORE_OK;
}

/* ---- all ---- */

core_status train_stepper_gradients(train_stepper *stepper, const data_batch *batch, train_report *report) {
  train_env *env = stepper->env;
  double mark = core_clock_now(), exchanged = env->seconds[TRAIN_PHASE_EXCHANGE];
  report->direction = train_alternation_direction(&stepper->alternation, env->step);
  train_model_activate(stepper->model, report->direction);
  TRY(train_optimizer_clear(stepper->model));
  train_reduction_begin(&stepper->reduction);
  TRY(is_connector(stepper) ? connector_gradients(stepper, batch, report, &mark, &exchanged)
      : is_decoder(stepper) ? decoder_gradients(stepper, batch, report, &mark, &exchanged)
                            : tower_gradients(stepper, batch, report, &mark, &exchanged));
  TRY(train_reduction_finish(&stepper->reduction));
  TRY(train_optimizer_norm(&stepper->optimizer, stepper->model, &report->norm));
  charge(env, TRAIN_PHASE_REDUCE, &mark, &exchanged);
  return CORE_OK;
}

/* A direction's rate counts its own steps. */
static double rate_of(const train_stepper *stepper, int32_t direction) {
  const train_settings *s = stepper->env->settings;
  const train_alternation *a = &stepper->alternation;
  int64_t step = stepper->env->step;
  if (direction < 0) return train_rate(s, step, s->run.steps);
  return train_rate(s, train_alternation_own(a, direction, step),
                    train_alternation_total(a, direction, s->run.steps));
}

core_status train_stepper_run(train_stepper *stepper, const data_batch *batch, train_report *report) {
  train_env *env = stepper->env;
  TRY(train_stepper_gradients(stepper, batch, report));
  double mark = core_clock_now();
  report->step = env->step + 1;
  report->rate = rate_of(stepper, report->direction);
  /* the sum of several directions' losses is clipped at as many times the norm of one */
  double most = env->settings->optimizer.clip;
  if (is_connector(stepper) && report->direction < 0) most *= stepper->model->alignment.directions;
  report->clip = most > 0 && report->norm > most ? most / report->norm : 1;
  /* loss and norm come out of reductions that give equal bits everywhere, so all ranks decide alike */
  report->skipped = !isfinite(report->loss) || !isfinite(report->norm);
  if (!report->skipped)
    TRY(train_optimizer_update(&stepper->optimizer, stepper->model, report->rate, report->clip));
  if (report->direction >= 0) train_alternation_done(&stepper->alternation, report->direction);
  env->seconds[TRAIN_PHASE_OPTIMIZER] += core_clock_now() - mark;
  return CORE_OK;
}
