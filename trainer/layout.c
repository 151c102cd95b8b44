#include "trainer/layout.h"

#include <stdio.h>
#include <string.h>

/* Fewer slots than modalities: each modality whole on one slot, the costliest first onto the least loaded. */
static void pack_modalities(train_layout *layout, const double *cost) {
  double load[1024] = {0};
  bool placed[CORE_MAX_MODALITIES] = {false};
  for (int32_t n = 0; n < layout->modalities; n++) {
    int32_t next = -1, slot = 0;
    for (int32_t m = 0; m < layout->modalities; m++)
      if (!placed[m] && (next < 0 || cost[m] > cost[next])) next = m;
    for (int32_t s = 1; s < layout->expert_ranks; s++)
      if (load[s] < load[slot]) slot = s;
    placed[next] = true;
    load[slot] += cost[next];
    layout->slot_first[next] = slot;
    layout->slot_count[next] = 1;
  }
}

/* As many slots as modalities or more: one each, then each further slot to whoever is slowest. */
static void spread_modalities(train_layout *layout, const double *cost) {
  for (int32_t m = 0; m < layout->modalities; m++) layout->slot_count[m] = 1;
  for (int32_t left = layout->expert_ranks - layout->modalities; left > 0; left--) {
    int32_t slowest = 0;
    for (int32_t m = 1; m < layout->modalities; m++)
      if (cost[m] / layout->slot_count[m] > cost[slowest] / layout->slot_count[slowest]) slowest = m;
    layout->slot_count[slowest]++;
  }
  int32_t first = 0;
  for (int32_t m = 0; m < layout->modalities; first += layout->slot_count[m++]) layout->slot_first[m] = first;
}

static core_status place_by_settings(const core_config *config, train_layout *layout) {
  const train_settings *settings = core_config_data(config);
  int64_t first = 0;
  for (int32_t m = 0; m < layout->modalities; m++) {
    int64_t count = settings->data.modalities[m].ranks;
    if (count == 0)
      return core_config_refuse(config, "data.modalities",
                                "give `ranks` for every modality or for none; '%s' has none",
                                settings->data.modalities[m].name);
    layout->slot_first[m] = (int32_t)(first % layout->expert_ranks);
    layout->slot_count[m] = (int32_t)count;
    first += count;
  }
  if (first != layout->expert_ranks)
    return core_config_refuse(config, "data.modalities",
                              "the `ranks` of all modalities must add up to the %d of an "
                              "expert group, not %lld",
                              layout->expert_ranks, (long long)first);
  return CORE_OK;
}

core_status train_layout_make(const core_config *config, int32_t ranks, int32_t rank, const double *cost,
                              train_layout *out) {
  const train_settings *settings = core_config_data(config);
  memset(out, 0, sizeof *out);
  out->ranks = ranks;
  out->rank = rank;
  out->expert_ranks = (int32_t)settings->parallel.experts;
  out->group = rank / out->expert_ranks;
  out->groups = ranks / out->expert_ranks;
  out->slot = rank % out->expert_ranks;
  out->modalities = (int32_t)settings->data.modalities_count;
  out->batch = settings->optimizer.batch;
  out->micro_batches = settings->optimizer.accumulate;
  out->block = out->batch / (out->micro_batches * out->groups);
  out->partitioned = settings->parallel.placement == TRAIN_PARTITIONED;
  CHECK(out->expert_ranks <= 1024, CORE_ERR_CONFIG, "an expert group of %d ranks; at most 1024",
        out->expert_ranks);
  bool chosen = false;
  for (int32_t m = 0; m < out->modalities; m++) {
    out->slot_count[m] = out->expert_ranks; /* shared */
    if (settings->data.modalities[m].ranks > 0) chosen = true;
  }
  if (!out->partitioned) return CORE_OK;
  if (chosen) {
    TRY(place_by_settings(config, out));
  } else if (out->expert_ranks < out->modalities) {
    pack_modalities(out, cost);
  } else {
    spread_modalities(out, cost);
  }
  return CORE_OK;
}

train_layout train_layout_with_batch(const train_layout *layout, int64_t batch, int64_t micro_batches) {
  train_layout changed = *layout;
  changed.batch = batch;
  changed.micro_batches = micro_batches;
  changed.block = (batch + micro_batches * layout->groups - 1) / (micro_batches * layout->groups);
  return changed;
}

static int64_t at_most(int64_t value, int64_t limit) {
  return value < limit ? value : limit;
}

data_range train_layout_range(const train_layout *layout, int32_t rank, int32_t m, int64_t micro) {
  int32_t group = rank / layout->expert_ranks, place = rank % layout->expert_ranks - layout->slot_first[m];
  int64_t start = (micro * layout->groups + group) * layout->block;
  if (place < 0 || place >= layout->slot_count[m]) {
    int64_t nowhere = at_most(start, layout->batch);
    return (data_range){nowhere, nowhere};
  }
  int64_t lo = start + layout->block * place / layout->slot_count[m];
  int64_t hi = start + layout->block * (place + 1) / layout->slot_count[m];
  return (data_range){at_most(lo, layout->batch), at_most(hi, layout->batch)};
}

int64_t train_layout_most_samples(const train_layout *layout, int32_t rank, int32_t m) {
  int64_t most = 0;
  for (int64_t micro = 0; micro < layout->micro_batches; micro++) {
    data_range range = train_layout_range(layout, rank, m, micro);
    if (range.hi - range.lo > most) most = range.hi - range.lo;
  }
  return most;
}

bool train_layout_holds(const train_layout *layout, int32_t rank, int32_t m) {
  int32_t place = rank % layout->expert_ranks - layout->slot_first[m];
  return place >= 0 && place < layout->slot_count[m];
}

void train_layout_describe(const train_layout *layout, const train_settings *settings, char *out,
                           int64_t capacity) {
  int used = snprintf(out, (size_t)capacity, "%d rank%s, %d expert group%s of %d, %s", layout->ranks,
                      layout->ranks == 1 ? "" : "s", layout->groups, layout->groups == 1 ? "" : "s",
                      layout->expert_ranks, layout->partitioned ? "partitioned:" : "shared");
  for (int32_t m = 0; layout->partitioned && m < layout->modalities && used < capacity; m++) {
    int32_t first = layout->slot_first[m], last = first + layout->slot_count[m] - 1;
    const char *name = settings->data.modalities[m].name;
    used += first == last ? snprintf(out + used, (size_t)(capacity - used), "%s %s on slot %d", m ? "," : "",
                                     name, first)
                          : snprintf(out + used, (size_t)(capacity - used), "%s %s on slots %d-%d",
                                     m ? "," : "", name, first, last);
  }
}
