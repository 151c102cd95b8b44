/* config.json of LLaMA and Qwen2 decoders, and the settings that say the same. What a field could change
 * about the mathematics is read or refused; the rest of the file (token numbers, versions) is left alone. */
#include <cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "trainer/exchange.h"

enum { MOST_JSON = 16 << 20 };

typedef struct source {
  const char *path;
  const cJSON *root;
} source;

typedef struct decoder {
  bool qwen;
  int64_t vocabulary, width, layers, heads, kv_heads, head_width, hidden;
  double epsilon, rope_base;
  const char *scaling;
  double factor, low, high;
  int64_t length;
  bool tied;
} decoder;

/* ---- fields ---- */

static const cJSON *field(const source *s, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(s->root, name);
  return cJSON_IsNull(item) ? NULL : item;
}

static core_status take_number(const source *s, const cJSON *item, const char *name, double *out) {
  CHECK(cJSON_IsNumber(item) && isfinite(item->valuedouble), CORE_ERR_FORMAT, "%s: '%s' is not a number",
        s->path, name);
  *out = item->valuedouble;
  return CORE_OK;
}

/* otherwise < 0: the field must be there. */
static core_status take_whole(const source *s, const char *name, int64_t otherwise, int64_t *out) {
  const cJSON *item = field(s, name);
  double value = (double)otherwise;
  CHECK(item || otherwise >= 0, CORE_ERR_FORMAT, "%s: lacks '%s'", s->path, name);
  if (item) TRY(take_number(s, item, name, &value));
  CHECK(value >= 0 && value < 1e15 && value == floor(value), CORE_ERR_FORMAT,
        "%s: '%s' is %g, expected a whole number", s->path, name, value);
  *out = (int64_t)value;
  return CORE_OK;
}

static core_status take_real(const source *s, const cJSON *object, const char *name, double otherwise,
                             double *out) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
  *out = otherwise;
  if (item && !cJSON_IsNull(item)) TRY(take_number(s, item, name, out));
  return CORE_OK;
}

/* A switch that would change the model in a way that is not read. */
static core_status refuse_true(const source *s, const char *name) {
  CHECK(!field(s, name) || cJSON_IsFalse(field(s, name)), CORE_ERR_UNSUPPORTED,
        "%s: '%s' is set; decoders with it are not read", s->path, name);
  return CORE_OK;
}

/* ---- reading ---- */

static core_status take_architecture(const source *s, decoder *out) {
  const cJSON *list = field(s, "architectures");
  const char *name = cJSON_GetStringValue(cJSON_GetArrayItem(list, 0));
  const char *kind = cJSON_GetStringValue(field(s, "model_type"));
  CHECK(name || kind, CORE_ERR_FORMAT, "%s: it says no architecture", s->path);
  bool llama = name ? strcmp(name, "LlamaForCausalLM") == 0 : strcmp(kind, "llama") == 0;
  out->qwen = name ? strcmp(name, "Qwen2ForCausalLM") == 0 : strcmp(kind, "qwen2") == 0;
  CHECK(llama || out->qwen, CORE_ERR_UNSUPPORTED,
        "%s: architecture '%.64s' is not read; LlamaForCausalLM and Qwen2ForCausalLM are", s->path,
        name ? name : kind);
  return CORE_OK;
}

static core_status take_sizes(const source *s, decoder *out) {
  TRY(take_whole(s, "vocab_size", -1, &out->vocabulary));
  TRY(take_whole(s, "hidden_size", -1, &out->width));
  TRY(take_whole(s, "num_hidden_layers", -1, &out->layers));
  TRY(take_whole(s, "num_attention_heads", -1, &out->heads));
  TRY(take_whole(s, "num_key_value_heads", out->heads, &out->kv_heads));
  TRY(take_whole(s, "head_dim", 0, &out->head_width));
  TRY(take_whole(s, "intermediate_size", -1, &out->hidden));
  TRY(take_real(s, s->root, "rms_norm_eps", 1e-6, &out->epsilon));
  out->tied = cJSON_IsTrue(field(s, "tie_word_embeddings"));
  CHECK(out->hidden > 0, CORE_ERR_FORMAT, "%s: 'intermediate_size' is 0", s->path);
  return CORE_OK;
}

/* Since transformers 5 everything about positions lies in rope_parameters, before in rope_theta and
 * rope_scaling. */
static core_status take_positions(const source *s, decoder *out) {
  const cJSON *rope = field(s, "rope_parameters") ? field(s, "rope_parameters") : field(s, "rope_scaling");
  const cJSON *type = cJSON_GetObjectItemCaseSensitive(rope, "rope_type");
  double base = 10000, length = 0;
  if (!type) type = cJSON_GetObjectItemCaseSensitive(rope, "type");
  CHECK(!rope || cJSON_IsObject(rope), CORE_ERR_FORMAT, "%s: its scaling of positions is no object", s->path);
  const char *name = type ? cJSON_GetStringValue(type) : "default";
  TRY(take_real(s, s->root, "rope_theta", 10000, &base));
  TRY(take_real(s, rope, "rope_theta", base, &out->rope_base));
  TRY(take_real(s, rope, "factor", 1, &out->factor));
  TRY(take_real(s, rope, "low_freq_factor", 1, &out->low));
  TRY(take_real(s, rope, "high_freq_factor", 4, &out->high));
  TRY(take_real(s, rope, "original_max_position_embeddings", 8192, &length));
  double turned = 1;
  TRY(take_real(s, rope, "partial_rotary_factor", 1, &turned));
  CHECK(length >= 1 && length < 1e15 && turned == 1, CORE_ERR_UNSUPPORTED,
        "%s: positions of length %g, of which a share %g is rotated", s->path, length, turned);
  out->length = (int64_t)length;
  bool known =
      name && (strcmp(name, "default") == 0 || strcmp(name, "linear") == 0 || strcmp(name, "llama3") == 0);
  CHECK(known, CORE_ERR_UNSUPPORTED,
        "%s: positions are scaled by '%.32s'; default, linear and llama3 are read", s->path,
        name ? name : "?");
  out->scaling = strcmp(name, "default") == 0 ? "none" : name;
  return CORE_OK;
}

static core_status check_rest(const source *s) {
  const cJSON *kind = NULL;
  const char *activation = cJSON_GetStringValue(field(s, "hidden_act"));
  static const char *const switches[] = {"attention_bias", "mlp_bias", "use_sliding_window"};
  CHECK(!field(s, "hidden_act") || (activation && strcmp(activation, "silu") == 0), CORE_ERR_UNSUPPORTED,
        "%s: activation '%.32s' is not read; silu is", s->path, activation ? activation : "?");
  CHECK(!field(s, "quantization_config"), CORE_ERR_UNSUPPORTED, "%s: its weights are quantised", s->path);
  for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) TRY(refuse_true(s, switches[i]));
  cJSON_ArrayForEach(kind, field(s, "layer_types")) {
    const char *name = cJSON_GetStringValue(kind);
    CHECK(name && strcmp(name, "full_attention") == 0, CORE_ERR_UNSUPPORTED,
          "%s: a layer of '%.32s'; full_attention is read", s->path, name ? name : "?");
  }
  return CORE_OK;
}

static core_status write_yaml(const source *s, const decoder *d, char **yaml) {
  enum { ROOM = 4096 };
  char *text = malloc(ROOM);
  CHECK(text, CORE_ERR_MEMORY, "no memory for a configuration");
  int length = snprintf(
      text, ROOM,
      "# A %s decoder. Name the shards and their modalities in data, then begin with its weights:\n"
      "#   antiphon train THIS-FILE --from CHECKPOINT\n"
      "data:\n  path: data\n  modalities: [{name: image, positions: none}]\n"
      "model:\n  kind: decoder\n  vocabulary: %lld\n  width: %lld\n  layers: %lld\n  heads: %lld\n"
      "  kv_heads: %lld\n  head_width: %lld\n  hidden: %lld\n  activation: swiglu\n  norm_epsilon: %.17g\n"
      "  rope_base: %.17g\n"
      "  rope_scaling: {kind: %s, factor: %.17g, low: %.17g, high: %.17g, length: %lld}\n"
      "  tied: %s\n  qkv_bias: %s\n  moe: {layers: none}\n"
      "objective: {importance: 0, load: 0, z: 0}\n",
      d->qwen ? "Qwen2" : "LLaMA", (long long)d->vocabulary, (long long)d->width, (long long)d->layers,
      (long long)d->heads, (long long)d->kv_heads, (long long)d->head_width, (long long)d->hidden, d->epsilon,
      d->rope_base, d->scaling, d->factor, d->low, d->high, (long long)d->length, d->tied ? "true" : "false",
      d->qwen ? "true" : "false");
  *yaml = text;
  CHECK(length < ROOM, CORE_ERR_INTERNAL, "%s makes a configuration of %d bytes", s->path, length);
  return CORE_OK;
}

static core_status read_root(const source *s, char **yaml) {
  decoder d = {0};
  CHECK(cJSON_IsObject(s->root), CORE_ERR_FORMAT, "%s: it is no JSON object", s->path);
  TRY(take_architecture(s, &d));
  TRY(take_sizes(s, &d));
  TRY(take_positions(s, &d));
  TRY(check_rest(s));
  TRY(write_yaml(s, &d, yaml));
  return CORE_OK;
}

core_status train_exchange_read_config(const char *path, char **yaml) {
  char *text = NULL;
  int64_t length = 0;
  *yaml = NULL;
  TRY(core_file_read_all(path, MOST_JSON, &text, &length));
  cJSON *root = cJSON_ParseWithLength(text, (size_t)length);
  source s = {path, root};
  core_status status = read_root(&s, yaml);
  cJSON_Delete(root);
  free(text);
  if (status != CORE_OK) {
    free(*yaml);
    *yaml = NULL;
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

/* ---- writing ---- */

static bool is_plain_decoder(const train_settings *s) {
  bool mixture = false;
  for (int64_t l = 0; l < s->model.layers; l++)
    mixture = mixture || train_settings_moe_layer(s->model.moe.layers, s->model.layers, l);
  return s->model.kind == TRAIN_KIND_DECODER && s->model.activation == TRAIN_SWIGLU && s->model.hidden > 0 &&
         (!mixture || s->model.dense);
}

static void add_positions(const train_settings *s, cJSON *root) {
  static const char *const names[] = {"default", "linear", "llama3"};
  cJSON_AddNumberToObject(root, "rope_theta", s->model.rope_base);
  if (s->model.rope_scaling.kind == TRAIN_ROPE_PLAIN) return;
  cJSON *rope = cJSON_AddObjectToObject(root, "rope_scaling");
  cJSON_AddStringToObject(rope, "rope_type", names[s->model.rope_scaling.kind]);
  cJSON_AddNumberToObject(rope, "factor", s->model.rope_scaling.factor);
  if (s->model.rope_scaling.kind != TRAIN_ROPE_LLAMA3) return;
  cJSON_AddNumberToObject(rope, "low_freq_factor", s->model.rope_scaling.low);
  cJSON_AddNumberToObject(rope, "high_freq_factor", s->model.rope_scaling.high);
  cJSON_AddNumberToObject(rope, "original_max_position_embeddings", (double)s->model.rope_scaling.length);
}

core_status train_exchange_write_config(const train_settings *s, core_dtype dtype, char **json) {
  *json = NULL;
  if (!is_plain_decoder(s)) return CORE_OK;
  const struct {
    const char *name;
    int64_t value;
  } sizes[] = {{"vocab_size", s->model.vocabulary},
               {"hidden_size", s->model.width},
               {"num_hidden_layers", s->model.layers},
               {"num_attention_heads", s->model.heads},
               {"num_key_value_heads", s->model.kv_heads ? s->model.kv_heads : s->model.heads},
               {"head_dim", s->model.head_width ? s->model.head_width : s->model.width / s->model.heads},
               {"intermediate_size", s->model.hidden}};
  cJSON *root = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(root, "architectures");
  bool qwen = s->model.qkv_bias;
  cJSON_AddItemToArray(list, cJSON_CreateString(qwen ? "Qwen2ForCausalLM" : "LlamaForCausalLM"));
  cJSON_AddStringToObject(root, "model_type", qwen ? "qwen2" : "llama");
  cJSON_AddStringToObject(root, "torch_dtype", core_dtype_text(dtype));
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    cJSON_AddNumberToObject(root, sizes[i].name, (double)sizes[i].value);
  cJSON_AddStringToObject(root, "hidden_act", "silu");
  cJSON_AddNumberToObject(root, "rms_norm_eps", s->model.norm_epsilon);
  cJSON_AddBoolToObject(root, "tie_word_embeddings", s->model.tied);
  add_positions(s, root);
  *json = cJSON_Print(root);
  cJSON_Delete(root);
  CHECK(*json, CORE_ERR_MEMORY, "no memory for config.json");
  return CORE_OK;
}
