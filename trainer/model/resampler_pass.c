/* The passes of a resampler: a layer forward and backward, and the whole; see resampler.h. */
#include <math.h>

#include "trainer/model/resampler.h"
#include "trainer/model/tower.h"

/* ---- a layer ---- */

/* What a pass has at hand. */
typedef struct pass {
  train_model *model;
  train_resampler *r;
  kern_segments items, latent_items; /* of queries and of latents */
  train_linear_rows rows, latent_rows;
  core_tensor latents;
  int64_t R, T;
} pass;

static pass make_pass(train_model *model, int32_t m, core_tensor latents, train_linear_rows rows, int64_t R) {
  train_resampler *r = model->connector[m].resampler;
  int64_t T = latents.shape[0], count = model->items.part_count[m];
  return (pass){
      .model = model,
      .r = r,
      .items = train_segments_of(model, m),
      .latent_items = {r->latent_offset.host, train_rows(r->latent_offset.device, count + 1), count},
      .rows = rows,
      .latent_rows = {.key = train_rows(r->latent_key.device, T)},
      .latents = latents,
      .R = R,
      .T = T};
}

static kern_attention attention_of(const pass *p) {
  int64_t width = p->r->W / p->r->H;
  return (kern_attention){.segments = p->items,
                          .heads = (int32_t)p->r->H,
                          .kv_heads = (int32_t)p->r->H,
                          .head_width = (int32_t)width,
                          .mask = KERN_BIDIRECTIONAL,
                          .scale = 1 / sqrt((double)width)};
}

static kern_cross cross_of(const pass *p, const train_resampler_layer *layer) {
  return (kern_cross){.attention = attention_of(p),
                      .keys = p->latent_items,
                      .q = train_rows(layer->q_rows, p->R),
                      .kv = train_rows(layer->kv_rows, p->T),
                      .out = train_rows(layer->cross_mixed, p->R),
                      .lse = train_rows(layer->cross_lse, p->R)};
}

static core_status norm_forward(const pass *p, const train_layer_norm *norm, core_tensor x,
                                core_tensor *out) {
  train_env *env = p->model->env;
  const train_parameters *set = &p->model->parameters;
  *out = train_rows(norm->out, p->R);
  KERN(env, layernorm_fwd, x, train_parameter_value(set, norm->weight),
       train_parameter_value(set, norm->bias), env->settings->model.norm_epsilon, *out,
       train_rows(norm->stat, p->R));
  return CORE_OK;
}

/* dx += the gradient of x by the gradient d_norm of what left the norm. */
static core_status norm_backward(const pass *p, const train_layer_norm *norm, core_tensor x, core_tensor dx) {
  train_env *env = p->model->env;
  const train_parameters *set = &p->model->parameters;
  KERN(env, layernorm_bwd, train_rows(p->r->d_norm, p->R), x, train_parameter_value(set, norm->weight),
       train_rows(norm->stat, p->R), KERN_ADD, dx, train_parameter_gradient(set, norm->weight),
       train_parameter_gradient(set, norm->bias));
  return CORE_OK;
}

/* y = x + rows W^T + b. */
static core_status add_to(const pass *p, const train_linear *map, core_tensor rows, core_tensor x,
                          core_tensor y) {
  TRY(p->model->env->ops->device->copy(y.data, x.data, core_tensor_bytes(&x), NULL));
  TRY(train_linear_forward(p->model, map, p->rows, rows, KERN_ADD, y));
  return CORE_OK;
}

static core_status layer_forward(const pass *p, const train_resampler_layer *layer, core_tensor y) {
  train_env *env = p->model->env;
  core_tensor normed, x = train_rows(layer->input, p->R), attended = train_rows(layer->attended, p->R),
                      read = train_rows(layer->read, p->R), qkv = train_rows(layer->qkv_rows, p->R),
                      mixed = train_rows(layer->self_mixed, p->R), hidden = train_rows(layer->hidden, p->R),
                      active = train_rows(layer->active, p->R);
  const kern_attention attention = attention_of(p);
  const kern_cross cross = cross_of(p, layer);
  TRY(norm_forward(p, &layer->self_norm, x, &normed));
  TRY(train_linear_forward(p->model, &layer->qkv, p->rows, normed, KERN_SET, qkv));
  KERN(env, attention_fwd, &attention, qkv, mixed, train_rows(layer->self_lse, p->R));
  TRY(add_to(p, &layer->self_out, mixed, x, attended));
  TRY(norm_forward(p, &layer->cross_norm, attended, &normed));
  TRY(train_linear_forward(p->model, &layer->q, p->rows, normed, KERN_SET, cross.q));
  TRY(train_linear_forward(p->model, &layer->kv, p->latent_rows, p->latents, KERN_SET, cross.kv));
  KERN(env, attention_cross_fwd, &cross);
  TRY(add_to(p, &layer->cross_out, cross.out, attended, read));
  TRY(norm_forward(p, &layer->forward_norm, read, &normed));
  TRY(train_linear_forward(p->model, &layer->in, p->rows, normed, KERN_SET, hidden));
  KERN(env, gelu_fwd, KERN_GELU_ERF, hidden, active);
  TRY(add_to(p, &layer->out, active, read, y));
  return CORE_OK;
}

static core_status forward_backward(const pass *p, const train_resampler_layer *layer, core_tensor dx) {
  train_env *env = p->model->env;
  core_tensor wide = train_rows(p->r->d_wide, p->R);
  TRY(train_linear_backward(p->model, &layer->out, p->rows, dx, train_rows(layer->active, p->R), wide));
  KERN(env, gelu_bwd, KERN_GELU_ERF, wide, train_rows(layer->hidden, p->R), KERN_SET, wide);
  TRY(train_linear_backward(p->model, &layer->in, p->rows, wide, train_rows(layer->forward_norm.out, p->R),
                            train_rows(p->r->d_norm, p->R)));
  TRY(norm_backward(p, &layer->forward_norm, train_rows(layer->read, p->R), dx));
  return CORE_OK;
}

static core_status cross_backward(const pass *p, const train_resampler_layer *layer, core_tensor dx) {
  train_env *env = p->model->env;
  const kern_cross cross = cross_of(p, layer);
  core_tensor mixed = train_rows(p->r->d_mixed, p->R), dkv = train_rows(p->r->d_kv, p->T);
  core_tensor dq = core_tensor_2(p->r->d_wide.data, p->r->d_wide.dtype, p->R, p->r->W);
  TRY(train_linear_backward(p->model, &layer->cross_out, p->rows, dx, cross.out, mixed));
  KERN(env, attention_cross_bwd, &cross, mixed, dq, dkv);
  TRY(train_linear_backward(p->model, &layer->kv, p->latent_rows, dkv, p->latents, train_none()));
  TRY(train_linear_backward(p->model, &layer->q, p->rows, dq, train_rows(layer->cross_norm.out, p->R),
                            train_rows(p->r->d_norm, p->R)));
  TRY(norm_backward(p, &layer->cross_norm, train_rows(layer->attended, p->R), dx));
  return CORE_OK;
}

static core_status self_backward(const pass *p, const train_resampler_layer *layer, core_tensor dx) {
  train_env *env = p->model->env;
  const kern_attention attention = attention_of(p);
  core_tensor d_mixed = train_rows(p->r->d_mixed, p->R), mixed = train_rows(layer->self_mixed, p->R);
  core_tensor d_qkv = core_tensor_2(p->r->d_wide.data, p->r->d_wide.dtype, p->R, 3 * p->r->W);
  TRY(train_linear_backward(p->model, &layer->self_out, p->rows, dx, mixed, d_mixed));
  KERN(env, attention_bwd, &attention, d_mixed, train_rows(layer->qkv_rows, p->R), mixed,
       train_rows(layer->self_lse, p->R), d_qkv);
  TRY(train_linear_backward(p->model, &layer->qkv, p->rows, d_qkv, train_rows(layer->self_norm.out, p->R),
                            train_rows(p->r->d_norm, p->R)));
  TRY(norm_backward(p, &layer->self_norm, train_rows(layer->input, p->R), dx));
  return CORE_OK;
}

/* ---- the whole ---- */

/* What goes into layer l; at `depth` into the last map. */
static core_tensor input_of(const pass *p, int64_t l) {
  return train_rows(l < p->r->depth ? p->r->layer[l].input : p->r->output, p->R);
}

core_status train_resampler_forward(train_model *model, int32_t m, core_tensor latents,
                                    train_linear_rows rows, core_tensor x) {
  train_env *env = model->env;
  const pass p = make_pass(model, m, latents, rows, x.shape[0]);
  if (p.R == 0) return CORE_OK;
  KERN(env, fill, 0, input_of(&p, 0));
  KERN(env, position_fwd, p.items, train_parameter_value(&model->parameters, p.r->query), input_of(&p, 0));
  for (int64_t l = 0; l < p.r->depth; l++) TRY(layer_forward(&p, &p.r->layer[l], input_of(&p, l + 1)));
  TRY(train_linear_forward(model, &p.r->map, rows, input_of(&p, p.r->depth), KERN_SET, x));
  return CORE_OK;
}

static bool norm_trained(const train_model *model, const train_layer_norm *norm) {
  return train_parameter_trained(&model->parameters, norm->weight) ||
         train_parameter_trained(&model->parameters, norm->bias);
}

static bool layer_trained(const train_model *model, const train_resampler_layer *layer) {
  const train_linear *const maps[] = {&layer->qkv,       &layer->self_out, &layer->q,  &layer->kv,
                                      &layer->cross_out, &layer->in,       &layer->out};
  bool trained = norm_trained(model, &layer->self_norm) || norm_trained(model, &layer->cross_norm) ||
                 norm_trained(model, &layer->forward_norm);
  for (size_t i = 0; i < sizeof maps / sizeof *maps; i++)
    trained = trained || train_linear_trained(model, maps[i]);
  return trained;
}

/* The lowest layer that gradients must reach: the first with a trained parameter; `depth`: none. */
static int64_t lowest_layer(const train_model *model, const train_resampler *r) {
  int64_t l = 0;
  if (train_parameter_trained(&model->parameters, r->query)) return 0;
  while (l < r->depth && !layer_trained(model, &r->layer[l])) l++;
  return l;
}

core_status train_resampler_backward(train_model *model, int32_t m, core_tensor latents,
                                     train_linear_rows rows, core_tensor dx) {
  train_env *env = model->env;
  const pass p = make_pass(model, m, latents, rows, dx.shape[0]);
  const int64_t lowest = lowest_layer(model, p.r);
  core_tensor d = train_rows(p.r->d_stream, p.R);
  if (p.R == 0) return CORE_OK;
  TRY(train_linear_backward(model, &p.r->map, rows, dx, input_of(&p, p.r->depth),
                            lowest < p.r->depth ? d : train_none()));
  for (int64_t l = p.r->depth - 1; l >= lowest; l--) {
    const train_resampler_layer *layer = &p.r->layer[l];
    if (model->recomputes) TRY(layer_forward(&p, layer, input_of(&p, l + 1)));
    TRY(forward_backward(&p, layer, d));
    TRY(cross_backward(&p, layer, d));
    TRY(self_backward(&p, layer, d));
  }
  if (train_parameter_trained(&model->parameters, p.r->query))
    KERN(env, position_bwd, p.items, d, train_parameter_gradient(&model->parameters, p.r->query));
  return CORE_OK;
}
