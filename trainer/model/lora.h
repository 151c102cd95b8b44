/* Low-rank adapters (Hu et al. 2021, "LoRA"): a linear map whose matrix W is frozen becomes
 *
 *   y = x W^T + alpha / r (drop(x) A^T) B^T        A [r, k], B [n, r] trained
 *
 * A starts uniform in +-1 / sqrt(k) (Kaiming with a = sqrt 5, as published), B at 0: the map begins as it
 * was. Dropout falls on the branch's input alone, in training, keyed by the token's global place: the same on
 * every layout and in every repetition of a pass. Experts have an adapter each.
 *
 * q, k and v are one matrix here, and so are the gate and the other half of a gated feed-forward: they share
 * one A. Published code that adapts them apart, each with a rank r, is contained in a rank of 3 r, or 2 r.
 *
 * Nothing of a branch is kept for backward: x A^T is computed again there. */
#ifndef TRAIN_LORA_H
#define TRAIN_LORA_H

#include "trainer/model/linear.h"

/* Declares the adapters of all maps that model.lora names and freezes their matrices. After all other
 * parameters, before train_parameters_place. ERR_CONFIG: a rank larger than its map, an entry that names some
 * experts of a layer and not the others. Local. */
CORE_NODISCARD core_status train_lora_declare(struct train_model *model);
/* The entry of model.lora that holds for the matrix of a map, by its name ("blocks.0.attention.qkv.weight");
 * NULL: none. The first one that names it, with or without ".weight". Local. */
const train_lora_settings *train_lora_entry(const train_settings *settings, const char *weight);
bool train_lora_names(const train_lora_settings *entry, const char *weight);
/* Maps of this rank that entry i of model.lora names. */
int64_t train_lora_matches(const struct train_model *model, unsigned i);
/* Two passes, as core_arena. */
CORE_NODISCARD core_status train_lora_plan(struct train_model *model, const train_arenas *arenas);
/* What the host contributes. After the arenas are committed. */
CORE_NODISCARD core_status train_lora_prepare(struct train_model *model);
/* Whether a pass in the mode of the last train_model_forward drops inputs of the map's adapter. */
bool train_lora_drops(const struct train_model *model, const train_linear *map);

/* y += the branch of x. As train_linear_forward. */
CORE_NODISCARD core_status train_lora_forward(struct train_model *model, const train_linear *map,
                                              train_linear_rows rows, core_tensor x, core_tensor y);
/* Gradients of A and B; what dx gets of the branch is left in the shared memory for
 * train_lora_backward_input.
 */
CORE_NODISCARD core_status train_lora_backward(struct train_model *model, const train_linear *map,
                                               train_linear_rows rows, core_tensor dy, core_tensor x);
/* dx += the branch's part. After train_lora_backward of the same rows. */
CORE_NODISCARD core_status train_lora_backward_input(struct train_model *model, const train_linear *map,
                                                     train_linear_rows rows, core_tensor dx);

#endif
