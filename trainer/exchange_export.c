/* Outline: every parameter and standardisation of the checkpoint into memory, adapters folded in; each cut
 * into the tensors that it is published as, which are rows of it and need no copy; all files into a directory
 * that is renamed last.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* rmdir */

#include "checkpoint/checkpoint.h"
#include "core/file.h"
#include "core/log.h"
#include "trainer/exchange.h"
#include "trainer/lora_merge.h"

enum { PATH = 2048 };

typedef struct export {
  ckpt_reader *reader;
  train_merged model;
  const train_settings *settings;
  ckpt_safetensors_source *source; /* [sources] */
  int32_t sources;
}
export;

/* ---- reading ---- */

static const char *after(const char *name, const char *prefix) {
  size_t length = strlen(prefix);
  return strncmp(name, prefix, length) == 0 ? name + length : NULL;
}

/* What it is called outside, before rules are applied; NULL: not exported (the optimizer's state). */
static const char *outside_name(const char *name, char text[CORE_NAME + 32]) {
  const char *rest = after(name, "parameter/");
  if (rest) return rest;
  for (int i = 0; i < 2; i++) {
    static const char *const kinds[] = {"latent_shift", "latent_scale"};
    size_t length = strlen(kinds[i]);
    if (strncmp(name, kinds[i], length) != 0 || name[length] != '/') continue;
    snprintf(text, CORE_NAME + 32, "%s.%s", kinds[i], name + length + 1);
    return text;
  }
  return NULL;
}

/* ---- cutting ---- */

static core_status cut(export *ex, const ckpt_tensor *tensor) {
  train_exchange_entry entry = {.rank = tensor->rank};
  char text[CORE_NAME + 32];
  snprintf(entry.name, sizeof entry.name, "%s", outside_name(tensor->name, text));
  memcpy(entry.shape, tensor->shape, sizeof entry.shape);
  TRY(train_exchange_map(ex->settings, &entry));
  const core_real *data = tensor->data;
  int64_t row = tensor->shape[0] > 0 ? tensor->count / tensor->shape[0] : 0;
  for (int32_t i = 0; i < entry.pieces; i++) {
    ckpt_safetensors_source *source = &ex->source[ex->sources++];
    snprintf(source->name, sizeof source->name, "%s", entry.piece[i]);
    source->rank = entry.rank;
    memcpy(source->shape, entry.shape, sizeof source->shape);
    source->shape[0] = entry.rows[i];
    source->data = data;
    data += entry.rows[i] * row;
  }
  return CORE_OK;
}

static core_status cut_all(export *ex) {
  ex->source = calloc((size_t)ex->model.count * TRAIN_EXCHANGE_PIECES, sizeof *ex->source);
  CHECK(ex->source, CORE_ERR_MEMORY, "no memory for %d tensors", ex->model.count);
  for (int32_t i = 0; i < ex->model.count; i++) TRY(cut(ex, &ex->model.list[i]));
  return CORE_OK;
}

/* ---- writing ---- */

static const char *const written[] = {"model.safetensors", "config.yaml", "config.json"};

static core_status write_text(const char *directory, const char *name, const char *text) {
  char path[PATH + 64];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  TRY(core_file_replace(path, text, strlen(text)));
  return CORE_OK;
}

static core_status write_files(const export *ex, const char *directory, core_dtype dtype) {
  static const char *const metadata[] = {"format", "pt", NULL};
  char path[PATH + 64], *json = NULL;
  TRY(core_file_make_directories(directory));
  TRY(train_exchange_write_config(ex->settings, dtype, &json));
  core_status status = json ? write_text(directory, "config.json", json) : CORE_OK;
  free(json);
  TRY(status);
  TRY(write_text(directory, "config.yaml", core_config_text(ex->model.config)));
  snprintf(path, sizeof path, "%s/model.safetensors", directory);
  TRY(ckpt_safetensors_write(path, ex->source, ex->sources, dtype, metadata));
  return CORE_OK;
}

static void remove_files(const char *directory) {
  char path[PATH + 64];
  for (size_t i = 0; i < sizeof written / sizeof *written; i++) {
    snprintf(path, sizeof path, "%s/%s", directory, written[i]);
    (void)unlink(path);
  }
  (void)rmdir(directory);
}

static core_status publish(const export *ex, const char *directory, core_dtype dtype) {
  char temporary[PATH];
  snprintf(temporary, sizeof temporary, "%s.tmp", directory);
  core_status status = write_files(ex, temporary, dtype);
  if (status == CORE_OK) status = core_file_rename(temporary, directory);
  if (status == CORE_OK) return CORE_OK;
  core_error saved;
  core_error_save(&saved);
  remove_files(temporary);
  (void)core_error_restore(&saved);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

/* ---- the whole ---- */

static core_status run(export *ex, comm_group *control, const char *checkpoint, const char *directory,
                       core_dtype dtype) {
  CHECK(strlen(directory) + 8 < PATH, CORE_ERR_ARGUMENT, "a directory name of %zu bytes", strlen(directory));
  CHECK(!core_file_exists(directory), CORE_ERR_ARGUMENT, "%s is there already", directory);
  TRY(ckpt_reader_open(control, checkpoint, &ex->reader));
  TRY(train_merged_read(control, ex->reader, &ex->model));
  ex->settings = core_config_data(ex->model.config);
  TRY(cut_all(ex));
  TRY(publish(ex, directory, dtype));
  LOG_INFO("exported %d parameters of %s as %d tensors into %s", ex->model.count, checkpoint, ex->sources,
           directory);
  return CORE_OK;
}

core_status train_export(comm_group *control, const char *checkpoint, const char *directory,
                         core_dtype dtype) {
  export ex = {0};
  CHECK(comm_size(control) == 1, CORE_ERR_ARGUMENT, "export runs on one rank, not on %d", comm_size(control));
  core_status status = run(&ex, control, checkpoint, directory, dtype);
  ckpt_reader_close(ex.reader);
  train_merged_free(&ex.model);
  free(ex.source);
  TRY(status);
  return CORE_OK;
}
