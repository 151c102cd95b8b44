/* Outline: what the sources' configurations must have in common with the target's; the target's model,
 * declared on paper; for each of its tensors the source and the name there, found and of its shape. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/assemble_impl.h"
#include "trainer/state.h"

/* ---- configurations ---- */

typedef struct need {
  const char *key;
  double target, source;
} need;

static double kv_heads(const train_settings *s) {
  return (double)(s->model.kv_heads ? s->model.kv_heads : s->model.heads);
}

static double head_width(const train_settings *s) {
  return (double)(s->model.head_width ? s->model.head_width : s->model.width / s->model.heads);
}

/* What tensors of equal shapes would not show, and what a message should rather name than a tensor. */
static core_status compare_settings(const train_settings *t, const train_settings *s, const char *path) {
  const need list[] = {
      {"kind", t->model.kind, s->model.kind},
      {"width", (double)t->model.width, (double)s->model.width},
      {"layers", (double)t->model.layers, (double)s->model.layers},
      {"heads", (double)t->model.heads, (double)s->model.heads},
      {"kv_heads", kv_heads(t), kv_heads(s)},
      {"head_width", head_width(t), head_width(s)},
      {"vocabulary", (double)t->model.vocabulary, (double)s->model.vocabulary},
      {"activation", t->model.activation, s->model.activation},
      {"norm_epsilon", t->model.norm_epsilon, s->model.norm_epsilon},
      {"rope_base", t->model.rope_base, s->model.rope_base},
      {"rope_scaling.kind", t->model.rope_scaling.kind, s->model.rope_scaling.kind},
      {"rope_scaling.factor", t->model.rope_scaling.factor, s->model.rope_scaling.factor},
      {"rope_scaling.low", t->model.rope_scaling.low, s->model.rope_scaling.low},
      {"rope_scaling.high", t->model.rope_scaling.high, s->model.rope_scaling.high},
      {"rope_scaling.length", (double)t->model.rope_scaling.length, (double)s->model.rope_scaling.length},
      {"tied", t->model.tied, s->model.tied},
      {"qkv_bias", t->model.qkv_bias, s->model.qkv_bias}};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    CHECK(list[i].target == list[i].source, CORE_ERR_MISMATCH,
          "%s was trained with model.%s %.10g, the assembly has %.10g", path, list[i].key, list[i].source,
          list[i].target);
  return CORE_OK;
}

static core_status check_source(const train_assembly_work *work, train_assembly_source *source) {
  train_state_meta meta;
  core_config *config = NULL;
  TRY(train_state_meta_read(ckpt_reader_meta(source->reader), &meta));
  core_status status =
      core_config_load(train_settings_spec(), "the stored configuration", meta.config, NULL, 0, &config);
  if (status == CORE_OK) status = compare_settings(work->settings, core_config_data(config), source->path);
  core_config_destroy(config);
  free(meta.config);
  TRY(status);
  return CORE_OK;
}

bool train_assembly_find_tensor_priv(const train_assembly_source *source, const char *name,
                                     ckpt_tensor *found) {
  if (!source->merged.list) return train_source_find(&source->files, name, found) != NULL;
  for (int32_t i = 0; i < source->merged.count; i++)
    if (strcmp(source->merged.list[i].name, name) == 0) {
      *found = source->merged.list[i];
      return true;
    }
  return false;
}

int32_t train_assembly_find_priv(const train_assembly_work *work, const char *path) {
  for (int32_t i = 0; i < work->sources; i++)
    if (strcmp(work->source[i].path, path) == 0) return i;
  return -1;
}

/* ---- the model ---- */

static core_status find_widths(train_assembly_work *work) {
  for (unsigned m = 0; m < work->settings->data.modalities_count; m++) {
    char name[CORE_NAME + 16];
    ckpt_tensor found;
    const char *path = work->assembly->connector ? work->assembly->connector[m] : NULL;
    work->connector[m] = path ? train_assembly_find_priv(work, path) : 0;
    const train_assembly_source *source = &work->source[work->connector[m]];
    snprintf(name, sizeof name, "latent_shift/%.80s", work->settings->data.modalities[m].name);
    CHECK(train_assembly_find_tensor_priv(source, name, &found), CORE_ERR_MISMATCH,
          "%s has no connector of '%s'; name another source of it", source->path,
          work->settings->data.modalities[m].name);
    CHECK(found.rank == 1, CORE_ERR_MISMATCH, "%s: '%s' has rank %d, expected 1", source->path, name,
          found.rank);
    work->width[m] = found.shape[0];
  }
  return CORE_OK;
}

/* As on one rank; nothing is planned or allocated but the list of parameters. */
static core_status declare(train_assembly_work *work) {
  train_layout *layout = &work->env.layout;
  work->env.settings = work->settings;
  layout->ranks = layout->expert_ranks = layout->groups = 1;
  layout->modalities = (int32_t)work->settings->data.modalities_count;
  for (int32_t m = 0; m < layout->modalities; m++) layout->slot_count[m] = 1;
  TRY(train_model_create(&work->env, work->width, &work->model));
  return CORE_OK;
}

/* ---- experts ---- */

/* "blocks.3.experts.5.in.weight": layer, expert, "in.weight". */
static bool parse_expert(const char *name, int *layer, int *expert, const char **rest) {
  int used = 0;
  if (sscanf(name, "blocks.%d.experts.%d.%n", layer, expert, &used) != 2 || used == 0) return false;
  *rest = name + used;
  return true;
}

static int32_t experts_of(const train_assembly_work *work, int layer) {
  int32_t most = 0;
  for (int32_t i = 0; i < work->model->parameters.count; i++) {
    const char *rest;
    int l, j;
    if (parse_expert(work->model->parameters.list[i].name, &l, &j, &rest) && l == layer && j >= most)
      most = j + 1;
  }
  return most;
}

static core_status check_slots(const train_assembly_work *work) {
  const train_assembly *a = work->assembly;
  bool any = false;
  int32_t layers = (int32_t)work->settings->model.layers;
  CHECK(!a->layer_slots || a->layers == layers, CORE_ERR_MISMATCH, "slots for %d layers; the assembly has %d",
        a->layers, layers);
  for (int32_t l = 0; l < layers; l++) {
    int32_t experts = experts_of(work, l);
    int32_t slots = a->layer_slots ? a->layer_slots[l] : experts > 0 ? a->slots : 0;
    any = any || experts > 0;
    CHECK(slots == experts, CORE_ERR_MISMATCH, "layer %d has %d experts, but %d slots are filled", l, experts,
          slots);
  }
  CHECK(any, CORE_ERR_MISMATCH, "the configuration has no layer with a mixture (model.moe.layers)");
  return CORE_OK;
}

static const char *slot_path(const train_assembly *a, int layer, int expert) {
  int32_t first = 0;
  for (int l = 0; a->layer_slots && l < layer; l++) first += a->layer_slots[l];
  return a->slot[first + expert];
}

/* ---- each tensor ---- */

static void place(const train_assembly_work *work, const train_parameter *p, train_assembly_tensor *t) {
  int layer, expert;
  const char *rest;
  snprintf(t->from, sizeof t->from, "parameter/%s", p->name);
  if (parse_expert(p->name, &layer, &expert, &rest)) {
    t->kind = TRAIN_ASSEMBLY_TAKEN;
    t->source = train_assembly_find_priv(work, slot_path(work->assembly, layer, expert));
    snprintf(t->from, sizeof t->from, "parameter/blocks.%d.feed_forward.%.64s", layer, rest);
  } else if (strstr(p->name, ".router.")) {
    t->kind = TRAIN_ASSEMBLY_FRESH;
  } else if (p->scope == TRAIN_SCOPE_MODALITY) {
    t->kind = TRAIN_ASSEMBLY_TAKEN;
    t->source = work->connector[p->modality];
  } else if (strstr(p->name, ".feed_forward.")) {
    t->kind = TRAIN_ASSEMBLY_TAKEN; /* a layer without a mixture: the base's */
  }
}

static core_status check_tensor(const train_assembly_work *work, const train_assembly_tensor *t, int32_t s) {
  ckpt_tensor found;
  const char *path = work->source[s].path;
  CHECK(train_assembly_find_tensor_priv(&work->source[s], t->from, &found), CORE_ERR_MISMATCH,
        "%s lacks '%s', of which '%s' is to be made", path, t->from, t->name);
  bool same = found.dtype == CORE_REAL_DTYPE && found.rank == t->shape_rank;
  for (int32_t i = 0; same && i < t->shape_rank; i++) same = found.shape[i] == t->shape[i];
  CHECK(same, CORE_ERR_MISMATCH, "%s: '%s' is %s [%lld, %lld], '%s' is to be %s [%lld, %lld]", path, t->from,
        core_dtype_text(found.dtype), (long long)found.shape[0],
        (long long)(found.rank > 1 ? found.shape[1] : 1), t->name, core_dtype_text(CORE_REAL_DTYPE),
        (long long)t->shape[0], (long long)(t->shape_rank > 1 ? t->shape[1] : 1));
  return CORE_OK;
}

core_status train_assembly_check_priv(const train_assembly_work *work, int32_t s) {
  for (int32_t i = 0; i < work->tensors; i++) {
    const train_assembly_tensor *t = &work->tensor[i];
    bool wanted = t->kind == TRAIN_ASSEMBLY_SHARED || (t->kind == TRAIN_ASSEMBLY_TAKEN && t->source == s);
    if (wanted) TRY(check_tensor(work, t, s));
  }
  return CORE_OK;
}

static void add_parameters(train_assembly_work *work) {
  const train_parameters *set = &work->model->parameters;
  for (int32_t i = 0; i < set->count; i++) {
    const train_parameter *p = &set->list[i];
    train_assembly_tensor t = {.parameter = i, .shape_rank = p->rank, .count = p->count};
    memcpy(t.shape, p->shape, sizeof t.shape);
    snprintf(t.name, sizeof t.name, "parameter/%s", p->name);
    place(work, p, &t);
    work->tensor[work->tensors++] = t;
  }
}

static void add_standardisation(train_assembly_work *work) {
  for (unsigned m = 0; m < work->settings->data.modalities_count; m++)
    for (int i = 0; i < 2; i++) {
      train_assembly_tensor t = {.parameter = -1,
                                 .kind = TRAIN_ASSEMBLY_TAKEN,
                                 .source = work->connector[m],
                                 .shape_rank = 1,
                                 .shape = {work->width[m], 1, 1, 1},
                                 .count = work->width[m]};
      snprintf(t.name, sizeof t.name, "%s/%.80s", i == 0 ? "latent_shift" : "latent_scale",
               work->settings->data.modalities[m].name);
      memcpy(t.from, t.name, sizeof t.from);
      work->tensor[work->tensors++] = t;
    }
}

/* Whole tensors to ranks, about as many bytes to each. */
static void share(train_assembly_work *work) {
  int64_t total = 0, before = 0, ranks = comm_size(work->assembly->control);
  for (int32_t i = 0; i < work->tensors; i++) total += work->tensor[i].count;
  for (int32_t i = 0; i < work->tensors; before += work->tensor[i++].count)
    work->tensor[i].rank = (int32_t)((double)before / (double)total * (double)ranks);
}

/* The target has no adapters: they are for training. */
static core_status check_target(const train_assembly_work *work) {
  for (int32_t i = 0; i < work->model->parameters.count; i++)
    CHECK(!train_lora_is_adapter(work->model->parameters.list[i].name), CORE_ERR_MISMATCH,
          "an assembly has no adapters ('%s'): leave model.lora empty, and give it to the run that begins "
          "with it",
          work->model->parameters.list[i].name);
  return CORE_OK;
}

core_status train_assembly_plan_priv(train_assembly_work *work) {
  CHECK(work->settings->model.kind == TRAIN_KIND_DECODER, CORE_ERR_MISMATCH,
        "only decoders are assembled (model.kind)");
  for (int32_t i = 0; i < work->sources; i++) TRY(check_source(work, &work->source[i]));
  TRY(find_widths(work));
  TRY(declare(work));
  TRY(check_target(work));
  TRY(check_slots(work));
  size_t most = (size_t)work->model->parameters.count + 2 * CORE_MAX_MODALITIES;
  work->tensor = calloc(most, sizeof *work->tensor);
  CHECK(work->tensor, CORE_ERR_MEMORY, "no memory for a list of %zu tensors", most);
  add_parameters(work);
  add_standardisation(work);
  share(work);
  return CORE_OK;
}
