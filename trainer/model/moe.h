/* The mixture of experts: router, dispatch, experts, combine. Files, in the order of the pass: moe_layer.c
 * (the whole), moe_router.c, moe_calibration.c, moe_sums.c, moe_capacity.c, moe_dispatch.c, moe_experts.c. */
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
 * choice, tokens; gate: core_real [layers][classes][K] = sum of the k-th choice's gate. E is the layer's;
 * rows are as long as the largest layer needs, and the rest of a row stays 0. Forward passes add on the
 * device; the host side is what the functions below read. */
typedef struct train_moe_sums {
  int32_t layers, modalities;   /* the latter: classes */
  int64_t experts;              /* most of a layer */
  const int64_t *layer_experts; /* of each layer, lent by the settings; NULL: `experts` */
  int64_t choices;              /* K */
  train_mirror value, count;    /* a cell is a row */
  train_mirror gate;            /* what forward passes add to; */
  double *gate_sum;             /* the same over all ranks, on the host */
  /* Of a balance loss; groups 0: there is none. Over the groups of the global batch, float64 [layers][G][1 +
   * 2E] as kern_ops.router_balance says; and [layers][G][E] derivatives of the loss by the sums of p_e. A
   * layer's numbers lie without gaps at the beginning of its part. */
  int64_t groups;
  train_mirror balance, balance_weights;
} train_moe_sums;
static inline int64_t train_moe_layer_experts(const train_moe_sums *sums, int64_t layer) {
  return sums->layer_experts ? sums->layer_experts[layer] : sums->experts;
}
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

/* A layer's part of the sums and of the weights of a balance loss, on the host. */
static inline double *train_moe_balance(const train_moe_sums *sums, int64_t layer) {
  return (double *)sums->balance.host + layer * sums->groups * (1 + 2 * sums->experts);
}
static inline double *train_moe_balance_weights(const train_moe_sums *sums, int64_t layer) {
  return (double *)sums->balance_weights.host + layer * sums->groups * sums->experts;
}
static inline int64_t train_moe_balance_count(const train_moe_sums *sums) {
  return (int64_t)sums->layers * sums->groups * (1 + 2 * sums->experts);
}

/* Sets all sums and counts to zero. */
CORE_NODISCARD core_status train_moe_sums_clear(const train_env *env, const train_moe_sums *sums);
/* Brings them to the host. */
CORE_NODISCARD core_status train_moe_sums_down(const train_env *env, const train_moe_sums *sums);

/* Where each row of one dispatch goes. Rows to send are sorted by global expert; a receiver's stream is
 * sorted by its expert, then by sending rank. A stream longer than the buffer is taken in rounds. A round is
 * cut at experts into chunks, which lie one after another in the buffer. */
typedef struct train_dispatch_state {
  int64_t sent;    /* rows this rank sends */
  int64_t *counts; /* [e][E] rows of every rank for every expert of the layer */
  int64_t rounds;  /* equal on all ranks of the expert group, at least 1 */
  /* of the current chunk: its first row in the round's buffers, its rows, and where among them those of each
   * local expert begin [E_local + 1]; experts outside have none */
  int64_t first, rows;
  int64_t *group;
} train_dispatch_state;

/* The stream on which chunks travel while others are multiplied on the main one; all NULL: on that too. */
typedef struct train_dispatch_side {
  core_stream *stream;
  core_event *given;                      /* what a transfer reads has been computed */
  core_event *arrived[TRAIN_MOST_CHUNKS]; /* at its experts */
  core_event *returned;
} train_dispatch_side;

typedef struct train_moe {
  int32_t index;                           /* among the MoE layers */
  int64_t experts, added;                  /* E; the last of them that were added to a model */
  int32_t router, router_bias;             /* parameters [E - added, C], [E - added]; -1 absent */
  int32_t router_added, router_added_bias; /* likewise of the added experts */
  train_linear in, out;          /* of the local experts: [2F, C], [C, F] each; weight -1: there is none */
  core_tensor logits, prob;      /* [T, E] noise-free */
  core_tensor noisy, noisy_prob; /* the same tensors when noise is off */
  core_tensor choice, gate;      /* int32 [T, K], [T, K] */
  /* the correction of the gates, absent where a layer has none; see moe_calibration.c */
  bool calibrated;
  int32_t calibration_in, calibration_out; /* parameters [16, E or C], [E, 16] */
  core_tensor before, between, correction; /* [T, 16] before and after GELU, [T, E] */
  core_tensor keep;                        /* uint8 [T, K]; where a pass may drop */
  core_tensor slot, index_rows; /* int32 [T, K] row of each choice or -1; int32 [T K] token of each row */
  core_tensor returned;         /* [T K, C] expert outputs at the sender */
  core_tensor received;         /* [R, C] expert inputs of the last round */
  core_tensor received_key;     /* int32 [R, 2] their keys, where adapters drop inputs */
  core_tensor hidden, active;   /* [R, 2F], [R, F] of the last round */
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
  core_tensor d_gate, d_logits;         /* [T, K], [T, E] of the largest layer */
  train_mirror mask;                    /* core_real [M, E]: 0 for a modality's experts; partition only */
  core_tensor masked_bias;              /* [M, E] a layer's bias added to it; with biases */
  core_tensor router_bias;              /* [E] of a layer where only added experts have one */
  core_tensor d_router, d_router_bias;  /* [E, C], [E] of a layer with added experts */
  core_tensor d_prob, d_correction, d_between; /* [T, E], [T, E], [T, 16] of a calibration */
  train_mirror group;                          /* int32 [T] of a balance loss: each row's group */
  /* of a decoder, whose classes do not lie together: the router's tensors by class, and a gradient; of the
   * largest layer */
  core_tensor sorted_logits, sorted_prob, sorted_noisy, sorted_d; /* [T, E] */
  core_tensor sorted_gate;                                        /* [T, K] */
  core_tensor sorted_choice, sorted_slot;                         /* int32 [T, K] */
  comm_piece *send, *recv;                                        /* [E + e] */
  /* capacity: records of the tokens of one expert group */
  core_real *host_prob; /* [T, E], a layer's, where the host cannot read the device's memory */
  int32_t *host_choice; /* [T, K], likewise */
  uint8_t *host_keep;   /* [T, K], likewise */
  struct train_capacity_record *own, *all; /* [T], [tokens of the expert group] */
  int32_t *order, *ranked, *spare;         /* [tokens of the expert group] */
  int64_t *used;                           /* [E] */
} train_moe_scratch;

/* Experts of a layer lie in order on the slots of an expert group: slot s holds [first(s), first(s + 1)), as
 * even as whole experts can be; where there are fewer experts than ranks, some hold none. */
static inline int64_t train_experts_first(int64_t experts, int64_t slot, int64_t ranks) {
  return slot * experts / ranks;
}
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
int64_t train_experts_local(const struct train_model *model, const train_moe *moe);
core_status train_experts_declare(struct train_model *model, train_moe *moe, int32_t layer);
core_status train_experts_plan(struct train_model *model, train_moe *moe, core_arena *arena);
core_status train_experts_scratch_plan(struct train_model *model, core_arena *arena);
/* x -> moe->returned at its sender; and, of moe_scratch.send_dy, moe_scratch.send_dx and the gradients of the
 * experts. In rounds. x: [T, C] the layer's input. Collective over the expert group. */
core_status train_experts_forward(struct train_model *model, train_moe *moe, core_tensor x);
core_status train_experts_backward(struct train_model *model, train_moe *moe, core_tensor x);

/* moe_router.c. Parameters; what a layer keeps; what all layers share. */
core_status train_moe_router_declare(struct train_model *model, train_moe *moe, int32_t layer);
core_status train_moe_router_plan(struct train_model *model, train_moe *moe, core_arena *arena);
core_status train_moe_router_scratch_plan(struct train_model *model, const train_arenas *arenas);
/* x -> logits, probabilities, choice, gates. mode as train_mode. Local. */
core_status train_moe_route(struct train_model *model, train_moe *moe, core_tensor x, int mode);
/* moe_scratch.d_gate and the derivatives by the sums (absent: none) -> gradients of the router; dx gets the
 * input's added. Local. */
core_status train_moe_route_backward(struct train_model *model, train_moe *moe, core_tensor x,
                                     core_tensor weights, core_tensor dx);
/* Where the gradient of a parameter goes; absent where it is frozen or -1. */
core_tensor train_trained_gradient(const struct train_model *model, int32_t index);
/* Of the noise in the last forward pass; 0: there was none. */
double train_moe_deviation(const struct train_model *model, const train_moe *moe);

/* moe_calibration.c. Local. Parameters; what a layer keeps, and what all share. */
enum { TRAIN_CALIBRATION_WIDTH = 16 };
core_status train_calibration_declare(struct train_model *model, train_moe *moe, int32_t layer);
core_status train_calibration_plan(struct train_model *model, train_moe *moe, core_arena *arena);
core_status train_calibration_scratch_plan(struct train_model *model, core_arena *arena);
/* moe->choice and prob [T, E] -> moe->gate. x: [T, C] the layer's input. */
core_status train_calibration_forward(struct train_model *model, train_moe *moe, core_tensor x,
                                      core_tensor prob);
/* moe_scratch.d_gate -> d_logits [T, E], set; dx gets the input's gradient added. */
core_status train_calibration_backward(struct train_model *model, train_moe *moe, core_tensor x,
                                       core_tensor prob, core_tensor d_logits, core_tensor dx);

/* moe_sums.c. The group of each of the current items' rows, where there is a balance loss. */
core_status train_moe_groups_take(struct train_model *model);
/* Memory to sort rows by class; adds T routed rows to the model's sums (mode as train_mode); adds to d_logits
 * [T, E] the gradient of what hangs on them, weights as train_moe_backward. Local. */
core_status train_moe_sorted_plan(struct train_model *model, core_arena *arena);
core_status train_moe_sums_add(struct train_model *model, const train_moe *moe, int64_t T, int mode);
core_status train_moe_sums_backward(struct train_model *model, const train_moe *moe, int64_t T,
                                    core_tensor weights, core_tensor d_logits);

/* moe_dispatch.c. Collective over the expert group. */
core_status train_dispatch_make(struct train_model *model, train_moe *moe, int64_t tokens);
/* The side stream, where a configuration has chunks and a device that overlaps. After the groups have been
 * told of the device. Local. Free also after a failure. */
core_status train_dispatch_prepare(struct train_model *model);
void train_dispatch_free(struct train_model *model);
/* Chunks of each round of a layer, on all ranks of the expert group alike. */
int64_t train_dispatch_chunks(const struct train_model *model, const train_moe *moe);
/* Whether every rank sends as many rows to every rank, which lie in that order on either side: with one
 * expert a rank, and a capacity that all of them fill. Then the pieces of a dispatch are an equal all-to-all.
 */
bool train_dispatch_equal(const struct train_model *model, const train_moe *moe);
/* Makes a chunk the current one: sets first, rows and group[]. Local. */
void train_dispatch_take(struct train_model *model, train_moe *moe, int64_t round, int64_t chunk);
/* Rows at their senders -> rows at their experts, and back; of one chunk. from, to: all rows at the sender,
 * the buffer of a round. What they read has been computed on the main stream. Before a chunk that was sent is
 * read, the main stream waits by train_dispatch_arrived; before anything that was returned, and before
 * anything that was sent from is changed, by train_dispatch_returned. */
core_status train_dispatch_send(struct train_model *model, train_moe *moe, int64_t round, int64_t chunk,
                                core_tensor from, core_tensor to);
core_status train_dispatch_arrived(struct train_model *model, int64_t chunk);
core_status train_dispatch_return(struct train_model *model, train_moe *moe, int64_t round, int64_t chunk,
                                  core_tensor from, core_tensor to);
core_status train_dispatch_returned(struct train_model *model);

/* The capacity factor in thousandths of a pass of this mode; -1: nothing is dropped. */
int64_t train_capacity_factor(const train_settings *settings, int mode);
/* Whether some pass of a session may drop. */
bool train_capacity_planned(const train_settings *settings, bool training);
core_status train_capacity_plan(struct train_model *model, const train_arenas *arenas);
/* moe_capacity.c: fills moe->keep for the current items. Collective over the expert group when partitioned.
 */
core_status train_capacity_keep(struct train_model *model, train_moe *moe);

#endif
