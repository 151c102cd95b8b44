/* The configuration of a run: what YAML says, and what it means once checked. Every key is described where it
 * stands; defaults are in settings.c, refusals in settings_check.c. Local. */
#ifndef TRAIN_SETTINGS_H
#define TRAIN_SETTINGS_H

#include "core/config.h"
#include "core/dims.h"
#include "core/status.h"

typedef enum train_connector {
  TRAIN_CONNECTOR_LINEAR,
  TRAIN_CONNECTOR_MLP,
  TRAIN_CONNECTOR_RESAMPLER /* an item becomes `queries` rows: model/resampler.h */
} train_connector;
typedef enum train_positions {
  TRAIN_POSITIONS_NONE,
  TRAIN_POSITIONS_LEARNED,
  TRAIN_POSITIONS_ROPE
} train_positions;
typedef enum train_normalize {
  TRAIN_NORMALIZE_NONE,
  TRAIN_NORMALIZE_STANDARD,
  TRAIN_NORMALIZE_RMS
} train_normalize;
typedef enum train_activation { TRAIN_SWIGLU, TRAIN_GELU, TRAIN_GELU_TANH } train_activation;
typedef enum train_dispatch { TRAIN_DROPLESS, TRAIN_CAPACITY } train_dispatch;
typedef enum train_priority { TRAIN_PRIORITY_GATE, TRAIN_PRIORITY_ORDER } train_priority;
typedef enum train_placement { TRAIN_SHARED, TRAIN_PARTITIONED } train_placement;
enum { TRAIN_MOST_CHUNKS = 16 }; /* of a dispatch */
/* When gradients are reduced while the backward pass goes on: where NCCL moves them, everywhere, nowhere. */
typedef enum train_overlap { TRAIN_OVERLAP_AUTO, TRAIN_OVERLAP_ALWAYS, TRAIN_OVERLAP_NEVER } train_overlap;
typedef enum train_rate_kind { TRAIN_RATE_CONSTANT, TRAIN_RATE_COSINE, TRAIN_RATE_RSQRT } train_rate_kind;
typedef enum train_kind { TRAIN_KIND_TOWER, TRAIN_KIND_CONNECTOR, TRAIN_KIND_DECODER } train_kind;
/* Whose trunk a token passes: the one of all modalities, or its modality's own dense one. */
typedef enum train_trunks { TRAIN_TRUNK_SHARED, TRAIN_TRUNK_PER_MODALITY } train_trunks;
/* Which experts a token may choose: all, or those of its modality (train_settings_expert_share). */
typedef enum train_partition { TRAIN_PARTITION_NONE, TRAIN_PARTITION_MODALITY } train_partition;
/* How added experts' layers correct the weights of the chosen (Zhong et al. 2024; moe_calibration.c). */
typedef enum train_calibration {
  TRAIN_CALIBRATION_NONE,
  TRAIN_CALIBRATION_ADD,     /* p + c(p) */
  TRAIN_CALIBRATION_MULTIPLY /* p (1 + c(x)) */
} train_calibration;
/* In training, how the second choice is made: by the logits, or drawn among the others. */
typedef enum train_second { TRAIN_SECOND_PLAIN, TRAIN_SECOND_GUMBEL } train_second;
/* Over which tokens a balance loss takes its means, and which choices it counts. */
typedef enum train_balance_scope { TRAIN_BALANCE_GLOBAL, TRAIN_BALANCE_LOCAL } train_balance_scope;
typedef enum train_balance_shares { TRAIN_SHARES_FIRST, TRAIN_SHARES_ALL } train_balance_shares;
typedef enum train_rope_scaling {
  TRAIN_ROPE_PLAIN,
  TRAIN_ROPE_LINEAR, /* Chen et al. 2023: frequencies divided by the factor */
  TRAIN_ROPE_LLAMA3  /* Dubey et al. 2024: slow ones divided, fast ones kept, in between blended */
} train_rope_scaling;
typedef enum train_match { TRAIN_MATCH_ACTIVE, TRAIN_MATCH_TOTAL } train_match;
typedef enum train_alternate {
  TRAIN_ALTERNATE_NONE,
  TRAIN_ALTERNATE_CYCLIC,
  TRAIN_ALTERNATE_BLOCK,
  TRAIN_ALTERNATE_ADAPTIVE
} train_alternate;

enum { TRAIN_MAX_DIRECTIONS = 64 };

typedef enum train_non_finite { TRAIN_NON_FINITE_STOP, TRAIN_NON_FINITE_SKIP } train_non_finite;
/* What the samples of a batch have in common: nothing, or which modalities they have. */
typedef enum train_batches { TRAIN_BATCHES_MIXED, TRAIN_BATCHES_HOMOGENEOUS } train_batches;
typedef enum train_incomplete { TRAIN_INCOMPLETE_CARRY, TRAIN_INCOMPLETE_DROP } train_incomplete;
typedef enum train_stage_kind {
  TRAIN_STAGE_TRAIN,
  TRAIN_STAGE_ASSEMBLE,
  TRAIN_STAGE_EXTEND
} train_stage_kind;
/* What the router's column of an added expert is: the copied expert's; the same with a bias that keeps it
 * from being chosen; zero; the mean of the layer's columns. The expert is always a copy. */
typedef enum train_extend_init {
  TRAIN_EXTEND_COPY,
  TRAIN_EXTEND_COPY_BELOW,
  TRAIN_EXTEND_ZERO,
  TRAIN_EXTEND_MEAN
} train_extend_init;
/* What a checkpoint holds of the parameters: all, or those that are trained. */
typedef enum train_contents { TRAIN_CONTENTS_ALL, TRAIN_CONTENTS_TRAINED } train_contents;
typedef enum train_busy { TRAIN_BUSY_DELAY, TRAIN_BUSY_WAIT } train_busy;

typedef struct train_modality_settings {
  char *name;             /* as in the shards' file names */
  int connector;          /* train_connector: latents -> trunk */
  int64_t hidden;         /* of an mlp connector, or the width of a resampler; 0: the trunk's width */
  int64_t queries, depth; /* of a resampler: rows of an item, layers */
  int64_t heads;          /* of its attentions; 0: the trunk's number of heads */
  int positions;          /* train_positions; not learned with a resampler, whose queries are learned */
  int64_t length;         /* rows of the learned table */
  int normalize;          /* train_normalize: latents before the connector */
  double local;           /* weight of the local entropy loss */
  double global;          /* weight of the global entropy loss */
  double experts; /* S_m, the soft minimum of experts, at most those it may choose; 0: no global loss */
  int64_t ranks;  /* of each expert group, with placement partitioned; 0: by cost */
  int64_t mark;   /* the prompt token -1 - mark stands where its latents go; -1: its place in the list */
} train_modality_settings;

/* How a mixture is extended: trainer/extend.h. */
typedef struct train_extend_settings {
  char
      *tuned; /* a source: the model after its routers alone were trained; none: layers are not chosen by d */
  char *split;    /* held-out samples whose choices are counted; empty: data.validation */
  char **classes; /* of tokens that count: modalities, `vocabulary`; empty: all */
  unsigned classes_count;
  char *layers;  /* of the MoE layers, from 0: d (the largest), lowest, random; or all, first half, every 2,
                    "0,3" */
  char *share;   /* of the MoE layers that d, lowest and random take, rounded down; at most three decimals */
  int init;      /* train_extend_init */
  double margin; /* copy_below: how far below the K-th logit the new one stays on every held-out token */
} train_extend_settings;

/* A stage: a run of its own, of the same configuration with changes (schedule/stages.h). */
typedef struct train_stage_settings {
  char *name; /* of its directory in run.directory */
  char *from; /* a stage before it, with @best its best checkpoint; the path of a checkpoint; none */
  char **set; /* "key=value", as --set; key by key over the rest of the file */
  unsigned set_count;
  int kind;       /* train_stage_kind */
  char *group;    /* stages one after another of equal group run side by side; empty: alone */
  int64_t ranks;  /* of a stage of a group; 0: an equal share */
  struct {        /* of kind assemble; sources are named as in `from` */
    char *base;   /* whose attention, norms, embeddings and head; `base` in a slot is this one */
    char **slots; /* whose feed-forward is expert 0, 1, ... of every MoE layer */
    unsigned slots_count;
    char **layers; /* instead: for each MoE layer in turn "source, source, ..." */
    unsigned layers_count;
    char **connectors; /* "image:source"; a modality that is not named comes from the base */
    unsigned connectors_count;
  } assemble;
  train_extend_settings extend; /* of kind extend; `from` is what is extended */
} train_stage_settings;
/* Low-rank adapters of linear maps: trainer/model/lora.h. */
typedef struct train_lora_settings {
  char *parameters; /* pattern (* and ?) of maps of blocks and connectors, as blocks.*.attention.* */
  int64_t rank;     /* r */
  double alpha;     /* the branch counts alpha / r */
  double dropout;   /* of the branch's input, in training */
} train_lora_settings;

typedef struct train_settings {
  struct {
    char *directory;
    uint64_t seed;
    int64_t steps;
    char *device;     /* auto, cpu, cuda */
    int precision;    /* core_dtype of activations and the matrices they meet: float32 or bfloat16 */
    int64_t threads;  /* of a rank; 0: the host's cores divided among its ranks */
    int64_t log;      /* steps between log lines */
    double deadline;  /* seconds that a rank waits for another */
    int non_finite;   /* train_non_finite */
    int64_t failures; /* non-finite steps in a row that are skipped before the run stops */
    struct {
      int64_t patience; /* evaluations in a row without a rise before the run ends; 0: it never ends early */
      double min_delta; /* how far mean R@1, in [0, 1], must rise above the last rise to be one */
    } early_stopping;
  } run;
  struct {
    char *path; /* directory of the splits */
    char *train, *validation;
    int64_t shuffle; /* samples of the shuffle buffer; 0: file order */
    int non_finite;  /* train_non_finite: what a sample with NaN or infinity does; skip needs an index that
                        lists  them, and takes the modality from the sample */
    int64_t threads; /* that decompress */
    int64_t queue;   /* batches read ahead */
    int64_t cache;   /* MiB of decompressed chunks */
    int batches;     /* train_batches of training: homogeneous as Uni-MoE samples */
    int incomplete;  /* train_incomplete: homogeneous samples that make no whole batch at the end of an epoch
                        join the next one (carry), or are left out (drop, as published) */
    char **use;      /* names of the modalities that take part; empty: all. The others leave the list when the
                        configuration is loaded; their marks in prompts then stand for nothing */
    unsigned use_count;
    train_modality_settings *modalities;
    unsigned modalities_count;
  } data;
  struct {
    int kind; /* train_kind: one tower with attention, one connector between latent spaces (Alt-MoE), or a
                 causal decoder in which latents are spliced (Uni-MoE) */
    int64_t width, layers, heads, kv_heads, head_width, hidden, embedding;
    int activation; /* train_activation of every feed-forward */
    double norm_epsilon, rope_base;
    int trunks;         /* train_trunks: per_modality is the baseline of one dense tower for each modality */
    int dense;          /* replace each MoE layer by a dense one of equal FLOPs per token */
    int dense_match;    /* train_match: the dense layer has the parameters of the chosen experts, or of all of
                           them */
    int per_direction;  /* a connector of its own for each direction instead of a shared one */
    int64_t vocabulary; /* tokens of a decoder */
    int tied;           /* its head is its embedding */
    int qkv_bias;       /* attention's q, k and v have biases */
    struct {
      int kind; /* train_rope_scaling */
      double factor;
      double low, high; /* llama3: turns in `length` positions below which a frequency is slow, above which it
                           is fast */
      int64_t length;   /* llama3: positions that the model was first trained on */
    } rope_scaling;
    int recompute;             /* keep only the blocks' outputs for backward and compute the rest again */
    train_lora_settings *lora; /* the first entry that names a map holds for it, and freezes its matrix */
    unsigned lora_count;
    struct {
      char *layers; /* none, all, every 2, first half, second half, or a list "1,3" */
      int64_t experts, choose;
      int64_t *layer_experts; /* of each MoE layer, first to last; empty: `experts` of every one */
      unsigned layer_experts_count;
      int64_t *added; /* of each MoE layer's experts, how many of the last were added to a trained model:
                         their router columns are parameters of their own; empty: none */
      unsigned added_count;
      int added_bias;  /* the logits of added experts have a bias also where model.moe.bias is false */
      int calibration; /* train_calibration, in layers with added experts */
      int calibration_renormalize; /* corrected weights are divided by their sum; model.moe.gate says it of
                                      the layers without a calibration */
      int second_noise; /* train_second: gumbel draws the second of two choices in proportion to the
                           probabilities of the others, keyed by the token's place; noise must be 0 */
      int64_t hidden;   /* of an expert; 0: as dense layers */
      int gate;         /* kern_gate */
      int partition;  /* train_partition: modality is the baseline of experts divided among the modalities */
      int dispatch;   /* train_dispatch */
      char *capacity; /* factor, at most three decimals */
      int64_t group_samples;
      int priority;   /* train_priority */
      int bias;       /* the router and the experts have biases */
      double dropout; /* of an expert's output, in training */
      double noise;   /* router noise in units of 1 / experts */
      double buffer;  /* expert buffers in units of the balanced share of the rank with the most experts; what
                         exceeds them takes another round */
    } moe;
  } model;
  struct {
    char **pairs; /* "image:text"; empty: all pairs */
    unsigned pairs_count;
    double scale, largest_scale; /* 1 / temperature: at the start, at most */
    double importance, load, z;
    double balance; /* coefficient of E sum_e me_e ce_e, mean over the MoE layers; me: mean probability, ce:
                       share of the choices; 0: none */
    int balance_scope;  /* train_balance_scope: means over the global batch, or over each group of
                           model.moe.group_samples consecutive samples, and then over the groups that have a
                           token */
    int balance_shares; /* train_balance_shares: first choices, or all of a token's */
    char **directions;  /* "image:text": from, toward; of a connector */
    unsigned directions_count;
    double alpha;       /* weight of the regression; 1 - alpha that of the contrastive term */
    double temperature; /* fixed */
    int regression;     /* kern_regression */
  } objective;
  struct {
    int alternate;  /* train_alternate: which direction a step trains */
    int64_t *steps; /* K_d of each direction, for block */
    unsigned steps_count;
    double gain, least, most; /* adaptive; least 0: 0.1 / directions */
  } schedule;
  struct {
    int64_t experts;     /* expert-parallel size e */
    int placement;       /* train_placement */
    int shard_optimizer; /* each replica keeps the moments of its share only (ZeRO stage 1) */
    int transport;       /* comm_device_transport, between devices */
    int overlap;         /* train_overlap, of reducing gradients and the backward pass */
    int64_t chunks;      /* into which a layer's dispatch is cut, by experts, so that one is on its way while
                            another is multiplied; at most as many as a rank holds experts of the layer */
    double bucket;       /* least MiB of gradients that are reduced together, where overlap is possible */
  } parallel;
  struct {
    int64_t batch, accumulate;
    int schedule;                  /* train_rate_kind */
    double rate, min_rate, warmup; /* warm-up below 1: share of the steps, rounded up */
    double timescale, cooldown;    /* rsqrt */
    double weight_decay, beta1, beta2, epsilon;
    double clip;   /* largest gradient norm; 0: no clipping */
    char **frozen; /* patterns of parameter names (* and ?) that no step changes; adapters are frozen only
                      by patterns that contain lora_ */
    unsigned frozen_count;
    char **trained; /* unless empty, what matches none of these patterns is frozen too; `added` is what an
                       extension adds: experts, their columns of the router, calibrations */
    unsigned trained_count;
  } optimizer;
  struct {
    int64_t interval, keep, keep_every, level, threads;
    int64_t buffers; /* 1 | 2: copies of the state in host memory, for saves that are being written. With 2
                        one may begin on time while the one before is still written; each costs, on every
                        rank, as much as its share of parameters and optimizer state */
    int busy;        /* train_busy: a save that falls due while all copies are in use begins when one is free
                        (delay), or training waits for it (wait) */
    int contents;  /* train_contents: trained saves what no step changes not again; it stays in the checkpoint
                      that the run began with (--from), whose path and content hash are kept, and which must
                      stay */
    int keep_best; /* keep the one of the largest mean recall so far too, under the name `best` */
  } checkpoint;
  struct {
    int64_t interval; /* steps between evaluations; 0: only at the end */
    int64_t batch;
    int at_end;
    char *capacity;    /* none: nothing is dropped; a factor, at most three decimals: for ablations */
    char **forgetting; /* splits of data.path on which a stage's checkpoint is compared with the one that it
                          began with (forgetting.json); they may lack modalities; empty: it is not */
    unsigned forgetting_count;
  } evaluate;
  train_stage_settings *stages; /* empty: the file is one run */
  unsigned stages_count;
} train_settings;

/* For core_config_load. */
const core_config_spec *train_settings_spec(void);
/* Refuses what the schema cannot see: impossible sizes, names that do not exist, combinations. World size
 * `ranks`; widths and lengths of the data are checked when the data is opened. ERR_CONFIG. */
CORE_NODISCARD core_status train_settings_check(const core_config *config, int32_t ranks);

/* Decimal with at most three places -> thousandths ("1.05" -> 1050); -1 if it is not one. */
int64_t train_settings_thousandths(const char *text);
/* Whether the model has no mixture at all: every MoE layer is replaced by a dense one. */
bool train_settings_dense(const train_settings *settings);
/* settings_mixture.c. MoE layers are numbered from 0, first to last (`mixture`); of a connector every block
 * is one. How many the rule makes of a model's layers, also where they are replaced by dense ones; the number
 * of layer l, which is one; experts of an MoE layer, those of them that are added, the most and the fewest of
 * any. */
int64_t train_settings_mixtures(const train_settings *settings);
int64_t train_settings_mixture(const train_settings *settings, int64_t l);
int64_t train_settings_experts(const train_settings *settings, int64_t mixture);
int64_t train_settings_added(const train_settings *settings, int64_t mixture);
int64_t train_settings_most_experts(const train_settings *settings);
int64_t train_settings_fewest_experts(const train_settings *settings);
/* What is refused of model.moe beyond the sizes of its numbers. ERR_CONFIG. */
CORE_NODISCARD core_status train_settings_check_mixtures(const core_config *config);
/* The experts [first, first + count) that are modality m's under model.moe.partition: even, contiguous shares
 * in the order of the modalities. Without a partition: all. */
void train_settings_expert_share(const train_settings *settings, int32_t m, int64_t *first, int64_t *count);
/* Whether layer l of `layers` is an MoE layer by the rule; the rule must be valid
 * (train_settings_rule_valid). */
bool train_settings_moe_layer(const char *rule, int64_t layers, int64_t l);
bool train_settings_rule_valid(const char *rule, int64_t layers);
/* "a:b" -> indices of two different modalities; false if it is not that. */
bool train_settings_pair(const train_settings *settings, const char *text, int32_t pair[2]);
/* The directions of a connector: from and toward. */
bool train_settings_direction(const train_settings *settings, unsigned d, int32_t pair[2]);
/* Classes of tokens that are counted apart: the modalities, and for a decoder the tokens of its vocabulary,
 * last. And what a class is called. */
enum { TRAIN_MAX_CLASSES = CORE_MAX_MODALITIES + 1 };
int32_t train_settings_classes(const train_settings *settings);
const char *train_settings_class(const train_settings *settings, int32_t c);
/* Whether an MoE layer has a calibration: some of its experts are added, and model.moe.calibration. */
bool train_settings_calibrated(const train_settings *settings, int64_t mixture);
/* Rows of the trunk that an item of modality m with so many latents becomes; 0 latents: the item is absent.
 */
int64_t train_settings_item_rows(const train_settings *settings, int32_t m, int64_t latents);
/* Groups of tokens whose balance is lost over: 1, those of a batch, or 0 where there is no such loss. */
int64_t train_settings_balance_groups(const train_settings *settings);
/* Whether any loss hangs on the router's sums. */
bool train_settings_router_losses(const train_settings *settings);
/* Index of a modality by name, -1 if there is none. */
int32_t train_settings_modality(const train_settings *settings, const char *name);

#endif
