/* Outline: open and compare the checkpoints, count on held-out data, choose, see that what comes of it has
 * room, make it. */
#include "trainer/extend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "trainer/extend_impl.h"
#include "trainer/lora_merge.h" /* train_lora_find_adapter */

enum { LIST = 16384 };

/* ---- the checkpoints ---- */

static core_status check_original(const train_extension_work *work) {
  const train_settings *s = core_config_data(work->config);
  const char *path = work->extension->original;
  CHECK(s->model.kind != TRAIN_KIND_CONNECTOR, CORE_ERR_ARGUMENT,
        "%s is a connector between latent spaces: towers and decoders are extended", path);
  CHECK(train_settings_mixtures(s) > 0 && !train_settings_dense(s), CORE_ERR_ARGUMENT,
        "%s has no mixture that could be extended", path);
  CHECK(s->model.moe.partition == TRAIN_PARTITION_NONE, CORE_ERR_ARGUMENT,
        "%s divides its experts among the modalities (model.moe.partition): it is not extended", path);
  for (unsigned i = 0; i < s->model.moe.added_count; i++)
    CHECK(s->model.moe.added[i] == 0, CORE_ERR_ARGUMENT,
          "%s has added experts already (model.moe.added): extension goes once from a model without", path);
  ckpt_tensor adapter;
  CHECK(!train_lora_find_adapter(&work->source, &adapter), CORE_ERR_ARGUMENT,
        "%s has adapters ('%s'): merge them first (antiphon merge)", path, adapter.name);
  return CORE_OK;
}

static core_status read_config(train_extension_work *work) {
  train_state_meta meta;
  TRY(train_state_meta_read(ckpt_reader_meta(work->original), &meta));
  core_status status = core_config_load(train_settings_spec(), "the original's configuration", meta.config,
                                        NULL, 0, &work->config);
  free(meta.config);
  TRY(status);
  TRY(check_original(work));
  return CORE_OK;
}

static core_status check_rule(const train_extension *x) {
  CHECK(x->tuned || !train_extension_rule_measures(x->how->layers), CORE_ERR_ARGUMENT,
        "extend.layers '%s' compares the model with itself after its routers alone were trained: that one "
        "must be given (tuned)",
        x->how->layers);
  return CORE_OK;
}

static core_status open_all(train_extension_work *work) {
  const train_extension *x = work->extension;
  TRY(comm_agree(work->control, check_rule(x)));
  TRY(comm_agree(work->control,
                 comm_rank(work->control) == 0 ? train_state_target(x->directory, 0) : CORE_OK));
  TRY(ckpt_reader_open(work->control, x->original, &work->original));
  TRY(train_source_open(work->control, work->original, &work->source));
  if (x->tuned) TRY(ckpt_reader_open(work->control, x->tuned, &work->tuned));
  if (x->tuned) TRY(train_source_open(work->control, work->tuned, &work->other));
  core_status status = read_config(work);
  if (status == CORE_OK && x->tuned) status = train_extension_compare_priv(work);
  TRY(comm_agree(work->control, status));
  return CORE_OK;
}

/* ---- counting ---- */

static core_status count(const train_extension_work *work, ckpt_reader *reader, train_measurement *out) {
  const train_extension *x = work->extension;
  const train_settings *run = core_config_data(x->run);
  const char *split = x->how->split[0] ? x->how->split : run->data.validation;
  const train_measure_options options = {
      .comm = x->comm, .run = x->run, .checkpoint = reader, .split = split};
  TRY(train_measure(&options, out));
  LOG_INFO("%s: choices of %lld samples of %s counted; %s %.4f", ckpt_reader_path(reader),
           (long long)out->samples, split, out->decoder ? "loss" : "mean R@1", out->quality);
  return CORE_OK;
}

/* ---- what is made ---- */

/* "model.moe.layer_experts=[4, 5]" and the added ones. */
static void put_lists(const train_extension_choice *choice, char experts[LIST], char added[LIST]) {
  size_t one = (size_t)snprintf(experts, LIST, "model.moe.layer_experts=[");
  size_t other = (size_t)snprintf(added, LIST, "model.moe.added=[");
  for (int32_t j = 0; j < choice->layers && one + 32 < LIST && other + 32 < LIST; j++) {
    const train_extension_layer *layer = &choice->layer[j];
    one += (size_t)snprintf(experts + one, LIST - one, "%s%lld", j ? ", " : "",
                            (long long)(layer->experts + layer->chosen));
    other += (size_t)snprintf(added + other, LIST - other, "%s%d", j ? ", " : "", layer->chosen);
  }
  snprintf(experts + one, LIST - one, "]");
  snprintf(added + other, LIST - other, "]");
}

/* The extended configuration; and that a model of it is sound and has room. */
static core_status configure(train_extension_work *work) {
  const train_extension *x = work->extension;
  const train_settings *run = core_config_data(x->run);
  char *experts = malloc(2 * (size_t)LIST), *added = experts ? experts + LIST : NULL;
  bool below = x->how->init == TRAIN_EXTEND_COPY_BELOW;
  core_status status = experts ? CORE_OK
                               : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                                  "no memory for the configuration of an extension");
  status = comm_agree(work->control, status);
  if (status == CORE_OK) {
    put_lists(&work->choice, experts, added);
    const char *word[] = {experts, added, "checkpoint.contents=all", "model.moe.added_bias=true"};
    const int32_t words = below ? 4 : 3;
    status = core_config_load(train_settings_spec(), "the extended configuration",
                              core_config_text(work->config), word, words, &work->extended);
    status = comm_agree(work->control, status);
    const train_measure_options options = {.comm = x->comm,
                                           .run = x->run,
                                           .checkpoint = work->original,
                                           .split = x->how->split[0] ? x->how->split : run->data.validation,
                                           .model = word,
                                           .model_count = words};
    if (status == CORE_OK) status = train_measure_room(&options);
    if (status != CORE_OK) status = core_error_context(status, "the extended model");
  }
  free(experts);
  TRY(status);
  return CORE_OK;
}

static core_status run(train_extension_work *work) {
  const train_extension *x = work->extension;
  uint64_t seed = ((const train_settings *)core_config_data(x->run))->run.seed;
  TRY(open_all(work));
  TRY(count(work, work->original, &work->before));
  if (work->tuned) TRY(count(work, work->tuned, &work->after));
  TRY(comm_agree(work->control, train_extension_choose(x->how, seed, &work->before,
                                                       work->tuned ? &work->after : NULL, &work->choice)));
  TRY(configure(work));
  train_extension_print_priv(work);
  TRY(comm_agree(work->control, train_extension_list_priv(work)));
  TRY(train_extension_write_priv(work));
  LOG_INFO("extended %d of %d MoE layers of %s into %s/step-00000000", work->choice.wanted,
           work->choice.layers, x->original, x->directory);
  return CORE_OK;
}

core_status train_extend(const train_extension *extension) {
  train_extension_work work = {.extension = extension, .control = comm_control_group(extension->comm)};
  core_status status = run(&work);
  train_source_close(&work.source);
  train_source_close(&work.other);
  ckpt_reader_close(work.original);
  ckpt_reader_close(work.tuned);
  core_config_destroy(work.config);
  core_config_destroy(work.extended);
  train_measurement_free(&work.before);
  train_measurement_free(&work.after);
  free(work.choice.layer);
  free(work.tensor);
  TRY(status);
  return CORE_OK;
}
