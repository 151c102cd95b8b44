#include "trainer/lora_merge.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "trainer/model/lora.h"

static const char parameter[] = "parameter/";

static bool ends(const char *name, const char *suffix) {
  size_t length = strlen(name), tail = strlen(suffix);
  return length > tail && strcmp(name + length - tail, suffix) == 0;
}

bool train_lora_is_adapter(const char *name) {
  return ends(name, ".lora_a.weight") || ends(name, ".lora_b.weight");
}

bool train_lora_find_adapter(const train_source *source, ckpt_tensor *out) {
  for (int32_t r = 0; r < source->count; r++)
    for (int32_t i = 0; i < ckpt_reader_count(source->reader[r]); i++) {
      ckpt_reader_at(source->reader[r], i, out);
      if (train_lora_is_adapter(out->name)) return true;
    }
  return false;
}

/* ---- reading ---- */

/* A reading in progress; adapters are listed like everything else and taken off once they are folded in. */
typedef struct work {
  const train_source *source;
  const train_settings *settings;
  train_merged *out;
  int64_t total; /* elements listed */
} work;

static core_status list_one(void *context, const ckpt_tensor *found) {
  work *w = context;
  train_merged *m = w->out;
  ckpt_tensor *tensor = &m->list[m->count];
  CHECK(found->dtype == CORE_REAL_DTYPE, CORE_ERR_UNSUPPORTED, "%s: tensor %s is %s, expected %s",
        ckpt_reader_path(w->source->reader[0]), found->name, core_dtype_text(found->dtype),
        core_dtype_text(CORE_REAL_DTYPE));
  *tensor = *found;
  snprintf(m->name[m->count], CORE_NAME, "%s", found->name);
  tensor->name = m->name[m->count++];
  tensor->first = 0;
  tensor->owner = true;
  w->total += found->count;
  return CORE_OK;
}

static core_status list_all(work *w) {
  train_merged *m = w->out;
  size_t most = 1;
  for (int32_t r = 0; r < w->source->count; r++) most += (size_t)ckpt_reader_count(w->source->reader[r]);
  m->list = calloc(most, sizeof *m->list);
  m->name = calloc(most, sizeof *m->name);
  CHECK(m->list && m->name, CORE_ERR_MEMORY, "no memory for the list of %zu tensors", most);
  TRY(train_source_visit(w->source, list_one, w));
  CHECK(m->count > 0, CORE_ERR_FORMAT, "%s holds no parameters", ckpt_reader_path(w->source->reader[0]));
  return CORE_OK;
}

static core_status take_memory(train_merged *m, int64_t total) {
  m->value = malloc((size_t)total * sizeof *m->value);
  CHECK(m->value, CORE_ERR_MEMORY, "no memory for %lld parameters", (long long)total);
  core_real *value = m->value;
  for (int32_t i = 0; i < m->count; i++) {
    m->list[i].data = value;
    value += m->list[i].count;
  }
  return CORE_OK;
}

/* ---- folding ---- */

static const ckpt_tensor *find(const train_merged *m, const char *name) {
  for (int32_t i = 0; i < m->count; i++)
    if (strcmp(m->list[i].name, name) == 0) return &m->list[i];
  return NULL;
}

/* W[i, :] += scale sum over j of B[i, j] A[j, :]; sum: [k]. */
static void fold(const ckpt_tensor *weight, const ckpt_tensor *a, const ckpt_tensor *b, double scale,
                 double *sum) {
  int64_t n = weight->shape[0], k = weight->shape[1], r = a->shape[0];
  const core_real *from_a = a->data, *from_b = b->data;
  core_real *to = weight->data;
  for (int64_t i = 0; i < n; i++) {
    for (int64_t c = 0; c < k; c++) sum[c] = 0;
    for (int64_t j = 0; j < r; j++)
      for (int64_t c = 0; c < k; c++) sum[c] += (double)from_b[i * r + j] * (double)from_a[j * k + c];
    for (int64_t c = 0; c < k; c++) to[i * k + c] = (core_real)((double)to[i * k + c] + scale * sum[c]);
  }
}

/* The adapter whose A is given; its other half and its matrix are looked for. */
static core_status fold_one(const work *w, const ckpt_tensor *a) {
  const char *path = ckpt_reader_path(w->source->reader[0]);
  char map[CORE_NAME], other[2 * CORE_NAME], base[2 * CORE_NAME];
  snprintf(map, sizeof map, "%.*s", (int)(strlen(a->name) - strlen(".lora_a.weight")), a->name);
  snprintf(other, sizeof other, "%s.lora_b.weight", map);
  snprintf(base, sizeof base, "%s.weight", map);
  const ckpt_tensor *b = find(w->out, other), *weight = find(w->out, base);
  CHECK(b && weight, CORE_ERR_FORMAT, "%s holds '%s' but no '%s'", path, a->name, b ? base : other);
  bool fits = weight->rank == 2 && a->rank == 2 && b->rank == 2 && a->shape[1] == weight->shape[1] &&
              b->shape[0] == weight->shape[0] && a->shape[0] == b->shape[1] && a->shape[0] > 0;
  CHECK(fits, CORE_ERR_FORMAT, "%s: '%s' [%lld, %lld] and '%s' [%lld, %lld] do not adapt [%lld, %lld]", path,
        a->name, (long long)a->shape[0], (long long)a->shape[1], b->name, (long long)b->shape[0],
        (long long)b->shape[1], (long long)weight->shape[0], (long long)weight->shape[1]);
  const train_lora_settings *entry = train_lora_entry(w->settings, base + strlen(parameter));
  CHECK(entry && entry->rank == a->shape[0], CORE_ERR_FORMAT,
        "%s: its configuration does not adapt '%s' with a rank of %lld", path, base, (long long)a->shape[0]);
  double *sum = malloc((size_t)weight->shape[1] * sizeof *sum);
  CHECK(sum, CORE_ERR_MEMORY, "no memory for a row of %lld", (long long)weight->shape[1]);
  fold(weight, a, b, entry->alpha / (double)entry->rank, sum);
  free(sum);
  w->out->adapters++;
  return CORE_OK;
}

static core_status fold_all(const work *w) {
  train_merged *m = w->out;
  int64_t halves = 0;
  int32_t kept = 0;
  for (int32_t i = 0; i < m->count; i++) {
    halves += train_lora_is_adapter(m->list[i].name);
    if (ends(m->list[i].name, ".lora_a.weight")) TRY(fold_one(w, &m->list[i]));
  }
  CHECK(halves == 2 * m->adapters, CORE_ERR_FORMAT, "%s: %lld halves of adapters, but %lld pairs",
        ckpt_reader_path(w->source->reader[0]), (long long)halves, (long long)m->adapters);
  for (int32_t i = 0; i < m->count; i++)
    if (!train_lora_is_adapter(m->list[i].name)) m->list[kept++] = m->list[i];
  m->count = kept;
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status read_local(work *w) {
  TRY(list_all(w));
  TRY(take_memory(w->out, w->total));
  return CORE_OK;
}

static core_status read_all(comm_group *control, const train_source *source, const train_settings *settings,
                            train_merged *out) {
  work w = {source, settings, out, 0};
  TRY(comm_agree(control, read_local(&w)));
  TRY(train_source_load(source, out->list, out->count));
  TRY(comm_agree(control, fold_all(&w)));
  return CORE_OK;
}

core_status train_merged_read(comm_group *control, ckpt_reader *reader, train_merged *out) {
  static const char *const without[] = {"model.lora=[]", "checkpoint.contents=all"};
  train_state_meta meta;
  train_source source;
  core_config *stored = NULL;
  *out = (train_merged){0};
  TRY(train_state_meta_read(ckpt_reader_meta(reader), &meta));
  const char *what = "the checkpoint's configuration";
  core_status status = core_config_load(train_settings_spec(), what, meta.config, NULL, 0, &stored);
  if (status == CORE_OK)
    status = core_config_load(train_settings_spec(), what, meta.config, without, 2, &out->config);
  free(meta.config);
  if (status == CORE_OK) status = train_source_open(control, reader, &source);
  if (status == CORE_OK) {
    status = read_all(control, &source, core_config_data(stored), out);
    train_source_close(&source);
  }
  core_config_destroy(stored);
  TRY(status);
  return CORE_OK;
}

void train_merged_free(train_merged *merged) {
  core_config_destroy(merged->config);
  free(merged->list), free(merged->value), free(merged->name);
  *merged = (train_merged){0};
}

/* ---- writing ---- */

static core_status write_merged(comm_group *control, const ckpt_reader *reader, const train_merged *merged,
                                const char *directory) {
  train_state_meta meta;
  TRY(train_state_meta_read(ckpt_reader_meta(reader), &meta));
  free(meta.config);
  meta.config = (char *)(uintptr_t)core_config_text(merged->config);
  meta.base = (train_base){.hash = 0};
  meta.ranks = meta.expert_ranks = 1;
  TRY(train_state_publish(control, directory, &meta, merged->list, merged->count));
  return CORE_OK;
}

static core_status merge(comm_group *control, ckpt_reader *reader, train_merged *merged,
                         const char *directory) {
  TRY(train_state_target(directory, ckpt_reader_step(reader)));
  TRY(train_merged_read(control, reader, merged));
  CHECK(merged->adapters > 0, CORE_ERR_ARGUMENT, "%s has no adapters to merge", ckpt_reader_path(reader));
  TRY(write_merged(control, reader, merged, directory));
  LOG_INFO("merged %lld adapters of %s into %s/step-%08lld", (long long)merged->adapters,
           ckpt_reader_path(reader), directory, (long long)ckpt_reader_step(reader));
  return CORE_OK;
}

core_status train_lora_merge(comm_group *control, const char *checkpoint, const char *directory) {
  ckpt_reader *reader = NULL;
  train_merged merged = {0};
  CHECK(comm_size(control) == 1, CORE_ERR_ARGUMENT, "merge runs on one rank, not on %d", comm_size(control));
  TRY(ckpt_reader_open(control, checkpoint, &reader));
  core_status status = merge(control, reader, &merged, directory);
  train_merged_free(&merged);
  ckpt_reader_close(reader);
  TRY(status);
  return CORE_OK;
}
