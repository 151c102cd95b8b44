/* The mixture of experts: router, dispatch, experts, combine. See moe_layer.c for the pass. */
#ifndef TRAIN_MOE_H
#define TRAIN_MOE_H

#include "trainer/mirror.h"
#include "trainer/model/linear.h"

struct train_model;
struct train_items;

/* Sums over tokens that losses and health figures are made of, per MoE layer and class of tokens: the
 * modalities, and of a decoder the tokens of its vocabulary, last (train_settings_classes). Additive over
 * ranks and micro-batches. value: float64 [layers][classes][3 + 2E] as kern_router_sums_count says; count:
 * int64 [layers][classes][2E + 2] = choices per expert before drops [E], after drops [E], tokens with a kept
 * choice, tokens; gate: core_real [layers][classes][K] = sum of the k-th choice's gate. Forward passes add on
 * the device; the host side is what the functions below read. */
typedef struct train_moe_sums {
  int32_t layers, modalities; /* the latter: classes */
  int64_t experts;
  int64_t choices;           /* K */
  train_mirror value, count; /* a cell is a row */
  train_mirror gate;         /* what forward passes add to; */
  double *gate_sum;          /* the same over all ranks, on the host */
} train_moe_sums;
static inline int64_t train_moe_value_stride(const train_moe_sums *sums) {
  return kern_router_sums_count(sums->experts);
}
static inline int64_t train_moe_count_stride(const train_moe_sums *sums) {
  return 2 + 2 * sums->experts;
}
static inline double *train_moe_values(const train_moe_sums *sums, int64_t layer, int64_t c) {
  return (double *)sums->value.host + (layer * sums->modalities + c) * train_moe_value_stride(sums);
}
static inline int64_t *train_moe_counts(const train_moe_sums *sums, int64_t layer, int64_t c) {
  return (int64_t *)sums->count.host + (layer * sums->modalities + c) * train_moe_count_stride(sums);
}

static inline double *train_moe_gates(const train_moe_sums *sums, int64_t layer, int64_t m) {
  return sums->gate_sum + (layer * sums->modalities + m) * sums->choices;
}
static inline int64_t train_moe_gate_count(const train_moe_sums *sums) {
  return (int64_t)sums->layers * sums->modalities * sums->choices;
}

/* Sets all sums and counts to zero. */
CORE_NODISCARD core_status train_moe_sums_clear(const train_env *env, const train_moe_sums *sums);
/* Brings them to the host. */
CORE_NODISCARD core_status train_moe_sums_down(const train_env *env, const train_moe_sums *sums);

/* Where each row of one dispatch goes. Rows to send are sorted by global expert; a receiver's stream is
 * sorted by its expert, then by sending rank. A stream longer than the buffer is taken in rounds. */
typedef struct train_dispatch_state {
  int64_t sent;    /* rows this rank sends */
  int64_t *counts; /* [e][E] rows of every rank for every expert */
  int64_t rounds;  /* equal on all ranks of the expert group, at least 1 */
  int64_t *group;  /* [E_local + 1] row limits of the local experts in the current round */
  int64_t rows;    /* rows of the current round */
} train_dispatch_state;

typedef struct train_moe {
  int32_t index;                 /* among the MoE layers */
  int32_t router, router_bias;   /* parameters [E, C]; bias -1 */
  train_linear in, out;          /* of the local experts: [2F, C], [C, F] each */
  core_tensor logits, prob;      /* [T, E] noise-free */
  core_tensor noisy, noisy_prob; /* the same tensors when noise is off */
  core_tensor choice, gate;      /* int32 [T, K], [T, K] */
  core_tensor keep;              /* uint8 [T, K]; where a pass may drop */
  core_tensor slot, index_rows;  /* int32 [T, K] row of each choice or -1; int32 [T K] token of each row */
  core_tensor returned;          /* [T K, C] expert outputs at the sender */
  core_tensor received;          /* [R, C] expert inputs of the last round */
  core_tensor received_key;      /* int32 [R, 2] their keys, where adapters drop inputs */
  core_tensor hidden, active;    /* [R, 2F], [R, F] of the last round */
  train_dispatch_state dispatch;
  bool noise, drops; /* in the last forward pass */
  int64_t capacity;  /* likewise: the factor, in thousandths */
  double dropout;    /* likewise: the rate */
} train_moe;

/* Shared by all MoE layers. */
typedef struct train_moe_scratch {
  int64_t expert_rows;                  /* R */
  core_tensor send_x, send_dy, send_dx; /* [T K, C] */
  core_tensor recv_y, recv_dx;          /* [R, C] */
  core_tensor d_hidden, d_active;       /* [R, 2F], [R, F] */
  core_tensor d_gate, d_logits;         /* [T, K], [T, E] */
  train_mirror mask;                    /* core_real [M, E]: 0 for a modality's experts; partition only */
  core_tensor masked_bias;              /* [M, E] a layer's bias added to it; with biases */
  /* of a decoder, whose classes do not lie together: the router's tensors by class, and a gradient */
  core_tensor sorted_logits, sorted_prob, sorted_noisy, sorted_d; /* [T, E] */
  core_tensor sorted_gate;                                        /* [T, K] */
  core_tensor sorted_choice, sorted_slot;                         /* int32 [T, K] */
  comm_piece *send, *recv;                                        /* [E] */
  /* capacity: records of the tokens of one expert group */
  core_real *host_prob; /* [T, E], a layer's, where the host cannot read the device's memory */
  int32_t *host_choice; /* [T, K], likewise */
  uint8_t *host_keep;   /* [T, K], likewise */
  struct train_capacity_record *own, *all; /* [T], [tokens of the expert group] */
  int32_t *order, *ranked, *spare;         /* [tokens of the expert group] */
  int64_t *used;                           /* [E] */
} train_moe_scratch;

core_status train_moe_declare(struct train_model *model, int32_t layer);
core_status train_moe_plan(struct train_model *model, train_moe *moe, const train_arenas *arenas);
core_status train_moe_scratch_plan(struct train_model *model, const train_arenas *arenas);
/* Fills the mask of a partition. After the arenas are committed. */
core_status train_moe_scratch_prepare(struct train_model *model);
/* y += MoE(x). mode as train_mode. Collective over the expert group. */
core_status train_moe_forward(struct train_model *model, train_moe *moe, core_tensor x, int mode,
                              core_tensor y);
/* dx = gradient by x. dy: gradient of the output. weights: float64 [M, 3 + 2 E] derivatives by this layer's
 * sums. Collective. */
core_status train_moe_backward(struct train_model *model, train_moe *moe, core_tensor x, core_tensor dy,
                               core_tensor weights, core_tensor dx);

/* moe_experts.c. Matrices of the local experts; activations of a round, and their gradients, which all layers
 * share. */
int64_t train_experts_local(const struct train_model *model);
core_status train_experts_declare(struct train_model *model, train_moe *moe, int32_t layer);
core_status train_experts_plan(struct train_model *model, train_moe *moe, core_arena *arena);
core_status train_experts_scratch_plan(struct train_model *model, core_arena *arena);
/* x -> moe->returned at its sender; and, of moe_scratch.send_dy, moe_scratch.send_dx and the gradients of the
 * experts. In rounds. x: [T, C] the layer's input. Collective over the expert group. */
core_status train_experts_forward(struct train_model *model, train_moe *moe, core_tensor x);
core_status train_experts_backward(struct train_model *model, train_moe *moe, core_tensor x);

/* moe_dispatch.c. Collective over the expert group. */
core_status train_dispatch_make(struct train_model *model, train_moe *moe, int64_t tokens);
/* Sets group[] and rows for `round`. Local. */
void train_dispatch_round(struct train_model *model, train_moe *moe, int64_t round);
/* Rows at their senders -> rows at their experts, and back; of one round. */
core_status train_dispatch_send(struct train_model *model, train_moe *moe, int64_t round, core_tensor from,
                                core_tensor to);
core_status train_dispatch_return(struct train_model *model, train_moe *moe, int64_t round, core_tensor from,
                                  core_tensor to);

/* The capacity factor in thousandths of a pass of this mode; -1: nothing is dropped. */
int64_t train_capacity_factor(const train_settings *settings, int mode);
/* Whether some pass of a session may drop. */
bool train_capacity_planned(const train_settings *settings, bool training);
core_status train_capacity_plan(struct train_model *model, const train_arenas *arenas);
/* moe_capacity.c: fills moe->keep for the current items. Collective over the expert group when partitioned.
 */
core_status train_capacity_keep(struct train_model *model, train_moe *moe);

#endif
