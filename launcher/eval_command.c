/* antiphon eval */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launcher/eval_generate.h"
#include "launcher/launcher.h"
#include "trainer/caption.h"
#include "trainer/health.h"
#include "trainer/metrics.h"
#include "trainer/retrieval.h"
#include "trainer/source.h"
#include "trainer/zero_shot.h"

enum { PATH = 1024 };

/* What is evaluated, and how. */
typedef struct evaluation {
  const launch_arguments *arguments;
  ckpt_reader *reader;
  const train_state_meta *meta;
  const char *data; /* directory of splits */
  const char *split;
  char classes[PATH], inside[256]; /* zero-shot: directory and split of the prompts */
  int32_t items, prompts;          /* zero-shot: modalities */
  int64_t width[CORE_MAX_MODALITIES];
} evaluation;

static core_status load(train_session *session, const evaluation *e) {
  session->env.step = e->meta->step;
  TRY(train_source_model(session->env.control, e->reader, session->model));
  return CORE_OK;
}

/* ---- retrieval ---- */

static core_status print_retrieval(const train_session *session, const evaluation *e,
                                   const train_retrieval *result) {
  if (e->arguments->json) {
    TRY(train_metrics_print(session->model, e->meta->step, result, stdout));
    return CORE_OK;
  }
  printf("%s, step %lld, %lld samples\n", ckpt_reader_path(e->reader), (long long)e->meta->step,
         (long long)result->samples);
  train_retrieval_print(result, session->env.settings, stdout);
  train_health_print(&session->model->sums, session->env.settings, stdout);
  train_health_print_new(&session->model->sums, session->env.settings, stdout);
  return CORE_OK;
}

static core_status retrieve(train_session *session, const evaluation *e) {
  train_retrieval *result = calloc(1, sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = train_retrieval_run(session, result);
  if (status == CORE_OK && comm_rank(session->env.world) == 0) status = print_retrieval(session, e, result);
  free(result);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- a decoder ---- */

static core_status measure_captions(train_session *session, const evaluation *e) {
  train_caption result;
  TRY(train_caption_run(session, &result));
  if (comm_rank(session->env.world) != 0) return CORE_OK;
  if (e->arguments->json)
    printf("{\"step\":%" PRId64 ",\"evaluation\":{\"samples\":%" PRId64 ",\"predictions\":%" PRId64
           ",\"next_token\":%.9g,\"new_experts\":%.9g}}\n",
           e->meta->step, result.samples, result.predictions, result.loss,
           train_health_new(&session->model->sums, session->env.settings, -1));
  else
    printf("%s, step %" PRId64 ", %" PRId64 " samples\n%" PRId64
           " response tokens: loss %.4f, perplexity %.3f\n",
           ckpt_reader_path(e->reader), e->meta->step, result.samples, result.predictions, result.loss,
           exp(result.loss));
  if (!e->arguments->json) train_health_print_new(&session->model->sums, session->env.settings, stdout);
  return CORE_OK;
}

/* ---- zero-shot ---- */

static core_status classify(train_session *session, const evaluation *e) {
  train_zero_shot result;
  const train_modality_settings *list = session->env.settings->data.modalities;
  const char *const names[2] = {list[e->items].name, list[e->prompts].name};
  TRY(train_zero_shot_run(session, &result));
  if (comm_rank(session->env.world) != 0) return CORE_OK;
  if (e->arguments->json) {
    printf("{\"step\":%" PRId64 ",\"zero_shot\":{", e->meta->step);
    train_zero_shot_json(&result, names, stdout);
    printf("}}\n");
  } else {
    printf("%s, step %lld\n", ckpt_reader_path(e->reader), (long long)e->meta->step);
    train_zero_shot_print(&result, names, stdout);
  }
  return CORE_OK;
}

static core_status find_modality(const train_settings *s, const char *option, const char *name,
                                 int32_t *out) {
  char known[512] = "";
  for (unsigned m = 0; m < s->data.modalities_count && strlen(known) + CORE_NAME < sizeof known; m++)
    snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", m ? ", " : "",
             s->data.modalities[m].name);
  *out = train_settings_modality(s, name);
  CHECK(*out >= 0, CORE_ERR_ARGUMENT, "%s: the model has no modality '%s'; it has: %s", option, name, known);
  return CORE_OK;
}

/* The model's widths are the checkpoint's: neither split has all modalities. */
static core_status find_widths(const train_settings *s, evaluation *e) {
  for (unsigned m = 0; m < s->data.modalities_count; m++) {
    char name[2 * CORE_NAME];
    ckpt_tensor tensor;
    snprintf(name, sizeof name, "latent_shift/%s", s->data.modalities[m].name);
    TRY(ckpt_reader_find(e->reader, name, &tensor));
    e->width[m] = tensor.shape[0];
  }
  return CORE_OK;
}

/* CLASSES is a split of DATA by its name, or the path of a split. */
static core_status find_classes(evaluation *e) {
  const char *path = launch_own(e->arguments, "--zero-shot"), *slash = strrchr(path, '/');
  while (slash && !slash[1] && slash > path) { /* path/ */
    do slash--;
    while (slash > path && *slash != '/');
    if (*slash != '/') slash = NULL;
  }
  size_t directory = slash ? (size_t)(slash - path) : strlen(e->data);
  const char *name = slash ? slash + 1 : path;
  size_t length = strcspn(name, "/");
  CHECK(directory + 1 < sizeof e->classes && length > 0 && length < sizeof e->inside, CORE_ERR_ARGUMENT,
        "--zero-shot: '%s' is no split of %s and no path of a split", path, e->data);
  snprintf(e->classes, sizeof e->classes, "%.*s", (int)directory, slash ? path : e->data);
  if (slash == path) snprintf(e->classes, sizeof e->classes, "/");
  snprintf(e->inside, sizeof e->inside, "%.*s", (int)length, name);
  return CORE_OK;
}

static core_status prepare_zero_shot(const train_settings *s, evaluation *e, train_session_options *options) {
  const launch_arguments *a = e->arguments;
  CHECK(s->model.kind != TRAIN_KIND_DECODER, CORE_ERR_ARGUMENT,
        "--zero-shot compares embeddings; a decoder has none");
  TRY(find_modality(s, "--items", launch_own(a, "--items") ? launch_own(a, "--items") : "image", &e->items));
  TRY(find_modality(s, "--prompts", launch_own(a, "--prompts") ? launch_own(a, "--prompts") : "text",
                    &e->prompts));
  CHECK(e->items != e->prompts, CORE_ERR_ARGUMENT, "items and prompts are of one modality, '%s'",
        s->data.modalities[e->items].name);
  TRY(find_classes(e));
  TRY(find_widths(s, e));
  options->evaluation_split = NULL;
  options->part[0] = (train_part_options){e->data, e->split, e->items};
  options->part[1] = (train_part_options){e->classes, e->inside, e->prompts};
  options->part_count = 2;
  options->width = e->width;
  return CORE_OK;
}

/* ---- both ---- */

static core_status measure(train_session *session, const evaluation *e) {
  if (launch_own(e->arguments, "--generate"))
    TRY(launch_eval_generate(session, e->arguments));
  else if (launch_own(e->arguments, "--zero-shot"))
    TRY(classify(session, e));
  else if (session->env.settings->model.kind == TRAIN_KIND_DECODER)
    TRY(measure_captions(session, e));
  else
    TRY(retrieve(session, e));
  return CORE_OK;
}

static core_status open_and_run(comm_world *world, const core_config *config, evaluation *e) {
  train_session *session = NULL;
  const train_settings *s = core_config_data(config);
  const launch_arguments *a = e->arguments;
  e->data = a->positional_count > 1 ? a->positional[1] : s->data.path;
  e->split = a->split ? a->split : s->data.validation;
  train_session_options options = {.config = config,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_EVALUATE,
                                   .data_path = e->data,
                                   .evaluation_split = e->split,
                                   .without_responses = launch_own(a, "--generate") != NULL};
  if (launch_own(a, "--zero-shot"))
    TRY(comm_agree(comm_control_group(world), prepare_zero_shot(s, e, &options)));
  core_status status = train_session_open(&options, &session);
  if (status == CORE_OK) status = load(session, e);
  if (status == CORE_OK) status = measure(session, e);
  core_error saved;
  core_error_save(&saved);
  train_session_close(session);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static core_status with_config(comm_world *world, evaluation *e) {
  core_config *config = NULL;
  TRY(launch_config(world, "the checkpoint's configuration", e->meta->config, e->arguments, &config));
  core_status status = open_and_run(world, config, e);
  core_config_destroy(config);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status eval(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  evaluation e = {.arguments = arguments};
  train_state_meta meta = {0};
  launch_checkpoint_words words;
  bool parts = launch_own(arguments, "--items") || launch_own(arguments, "--prompts");
  CHECK(launch_own(arguments, "--zero-shot") || !parts, CORE_ERR_USAGE,
        "--items and --prompts belong to --zero-shot");
  launch_checkpoint_defaults(arguments, launch_own(arguments, "--capacity"), &words,
                             comm_size(comm_world_group(world)));
  TRY(launch_checkpoint_open(world, arguments->positional[0], &e.reader));
  core_status status = train_state_meta_read(ckpt_reader_meta(e.reader), &meta);
  e.meta = &meta;
  if (status == CORE_OK) status = with_config(world, &e);
  free(meta.config);
  ckpt_reader_close(e.reader);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  static const launch_option own[] = {{"--zero-shot", true}, {"--items", true},    {"--prompts", true},
                                      {"--capacity", true},  {"--generate", true}, {"--temperature", true},
                                      {"--stop", true},      {NULL, false}};
  return launch_collective_own(command, own, argc, argv, 1, 2, eval);
}

const launch_command launch_eval_command = {
    "eval",
    "a checkpoint on held-out data: retrieval, zero-shot classification, a decoder's loss and responses",
    "usage: antiphon eval CHECKPOINT [DATA] [--split NAME] [--capacity C] [--json] [--set key=value]...\n"
    "       antiphon eval CHECKPOINT [DATA] --zero-shot CLASSES [--items image] [--prompts text] [...]\n"
    "       antiphon eval CHECKPOINT [DATA] --generate N [--temperature T] [--stop TOKEN] [...]\n\n"
    "CHECKPOINT is a checkpoint (RUN/checkpoints/step-NNNNNNNN, or RUN/checkpoints/best of a run with\n"
    "checkpoint.keep_best) or a run directory (its newest sound checkpoint).\n"
    "DATA is a directory of splits; left out, the one the run was trained on.\n"
    "Noise is off and no token is dropped, whatever training used. Prints R@1, R@5 and R@10 next to chance, "
    "and how\neach MoE layer treats each modality.\n\n"
    "  --split NAME         the split of DATA; left out, the run's validation split\n"
    "  --capacity C         for ablations: experts take at most ceil(S K C / E) choices of a routing group\n"
    "  --zero-shot CLASSES  classifies the items of the split by text instead. CLASSES is a split of DATA, "
    "or "
    "the path of\n                       one; it holds shards of the prompts, each with the label of its "
    "class; "
    "several\n                       prompts of a class are averaged. Prints top-1 and top-5 with 95 % "
    "intervals\n"
    "  --items MODALITY     what is classified, by its labels (image)\n"
    "  --prompts MODALITY   of the prompts (text)\n"
    "  --generate N         of a decoder: continues every prompt by at most N tokens, a line of JSON a "
    "sample; "
    "on one rank\n"
    "  --temperature T      draws tokens (by run.seed) instead of taking the likeliest\n"
    "  --stop TOKEN         ends a response, and is not printed\n"
    "  --json               one JSON object instead\n",
    run};
