/* Head of modality m: z = L2norm(mean(item) W^T), W without bias (METHODS: LIMoE). */
#include <math.h>

#include "trainer/model/tower.h"

core_status train_head_declare(train_model *model, int32_t m) {
  train_parameter matrix = {.rank = 2,
                            .shape = {model->Z, model->C},
                            .scope = TRAIN_SCOPE_MODALITY,
                            .modality = m,
                            .init = TRAIN_INIT_NORMAL,
                            .init_value = 1 / sqrt((double)model->C),
                            .decay = true};
  TRY(train_declare(model, matrix, &model->head[m].map.weight, "head.%s.weight",
                    model->env->settings->data.modalities[m].name));
  model->head[m].map.bias = -1;
  return CORE_OK;
}

core_status train_head_plan(train_model *model, int32_t m, core_arena *arena) {
  train_head *head = &model->head[m];
  int64_t n = model->limits.segments[m];
  TRY(train_take(arena, CORE_REAL_DTYPE, n, model->Z, &head->raw));
  TRY(train_take(arena, CORE_REAL_DTYPE, n, model->Z, &head->z));
  TRY(train_take(arena, CORE_REAL_DTYPE, n, 1, &head->norm));
  head->norm.rank = 1;
  TRY(train_take(arena, CORE_REAL_DTYPE, model->limits.training ? n : 0, model->Z, &head->gradient));
  TRY(train_take_active(model, arena, model->limits.training ? n : 0, model->Z, &head->d_raw));
  return CORE_OK;
}

static core_tensor items_of(const train_model *model, int32_t m, core_tensor all) {
  const int64_t *first = model->items.segment_first;
  return train_slice(all, first[m], first[m + 1] - first[m]);
}

core_status train_head_forward(train_model *model, int32_t m) {
  train_env *env = model->env;
  train_head *head = &model->head[m];
  core_tensor pooled = items_of(model, m, model->pooled);
  int64_t n = pooled.shape[0];
  core_tensor raw = train_rows(head->raw, n);
  TRY(train_linear_forward(model, &head->map, (train_linear_rows){0}, pooled, KERN_SET, raw));
  KERN(env, l2norm_fwd, raw, train_rows(head->z, n), train_rows(head->norm, n));
  return CORE_OK;
}

core_status train_head_backward(train_model *model, int32_t m) {
  train_env *env = model->env;
  train_head *head = &model->head[m];
  core_tensor pooled = items_of(model, m, model->pooled), d_pooled = items_of(model, m, model->d_pooled);
  int64_t n = pooled.shape[0];
  core_tensor d_raw = train_rows(head->d_raw, n);
  KERN(env, l2norm_bwd, train_rows(head->gradient, n), train_rows(head->z, n), train_rows(head->norm, n),
       KERN_SET, d_raw);
  TRY(train_linear_backward(model, &head->map, (train_linear_rows){0}, d_raw, pooled, d_pooled));
  return CORE_OK;
}
