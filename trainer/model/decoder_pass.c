/* The passes at both ends of a decoder: see decoder.h for the mathematics. */
#include <math.h>

#include "trainer/model/decoder.h"
#include "trainer/model/tower.h"

/* ---- splicing ---- */

/* Rows of modality m among the latents. */
static core_tensor latents_of(const train_model *model, int32_t m) {
  const int64_t *first = model->items.row_first;
  return train_slice(model->decoder.latent, first[m], first[m + 1] - first[m]);
}

core_status train_decoder_embed(train_model *model, core_tensor x) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  int64_t T = model->items.tokens;
  for (int32_t m = 0; m < env->layout.modalities; m++)
    TRY(train_connector_forward(model, m, latents_of(model, m)));
  KERN(env, combine_fwd, train_rows(d->latent, d->latents), train_rows(d->latent_slot.device, T),
       train_none(), KERN_SET, x);
  KERN(env, combine_fwd, train_parameter_matrix(&model->parameters, d->embedding),
       train_rows(d->token.device, T), train_none(), KERN_ADD, x);
  return CORE_OK;
}

core_status train_decoder_embed_backward(train_model *model, core_tensor dx) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  kern_segments lookups = {d->lookup_offset.host, train_rows(d->lookup_offset.device, d->lookups + 1),
                           d->lookups};
  if (train_parameter_trained(&model->parameters, d->embedding))
    KERN(env, embedding_bwd, lookups, train_rows(d->lookup_row.device, d->texts),
         train_rows(d->lookup_entry.device, d->lookups), dx,
         train_parameter_gradient(&model->parameters, d->embedding));
  KERN(env, gather_rows, dx, train_rows(d->order.device, d->latents), train_rows(d->latent, d->latents));
  for (int32_t m = 0; m < env->layout.modalities; m++)
    TRY(train_connector_backward(model, m, latents_of(model, m)));
  return CORE_OK;
}

/* ---- the head ---- */

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static core_tensor line(core_tensor rows, int64_t first, int64_t n) {
  core_tensor slice = train_slice(rows, first, n);
  return core_tensor_1(slice.data, slice.dtype, n);
}

/* Gradients of a block's rows and of the table, from its logits, whose place they take. */
static core_status differentiate(train_model *model, int64_t first, int64_t n, core_tensor logits) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  core_tensor d_logits = train_rows(d->d_logits, n),
              gradient = train_parameter_gradient(&model->parameters, d->output);
  KERN(env, cross_entropy_bwd, d->weight, line(d->lse.device, first, n), 0, d->V,
       line(d->target.device, first, n), logits, d_logits);
  if (gradient.data) KERN(env, gemm, KERN_TN, d_logits, train_slice(d->hidden, first, n), KERN_ADD, gradient);
  KERN(env, gemm, KERN_NN, d_logits, train_parameter_matrix(&model->parameters, d->output), KERN_SET,
       train_slice(d->d_hidden, first, n));
  return CORE_OK;
}

core_status train_decoder_predict(train_model *model, core_tensor rows, int mode) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  int64_t R = d->predicted;
  KERN(env, gather_rows, rows, train_rows(d->predict_row.device, R), train_rows(d->hidden, R));
  KERN(env, fill, -INFINITY, train_rows(d->lse.device, R));
  KERN(env, fill, 0, train_rows(d->positive.device, R));
  for (int64_t first = 0, n; first < R; first += n) {
    n = least(d->logits.shape[0], R - first);
    core_tensor logits = train_rows(d->logits, n);
    TRY(train_decoder_logits(model, train_slice(d->hidden, first, n), logits));
    KERN(env, cross_entropy_fwd, logits, 0, d->V, line(d->target.device, first, n),
         line(d->lse.device, first, n), line(d->positive.device, first, n));
    if (mode != TRAIN_MODE_EVALUATE && !d->loss_alone) TRY(differentiate(model, first, n, logits));
  }
  if (mode == TRAIN_MODE_AGAIN) return CORE_OK;
  TRY(train_mirror_down(env, &d->lse, R));
  TRY(train_mirror_down(env, &d->positive, R));
  const core_real *lse = d->lse.host, *positive = d->positive.host;
  for (int64_t i = 0; i < R; i++) d->loss += (double)lse[i] - (double)positive[i];
  return CORE_OK;
}

core_status train_decoder_predict_backward(train_model *model, core_tensor drows) {
  train_decoder *d = &model->decoder;
  KERN(model->env, combine_fwd, train_rows(d->d_hidden, d->predicted),
       train_rows(d->predict_slot.device, model->items.tokens), train_none(), KERN_SET, drows);
  return CORE_OK;
}

core_status train_decoder_logits(train_model *model, core_tensor hidden, core_tensor logits) {
  KERN(model->env, gemm, KERN_NT, hidden, train_parameter_matrix(&model->parameters, model->decoder.output),
       KERN_SET, logits);
  return CORE_OK;
}
