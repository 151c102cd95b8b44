#include "trainer/objective/alignment_loss.h"

#include <string.h>

#include "trainer/share_rows.h"

core_status train_alignment_loss_make(train_env *env, const train_model *model, train_alignment_loss *out) {
  memset(out, 0, sizeof *out);
  out->env = env;
  TRY(train_contrastive_make(env, model->Z, &out->contrastive));
  out->contrastive.pairs = model->alignment.directions;
  out->contrastive.averaged = 1;
  for (int32_t d = 0; d < model->alignment.directions; d++) {
    out->contrastive.first[d] = model->alignment.direction[d].from;
    out->contrastive.second[d] = model->alignment.direction[d].toward;
  }
  return CORE_OK;
}

core_status train_alignment_loss_plan(train_alignment_loss *loss, const train_model *model,
                                      const train_arenas *arenas) {
  core_arena *arena = arenas->objective;
  int64_t B = loss->contrastive.B, D = 0;
  for (int32_t m = 0; m < loss->env->layout.modalities; m++)
    if (model->limits.width[m] > D) D = model->limits.width[m];
  TRY(train_contrastive_plan(&loss->contrastive, arenas));
  TRY(train_take(arena, CORE_REAL_DTYPE, B * D, 1, &loss->predicted));
  TRY(train_take(arena, CORE_REAL_DTYPE, B * D, 1, &loss->target));
  TRY(train_take(arena, loss->env->active, B * D, 1, &loss->d_predicted));
  TRY(train_mirror_plan(arenas, arena, CORE_REAL_DTYPE, B, 1, &loss->rows));
  return CORE_OK;
}

/* Rows of this rank's samples of modality m in micro-batch `micro`, of a flat [B D]. */
static core_tensor own_rows(const train_alignment_loss *loss, core_tensor flat, int32_t m, int64_t micro,
                            int64_t D) {
  data_range range = train_layout_range(&loss->env->layout, loss->env->layout.rank, m, micro);
  return train_slice(core_tensor_2(flat.data, flat.dtype, loss->contrastive.B, D), range.lo,
                     range.hi - range.lo);
}

static core_status copy(const train_alignment_loss *loss, void *to, const void *from, core_tensor rows) {
  if (core_tensor_bytes(&rows) > 0)
    TRY(loss->env->ops->device->copy(to, from, core_tensor_bytes(&rows), NULL));
  return CORE_OK;
}

core_status train_alignment_loss_put(train_alignment_loss *loss, const train_model *model, int64_t micro) {
  const train_alignment *a = &model->alignment;
  const train_direction *d = &a->direction[a->active];
  int64_t D = model->limits.width[d->toward];
  core_tensor predicted = own_rows(loss, loss->predicted, d->from, micro, D);
  core_tensor target = own_rows(loss, loss->target, d->toward, micro, D);
  TRY(train_contrastive_put_rows(&loss->contrastive, d->from, micro, a->query_rows));
  TRY(train_contrastive_put_rows(&loss->contrastive, d->toward, micro, a->key_rows));
  TRY(copy(loss, predicted.data, a->predicted.data, predicted));
  TRY(copy(loss, target.data, a->target_rows.data, target));
  return CORE_OK;
}

core_status train_alignment_loss_get(const train_alignment_loss *loss, train_model *model, int64_t micro) {
  train_alignment *a = &model->alignment;
  const train_direction *d = &a->direction[a->active];
  core_tensor own = own_rows(loss, loss->d_predicted, d->from, micro, model->limits.width[d->toward]);
  TRY(train_contrastive_get_rows(&loss->contrastive, d->from, micro, a->d_query));
  TRY(train_contrastive_get_rows(&loss->contrastive, d->toward, micro, a->d_key));
  TRY(copy(loss, a->d_predicted.data, own.data, own));
  return CORE_OK;
}

/* Samples [lo, hi) of a vector [B]. */
static core_tensor samples(core_tensor vector, data_range range) {
  core_tensor flat = core_tensor_1(vector.data, vector.dtype, core_tensor_count(&vector));
  return train_slice(flat, range.lo, range.hi - range.lo);
}

static core_status regress(train_alignment_loss *loss, const train_model *model, int32_t d) {
  train_env *env = loss->env;
  const train_settings *s = env->settings;
  const train_contrastive *c = &loss->contrastive;
  const train_direction *direction = &model->alignment.direction[d];
  int64_t D = model->limits.width[direction->toward], count = c->count[d];
  double weight = count > 0 ? s->objective.alpha / (double)count : 0;
  core_tensor valid = train_slice(c->valid.device, d, 1), target = loss->target;
  target = core_tensor_2(target.data, target.dtype, c->B, D);
  TRY(train_share_rows(env, &env->layout, direction->toward, target, c->send, c->recv));
  KERN(env, fill, 0, loss->rows.device);
  for (int64_t micro = 0; micro < env->layout.micro_batches; micro++) {
    data_range range = train_layout_range(&env->layout, env->layout.rank, direction->from, micro);
    if (range.hi > range.lo)
      KERN(env, regression, (kern_regression)s->objective.regression, weight,
           own_rows(loss, loss->predicted, direction->from, micro, D),
           train_slice(target, range.lo, range.hi - range.lo), samples(valid, range),
           samples(loss->rows.device, range), own_rows(loss, loss->d_predicted, direction->from, micro, D));
  }
  TRY(train_mirror_down(env, &loss->rows, c->B));
  const core_real *rows = loss->rows.host;
  for (int64_t j = 0; j < c->B; j++) loss->regression[d] += (double)rows[j];
  return CORE_OK;
}

core_status train_alignment_loss_evaluate(train_alignment_loss *loss, const train_model *model,
                                          const data_batch *batch, int32_t d) {
  const train_settings *s = loss->env->settings;
  loss->regression[d] = 0;
  loss->contrastive.factor = 1 - s->objective.alpha;
  TRY(train_contrastive_evaluate_pair(&loss->contrastive, batch, 1 / s->objective.temperature, d));
  TRY(regress(loss, model, d));
  return CORE_OK;
}
