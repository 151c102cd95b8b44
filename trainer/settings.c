#include "trainer/settings.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h" /* comm_device_transport */
#include "core/dims.h"
#include "kernels/kernels.h" /* kern_gate */

#define NEEDED CYAML_FLAG_DEFAULT
#define TEXT(key, structure, member) \
  CYAML_FIELD_STRING_PTR(key, CYAML_FLAG_POINTER, structure, member, 0, 1024)
#define WORD(key, structure, member, words) \
  CYAML_FIELD_ENUM(key, CYAML_FLAG_STRICT, structure, member, words, CYAML_ARRAY_LEN(words))
/* The nested structures of train_settings have no names of their own. */
#define PART(member) __typeof__(((train_settings *)0)->member)

static const cyaml_strval_t connector_words[] = {{"linear", TRAIN_CONNECTOR_LINEAR},
                                                 {"mlp", TRAIN_CONNECTOR_MLP},
                                                 {"resampler", TRAIN_CONNECTOR_RESAMPLER}};
static const cyaml_strval_t position_words[] = {
    {"none", TRAIN_POSITIONS_NONE}, {"learned", TRAIN_POSITIONS_LEARNED}, {"rope", TRAIN_POSITIONS_ROPE}};
static const cyaml_strval_t normalize_words[] = {
    {"none", TRAIN_NORMALIZE_NONE}, {"standard", TRAIN_NORMALIZE_STANDARD}, {"rms", TRAIN_NORMALIZE_RMS}};
static const cyaml_strval_t activation_words[] = {
    {"swiglu", TRAIN_SWIGLU}, {"gelu", TRAIN_GELU}, {"gelu_tanh", TRAIN_GELU_TANH}};
static const cyaml_strval_t gate_words[] = {{"softmax", KERN_GATE_SOFTMAX},
                                            {"renormalised", KERN_GATE_RENORMALISED}};
static const cyaml_strval_t dispatch_words[] = {{"dropless", TRAIN_DROPLESS}, {"capacity", TRAIN_CAPACITY}};
static const cyaml_strval_t priority_words[] = {{"gate", TRAIN_PRIORITY_GATE},
                                                {"order", TRAIN_PRIORITY_ORDER}};
static const cyaml_strval_t placement_words[] = {{"shared", TRAIN_SHARED},
                                                 {"partitioned", TRAIN_PARTITIONED}};
static const cyaml_strval_t rate_words[] = {
    {"constant", TRAIN_RATE_CONSTANT}, {"cosine", TRAIN_RATE_COSINE}, {"rsqrt", TRAIN_RATE_RSQRT}};
static const cyaml_strval_t non_finite_words[] = {{"stop", TRAIN_NON_FINITE_STOP},
                                                  {"skip", TRAIN_NON_FINITE_SKIP}};
static const cyaml_strval_t batches_words[] = {{"mixed", TRAIN_BATCHES_MIXED},
                                               {"homogeneous", TRAIN_BATCHES_HOMOGENEOUS}};
static const cyaml_strval_t incomplete_words[] = {{"carry", TRAIN_INCOMPLETE_CARRY},
                                                  {"drop", TRAIN_INCOMPLETE_DROP}};
static const cyaml_strval_t stage_words[] = {
    {"train", TRAIN_STAGE_TRAIN}, {"assemble", TRAIN_STAGE_ASSEMBLE}, {"extend", TRAIN_STAGE_EXTEND}};
static const cyaml_strval_t extend_words[] = {{"copy", TRAIN_EXTEND_COPY},
                                              {"copy_below", TRAIN_EXTEND_COPY_BELOW},
                                              {"zero", TRAIN_EXTEND_ZERO},
                                              {"mean", TRAIN_EXTEND_MEAN}};
static const cyaml_strval_t contents_words[] = {{"all", TRAIN_CONTENTS_ALL},
                                                {"trained", TRAIN_CONTENTS_TRAINED}};
static const cyaml_strval_t busy_words[] = {{"delay", TRAIN_BUSY_DELAY}, {"wait", TRAIN_BUSY_WAIT}};

static const cyaml_strval_t kind_words[] = {
    {"tower", TRAIN_KIND_TOWER}, {"connector", TRAIN_KIND_CONNECTOR}, {"decoder", TRAIN_KIND_DECODER}};
static const cyaml_strval_t scaling_words[] = {
    {"none", TRAIN_ROPE_PLAIN}, {"linear", TRAIN_ROPE_LINEAR}, {"llama3", TRAIN_ROPE_LLAMA3}};
static const cyaml_strval_t match_words[] = {{"active", TRAIN_MATCH_ACTIVE}, {"total", TRAIN_MATCH_TOTAL}};
static const cyaml_strval_t trunk_words[] = {{"shared", TRAIN_TRUNK_SHARED},
                                             {"per_modality", TRAIN_TRUNK_PER_MODALITY}};
static const cyaml_strval_t partition_words[] = {{"none", TRAIN_PARTITION_NONE},
                                                 {"modality", TRAIN_PARTITION_MODALITY}};
static const cyaml_strval_t calibration_words[] = {{"none", TRAIN_CALIBRATION_NONE},
                                                   {"add", TRAIN_CALIBRATION_ADD},
                                                   {"multiply", TRAIN_CALIBRATION_MULTIPLY}};
static const cyaml_strval_t second_words[] = {{"none", TRAIN_SECOND_PLAIN}, {"gumbel", TRAIN_SECOND_GUMBEL}};
static const cyaml_strval_t scope_words[] = {{"global", TRAIN_BALANCE_GLOBAL},
                                             {"local", TRAIN_BALANCE_LOCAL}};
static const cyaml_strval_t shares_words[] = {{"first", TRAIN_SHARES_FIRST}, {"all", TRAIN_SHARES_ALL}};
static const cyaml_strval_t regression_words[] = {{"squared", KERN_SQUARED}, {"smooth_l1", KERN_SMOOTH_L1}};
static const cyaml_strval_t alternate_words[] = {{"none", TRAIN_ALTERNATE_NONE},
                                                 {"cyclic", TRAIN_ALTERNATE_CYCLIC},
                                                 {"block", TRAIN_ALTERNATE_BLOCK},
                                                 {"adaptive", TRAIN_ALTERNATE_ADAPTIVE}};
static const cyaml_strval_t precision_words[] = {{"float32", CORE_FLOAT32}, {"bfloat16", CORE_BFLOAT16}};
static const cyaml_strval_t transport_words[] = {
    {"auto", COMM_DEVICE_AUTO}, {"nccl", COMM_DEVICE_NCCL}, {"staged", COMM_DEVICE_STAGED}};
static const cyaml_strval_t overlap_words[] = {
    {"auto", TRAIN_OVERLAP_AUTO}, {"always", TRAIN_OVERLAP_ALWAYS}, {"never", TRAIN_OVERLAP_NEVER}};

#define M train_modality_settings
static const cyaml_schema_field_t modality_fields[] = {TEXT("name", M, name),
                                                       WORD("connector", M, connector, connector_words),
                                                       CYAML_FIELD_INT("hidden", NEEDED, M, hidden),
                                                       CYAML_FIELD_INT("queries", NEEDED, M, queries),
                                                       CYAML_FIELD_INT("depth", NEEDED, M, depth),
                                                       CYAML_FIELD_INT("heads", NEEDED, M, heads),
                                                       WORD("positions", M, positions, position_words),
                                                       CYAML_FIELD_INT("length", NEEDED, M, length),
                                                       WORD("normalize", M, normalize, normalize_words),
                                                       CYAML_FIELD_FLOAT("local", NEEDED, M, local),
                                                       CYAML_FIELD_FLOAT("global", NEEDED, M, global),
                                                       CYAML_FIELD_FLOAT("experts", NEEDED, M, experts),
                                                       CYAML_FIELD_INT("ranks", NEEDED, M, ranks),
                                                       CYAML_FIELD_INT("mark", NEEDED, M, mark),
                                                       CYAML_FIELD_END};
#undef M
static const cyaml_schema_value_t modality_value = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, train_modality_settings, modality_fields)};
static const cyaml_schema_value_t pair_value = {
    CYAML_VALUE_STRING(CYAML_FLAG_POINTER, char *, 0, 2 * CORE_NAME)};

typedef PART(run.early_stopping) early_part;
static const cyaml_schema_field_t early_fields[] = {
    CYAML_FIELD_INT("patience", NEEDED, early_part, patience),
    CYAML_FIELD_FLOAT("min_delta", NEEDED, early_part, min_delta), CYAML_FIELD_END};

typedef PART(run) run_part;
static const cyaml_schema_field_t run_fields[] = {
    TEXT("directory", run_part, directory),
    CYAML_FIELD_UINT("seed", NEEDED, run_part, seed),
    CYAML_FIELD_INT("steps", NEEDED, run_part, steps),
    TEXT("device", run_part, device),
    WORD("precision", run_part, precision, precision_words),
    CYAML_FIELD_INT("threads", NEEDED, run_part, threads),
    CYAML_FIELD_INT("log", NEEDED, run_part, log),
    CYAML_FIELD_FLOAT("deadline", NEEDED, run_part, deadline),
    WORD("non_finite", run_part, non_finite, non_finite_words),
    CYAML_FIELD_INT("failures", NEEDED, run_part, failures),
    CYAML_FIELD_MAPPING("early_stopping", NEEDED, run_part, early_stopping, early_fields),
    CYAML_FIELD_END};

typedef PART(data) data_part_settings;
static const cyaml_schema_field_t data_fields[] = {
    TEXT("path", data_part_settings, path),
    TEXT("train", data_part_settings, train),
    TEXT("validation", data_part_settings, validation),
    CYAML_FIELD_INT("shuffle", NEEDED, data_part_settings, shuffle),
    WORD("non_finite", data_part_settings, non_finite, non_finite_words),
    CYAML_FIELD_INT("threads", NEEDED, data_part_settings, threads),
    CYAML_FIELD_INT("queue", NEEDED, data_part_settings, queue),
    CYAML_FIELD_INT("cache", NEEDED, data_part_settings, cache),
    WORD("batches", data_part_settings, batches, batches_words),
    WORD("incomplete", data_part_settings, incomplete, incomplete_words),
    CYAML_FIELD_SEQUENCE("use", CYAML_FLAG_POINTER, data_part_settings, use, &pair_value, 0,
                         CORE_MAX_MODALITIES),
    CYAML_FIELD_SEQUENCE("modalities", CYAML_FLAG_POINTER, data_part_settings, modalities, &modality_value, 1,
                         CORE_MAX_MODALITIES),
    CYAML_FIELD_END};

typedef PART(model.moe) moe_part;
static const cyaml_schema_value_t count_value = {CYAML_VALUE_INT(NEEDED, int64_t)};
static const cyaml_schema_field_t moe_fields[] = {
    TEXT("layers", moe_part, layers),
    CYAML_FIELD_INT("experts", NEEDED, moe_part, experts),
    CYAML_FIELD_INT("choose", NEEDED, moe_part, choose),
    CYAML_FIELD_SEQUENCE("layer_experts", CYAML_FLAG_POINTER, moe_part, layer_experts, &count_value, 0, 4096),
    CYAML_FIELD_SEQUENCE("added", CYAML_FLAG_POINTER, moe_part, added, &count_value, 0, 4096),
    CORE_FIELD_BOOL("added_bias", moe_part, added_bias),
    WORD("calibration", moe_part, calibration, calibration_words),
    CORE_FIELD_BOOL("calibration_renormalize", moe_part, calibration_renormalize),
    WORD("second_noise", moe_part, second_noise, second_words),
    CYAML_FIELD_INT("hidden", NEEDED, moe_part, hidden),
    WORD("gate", moe_part, gate, gate_words),
    WORD("partition", moe_part, partition, partition_words),
    WORD("dispatch", moe_part, dispatch, dispatch_words),
    TEXT("capacity", moe_part, capacity),
    CYAML_FIELD_INT("group_samples", NEEDED, moe_part, group_samples),
    WORD("priority", moe_part, priority, priority_words),
    CORE_FIELD_BOOL("bias", moe_part, bias),
    CYAML_FIELD_FLOAT("dropout", NEEDED, moe_part, dropout),
    CYAML_FIELD_FLOAT("noise", NEEDED, moe_part, noise),
    CYAML_FIELD_FLOAT("buffer", NEEDED, moe_part, buffer),
    CYAML_FIELD_END};

typedef PART(model.rope_scaling) scaling_part;
static const cyaml_schema_field_t scaling_fields[] = {
    WORD("kind", scaling_part, kind, scaling_words),
    CYAML_FIELD_FLOAT("factor", NEEDED, scaling_part, factor),
    CYAML_FIELD_FLOAT("low", NEEDED, scaling_part, low),
    CYAML_FIELD_FLOAT("high", NEEDED, scaling_part, high),
    CYAML_FIELD_INT("length", NEEDED, scaling_part, length),
    CYAML_FIELD_END};

#define L train_lora_settings
static const cyaml_schema_field_t lora_fields[] = {
    TEXT("parameters", L, parameters), CYAML_FIELD_INT("rank", NEEDED, L, rank),
    CYAML_FIELD_FLOAT("alpha", NEEDED, L, alpha), CYAML_FIELD_FLOAT("dropout", NEEDED, L, dropout),
    CYAML_FIELD_END};
#undef L
static const cyaml_schema_value_t lora_value = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, train_lora_settings, lora_fields)};

typedef PART(model) model_part;
static const cyaml_schema_field_t model_fields[] = {
    WORD("kind", model_part, kind, kind_words),
    CYAML_FIELD_INT("width", NEEDED, model_part, width),
    CYAML_FIELD_INT("layers", NEEDED, model_part, layers),
    CYAML_FIELD_INT("heads", NEEDED, model_part, heads),
    CYAML_FIELD_INT("kv_heads", NEEDED, model_part, kv_heads),
    CYAML_FIELD_INT("head_width", NEEDED, model_part, head_width),
    CYAML_FIELD_INT("hidden", NEEDED, model_part, hidden),
    CYAML_FIELD_INT("embedding", NEEDED, model_part, embedding),
    WORD("activation", model_part, activation, activation_words),
    CYAML_FIELD_FLOAT("norm_epsilon", NEEDED, model_part, norm_epsilon),
    CYAML_FIELD_FLOAT("rope_base", NEEDED, model_part, rope_base),
    WORD("trunks", model_part, trunks, trunk_words),
    CORE_FIELD_BOOL("dense", model_part, dense),
    WORD("dense_match", model_part, dense_match, match_words),
    CORE_FIELD_BOOL("per_direction", model_part, per_direction),
    CYAML_FIELD_INT("vocabulary", NEEDED, model_part, vocabulary),
    CORE_FIELD_BOOL("tied", model_part, tied),
    CORE_FIELD_BOOL("qkv_bias", model_part, qkv_bias),
    CYAML_FIELD_MAPPING("rope_scaling", NEEDED, model_part, rope_scaling, scaling_fields),
    CORE_FIELD_BOOL("recompute", model_part, recompute),
    CYAML_FIELD_SEQUENCE("lora", CYAML_FLAG_POINTER, model_part, lora, &lora_value, 0, 256),
    CYAML_FIELD_MAPPING("moe", NEEDED, model_part, moe, moe_fields),
    CYAML_FIELD_END};

typedef PART(objective) objective_part;
static const cyaml_schema_field_t objective_fields[] = {
    CYAML_FIELD_SEQUENCE("pairs", CYAML_FLAG_POINTER, objective_part, pairs, &pair_value, 0, 256),
    CYAML_FIELD_FLOAT("scale", NEEDED, objective_part, scale),
    CYAML_FIELD_FLOAT("largest_scale", NEEDED, objective_part, largest_scale),
    CYAML_FIELD_FLOAT("importance", NEEDED, objective_part, importance),
    CYAML_FIELD_FLOAT("load", NEEDED, objective_part, load),
    CYAML_FIELD_FLOAT("z", NEEDED, objective_part, z),
    CYAML_FIELD_FLOAT("balance", NEEDED, objective_part, balance),
    WORD("balance_scope", objective_part, balance_scope, scope_words),
    WORD("balance_shares", objective_part, balance_shares, shares_words),
    CYAML_FIELD_SEQUENCE("directions", CYAML_FLAG_POINTER, objective_part, directions, &pair_value, 0,
                         TRAIN_MAX_DIRECTIONS),
    CYAML_FIELD_FLOAT("alpha", NEEDED, objective_part, alpha),
    CYAML_FIELD_FLOAT("temperature", NEEDED, objective_part, temperature),
    WORD("regression", objective_part, regression, regression_words),
    CYAML_FIELD_END};

typedef PART(schedule) schedule_part;
static const cyaml_schema_field_t schedule_fields[] = {
    WORD("alternate", schedule_part, alternate, alternate_words),
    CYAML_FIELD_SEQUENCE("steps", CYAML_FLAG_POINTER, schedule_part, steps, &count_value, 0,
                         TRAIN_MAX_DIRECTIONS),
    CYAML_FIELD_FLOAT("gain", NEEDED, schedule_part, gain),
    CYAML_FIELD_FLOAT("least", NEEDED, schedule_part, least),
    CYAML_FIELD_FLOAT("most", NEEDED, schedule_part, most),
    CYAML_FIELD_END};

typedef PART(parallel) parallel_part;
static const cyaml_schema_field_t parallel_fields[] = {
    CYAML_FIELD_INT("experts", NEEDED, parallel_part, experts),
    WORD("placement", parallel_part, placement, placement_words),
    CORE_FIELD_BOOL("shard_optimizer", parallel_part, shard_optimizer),
    WORD("transport", parallel_part, transport, transport_words),
    WORD("overlap", parallel_part, overlap, overlap_words),
    CYAML_FIELD_INT("chunks", NEEDED, parallel_part, chunks),
    CYAML_FIELD_FLOAT("bucket", NEEDED, parallel_part, bucket),
    CYAML_FIELD_END};

typedef PART(optimizer) optimizer_part;
static const cyaml_schema_field_t optimizer_fields[] = {
    CYAML_FIELD_INT("batch", NEEDED, optimizer_part, batch),
    CYAML_FIELD_INT("accumulate", NEEDED, optimizer_part, accumulate),
    WORD("schedule", optimizer_part, schedule, rate_words),
    CYAML_FIELD_FLOAT("rate", NEEDED, optimizer_part, rate),
    CYAML_FIELD_FLOAT("min_rate", NEEDED, optimizer_part, min_rate),
    CYAML_FIELD_FLOAT("warmup", NEEDED, optimizer_part, warmup),
    CYAML_FIELD_FLOAT("timescale", NEEDED, optimizer_part, timescale),
    CYAML_FIELD_FLOAT("cooldown", NEEDED, optimizer_part, cooldown),
    CYAML_FIELD_FLOAT("weight_decay", NEEDED, optimizer_part, weight_decay),
    CYAML_FIELD_FLOAT("beta1", NEEDED, optimizer_part, beta1),
    CYAML_FIELD_FLOAT("beta2", NEEDED, optimizer_part, beta2),
    CYAML_FIELD_FLOAT("epsilon", NEEDED, optimizer_part, epsilon),
    CYAML_FIELD_FLOAT("clip", NEEDED, optimizer_part, clip),
    CYAML_FIELD_SEQUENCE("frozen", CYAML_FLAG_POINTER, optimizer_part, frozen, &pair_value, 0, 256),
    CYAML_FIELD_SEQUENCE("trained", CYAML_FLAG_POINTER, optimizer_part, trained, &pair_value, 0, 256),
    CYAML_FIELD_END};

typedef PART(checkpoint) checkpoint_part;
static const cyaml_schema_field_t checkpoint_fields[] = {
    CYAML_FIELD_INT("interval", NEEDED, checkpoint_part, interval),
    CYAML_FIELD_INT("keep", NEEDED, checkpoint_part, keep),
    CYAML_FIELD_INT("keep_every", NEEDED, checkpoint_part, keep_every),
    CYAML_FIELD_INT("level", NEEDED, checkpoint_part, level),
    CYAML_FIELD_INT("threads", NEEDED, checkpoint_part, threads),
    CYAML_FIELD_INT("buffers", NEEDED, checkpoint_part, buffers),
    WORD("busy", checkpoint_part, busy, busy_words),
    WORD("contents", checkpoint_part, contents, contents_words),
    CORE_FIELD_BOOL("keep_best", checkpoint_part, keep_best),
    CYAML_FIELD_END};

typedef PART(evaluate) evaluate_part;
static const cyaml_schema_field_t evaluate_fields[] = {
    CYAML_FIELD_INT("interval", NEEDED, evaluate_part, interval),
    CYAML_FIELD_INT("batch", NEEDED, evaluate_part, batch),
    CORE_FIELD_BOOL("at_end", evaluate_part, at_end),
    TEXT("capacity", evaluate_part, capacity),
    CYAML_FIELD_SEQUENCE("forgetting", CYAML_FLAG_POINTER, evaluate_part, forgetting, &pair_value, 0, 32),
    CYAML_FIELD_END};

#define S train_stage_settings
enum { LONGEST_SET = 4096, MOST_SET = 96, MOST_STAGES = 64 };
typedef __typeof__(((S *)0)->assemble) assemble_part;
static const cyaml_schema_value_t set_value = {
    CYAML_VALUE_STRING(CYAML_FLAG_POINTER, char *, 0, LONGEST_SET)};
static const cyaml_schema_field_t assemble_fields[] = {
    TEXT("base", assemble_part, base),
    CYAML_FIELD_SEQUENCE("slots", CYAML_FLAG_POINTER, assemble_part, slots, &set_value, 0, CORE_MAX_EXPERTS),
    CYAML_FIELD_SEQUENCE("layers", CYAML_FLAG_POINTER, assemble_part, layers, &set_value, 0, 4096),
    CYAML_FIELD_SEQUENCE("connectors", CYAML_FLAG_POINTER, assemble_part, connectors, &set_value, 0,
                         CORE_MAX_MODALITIES),
    CYAML_FIELD_END};
#define X train_extend_settings
static const cyaml_schema_field_t extend_fields[] = {
    TEXT("tuned", X, tuned),
    TEXT("split", X, split),
    CYAML_FIELD_SEQUENCE("classes", CYAML_FLAG_POINTER, X, classes, &pair_value, 0, CORE_MAX_MODALITIES + 1),
    TEXT("layers", X, layers),
    TEXT("share", X, share),
    WORD("init", X, init, extend_words),
    CYAML_FIELD_FLOAT("margin", NEEDED, X, margin),
    CYAML_FIELD_END};
#undef X
static const cyaml_schema_field_t stage_fields[] = {
    TEXT("name", S, name),
    TEXT("from", S, from),
    CYAML_FIELD_SEQUENCE("set", CYAML_FLAG_POINTER, S, set, &set_value, 0, MOST_SET),
    WORD("kind", S, kind, stage_words),
    TEXT("group", S, group),
    CYAML_FIELD_INT("ranks", NEEDED, S, ranks),
    CYAML_FIELD_MAPPING("assemble", NEEDED, S, assemble, assemble_fields),
    CYAML_FIELD_MAPPING("extend", NEEDED, S, extend, extend_fields),
    CYAML_FIELD_END};
#undef S
static const cyaml_schema_value_t stage_value = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, train_stage_settings, stage_fields)};

static const cyaml_schema_field_t top_fields[] = {
    CYAML_FIELD_MAPPING("run", NEEDED, train_settings, run, run_fields),
    CYAML_FIELD_MAPPING("data", NEEDED, train_settings, data, data_fields),
    CYAML_FIELD_MAPPING("model", NEEDED, train_settings, model, model_fields),
    CYAML_FIELD_MAPPING("objective", NEEDED, train_settings, objective, objective_fields),
    CYAML_FIELD_MAPPING("schedule", NEEDED, train_settings, schedule, schedule_fields),
    CYAML_FIELD_MAPPING("parallel", NEEDED, train_settings, parallel, parallel_fields),
    CYAML_FIELD_MAPPING("optimizer", NEEDED, train_settings, optimizer, optimizer_fields),
    CYAML_FIELD_MAPPING("checkpoint", NEEDED, train_settings, checkpoint, checkpoint_fields),
    CYAML_FIELD_MAPPING("evaluate", NEEDED, train_settings, evaluate, evaluate_fields),
    CYAML_FIELD_SEQUENCE("stages", CYAML_FLAG_POINTER, train_settings, stages, &stage_value, 0, MOST_STAGES),
    CYAML_FIELD_END};
static const cyaml_schema_value_t top_value = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_POINTER, train_settings, top_fields)};

/* What a file may leave out. data.path, data.modalities and model.width have no default; a tower needs heads.
 */
static const char defaults[] =
    "run: {directory: run, seed: 1, steps: 1000, device: auto, precision: float32, threads: 0, log: 10, "
    "deadline: 600,"
    " non_finite: stop, failures: 10, early_stopping: {patience: 0, min_delta: 0}}\n"
    "data: {train: train, validation: validation, shuffle: 65536, non_finite: stop, threads: 1, queue: 2,"
    " cache: 256, batches: mixed, incomplete: carry, use: []}\n"
    "model:\n  kind: tower\n  layers: 1\n  heads: 0\n"
    "  kv_heads: 0\n  head_width: 0\n  hidden: 0\n  embedding: 0\n  activation: swiglu\n"
    "  norm_epsilon: 1.0e-6\n  rope_base: 10000\n  trunks: shared\n  dense: false\n  dense_match: active\n"
    "  per_direction: false\n  recompute: false\n  lora: []\n  vocabulary: 0\n  tied: false\n"
    "  qkv_bias: false\n  rope_scaling: {kind: none, factor: 1, low: 1, high: 4, length: 8192}\n"
    "  moe: {layers: every 2, experts: 8, choose: 1, layer_experts: [], added: [], added_bias: false, "
    "calibration: none, calibration_renormalize: true, second_noise: none, "
    "hidden: 0, gate: softmax, partition: none,"
    " dispatch: dropless, capacity: '1.05', group_samples: 8, priority: gate, bias: false, dropout: 0, "
    "noise: 1, buffer: 1.5}\n"
    "objective: {pairs: [], scale: 10, largest_scale: 100, importance: 0.005, load: 0.005, z: 0.001,"
    " balance: 0, balance_scope: global, balance_shares: first,"
    " directions: [], alpha: 0.5, temperature: 0.03, regression: squared}\n"
    "schedule: {alternate: none, steps: [], gain: 1, least: 0, most: 1}\n"
    "parallel: {experts: 1, placement: shared, shard_optimizer: true, transport: auto, overlap: auto,"
    " bucket: 16, chunks: 1}\n"
    "optimizer: {batch: 128, accumulate: 1, schedule: cosine, rate: 0.001, min_rate: 0, warmup: 0.03,"
    " timescale: 10000, cooldown: 0, weight_decay: 0.1, beta1: 0.9, beta2: 0.95, epsilon: 1.0e-8, clip: 1,"
    " frozen: [], trained: []}\n"
    "checkpoint: {interval: 500, keep: 3, keep_every: 0, level: 1, threads: 1, buffers: 2, busy: delay, "
    "contents: all, "
    "keep_best: "
    "false}\n"
    "evaluate: {interval: 0, batch: 256, at_end: true, capacity: none, forgetting: []}\n"
    "stages: []\n";

static const char modality_defaults[] =
    "{connector: linear, hidden: 0, queries: 50, depth: 4, heads: 0, positions: learned, length: 64, "
    "normalize: standard, local: 0, global: 0,"
    " experts: 0, ranks: 0, mark: -1}";
static const char stage_defaults[] =
    "{from: none, set: [], kind: train, group: '', ranks: 0,"
    " assemble: {base: none, slots: [], layers: [], connectors: []},"
    " extend: {tuned: none, split: '', classes: [], layers: d, share: '0.5', init: copy, margin: 0.001}}";

/* Which maps, and the rank, are to be said. */
static const char lora_defaults[] = "{alpha: 16, dropout: 0}";

const core_config_spec *train_settings_spec(void) {
  static const core_config_items items[] = {
      {.path = "data.modalities", .yaml = modality_defaults, .place = "mark", .use = "data.use"},
      {.path = "model.lora", .yaml = lora_defaults},
      {.path = "stages", .yaml = stage_defaults}};
  static const core_config_spec spec = {&top_value, defaults, items, 3};
  return &spec;
}

int64_t train_settings_thousandths(const char *text) {
  char *end = NULL;
  if (*text < '0' || *text > '9') return -1;
  long whole = strtol(text, &end, 10);
  if (whole > 1000000) return -1;
  int64_t value = whole * 1000, unit = 100;
  if (*end == '.')
    for (end++; *end >= '0' && *end <= '9' && unit > 0; end++, unit /= 10) value += (*end - '0') * unit;
  while (*end == '0') end++;
  return *end == '\0' ? value : -1;
}

int64_t train_settings_item_rows(const train_settings *settings, int32_t m, int64_t latents) {
  const train_modality_settings *modality = &settings->data.modalities[m];
  if (latents == 0 || modality->connector != TRAIN_CONNECTOR_RESAMPLER) return latents;
  return modality->queries;
}

int32_t train_settings_modality(const train_settings *settings, const char *name) {
  for (unsigned m = 0; m < settings->data.modalities_count; m++)
    if (strcmp(settings->data.modalities[m].name, name) == 0) return (int32_t)m;
  return -1;
}

int32_t train_settings_classes(const train_settings *settings) {
  return (int32_t)settings->data.modalities_count + (settings->model.kind == TRAIN_KIND_DECODER);
}

const char *train_settings_class(const train_settings *settings, int32_t c) {
  return c < (int32_t)settings->data.modalities_count ? settings->data.modalities[c].name : "vocabulary";
}

bool train_settings_router_losses(const train_settings *settings) {
  bool any = settings->objective.importance > 0 || settings->objective.load > 0 ||
             settings->objective.z > 0 || settings->objective.balance > 0;
  for (unsigned m = 0; m < settings->data.modalities_count; m++)
    any = any || settings->data.modalities[m].local > 0 || settings->data.modalities[m].global > 0;
  return any;
}

bool train_settings_pair(const train_settings *settings, const char *text, int32_t pair[2]) {
  char first[CORE_NAME];
  const char *colon = strchr(text, ':');
  if (!colon || (size_t)(colon - text) >= sizeof first) return false;
  snprintf(first, sizeof first, "%.*s", (int)(colon - text), text);
  pair[0] = train_settings_modality(settings, first);
  pair[1] = train_settings_modality(settings, colon + 1);
  return pair[0] >= 0 && pair[1] >= 0 && pair[0] != pair[1];
}

bool train_settings_direction(const train_settings *settings, unsigned d, int32_t pair[2]) {
  return train_settings_pair(settings, settings->objective.directions[d], pair);
}

bool train_settings_dense(const train_settings *settings) {
  return settings->model.dense || settings->model.trunks == TRAIN_TRUNK_PER_MODALITY;
}

void train_settings_expert_share(const train_settings *settings, int32_t m, int64_t *first, int64_t *count) {
  int64_t E = settings->model.moe.experts, M = (int64_t)settings->data.modalities_count;
  bool divided = settings->model.moe.partition == TRAIN_PARTITION_MODALITY;
  *first = divided ? m * E / M : 0;
  *count = divided ? (m + 1) * E / M - *first : E;
}

/* Walks a list "1,3,5"; *found tells whether l is in it. False if it is not such a list. */
static bool walk_list(const char *rule, int64_t layers, int64_t l, bool *found) {
  *found = false;
  while (*rule) {
    char *end = NULL;
    long value = strtol(rule, &end, 10);
    if (end == rule || value < 0 || value >= layers || (*end && *end != ',')) return false;
    if (value == l) *found = true;
    rule = end + (*end == ',' && end[1]);
    if (*end == ',' && !end[1]) return false;
    if (!*end) return true;
  }
  return false;
}

static int64_t every(const char *rule) {
  char *end = NULL;
  if (strncmp(rule, "every ", 6) != 0) return 0;
  long n = strtol(rule + 6, &end, 10);
  return end != rule + 6 && !*end && n > 0 ? n : 0;
}

bool train_settings_rule_valid(const char *rule, int64_t layers) {
  bool found;
  static const char *const words[] = {"none", "all", "first half", "second half"};
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    if (strcmp(rule, words[i]) == 0) return true;
  return every(rule) > 0 || walk_list(rule, layers, -1, &found);
}

bool train_settings_moe_layer(const char *rule, int64_t layers, int64_t l) {
  bool found = false;
  if (strcmp(rule, "none") == 0) return false;
  if (strcmp(rule, "all") == 0) return true;
  if (strcmp(rule, "first half") == 0) return l < layers / 2;
  if (strcmp(rule, "second half") == 0) return l >= layers - layers / 2;
  if (every(rule) > 0) return l % every(rule) == 0;
  return walk_list(rule, layers, l, &found) && found;
}
