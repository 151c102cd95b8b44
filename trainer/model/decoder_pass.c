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

/* A block of predictions by a part of the vocabulary. */
typedef struct piece {
  int64_t first, rows;   /* predictions */
  int64_t column, width; /* tokens */
} piece;

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* The next piece, parts of a block first; begins with all zeros. False at the end. */
static bool next_piece(const train_decoder *d, piece *p) {
  int64_t block = d->logits.shape[0], part = d->logits.shape[1];
  bool begins = p->rows == 0;
  p->column = begins ? 0 : p->column + p->width;
  if (p->column == d->V) {
    p->first += p->rows;
    p->column = 0;
  }
  p->rows = least(block, d->predicted - p->first);
  p->width = least(part, d->V - p->column);
  return p->rows > 0;
}

/* Of a flat buffer that is at least as large. */
static core_tensor shaped(core_tensor buffer, int64_t rows, int64_t columns) {
  return core_tensor_2(buffer.data, buffer.dtype, rows, columns);
}

static core_tensor line(core_tensor rows, int64_t first, int64_t n) {
  core_tensor slice = train_slice(rows, first, n);
  return core_tensor_1(slice.data, slice.dtype, n);
}

static core_tensor weights_of(const train_model *model, const piece *p) {
  return train_slice(train_parameter_matrix(&model->parameters, model->decoder.output), p->column, p->width);
}

static core_status logits_of(train_model *model, const piece *p, core_tensor *logits) {
  train_decoder *d = &model->decoder;
  *logits = shaped(d->logits, p->rows, p->width);
  KERN(model->env, gemm, KERN_NT, train_slice(d->hidden, p->first, p->rows), weights_of(model, p), KERN_SET,
       *logits);
  return CORE_OK;
}

core_status train_decoder_predict(train_model *model, core_tensor rows, int mode) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  int64_t R = d->predicted;
  core_tensor logits;
  KERN(env, gather_rows, rows, train_rows(d->predict_row.device, R), train_rows(d->hidden, R));
  KERN(env, fill, -INFINITY, train_rows(d->lse.device, R));
  KERN(env, fill, 0, train_rows(d->positive.device, R));
  for (piece p = {0}; next_piece(d, &p);) {
    TRY(logits_of(model, &p, &logits));
    KERN(env, cross_entropy_fwd, logits, p.column, d->V, line(d->target.device, p.first, p.rows),
         line(d->lse.device, p.first, p.rows), line(d->positive.device, p.first, p.rows));
  }
  if (mode == TRAIN_MODE_AGAIN) return CORE_OK;
  TRY(train_mirror_down(env, &d->lse, R));
  TRY(train_mirror_down(env, &d->positive, R));
  const core_real *lse = d->lse.host, *positive = d->positive.host;
  for (int64_t i = 0; i < R; i++) d->loss += (double)lse[i] - (double)positive[i];
  return CORE_OK;
}

core_status train_decoder_predict_backward(train_model *model, core_tensor drows) {
  train_env *env = model->env;
  train_decoder *d = &model->decoder;
  core_tensor logits, gradient = train_parameter_gradient(&model->parameters, d->output);
  for (piece p = {0}; next_piece(d, &p);) {
    core_tensor d_logits = shaped(d->d_logits, p.rows, p.width), d_part = train_rows(d->d_part, p.rows);
    TRY(logits_of(model, &p, &logits));
    KERN(env, cross_entropy_bwd, d->weight, line(d->lse.device, p.first, p.rows), p.column, d->V,
         line(d->target.device, p.first, p.rows), logits, d_logits);
    if (gradient.data)
      KERN(env, gemm, KERN_TN, d_logits, train_slice(d->hidden, p.first, p.rows), KERN_ADD,
           train_slice(gradient, p.column, p.width));
    /* summed over the parts in float32, then rounded once */
    KERN(env, gemm, KERN_NN, d_logits, weights_of(model, &p), p.column == 0 ? KERN_SET : KERN_ADD, d_part);
    if (p.column + p.width == d->V) KERN(env, cast, d_part, train_slice(d->d_hidden, p.first, p.rows));
  }
  KERN(env, combine_fwd, train_rows(d->d_hidden, d->predicted),
       train_rows(d->predict_slot.device, model->items.tokens), train_none(), KERN_SET, drows);
  return CORE_OK;
}

core_status train_decoder_logits(train_model *model, core_tensor hidden, core_tensor logits) {
  KERN(model->env, gemm, KERN_NT, hidden, train_parameter_matrix(&model->parameters, model->decoder.output),
       KERN_SET, logits);
  return CORE_OK;
}
