/* Outline: an exported model brings its own configuration; the widths of its latents are the lengths of their
 * standardisation; with these the model is declared on paper, as for a run in one process, and its parameters
 * are what must be there. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/exchange.h"
#include "trainer/model/tower.h"

static const char *const kinds[] = {"latent_shift", "latent_scale"};

bool train_exchange_is_own(const ckpt_safetensors *files) {
  static const char own[] = "antiphon.";
  for (int32_t i = 0; i < ckpt_safetensors_count(files); i++)
    if (strncmp(ckpt_safetensors_at(files, i)->name, own, sizeof own - 1) == 0) return true;
  return false;
}

void train_exchange_stored_name(const char *name, char *out, size_t capacity) {
  for (int i = 0; i < 2; i++) {
    size_t length = strlen(kinds[i]);
    if (strncmp(name, kinds[i], length) != 0 || name[length] != '.') continue;
    snprintf(out, capacity, "%s/%s", kinds[i], name + length + 1);
    return;
  }
  snprintf(out, capacity, "parameter/%s", name);
}

static core_status find_width(const train_settings *s, const ckpt_safetensors *files, int32_t m,
                              int64_t *width) {
  char name[CKPT_SAFETENSORS_NAME];
  snprintf(name, sizeof name, "antiphon.latent_shift.%s", s->data.modalities[m].name);
  const ckpt_safetensor *tensor = ckpt_safetensors_find(files, name);
  CHECK(tensor, CORE_ERR_MISMATCH, "an exported model lacks tensor '%s'", name);
  CHECK(tensor->rank == 1 && tensor->count > 0 && tensor->count <= 1 << 24, CORE_ERR_MISMATCH,
        "tensor '%s' is of rank %d with %lld numbers, expected rank 1 and the width of the latents", name,
        tensor->rank, (long long)tensor->count);
  *width = tensor->count;
  return CORE_OK;
}

static core_status declare(const core_config *config, const ckpt_safetensors *files, train_env *env,
                           train_model **out) {
  const train_settings *s = core_config_data(config);
  int64_t width[CORE_MAX_MODALITIES];
  env->config = config;
  env->settings = s;
  env->layout.ranks = env->layout.expert_ranks = env->layout.groups = 1;
  env->layout.modalities = (int32_t)s->data.modalities_count;
  for (int32_t m = 0; m < env->layout.modalities; m++) {
    env->layout.slot_count[m] = 1;
    TRY(find_width(s, files, m, &width[m]));
  }
  TRY(train_model_create(env, width, out));
  return CORE_OK;
}

static core_status add(const train_settings *s, const char *name, int32_t rank, const int64_t *shape,
                       train_exchange_entry *entry) {
  snprintf(entry->name, sizeof entry->name, "%s", name);
  entry->rank = rank;
  for (int32_t i = 0; i < CORE_MAX_RANK; i++) entry->shape[i] = i < rank ? shape[i] : 1;
  TRY(train_exchange_map(s, entry));
  return CORE_OK;
}

static core_status list_all(const train_model *model, train_exchange_entry *list, int32_t *count) {
  const train_settings *s = model->env->settings;
  *count = 0;
  for (int32_t i = 0; i < model->parameters.count; i++) {
    const train_parameter *p = &model->parameters.list[i];
    TRY(add(s, p->name, p->rank, p->shape, &list[(*count)++]));
  }
  for (int32_t m = 0; m < model->env->layout.modalities; m++)
    for (int i = 0; i < 2; i++) {
      char name[CORE_NAME];
      snprintf(name, sizeof name, "%s.%s", kinds[i], s->data.modalities[m].name);
      TRY(add(s, name, 1, &model->limits.width[m], &list[(*count)++]));
    }
  return CORE_OK;
}

core_status train_exchange_list_own(const core_config *config, const ckpt_safetensors *files,
                                    train_exchange_entry **list, int32_t *count) {
  train_env env = {0};
  train_model *model = NULL;
  core_status status = declare(config, files, &env, &model);
  *list = NULL;
  if (status == CORE_OK) {
    size_t most = (size_t)model->parameters.count + 2 * CORE_MAX_MODALITIES;
    *list = calloc(most, sizeof **list);
    status = *list ? list_all(model, *list, count)
                   : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                      "no memory for a list of %zu parameters", most);
  }
  train_model_destroy(model);
  if (status == CORE_OK) return CORE_OK;
  free(*list);
  *list = NULL;
  return core_error_trace(status, __func__, __FILE__, __LINE__);
}
