/* Outline: the tokens of each shard, from whichever modalities carry them, compared; all of them in two long
 * arrays in file order; what they may be; runs of their lengths. */
#include <stdlib.h>
#include <string.h>

#include "core/random.h" /* core_hash */
#include "data/memory_impl.h"
#include "data/pack_impl.h"

enum { KINDS = 2 };
static const char *const kind_names[KINDS] = {"prompt", "target"};

void data_text_free_priv(data_text *text) {
  if (text == NULL) return;
  for (int kind = 0; kind < KINDS; ++kind) {
    free(text->token[kind]);
    free(text->offset[kind]);
  }
  for (int kind = 0; kind <= KINDS; ++kind) free(text->run[kind]);
  free(text);
}

/* ---- a shard ---- */

/* One kind of a shard's tokens, as a modality's file has them. */
typedef struct list {
  const char *path; /* NULL: not found yet */
  int32_t *token;
  int64_t *offset;
} list;

static core_status compare_lists(const list *first, const list *other, int kind, int64_t samples) {
  CHECK(memcmp(first->offset, other->offset, (size_t)(samples + 1) * sizeof *first->offset) == 0 &&
            memcmp(first->token, other->token, (size_t)first->offset[samples] * sizeof *first->token) == 0,
        CORE_ERR_MISMATCH, "%s and %s hold different \"%s_token\" for the same samples", first->path,
        other->path, kind_names[kind]);
  return CORE_OK;
}

/* Takes over the tokens where they are the first of their kind. */
static core_status merge(data_extras *extras, const char *path, int64_t samples, list out[KINDS]) {
  int32_t **token[KINDS] = {&extras->prompt, &extras->target};
  int64_t **offset[KINDS] = {&extras->prompt_offset, &extras->target_offset};
  const bool given[KINDS] = {extras->prompted, extras->targeted};
  for (int kind = 0; kind < KINDS; ++kind) {
    const list mine = {path, *token[kind], *offset[kind]};
    if (!given[kind]) continue;
    if (out[kind].path != NULL) {
      TRY(compare_lists(&out[kind], &mine, kind, samples));
      continue;
    }
    out[kind] = mine;
    *token[kind] = NULL;
    *offset[kind] = NULL;
  }
  return CORE_OK;
}

static core_status read_shard(const data_set *set, int32_t k, list out[KINDS]) {
  for (int32_t m = 0; m < set->modalities; ++m) {
    const data_column *column = data_set_column_priv(set, m, k);
    data_extras extras;
    TRY(data_tokens_read_priv(column, &extras));
    const core_status status = merge(&extras, column->path, column->samples, out);
    data_extras_release_priv(&extras);
    TRY(status);
  }
  return CORE_OK;
}

/* ---- what tokens may be ---- */

/* Where a sample lies, for messages. */
typedef struct place {
  const char *path;
  int64_t sample; /* of the shard */
} place;

/* The token of a mark as it is kept; 0: no mark that may be here. */
static int32_t own_mark(int32_t token, int32_t modalities, const data_text_options *options) {
  for (int32_t m = 0; m < modalities; ++m)
    if (token == -1 - (options->mark != NULL ? options->mark[m] : m)) return -1 - m;
  return token >= -options->marks ? DATA_MARK_NOBODY : 0;
}

/* Marks become those of the set. */
static core_status check_prompt(const place *at, int32_t *token, int64_t count, int32_t modalities,
                                const data_text_options *options) {
  uint32_t marked = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t mark = token[i] < 0 ? own_mark(token[i], modalities, options) : 0;
    CHECK(token[i] < options->vocabulary && (token[i] >= 0 || mark < 0), CORE_ERR_CORRUPT,
          "%s: prompt token %d of sample %lld is neither in a vocabulary of %lld nor the mark of one of %d "
          "modalities",
          at->path, token[i], (long long)at->sample, (long long)options->vocabulary, modalities);
    if (token[i] >= 0) continue;
    const uint32_t bit = 1u << (-1 - token[i]);
    CHECK(!(marked & bit), CORE_ERR_CORRUPT, "%s: the prompt of sample %lld marks the place %d twice",
          at->path, (long long)at->sample, token[i]);
    marked |= bit;
    token[i] = mark;
  }
  return CORE_OK;
}

static core_status check_target(const place *at, const int32_t *token, int64_t count,
                                const data_text_options *options) {
  CHECK(count > 0 || !options->responses, CORE_ERR_FORMAT, "%s: sample %lld has no response", at->path,
        (long long)at->sample);
  for (int64_t i = 0; i < count; ++i)
    CHECK(token[i] >= 0 && token[i] < options->vocabulary, CORE_ERR_CORRUPT,
          "%s: target token %d of sample %lld is not in a vocabulary of %lld", at->path, token[i],
          (long long)at->sample, (long long)options->vocabulary);
  return CORE_OK;
}

static core_status check_list(const list *tokens, int kind, int64_t samples, int32_t modalities,
                              const data_text_options *options) {
  for (int64_t i = 0; i < samples; ++i) {
    const place at = {tokens->path, i};
    int32_t *token = tokens->token + tokens->offset[i];
    const int64_t count = tokens->offset[i + 1] - tokens->offset[i];
    if (kind == DATA_TEXT_PROMPT)
      TRY(check_prompt(&at, token, count, modalities, options));
    else
      TRY(check_target(&at, token, count, options));
  }
  return CORE_OK;
}

/* ---- the set ---- */

/* Appends a shard's tokens of one kind; without any, its samples have none. */
static core_status append(data_set *set, int32_t k, int kind, const list *tokens) {
  data_text *text = set->text;
  const int64_t base = set->sample_base[k], samples = set->sample_base[k + 1] - base;
  int64_t *offset = text->offset[kind] + base;
  const int64_t before = offset[0], count = tokens->path != NULL ? tokens->offset[samples] : 0;
  int32_t *grown = realloc(text->token[kind], (size_t)(before + count + 1) * sizeof *grown);
  if (grown != NULL) text->token[kind] = grown;
  CHECK(grown != NULL, CORE_ERR_MEMORY, "no memory for %lld tokens", (long long)(before + count));
  if (count > 0) memcpy(grown + before, tokens->token, (size_t)count * sizeof *grown);
  for (int64_t i = 1; i <= samples; ++i) offset[i] = before + (tokens->path != NULL ? tokens->offset[i] : 0);
  return CORE_OK;
}

static core_status take_shard(data_set *set, int32_t k, const data_text_options *options,
                              list tokens[KINDS]) {
  const int64_t samples = set->sample_base[k + 1] - set->sample_base[k];
  TRY(read_shard(set, k, tokens));
  CHECK(tokens[DATA_TEXT_TARGET].path != NULL || !options->responses, CORE_ERR_FORMAT,
        "%s: neither it nor the shards beside it hold \"target_token\", the responses",
        data_set_column_priv(set, 0, k)->path);
  for (int kind = 0; kind < KINDS; ++kind) {
    if (tokens[kind].path != NULL) TRY(check_list(&tokens[kind], kind, samples, set->modalities, options));
    TRY(append(set, k, kind, &tokens[kind]));
  }
  return CORE_OK;
}

static core_status measure_lengths(data_set *set) {
  data_text *text = set->text;
  uint64_t *length = NULL;
  core_status status = CORE_OK;
  TRY(DATA_ALLOCATE(set->samples, "lengths", &length));
  for (int kind = 0; kind <= KINDS && status == CORE_OK; ++kind) {
    for (int64_t i = 0; i < set->samples; ++i) {
      length[i] = 0;
      for (int one = 0; one < KINDS; ++one)
        if (kind == one || kind == DATA_TEXT_BOTH)
          length[i] += (uint64_t)(text->offset[one][i + 1] - text->offset[one][i]);
    }
    status = data_runs_make_priv(length, set->samples, &text->run[kind], &text->runs[kind]);
  }
  free(length);
  TRY(status);
  return CORE_OK;
}

/* Tokens decide what is learned as much as latents do. */
static void seal(data_set *set) {
  const data_text *text = set->text;
  for (int kind = 0; kind < KINDS; ++kind) {
    const int64_t *offset = text->offset[kind];
    set->fingerprint = core_hash(offset, (size_t)(set->samples + 1) * sizeof *offset, set->fingerprint);
    set->fingerprint =
        core_hash(text->token[kind], (size_t)offset[set->samples] * sizeof(int32_t), set->fingerprint);
  }
}

static core_status take_all(data_set *set, const data_text_options *options) {
  for (int kind = 0; kind < KINDS; ++kind)
    TRY(DATA_ALLOCATE(set->samples + 1, "offsets of tokens", &set->text->offset[kind]));
  for (int32_t k = 0; k < set->shards; ++k) {
    list tokens[KINDS] = {{NULL, NULL, NULL}, {NULL, NULL, NULL}};
    const core_status status = take_shard(set, k, options, tokens);
    for (int kind = 0; kind < KINDS; ++kind) {
      free(tokens[kind].token);
      free(tokens[kind].offset);
    }
    TRY(status);
  }
  TRY(measure_lengths(set));
  return CORE_OK;
}

core_status data_set_take_text(data_set *set, const data_text_options *options) {
  CHECK(set->text == NULL, CORE_ERR_ARGUMENT, "the tokens of the set are taken already");
  for (int32_t m = 0; m < set->modalities && options->mark != NULL; ++m)
    CHECK(options->mark[m] >= 0 && options->mark[m] < CORE_MAX_MODALITIES, CORE_ERR_ARGUMENT,
          "modality %s has the mark %d, expected 0 to %d", set->info[m].name, options->mark[m],
          CORE_MAX_MODALITIES - 1);
  TRY(DATA_ALLOCATE(1, "tokens", &set->text));
  const core_status status = take_all(set, options);
  if (status != CORE_OK) {
    data_text_free_priv(set->text);
    set->text = NULL;
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  seal(set);
  return CORE_OK;
}

int64_t data_set_most_text(const data_set *set, data_text_kind kind, int64_t samples) {
  return data_runs_most_priv(set, set->text->run[kind], set->text->runs[kind], samples);
}

int64_t data_set_text_tokens(const data_set *set, data_text_kind kind) {
  int64_t tokens = 0;
  for (int one = 0; one < KINDS; ++one)
    if (kind == (data_text_kind)one || kind == DATA_TEXT_BOTH) tokens += set->text->offset[one][set->samples];
  return tokens;
}

int64_t data_set_longest_text(const data_set *set, data_text_kind kind) {
  return set->text->runs[kind] > 0 ? set->text->run[kind][0].rows : 0;
}
