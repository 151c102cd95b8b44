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

static core_real *at(core_real *base, train_span span) {
  return base + span.first;
}

static core_tensor vector(core_real *data, int64_t count) {
  return core_tensor_1(data, CORE_REAL_DTYPE, count);
}

/* What the scope takes in the flat arrays: from its first share's start to its last share's end. */
typedef struct scope_range {
  comm_group *group;    /* NULL: nothing of the scope is here */
  int64_t first, total; /* elements */
  int64_t *count;       /* [ranks of the group] of each share */
} scope_range;

/* Shares are a pure function of the group, so that every rank knows all of them. */
static core_status range_of(const train_model *model, int32_t scope, int64_t *count, scope_range *out) {
  const train_parameters *set = &model->parameters;
  comm_group *group = train_scope_group(model->env, scope);
  *out = (scope_range){.group = group, .first = set->scope_first[scope], .count = count};
  if (!group) return CORE_OK;
  CHECK(comm_size(group) <= TRAIN_MAX_RANKS, CORE_ERR_UNSUPPORTED, "more than %d ranks in a group",
        (int)TRAIN_MAX_RANKS);
  for (int32_t r = 0; r < comm_size(group); r++) {
    count[r] = train_parameters_share_of(set, scope, r, comm_size(group)).count;
    out->total += count[r];
  }
  return CORE_OK;
}

core_status train_optimizer_reduce(train_model *model) {
  train_parameters *set = &model->parameters;
  int64_t count[TRAIN_MAX_RANKS];
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    scope_range r;
    TRY(range_of(model, scope, count, &r));
    if (r.total == 0) continue;
    if (sharded(model))
      TRY(comm_device_reduce_scatter(r.group, CORE_REAL_DTYPE, set->gradient + r.first, r.count, NULL));
    else
      TRY(comm_device_all_reduce(r.group, COMM_SUM, CORE_REAL_DTYPE, set->gradient + r.first, r.total, NULL));
  }
  return CORE_OK;
}

/* Every rank's share of one flat array to all ranks of the scope. */
static core_status gather_scope(train_model *model, int32_t scope, core_real *base) {
  int64_t count[TRAIN_MAX_RANKS];
  scope_range r;
  TRY(range_of(model, scope, count, &r));
  if (r.total == 0) return CORE_OK;
  for (int32_t rank = 0; rank < comm_size(r.group); rank++) count[rank] *= (int64_t)sizeof *base;
  TRY(comm_device_all_gather(r.group, base + r.first, count, NULL));
  return CORE_OK;
}

core_status train_optimizer_gather(train_model *model) {
  if (!sharded(model)) return CORE_OK;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++)
    TRY(gather_scope(model, scope, model->parameters.gradient));
  return CORE_OK;
}

/* Shares are disjoint and cover the scope, whether or not the optimizer follows them. */
core_status train_optimizer_norm(const train_optimizer *optimizer, train_model *model, double *norm) {
  train_env *env = model->env;
  train_parameters *set = &model->parameters;
  double total = 0;
  TRY(train_mirror_clear(env, &optimizer->squares));
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    train_span own = set->share[scope];
    if (own.count > 0)
      KERN(env, sum_squares, vector(at(set->gradient, own), own.count),
           train_rows(optimizer->squares.device, 1));
  }
  TRY(train_mirror_down(env, &optimizer->squares, 1));
  total = *(double *)optimizer->squares.host;
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
    if (train_scope_number(p) != scope || part.count == 0) continue;
    part.first -= own.first;
    optimizer->list[n++] = describe(model->env->settings, p, part, rate, scale);
  }
  if (n == 0) return CORE_OK;
  core_tensor copy = {0};
  if (set->copy) copy = core_tensor_1(set->copy + own.first, CORE_BFLOAT16, own.count);
  KERN(model->env, adamw, optimizer->list, n, vector(at(set->gradient, own), own.count),
       vector(at(set->value, own), own.count), vector(set->m + set->state_first[scope], own.count),
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

core_status train_optimizer_update(const train_optimizer *optimizer, train_model *model, double rate,
                                   double scale) {
  train_parameters *set = &model->parameters;
  for (int32_t i = 0; i < set->count; i++) set->list[i].steps++;
  for (int32_t scope = 0; scope < TRAIN_SCOPES; scope++) {
    TRY(update_scope(optimizer, model, scope, rate, scale));
    if (!sharded(model)) continue;
    TRY(gather_scope(model, scope, set->value));
    int64_t first = set->scope_first[scope];
    TRY(train_parameters_round(set, model->env, (train_span){first, set->scope_first[scope + 1] - first}));
  }
  TRY(clamp_scale(model));
  return CORE_OK;
}

core_status train_optimizer_clear(train_model *model) {
  train_parameters *set = &model->parameters;
  KERN(model->env, fill, 0, vector(set->gradient, set->total));
  return CORE_OK;
}
