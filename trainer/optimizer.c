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
  train_stretch place;
  int64_t share[TRAIN_MAX_RANKS]; /* elements of each rank, in order */
} active_run;

/* Shares are a pure function of the group, so that every rank knows all of them. */
static core_status shares_of(const train_model *model, int32_t scope, active_run *run) {
  run->group = train_scope_group(model->env, scope);
  int32_t size = comm_size(run->group);
  CHECK(size <= TRAIN_MAX_RANKS, CORE_ERR_UNSUPPORTED, "more than %d ranks in a group", (int)TRAIN_MAX_RANKS);
  for (int32_t r = 0; r < size; r++)
    run->share[r] =
        train_span_common(run->place.gradient, train_gradients_share_of(&model->parameters, scope, r, size))
            .count;
  return CORE_OK;
}

typedef core_status (*run_work)(train_model *model, active_run *run);

/* Every run of active parameters that this rank holds, in one order on all ranks of each group. */
static core_status for_active_runs(train_model *model, run_work work) {
  active_run run;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    int32_t from = 0;
    while (train_parameters_next_active(&model->parameters, scope, &from, &run.place)) {
      TRY(shares_of(model, scope, &run));
      TRY(work(model, &run));
    }
  }
  return CORE_OK;
}

/* Every rank's share of a run to all ranks that hold it. */
static core_status gather_run(active_run *run, core_real *data) {
  for (int32_t r = 0; r < comm_size(run->group); r++) run->share[r] *= (int64_t)sizeof *data;
  TRY(comm_device_all_gather(run->group, data, run->share, NULL));
  return CORE_OK;
}

static core_status gather_gradients(train_model *model, active_run *run) {
  TRY(gather_run(run, model->parameters.gradient + run->place.gradient.first));
  return CORE_OK;
}

core_status train_optimizer_gather(train_model *model) {
  if (sharded(model)) TRY(for_active_runs(model, gather_gradients));
  return CORE_OK;
}

/* Shares are disjoint and cover the scope, whether or not the optimizer follows them. */
core_status train_optimizer_norm(const train_optimizer *optimizer, train_model *model, double *norm) {
  train_env *env = model->env;
  train_parameters *set = &model->parameters;
  train_stretch run;
  TRY(train_mirror_clear(env, &optimizer->squares));
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    int32_t from = 0;
    while (train_parameters_next_active(set, scope, &from, &run)) {
      train_span own = train_span_common(run.gradient, set->gradient_share[scope]);
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

/* Updates what this rank follows of parameters that are one range in both spaces: the first n of the list,
 * whose ranges are counted from the start of `own`, of the gradients. */
static core_status update_list(const train_optimizer *optimizer, train_model *model, int32_t scope,
                               train_stretch own, int64_t n) {
  train_parameters *set = &model->parameters;
  int64_t count = own.gradient.count;
  int64_t state = set->state_first[scope] + own.gradient.first - set->update[scope].first;
  core_tensor copy = {0};
  if (n == 0) return CORE_OK;
  if (set->copy) copy = core_tensor_1(set->copy + own.value.first, CORE_BFLOAT16, count);
  KERN(model->env, adamw, optimizer->list, n, vector(set->gradient + own.gradient.first, count),
       vector(set->value + own.value.first, count), vector(set->m + state, count),
       vector(set->v + state, count), copy);
  return CORE_OK;
}

/* One op for each run of parameters: as many as frozen ones part, and for all of a scope without them. */
static core_status update_scope(const train_optimizer *optimizer, train_model *model, int32_t scope,
                                double rate, double scale) {
  train_parameters *set = &model->parameters;
  train_stretch run;
  for (int32_t from = 0, i = 0; train_parameters_next_active(set, scope, &from, &run); i = from) {
    int64_t shift = run.value.first - run.gradient.first, n = 0;
    train_stretch own = {.gradient = train_span_common(run.gradient, set->update[scope])};
    own.value = (train_span){own.gradient.first + shift, own.gradient.count};
    for (; i < from; i++) {
      const train_parameter *p = &set->list[i];
      train_span part = train_gradient_within(p, own.gradient);
      if (train_scope_number(p) != scope || !p->active || part.count == 0) continue;
      part.first -= own.gradient.first;
      optimizer->list[n++] = describe(model->env->settings, p, part, rate, scale);
    }
    TRY(update_list(optimizer, model, scope, own, n));
  }
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

static core_status gather_values(train_model *model, active_run *run) {
  train_parameters *set = &model->parameters;
  TRY(gather_run(run, set->value + run->place.value.first));
  TRY(train_parameters_round(set, model->env, run->place.value));
  return CORE_OK;
}

core_status train_optimizer_update(const train_optimizer *optimizer, train_model *model, double rate,
                                   double scale) {
  train_parameters *set = &model->parameters;
  for (int32_t i = 0; i < set->count; i++) set->list[i].steps += set->list[i].active;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    TRY(update_scope(optimizer, model, scope, rate, scale));
  if (sharded(model)) TRY(for_active_runs(model, gather_values));
  if (model->log_scale >= 0) TRY(clamp_scale(model));
  return CORE_OK;
}

core_status train_optimizer_clear(train_model *model) {
  train_parameters *set = &model->parameters;
  train_stretch run;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    for (int32_t from = 0; train_parameters_next_active(set, scope, &from, &run);)
      KERN(model->env, fill, 0, vector(set->gradient + run.gradient.first, run.gradient.count));
  return CORE_OK;
}
