/* Weights of other programs: small random LLaMA and Qwen2 decoders as transformers saved them
 * (make_published.py), one file and shards, float32, bfloat16 and float16. Imported, they give its logits;
 * exported, they are bit for bit what they were. What is damaged or of another kind is refused, and leaves
 * nothing behind. */
#include <hdf5.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "core/file.h"
#include "tests/support/test_device.h"
#include "tests/support/test_session.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/exchange.h"
#include "trainer/state.h"

#define FOLDER ANTIPHON_SOURCE_DIR "/tests/golden/published"

static comm_world *world;
static char root[64], text[512];

static const struct {
  const char *name;
  core_dtype dtype;
} published[] = {{"llama", CORE_FLOAT32}, {"qwen", CORE_BFLOAT16}, {"shards", CORE_FLOAT16}};
enum { PUBLISHED = sizeof published / sizeof *published };

/* Texts of this test are short; the last few stay. */
static const char *in_root(const char *name) {
  static char ring[8][128];
  static int next;
  char *place = ring[next++ % 8];
  snprintf(place, sizeof ring[0], "%s/%s", root, name);
  return place;
}

static const char *in_folder(const char *name) {
  snprintf(text, sizeof text, FOLDER "/%s", name);
  return text;
}

static int make_root(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/antiphon-published-XXXXXX");
  return mkdtemp(root) ? 0 : 1;
}

static int remove_root(void **state) {
  (void)state;
  test_remove_tree(root);
  return 0;
}

static comm_group *control(void) {
  return comm_control_group(world);
}

static core_status import(const char *source) {
  return train_import(control(), source, in_root("decoder.yaml"), in_root("imported"));
}

/* ---- logits ---- */

/* The imported parameters; connectors, which they lack, do not matter without latents. */
static void load_imported(train_session *session) {
  ckpt_reader *reader = NULL;
  train_state_tensors wanted;
  int32_t kept = 0;
  assert_ok(ckpt_reader_open(control(), in_root("imported/step-00000000"), &reader));
  assert_ok(train_state_list(session->model, NULL, TRAIN_STATE_LOAD_MODEL, &wanted));
  for (int32_t i = 0; i < wanted.count; i++) {
    ckpt_tensor found;
    if (ckpt_reader_find(reader, wanted.list[i].name, &found) == CORE_OK)
      wanted.list[kept++] = wanted.list[i];
  }
  assert_int_equal(kept, ckpt_reader_count(reader)); /* every imported one has its place */
  assert_int_equal(wanted.count - kept, 4);          /* connector, standardisation */
  assert_ok(ckpt_reader_load(reader, wanted.list, kept));
  train_state_free(&wanted);
  assert_ok(train_state_loaded(session->model));
  ckpt_reader_close(reader);
}

static double *read_logits(const char *name, int64_t *count) {
  hid_t file = H5Fopen(FOLDER "/logits.h5", H5F_ACC_RDONLY, H5P_DEFAULT),
        set = H5Dopen2(file, name, H5P_DEFAULT);
  assert_true(set >= 0);
  hid_t space = H5Dget_space(set);
  *count = H5Sget_simple_extent_npoints(space);
  double *values = malloc((size_t)*count * sizeof *values);
  assert_non_null(values);
  assert_true(H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
  H5Sclose(space), H5Dclose(set), H5Fclose(file);
  return values;
}

static void compare_logits(const char *name) {
  static const char *const set[] = {"optimizer.batch=3", "data.shuffle=0", "run.threads=1", NULL};
  test_session t;
  data_batch *batch = NULL;
  char *yaml = NULL;
  int64_t length = 0, count = 0;
  double off = 0, size = 0, *expected = read_logits(name, &count);
  assert_ok(core_file_read_all(in_root("decoder.yaml"), 1 << 20, &yaml, &length));
  test_session_open(world, yaml, set, FOLDER, &t);
  load_imported(t.session);
  assert_ok(data_stream_get(t.stream, &batch));
  train_model *model = t.session->model;
  const core_device *device = t.session->env.ops->device;
  assert_ok(train_model_take(model, batch, 0, -1));
  assert_ok(train_model_forward(model, TRAIN_MODE_EVALUATE));
  int64_t T = model->items.tokens, V = model->decoder.V;
  assert_int_equal(T * V, count);
  core_tensor logits = core_tensor_2(NULL, CORE_REAL_DTYPE, T, V);
  assert_ok(device->allocate(core_tensor_bytes(&logits), &logits.data));
  assert_ok(train_decoder_logits(model, train_rows(model->final_norm[0].out, T), logits));
  core_real *got = test_fetch(device, logits);
  for (int64_t i = 0; i < count; i++) {
    off += pow((double)got[i] - expected[i], 2);
    size += expected[i] * expected[i];
  }
  printf("%s: logits are off by %.2g of their size\n", name, sqrt(off / size));
  assert_true(sqrt(off / size) < 2e-6); /* transformers itself computes norms and angles in float32 */
  device->release(logits.data);
  free(got), free(expected), free(yaml);
  data_stream_put(t.stream, batch);
  test_session_close(&t);
}

/* ---- the round trip ---- */

static void compare_collections(const ckpt_safetensors *a, const ckpt_safetensors *b) {
  assert_int_equal(ckpt_safetensors_count(a), ckpt_safetensors_count(b));
  for (int32_t i = 0; i < ckpt_safetensors_count(a); i++) {
    const ckpt_safetensor *x = ckpt_safetensors_at(a, i), *y = ckpt_safetensors_at(b, i);
    assert_string_equal(x->name, y->name);
    assert_int_equal(x->dtype, y->dtype);
    assert_int_equal(x->rank, y->rank);
    assert_memory_equal(x->shape, y->shape, sizeof x->shape);
    size_t bytes = (size_t)x->count * sizeof(core_real);
    core_real *left = malloc(bytes), *right = malloc(bytes);
    assert_ok(ckpt_safetensors_read(a, x, 0, x->count, left));
    assert_ok(ckpt_safetensors_read(b, y, 0, y->count, right));
    assert_memory_equal(left, right, bytes); /* widening keeps every bit */
    free(left), free(right);
  }
}

static void expect_round_trip(const char *name, core_dtype dtype) {
  ckpt_safetensors *before = NULL, *after = NULL;
  assert_ok(train_export(control(), in_root("imported/step-00000000"), in_root("exported"), dtype));
  assert_ok(ckpt_safetensors_open(in_folder(name), &before));
  assert_ok(ckpt_safetensors_open(in_root("exported"), &after));
  compare_collections(before, after);
  ckpt_safetensors_close(before);
  ckpt_safetensors_close(after);
}

static char *read_config(const char *folder) {
  char path[300], *yaml = NULL;
  snprintf(path, sizeof path, "%s/config.json", folder);
  assert_ok(train_exchange_read_config(path, &yaml));
  return yaml;
}

/* What is exported says of itself what was imported. */
static void expect_same_config(const char *name) {
  char *before = read_config(in_folder(name)), *after = read_config(in_root("exported"));
  assert_string_equal(before, after);
  free(before), free(after);
}

static void published_weights_go_in_and_out(void **state) {
  for (int i = 0; i < PUBLISHED; i++) {
    assert_ok(import(in_folder(published[i].name)));
    compare_logits(published[i].name);
    expect_round_trip(published[i].name, published[i].dtype);
    expect_same_config(published[i].name);
    assert_error(import(in_folder(published[i].name)), CORE_ERR_ARGUMENT, "is there already");
    assert_error(
        train_export(control(), in_root("imported/step-00000000"), in_root("exported"), CORE_FLOAT32),
        CORE_ERR_ARGUMENT, "exported is there already");
    remove_root(state), make_root(state);
  }
}

/* The file itself and the index serve as well as their folder. */
static void files_and_indexes_are_named(void **state) {
  assert_ok(import(in_folder("llama/model.safetensors")));
  remove_root(state), make_root(state);
  assert_ok(import(in_folder("shards/model.safetensors.index.json")));
}

/* ---- refusals ---- */

/* The tensors of the published llama, to be changed. */
typedef struct copy {
  ckpt_safetensors_source list[64];
  int32_t count;
  core_real *value[64];
} copy;

static copy *take_copy(void) {
  copy *c = calloc(1, sizeof *c);
  ckpt_safetensors *files = NULL;
  assert_ok(ckpt_safetensors_open(in_folder("llama"), &files));
  for (int32_t i = 0; i < ckpt_safetensors_count(files); i++) {
    const ckpt_safetensor *tensor = ckpt_safetensors_at(files, i);
    c->value[i] = malloc((size_t)tensor->count * sizeof(core_real));
    assert_ok(ckpt_safetensors_read(files, tensor, 0, tensor->count, c->value[i]));
    ckpt_safetensors_source *source = &c->list[c->count++];
    snprintf(source->name, sizeof source->name, "%s", tensor->name);
    source->rank = tensor->rank;
    memcpy(source->shape, tensor->shape, sizeof source->shape);
    source->data = c->value[i];
  }
  ckpt_safetensors_close(files);
  return c;
}

static void free_copy(copy *c) {
  for (int i = 0; i < 64; i++) free(c->value[i]);
  free(c);
}

static ckpt_safetensors_source *source_of(copy *c, const char *name) {
  for (int32_t i = 0; i < c->count; i++)
    if (strcmp(c->list[i].name, name) == 0) return &c->list[i];
  fail_msg("there is no %s", name);
  return NULL;
}

/* config.json of the published llama, with one text in place of another. */
static void write_config(const char *from, const char *to) {
  char *json = NULL, changed[4096];
  int64_t length = 0;
  assert_ok(core_file_read_all(in_folder("llama/config.json"), 1 << 20, &json, &length));
  char *at = strstr(json, from);
  assert_non_null(at);
  snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - json), json, to, at + strlen(from));
  assert_ok(core_file_replace(in_root("source/config.json"), changed, strlen(changed)));
  free(json);
}

static void write_source(const copy *c) {
  assert_ok(core_file_make_directories(in_root("source")));
  assert_ok(
      ckpt_safetensors_write(in_root("source/model.safetensors"), c->list, c->count, CORE_FLOAT32, NULL));
  write_config("\"silu\"", "\"silu\"");
}

static void expect_nothing(void) {
  assert_false(core_file_exists(in_root("decoder.yaml")));
  assert_false(core_file_exists(in_root("imported")));
}

static void expect_refused(core_status code, const char *message) {
  assert_error(import(in_root("source")), code, message);
  expect_nothing();
}

static const struct {
  const char *from, *to;
  core_status code;
  const char *message;
} configs[] = {
    {"\"LlamaForCausalLM\"", "\"MistralForCausalLM\"", CORE_ERR_UNSUPPORTED,
     "architecture 'MistralForCausalLM' is not read"},
    {"\"silu\"", "\"gelu\"", CORE_ERR_UNSUPPORTED, "activation 'gelu'"},
    {"\"attention_bias\": false", "\"attention_bias\": true", CORE_ERR_UNSUPPORTED,
     "'attention_bias' is set"},
    {"\"mlp_bias\": false", "\"mlp_bias\": true", CORE_ERR_UNSUPPORTED, "'mlp_bias' is set"},
    {"\"rope_type\": \"llama3\"", "\"rope_type\": \"yarn\"", CORE_ERR_UNSUPPORTED, "scaled by 'yarn'"},
    {"\"vocab_size\": 61", "\"vocabulary\": 61", CORE_ERR_FORMAT, "lacks 'vocab_size'"},
    {"\"vocab_size\": 61", "\"vocab_size\": 61.5", CORE_ERR_FORMAT, "'vocab_size' is 61.5"},
    {"\"vocab_size\": 61", "\"vocab_size\": \"61\"", CORE_ERR_FORMAT, "'vocab_size' is not a number"},
    {"\"vocab_size\": 61", "\"vocab_size\": 62", CORE_ERR_MISMATCH,
     "'model.embed_tokens.weight' is [61, 24] of rank 2, expected [62, 24]"},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", CORE_ERR_MISMATCH,
     "lacks tensor 'model.layers.2.input_layernorm.weight'"},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", CORE_ERR_MISMATCH,
     "is no part of such a decoder"},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000", CORE_ERR_CONFIG, "model.layers"},
    {"\"num_attention_heads\": 4", "\"num_attention_heads\": 0", CORE_ERR_CONFIG, "model.heads"},
    {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", CORE_ERR_MISMATCH,
     "'lm_head.weight' differs"},
    {"\"use_cache\": true", "\"quantization_config\": {\"bits\": 4}", CORE_ERR_UNSUPPORTED, "quantised"},
    {"\"use_cache\": true", "\"layer_types\": [\"sliding_attention\"]", CORE_ERR_UNSUPPORTED,
     "sliding_attention"},
    {"\"head_dim\": 6", "\"head_dim\": 5", CORE_ERR_CONFIG, "even head width"},
    {"{", "[", CORE_ERR_FORMAT, "no JSON object"},
};

static void other_decoders_are_refused(void **state) {
  (void)state;
  copy *c = take_copy();
  write_source(c);
  for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
    write_config(configs[i].from, configs[i].to);
    expect_refused(configs[i].code, configs[i].message);
  }
  assert_int_equal(unlink(in_root("source/config.json")), 0);
  expect_refused(CORE_ERR_NOT_FOUND, "no config.json");
  write_config("\"silu\"", "\"silu\"");
  assert_ok(import(in_root("source"))); /* what the table varies is sound */
  free_copy(c);
}

static void other_tensors_are_refused(void **state) {
  (void)state;
  copy *c = take_copy();
  ckpt_safetensors_source *norm = source_of(c, "model.norm.weight");
  snprintf(norm->name, sizeof norm->name, "model.norm.bias");
  write_source(c);
  expect_refused(CORE_ERR_MISMATCH, "lacks tensor 'model.norm.weight'");
  snprintf(norm->name, sizeof norm->name, "model.norm.weight");
  c->list[c->count] = *norm;
  snprintf(c->list[c->count++].name, sizeof norm->name, "model.extra.weight");
  write_source(c);
  expect_refused(CORE_ERR_MISMATCH, "'model.extra.weight' is no part");
  c->count--;
  ckpt_safetensors_source *down = source_of(c, "model.layers.1.mlp.down_proj.weight");
  down->shape[0] = 40, down->shape[1] = 24; /* as many numbers */
  write_source(c);
  expect_refused(CORE_ERR_MISMATCH,
                 "'model.layers.1.mlp.down_proj.weight' is [40, 24] of rank 2, expected [24, 40]");
  down->shape[0] = 24, down->shape[1] = 40;
  /* frequencies that old files hold are no harm */
  c->list[c->count] = *norm;
  snprintf(c->list[c->count++].name, sizeof norm->name, "model.layers.0.self_attn.rotary_emb.inv_freq");
  write_source(c);
  assert_ok(import(in_root("source")));
  free_copy(c);
}

/* Whichever operation fails: no configuration, and no checkpoint but a whole one. */
static void failures_leave_nothing_half_written(void **state) {
  bool done = false;
  int64_t failed = 0;
  for (int64_t n = 1; !done; n++) {
    core_file_fault fault = {.at = n, .error = 28 /* ENOSPC */, .sticky = 1};
    snprintf(fault.containing, sizeof fault.containing, "%s", root);
    core_file_inject(&fault);
    done = import(in_folder("llama")) == CORE_OK;
    core_file_inject(&(core_file_fault){0});
    failed += !done;
    if (!done) assert_false(core_file_exists(in_root("decoder.yaml")));
    bool published_anyway = !done && core_file_exists(in_root("imported/step-00000000"));
    if (published_anyway) assert_ok(ckpt_verify(in_root("imported/step-00000000"), NULL)); /* the last sync */
    if (!done) remove_root(state), make_root(state);
  }
  assert_true(failed > 10);
  assert_true(core_file_exists(in_root("decoder.yaml")));
  done = false;
  for (int64_t n = 1; !done; n++) {
    core_file_fault fault = {.at = n, .error = 28, .sticky = 1};
    snprintf(fault.containing, sizeof fault.containing, "%s/exported", root);
    core_file_inject(&fault);
    done = train_export(control(), in_root("imported/step-00000000"), in_root("exported"), CORE_FLOAT32) ==
           CORE_OK;
    core_file_inject(&(core_file_fault){0});
    if (!done) assert_false(core_file_exists(in_root("exported")));
    if (!done) assert_false(core_file_exists(in_root("exported.tmp")));
  }
}

/* ---- everything out ---- */

static const char mixture[] =
    "run: {directory: unused, seed: 3, steps: 60, threads: 1, deadline: 60}\n"
    "data: {path: unused, modalities: [{name: image, positions: none, connector: mlp, hidden: 10}]}\n"
    "model: {kind: decoder, vocabulary: 50, width: 16, layers: 2, heads: 4, kv_heads: 2, hidden: 24,\n"
    "        moe: {layers: every 2, experts: 3, choose: 2, hidden: 20, bias: true}}\n"
    "optimizer: {batch: 8}\n";

static int64_t two_rows(int64_t s, int32_t m) {
  return 1 + (s + m) % 2;
}

/* A checkpoint of `t` as step 7. */
static void save(test_session *t) {
  train_state_tensors tensors;
  ckpt_writer *writer = NULL;
  char *json = NULL;
  const ckpt_options options = {.directory = in_root("run")};
  const train_state_meta meta = {.step = 7,
                                 .ranks = 1,
                                 .expert_ranks = 1,
                                 .config = (char *)(uintptr_t)core_config_text(t->session->env.config)};
  assert_ok(train_state_list(t->session->model, NULL, TRAIN_STATE_SAVE, &tensors));
  assert_ok(train_state_meta_write(&meta, &json));
  assert_ok(ckpt_writer_create(control(), &options, tensors.list, tensors.count, &writer));
  assert_ok(ckpt_writer_begin(writer, 7, json));
  assert_ok(ckpt_writer_commit(writer));
  ckpt_writer_destroy(writer);
  train_state_free(&tensors);
  free(json);
}

/* Rows [first, first + rows) of a parameter are the tensor of this name. */
static void expect_rows(const ckpt_safetensors *files, const train_model *model, const char *own,
                        int64_t first, const char *name) {
  const ckpt_safetensor *tensor = ckpt_safetensors_find(files, name);
  const train_parameters *set = &model->parameters;
  if (!tensor) fail_msg("there is no %s", name);
  core_real *value = malloc((size_t)tensor->count * sizeof *value);
  assert_ok(ckpt_safetensors_read(files, tensor, 0, tensor->count, value));
  int32_t p = 0;
  while (p < set->count && strcmp(set->list[p].name, own) != 0) p++;
  assert_true(p < set->count);
  int64_t row = set->list[p].count / set->list[p].shape[0];
  assert_memory_equal(value, set->value + set->list[p].first + first * row,
                      (size_t)tensor->count * sizeof *value);
  free(value);
}

static void experts_and_connectors_go_out(void **state) {
  (void)state;
  test_session t;
  ckpt_safetensors *files = NULL;
  test_set_options o = {.directory = in_root("train"),
                        .modalities = 1,
                        .width = {5},
                        .samples = 8,
                        .shards = 1,
                        .first_id = 1,
                        .rows = two_rows,
                        .vocabulary = 50};
  assert_ok(test_set_write(&o));
  test_session_open(world, mixture, NULL, root, &t);
  save(&t);
  assert_ok(train_export(control(), in_root("run/step-00000007"), in_root("out"), CORE_FLOAT32));
  assert_false(core_file_exists(in_root("out/config.json"))); /* it is neither LLaMA nor Qwen2 */
  assert_true(core_file_exists(in_root("out/config.yaml")));
  assert_ok(ckpt_safetensors_open(in_root("out"), &files));
  const train_model *model = t.session->model;
  static const struct {
    const char *own;
    int64_t first;
    const char *name;
  } list[] = {{"embedding.weight", 0, "model.embed_tokens.weight"},
              {"output.weight", 0, "lm_head.weight"},
              {"final_norm.weight", 0, "model.norm.weight"},
              {"blocks.1.attention.qkv.weight", 0, "model.layers.1.self_attn.q_proj.weight"},
              {"blocks.1.attention.qkv.weight", 16, "model.layers.1.self_attn.k_proj.weight"},
              {"blocks.1.attention.qkv.weight", 24, "model.layers.1.self_attn.v_proj.weight"},
              {"blocks.1.feed_forward.in.weight", 24, "model.layers.1.mlp.up_proj.weight"},
              {"blocks.0.router.weight", 0, "model.layers.0.mlp.gate.weight"},
              {"blocks.0.router.bias", 0, "model.layers.0.mlp.gate.bias"},
              {"blocks.0.experts.2.in.weight", 0, "model.layers.0.mlp.experts.2.gate_proj.weight"},
              {"blocks.0.experts.2.in.weight", 20, "model.layers.0.mlp.experts.2.up_proj.weight"},
              {"blocks.0.experts.1.in.bias", 20, "model.layers.0.mlp.experts.1.up_proj.bias"},
              {"blocks.0.experts.2.out.weight", 0, "model.layers.0.mlp.experts.2.down_proj.weight"},
              {"blocks.0.experts.0.out.bias", 0, "model.layers.0.mlp.experts.0.down_proj.bias"},
              {"connector.image.first.weight", 0, "antiphon.connector.image.first.weight"},
              {"connector.image.second.bias", 0, "antiphon.connector.image.second.bias"}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    expect_rows(files, model, list[i].own, list[i].first, list[i].name);
  assert_non_null(ckpt_safetensors_find(files, "antiphon.latent_scale.image"));
  int64_t numbers = 0, own = 2 * 5; /* standardisation of five features */
  for (int32_t i = 0; i < ckpt_safetensors_count(files); i++) numbers += ckpt_safetensors_at(files, i)->count;
  for (int32_t i = 0; i < model->parameters.count; i++) own += model->parameters.list[i].count;
  assert_int_equal(numbers, own); /* nothing is left out, nothing twice */
  ckpt_safetensors_close(files);
  test_session_close(&t);
}

/* The whole of a file, malloc'ed. */
static char *bytes_of(const char *name, int64_t *count) {
  char *bytes = NULL;
  assert_ok(core_file_read_all(in_root(name), 1 << 24, &bytes, count));
  return bytes;
}

/* A model with experts and connectors, out, in and out again: the same bytes. */
static void exported_models_come_back(void **state) {
  (void)state;
  static const char *const set[] = {
      "data.modalities.image={connector: resampler, hidden: 8, queries: 3, depth: 1}", "model.tied=true",
      "model.moe.added=[1]", "model.moe.calibration=add", NULL};
  test_session t;
  int64_t before = 0, after = 0;
  test_set_options o = {.directory = in_root("train"),
                        .modalities = 1,
                        .width = {5},
                        .samples = 8,
                        .shards = 1,
                        .first_id = 1,
                        .rows = two_rows,
                        .vocabulary = 50};
  assert_ok(test_set_write(&o));
  test_session_open(world, mixture, set, root, &t);
  assert_ok(train_session_standardise(t.session));
  save(&t);
  test_session_close(&t);
  char out[256], again[256], checkpoint[256];
  snprintf(out, sizeof out, "%s", in_root("out"));
  snprintf(again, sizeof again, "%s", in_root("again"));
  snprintf(checkpoint, sizeof checkpoint, "%s", in_root("imported/step-00000000"));
  assert_ok(train_export(control(), in_root("run/step-00000007"), out, CORE_FLOAT32));
  assert_ok(import(out));
  assert_ok(train_export(control(), checkpoint, again, CORE_FLOAT32));
  char *first = bytes_of("out/model.safetensors", &before),
       *second = bytes_of("again/model.safetensors", &after);
  assert_int_equal(before, after);
  assert_memory_equal(first, second, (size_t)before);
  free(first), free(second);
  remove(in_root("out/config.yaml"));
  assert_error(train_import(control(), out, in_root("other.yaml"), in_root("other")), CORE_ERR_NOT_FOUND,
               "no config.yaml lies beside");
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_root, remove_root)
  const struct CMUnitTest tests[] = {TEST(published_weights_go_in_and_out),
                                     TEST(files_and_indexes_are_named),
                                     TEST(other_decoders_are_refused),
                                     TEST(other_tensors_are_refused),
                                     TEST(failures_leave_nothing_half_written),
                                     TEST(experts_and_connectors_go_out),
                                     TEST(exported_models_come_back)};
  comm_options options = {.deadline = 60};
  if (comm_start(&options, &world) != CORE_OK) return 1;
  int failed = cmocka_run_group_tests_name("published weights", tests, NULL, NULL);
  comm_finish(world);
  return failed;
}
