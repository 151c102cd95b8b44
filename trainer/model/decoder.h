/* The decoder (METHODS section 3; Touvron et al. 2023; Li et al. 2024): a causal language model in whose
 * sequences the latents of other modalities are spliced,
 *
 *   [modalities without a mark, in config order][prompt, a token -1-m replaced by modality m's
 * latents][response]
 *
 *   x = E[token], or connector_m(latent)  ->  causal blocks  ->  RMSNorm  ->  logits = h U^T
 *   L = 1/n sum over the n response tokens of the global batch of -log softmax(logits of the row
 * before)[token]
 *
 * U is E where the head is tied. A response with nothing before it gives its first token. Every row is
 * rotated by its place in the sequence. Logits exist for a block of rows at a time, and where a backward pass
 * will follow their gradient takes their place at once, since a token's loss needs nothing of other rows:
 * they are computed once, and memory does not grow with tokens times vocabulary.
 *
 * Rows lie sample by sample in the order of the sequence; for the router's sums they are also listed by
 * *class*: the modalities, then the tokens of the vocabulary.
 *
 * Files: decoder.c (parameters, memory, items), decoder_pass.c (splicing, the head). */
#ifndef TRAIN_DECODER_H
#define TRAIN_DECODER_H

#include "trainer/mirror.h"

struct train_model;
struct data_batch;

typedef struct train_decoder {
  int32_t embedding, output; /* parameters [V, C]; the same one where tied */
  int64_t V;
  /* the items of a micro-batch */
  int64_t latents, texts, lookups, predicted; /* rows of latents and of tokens, distinct tokens, R */
  train_mirror token;                         /* int32 [T] the row's token, -1: a latent */
  train_mirror latent_slot;                   /* int32 [T] its row among the latents, -1: a token */
  train_mirror latent_key;                    /* uint64 [latents] global places, by class */
  train_mirror order, place;                  /* int32 [T] rows by class, and where each is among them */
  train_mirror lookup_row;                    /* int32 [texts] rows of tokens, by token */
  train_mirror lookup_entry, lookup_offset;   /* int32 [lookups], int64 [lookups + 1] */
  train_mirror predict_row, target;           /* int32 [R] the row that predicts, and the token */
  train_mirror predict_slot;                  /* int32 [T] which prediction a row makes, -1: none */
  int64_t *tally;                             /* [V + 1], host: of tokens */
  /* activations; gradients take their place */
  core_tensor latent;           /* [latents, C] connectors' outputs, then their gradients */
  core_tensor hidden, d_hidden; /* [R, C] of the rows that predict */
  core_tensor logits, d_logits; /* [block, V] Real and active; the same where active is Real */
  train_mirror lse, positive;   /* Real [R] */
  /* the objective */
  double loss;       /* sum over the predictions of forward passes since it was set to 0; this rank's */
  double weight;     /* 1 / n */
  bool loss_alone;   /* no backward pass follows a pass that trains: the first of two, see step.c */
  bool prompts_only; /* sequences end where their responses begin */
} train_decoder;

/* Rows of attention that are kept while a decoder generates; owned by who generates. */
typedef struct train_cache {
  core_tensor *layer;        /* [L] of [rows, (H + 2G) A], active */
  core_tensor slot;          /* int32 [T, 1] where each row of the items is kept */
  core_tensor first, length; /* int32 [T] what each row attends to, when stepping */
  bool stepping;             /* the items are one new row a sequence, not whole sequences */
} train_cache;

core_status train_decoder_declare(struct train_model *model);
core_status train_decoder_plan(struct train_model *model, const train_arenas *arenas);
/* Predictions that micro-batch `micro` makes on this rank. */
int64_t train_decoder_predictions(const struct train_model *model, const struct data_batch *batch,
                                  int64_t micro);
core_status train_decoder_take(struct train_model *model, const struct data_batch *batch, int64_t micro);
/* Items of one token each: row's token and its place in its sequence, host; then all n of them. */
void train_decoder_put_step(struct train_model *model, int64_t row, int32_t token, int64_t position);
core_status train_decoder_take_step(struct train_model *model, int64_t n);

/* decoder_pass.c. Items -> x [T, C]; and dx -> gradients of connectors and embedding. */
core_status train_decoder_embed(struct train_model *model, core_tensor x);
core_status train_decoder_embed_backward(struct train_model *model, core_tensor dx);
/* Rows [T, C] after the last norm -> lse and positive of each prediction; adds to `loss` unless mode is
 * TRAIN_MODE_AGAIN. Where it trains and not for the loss alone also: d_hidden is set to the gradient of
 * weight * loss, that of the table accumulates. Waits for the device. */
core_status train_decoder_predict(struct train_model *model, core_tensor rows, int mode);
/* drows is set to the gradient of weight * loss of the last train_decoder_predict. */
core_status train_decoder_predict_backward(struct train_model *model, core_tensor drows);
/* logits [n, V], Real, of n rows of hidden states [n, C], active. */
core_status train_decoder_logits(struct train_model *model, core_tensor hidden, core_tensor logits);

#endif
