/* Outline: open the sources, plan, make this rank's tensors, compare what is shared, write. */
#include "trainer/assemble.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/stop.h"
#include "trainer/assemble_impl.h"
#include "trainer/state.h"

/* ---- sources ---- */

static core_status add_source(train_assembly_work *work, const char *path) {
  if (!path || train_assembly_find_priv(work, path) >= 0) return CORE_OK;
  train_assembly_source *grown = realloc(work->source, (size_t)(work->sources + 1) * sizeof *grown);
  CHECK(grown, CORE_ERR_MEMORY, "no memory for the sources of an assembly");
  work->source = grown;
  grown[work->sources++] = (train_assembly_source){.path = path};
  return CORE_OK;
}

static core_status list_sources(train_assembly_work *work) {
  const train_assembly *a = work->assembly;
  TRY(add_source(work, a->base));
  for (int32_t i = 0; i < a->slots; i++) TRY(add_source(work, a->slot[i]));
  for (unsigned m = 0; a->connector && m < work->settings->data.modalities_count; m++)
    TRY(add_source(work, a->connector[m]));
  return CORE_OK;
}

static core_status open_sources(train_assembly_work *work) {
  TRY(comm_agree(work->assembly->control, list_sources(work)));
  for (int32_t i = 0; i < work->sources; i++) {
    train_assembly_source *source = &work->source[i];
    TRY(ckpt_reader_open(work->assembly->control, source->path, &source->reader));
    TRY(train_source_open(work->assembly->control, source->reader, &source->files));
    ckpt_tensor adapter;
    source->adapters = train_lora_find_adapter(&source->files, &adapter);
  }
  return CORE_OK;
}

/* ---- this rank's tensors ---- */

typedef struct share {
  ckpt_tensor *list; /* [count], the names are the plan's */
  int32_t *number;   /* [count] in the plan */
  int32_t count;
  core_real *value, *other; /* all of them; the largest one */
} share;

static core_status make_share(const train_assembly_work *work, share *own) {
  int32_t rank = comm_rank(work->assembly->control);
  int64_t total = 0, largest = 1;
  own->list = calloc((size_t)work->tensors, sizeof *own->list);
  own->number = calloc((size_t)work->tensors, sizeof *own->number);
  CHECK(own->list && own->number, CORE_ERR_MEMORY, "no memory for a list of %d tensors", work->tensors);
  for (int32_t i = 0; i < work->tensors; i++) {
    const train_assembly_tensor *t = &work->tensor[i];
    if (t->rank != rank) continue;
    ckpt_tensor *tensor = &own->list[own->count];
    *tensor = (ckpt_tensor){
        .name = t->name, .dtype = CORE_REAL_DTYPE, .rank = t->shape_rank, .count = t->count, .owner = true};
    memcpy(tensor->shape, t->shape, sizeof tensor->shape);
    own->number[own->count++] = i;
    total += t->count;
    if (t->count > largest) largest = t->count;
  }
  own->value = malloc((size_t)(total + 1) * sizeof *own->value);
  own->other = malloc((size_t)largest * sizeof *own->other);
  CHECK(own->value && own->other, CORE_ERR_MEMORY, "no memory for %lld numbers of an assembly",
        (long long)(total + largest));
  int64_t at = 0;
  for (int32_t i = 0; i < own->count; at += own->list[i++].count) own->list[i].data = own->value + at;
  return CORE_OK;
}

static void free_share(share *own) {
  free(own->list);
  free(own->number);
  free(own->value);
  free(own->other);
}

/* One tensor as a source calls it, into `data`. */
static ckpt_tensor as_stored(const train_assembly_tensor *t, void *data) {
  ckpt_tensor tensor = {
      .name = t->from, .dtype = CORE_REAL_DTYPE, .rank = t->shape_rank, .count = t->count, .data = data};
  memcpy(tensor.shape, t->shape, sizeof tensor.shape);
  return tensor;
}

/* Fills the list from a source: of its files, or of what was merged. Collective. */
static core_status fill(const train_assembly_source *source, const ckpt_tensor *wanted, int32_t count) {
  if (!source->merged.list) {
    TRY(train_source_load(&source->files, wanted, count));
    return CORE_OK;
  }
  for (int32_t i = 0; i < count; i++) {
    ckpt_tensor found = {0};
    if (train_assembly_find_tensor_priv(source, wanted[i].name, &found)) /* checked before */
      memcpy(wanted[i].data, found.data, (size_t)wanted[i].count * sizeof(core_real));
  }
  return CORE_OK;
}

/* What this rank takes from source s, all at once: the reader goes through its files once. */
static core_status load_from(const train_assembly_work *work, const share *own, int32_t s) {
  ckpt_tensor *wanted = calloc((size_t)own->count + 1, sizeof *wanted);
  int32_t count = 0;
  TRY(comm_agree(work->assembly->control, wanted ? CORE_OK
                                                 : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__,
                                                                    __LINE__, "no memory for an assembly")));
  for (int32_t i = 0; i < own->count; i++) {
    const train_assembly_tensor *t = &work->tensor[own->number[i]];
    if (t->kind != TRAIN_ASSEMBLY_FRESH && t->source == s) wanted[count++] = as_stored(t, own->list[i].data);
  }
  core_status status = fill(&work->source[s], wanted, count);
  free(wanted);
  TRY(status);
  return CORE_OK;
}

static void draw_fresh(const train_assembly_work *work, const share *own) {
  for (int32_t i = 0; i < own->count; i++) {
    const train_assembly_tensor *t = &work->tensor[own->number[i]];
    if (t->kind == TRAIN_ASSEMBLY_FRESH)
      train_parameter_draw(&work->model->parameters.list[t->parameter], work->settings->run.seed,
                           own->list[i].data);
  }
}

/* ---- comparing ---- */

/* This rank's n-th tensor, where that is shared, with source s's. The call is collective: a rank that has
 * none asks for nothing. */
static core_status compare_one(const train_assembly_work *work, const share *own, int32_t n, int32_t s) {
  const train_assembly_tensor *t = n < own->count ? &work->tensor[own->number[n]] : NULL;
  bool compares = t && t->kind == TRAIN_ASSEMBLY_SHARED;
  ckpt_tensor wanted = {0};
  if (compares) wanted = as_stored(t, own->other);
  core_status status = fill(&work->source[s], &wanted, compares);
  if (status == CORE_OK && compares &&
      memcmp(own->other, own->list[n].data, (size_t)t->count * sizeof *own->other) != 0)
    status = core_error_begin(CORE_ERR_MISMATCH, __func__, __FILE__, __LINE__,
                              "'%s' of %.200s differs from that of the base %.200s: they are not of one base",
                              t->from, work->source[s].path, work->source[0].path);
  if (status == CORE_OK && core_stop_requested())
    status = core_error_begin(CORE_ERR_STOPPED, __func__, __FILE__, __LINE__, "stopped on request");
  TRY(comm_agree(work->assembly->control, status));
  return CORE_OK;
}

static core_status compare_all(const train_assembly_work *work, const share *own, int32_t s) {
  int64_t most = s > 0 ? own->count : 0; /* the base is what the others are compared with */
  TRY(comm_all_reduce(work->assembly->control, COMM_MAX, CORE_INT64, &most, 1));
  for (int32_t n = 0; n < most; n++) TRY(compare_one(work, own, n, s));
  return CORE_OK;
}

/* One source after the other, so that only one is held merged. */
static core_status take_source(train_assembly_work *work, const share *own, int32_t s) {
  train_assembly_source *source = &work->source[s];
  comm_group *control = work->assembly->control;
  core_status status =
      source->adapters ? train_merged_read(control, source->reader, &source->merged) : CORE_OK;
  if (status == CORE_OK && source->adapters && comm_rank(control) == 0)
    LOG_INFO("%s: %lld adapters are merged", source->path, (long long)source->merged.adapters);
  if (status == CORE_OK) status = comm_agree(control, train_assembly_check_priv(work, s));
  if (status == CORE_OK) status = load_from(work, own, s);
  if (status == CORE_OK) status = compare_all(work, own, s);
  train_merged_free(&source->merged);
  TRY(status);
  return CORE_OK;
}

/* ---- writing ---- */

static core_status write_checkpoint(const train_assembly_work *work, const share *own) {
  const train_assembly *a = work->assembly;
  const train_state_meta meta = {.ranks = comm_size(a->control),
                                 .expert_ranks = 1,
                                 .config = (char *)(uintptr_t)core_config_text(a->config)};
  TRY(train_state_publish(a->control, a->directory, &meta, own->list, own->count));
  return CORE_OK;
}

static core_status make(train_assembly_work *work, share *own) {
  comm_group *control = work->assembly->control;
  TRY(comm_agree(control, make_share(work, own)));
  for (int32_t s = 0; s < work->sources; s++) TRY(take_source(work, own, s));
  draw_fresh(work, own);
  TRY(write_checkpoint(work, own));
  return CORE_OK;
}

static core_status run(train_assembly_work *work) {
  comm_group *control = work->assembly->control;
  share own = {0};
  TRY(comm_agree(control,
                 comm_rank(control) == 0 ? train_state_target(work->assembly->directory, 0) : CORE_OK));
  TRY(open_sources(work));
  TRY(comm_agree(control, train_assembly_plan_priv(work)));
  core_status status = make(work, &own);
  free_share(&own);
  TRY(status);
  LOG_INFO("assembled %d tensors of %d checkpoints into %s/step-00000000", work->tensors, work->sources,
           work->assembly->directory);
  return CORE_OK;
}

core_status train_assemble(const train_assembly *assembly) {
  train_assembly_work work = {.assembly = assembly, .settings = core_config_data(assembly->config)};
  core_status status = run(&work);
  for (int32_t i = 0; i < work.sources; i++) {
    train_source_close(&work.source[i].files);
    ckpt_reader_close(work.source[i].reader);
  }
  free(work.source);
  free(work.tensor);
  train_model_destroy(work.model);
  TRY(status);
  return CORE_OK;
}
