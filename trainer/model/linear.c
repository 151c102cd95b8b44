#include "trainer/model/linear.h"

#include "trainer/model/tower.h"

core_status train_linear_plan(train_model *model, const train_arenas *arenas) {
  TRY(ARENA_TAKE(arenas->host, train_experts_local(model) + 1, &model->linear.group));
  return CORE_OK;
}

/* One product, or one for each group. */
static core_status product(train_model *model, kern_form form, const int64_t *group, core_tensor a,
                           core_tensor b, kern_write write, core_tensor c) {
  train_env *env = model->env;
  if (group)
    KERN(env, gemm_grouped, form, group, a, b, write, c);
  else
    KERN(env, gemm, form, a, b, write, c);
  return CORE_OK;
}

core_status train_linear_forward(train_model *model, const train_linear *map, train_linear_rows rows,
                                 core_tensor x, kern_write write, core_tensor y) {
  train_env *env = model->env;
  const train_parameters *p = &model->parameters;
  if (rows.group && map->groups == 0) return CORE_OK; /* no expert of the layer lives here */
  TRY(product(model, KERN_NT, rows.group, x, train_parameter_matrices(p, map->weight, map->groups), write,
              y));
  if (map->bias < 0) return CORE_OK;
  core_tensor bias = train_parameter_vectors(p, map->bias, map->groups);
  if (rows.group)
    KERN(env, bias_grouped_fwd, rows.group, bias, y);
  else
    KERN(env, bias_fwd, bias, y);
  return CORE_OK;
}

core_status train_bias_backward(train_model *model, int32_t bias, core_tensor dy) {
  train_env *env = model->env;
  if (train_parameter_trained(&model->parameters, bias))
    KERN(env, bias_bwd, dy, train_parameter_gradient(&model->parameters, bias));
  return CORE_OK;
}

/* The next groups in a row whose parameter is trained, [*first, the result); *first: where to look. */
static int64_t next_trained(const train_model *model, int32_t index, int64_t groups, int64_t *first) {
  const train_parameters *p = &model->parameters;
  while (*first < groups && !train_parameter_trained(p, index + (int32_t)*first)) ++*first;
  int64_t last = *first;
  while (last < groups && train_parameter_trained(p, index + (int32_t)last)) last++;
  return last;
}

/* Rows of groups [first, last), and where each of these begins among them. */
static core_tensor rows_of(const train_model *model, const int64_t *group, int64_t first, int64_t last,
                           core_tensor all) {
  for (int64_t g = first; g <= last; g++) model->linear.group[g - first] = group[g] - group[first];
  return train_slice(all, group[first], group[last] - group[first]);
}

/* Some experts of a layer may be frozen: a product for each run of trained ones. */
static core_status grouped_gradients(train_model *model, const train_linear *map, const int64_t *group,
                                     core_tensor dy, core_tensor x) {
  train_env *env = model->env;
  const train_parameters *p = &model->parameters;
  const int64_t *part = model->linear.group;
  for (int64_t g = 0, last; (last = next_trained(model, map->weight, map->groups, &g)) > g; g = last) {
    core_tensor rows = rows_of(model, group, g, last, dy);
    KERN(env, gemm_grouped, KERN_TN, part, rows, rows_of(model, group, g, last, x), KERN_ADD,
         train_parameter_gradients(p, map->weight + (int32_t)g, last - g));
  }
  for (int64_t g = 0, last; map->bias >= 0 && (last = next_trained(model, map->bias, map->groups, &g)) > g;
       g = last) {
    core_tensor rows = rows_of(model, group, g, last, dy);
    KERN(env, bias_grouped_bwd, part, rows, train_parameter_gradients(p, map->bias + (int32_t)g, last - g));
  }
  return CORE_OK;
}

core_status train_linear_backward(train_model *model, const train_linear *map, train_linear_rows rows,
                                  core_tensor dy, core_tensor x, core_tensor dx) {
  const train_parameters *p = &model->parameters;
  if (rows.group && map->groups == 0) return CORE_OK;
  if (rows.group) {
    TRY(grouped_gradients(model, map, rows.group, dy, x));
  } else {
    if (train_parameter_trained(p, map->weight))
      TRY(product(model, KERN_TN, NULL, dy, x, KERN_ADD, train_parameter_gradient(p, map->weight)));
    TRY(train_bias_backward(model, map->bias, dy));
  }
  if (dx.data)
    TRY(product(model, KERN_NN, rows.group, dy, train_parameter_matrices(p, map->weight, map->groups),
                KERN_SET, dx));
  return CORE_OK;
}
