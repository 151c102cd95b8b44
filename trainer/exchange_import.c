/* Outline: config.json, or the config.yaml of an exported model, gives the configuration, the configuration
 * the parameters, the parameters the tensors that must be there, each of its shape and nothing beside them;
 * then all are read, and only then anything is written: the configuration, then the checkpoint. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint/checkpoint.h"
#include "core/file.h"
#include "core/log.h"
#include "trainer/exchange.h"
#include "trainer/state.h"

enum { PATH = 2048, MOST_YAML = 16 << 20 };

typedef struct import {
  ckpt_safetensors *files;
  core_config *config;
  const train_settings *settings;
  train_exchange_entry *list;
  int32_t count;
  bool *used; /* [tensors of the files] */
  core_real *value;
  ckpt_tensor *tensor; /* [count] */
  char (*name)[CORE_NAME + 16];
  bool own; /* the files are an exported model of ours */
} import;

static int64_t count_of(const train_exchange_entry *entry) {
  int64_t count = 1;
  for (int32_t i = 0; i < entry->rank; i++) count *= entry->shape[i];
  return count;
}

/* ---- what must be there ---- */

static core_status check_shape(const import *im, const ckpt_safetensor *tensor,
                               const train_exchange_entry *entry, int32_t piece) {
  bool good = tensor->rank == entry->rank && tensor->shape[0] == entry->rows[piece] &&
              (entry->rank < 2 || tensor->shape[1] == entry->shape[1]);
  CHECK(good, CORE_ERR_MISMATCH,
        "%s: tensor '%.96s' is [%lld, %lld] of rank %d, expected [%lld, %lld] of rank %d",
        ckpt_safetensors_path(im->files, tensor), tensor->name, (long long)tensor->shape[0],
        (long long)tensor->shape[1], tensor->rank, (long long)entry->rows[piece], (long long)entry->shape[1],
        entry->rank);
  return CORE_OK;
}

static core_status find_pieces(import *im, const train_exchange_entry *entry, const char *source) {
  for (int32_t i = 0; i < entry->pieces; i++) {
    const ckpt_safetensor *tensor = ckpt_safetensors_find(im->files, entry->piece[i]);
    CHECK(tensor, CORE_ERR_MISMATCH, "%s lacks tensor '%s'", source, entry->piece[i]);
    TRY(check_shape(im, tensor, entry, i));
    im->used[tensor - ckpt_safetensors_at(im->files, 0)] = true;
  }
  return CORE_OK;
}

/* Frequencies that old files store follow from the configuration; a tied head may be stored once more. */
static core_status check_extra(const import *im, const ckpt_safetensor *tensor) {
  static const char buffer[] = ".rotary_emb.inv_freq";
  size_t length = strlen(tensor->name), tail = sizeof buffer - 1;
  if (length > tail && strcmp(tensor->name + length - tail, buffer) == 0) return CORE_OK;
  bool head = im->settings->model.tied && strcmp(tensor->name, "lm_head.weight") == 0;
  CHECK(head, CORE_ERR_MISMATCH, "%s: tensor '%.96s' is no part of such a decoder",
        ckpt_safetensors_path(im->files, tensor), tensor->name);
  return CORE_OK;
}

static core_status check_tensors(import *im, const char *source) {
  int32_t stored = ckpt_safetensors_count(im->files);
  im->used = calloc((size_t)stored + 1, sizeof *im->used);
  CHECK(im->used, CORE_ERR_MEMORY, "no memory for %d tensors", stored);
  for (int32_t i = 0; i < im->count; i++) TRY(find_pieces(im, &im->list[i], source));
  for (int32_t i = 0; i < stored; i++)
    if (!im->used[i]) TRY(check_extra(im, ckpt_safetensors_at(im->files, i)));
  return CORE_OK;
}

/* ---- reading ---- */

static core_status read_entry(const import *im, const train_exchange_entry *entry, core_real *value) {
  for (int32_t i = 0; i < entry->pieces; i++) {
    const ckpt_safetensor *tensor = ckpt_safetensors_find(im->files, entry->piece[i]);
    TRY(ckpt_safetensors_read(im->files, tensor, 0, tensor->count, value));
    value += tensor->count;
  }
  return CORE_OK;
}

static core_status compare_head(const import *im) {
  const ckpt_safetensor *head = ckpt_safetensors_find(im->files, "lm_head.weight");
  const ckpt_tensor *embedding = im->tensor;
  if (!im->settings->model.tied || !head) return CORE_OK;
  while (strcmp(embedding->name, "parameter/embedding.weight") != 0) embedding++;
  CHECK(head->count == embedding->count, CORE_ERR_MISMATCH,
        "the head is tied to the embedding, but 'lm_head.weight' has %lld numbers, the embedding %lld",
        (long long)head->count, (long long)embedding->count);
  core_real *value = malloc((size_t)head->count * sizeof *value);
  CHECK(value, CORE_ERR_MEMORY, "no memory for 'lm_head.weight'");
  core_status status = ckpt_safetensors_read(im->files, head, 0, head->count, value);
  bool same = status == CORE_OK && memcmp(value, embedding->data, (size_t)head->count * sizeof *value) == 0;
  free(value);
  TRY(status);
  CHECK(same, CORE_ERR_MISMATCH, "the head is tied to the embedding, but 'lm_head.weight' differs from it");
  return CORE_OK;
}

static core_status read_tensors(import *im) {
  int64_t total = 0;
  size_t count = (uint32_t)im->count; /* never negative */
  for (int32_t i = 0; i < im->count; i++) total += count_of(&im->list[i]);
  im->value = malloc((size_t)total * sizeof *im->value);
  im->tensor = calloc(count, sizeof *im->tensor);
  im->name = calloc(count, sizeof *im->name);
  CHECK(im->value && im->tensor && im->name, CORE_ERR_MEMORY, "no memory for %lld parameters",
        (long long)total);
  core_real *value = im->value;
  for (int32_t i = 0; i < im->count; i++) {
    const train_exchange_entry *entry = &im->list[i];
    train_exchange_stored_name(entry->name, im->name[i], sizeof *im->name);
    im->tensor[i] = (ckpt_tensor){.name = im->name[i],
                                  .dtype = CORE_REAL_DTYPE,
                                  .rank = entry->rank,
                                  .count = count_of(entry),
                                  .data = value,
                                  .owner = true};
    memcpy(im->tensor[i].shape, entry->shape, sizeof im->tensor[i].shape);
    TRY(read_entry(im, entry, value));
    value += count_of(entry);
  }
  TRY(compare_head(im));
  return CORE_OK;
}

/* ---- writing ---- */

static core_status write_checkpoint(const import *im, comm_group *control, const char *directory) {
  const train_state_meta meta = {
      .ranks = 1, .expert_ranks = 1, .config = (char *)(uintptr_t)core_config_text(im->config)};
  TRY(train_state_publish(control, directory, &meta, im->tensor, im->count));
  return CORE_OK;
}

static core_status write_both(const import *im, comm_group *control, const char *yaml,
                              const char *config_path, const char *directory) {
  bool made = !core_file_exists(directory);
  core_status status = core_file_replace(config_path, yaml, strlen(yaml));
  if (status == CORE_OK) status = write_checkpoint(im, control, directory);
  if (status == CORE_OK) return CORE_OK;
  core_error saved;
  core_error_save(&saved);
  (void)remove(config_path);
  if (made) (void)remove(directory);
  (void)core_error_restore(&saved);
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}

/* ---- the whole ---- */

static core_status open_source(import *im, const char *source, char **yaml) {
  char beside[PATH];
  int64_t length = 0;
  struct ckpt_safetensors *files = NULL;
  TRY(ckpt_safetensors_open(source, &files));
  im->files = files;
  CHECK(ckpt_safetensors_count(files) > 0, CORE_ERR_FORMAT, "%s holds no tensors", source);
  const char *first = ckpt_safetensors_path(files, ckpt_safetensors_at(files, 0)),
             *slash = strrchr(first, '/');
  int folder = slash ? (int)(slash - first) + 1 : 0;
  im->own = train_exchange_is_own(files);
  snprintf(beside, sizeof beside, "%.*sconfig.%s", folder, first, im->own ? "yaml" : "json");
  CHECK(core_file_exists(beside), CORE_ERR_NOT_FOUND, "%s: no config.%s lies beside the weights", beside,
        im->own ? "yaml" : "json");
  if (im->own)
    TRY(core_file_read_all(beside, MOST_YAML, yaml, &length));
  else
    TRY(train_exchange_read_config(beside, yaml));
  TRY(core_config_load(train_settings_spec(), beside, *yaml, NULL, 0, &im->config));
  im->settings = core_config_data(im->config);
  TRY(train_settings_check(im->config, im->own ? (int32_t)im->settings->parallel.experts : 1));
  return CORE_OK;
}

static core_status check_targets(const char *config_path, const char *directory) {
  TRY(train_state_target(directory, 0));
  CHECK(!core_file_exists(config_path), CORE_ERR_ARGUMENT, "%s is there already", config_path);
  return CORE_OK;
}

static core_status run(import *im, comm_group *control, const char *source, const char *config_path,
                       const char *directory, char **yaml) {
  TRY(check_targets(config_path, directory));
  TRY(open_source(im, source, yaml));
  TRY(im->own ? train_exchange_list_own(im->config, im->files, &im->list, &im->count)
              : train_exchange_list(im->settings, &im->list, &im->count));
  TRY(check_tensors(im, source));
  TRY(read_tensors(im));
  TRY(write_both(im, control, *yaml, config_path, directory));
  LOG_INFO("imported %d tensors of %s as %d parameters into %s/step-00000000; %s goes with it",
           ckpt_safetensors_count(im->files), source, im->count, directory, config_path);
  return CORE_OK;
}

core_status train_import(comm_group *control, const char *source, const char *config_path,
                         const char *directory) {
import im = {0 };
  char *yaml = NULL;
  CHECK(comm_size(control) == 1, CORE_ERR_ARGUMENT, "import runs on one rank, not on %d", comm_size(control));
  core_status status = run(&im, control, source, config_path, directory, &yaml);
  ckpt_safetensors_close(im.files);
  core_config_destroy(im.config);
  free(im.list), free(im.used), free(im.value), free(im.tensor), free(im.name), free(yaml);
  TRY(status);
  return CORE_OK;
}
