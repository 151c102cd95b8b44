#include "trainer/model/linear.h"

#include <stdlib.h>

#include "trainer/model/lora.h"
#include "trainer/model/tower.h"

core_status train_linear_plan(train_model *model, const train_arenas *arenas) {
  TRY(ARENA_TAKE(arenas->host, train_experts_local(model) + 1, &model->linear.group));
  return CORE_OK;
}

core_status train_linear_add(train_model *model, train_linear *map) {
  if (model->map_count == model->map_capacity) {
    int32_t capacity = model->map_capacity ? 2 * model->map_capacity : 32;
    train_linear **grown = realloc(model->map, (size_t)capacity * sizeof *grown);
    CHECK(grown, CORE_ERR_MEMORY, "no memory for %d linear maps", capacity);
    model->map = grown;
    model->map_capacity = capacity;
  }
  model->map[model->map_count++] = map;
  return CORE_OK;
}

bool train_linear_trained(const train_model *model, const train_linear *map) {
  const train_parameters *p = &model->parameters;
  bool adapter = map->lora.rank > 0 &&
                 (train_parameter_trained(p, map->lora.a) || train_parameter_trained(p, map->lora.b));
  return adapter || train_parameter_trained(p, map->weight) || train_parameter_trained(p, map->bias);
}

core_status train_product(train_model *model, kern_form form, const int64_t *group, core_tensor a,
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
  TRY(train_product(model, KERN_NT, rows.group, x, train_parameter_matrices(p, map->weight, map->groups),
                    write, y));
  if (map->lora.rank > 0) TRY(train_lora_forward(model, map, rows, x, y));
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
static core_status grouped_matrices(train_model *model, int32_t index, int64_t groups, const int64_t *group,
                                    core_tensor dy, core_tensor x) {
  for (int64_t g = 0, last; (last = next_trained(model, index, groups, &g)) > g; g = last) {
    core_tensor rows = rows_of(model, group, g, last, dy);
    TRY(train_product(model, KERN_TN, model->linear.group, rows, rows_of(model, group, g, last, x), KERN_ADD,
                      train_parameter_gradients(&model->parameters, index + (int32_t)g, last - g)));
  }
  return CORE_OK;
}

static core_status grouped_biases(train_model *model, int32_t index, int64_t groups, const int64_t *group,
                                  core_tensor dy) {
  train_env *env = model->env;
  for (int64_t g = 0, last; (last = next_trained(model, index, groups, &g)) > g; g = last) {
    core_tensor rows = rows_of(model, group, g, last, dy);
    KERN(env, bias_grouped_bwd, model->linear.group, rows,
         train_parameter_gradients(&model->parameters, index + (int32_t)g, last - g));
  }
  return CORE_OK;
}

core_status train_matrix_backward(train_model *model, int32_t index, int64_t groups, train_linear_rows rows,
                                  core_tensor dy, core_tensor x) {
  if (rows.group) return grouped_matrices(model, index, groups, rows.group, dy, x);
  if (train_parameter_trained(&model->parameters, index))
    TRY(train_product(model, KERN_TN, NULL, dy, x, KERN_ADD,
                      train_parameter_gradient(&model->parameters, index)));
  return CORE_OK;
}

core_status train_linear_backward(train_model *model, const train_linear *map, train_linear_rows rows,
                                  core_tensor dy, core_tensor x, core_tensor dx) {
  const train_parameters *p = &model->parameters;
  bool adapted = map->lora.rank > 0;
  if (rows.group && map->groups == 0) return CORE_OK;
  TRY(train_matrix_backward(model, map->weight, map->groups, rows, dy, x));
  if (map->bias >= 0)
    TRY(rows.group ? grouped_biases(model, map->bias, map->groups, rows.group, dy)
                   : train_bias_backward(model, map->bias, dy));
  if (adapted) TRY(train_lora_backward(model, map, rows, dy, x));
  if (!dx.data) return CORE_OK;
  TRY(train_product(model, KERN_NN, rows.group, dy, train_parameter_matrices(p, map->weight, map->groups),
                    KERN_SET, dx));
  if (adapted) TRY(train_lora_backward_input(model, map, rows, dx));
  return CORE_OK;
}
