/* Outline: every rank makes whole tensors of its own, about 1/W of the bytes: the old ones as they are, the
 * new ones from the old; compares its part of what was tuned; hashes the old ones; all write. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h" /* core_hash */
#include "trainer/extend_impl.h"

/* ---- names ---- */

static bool is_of_router(const char *name) {
  return strstr(name, ".router.") != NULL;
}

/* ---- comparing two checkpoints ---- */

typedef struct comparison {
  const train_source *with;
  const char *of, *path; /* of: whose tensors are visited */
} comparison;

static core_status compare_one(void *context, const ckpt_tensor *tensor) {
  const comparison *c = context;
  ckpt_tensor found;
  CHECK(train_source_find(c->with, tensor->name, &found), CORE_ERR_MISMATCH,
        "%s has '%s', %s has not: they are not the same model", c->of, tensor->name, c->path);
  bool same = found.rank == tensor->rank && found.dtype == tensor->dtype;
  for (int32_t i = 0; same && i < found.rank; i++) same = found.shape[i] == tensor->shape[i];
  CHECK(same, CORE_ERR_MISMATCH,
        "'%s' is [%lld, %lld] in %s and [%lld, %lld] in %s: they are not the same model", tensor->name,
        (long long)tensor->shape[0], (long long)(tensor->rank > 1 ? tensor->shape[1] : 1), c->of,
        (long long)found.shape[0], (long long)(found.rank > 1 ? found.shape[1] : 1), c->path);
  return CORE_OK;
}

core_status train_extension_compare_priv(const train_extension_work *work) {
  const train_extension *x = work->extension;
  comparison forth = {&work->other, x->original, x->tuned}, back = {&work->source, x->tuned, x->original};
  TRY(train_source_visit(&work->source, compare_one, &forth));
  TRY(train_source_visit(&work->other, compare_one, &back));
  return CORE_OK;
}

/* ---- the list ---- */

static core_status add(train_extension_work *work, const train_extension_tensor *tensor) {
  if ((work->tensors & (work->tensors - 1)) == 0) { /* it grows at powers of two */
    size_t room = work->tensors > 0 ? 2 * (size_t)work->tensors : 1;
    train_extension_tensor *grown = realloc(work->tensor, room * sizeof *grown);
    CHECK(grown, CORE_ERR_MEMORY, "no memory for a list of %zu tensors", room);
    work->tensor = grown;
  }
  work->tensor[work->tensors++] = *tensor;
  return CORE_OK;
}

static train_extension_tensor copy_of(const ckpt_tensor *tensor, const char *name) {
  train_extension_tensor t = {.shape_rank = tensor->rank,
                              .from_rank = tensor->rank,
                              .count = tensor->count,
                              .from_count = tensor->count};
  memcpy(t.shape, tensor->shape, sizeof t.shape);
  memcpy(t.from_shape, tensor->shape, sizeof t.from_shape);
  snprintf(t.name, sizeof t.name, "%s", name);
  snprintf(t.from, sizeof t.from, "%s", tensor->name);
  return t;
}

/* One row of a router's columns or one of its biases. */
static core_status add_column(train_extension_work *work, int32_t j, const ckpt_tensor *of,
                              train_extension_kind kind) {
  char name[2 * CORE_NAME];
  snprintf(name, sizeof name, "parameter/blocks.%lld.router.added.%s", (long long)work->choice.layer[j].block,
           kind == TRAIN_EXTENSION_BIAS ? "bias" : "weight");
  train_extension_tensor t = {.shape_rank = 1, .shape = {1, 1, 1, 1}, .count = 1};
  if (of) t = copy_of(of, name);
  snprintf(t.name, sizeof t.name, "%.*s", CORE_NAME - 1, name);
  t.kind = kind;
  t.layer = j;
  if (of) t.count /= t.shape[0];
  t.shape[0] = 1;
  TRY(add(work, &t));
  return CORE_OK;
}

/* An old tensor, and what is made of it. */
static core_status add_from(void *context, const ckpt_tensor *tensor) {
  train_extension_work *work = context;
  train_extension_tensor old = copy_of(tensor, tensor->name);
  CHECK(tensor->dtype == CORE_REAL_DTYPE, CORE_ERR_UNSUPPORTED, "%s: tensor %s is %s, expected %s",
        work->extension->original, tensor->name, core_dtype_text(tensor->dtype),
        core_dtype_text(CORE_REAL_DTYPE));
  TRY(add(work, &old));
  for (int32_t j = 0; j < work->choice.layers; j++) {
    const train_extension_layer *layer = &work->choice.layer[j];
    char expert[CORE_NAME], router[CORE_NAME], name[2 * CORE_NAME];
    if (!layer->chosen) continue;
    int length = snprintf(expert, sizeof expert, "parameter/blocks.%lld.experts.%lld.",
                          (long long)layer->block, (long long)layer->source);
    snprintf(router, sizeof router, "parameter/blocks.%lld.router.", (long long)layer->block);
    size_t prefix = strlen(router);
    if (strncmp(tensor->name, expert, (size_t)length) == 0) {
      snprintf(name, sizeof name, "parameter/blocks.%lld.experts.%lld.%s", (long long)layer->block,
               (long long)layer->experts, tensor->name + length);
      CHECK(strlen(name) < CORE_NAME, CORE_ERR_ARGUMENT, "the name '%.100s...' is too long", name);
      train_extension_tensor copy = copy_of(tensor, name);
      copy.kind = TRAIN_EXTENSION_EXPERT;
      copy.layer = j;
      TRY(add(work, &copy));
    } else if (strncmp(tensor->name, router, prefix) == 0 && strcmp(tensor->name + prefix, "weight") == 0) {
      TRY(add_column(work, j, tensor, TRAIN_EXTENSION_COLUMN));
    } else if (strncmp(tensor->name, router, prefix) == 0 && strcmp(tensor->name + prefix, "bias") == 0) {
      TRY(add_column(work, j, tensor, TRAIN_EXTENSION_BIAS));
    }
  }
  return CORE_OK;
}

/* Whole tensors to ranks, about as many bytes to each. */
static void share_out(train_extension_work *work) {
  int64_t total = 0, before = 0, ranks = comm_size(work->control);
  for (int32_t i = 0; i < work->tensors; i++) total += work->tensor[i].count;
  for (int32_t i = 0; i < work->tensors; before += work->tensor[i++].count)
    work->tensor[i].rank = (int32_t)((double)before / (double)total * (double)ranks);
}

core_status train_extension_list_priv(train_extension_work *work) {
  const train_settings *s = core_config_data(work->extended);
  TRY(train_source_visit(&work->source, add_from, work));
  for (int32_t j = 0; j < work->choice.layers; j++)
    if (work->choice.layer[j].chosen && s->model.moe.added_bias && !s->model.moe.bias)
      TRY(add_column(work, j, NULL, TRAIN_EXTENSION_BIAS));
  share_out(work);
  return CORE_OK;
}

/* ---- this rank's tensors ---- */

typedef struct share {
  ckpt_tensor *list; /* [count] as they are written; names are the work's */
  int32_t *number;   /* [count] in the work */
  int32_t count;
  core_real *value; /* all of them; */
  core_real *other; /* what they are made of or compared with, one after another */
} share;

static core_status make_share(const train_extension_work *work, share *own) {
  int64_t total = 1, others = 1;
  own->list = calloc((size_t)work->tensors + 1, sizeof *own->list);
  own->number = calloc((size_t)work->tensors + 1, sizeof *own->number);
  CHECK(own->list && own->number, CORE_ERR_MEMORY, "no memory for a list of %d tensors", work->tensors);
  for (int32_t i = 0; i < work->tensors; i++) {
    const train_extension_tensor *t = &work->tensor[i];
    if (t->rank != comm_rank(work->control)) continue;
    ckpt_tensor *tensor = &own->list[own->count];
    *tensor = (ckpt_tensor){
        .name = t->name, .dtype = CORE_REAL_DTYPE, .rank = t->shape_rank, .count = t->count, .owner = true};
    memcpy(tensor->shape, t->shape, sizeof tensor->shape);
    own->number[own->count++] = i;
    total += t->count;
    others += t->from_count;
  }
  own->value = calloc((size_t)total, sizeof *own->value);
  own->other = calloc((size_t)others, sizeof *own->other);
  CHECK(own->value && own->other, CORE_ERR_MEMORY, "no memory for %lld numbers of an extension",
        (long long)(total + others));
  core_real *at = own->value;
  for (int32_t i = 0; i < own->count; at += own->list[i++].count) own->list[i].data = at;
  return CORE_OK;
}

static void free_share(share *own) {
  free(own->list), free(own->number), free(own->value), free(own->other);
}

static ckpt_tensor as_stored(const train_extension_tensor *t, void *data) {
  ckpt_tensor tensor = {
      .name = t->from, .dtype = CORE_REAL_DTYPE, .rank = t->from_rank, .count = t->from_count, .data = data};
  memcpy(tensor.shape, t->from_shape, sizeof tensor.shape);
  return tensor;
}

/* Brings what this rank's tensors are made of into `other`. Collective. */
static core_status load(const train_extension_work *work, const train_source *source, const share *own) {
  ckpt_tensor *wanted = calloc((size_t)own->count + 1, sizeof *wanted);
  core_real *at = own->other;
  int32_t count = 0;
  core_status status = wanted ? CORE_OK
                              : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                                 "no memory for a list of %d tensors", own->count);
  TRY(comm_agree(work->control, status));
  for (int32_t i = 0; i < own->count; i++) {
    const train_extension_tensor *t = &work->tensor[own->number[i]];
    if (t->from[0]) wanted[count++] = as_stored(t, at);
    at += t->from_count;
  }
  status = train_source_load(source, wanted, count);
  free(wanted);
  TRY(status);
  return CORE_OK;
}

/* A new column [n] of E columns [E, n]; a bias is a column of one number. */
static void make_column(const train_extension_work *work, const train_extension_tensor *t,
                        const core_real *from, core_real *out) {
  int64_t E = work->choice.layer[t->layer].experts, source = work->choice.layer[t->layer].source;
  int init = work->extension->how->init;
  for (int64_t i = 0; i < t->count && t->from[0]; i++) {
    double sum = 0;
    for (int64_t e = 0; e < E && init == TRAIN_EXTEND_MEAN; e++) sum += (double)from[e * t->count + i];
    if (init == TRAIN_EXTEND_MEAN) out[i] = (core_real)(sum / (double)E);
    if (init == TRAIN_EXTEND_COPY || init == TRAIN_EXTEND_COPY_BELOW) out[i] = from[source * t->count + i];
  }
  if (t->kind == TRAIN_EXTENSION_BIAS && init == TRAIN_EXTEND_COPY_BELOW)
    out[0] += (core_real)train_extension_below(work, t->layer);
}

static void make_values(const train_extension_work *work, const share *own) {
  const core_real *at = own->other;
  for (int32_t i = 0; i < own->count; i++) {
    const train_extension_tensor *t = &work->tensor[own->number[i]];
    bool whole = t->kind == TRAIN_EXTENSION_OLD || t->kind == TRAIN_EXTENSION_EXPERT;
    if (whole)
      memcpy(own->list[i].data, at, (size_t)t->count * sizeof *at);
    else
      make_column(work, t, at, own->list[i].data);
    at += t->from_count;
  }
}

/* Nothing but routers may differ in what was tuned. */
static core_status compare_values(const train_extension_work *work, const share *own) {
  const core_real *at = own->other;
  for (int32_t i = 0; i < own->count; i++) {
    const train_extension_tensor *t = &work->tensor[own->number[i]];
    bool compared = t->kind == TRAIN_EXTENSION_OLD && !is_of_router(t->name);
    CHECK(!compared || memcmp(at, own->list[i].data, (size_t)t->count * sizeof *at) == 0, CORE_ERR_MISMATCH,
          "'%s' of %s differs from that of %s: routers alone may be trained (optimizer.trained)", t->name,
          work->extension->tuned, work->extension->original);
    at += t->from_count;
  }
  return CORE_OK;
}

/* ---- hashes ---- */

/* "HASH NAME" for each old tensor of this rank, hashed as a run's manifest does; malloc'ed. */
static core_status hash_old(const train_extension_work *work, const share *own, char **out) {
  size_t used = 0, room = (size_t)own->count * (CORE_NAME + 24) + 1;
  char *text = calloc(room, 1);
  CHECK(text, CORE_ERR_MEMORY, "no memory for the hashes of %d tensors", own->count);
  for (int32_t i = 0; i < own->count; i++) {
    const train_extension_tensor *t = &work->tensor[own->number[i]];
    if (t->kind != TRAIN_EXTENSION_OLD) continue;
    const char *name = strncmp(t->name, "parameter/", 10) == 0 ? t->name + 10 : t->name;
    uint64_t hash = core_hash(own->list[i].data, (size_t)t->count * sizeof(core_real), core_hash_text(name));
    used += (size_t)snprintf(text + used, room - used, "%016" PRIx64 " %s\n", hash, t->name);
  }
  *out = text;
  return CORE_OK;
}

static core_status report(const train_extension_work *work, const share *own) {
  char *lines = NULL, *all = NULL;
  int64_t *offset = NULL;
  core_status status = comm_agree(work->control, hash_old(work, own, &lines));
  if (status == CORE_OK)
    status = comm_gather_bytes(work->control, 0, lines, (int64_t)strlen(lines) + 1, &all, &offset);
  if (status == CORE_OK && all) {
    int64_t bytes = offset[comm_size(work->control)];
    for (int64_t i = 0; i + 1 < bytes; i++)
      if (all[i] == '\0') all[i] = '\n'; /* between ranks */
    status = train_extension_report_priv(work, all);
  }
  status = comm_agree(work->control, status);
  free(lines), free(all), free(offset);
  TRY(status);
  return CORE_OK;
}

/* ---- writing ---- */

static core_status write_checkpoint(const train_extension_work *work, const share *own) {
  const train_state_meta meta = {.ranks = comm_size(work->control),
                                 .expert_ranks = 1,
                                 .config = (char *)(uintptr_t)core_config_text(work->extended)};
  TRY(train_state_publish(work->control, work->extension->directory, &meta, own->list, own->count));
  return CORE_OK;
}

static core_status write_all(const train_extension_work *work, share *own) {
  TRY(comm_agree(work->control, make_share(work, own)));
  TRY(load(work, &work->source, own));
  make_values(work, own);
  if (work->tuned) {
    TRY(load(work, &work->other, own));
    TRY(comm_agree(work->control, compare_values(work, own)));
  }
  TRY(report(work, own));
  TRY(write_checkpoint(work, own));
  return CORE_OK;
}

core_status train_extension_write_priv(const train_extension_work *work) {
  share own = {0};
  core_status status = write_all(work, &own);
  free_share(&own);
  TRY(status);
  return CORE_OK;
}
