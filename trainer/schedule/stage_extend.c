/* Outline: a stage of kind extend, and what the stages after it take over from it: which layers have how many
 * experts is known only when it is done. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "trainer/extend.h"
#include "trainer/schedule/stages_impl.h"
#include "trainer/state.h"

enum { LIST = 16384 };

/* ---- the extension ---- */

core_status train_stage_extension_sources_priv(train_stages *stages, int32_t i) {
  const train_stage_settings *s = stages->list[i].settings;
  int64_t share = train_settings_thousandths(s->extend.share);
  const char *refusal = NULL;
  if (strcmp(s->from, "none") == 0) refusal = "it has no `from`, which says what is extended";
  if (share < 0 || share > 1000) refusal = "extend.share is no decimal from 0 to 1 with at most three places";
  if (!(s->extend.margin > 0)) refusal = "extend.margin is not above 0";
  if (strcmp(s->extend.tuned, "none") == 0 && train_extension_rule_measures(s->extend.layers))
    refusal = "extend.layers d and lowest compare it with extend.tuned, which is not given";
  if (refusal)
    return core_config_refuse(stages->config, "stages", "'%s' is an extension: %s", s->name, refusal);
  TRY(train_stage_add_source_priv(stages, i, s->from));
  if (strcmp(s->extend.tuned, "none") != 0) TRY(train_stage_add_source_priv(stages, i, s->extend.tuned));
  return CORE_OK;
}

core_status train_stage_extend_priv(comm_world *world, const train_stage *stage) {
  char directory[TRAIN_STAGE_PATH], report[TRAIN_STAGE_PATH], path[TRAIN_STAGE_PATH];
  comm_group *control = comm_control_group(world);
  const char *text = core_config_text(stage->config);
  int32_t made = 0;
  snprintf(directory, sizeof directory, "%s/checkpoints", stage->directory);
  snprintf(report, sizeof report, "%s/extend.json", stage->directory);
  snprintf(path, sizeof path, "%s/config.yaml", stage->directory);
  const train_extension extension = {.comm = world,
                                     .run = stage->config,
                                     .original = stage->source[0].path,
                                     .tuned = stage->sources > 1 ? stage->source[1].path : NULL,
                                     .how = &stage->settings->extend,
                                     .directory = directory,
                                     .report = report};
  TRY(comm_agree(control, comm_rank(control) == 0 ? core_file_replace(path, text, strlen(text)) : CORE_OK));
  TRY(train_stage_is_made_priv(control, directory, &made));
  if (!made) TRY(train_extend(&extension));
  return CORE_OK;
}

void train_stage_extension_text_priv(const train_stage *stage, char *out, size_t capacity) {
  const train_extend_settings *x = &stage->settings->extend;
  size_t used =
      (size_t)snprintf(out, capacity, "layers %.200s, share %.40s, init %d, margin %.9g, split %.200s",
                       x->layers, x->share, x->init, x->margin, x->split);
  for (unsigned i = 0; i < x->classes_count && used + CORE_NAME < capacity; i++)
    used += (size_t)snprintf(out + used, capacity - used, ", class %.80s", x->classes[i]);
}

/* ---- what follows ---- */

int32_t train_stage_extension_priv(const train_stages *stages, int32_t i) {
  if (stages->list[i].settings->kind != TRAIN_STAGE_TRAIN) return -1;
  while (stages->list[i].settings->kind == TRAIN_STAGE_TRAIN && stages->list[i].sources > 0 &&
         stages->list[i].source[0].stage >= 0)
    i = stages->list[i].source[0].stage;
  return stages->list[i].settings->kind == TRAIN_STAGE_EXTEND ? i : -1;
}

/* Every layer's experts and how many of them are added, `more` of them for now, as overrides. */
static void put_lists(const train_settings *s, int64_t more, char experts[LIST], char added[LIST]) {
  size_t one = (size_t)snprintf(experts, LIST, "model.moe.layer_experts=[");
  size_t other = (size_t)snprintf(added, LIST, "model.moe.added=[");
  for (int64_t j = 0; j < train_settings_mixtures(s) && one + 32 < LIST && other + 32 < LIST; j++) {
    one += (size_t)snprintf(experts + one, LIST - one, "%s%lld", j ? ", " : "",
                            (long long)(train_settings_experts(s, j) + more));
    other += (size_t)snprintf(added + other, LIST - other, "%s%lld", j ? ", " : "",
                              (long long)(train_settings_added(s, j) + more));
  }
  snprintf(experts + one, LIST - one, "]");
  snprintf(added + other, LIST - other, "]");
}

static core_status derive(train_stages *stages, int32_t i, const train_settings *from, int64_t more) {
  char *list = malloc(2 * (size_t)LIST);
  CHECK(list, CORE_ERR_MEMORY, "no memory for the configuration of a stage");
  const char *word[] = {list, list + LIST, "model.moe.added_bias=true"};
  put_lists(from, more, list, list + LIST);
  core_config *config = NULL;
  core_status status = train_stage_resolve_priv(stages, i, word, from->model.moe.added_bias ? 3 : 2, &config);
  free(list);
  TRY(status);
  core_config_destroy(stages->list[i].config);
  stages->list[i].config = config;
  return CORE_OK;
}

core_status train_stage_expect_extension_priv(train_stages *stages, int32_t i) {
  int32_t k = train_stage_extension_priv(stages, i);
  const train_settings *s = core_config_data(stages->list[i].config);
  if (k < 0) return CORE_OK;
  if (s->model.moe.added_count > 0)
    return core_config_refuse(stages->config, "stages",
                              "'%s' begins with what '%s' extends, which says how many experts are added: "
                              "leave model.moe.added empty",
                              stages->list[i].settings->name, stages->list[k].settings->name);
  TRY(derive(stages, i, s, 1));
  return CORE_OK;
}

core_status train_stage_take_extension_priv(comm_group *control, train_stages *stages, int32_t i) {
  int32_t k = train_stage_extension_priv(stages, i);
  char path[TRAIN_STAGE_PATH];
  ckpt_reader *reader = NULL;
  train_state_meta meta = {0};
  core_config *made = NULL;
  if (k < 0 || !stages->list[k].done) return CORE_OK;
  snprintf(path, sizeof path, "%s/checkpoints/step-00000000", stages->list[k].directory);
  TRY(ckpt_reader_open(control, path, &reader));
  core_status status = train_state_meta_read(ckpt_reader_meta(reader), &meta);
  if (status == CORE_OK)
    status =
        core_config_load(train_settings_spec(), "the extended configuration", meta.config, NULL, 0, &made);
  if (status == CORE_OK) status = derive(stages, i, core_config_data(made), 0);
  if (status == CORE_OK) status = train_settings_check(stages->list[i].config, stages->list[i].ranks);
  core_config_destroy(made);
  free(meta.config);
  ckpt_reader_close(reader);
  TRY(comm_agree(control, status));
  return CORE_OK;
}
