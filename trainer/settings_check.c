/* What the schema cannot see: sizes, names, combinations. Each refusal names the key and what was expected.
 */
#include <stdio.h>
#include <string.h>

#include "core/dims.h"
#include "core/tensor.h"
#include "trainer/settings.h"

typedef struct bound {
  const char *key;
  double value, low, high;
} bound;

static core_status check_bounds(const core_config *config, const bound *list, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const bound *b = &list[i];
    if (!(b->value >= b->low && b->value <= b->high))
      return core_config_refuse(config, b->key, "expected %.10g to %.10g, got %.10g", b->low, b->high,
                                b->value);
  }
  return CORE_OK;
}

static const double large = 1 << 24, huge = 1e15;

static core_status check_sizes(const core_config *config, const train_settings *s) {
  int64_t all = s->model.moe.layer_experts_count ? CORE_MAX_CHOICES : s->model.moe.experts;
  const bound list[] = {
      {"run.steps", (double)s->run.steps, 0, huge},
      {"run.threads", (double)s->run.threads, 0, 1024},
      {"run.log", (double)s->run.log, 1, huge},
      {"run.deadline", s->run.deadline, 1, 1e6},
      {"run.failures", (double)s->run.failures, 1, 1e6},
      {"data.shuffle", (double)s->data.shuffle, 0, huge},
      {"data.threads", (double)s->data.threads, 1, 256},
      {"data.queue", (double)s->data.queue, 1, 64},
      {"data.cache", (double)s->data.cache, 1, 1 << 20},
      {"run.early_stopping.patience", (double)s->run.early_stopping.patience, 0, huge},
      {"run.early_stopping.min_delta", s->run.early_stopping.min_delta, 0, 1},
      {"model.width", (double)s->model.width, 1, large},
      {"model.layers", (double)s->model.layers, 1, 4096},
      {"model.heads", (double)s->model.heads, s->model.kind != TRAIN_KIND_CONNECTOR, 1024},
      {"model.kv_heads", (double)s->model.kv_heads, 0, (double)s->model.heads},
      {"model.head_width", (double)s->model.head_width, 0, 4096},
      {"model.hidden", (double)s->model.hidden, 0, large},
      {"model.embedding", (double)s->model.embedding, 0, large},
      {"model.norm_epsilon", s->model.norm_epsilon, 0, 1},
      {"model.rope_base", s->model.rope_base, 1, 1e12},
      {"model.vocabulary", (double)s->model.vocabulary, s->model.kind == TRAIN_KIND_DECODER ? 2 : 0, large},
      {"model.rope_scaling.factor", s->model.rope_scaling.factor, 1, 1e6},
      {"model.rope_scaling.low", s->model.rope_scaling.low, 1e-6, 1e6},
      {"model.rope_scaling.high", s->model.rope_scaling.high, s->model.rope_scaling.low, 1e6},
      {"model.rope_scaling.length", (double)s->model.rope_scaling.length, 1, huge},
      {"model.moe.experts", (double)s->model.moe.experts, 1, CORE_MAX_EXPERTS},
      {"model.moe.choose", (double)s->model.moe.choose, 1,
       (double)(all < CORE_MAX_CHOICES ? all : CORE_MAX_CHOICES)},
      {"model.moe.hidden", (double)s->model.moe.hidden, 0, large},
      {"model.moe.group_samples", (double)s->model.moe.group_samples, 1, large},
      {"model.moe.noise", s->model.moe.noise, 0, 1000},
      {"model.moe.dropout", s->model.moe.dropout, 0, 0.999},
      {"model.moe.buffer", s->model.moe.buffer, 0.01, 1024},
      {"objective.scale", s->objective.scale, 1e-3, s->objective.largest_scale},
      {"objective.largest_scale", s->objective.largest_scale, 1e-3, 1e6},
      {"objective.importance", s->objective.importance, 0, 1e6},
      {"objective.load", s->objective.load, 0, 1e6},
      {"objective.z", s->objective.z, 0, 1e6},
      {"objective.balance", s->objective.balance, 0, 1e6},
      {"objective.alpha", s->objective.alpha, 0, 1},
      {"objective.temperature", s->objective.temperature, 1e-6, 1e6},
      {"schedule.gain", s->schedule.gain, 0, 1e6},
      {"schedule.least", s->schedule.least, 0, 1},
      {"schedule.most", s->schedule.most, 1e-6, 1},
      {"optimizer.batch", (double)s->optimizer.batch, 1, large},
      {"optimizer.accumulate", (double)s->optimizer.accumulate, 1, 65536},
      {"optimizer.rate", s->optimizer.rate, 0, 1e6},
      {"optimizer.min_rate", s->optimizer.min_rate, 0, s->optimizer.rate},
      {"optimizer.warmup", s->optimizer.warmup, 0, huge},
      {"optimizer.timescale", s->optimizer.timescale, 1, huge},
      {"optimizer.cooldown", s->optimizer.cooldown, 0, huge},
      {"optimizer.weight_decay", s->optimizer.weight_decay, 0, 1e3},
      {"optimizer.beta1", s->optimizer.beta1, 0, 0.999999},
      {"optimizer.beta2", s->optimizer.beta2, 0, 0.9999999},
      {"optimizer.epsilon", s->optimizer.epsilon, 1e-30, 1},
      {"optimizer.clip", s->optimizer.clip, 0, 1e30},
      {"checkpoint.interval", (double)s->checkpoint.interval, 0, huge},
      {"checkpoint.keep", (double)s->checkpoint.keep, 1, 1e6},
      {"checkpoint.keep_every", (double)s->checkpoint.keep_every, 0, huge},
      {"checkpoint.level", (double)s->checkpoint.level, 1, 19},
      {"checkpoint.threads", (double)s->checkpoint.threads, 1, 64},
      {"checkpoint.buffers", (double)s->checkpoint.buffers, 1, 2},
      {"evaluate.interval", (double)s->evaluate.interval, 0, huge},
      {"evaluate.batch", (double)s->evaluate.batch, 1, large},
  };
  TRY(check_bounds(config, list, sizeof list / sizeof *list));
  return CORE_OK;
}

/* Positions are added to the rows of a connector, and the rows of a resampler are learned ones. */
static core_status check_resampler(const core_config *config, const train_settings *s,
                                   const train_modality_settings *modality, const char *positions,
                                   const char *heads) {
  int64_t width = modality->hidden ? modality->hidden : s->model.width;
  int64_t count = modality->heads ? modality->heads : s->model.heads;
  if (modality->connector != TRAIN_CONNECTOR_RESAMPLER || s->model.kind == TRAIN_KIND_CONNECTOR)
    return CORE_OK;
  if (modality->positions == TRAIN_POSITIONS_LEARNED)
    return core_config_refuse(config, positions, "a resampler's rows are learned queries: expected none%s",
                              s->model.kind == TRAIN_KIND_TOWER ? " or rope" : "");
  if (count < 1 || width % count != 0 || width / count > 256)
    return core_config_refuse(config, heads,
                              "%lld heads do not divide the resampler's width %lld into at most 256 each",
                              (long long)count, (long long)width);
  return CORE_OK;
}

static core_status check_modality(const core_config *config, const train_settings *s, unsigned m) {
  const train_modality_settings *modality = &s->data.modalities[m];
  char key[12][160];
  static const char *const names[] = {"hidden", "length",    "local", "global",  "experts", "ranks",
                                      "name",   "positions", "mark",  "queries", "depth",   "heads"};
  for (int i = 0; i < 12; i++)
    snprintf(key[i], sizeof key[i], "data.modalities.%.96s.%s", modality->name, names[i]);
  const bound list[] = {
      {key[0], (double)modality->hidden, 0, large},
      {key[1], (double)modality->length, 1, large},
      {key[2], modality->local, 0, 1e6},
      {key[3], modality->global, 0, 1e6},
      {key[4], modality->experts, 0, (double)train_settings_most_experts(s)},
      {key[5], (double)modality->ranks, 0, (double)s->parallel.experts},
      {key[8], (double)modality->mark, 0, CORE_MAX_MODALITIES - 1},
      {key[9], (double)modality->queries, 1, 65536},
      {key[10], (double)modality->depth, 1, 256},
      {key[11], (double)modality->heads, 0, large},
  };
  size_t length = strlen(modality->name);
  if (length == 0 || length > 48 || strpbrk(modality->name, "/.: \t") ||
      (modality->name[0] >= '0' && modality->name[0] <= '9'))
    return core_config_refuse(
        config, "data.modalities",
        "a modality's name is 1 to 48 characters, without blank, point, colon and slash, not beginning "
        "with a digit; got '%s'",
        modality->name);
  for (unsigned i = 0; i < m; i++)
    if (s->data.modalities[i].mark == modality->mark)
      return core_config_refuse(config, key[8], "'%s' has the mark %lld too", s->data.modalities[i].name,
                                (long long)modality->mark);
  if (train_settings_modality(s, modality->name) != (int32_t)m)
    return core_config_refuse(config, key[6], "the modality is listed twice");
  TRY(check_bounds(config, list, sizeof list / sizeof *list));
  if (modality->global > 0 && modality->experts < 1)
    return core_config_refuse(config, key[4],
                              "the global entropy loss needs a soft minimum of at least 1 expert");
  TRY(check_resampler(config, s, modality, key[7], key[11]));
  return CORE_OK;
}

static core_status check_capacity(const core_config *config, const train_settings *s) {
  int64_t capacity = train_settings_thousandths(s->model.moe.capacity);
  if (capacity < 1 || capacity > 1000000)
    return core_config_refuse(config, "model.moe.capacity",
                              "expected a number from 0.001 to 1000 with at most three decimals, got '%s'",
                              s->model.moe.capacity);
  return CORE_OK;
}

/* A connector knows directions, no pairs, and none of a tower's parts. */
static core_status check_connector(const core_config *config, const train_settings *s) {
  const train_modality_settings *list = s->data.modalities;
  int32_t pair[2], other[2];
  char key[160];
  if (s->objective.directions_count == 0)
    return core_config_refuse(config, "objective.directions",
                              "a connector needs at least one, as from:toward");
  for (unsigned d = 0; d < s->objective.directions_count; d++) {
    snprintf(key, sizeof key, "objective.directions.%u", d);
    if (!train_settings_direction(s, d, pair))
      return core_config_refuse(
          config, key, "expected two different modalities of this configuration as from:toward, got '%s'",
          s->objective.directions[d]);
    for (unsigned i = 0; i < d; i++)
      if (train_settings_direction(s, i, other) && other[0] == pair[0] && other[1] == pair[1])
        return core_config_refuse(config, key, "the direction is listed twice");
  }
  if (s->objective.pairs_count > 0)
    return core_config_refuse(config, "objective.pairs", "a connector has directions, no pairs");
  if (s->objective.importance > 0 || s->objective.load > 0 || s->objective.z > 0 || s->objective.balance > 0)
    return core_config_refuse(config, "objective.importance",
                              "a connector has no router losses: importance, load, z and balance must be 0");
  if (s->model.layers != 1) return core_config_refuse(config, "model.layers", "a connector has one layer");
  if (s->model.moe.dispatch != TRAIN_DROPLESS)
    return core_config_refuse(config, "model.moe.dispatch", "a connector drops nothing: expected dropless");
  for (unsigned m = 0; m < s->data.modalities_count; m++) {
    snprintf(key, sizeof key, "data.modalities.%.96s", list[m].name);
    if (list[m].positions != TRAIN_POSITIONS_NONE || list[m].connector != TRAIN_CONNECTOR_LINEAR ||
        list[m].local > 0 || list[m].global > 0)
      return core_config_refuse(
          config, key,
          "with model.kind connector a modality has positions none, connector linear and no "
          "entropy losses");
  }
  return CORE_OK;
}

/* A decoder has no pairs, no directions, no heads of its modalities; whole samples belong to one rank. */
static core_status check_decoder(const core_config *config, const train_settings *s) {
  char key[160];
  if (s->objective.pairs_count > 0)
    return core_config_refuse(config, "objective.pairs", "a decoder predicts tokens: it has no pairs");
  if (s->model.embedding > 0)
    return core_config_refuse(config, "model.embedding", "a decoder has no common embedding: expected 0");
  if (s->model.moe.dispatch != TRAIN_DROPLESS)
    return core_config_refuse(config, "model.moe.dispatch", "a decoder drops nothing: expected dropless");
  if (s->model.trunks != TRAIN_TRUNK_SHARED)
    return core_config_refuse(config, "model.trunks",
                              "a decoder's sequence holds all modalities: expected shared");
  if (s->model.moe.partition != TRAIN_PARTITION_NONE)
    return core_config_refuse(config, "model.moe.partition",
                              "a decoder's tokens have no modality: expected none");
  if (s->run.early_stopping.patience > 0 || s->checkpoint.keep_best)
    return core_config_refuse(config, s->checkpoint.keep_best ? "checkpoint.keep_best" : "run.early_stopping",
                              "follows the mean recall, and a decoder has none");
  if (s->parallel.placement != TRAIN_SHARED)
    return core_config_refuse(config, "parallel.placement",
                              "a decoder's sequence holds all modalities of a sample: expected shared");
  if (s->model.rope_scaling.kind == TRAIN_ROPE_LLAMA3 &&
      !(s->model.rope_scaling.high > s->model.rope_scaling.low))
    return core_config_refuse(config, "model.rope_scaling.high", "expected more than model.rope_scaling.low");
  for (unsigned m = 0; m < s->data.modalities_count; m++) {
    snprintf(key, sizeof key, "data.modalities.%.96s.positions", s->data.modalities[m].name);
    if (s->data.modalities[m].positions == TRAIN_POSITIONS_ROPE)
      return core_config_refuse(
          config, key, "a decoder rotates every row by its place in the sequence: expected none or learned");
    if (strcmp(s->data.modalities[m].name, train_settings_class(s, (int32_t)s->data.modalities_count)) == 0)
      return core_config_refuse(config, "data.modalities", "'%s' is what a decoder's own tokens are called",
                                s->data.modalities[m].name);
  }
  return CORE_OK;
}

static core_status check_schedule(const core_config *config, const train_settings *s) {
  unsigned D = s->objective.directions_count;
  if (s->model.kind != TRAIN_KIND_CONNECTOR) {
    const char *what = s->model.kind == TRAIN_KIND_TOWER ? "tower" : "decoder";
    if (D > 0)
      return core_config_refuse(config, "objective.directions", "a %s has %s, no directions", what,
                                s->model.kind == TRAIN_KIND_TOWER ? "pairs" : "responses");
    if (s->schedule.alternate != TRAIN_ALTERNATE_NONE)
      return core_config_refuse(config, "schedule.alternate", "a %s has no directions to alternate", what);
    if (s->model.per_direction)
      return core_config_refuse(config, "model.per_direction", "a %s has no directions", what);
    return CORE_OK;
  }
  if (s->schedule.alternate == TRAIN_ALTERNATE_BLOCK && s->schedule.steps_count != D)
    return core_config_refuse(config, "schedule.steps",
                              "expected a number of steps for each of %u directions, got %u", D,
                              s->schedule.steps_count);
  for (unsigned d = 0; d < s->schedule.steps_count; d++)
    if (s->schedule.steps[d] < 1 || s->schedule.steps[d] > 1000000)
      return core_config_refuse(config, "schedule.steps",
                                "expected 1 to 1000000 steps for each direction, got %lld",
                                (long long)s->schedule.steps[d]);
  if (s->schedule.alternate == TRAIN_ALTERNATE_ADAPTIVE && s->evaluate.interval == 0)
    return core_config_refuse(config, "evaluate.interval",
                              "adaptive alternation follows the validation recall: expected at least 1");
  return CORE_OK;
}

static core_status check_lora(const core_config *config, const train_settings *s) {
  for (unsigned i = 0; i < s->model.lora_count; i++) {
    const train_lora_settings *lora = &s->model.lora[i];
    char rank[64], alpha[64], dropout[64];
    snprintf(rank, sizeof rank, "model.lora.%u.rank", i);
    snprintf(alpha, sizeof alpha, "model.lora.%u.alpha", i);
    snprintf(dropout, sizeof dropout, "model.lora.%u.dropout", i);
    const bound list[] = {{rank, (double)lora->rank, 1, 65536},
                          {alpha, lora->alpha, 1e-6, 1e6},
                          {dropout, lora->dropout, 0, 0.999}};
    TRY(check_bounds(config, list, sizeof list / sizeof *list));
  }
  return CORE_OK;
}

static core_status check_model(const core_config *config, const train_settings *s) {
  if (s->model.kind == TRAIN_KIND_CONNECTOR) {
    TRY(check_connector(config, s));
    return check_capacity(config, s);
  }
  bool decoder = s->model.kind == TRAIN_KIND_DECODER;
  if (decoder) TRY(check_decoder(config, s));
  if (!decoder && s->model.vocabulary > 0)
    return core_config_refuse(config, "model.vocabulary", "only a decoder has one: expected 0");
  int64_t head_width = s->model.head_width ? s->model.head_width : s->model.width / s->model.heads;
  int64_t kv_heads = s->model.kv_heads ? s->model.kv_heads : s->model.heads;
  if (!s->model.head_width && s->model.width % s->model.heads != 0)
    return core_config_refuse(config, "model.heads",
                              "%lld heads do not divide the width %lld (or give head_width)",
                              (long long)s->model.heads, (long long)s->model.width);
  if (s->model.heads % kv_heads != 0)
    return core_config_refuse(config, "model.kv_heads", "%lld must divide the %lld heads",
                              (long long)kv_heads, (long long)s->model.heads);
  for (unsigned m = 0; m < s->data.modalities_count; m++)
    if ((decoder || s->data.modalities[m].positions == TRAIN_POSITIONS_ROPE) && head_width % 2 != 0)
      return core_config_refuse(config, "model.head_width", "RoPE needs an even head width, got %lld",
                                (long long)head_width);
  if (!train_settings_rule_valid(s->model.moe.layers, s->model.layers))
    return core_config_refuse(
        config, "model.moe.layers",
        "expected none, all, every N, first half, second half or a list of layers below %lld, "
        "got '%s'",
        (long long)s->model.layers, s->model.moe.layers);
  TRY(check_capacity(config, s));
  return CORE_OK;
}

/* Baselines of a tower. */
static core_status check_baselines(const core_config *config, const train_settings *s) {
  bool own = s->model.trunks == TRAIN_TRUNK_PER_MODALITY;
  bool divided = s->model.moe.partition == TRAIN_PARTITION_MODALITY;
  if (own && s->model.kind == TRAIN_KIND_CONNECTOR)
    return core_config_refuse(config, "model.trunks", "a connector has no trunk: expected shared");
  if (!divided) return CORE_OK;
  if (s->model.kind == TRAIN_KIND_CONNECTOR)
    return core_config_refuse(config, "model.moe.partition",
                              "a step of a connector has tokens of one modality: expected none");
  for (unsigned m = 0; m < s->data.modalities_count; m++) {
    int64_t first, count;
    train_settings_expert_share(s, (int32_t)m, &first, &count);
    if (count < s->model.moe.choose)
      return core_config_refuse(
          config, "model.moe.partition",
          "'%s' gets %lld of the %lld experts, fewer than the %lld that a token chooses",
          s->data.modalities[m].name, (long long)count, (long long)s->model.moe.experts,
          (long long)s->model.moe.choose);
  }
  return CORE_OK;
}

static core_status check_pairs(const core_config *config, const train_settings *s) {
  for (unsigned i = 0; i < s->objective.pairs_count; i++) {
    int32_t pair[2];
    char key[64];
    snprintf(key, sizeof key, "objective.pairs.%u", i);
    if (!train_settings_pair(s, s->objective.pairs[i], pair))
      return core_config_refuse(config, key,
                                "expected two different modalities of this configuration as a:b, got '%s'",
                                s->objective.pairs[i]);
  }
  if (s->model.kind != TRAIN_KIND_DECODER && s->objective.pairs_count == 0 && s->data.modalities_count < 2)
    return core_config_refuse(config, "data.modalities", "a contrastive objective needs two modalities");
  return CORE_OK;
}

static core_status check_batches(const core_config *config, const train_settings *s) {
  bool homogeneous = s->data.batches == TRAIN_BATCHES_HOMOGENEOUS;
  if (homogeneous && s->parallel.placement != TRAIN_SHARED)
    return core_config_refuse(
        config, "parallel.placement",
        "with homogeneous batches the ranks of other modalities would wait: expected shared");
  if (!homogeneous && s->data.incomplete != TRAIN_INCOMPLETE_CARRY)
    return core_config_refuse(config, "data.incomplete",
                              "only homogeneous batches are incomplete: expected carry");
  return CORE_OK;
}

static core_status check_parallel(const core_config *config, const train_settings *s, int32_t ranks) {
  int64_t e = s->parallel.experts, batch = s->optimizer.batch, micro = s->optimizer.accumulate;
  if (e < 1 || ranks % e != 0)
    return core_config_refuse(config, "parallel.experts",
                              "the expert-parallel size %lld must divide the %d ranks", (long long)e, ranks);
  int64_t parts = s->parallel.placement == TRAIN_SHARED ? ranks : ranks / e;
  if (batch % (micro * parts) != 0)
    return core_config_refuse(config, "optimizer.batch",
                              "%lld samples must divide evenly into %lld micro-batches of %lld %s",
                              (long long)batch, (long long)micro, (long long)parts,
                              s->parallel.placement == TRAIN_SHARED ? "ranks" : "expert groups");
  if (s->model.moe.dispatch == TRAIN_CAPACITY && batch / micro / parts % s->model.moe.group_samples != 0)
    return core_config_refuse(
        config, "model.moe.group_samples",
        "a routing group of %lld samples must divide the %lld samples of a micro-batch on a %s",
        (long long)s->model.moe.group_samples, (long long)(batch / micro / parts),
        s->parallel.placement == TRAIN_SHARED ? "rank" : "group of ranks");
  return CORE_OK;
}

/* How communication and computation overlap. */
static core_status check_overlap(const core_config *config, const train_settings *s) {
  const double most = 1 << 20; /* a TiB */
  if (!(s->parallel.bucket > 0 && s->parallel.bucket <= most))
    return core_config_refuse(config, "parallel.bucket", "expected MiB, more than 0 and at most %g, got %g",
                              most, s->parallel.bucket);
  if (s->parallel.chunks < 1 || s->parallel.chunks > TRAIN_MOST_CHUNKS)
    return core_config_refuse(config, "parallel.chunks", "expected 1 to %d, got %lld", (int)TRAIN_MOST_CHUNKS,
                              (long long)s->parallel.chunks);
  return CORE_OK;
}

static core_status check_device(const core_config *config, const train_settings *s) {
  const char *device = s->run.device;
  if (strcmp(device, "auto") != 0 && strcmp(device, "cpu") != 0 && strcmp(device, "cuda") != 0)
    return core_config_refuse(config, "run.device", "expected one of: auto, cpu, cuda, got '%s'", device);
  if (s->run.precision == CORE_BFLOAT16 && CORE_REAL_DTYPE != CORE_FLOAT32)
    return core_config_refuse(config, "run.precision", "this build computes in double: expected float32");
  return CORE_OK;
}

/* What hangs on evaluations, and how they route. */
static core_status check_forgetting(const core_config *config, const train_settings *s) {
  for (unsigned i = 0; i < s->evaluate.forgetting_count; i++) {
    const char *split = s->evaluate.forgetting[i];
    if (split[0] == '\0' || strchr(split, '/'))
      return core_config_refuse(config, "evaluate.forgetting",
                                "expected names of splits of data.path, got '%s'", split);
  }
  if (s->evaluate.forgetting_count > 0 && s->model.kind == TRAIN_KIND_CONNECTOR)
    return core_config_refuse(config, "evaluate.forgetting",
                              "towers and decoders are compared, no connector: expected an empty list");
  return CORE_OK;
}

static core_status check_evaluate(const core_config *config, const train_settings *s, int32_t ranks) {
  int64_t parts = s->parallel.placement == TRAIN_SHARED ? ranks : ranks / s->parallel.experts;
  int64_t capacity = train_settings_thousandths(s->evaluate.capacity);
  if (s->run.early_stopping.patience > 0 && s->evaluate.interval == 0)
    return core_config_refuse(config, "evaluate.interval",
                              "run.early_stopping follows the validation recall: expected at least 1");
  if (s->checkpoint.keep_best && s->evaluate.interval == 0)
    return core_config_refuse(config, "evaluate.interval",
                              "checkpoint.keep_best follows the validation recall: expected at least 1");
  TRY(check_forgetting(config, s));
  if (strcmp(s->evaluate.capacity, "none") == 0) return CORE_OK;
  if (capacity < 1 || capacity > 1000000)
    return core_config_refuse(
        config, "evaluate.capacity",
        "expected none, or a number from 0.001 to 1000 with at most three decimals, got '%s'",
        s->evaluate.capacity);
  if (s->model.kind == TRAIN_KIND_CONNECTOR)
    return core_config_refuse(config, "evaluate.capacity", "a connector drops nothing: expected none");
  if (s->evaluate.batch % (parts * s->model.moe.group_samples) != 0)
    return core_config_refuse(
        config, "evaluate.batch",
        "with evaluate.capacity routing groups of %lld samples must divide the batch of "
        "%lld on each of %lld %s",
        (long long)s->model.moe.group_samples, (long long)s->evaluate.batch, (long long)parts,
        s->parallel.placement == TRAIN_SHARED ? "ranks" : "expert groups");
  return CORE_OK;
}

/* The list holds what is used alone by now. */
static core_status check_use(const core_config *config, const train_settings *s) {
  for (unsigned i = 0; i < s->data.use_count; i++)
    if (train_settings_modality(s, s->data.use[i]) < 0)
      return core_config_refuse(config, "data.use", "data.modalities has no '%s'", s->data.use[i]);
  return CORE_OK;
}

core_status train_settings_check(const core_config *config, int32_t ranks) {
  const train_settings *s = core_config_data(config);
  TRY(check_sizes(config, s));
  TRY(check_device(config, s));
  if (s->run.directory[0] == '\0' || strlen(s->run.directory) > 900)
    return core_config_refuse(config, "run.directory",
                              "expected the name of a directory, of at most 900 bytes");
  if (s->parallel.experts < 1)
    return core_config_refuse(config, "parallel.experts", "expected at least 1, got %lld",
                              (long long)s->parallel.experts);
  TRY(check_use(config, s));
  for (unsigned m = 0; m < s->data.modalities_count; m++) TRY(check_modality(config, s, m));
  TRY(check_model(config, s));
  TRY(train_settings_check_mixtures(config));
  TRY(check_lora(config, s));
  TRY(check_baselines(config, s));
  TRY(check_schedule(config, s));
  TRY(check_pairs(config, s));
  TRY(check_batches(config, s));
  TRY(check_parallel(config, s, ranks));
  TRY(check_overlap(config, s));
  TRY(check_evaluate(config, s, ranks));
  return CORE_OK;
}
