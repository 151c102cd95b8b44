/* What train_settings_check refuses: each value alone, with the key that the message must name. */
#include <stdio.h>

#include "tests/support/test_unit.h"
#include "trainer/settings.h"

static const char base[] =
    "data:\n"
    "  path: nowhere\n"
    "  modalities: [{name: image}, {name: text}]\n"
    "model: {width: 32, layers: 4, heads: 4, moe: {experts: 8}}\n"
    "optimizer: {batch: 16}\n";

/* A connector between latent spaces. */
static const char connector[] =
    "data:\n"
    "  path: nowhere\n"
    "  modalities: [{name: image, positions: none}, {name: text, positions: none}]\n"
    "model: {kind: connector, width: 32, moe: {experts: 8, choose: 2}}\n"
    "objective: {directions: ['image:text', 'text:image'], importance: 0, load: 0, z: 0}\n"
    "optimizer: {batch: 16}\n";

static const char decoder[] =
    "data:\n"
    "  path: nowhere\n"
    "  modalities: [{name: image}, {name: text, positions: none}]\n"
    "model: {kind: decoder, vocabulary: 30, width: 32, layers: 4, heads: 4, moe: {experts: 8}}\n"
    "optimizer: {batch: 16}\n";

static core_config *config;

static int forget(void **state) {
  (void)state;
  core_config_destroy(config);
  config = NULL;
  return 0;
}

static core_status check_text(const char *text, const char *const *set, int32_t count, int32_t ranks) {
  forget(NULL);
  TRY(core_config_load(train_settings_spec(), "s.yaml", text, set, count, &config));
  TRY(train_settings_check(config, ranks));
  return CORE_OK;
}

static core_status check(const char *const *set, int32_t count, int32_t ranks) {
  return check_text(base, set, count, ranks);
}

typedef struct bad_value {
  int32_t ranks;
  const char *set, *second; /* second: what makes the first wrong, or NULL */
  const char *named;
} bad_value;

static const bad_value bad_values[] = {
    {1, "run.steps=-1", NULL, "run.steps: expected 0 to"},
    {1, "run.threads=-1", NULL, "run.threads"},
    {1, "run.threads=5000", NULL, "run.threads: expected 0 to 1024, got 5000"},
    {1, "run.log=0", NULL, "run.log"},
    {1, "run.deadline=0", NULL, "run.deadline"},
    {1, "run.failures=0", NULL, "run.failures"},
    {1, "data.shuffle=-1", NULL, "data.shuffle"},
    {1, "data.threads=0", NULL, "data.threads"},
    {1, "data.queue=0", NULL, "data.queue"},
    {1, "data.queue=65", NULL, "data.queue"},
    {1, "data.cache=0", NULL, "data.cache"},
    {1, "data.incomplete=drop", NULL, "data.incomplete: only homogeneous batches"},
    {1, "data.batches=homogeneous", "parallel.placement=partitioned", "parallel.placement: with homogeneous"},
    {1, "data.use=[image, smell]", NULL, "data.use: data.modalities has no 'smell'"},
    {1, "data.modalities.image.mark=1", NULL, "data.modalities.text.mark: 'image' has the mark 1 too"},
    {1, "data.modalities.image.mark=16", NULL, "data.modalities.image.mark: expected 0 to 15"},
    {1, "data.modalities.text.queries=0", NULL, "data.modalities.text.queries: expected 1 to"},
    {1, "data.modalities.text.depth=0", NULL, "data.modalities.text.depth: expected 1 to 256, got 0"},
    {1, "data.modalities.text.heads=-1", NULL, "data.modalities.text.heads: expected 0 to"},
    {1, "data.modalities.text.connector=resampler", NULL,
     "data.modalities.text.positions: a resampler's rows are learned queries: expected none or rope"},
    {1, "data.modalities.text={connector: resampler, positions: none, heads: 3}", NULL,
     "data.modalities.text.heads: 3 heads do not divide the resampler's width 32"},
    {1, "data.modalities.text={connector: resampler, positions: none, hidden: 514, heads: 2}", NULL,
     "data.modalities.text.heads: 2 heads do not divide the resampler's width 514"},
    {1, "model.width=0", NULL, "model.width"},
    {1, "model.width=-32", NULL, "model.width"},
    {1, "model.width=100000000", NULL, "model.width"},
    {1, "model.layers=0", NULL, "model.layers"},
    {1, "model.heads=0", NULL, "model.heads"},
    {1, "model.heads=3", NULL, "model.heads: 3 heads do not divide the width 32"},
    {1, "model.kv_heads=3", NULL, "model.kv_heads: 3 must divide the 4 heads"},
    {1, "model.kv_heads=8", NULL, "model.kv_heads"},
    {1, "model.head_width=-1", NULL, "model.head_width"},
    {1, "model.head_width=7", "data.modalities.text.positions=rope",
     "model.head_width=7: model.head_width: RoPE"},
    {1, "model.lora=[{parameters: x, rank: 0}]", NULL, "model.lora.0.rank: expected 1 to"},
    {1, "model.lora=[{parameters: x, rank: 1, alpha: 0}]", NULL, "model.lora.0.alpha"},
    {1, "model.lora=[{parameters: x, rank: 1, dropout: 1}]", NULL, "model.lora.0.dropout: expected 0 to"},
    {1, "model.lora=[{parameters: x, rank: 1}, {parameters: y, rank: -1}]", NULL, "model.lora.1.rank"},
    {1, "model.hidden=-1", NULL, "model.hidden"},
    {1, "model.embedding=-1", NULL, "model.embedding"},
    {1, "model.norm_epsilon=-0.1", NULL, "model.norm_epsilon"},
    {1, "model.rope_base=0.5", NULL, "model.rope_base"},
    {1, "model.moe.layers=every", NULL, "model.moe.layers"},
    {1, "model.moe.layers=every 0", NULL, "model.moe.layers"},
    {1, "model.moe.layers=every two", NULL, "model.moe.layers"},
    {1, "model.moe.layers='1,4'", NULL, "model.moe.layers: expected none, all"},
    {1, "model.moe.layers='1,'", NULL, "model.moe.layers"},
    {1, "model.moe.layers='1;2'", NULL, "model.moe.layers"},
    {1, "model.moe.layers='-1'", NULL, "model.moe.layers"},
    {1, "model.moe.layers=", NULL, "model.moe.layers"},
    {1, "model.moe.experts=0", NULL, "model.moe.experts"},
    {1, "model.moe.experts=1025", NULL, "model.moe.experts"},
    {1, "model.moe.choose=0", NULL, "model.moe.choose"},
    {1, "model.moe.choose=9", NULL, "model.moe.choose: expected 1 to 8"},
    {1, "model.moe.choose=4", "model.moe.experts=3", "model.moe.choose: expected 1 to 3"},
    {1, "model.moe.hidden=-1", NULL, "model.moe.hidden"},
    {1, "model.moe.capacity='1.0505'", NULL, "model.moe.capacity: expected a number from 0.001"},
    {1, "model.moe.capacity='-1'", NULL, "model.moe.capacity"},
    {1, "model.moe.capacity='0'", NULL, "model.moe.capacity"},
    {1, "model.moe.capacity='1e3'", NULL, "model.moe.capacity"},
    {1, "model.moe.capacity='1001'", NULL, "model.moe.capacity"},
    {1, "model.moe.capacity=much", NULL, "model.moe.capacity"},
    {1, "model.moe.group_samples=0", NULL, "model.moe.group_samples"},
    {1, "model.moe.group_samples=5", "model.moe.dispatch=capacity",
     "model.moe.group_samples: a routing group of 5"},
    {1, "model.moe.noise=-1", NULL, "model.moe.noise"},
    {1, "model.moe.buffer=0", NULL, "model.moe.buffer"},
    {1, "objective.scale=0", NULL, "objective.scale"},
    {1, "objective.scale=101", NULL, "objective.scale: expected 0.001 to 100"},
    {1, "objective.largest_scale=2000000", NULL, "objective.largest_scale"},
    {1, "objective.importance=-1", NULL, "objective.importance"},
    {1, "objective.load=-1", NULL, "objective.load"},
    {1, "objective.z=-1", NULL, "objective.z"},
    {1, "objective.pairs=['image:text', 'image:image']", NULL, "objective.pairs.1: expected two different"},
    {1, "objective.pairs=['image:sound']", NULL, "got 'image:sound'"},
    {1, "objective.pairs=['image']", NULL, "objective.pairs.0"},
    {1, "objective.pairs=['image:text:text']", NULL, "objective.pairs.0"},
    {1, "optimizer.batch=0", NULL, "optimizer.batch"},
    {1, "optimizer.accumulate=0", NULL, "optimizer.accumulate"},
    {1, "optimizer.accumulate=3", NULL,
     "optimizer.batch: 16 samples must divide evenly into 3 micro-batches"},
    {1, "optimizer.rate=2000000", NULL, "optimizer.rate"},
    {1, "optimizer.min_rate=0.1", NULL, "optimizer.min_rate: expected 0 to 0.001"},
    {1, "optimizer.warmup=-1", NULL, "optimizer.warmup"},
    {1, "optimizer.timescale=0", NULL, "optimizer.timescale"},
    {1, "optimizer.cooldown=-1", NULL, "optimizer.cooldown"},
    {1, "optimizer.weight_decay=-1", NULL, "optimizer.weight_decay"},
    {1, "optimizer.beta1=1", NULL, "optimizer.beta1"},
    {1, "optimizer.beta2=1", NULL, "optimizer.beta2"},
    {1, "optimizer.epsilon=0", NULL, "optimizer.epsilon"},
    {1, "optimizer.clip=-1", NULL, "optimizer.clip"},
    {1, "checkpoint.interval=-1", NULL, "checkpoint.interval"},
    {1, "checkpoint.keep=0", NULL, "checkpoint.keep"},
    {1, "checkpoint.keep_every=-1", NULL, "checkpoint.keep_every"},
    {1, "checkpoint.level=0", NULL, "checkpoint.level"},
    {1, "checkpoint.level=20", NULL, "checkpoint.level"},
    {1, "checkpoint.threads=0", NULL, "checkpoint.threads"},
    {1, "checkpoint.buffers=0", NULL, "checkpoint.buffers"},
    {1, "checkpoint.buffers=3", NULL, "checkpoint.buffers"},
    {1, "evaluate.interval=-1", NULL, "evaluate.interval"},
    {1, "evaluate.capacity=much", NULL, "evaluate.capacity: expected none, or a number from 0.001"},
    {1, "evaluate.capacity='1.0505'", NULL, "evaluate.capacity"},
    {1, "evaluate.capacity='0'", NULL, "evaluate.capacity"},
    {1, "evaluate.batch=12", "evaluate.capacity=1",
     "evaluate.batch: with evaluate.capacity routing groups of 8"},
    {4, "evaluate.batch=40", "evaluate.capacity=1", "must divide the batch of 40 on each of 4 ranks"},
    {1, "run.early_stopping.patience=-1", NULL, "run.early_stopping.patience"},
    {1, "run.early_stopping.min_delta=2", NULL, "run.early_stopping.min_delta: expected 0 to 1"},
    {1, "run.early_stopping.patience=2", NULL, "evaluate.interval: run.early_stopping follows"},
    {1, "checkpoint.keep_best=true", NULL, "evaluate.interval: checkpoint.keep_best follows"},
    {1, "model.trunks=two", NULL, "one of: shared, per_modality"},
    {1, "model.moe.partition=modality", "model.moe.choose=5",
     "model.moe.partition: 'image' gets 4 of the 8 experts, fewer than the 5"},
    {1, "evaluate.batch=0", NULL, "evaluate.batch"},
    {1, "evaluate.forgetting=['']", NULL, "evaluate.forgetting: expected names of splits"},
    {1, "evaluate.forgetting=[a/b]", NULL, "evaluate.forgetting"},
    {1, "data.modalities.text.hidden=-1", NULL, "data.modalities.text.hidden"},
    {1, "data.modalities.text.length=0", NULL, "data.modalities.text.length"},
    {1, "data.modalities.text.local=-1", NULL, "data.modalities.text.local"},
    {1, "data.modalities.text.global=-1", NULL, "data.modalities.text.global"},
    {1, "data.modalities.text.global=1", NULL, "data.modalities.text"},
    {1, "data.modalities.text.experts=9", NULL, "data.modalities.text.experts: expected 0 to 8"},
    {1, "data.modalities.text.ranks=2", NULL, "data.modalities.text.ranks: expected 0 to 1"},
    {1, "data.modalities.text.name=image", NULL, "listed twice"},
    {1, "data.modalities.text.name=", NULL, "a modality's name is 1 to 48 characters"},
    {1, "data.modalities.text.name=a/b", NULL, "got 'a/b'"},
    {1, "data.modalities.text.name=a.b", NULL, "got 'a.b'"},
    {1, "data.modalities.text.name=a:b", NULL, "got 'a:b'"},
    {1, "data.modalities.text.name=a b", NULL, "got 'a b'"},
    {1, "data.modalities.text.name=3d", NULL, "got '3d'"},
    {1, "data.modalities=[{name: image}]", NULL, "a contrastive objective needs two modalities"},
    {1, "parallel.experts=2", NULL, "parallel.experts: the expert-parallel size 2 must divide the 1 ranks"},
    {4, "parallel.experts=0", NULL, "parallel.experts"},
    {4, "parallel.experts=3", NULL, "parallel.experts"},
    {4, "model.moe.experts=3", "parallel.experts=4", "parallel.experts: 4 ranks for at most 3 experts"},
    {4, "model.moe.layer_experts=[3, 2]", "parallel.experts=4",
     "parallel.experts: 4 ranks for at most 3 experts"},
    {1, "model.moe.layer_experts=[3]", NULL,
     "model.moe.layer_experts: expected a number for each of the 2 MoE layers, got 1"},
    {1, "model.moe.layer_experts=[3, 4, 5]", NULL, "the 2 MoE layers, got 3"},
    {1, "model.moe.layer_experts=[3, 0]", NULL, "model.moe.layer_experts: expected 1 to 1024 experts"},
    {1, "model.moe.layer_experts=[1025, 3]", NULL, "model.moe.layer_experts: expected 1 to 1024 experts"},
    {1, "model.moe.layer_experts=[3, 2]", "model.moe.choose=3",
     "model.moe.layer_experts: expected 3 to 1024 experts, as many as a token chooses or more, got 2"},
    {1, "model.moe.layer_experts=[3, 2]", "model.moe.partition=modality",
     "model.moe.layer_experts: with model.moe.partition"},
    {1, "model.moe.layer_experts=[3, two]", NULL, "layer_experts"},
    {1, "model.moe.added=[1]", NULL,
     "model.moe.added: expected a number for each of the 2 MoE layers, got 1"},
    {1, "model.moe.added=[0, 8]", NULL,
     "model.moe.added: expected 0 to 7 added experts among the 8 of MoE layer 1, got 8"},
    {1, "model.moe.added=[-1, 0]", NULL, "model.moe.added: expected 0 to 7"},
    {1, "model.moe.added=[1, 0]", "model.moe.partition=modality",
     "model.moe.added: with model.moe.partition"},
    {1, "model.moe.added_bias=true", NULL, "model.moe.added_bias: no layer has added experts"},
    {1, "model.moe.added_bias=true", "model.moe.added=[0, 0]", "model.moe.added_bias: no layer has added"},
    {1, "model.moe.calibration=add", NULL, "model.moe.calibration: no layer has added experts"},
    {1, "model.moe.calibration=divide", NULL, "model.moe.calibration"},
    {1, "model.moe.second_noise=gumbel", NULL, "model.moe.second_noise: draws the second of two choices"},
    {1, "model.moe.second_noise=gumbel", "model.moe.choose=2",
     "model.moe.noise: with model.moe.second_noise the first choice is that of the plain logits"},
    {1, "model.moe.second_noise=normal", NULL, "model.moe.second_noise"},
    {1, "objective.balance=-1", NULL, "objective.balance: expected 0 to"},
    {1, "objective.balance_scope=rank", NULL, "objective.balance_scope"},
    {1, "objective.balance_shares=second", NULL, "objective.balance_shares"},
    {4, "optimizer.batch=18", NULL,
     "optimizer.batch: 18 samples must divide evenly into 1 micro-batches of 4 ranks"},
    {4, "optimizer.batch=17", "parallel.placement=partitioned", "optimizer.batch: 17"},
    {3, "optimizer.batch=16", NULL, "optimizer.batch: 16"},
};

static const bad_value bad_connectors[] = {
    {1, "evaluate.forgetting=[old]", NULL, "evaluate.forgetting: towers and decoders are compared"},
    {1, "objective.directions=[]", NULL, "objective.directions: a connector needs at least one"},
    {1, "objective.directions=['image:smell']", NULL,
     "objective.directions.0: expected two different modalities"},
    {1, "objective.directions=['image:image']", NULL, "got 'image:image'"},
    {1, "objective.directions=['image:text', 'text:image', 'image:text']", NULL,
     "objective.directions.2: the direction is listed twice"},
    {1, "objective.pairs=['image:text']", NULL, "objective.pairs: a connector has directions"},
    {1, "objective.z=0.1", NULL, "a connector has no router losses"},
    {1, "objective.alpha=1.5", NULL, "objective.alpha: expected 0 to 1"},
    {1, "objective.temperature=0", NULL, "objective.temperature"},
    {1, "objective.regression=cubic", NULL, "squared, smooth_l1"},
    {1, "model.layers=2", NULL, "model.layers: a connector has one layer"},
    {1, "model.moe.dispatch=capacity", NULL, "model.moe.dispatch: a connector drops nothing"},
    {1, "model.moe.dropout=1", NULL, "model.moe.dropout"},
    {1, "data.modalities.text.positions=learned", NULL, "data.modalities.text: with model.kind connector"},
    {1, "data.modalities.text.connector=mlp", NULL, "data.modalities.text: with model.kind connector"},
    {1, "data.modalities.image.local=1", NULL, "data.modalities.image: with model.kind connector"},
    {1, "schedule.alternate=block", NULL,
     "schedule.steps: expected a number of steps for each of 2 directions, got 0"},
    {1, "schedule.steps=[1, 2, 3]", "schedule.alternate=block", "of 2 directions, got 3"},
    {1, "schedule.steps=[1, 0]", "schedule.alternate=block",
     "expected 1 to 1000000 steps for each direction, got 0"},
    {1, "schedule.alternate=adaptive", NULL, "evaluate.interval: adaptive alternation follows"},
    {1, "schedule.least=2", NULL, "schedule.least"},
    {1, "model.trunks=per_modality", NULL, "model.trunks: a connector has no trunk"},
    {1, "model.moe.partition=modality", NULL, "model.moe.partition: a step of a connector has tokens of one"},
    {1, "evaluate.capacity=2", NULL, "evaluate.capacity: a connector drops nothing"},
    {1, "model.kind=tower", "model.heads=2", "a tower has pairs, no directions"},
    {4, "model.moe.experts=3", "parallel.experts=4", "parallel.experts: 4 ranks for at most 3 experts"},
    {1, "objective.balance=0.1", NULL, "a connector has no router losses"},
    {1, "model.moe.layer_experts=[3]", NULL, "model.moe.layer_experts: a connector's blocks are alike"},
    {1, "model.moe.added=[1]", NULL, "model.moe.added: a connector's blocks are alike"},
};

static const bad_value bad_decoders[] = {
    {1, "model.vocabulary=1", NULL, "model.vocabulary: expected 2 to"},
    {1, "model.head_width=5", NULL, "model.head_width: RoPE needs an even head width"},
    {1, "model.embedding=8", NULL, "model.embedding: a decoder has no common embedding"},
    {1, "model.rope_scaling.kind=yarn", NULL, "none, linear, llama3"},
    {1, "model.rope_scaling.factor=0.5", NULL, "model.rope_scaling.factor"},
    {1, "model.rope_scaling.high=1", "model.rope_scaling.kind=llama3",
     "model.rope_scaling.high: expected more than"},
    {1, "model.rope_scaling.high=0.5", NULL, "model.rope_scaling.high: expected 1 to"},
    {1, "model.rope_scaling.length=0", NULL, "model.rope_scaling.length"},
    {1, "model.moe.dispatch=capacity", NULL, "model.moe.dispatch: a decoder drops nothing"},
    {1, "parallel.placement=partitioned", NULL, "parallel.placement: a decoder's sequence"},
    {1, "objective.pairs=['image:text']", NULL, "objective.pairs: a decoder predicts tokens"},
    {1, "objective.directions=['image:text']", NULL, "a decoder has responses, no directions"},
    {1, "schedule.alternate=cyclic", NULL, "schedule.alternate: a decoder has no directions"},
    {1, "model.per_direction=true", NULL, "model.per_direction: a decoder"},
    {1, "data.modalities.text.positions=rope", NULL, "data.modalities.text.positions: a decoder rotates"},
    {1, "data.modalities.image.connector=resampler", NULL,
     "data.modalities.image.positions: a resampler's rows are learned queries: expected none"},
    {1, "data.modalities.text.name=vocabulary", NULL, "data.modalities: 'vocabulary' is what"},
    {1, "model.kind=tower", NULL, "model.vocabulary: only a decoder has one"},
};

static const bad_value bad_towers[] = {
    {1, "model.vocabulary=30", NULL, "model.vocabulary: only a decoder has one"},
    {1, "objective.directions=['image:text']", NULL,
     "objective.directions: a tower has pairs, no directions"},
    {1, "schedule.alternate=cyclic", NULL, "schedule.alternate: a tower has no directions"},
    {1, "model.per_direction=true", NULL, "model.per_direction: a tower has no directions"},
    {1, "run.precision=float16", NULL, "float32, bfloat16"},
    {1, "parallel.transport=pigeon", NULL, "auto, nccl, staged"},
    {1, "parallel.overlap=sometimes", NULL, "auto, always, never"},
    {1, "parallel.bucket=0", NULL,
     "parallel.bucket: expected MiB, more than 0 and at most 1.04858e+06, got 0"},
    {1, "parallel.bucket=nan", NULL, "parallel.bucket"},
    {1, "parallel.chunks=0", NULL, "parallel.chunks: expected 1 to 16, got 0"},
    {1, "parallel.chunks=17", NULL, "parallel.chunks: expected 1 to 16, got 17"},
};

static void good_connectors_pass(void **state) {
  (void)state;
  static const char *const good[][3] = {{NULL},
                                        {"schedule.alternate=cyclic", NULL},
                                        {"schedule.alternate=block", "schedule.steps=[3, 1]", NULL},
                                        {"schedule.alternate=adaptive", "evaluate.interval=5", NULL},
                                        {"model.per_direction=true", "model.dense=true", NULL},
                                        {"model.dense=true", "model.dense_match=total", NULL}};
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    int32_t count = 0;
    while (good[i][count]) count++;
    assert_ok(check_text(connector, good[i], count, 1));
  }
}

static void refuse_all(const char *text, const bad_value *list, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const bad_value *b = &list[i];
    const char *set[2] = {b->second ? b->second : b->set, b->set};
    core_status status = check_text(text, set, b->second ? 2 : 1, b->ranks);
    if (status != CORE_ERR_CONFIG || !strstr(core_error_get()->message, b->named))
      fail_msg("--set %s: expected a refusal with \"%s\", got %s \"%s\"", b->set, b->named,
               core_status_name(status), status == CORE_OK ? "" : core_error_get()->message);
    /* a refused key that was set is located at its --set; another one at its line */
    size_t key = strcspn(b->set, "=");
    if (strncmp(b->named, b->set, key) == 0 && b->named[key] != '.') assert_message("--set ");
  }
}

static void bad_values_are_refused_by_their_key(void **state) {
  (void)state;
  refuse_all(base, bad_values, sizeof bad_values / sizeof *bad_values);
  refuse_all(base, bad_towers, sizeof bad_towers / sizeof *bad_towers);
  refuse_all(connector, bad_connectors, sizeof bad_connectors / sizeof *bad_connectors);
  refuse_all(decoder, bad_decoders, sizeof bad_decoders / sizeof *bad_decoders);
}

/* What takes three settings to be wrong, or right. */
static void local_balance_has_bounds(void **state) {
  (void)state;
  const char *set[] = {"objective.balance=0.1", "objective.balance_scope=local", "model.moe.group_samples=3",
                       "optimizer.batch=16"};
  assert_error(
      check(set, 4, 1), CORE_ERR_CONFIG,
      "model.moe.group_samples: with objective.balance_scope local, groups of 3 samples must divide");
  set[2] = "model.moe.group_samples=4";
  assert_ok(check(set, 4, 1));
  set[3] = "optimizer.batch=8000000";
  assert_error(check(set, 4, 1), CORE_ERR_CONFIG, "2000000 groups of a batch have 68000000 sums");
  const char *drawn[] = {"model.moe.second_noise=gumbel", "model.moe.choose=2", "model.moe.noise=0"};
  assert_ok(check(drawn, 3, 1));
  const char *calibrated[] = {"model.moe.calibration=add", "model.moe.added=[0, 1]"};
  assert_ok(check(calibrated, 2, 1));
}

static void good_values_pass(void **state) {
  (void)state;
  static const struct {
    int32_t ranks;
    const char *set[4];
  } good[] = {
      {1, {NULL}},
      {16, {NULL}},
      {8, {"parallel.experts=8", NULL}},
      {8, {"parallel.experts=4", "parallel.placement=partitioned", "optimizer.batch=2", NULL}},
      {1, {"model.dense=true", "model.moe.experts=7", NULL}},
      {4, {"model.moe.experts=6", "parallel.experts=4", NULL}},
      {4, {"model.moe.layer_experts=[3, 5]", "model.moe.added=[0, 4]", "parallel.experts=4", NULL}},
      {4, {"model.dense=true", "model.moe.experts=3", "parallel.experts=4", NULL}},
      {4, {"model.dense=true", "model.moe.experts=7", "parallel.experts=4", NULL}},
      {1, {"model.heads=3", "model.head_width=8", NULL}},
      {1, {"model.kv_heads=2", "model.moe.layers='0,3'", "optimizer.accumulate=16", NULL}},
      {2, {"model.moe.dispatch=capacity", "model.moe.capacity='0.001'", NULL}},
      {1, {"data.modalities.text.global=0.5", "data.modalities.text.experts=1", "run.steps=0", NULL}},
      {1, {"objective.pairs=['text:image']", "optimizer.clip=0", "checkpoint.interval=0", NULL}},
  };
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    int32_t count = 0;
    while (count < 4 && good[i].set[count]) count++;
    assert_ok(check(good[i].set, count, good[i].ranks));
  }
}

static void good_decoders_pass(void **state) {
  (void)state;
  static const char *const good[][2] = {{NULL},
                                        {"model.tied=true", NULL},
                                        {"model.rope_scaling.kind=llama3", NULL},
                                        {"data.modalities=[{name: image}]", NULL}, /* one is enough */
                                        {"objective.z=0.1", NULL}};
  for (size_t i = 0; i < sizeof good / sizeof *good; i++)
    assert_ok(check_text(decoder, good[i], good[i][0] != NULL, 4));
}

static void decimals_become_thousandths(void **state) {
  (void)state;
  static const struct {
    const char *text;
    int64_t value;
  } list[] = {{"1", 1000},  {"1.05", 1050}, {"0.001", 1}, {"2.500", 2500}, {"1.0500", 1050},  {"007.5", 7500},
              {"1.", 1000}, {"", -1},       {".5", -1},   {"-1", -1},      {"1.0005", -1},    {"1,5", -1},
              {"1.5x", -1}, {" 1", -1},     {"1e3", -1},  {"nan", -1},     {"9999999999", -1}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    assert_int_equal(train_settings_thousandths(list[i].text), list[i].value);
}

static void rules_choose_layers(void **state) {
  (void)state;
  static const struct {
    const char *rule;
    int64_t layers;
    const char *chosen;
  } list[] = {{"none", 4, "...."},         {"all", 3, "xxx"},          {"every 2", 5, "x.x.x"},
              {"every 1", 3, "xxx"},       {"every 9", 4, "x..."},     {"first half", 5, "xx..."},
              {"second half", 5, "...xx"}, {"second half", 4, "..xx"}, {"0", 3, "x.."},
              {"1,3", 5, ".x.x."},         {"3,1,1", 5, ".x.x."}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    assert_true(train_settings_rule_valid(list[i].rule, list[i].layers));
    for (int64_t l = 0; l < list[i].layers; l++)
      assert_int_equal(train_settings_moe_layer(list[i].rule, list[i].layers, l), list[i].chosen[l] == 'x');
  }
  static const char *const wrong[] = {"",  "some", "every", "every -1", "every 2x",
                                      "5", "1,,2", ",1",    "1, x",     "half"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
    assert_false(train_settings_rule_valid(wrong[i], 5));
}

static void pairs_are_found_by_name(void **state) {
  (void)state;
  assert_ok(check(NULL, 0, 1));
  const train_settings *s = core_config_data(config);
  int32_t pair[2];
  assert_true(train_settings_pair(s, "text:image", pair));
  assert_int_equal(pair[0], 1);
  assert_int_equal(pair[1], 0);
  assert_int_equal(train_settings_modality(s, "text"), 1);
  assert_int_equal(train_settings_modality(s, "tex"), -1);
  assert_false(train_settings_pair(s, "text:text", pair));
  assert_false(train_settings_pair(s, ":text", pair));
  assert_false(train_settings_pair(s, "text:", pair));
  char longer[400];
  memset(longer, 'x', sizeof longer - 1);
  memcpy(longer + sizeof longer - 6, ":text", 6);
  assert_false(train_settings_pair(s, longer, pair));
}

#define TEST(name) cmocka_unit_test_teardown(name, forget)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(bad_values_are_refused_by_their_key),
      TEST(good_values_pass),
      TEST(local_balance_has_bounds),
      TEST(good_connectors_pass),
      TEST(good_decoders_pass),
      TEST(decimals_become_thousandths),
      TEST(rules_choose_layers),
      TEST(pairs_are_found_by_name),
  };
  return cmocka_run_group_tests_name("trainer, settings", tests, NULL, NULL);
}
