#include "trainer/optimizer.h"

#include <math.h>

core_status train_optimizer_plan(train_optimizer *optimizer, const train_model *model,
                                 const train_arenas *arenas) {
  TRY(train_mirror_plan(arenas, arenas->objective, CORE_FLOAT64, 1, 1, &optimizer->squares));
  TRY(ARENA_TAKE(arenas->host, model->parameters.count, &optimizer->list));
  return CORE_OK;
}

static bool sharded(const train_model *model) {
  return model->env->settings->parallel.shard_optimizer;
}

static core_tensor vector(core_real *data, int64_t count) {
  return core_tensor_1(data, CORE_REAL_DTYPE, count);
}

/* A run of active parameters, and how the ranks of its group share it. */
typedef struct active_run {
  comm_group *group;
  train_span span;
  int64_t share[TRAIN_MAX_RANKS]; /* elements of each rank, in order */
} active_run;

/* Shares are a pure function of the group, so that every rank knows all of them. */
static core_status shares_of(const train_model *model, int32_t scope, active_run *run) {
  run->group = train_scope_group(model->env, scope);
  int32_t size = comm_size(run->group);
  CHECK(size <= TRAIN_MAX_RANKS, CORE_ERR_UNSUPPORTED, "more than %d ranks in a group", (int)TRAIN_MAX_RANKS);
  for (int32_t r = 0; r < size; r++)
    run->share[r] =
        train_span_common(run->span, train_parameters_share_of(&model->parameters, scope, r, size)).count;
  return CORE_OK;
}

typedef core_status (*run_work)(train_model *model, active_run *run, core_real *base);

/* Every run of active parameters that this rank holds, in one order on all ranks of each group. */
static core_status for_active_runs(train_model *model, core_real *base, run_work work) {
  active_run run;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    int32_t from = 0;
    while (train_parameters_next_active(&model->parameters, scope, &from, &run.span)) {
      TRY(shares_of(model, scope, &run));
      TRY(work(model, &run, base));
    }
  }
  return CORE_OK;
}

static core_status reduce_run(train_model *model, active_run *run, core_real *base) {
  if (sharded(model))
    TRY(comm_device_reduce_scatter(run->group, CORE_REAL_DTYPE, base + run->span.first, run->share, NULL));
  else
    TRY(comm_device_all_reduce(run->group, COMM_SUM, CORE_REAL_DTYPE, base + run->span.first, run->span.count,
                               NULL));
  return CORE_OK;
}

core_status train_optimizer_reduce(train_model *model) {
  TRY(for_active_runs(model, model->parameters.gradient, reduce_run));
  return CORE_OK;
}

/* Every rank's share of a run to all ranks that hold it. */
static core_status gather_run(train_model *model, active_run *run, core_real *base) {
  (void)model;
  for (int32_t r = 0; r < comm_size(run->group); r++) run->share[r] *= (int64_t)sizeof *base;
  TRY(comm_device_all_gather(run->group, base + run->span.first, run->share, NULL));
  return CORE_OK;
}

core_status train_optimizer_gather(train_model *model) {
  if (sharded(model)) TRY(for_active_runs(model, model->parameters.gradient, gather_run));
  return CORE_OK;
}

/* Shares are disjoint and cover the scope, whether or not the optimizer follows them. */
core_status train_optimizer_norm(const train_optimizer *optimizer, train_model *model, double *norm) {
  train_env *env = model->env;
  train_parameters *set = &model->parameters;
  train_span span;
  TRY(train_mirror_clear(env, &optimizer->squares));
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    int32_t from = 0;
    while (train_parameters_next_active(set, scope, &from, &span)) {
      train_span own = train_span_common(span, set->share[scope]);
      if (own.count > 0)
        KERN(env, sum_squares, vector(set->gradient + own.first, own.count),
             train_rows(optimizer->squares.device, 1));
    }
  }
  TRY(train_mirror_down(env, &optimizer->squares, 1));
  double total = *(double *)optimizer->squares.host;
  TRY(comm_all_reduce(env->world, COMM_SUM, CORE_FLOAT64, &total, 1));
  *norm = sqrt(total);
  return CORE_OK;
}

static kern_adamw describe(const train_settings *s, const train_parameter *p, train_span part, double rate,
                           double scale) {
  return (kern_adamw){.first = part.first,
                      .count = part.count,
                      .rate = rate,
                      .beta1 = s->optimizer.beta1,
                      .beta2 = s->optimizer.beta2,
                      .epsilon = s->optimizer.epsilon,
                      .decay = p->decay ? s->optimizer.weight_decay : 0,
                      .correction1 = 1 - pow(s->optimizer.beta1, (double)p->steps),
                      .correction2 = 1 - pow(s->optimizer.beta2, (double)p->steps),
                      .gradient_scale = scale};
}

/* One op for all parameters of a scope; ranges are counted from the start of what this rank updates. */
static core_status update_scope(const train_optimizer *optimizer, train_model *model, int32_t scope,
                                double rate, double scale) {
  train_parameters *set = &model->parameters;
  train_span own = set->update[scope];
  int64_t n = 0;
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    train_span part = train_parameter_within(p, own);
    if (train_scope_number(p) != scope || !p->active || part.count == 0) continue;
    part.first -= own.first;
    optimizer->list[n++] = describe(model->env->settings, p, part, rate, scale);
  }
  if (n == 0) return CORE_OK;
  core_tensor copy = {0};
  if (set->copy) copy = core_tensor_1(set->copy + own.first, CORE_BFLOAT16, own.count);
  KERN(model->env, adamw, optimizer->list, n, vector(set->gradient + own.first, own.count),
       vector(set->value + own.first, own.count), vector(set->m + set->state_first[scope], own.count),
       vector(set->v + set->state_first[scope], own.count), copy);
  return CORE_OK;
}

/* 1 / temperature stays below its limit: on the host, one number. */
static core_status clamp_scale(train_model *model) {
  const core_device *device = model->env->ops->device;
  core_tensor value = train_parameter_value(&model->parameters, model->log_scale);
  core_real number, most = (core_real)log(model->env->settings->objective.largest_scale);
  TRY(device->copy(&number, value.data, sizeof number, NULL));
  if (number > most) TRY(device->copy(value.data, &most, sizeof most, NULL));
  return CORE_OK;
}

static core_status gather_values(train_model *model, active_run *run, core_real *base) {
  TRY(gather_run(model, run, base));
  TRY(train_parameters_round(&model->parameters, model->env, run->span));
  return CORE_OK;
}

core_status train_optimizer_update(const train_optimizer *optimizer, train_model *model, double rate,
                                   double scale) {
  train_parameters *set = &model->parameters;
  for (int32_t i = 0; i < set->count; i++) set->list[i].steps += set->list[i].active;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    TRY(update_scope(optimizer, model, scope, rate, scale));
  if (sharded(model)) TRY(for_active_runs(model, set->value, gather_values));
  if (model->log_scale >= 0) TRY(clamp_scale(model));
  return CORE_OK;
}

core_status train_optimizer_clear(train_model *model) {
  train_parameters *set = &model->parameters;
  train_span span;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    for (int32_t from = 0; train_parameters_next_active(set, scope, &from, &span);)
      KERN(model->env, fill, 0, vector(set->gradient + span.first, span.count));
  return CORE_OK;
}
