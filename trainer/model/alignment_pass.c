/* The passes of the connector: see alignment.h for the mathematics, alignment.c for parameters, memory and
 * items. */
#include "trainer/model/alignment.h"
#include "trainer/model/tower.h"

static const double layer_norm_epsilon = 1e-5;

static bool holds(const train_model *model, int32_t m) {
  return train_layout_holds(&model->env->layout, model->env->layout.rank, m);
}

static const train_direction *active(const train_model *model) {
  return &model->alignment.direction[model->alignment.active];
}

static train_block *active_block(train_model *model) {
  return &model->block[active(model)->block];
}

/* Segments of one view, or of the latents of a modality: both count from the first row. */
static kern_segments segments_of(const train_model *model, int32_t m) {
  const train_items *items = &model->items;
  return (kern_segments){items->part_offset[m].host,
                         train_rows(items->part_offset[m].device, items->part_count[m] + 1),
                         items->part_count[m]};
}

/* ---- forward ---- */

static core_tensor shaped(core_tensor flat, int64_t rows, int64_t columns) {
  return core_tensor_2(flat.data, flat.dtype, rows, columns);
}

static int64_t view_rows(const train_model *model) {
  return model->items.tokens / TRAIN_VIEWS;
}

static core_tensor view_of(const train_model *model, core_tensor rows, int v) {
  return train_slice(rows, v * view_rows(model), view_rows(model));
}

/* Part v of pooled [2 S, H]. */
static core_tensor pooled_view(const train_model *model, core_tensor pooled, int v) {
  int64_t S = model->items.segments / TRAIN_VIEWS;
  return train_slice(pooled, v * S, S);
}

static core_status copy(train_model *model, core_tensor from, core_tensor to) {
  if (core_tensor_bytes(&from) > 0)
    TRY(model->env->ops->device->copy(to.data, from.data, core_tensor_bytes(&from), NULL));
  return CORE_OK;
}

/* Standardised latents of modality m into input[side]; *out is their [T, D]. */
static core_status standardised(train_model *model, int side, int32_t m, core_tensor *out) {
  const train_connector_layer *layer = &model->connector[m];
  core_tensor latent = model->items.latent[m];
  *out = shaped(model->alignment.input[side], latent.shape[0], latent.shape[1]);
  KERN(model->env, standardize, latent, layer->shift.device, layer->scale.device, *out);
  return CORE_OK;
}

/* rows W^T + bias. */
static core_status linear(train_model *model, core_tensor rows, int32_t weight, int32_t bias,
                          core_tensor out) {
  const train_linear map = train_linear_of(weight, bias);
  TRY(train_linear_forward(model, &map, (train_linear_rows){0}, rows, KERN_SET, out));
  return CORE_OK;
}

static core_status adapt(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor input, before = train_rows(a->before, view_rows(model));
  if (!holds(model, d->from)) return CORE_OK;
  TRY(standardised(model, 0, d->from, &input));
  KERN(env, bias_fwd, train_parameter_value(&model->parameters, d->embedding), input);
  TRY(linear(model, input, a->adapter[d->from], a->adapter_bias[d->from], before));
  KERN(env, gelu_fwd, KERN_GELU_ERF, before, view_of(model, a->x, 0));
  TRY(copy(model, view_of(model, a->x, 0), view_of(model, a->x, 1)));
  for (int v = 0; v < TRAIN_VIEWS; v++)
    KERN(env, bias_fwd, train_parameter_value(&model->parameters, part->view[v]), view_of(model, a->x, v));
  return CORE_OK;
}

/* y = block(x): the mixture, or the dense baseline with its biases. */
static core_status run_block(train_model *model, int mode, core_tensor x, core_tensor y) {
  train_env *env = model->env;
  train_block *block = active_block(model);
  KERN(env, fill, 0, y);
  if (block->has_moe) return train_moe_forward(model, &block->moe, x, mode, y);
  train_linear_rows rows = train_trunk_linear_rows(model, 0);
  core_tensor hidden = train_rows(block->dense.hidden, x.shape[0]),
              active_rows = train_rows(block->dense.active, x.shape[0]);
  TRY(train_linear_forward(model, &block->dense.in, rows, x, KERN_SET, hidden));
  TRY(train_activate(model, hidden, active_rows));
  TRY(train_linear_forward(model, &block->dense.out, rows, active_rows, KERN_SET, y));
  return CORE_OK;
}

/* o_v = s_v + GELU(LN_v(y_v)), and the means over items. */
static core_status leave_block(train_model *model, int v) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor norm = view_of(model, a->norm, v), gated = view_of(model, a->gated, v);
  core_tensor output = view_of(model, a->output, v);
  KERN(env, layernorm_fwd, view_of(model, a->y, v), train_parameter_value(&model->parameters, part->norm[v]),
       train_parameter_value(&model->parameters, part->norm_bias[v]), layer_norm_epsilon, norm,
       train_rows(a->stat[v], view_rows(model)));
  KERN(env, gelu_fwd, KERN_GELU_ERF, norm, gated);
  TRY(copy(model, view_of(model, a->x, v), output));
  KERN(env, axpy, 1, gated, output);
  KERN(env, segment_mean_fwd, segments_of(model, d->from), output, pooled_view(model, a->pooled, v));
  return CORE_OK;
}

/* The side that is asked from: prediction and query. */
static core_status ask(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->from];
  if (!holds(model, d->from)) return CORE_OK;
  for (int v = 0; v < TRAIN_VIEWS; v++) TRY(leave_block(model, v));
  TRY(linear(model, pooled_view(model, a->pooled, TRAIN_VIEW_PREDICTION), a->target[d->toward],
             a->target_bias[d->toward], shaped(a->predicted, S, model->limits.width[d->toward])));
  TRY(linear(model, pooled_view(model, a->pooled, TRAIN_VIEW_CONTRAST), d->query, d->query_bias,
             train_rows(a->raw, S)));
  KERN(env, l2norm_fwd, train_rows(a->raw, S), train_rows(a->query_rows, S), train_rows(a->query_norm, S));
  return CORE_OK;
}

/* The side that is looked for: target and key, which depend on its latents alone. */
static core_status answer(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->toward], D = model->limits.width[d->toward];
  core_tensor input, mean = shaped(a->mean, S, D);
  if (!holds(model, d->toward)) return CORE_OK;
  TRY(standardised(model, 1, d->toward, &input));
  KERN(env, segment_mean_fwd, segments_of(model, d->toward), input, mean);
  KERN(env, cast, mean, shaped(a->target_rows, S, D));
  TRY(linear(model, mean, a->key[d->toward], a->key_bias[d->toward], train_rows(a->key_raw, S)));
  KERN(env, l2norm_fwd, train_rows(a->key_raw, S), train_rows(a->key_rows, S), train_rows(a->key_norm, S));
  return CORE_OK;
}

core_status train_alignment_forward(train_model *model, int mode) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  comm_note(env->comm, env->step, active(model)->block, "forward");
  TRY(adapt(model));
  TRY(run_block(model, mode, train_rows(a->x, model->items.tokens), train_rows(a->y, model->items.tokens)));
  TRY(ask(model));
  TRY(answer(model));
  return CORE_OK;
}

/* ---- backward ---- */

/* dy: gradient of rows W^T + bias. d_rows may be absent. */
static core_status linear_backward(train_model *model, core_tensor dy, core_tensor rows, int32_t weight,
                                   int32_t bias, core_tensor d_rows) {
  const train_linear map = train_linear_of(weight, bias);
  TRY(train_linear_backward(model, &map, (train_linear_rows){0}, dy, rows, d_rows));
  return CORE_OK;
}

static core_status answer_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  int64_t S = model->items.part_count[d->toward];
  if (!holds(model, d->toward)) return CORE_OK;
  KERN(env, l2norm_bwd, train_rows(a->d_key, S), train_rows(a->key_rows, S), train_rows(a->key_norm, S),
       KERN_SET, train_rows(a->d_raw, S));
  TRY(linear_backward(model, train_rows(a->d_raw, S), shaped(a->mean, S, model->limits.width[d->toward]),
                      a->key[d->toward], a->key_bias[d->toward], train_none()));
  return CORE_OK;
}

/* Heads, means, GELU and norm of both views: leaves d_output and d_y. */
static core_status ask_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  train_parameters *p = &model->parameters;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  int64_t S = model->items.part_count[d->from], T = view_rows(model);
  KERN(env, l2norm_bwd, train_rows(a->d_query, S), train_rows(a->query_rows, S), train_rows(a->query_norm, S),
       KERN_SET, train_rows(a->d_raw, S));
  TRY(linear_backward(model, train_rows(a->d_raw, S), pooled_view(model, a->pooled, TRAIN_VIEW_CONTRAST),
                      d->query, d->query_bias, pooled_view(model, a->d_pooled, TRAIN_VIEW_CONTRAST)));
  TRY(linear_backward(model, shaped(a->d_predicted, S, model->limits.width[d->toward]),
                      pooled_view(model, a->pooled, TRAIN_VIEW_PREDICTION), a->target[d->toward],
                      a->target_bias[d->toward], pooled_view(model, a->d_pooled, TRAIN_VIEW_PREDICTION)));
  for (int v = 0; v < TRAIN_VIEWS; v++) {
    core_tensor d_output = view_of(model, a->d_output, v), d_norm = view_of(model, a->d_norm, v);
    KERN(env, segment_mean_bwd, segments_of(model, d->from), pooled_view(model, a->d_pooled, v), KERN_SET,
         d_output);
    KERN(env, gelu_bwd, KERN_GELU_ERF, d_output, view_of(model, a->norm, v), KERN_SET, d_norm);
    KERN(env, layernorm_bwd, d_norm, view_of(model, a->y, v), train_parameter_value(p, part->norm[v]),
         train_rows(a->stat[v], T), KERN_SET, view_of(model, a->d_y, v),
         train_parameter_gradient(p, part->norm[v]), train_parameter_gradient(p, part->norm_bias[v]));
  }
  return CORE_OK;
}

static core_status block_backward(train_model *model, core_tensor x, core_tensor dy, core_tensor dx) {
  train_env *env = model->env;
  train_block *block = active_block(model);
  if (block->has_moe) return train_moe_backward(model, &block->moe, x, dy, train_none(), dx);
  int64_t T = x.shape[0], F = block->dense.width;
  core_tensor hidden = train_rows(block->dense.hidden, T), active_rows = train_rows(block->dense.active, T);
  core_tensor d_hidden = core_tensor_2(model->d_hidden.data, env->active, T, hidden.shape[1]);
  core_tensor d_active = core_tensor_2(model->d_active.data, env->active, T, F);
  train_linear_rows rows = train_trunk_linear_rows(model, 0);
  TRY(train_linear_backward(model, &block->dense.out, rows, dy, active_rows, d_active));
  TRY(train_activate_backward(model, d_active, hidden, d_hidden));
  TRY(train_linear_backward(model, &block->dense.in, rows, d_hidden, x, dx));
  return CORE_OK;
}

/* u was added to every token: its gradient is W^T of the columns' sum, one row instead of T. */
static core_status embedding_backward(train_model *model, core_tensor d_before) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  train_parameters *p = &model->parameters;
  const train_direction *d = active(model);
  core_tensor gradient = train_parameter_gradient(p, d->embedding);
  if (!gradient.data) return CORE_OK;
  core_tensor sum = core_tensor_1(a->d_sum.data, CORE_REAL_DTYPE, model->C);
  KERN(env, fill, 0, sum);
  KERN(env, bias_bwd, d_before, sum);
  KERN(env, cast, a->d_sum, a->d_sum_active);
  KERN(env, gemm, KERN_NN, a->d_sum_active, train_parameter_matrix(p, a->adapter[d->from]), KERN_ADD,
       core_tensor_2(gradient.data, gradient.dtype, 1, gradient.shape[0]));
  return CORE_OK;
}

static core_status adapt_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  const train_direction *d = active(model);
  const train_connector_part *part = &a->part[d->block];
  core_tensor latent = model->items.latent[d->from];
  core_tensor input = shaped(a->input[0], latent.shape[0], latent.shape[1]);
  core_tensor dz = view_of(model, a->d_x, 0), d_before = view_of(model, a->d_norm, 0);
  for (int v = 0; v < TRAIN_VIEWS; v++) {
    KERN(env, axpy, 1, view_of(model, a->d_output, v), view_of(model, a->d_x, v));
    TRY(train_bias_backward(model, part->view[v], view_of(model, a->d_x, v)));
  }
  KERN(env, axpy, 1, view_of(model, a->d_x, 1), dz);
  KERN(env, gelu_bwd, KERN_GELU_ERF, dz, train_rows(a->before, view_rows(model)), KERN_SET, d_before);
  TRY(linear_backward(model, d_before, input, a->adapter[d->from], a->adapter_bias[d->from], train_none()));
  TRY(embedding_backward(model, d_before));
  return CORE_OK;
}

core_status train_alignment_backward(train_model *model) {
  train_env *env = model->env;
  train_alignment *a = &model->alignment;
  int64_t rows = model->items.tokens;
  bool asks = holds(model, active(model)->from);
  comm_note(env->comm, env->step, active(model)->block, "backward");
  TRY(answer_backward(model));
  if (asks) TRY(ask_backward(model));
  TRY(block_backward(model, train_rows(a->x, rows), train_rows(a->d_y, rows), train_rows(a->d_x, rows)));
  if (asks) TRY(adapt_backward(model));
  return CORE_OK;
}
