/* Names of parameters and of the published tensors that they consist of: see exchange.h for the table. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/exchange.h"

/* {} stands for the number of the expert. */
typedef struct rule {
  const char *own, *piece[TRAIN_EXCHANGE_PIECES];
} rule;

static const rule block_rules[] = {
    {"attention_norm.weight", {"input_layernorm.weight"}},
    {"attention.qkv.weight",
     {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}},
    {"attention.qkv.bias", {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}},
    {"attention.out.weight", {"self_attn.o_proj.weight"}},
    {"forward_norm.weight", {"post_attention_layernorm.weight"}},
    {"feed_forward.in.weight", {"mlp.gate_proj.weight", "mlp.up_proj.weight"}},
    {"feed_forward.out.weight", {"mlp.down_proj.weight"}},
    {"router.weight", {"mlp.gate.weight"}},
    {"router.bias", {"mlp.gate.bias"}},
};
static const rule expert_rules[] = {
    {"in.weight", {"gate_proj.weight", "up_proj.weight"}},
    {"in.bias", {"gate_proj.bias", "up_proj.bias"}},
    {"out.weight", {"down_proj.weight"}},
    {"out.bias", {"down_proj.bias"}},
};
static const rule top_rules[] = {
    {"embedding.weight", {"model.embed_tokens.weight"}},
    {"final_norm.weight", {"model.norm.weight"}},
    {"output.weight", {"lm_head.weight"}},
};
#define COUNT(list) (sizeof(list) / sizeof *(list))

static const rule *find_rule(const rule *list, size_t count, const char *name) {
  for (size_t i = 0; i < count; i++)
    if (strcmp(list[i].own, name) == 0) return &list[i];
  return NULL;
}

/* Without a gate the first of two pieces is left out. */
static void apply(const train_settings *s, const rule *r, const char *prefix, train_exchange_entry *entry) {
  bool gated = s->model.activation == TRAIN_SWIGLU;
  bool skips = !gated && r->piece[1] && !r->piece[2];
  for (int i = skips ? 1 : 0; i < TRAIN_EXCHANGE_PIECES && r->piece[i]; i++)
    snprintf(entry->piece[entry->pieces++], CKPT_SAFETENSORS_NAME, "%s%s", prefix, r->piece[i]);
}

/* "7.rest" -> 7 and "rest"; -1 when it is not that. */
static int64_t number_before(const char *text, const char **rest) {
  char *end = NULL;
  long number = strtol(text, &end, 10);
  if (end == text || *end != '.' || number < 0) return -1;
  *rest = end + 1;
  return number;
}

static void map_block(const train_settings *s, const char *name, train_exchange_entry *entry) {
  const char *rest = NULL, *inner = NULL;
  char prefix[96];
  int64_t block = number_before(name, &rest);
  if (block < 0) return;
  snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)block);
  const rule *r = find_rule(block_rules, COUNT(block_rules), rest);
  if (r) apply(s, r, prefix, entry);
  if (r || strncmp(rest, "experts.", 8) != 0) return;
  int64_t expert = number_before(rest + 8, &inner);
  r = expert < 0 ? NULL : find_rule(expert_rules, COUNT(expert_rules), inner);
  snprintf(prefix, sizeof prefix, "model.layers.%lld.mlp.experts.%lld.", (long long)block, (long long)expert);
  if (r) apply(s, r, prefix, entry);
}

static int64_t head_width(const train_settings *s) {
  return s->model.head_width ? s->model.head_width : s->model.width / s->model.heads;
}

static int64_t kv_heads(const train_settings *s) {
  return s->model.kv_heads ? s->model.kv_heads : s->model.heads;
}

static void share_rows(const train_settings *s, train_exchange_entry *entry) {
  int64_t rows = entry->rank > 0 ? entry->shape[0] : 1;
  for (int32_t i = 0; i < entry->pieces; i++) entry->rows[i] = rows / entry->pieces;
  if (entry->pieces < 3) return;
  entry->rows[0] = s->model.heads * head_width(s);
  entry->rows[1] = entry->rows[2] = kv_heads(s) * head_width(s);
}

core_status train_exchange_map(const train_settings *s, train_exchange_entry *entry) {
  entry->pieces = 0;
  if (s->model.kind == TRAIN_KIND_DECODER) {
    const rule *top = find_rule(top_rules, COUNT(top_rules), entry->name);
    if (top) apply(s, top, "", entry);
    if (strncmp(entry->name, "blocks.", 7) == 0) map_block(s, entry->name + 7, entry);
  }
  if (entry->pieces == 0)
    snprintf(entry->piece[entry->pieces++], CKPT_SAFETENSORS_NAME, "antiphon.%s", entry->name);
  share_rows(s, entry);
  int64_t rows = 0;
  for (int32_t i = 0; i < entry->pieces; i++) rows += entry->rows[i];
  CHECK(entry->rank == 0 || rows == entry->shape[0], CORE_ERR_MISMATCH,
        "'%s' has %lld rows, its %d parts have %lld", entry->name, (long long)entry->shape[0], entry->pieces,
        (long long)rows);
  return CORE_OK;
}

/* ---- a dense decoder's parameters ---- */

typedef struct listing {
  const train_settings *settings;
  train_exchange_entry *list;
  int32_t count;
} listing;

static core_status add(listing *l, int32_t block, const char *name, int64_t rows, int64_t columns) {
  train_exchange_entry *entry = &l->list[l->count++];
  entry->rank = columns > 0 ? 2 : 1;
  entry->shape[0] = rows;
  entry->shape[1] = columns > 0 ? columns : 1;
  for (int i = 2; i < CORE_MAX_RANK; i++) entry->shape[i] = 1;
  if (block < 0)
    snprintf(entry->name, sizeof entry->name, "%s", name);
  else
    snprintf(entry->name, sizeof entry->name, "blocks.%d.%s", block, name);
  TRY(train_exchange_map(l->settings, entry));
  return CORE_OK;
}

static core_status add_block(listing *l, int32_t block) {
  const train_settings *s = l->settings;
  int64_t C = s->model.width, A = head_width(s), inner = s->model.heads * A;
  int64_t rows = (s->model.heads + 2 * kv_heads(s)) * A, F = s->model.hidden;
  TRY(add(l, block, "attention_norm.weight", C, 0));
  TRY(add(l, block, "attention.qkv.weight", rows, C));
  if (s->model.qkv_bias) TRY(add(l, block, "attention.qkv.bias", rows, 0));
  TRY(add(l, block, "attention.out.weight", C, inner));
  TRY(add(l, block, "forward_norm.weight", C, 0));
  TRY(add(l, block, "feed_forward.in.weight", 2 * F, C));
  TRY(add(l, block, "feed_forward.out.weight", C, F));
  return CORE_OK;
}

static core_status add_all(listing *l) {
  const train_settings *s = l->settings;
  TRY(add(l, -1, "embedding.weight", s->model.vocabulary, s->model.width));
  for (int32_t i = 0; i < (int32_t)s->model.layers; i++) TRY(add_block(l, i));
  TRY(add(l, -1, "final_norm.weight", s->model.width, 0));
  if (!s->model.tied) TRY(add(l, -1, "output.weight", s->model.vocabulary, s->model.width));
  return CORE_OK;
}

core_status train_exchange_list(const train_settings *settings, train_exchange_entry **list, int32_t *count) {
  enum { BLOCK_TENSORS = 7, OTHERS = 3 };
  listing l = {.settings = settings};
  size_t most = (size_t)settings->model.layers * BLOCK_TENSORS + OTHERS;
  l.list = calloc(most, sizeof *l.list);
  *list = NULL;
  CHECK(l.list, CORE_ERR_MEMORY, "no memory for a list of %zu parameters", most);
  core_status status = add_all(&l);
  if (status != CORE_OK) {
    free(l.list);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *list = l.list;
  *count = l.count;
  return CORE_OK;
}
