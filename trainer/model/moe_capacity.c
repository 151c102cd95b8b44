/* Capacity (METHODS section 1): per routing group of `group_samples` consecutive samples with S tokens each
 * expert keeps at most ceil(S K C / E) choices, in thousandths to stay exact; E counts all of a layer,
 * whatever a partition leaves of them to a token. An evaluation drops nothing unless evaluate.capacity says
 * so. Buffers are filled by first choices before second, and within a choice by the largest gate, descending,
 * ties by the lower token (Batch Priority Routing, Riquelme et al. 2021), or by token order alone.
 *
 * The order of tokens is sample, modality, position. When modalities are partitioned, a group's tokens lie on
 * several ranks of the expert group; all gather all records and each decides for the whole group, alike. The
 * host decides: on a device it costs a second synchronisation of the layer. */
#include <string.h>

#include "core/clock.h"
#include "trainer/model/tower.h"

/* One token's claim. */
typedef struct train_capacity_record {
  uint64_t key;       /* global place: sample, modality, position in order */
  core_real priority; /* its largest gate probability */
  int32_t row;        /* at its rank */
  int32_t slot;       /* of the rank */
  int32_t choice[CORE_MAX_CHOICES];
} train_capacity_record;

int64_t train_capacity_factor(const train_settings *settings, int mode) {
  const char *factor = settings->model.moe.capacity;
  if (mode == TRAIN_MODE_EVALUATE) return train_settings_thousandths(settings->evaluate.capacity);
  return settings->model.moe.dispatch == TRAIN_CAPACITY ? train_settings_thousandths(factor) : -1;
}

bool train_capacity_planned(const train_settings *settings, bool training) {
  return train_capacity_factor(settings, TRAIN_MODE_EVALUATE) > 0 ||
         (training && train_capacity_factor(settings, TRAIN_MODE_TRAIN) > 0);
}

core_status train_capacity_plan(train_model *model, const train_arenas *arenas) {
  train_moe_scratch *s = &model->moe_scratch;
  core_arena *arena = arenas->host;
  const train_settings *settings = model->env->settings;
  bool needed = train_capacity_planned(settings, model->limits.training);
  int64_t own = needed ? model->T : 0, all = needed ? model->limits.group_tokens : 0;
  TRY(core_arena_take(arena, own, sizeof(train_capacity_record), (void **)&s->own));
  TRY(core_arena_take(arena, all, sizeof(train_capacity_record), (void **)&s->all));
  TRY(ARENA_TAKE(arena, all, &s->order));
  TRY(ARENA_TAKE(arena, all, &s->ranked));
  TRY(ARENA_TAKE(arena, all, &s->spare));
  int64_t E = train_settings_most_experts(settings), K = settings->model.moe.choose;
  TRY(ARENA_TAKE(arena, needed ? E : 0, &s->used));
  if (arenas->host_access) return CORE_OK;
  TRY(ARENA_TAKE(arena, own * E, &s->host_prob));
  TRY(ARENA_TAKE(arena, own * K, &s->host_choice));
  TRY(ARENA_TAKE(arena, own * K, &s->host_keep));
  return CORE_OK;
}

/* The first `tokens` rows where the host can read them: in place, or brought to `scratch`. */
static core_status on_host(const train_env *env, core_tensor tensor, int64_t tokens, void *scratch,
                           const void **out) {
  core_tensor rows = train_rows(tensor, tokens);
  *out = scratch ? scratch : tensor.data;
  if (scratch) TRY(env->ops->device->copy(scratch, tensor.data, core_tensor_bytes(&rows), NULL));
  return CORE_OK;
}

static core_status make_records(const train_model *model, const train_moe *moe) {
  const train_items *items = &model->items;
  const train_moe_scratch *s = &model->moe_scratch;
  const uint64_t *key = items->key.host;
  const core_real *prob = NULL;
  const int32_t *choice = NULL;
  int64_t K = moe->choice.shape[1], E = moe->prob.shape[1];
  if (items->tokens == 0) return CORE_OK;
  TRY(on_host(model->env, moe->noise ? moe->noisy_prob : moe->prob, items->tokens, s->host_prob,
              (const void **)&prob));
  TRY(on_host(model->env, moe->choice, items->tokens, s->host_choice, (const void **)&choice));
  for (int64_t t = 0; t < items->tokens; t++) {
    train_capacity_record *record = &model->moe_scratch.own[t];
    memset(record, 0, sizeof *record);
    record->key = key[t];
    record->priority = prob[t * E + choice[t * K]];
    record->row = (int32_t)t;
    record->slot = model->env->layout.slot;
    memcpy(record->choice, choice + t * K, (size_t)K * sizeof *choice);
  }
  return CORE_OK;
}

/* Every record that this rank's groups may contain, in `all`; *count of them. */
static core_status gather_records(train_model *model, int64_t *count) {
  train_env *env = model->env;
  train_moe_scratch *s = &model->moe_scratch;
  int64_t own = model->items.tokens, bytes[1024], each[1024], total = 0;
  if (!env->layout.partitioned || env->layout.expert_ranks == 1) {
    memcpy(s->all, s->own, (size_t)own * sizeof *s->own);
    *count = own;
    return CORE_OK;
  }
  double start = core_clock_now();
  for (int32_t r = 0; r < env->layout.expert_ranks; r++) each[r] = sizeof own;
  TRY(comm_all_gather(env->expert, &own, each, bytes));
  for (int32_t r = 0; r < env->layout.expert_ranks; r++) {
    total += bytes[r];
    bytes[r] *= (int64_t)sizeof *s->own;
  }
  CHECK(total <= model->limits.group_tokens, CORE_ERR_INTERNAL,
        "%lld tokens in an expert group; %lld were planned", (long long)total,
        (long long)model->limits.group_tokens);
  TRY(comm_all_gather(env->expert, s->own, bytes, s->all));
  env->seconds[TRAIN_PHASE_EXCHANGE] += core_clock_now() - start;
  *count = total;
  return CORE_OK;
}

static bool before_by_key(const train_capacity_record *a, const train_capacity_record *b) {
  return a->key < b->key;
}

static bool before_by_priority(const train_capacity_record *a, const train_capacity_record *b) {
  if (a->priority != b->priority) return a->priority > b->priority;
  return a->key < b->key;
}

/* Bottom-up merge sort of indices: no allocation, stable. */
static void sort_indices(const train_capacity_record *record, int32_t *index, int32_t *spare, int64_t n,
                         bool (*before)(const train_capacity_record *, const train_capacity_record *)) {
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t lo = 0; lo < n; lo += 2 * width) {
      int64_t mid = lo + width < n ? lo + width : n, hi = lo + 2 * width < n ? lo + 2 * width : n, a = lo,
              b = mid;
      for (int64_t i = lo; i < hi; i++) {
        bool second = a >= mid || (b < hi && before(&record[index[b]], &record[index[a]]));
        spare[i] = second ? index[b++] : index[a++];
      }
    }
    memcpy(index, spare, (size_t)n * sizeof *index);
  }
}

/* Decides for one group: order[first, last) names its records by token order. */
static void fill_group(train_model *model, train_moe *moe, int64_t first, int64_t last) {
  const train_settings *settings = model->env->settings;
  train_moe_scratch *s = &model->moe_scratch;
  int64_t E = moe->experts, K = settings->model.moe.choose, n = last - first;
  int64_t capacity = (n * K * moe->capacity + 1000 * E - 1) / (1000 * E);
  uint8_t *keep = s->host_keep ? s->host_keep : moe->keep.data;
  memcpy(s->ranked, s->order + first, (size_t)n * sizeof *s->order);
  if (settings->model.moe.priority == TRAIN_PRIORITY_GATE)
    sort_indices(s->all, s->ranked, s->spare, n, before_by_priority);
  memset(s->used, 0, (size_t)E * sizeof *s->used);
  for (int64_t k = 0; k < K; k++)
    for (int64_t i = 0; i < n; i++) {
      const train_capacity_record *record = &s->all[s->ranked[i]];
      bool kept = s->used[record->choice[k]] < capacity;
      s->used[record->choice[k]] += kept;
      if (record->slot == model->env->layout.slot) keep[record->row * K + k] = kept;
    }
}

core_status train_capacity_keep(train_model *model, train_moe *moe) {
  train_moe_scratch *s = &model->moe_scratch;
  const train_env *env = model->env;
  int64_t count = 0, first = 0;
  uint64_t samples = (uint64_t)env->settings->model.moe.group_samples * (uint64_t)env->layout.modalities;
  TRY(make_records(model, moe));
  TRY(gather_records(model, &count));
  for (int64_t i = 0; i < count; i++) s->order[i] = (int32_t)i;
  sort_indices(s->all, s->order, s->spare, count, before_by_key);
  for (int64_t i = 0; i < count; i++) {
    uint64_t group = (s->all[s->order[i]].key >> 24) / samples;
    bool ends = i + 1 == count || (s->all[s->order[i + 1]].key >> 24) / samples != group;
    if (!ends) continue;
    fill_group(model, moe, first, i + 1);
    first = i + 1;
  }
  core_tensor rows = train_rows(moe->keep, model->items.tokens);
  if (s->host_keep && rows.shape[0] > 0)
    TRY(env->ops->device->copy(moe->keep.data, s->host_keep, core_tensor_bytes(&rows), NULL));
  return CORE_OK;
}
