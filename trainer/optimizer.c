#include "trainer/optimizer.h"

#include <math.h>

/* Range of flat elements of one scope, and the group that shares it; NULL: this rank holds none. */
typedef struct range {
  int64_t first, count;
  comm_group *group;
} range;

static range scope_range(const train_model *model, int32_t scope) {
  const train_env *env = model->env;
  const int64_t *first = model->parameters.scope_first;
  comm_group *group = scope == 0 ? env->world : scope == 1 ? env->replica : env->modality[scope - 2];
  return (range){first[scope], first[scope + 1] - first[scope], group};
}

static int32_t scopes(const train_model *model) {
  return 2 + model->env->layout.modalities;
}

static core_tensor gradients(const train_model *model, range r) {
  return core_tensor_1(model->parameters.gradient + r.first, CORE_REAL_DTYPE, r.count);
}

core_status train_optimizer_reduce(train_model *model) {
  for (int32_t scope = 0; scope < scopes(model); scope++) {
    range r = scope_range(model, scope);
    if (r.group && r.count > 0)
      TRY(comm_all_reduce(r.group, COMM_SUM, CORE_REAL_DTYPE, model->parameters.gradient + r.first, r.count));
  }
  return CORE_OK;
}

core_status train_optimizer_norm(train_model *model, double *norm) {
  train_env *env = model->env;
  double total = 0;
  for (int32_t scope = 0; scope < scopes(model); scope++) {
    range r = scope_range(model, scope);
    double part = 0;
    if (!r.group || r.count == 0 || comm_rank(r.group) != 0) continue; /* the first holder counts it */
    KERN(env, sum_squares, gradients(model, r), &part);
    total += part;
  }
  TRY(comm_all_reduce(env->world, COMM_SUM, CORE_FLOAT64, &total, 1));
  *norm = sqrt(total);
  return CORE_OK;
}

static core_tensor flat(core_real *base, const train_parameter *p) {
  return core_tensor_1(base + p->first, CORE_REAL_DTYPE, p->count);
}

static core_status update(train_model *model, train_parameter *p, double rate, double scale) {
  const train_settings *s = model->env->settings;
  train_parameters *set = &model->parameters;
  p->steps++;
  kern_adamw adamw = {.rate = rate,
                      .beta1 = s->optimizer.beta1,
                      .beta2 = s->optimizer.beta2,
                      .epsilon = s->optimizer.epsilon,
                      .decay = p->decay ? s->optimizer.weight_decay : 0,
                      .correction1 = 1 - pow(s->optimizer.beta1, (double)p->steps),
                      .correction2 = 1 - pow(s->optimizer.beta2, (double)p->steps),
                      .gradient_scale = scale};
  KERN(model->env, adamw, &adamw, flat(set->gradient, p), flat(set->value, p), flat(set->m, p),
       flat(set->v, p));
  return CORE_OK;
}

core_status train_optimizer_update(train_model *model, double rate, double scale) {
  train_parameters *set = &model->parameters;
  for (int32_t i = 0; i < set->count; i++) TRY(update(model, &set->list[i], rate, scale));
  core_real *log_scale = train_parameter_value(set, model->log_scale).data;
  double most = log(model->env->settings->objective.largest_scale);
  if (*log_scale > most) *log_scale = (core_real)most;
  return CORE_OK;
}

core_status train_optimizer_clear(train_model *model) {
  train_parameters *set = &model->parameters;
  KERN(model->env, fill, 0, core_tensor_1(set->gradient, CORE_REAL_DTYPE, set->total));
  return CORE_OK;
}
