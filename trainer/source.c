#include "trainer/source.h"

#include <limits.h> /* PATH_MAX */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- finding a base ---- */

/* The run directory of a checkpoint, <run>/checkpoints/step-X, whatever name it is known by. */
static bool run_of(const char *checkpoint, char out[PATH_MAX]) {
  if (!realpath(checkpoint, out)) return false;
  for (int i = 0; i < 2; i++) {
    char *slash = strrchr(out, '/');
    if (!slash) return false;
    *slash = '\0';
  }
  return true;
}

static core_status locate(const ckpt_reader *of, const train_base *base, char out[TRAIN_BASE_PATH]) {
  char run[PATH_MAX];
  int length = -1;
  if (base->relative[0] && run_of(ckpt_reader_path(of), run))
    length = snprintf(out, TRAIN_BASE_PATH, "%s/%s", run, base->relative);
  if (length > 0 && length < TRAIN_BASE_PATH && ckpt_is(out)) return CORE_OK;
  snprintf(out, TRAIN_BASE_PATH, "%s", base->path);
  CHECK(ckpt_is(out), CORE_ERR_NOT_FOUND,
        "%s holds what was trained alone; its base is neither at %s from its run directory nor at %s",
        ckpt_reader_path(of), base->relative[0] ? base->relative : "(nowhere)", base->path);
  return CORE_OK;
}

/* The base of the last checkpoint of the chain, if it has one. */
static core_status open_next(comm_group *control, train_source *s, bool *more) {
  const ckpt_reader *of = s->reader[s->count - 1];
  train_state_meta meta;
  char path[TRAIN_BASE_PATH] = "";
  TRY(train_state_meta_read(ckpt_reader_meta(of), &meta));
  free(meta.config);
  *more = meta.base.path[0] != '\0';
  if (!*more) return CORE_OK;
  CHECK(s->count < TRAIN_MOST_SOURCES, CORE_ERR_UNSUPPORTED, "%s: a chain of more than %d bases",
        ckpt_reader_path(s->reader[0]), (int)TRAIN_MOST_SOURCES - 1);
  TRY(comm_agree(control, comm_rank(control) == 0 ? locate(of, &meta.base, path) : CORE_OK));
  TRY(comm_broadcast(control, 0, path, sizeof path));
  TRY(ckpt_reader_open(control, path, &s->reader[s->count]));
  uint64_t hash = ckpt_reader_content_hash(s->reader[s->count++]);
  CHECK(hash == meta.base.hash, CORE_ERR_MISMATCH,
        "%s was trained on a base of content %016llx, but %s has %016llx: it is another one",
        ckpt_reader_path(of), (unsigned long long)meta.base.hash, path, (unsigned long long)hash);
  return CORE_OK;
}

core_status train_source_open(comm_group *control, ckpt_reader *own, train_source *out) {
  bool more = true;
  *out = (train_source){.reader = {own}, .count = 1};
  while (more) {
    core_status status = open_next(control, out, &more);
    if (status == CORE_OK) continue;
    train_source_close(out);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

void train_source_close(train_source *source) {
  for (int32_t i = 1; i < source->count; i++) ckpt_reader_close(source->reader[i]);
  source->count = 0;
}

/* ---- tensors ---- */

ckpt_reader *train_source_find(const train_source *source, const char *name, ckpt_tensor *found) {
  for (int32_t i = 0; i < source->count; i++) {
    if (ckpt_reader_find(source->reader[i], name, found) == CORE_OK) return source->reader[i];
    core_error_clear();
  }
  return NULL;
}

static bool is_of_model(const char *name) {
  static const char *const kinds[] = {"parameter/", "latent_shift/", "latent_scale/"};
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (strncmp(name, kinds[i], strlen(kinds[i])) == 0) return true;
  return false;
}

core_status train_source_visit(const train_source *source, train_source_visitor visit, void *context) {
  for (int32_t r = 0; r < source->count; r++)
    for (int32_t i = 0; i < ckpt_reader_count(source->reader[r]); i++) {
      ckpt_tensor at, found;
      ckpt_reader_at(source->reader[r], i, &at);
      bool first = train_source_find(source, at.name, &found) == source->reader[r];
      if (first && is_of_model(at.name)) TRY(visit(context, &at));
    }
  return CORE_OK;
}

core_status train_source_load(const train_source *source, const ckpt_tensor *list, int32_t count) {
  ckpt_tensor *part = malloc(((size_t)count + 1) * sizeof *part), found;
  CHECK(part, CORE_ERR_MEMORY, "no memory for the list of %d tensors", count);
  core_status status = CORE_OK;
  for (int32_t i = 0; i < source->count && status == CORE_OK; i++) {
    int32_t n = 0;
    for (int32_t t = 0; t < count; t++) {
      const ckpt_reader *holder = train_source_find(source, list[t].name, &found);
      /* what is nowhere is asked of the first, whose error names it */
      if (holder == source->reader[i] || (!holder && i == 0)) part[n++] = list[t];
    }
    status = ckpt_reader_load(source->reader[i], part, n);
  }
  free(part);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

core_status train_source_model(comm_group *control, ckpt_reader *own, train_model *model) {
  train_state_tensors wanted = {0};
  train_source source = {.count = 0};
  core_status status = comm_agree(control, train_state_list(model, NULL, TRAIN_STATE_LOAD_MODEL, &wanted));
  if (status == CORE_OK) status = train_source_open(control, own, &source);
  if (status == CORE_OK) status = train_source_load(&source, wanted.list, wanted.count);
  train_source_close(&source);
  train_state_free(&wanted);
  if (status == CORE_OK) status = comm_agree(control, train_state_loaded(model));
  TRY(status);
  return CORE_OK;
}

/* ---- runs that save what is trained alone ---- */

static void parameter_name(const train_parameter *p, char out[CORE_NAME + 16]) {
  snprintf(out, CORE_NAME + 16, "parameter/%s", p->name);
}

core_status train_base_begin(const train_model *model, const train_source *source, train_base *out) {
  ckpt_reader *whole = source->reader[0];
  char name[CORE_NAME + 16], absolute[PATH_MAX];
  ckpt_tensor found;
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    parameter_name(p, name);
    if (p->frozen && !train_source_find(source, name, &found))
      return core_config_refuse(model->env->config, "checkpoint.contents",
                                "'%s' is frozen and not in %s: no checkpoint would hold it; expected all",
                                p->name, ckpt_reader_path(whole));
  }
  const char *path = realpath(ckpt_reader_path(whole), absolute) ? absolute : ckpt_reader_path(whole);
  CHECK(strlen(path) < TRAIN_BASE_PATH, CORE_ERR_ARGUMENT, "the path %.100s... is too long", path);
  snprintf(out->path, sizeof out->path, "%s", path);
  out->hash = ckpt_reader_content_hash(whole);
  return CORE_OK;
}

core_status train_base_resume(const train_model *model, const train_source *source, train_base *out) {
  train_state_meta meta;
  char name[CORE_NAME + 16];
  ckpt_tensor found;
  if (source->count < 2)
    return core_config_refuse(model->env->config, "checkpoint.contents",
                              "%s holds everything: a run begins to save what is trained alone with --from",
                              ckpt_reader_path(source->reader[0]));
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    parameter_name(p, name);
    if (p->frozen && train_source_find(source, name, &found) == source->reader[0])
      return core_config_refuse(model->env->config, "checkpoint.contents",
                                "'%s' was trained in this run and is frozen now: no further checkpoint would "
                                "hold it; expected all",
                                p->name);
  }
  TRY(train_state_meta_read(ckpt_reader_meta(source->reader[0]), &meta));
  free(meta.config);
  *out = meta.base;
  snprintf(out->path, sizeof out->path, "%s", ckpt_reader_path(source->reader[1]));
  return CORE_OK;
}

void train_base_relate(train_base *base, const char *directory) {
  char from[PATH_MAX], to[PATH_MAX];
  size_t shared = 0, length = 0;
  base->relative[0] = '\0';
  if (!realpath(directory, from) || !realpath(base->path, to)) return;
  for (size_t i = 0; from[i] == to[i] && from[i] != '\0'; i++)
    if (from[i] == '/') shared = i;
  size_t end = strlen(from);
  if (strncmp(from, to, end) == 0 && to[end] == '/') shared = end; /* below the run itself */
  for (const char *at = from + shared; *at; at++)
    if (*at == '/' && length + 3 < TRAIN_BASE_PATH)
      length += (size_t)snprintf(base->relative + length, TRAIN_BASE_PATH - length, "../");
  int rest = snprintf(base->relative + length, TRAIN_BASE_PATH - length, "%s", to + shared + 1);
  if (rest < 0 || (size_t)rest >= TRAIN_BASE_PATH - length) base->relative[0] = '\0';
}
