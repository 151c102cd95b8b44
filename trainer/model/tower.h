/* The tower: connectors, blocks, pooled heads. Packed tokens of all modalities in one matrix; inside a rank
 * they lie by modality, then sample, then position, so that a modality is one range of rows. Order that has a
 * meaning (ties, capacity, noise) comes from keys that name the global place of a token, never from the row.
 *
 *   latents_m -> standardize -> connector_m (+ positions) -> blocks -> RMSNorm -> mean over each item ->
 * head_m -> L2 norm
 *
 * A trunk is the blocks and the last norm. There is one for all modalities, or as a baseline
 * (model.trunks per_modality) a dense one for each, of equal FLOPs per token, which only its rows pass.
 *
 * Reading order: tower.c, linear.c, lora.c, connector.c, resampler.c, resampler_pass.c, trunk.c, block.c,
 * self_attention.c, feed_forward.c, moe_layer.c, moe_router.c, moe_calibration.c, moe_sums.c, moe_capacity.c,
 * moe_dispatch.c, moe_experts.c, pooled_head.c. */
#ifndef TRAIN_TOWER_H
#define TRAIN_TOWER_H

#include "trainer/mirror.h"
#include "trainer/model/alignment.h"
#include "trainer/model/decoder.h"
#include "trainer/model/linear.h"
#include "trainer/model/moe.h"
#include "trainer/model/resampler.h"
#include "trainer/parameter.h"

/* The items of one micro-batch on this rank. */
typedef struct train_items {
  int64_t tokens, segments;                 /* T, S */
  train_mirror offset;                      /* int64 [S + 1] rows */
  int64_t row_first[TRAIN_MAX_CLASSES + 1]; /* class c: rows [row_first[c], row_first[c + 1]); of a decoder
                                               not these rows of the sequences, but of its `order` */
  int64_t segment_first[CORE_MAX_MODALITIES + 1];
  train_mirror part_offset[CORE_MAX_MODALITIES]; /* int64, rows of m's items, from m's first row on */
  int64_t part_count[CORE_MAX_MODALITIES];       /* m's items */
  int64_t sample_first[CORE_MAX_MODALITIES];     /* place in the global batch of the first segment of m */
  train_mirror position;                         /* int32 [T] for RoPE; 0 where a modality has none */
  train_mirror key;                              /* uint64 [T] global place: (sample M + m) 2^24 + position */
  core_tensor latent[CORE_MAX_MODALITIES]; /* stored dtype [T_m, D_m]; lent by the batch, or in `arrived` */
  void *arrived[CORE_MAX_MODALITIES];      /* device memory for the latents where the host's cannot be read */
} train_items;

typedef struct train_norm {
  int32_t weight;       /* parameter */
  core_tensor out, inv; /* [T, C], [T] */
} train_norm;

typedef struct train_attention_layer {
  train_linear qkv, out;            /* [(H + 2G) A, C], [C, H A] */
  core_tensor qkv_rows, mixed, lse; /* [T, (H + 2G) A], [T, H A], [T, H] */
} train_attention_layer;

typedef struct train_feed_forward {
  train_linear in, out;       /* [2F or F, C], [C, F] */
  int64_t width;              /* F */
  core_tensor hidden, active; /* [T, 2F or F], [T, F] */
} train_feed_forward;

typedef struct train_block {
  int32_t layer;
  int32_t trunk; /* number of its trunk: 0, or the modality whose it is */
  int64_t rows;  /* most that pass it */
  bool has_moe;
  train_norm attention_norm, forward_norm;
  train_attention_layer attention;
  train_feed_forward dense;
  train_moe moe;
  core_tensor middle, output; /* residual stream after attention, after the feed-forward [T, C] */
} train_block;

typedef struct train_connector_layer {
  train_linear first, second;        /* [hidden or C, D], [C, hidden] of an mlp */
  train_resampler *resampler;        /* NULL: not one; then there are no maps */
  int32_t position;                  /* parameter, -1 absent */
  int64_t width, hidden;             /* D, hidden of an mlp; 0: linear */
  train_mirror shift, scale;         /* standardisation, core_real [D]; checkpointed */
  core_tensor input, before, active; /* [T_m, D] of latents, [T_m, hidden] x 2 */
} train_connector_layer;

typedef struct train_head {
  train_linear map;                   /* [Z, C] */
  core_tensor raw, z, norm, gradient; /* [n, Z], [n, Z], [n], [n, Z] */
  core_tensor d_raw;                  /* [n, Z], active */
} train_head;

/* Activations are of env->active; norms' statistics, logits, embeddings and what comes after are core_real.
 */

/* Sizes that memory is planned for. */
typedef struct train_model_limits {
  int64_t latents[CORE_MAX_MODALITIES];     /* of modality m in one micro-batch, and what they become: */
  int64_t tokens[CORE_MAX_MODALITIES];      /* rows of the trunk (train_settings_item_rows) */
  int64_t segments[CORE_MAX_MODALITIES];    /* items */
  int64_t text, predictions;                /* of a decoder: rows of tokens, response tokens */
  int64_t group_tokens;                     /* tokens of a micro-batch in the whole expert group */
  int64_t expert_rows;                      /* rows of an expert buffer of one round */
  int64_t width[CORE_MAX_MODALITIES];       /* D */
  size_t latent_bytes[CORE_MAX_MODALITIES]; /* of one stored number */
  bool training;
} train_model_limits;

/* Looks at what a layer's router has made of T rows (moe->logits, choice, gate), while they are there. */
typedef struct train_route_observer {
  core_status (*call)(void *context, struct train_model *model, const train_moe *moe, int64_t T);
  void *context;
} train_route_observer;

/* Is told of each point of a backward pass that is over: see train_model_points. */
typedef struct train_pass_observer {
  core_status (*call)(void *context, int64_t point);
  void *context;
} train_pass_observer;

typedef struct train_model {
  train_env *env;
  train_parameters parameters;
  train_model_limits limits;
  int64_t C, L, H, G, A, F, Z, T, S; /* L: blocks of a trunk; T, S: largest */
  int32_t trunks;                    /* 1, or M where each modality has its own */
  bool own_trunks;
  train_connector_layer connector[CORE_MAX_MODALITIES];
  train_block *block;                         /* [trunks][L] */
  train_norm final_norm[CORE_MAX_MODALITIES]; /* of each trunk; one output for all rows */
  train_head head[CORE_MAX_MODALITIES];
  int32_t log_scale;              /* parameter: log of 1 / temperature; -1 where it is fixed */
  train_alignment alignment;      /* of model.kind connector */
  train_decoder decoder;          /* of model.kind decoder */
  train_cache *cache;             /* while it generates; NULL */
  core_tensor input, pooled;      /* [T, C], [S, C] */
  train_mirror inverse_frequency; /* core_real [A / 2] */
  bool rotates;
  /* gradients on their way down, shared by all layers */
  core_tensor d_stream, d_norm, d_mixed, d_qkv, d_hidden, d_active, d_pooled;
  train_linear **map; /* [map_count] every linear map of blocks and connectors */
  int32_t map_count, map_capacity;
  train_linear_scratch linear;
  train_lora_scratch lora;
  train_moe_scratch moe_scratch;
  train_dispatch_side side;
  int32_t moe_layers;
  train_moe_sums sums; /* of the current step */
  bool recomputes;     /* blocks keep only their outputs; see block.c */
  int64_t lowest; /* block: nothing below it is trained, so gradients go no further; -1: below all blocks */
  train_items items;
  train_route_observer observe; /* of forward passes that evaluate; call NULL: none */
  train_pass_observer passed;   /* of backward passes; likewise */
} train_model;

/* Declares all parameters; world sizes come from env->layout. width: [M] of the data. Local. */
CORE_NODISCARD core_status train_model_create(train_env *env, const int64_t *width, train_model **out);
/* Plans memory for `limits`; call in the dry and in the real phase of the arenas. */
CORE_NODISCARD core_status train_model_plan(train_model *model, const train_model_limits *limits,
                                            const train_arenas *arenas);
/* What the host contributes to the planned memory's content (tables). After the arenas are committed. */
CORE_NODISCARD core_status train_model_prepare(train_model *model);
/* Most rows and segments that pass through the blocks together: of all modalities in a tower, of the largest
 * one in two views in a connector, of all modalities and tokens in a decoder. */
void train_model_rows(const train_settings *settings, const train_model_limits *limits, int64_t *tokens,
                      int64_t *segments);
void train_model_destroy(train_model *model);

/* The lowest block with a trained parameter of this rank; -1: one below the blocks is trained. Ranks that
 * pass tokens on to one another go down equally far: the least of theirs is model->lowest (-1 until it is
 * set). */
int64_t train_model_lowest(const train_model *model);
/* A backward pass is cut into points, one for each block in the order in which it is passed, and the end.
 * What a pass adds to a parameter's gradient is added when the parameter's point is over: parts above the
 * blocks belong to the first, parts below and a connector's to the end. Equal on all ranks that hold the
 * parameter. */
int64_t train_model_points(const train_model *model);
int64_t train_parameter_point(const train_model *model, const train_parameter *parameter);
/* Whether an entry of optimizer.trained names a parameter: by pattern (* and ?), or `added`, which names what
 * an extension adds, added experts, their columns of the router and calibrations. */
bool train_model_names(const train_model *model, const char *pattern, const train_parameter *parameter);
/* Directions that a step may train: those of a connector, 1 for a tower. */
int32_t train_model_directions(const train_model *model);
/* Marks the parameters that a step of direction d changes (-1: all) as active. */
void train_model_activate(train_model *model, int32_t d);
/* Fills model->items from micro-batch `micro` of a batch; d: the direction of a connector. */
CORE_NODISCARD core_status train_model_take(train_model *model, const data_batch *batch, int64_t micro,
                                            int32_t d);
/* The latents and offsets of one modality, on the device. */
CORE_NODISCARD core_status train_items_take_part(train_model *model, const data_part *part, int32_t m);
/* How a forward pass is meant. */
typedef enum train_mode {
  TRAIN_MODE_TRAIN,    /* noise, capacity; sums are added to model->sums */
  TRAIN_MODE_AGAIN,    /* the same numbers, sums not added: second pass of accumulation */
  TRAIN_MODE_EVALUATE, /* no noise, dropless; sums are added */
} train_mode;
/* items -> head[m].z, or a decoder's loss. Collective over the expert group. */
CORE_NODISCARD core_status train_model_forward(train_model *model, train_mode mode);
/* head[m].gradient (d loss / d z) -> parameter gradients, accumulated. router: float64 [moe_layers, classes,
 * 3 + 2 E], device, derivatives of the loss by the sums. Collective over the expert group. After TRAIN or
 * AGAIN of the same items. */
CORE_NODISCARD core_status train_model_backward(train_model *model, core_tensor router);

/* ---- parts, in the order of the pass; each file documents its mathematics ---- */

/* offset: int64 [items + 1], set to the rows of the trunk at which a part's items begin. */
core_status train_connector_take(train_model *model, int32_t m, const data_part *part, int64_t *offset);
core_status train_connector_declare(train_model *model, int32_t m);
core_status train_connector_plan(train_model *model, int32_t m, const train_arenas *arenas);
core_status train_connector_forward(train_model *model, int32_t m, core_tensor x);
core_status train_connector_backward(train_model *model, int32_t m, core_tensor dx);

/* trunk.c: whether this rank holds trunk t; the rows of the current items that pass it; a parameter of it,
 * which lies where the modality lies when the trunk is its own, and is then named "trunk.<modality>.<name>".
 */
bool train_trunk_held(const train_model *model, int32_t t);
train_span train_trunk_rows(const train_model *model, int32_t t);
kern_segments train_trunk_segments(const train_model *model, int32_t t);
core_status train_trunk_declare_parameter(train_model *model, int32_t t, train_parameter parameter,
                                          int32_t *index, const char *name);
core_status train_trunk_declare(train_model *model, int32_t t);
core_status train_trunk_plan(train_model *model, int32_t t, const train_arenas *arenas);
/* x: all rows of the connectors' outputs; only those that pass the trunk are read. The last norm's rows of
 * the trunk are set. */
core_status train_trunk_forward(train_model *model, int32_t t, core_tensor x, train_mode mode);
/* dn: gradient of the last norm's rows; dx: set to the gradient of x, in the rows that pass. */
core_status train_trunk_backward(train_model *model, int32_t t, core_tensor router, core_tensor dn,
                                 core_tensor dx);

/* Blocks are numbered through all trunks: b = trunk L + layer. */
core_status train_block_declare(train_model *model, int32_t b);
core_status train_block_plan(train_model *model, int32_t b, const train_arenas *arenas);
core_status train_block_forward(train_model *model, int32_t b, core_tensor x, train_mode mode);
/* dx: gradient of the block's output on entry, of its input on return. x: the block's input. router: of this
 * layer, [M, 3 + 2 E]; absent for a dense one. */
core_status train_block_backward(train_model *model, int32_t b, core_tensor x, core_tensor router,
                                 core_tensor dx);

core_status train_attention_declare(train_model *model, train_block *block);
core_status train_attention_plan(train_model *model, train_block *block, core_arena *arena);
core_status train_attention_forward(train_model *model, train_block *block, core_tensor x, core_tensor y);
core_status train_attention_backward(train_model *model, train_block *block, core_tensor x, core_tensor dy,
                                     core_tensor dx);

core_status train_feed_forward_declare(train_model *model, train_block *block);
core_status train_feed_forward_plan(train_model *model, train_block *block, core_arena *arena);
core_status train_feed_forward_forward(train_model *model, train_block *block, core_tensor x, core_tensor y);
core_status train_feed_forward_backward(train_model *model, train_block *block, core_tensor x, core_tensor dy,
                                        core_tensor dx);
/* hidden -> active by the configured activation, and back (d_hidden set). */
core_status train_activate(train_model *model, core_tensor hidden, core_tensor active);
core_status train_activate_backward(train_model *model, core_tensor d_active, core_tensor hidden,
                                    core_tensor d_hidden);
/* Experts that the dense baseline of the mixture of this layer is as wide as: the chosen ones, or all. */
int64_t train_dense_experts(const train_settings *settings, int64_t layer);
/* 2 for gated activations: columns of `hidden` per column of `active`. */
int64_t train_activation_columns(const train_model *model);

core_status train_head_declare(train_model *model, int32_t m);
core_status train_head_plan(train_model *model, int32_t m, core_arena *arena);
core_status train_head_forward(train_model *model, int32_t m);
core_status train_head_backward(train_model *model, int32_t m);

/* A matrix of env->active from an arena. */
CORE_NODISCARD static inline core_status train_take_active(const train_model *model, core_arena *arena,
                                                           int64_t rows, int64_t columns, core_tensor *out) {
  TRY(train_take(arena, model->env->active, rows, columns, out));
  return CORE_OK;
}
/* The items' segments: all, and those of one modality counted from its first row. */
kern_segments train_segments(const train_model *model);
kern_segments train_segments_of(const train_model *model, int32_t m);

/* What the rows of the current items that pass trunk t are. */
train_linear_rows train_trunk_linear_rows(const train_model *model, int32_t t);

/* Adds a parameter by printf-like name. */
core_status train_declare(train_model *model, train_parameter parameter, int32_t *index, const char *format,
                          ...) CORE_PRINTF(4, 5);

#endif
