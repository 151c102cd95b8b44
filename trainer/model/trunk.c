/* A trunk: L blocks, then y = RMSNorm(x), for the rows that pass it: all of them, or those of the modality
 * that has it for itself. Trunks of their own share the memory of gradients, which they use one after
 * another. */
#include <stdio.h>
#include <string.h>

#include "trainer/model/tower.h"

bool train_trunk_held(const train_model *model, int32_t t) {
  const train_layout *layout = &model->env->layout;
  return !model->own_trunks || train_layout_holds(layout, layout->rank, t);
}

train_span train_trunk_rows(const train_model *model, int32_t t) {
  const train_items *items = &model->items;
  if (!model->own_trunks) return (train_span){0, items->tokens};
  return (train_span){items->row_first[t], items->row_first[t + 1] - items->row_first[t]};
}

kern_segments train_trunk_segments(const train_model *model, int32_t t) {
  return model->own_trunks ? train_segments_of(model, t) : train_segments(model);
}

train_linear_rows train_trunk_linear_rows(const train_model *model, int32_t t) {
  train_span rows = train_trunk_rows(model, t);
  return (train_linear_rows){.key = train_slice(model->items.key.device, rows.first, rows.count)};
}

core_status train_trunk_declare_parameter(train_model *model, int32_t t, train_parameter parameter,
                                          int32_t *index, const char *name) {
  if (!model->own_trunks) {
    TRY(train_declare(model, parameter, index, "%s", name));
    return CORE_OK;
  }
  parameter.scope = TRAIN_SCOPE_MODALITY;
  parameter.modality = t;
  TRY(train_declare(model, parameter, index, "trunk.%s.%s", model->env->settings->data.modalities[t].name,
                    name));
  return CORE_OK;
}

/* Block `layer` of trunk t, as blocks are numbered. */
static int32_t number(const train_model *model, int32_t t, int64_t layer) {
  return (int32_t)(t * model->L + layer);
}

int64_t train_model_points(const train_model *model) {
  return model->trunks * model->L + 1;
}

static int64_t point_of(const train_model *model, int64_t t, int64_t layer) {
  return t * model->L + model->L - 1 - layer;
}

int64_t train_parameter_point(const train_model *model, const train_parameter *parameter) {
  int64_t t = 0, end = train_model_points(model) - 1;
  int layer = 0;
  const char *name = parameter->name;
  if (model->env->settings->model.kind == TRAIN_KIND_CONNECTOR) return end;
  if (model->own_trunks && strncmp(name, "trunk.", 6) == 0) {
    t = parameter->modality;
    name += 7 + strlen(model->env->settings->data.modalities[t].name);
  }
  if (strncmp(name, "final_norm.", 11) == 0) return point_of(model, t, model->L - 1);
  if (strncmp(name, "head.", 5) == 0 || strncmp(name, "output.", 7) == 0) return 0;
  return sscanf(name, "blocks.%d.", &layer) == 1 ? point_of(model, t, layer) : end;
}

core_status train_trunk_declare(train_model *model, int32_t t) {
  train_parameter norm = {.rank = 1, .shape = {model->C}, .init = TRAIN_INIT_ONE};
  for (int64_t l = 0; l < model->L; l++) TRY(train_block_declare(model, number(model, t, l)));
  TRY(train_trunk_declare_parameter(model, t, norm, &model->final_norm[t].weight, "final_norm.weight"));
  return CORE_OK;
}

core_status train_trunk_plan(train_model *model, int32_t t, const train_arenas *arenas) {
  for (int64_t l = 0; l < model->L; l++) {
    train_block *block = &model->block[number(model, t, l)];
    block->rows = model->own_trunks ? model->limits.tokens[t] : model->T;
    TRY(train_block_plan(model, number(model, t, l), arenas));
  }
  return CORE_OK;
}

/* The trunk's rows of a tensor of all rows. */
static core_tensor passing(const train_model *model, int32_t t, core_tensor all) {
  train_span rows = train_trunk_rows(model, t);
  return train_slice(all, rows.first, rows.count);
}

/* What goes into block l; at L: into the last norm. */
static core_tensor input_of(const train_model *model, int32_t t, int64_t l) {
  if (l == 0) return passing(model, t, model->input);
  return train_rows(model->block[number(model, t, l - 1)].output, train_trunk_rows(model, t).count);
}

core_status train_trunk_forward(train_model *model, int32_t t, core_tensor x, train_mode mode) {
  train_env *env = model->env;
  x = passing(model, t, x);
  for (int64_t l = 0; l < model->L; l++) {
    comm_note(env->comm, env->step, (int32_t)l, "forward");
    TRY(train_block_forward(model, number(model, t, l), x, mode));
    x = input_of(model, t, l + 1);
  }
  KERN(env, rmsnorm_fwd, x, train_parameter_value(&model->parameters, model->final_norm[t].weight),
       env->settings->model.norm_epsilon, passing(model, t, model->final_norm[0].out),
       passing(model, t, model->final_norm[0].inv));
  return CORE_OK;
}

/* Derivatives by the sums of one layer. */
static core_tensor router_of(const train_model *model, const train_block *block, core_tensor router) {
  int64_t classes = model->sums.modalities;
  bool none = !block->has_moe || !router.data;
  return none ? train_none() : train_slice(router, block->moe.index * classes, classes);
}

core_status train_trunk_backward(train_model *model, int32_t t, core_tensor router, core_tensor dn,
                                 core_tensor dx) {
  train_env *env = model->env;
  const train_norm *norm = &model->final_norm[t];
  dx = passing(model, t, dx);
  KERN(env, rmsnorm_bwd, passing(model, t, dn), input_of(model, t, model->L),
       train_parameter_value(&model->parameters, norm->weight), passing(model, t, model->final_norm[0].inv),
       KERN_SET, dx, train_parameter_gradient(&model->parameters, norm->weight));
  for (int64_t l = model->L - 1; l >= 0 && l >= model->lowest; l--) {
    int32_t b = number(model, t, l);
    comm_note(env->comm, env->step, (int32_t)l, "backward");
    if (model->recomputes) TRY(train_block_forward(model, b, input_of(model, t, l), TRAIN_MODE_AGAIN));
    TRY(train_block_backward(model, b, input_of(model, t, l), router_of(model, &model->block[b], router),
                             dx));
    if (model->passed.call) TRY(model->passed.call(model->passed.context, point_of(model, t, l)));
  }
  return CORE_OK;
}
