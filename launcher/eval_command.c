/* antiphon eval */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "launcher/launcher.h"
#include "trainer/caption.h"
#include "trainer/generate.h"
#include "trainer/retrieval.h"
#include "trainer/state.h"

/* The stored configuration describes training; here every rank holds all experts and takes whole samples.
 * What the user overrides comes later in the list and so wins. */
static void add_defaults(launch_arguments *arguments, char batch[64], int32_t ranks) {
  launch_arguments given = *arguments;
  snprintf(batch, 64, "optimizer.batch=%d", ranks);
  const char *defaults[] = {"parallel.experts=1", "parallel.placement=shared", "optimizer.accumulate=1",
                            batch, "model.moe.dispatch=dropless"};
  int32_t count = sizeof defaults / sizeof *defaults;
  for (int32_t i = 0; i < count; i++) arguments->override[i] = defaults[i];
  for (int32_t i = 0; i < given.override_count && count + i < LAUNCH_MOST_OVERRIDES; i++)
    arguments->override[count + i] = given.override[i];
  arguments->override_count = count + given.override_count;
  if (arguments->override_count > LAUNCH_MOST_OVERRIDES) arguments->override_count = LAUNCH_MOST_OVERRIDES;
}

static core_status load(train_session *session, ckpt_reader *reader, int64_t step) {
  train_state_tensors tensors;
  core_status status = comm_agree(session->env.control,
                                  train_state_list(session->model, NULL, TRAIN_STATE_LOAD_MODEL, &tensors));
  if (status == CORE_OK) status = ckpt_reader_load(reader, tensors.list, tensors.count);
  train_state_free(&tensors);
  session->env.step = step;
  if (status == CORE_OK) status = comm_agree(session->env.control, train_state_loaded(session->model));
  TRY(status);
  return CORE_OK;
}

static core_status measure_captions(train_session *session, ckpt_reader *reader, int64_t step) {
  train_caption result;
  TRY(train_caption_run(session, &result));
  if (comm_rank(session->env.world) == 0)
    printf("%s, step %lld, %lld samples\n%lld response tokens: loss %.4f, perplexity %.3f\n",
           ckpt_reader_path(reader), (long long)step, (long long)result.samples,
           (long long)result.predictions, result.loss, exp(result.loss));
  return CORE_OK;
}

/* A line of JSON a sample. Where the vocabulary is that of bytes, also what they say. */
static core_status print_tokens(void *context, uint64_t id, const int32_t *token, int64_t count) {
  const train_session *session = context;
  printf("{\"id\":%llu,\"tokens\":[", (unsigned long long)id);
  for (int64_t i = 0; i < count; i++) printf("%s%d", i ? "," : "", token[i]);
  printf("]");
  if (session->model->decoder.V == 256) {
    printf(",\"text\":\"");
    for (int64_t i = 0; i < count; i++) {
      bool plain = token[i] >= 32 && token[i] < 127 && token[i] != '"' && token[i] != '\\';
      printf(plain ? "%c" : "\\u%04x", token[i]);
    }
    printf("\"");
  }
  CHECK(printf("}\n") > 0, CORE_ERR_IO, "the tokens cannot be printed");
  return CORE_OK;
}

static core_status read_number(const char *text, const char *option, double *out) {
  char *end = NULL;
  if (!text) return CORE_OK;
  *out = strtod(text, &end);
  CHECK(end != text && *end == '\0' && *out >= 0 && *out <= 1 << 24, CORE_ERR_USAGE,
        "%s: expected a number from 0 to %d, got '%s'", option, 1 << 24, text);
  return CORE_OK;
}

static core_status generate(train_session *session, const launch_arguments *arguments) {
  double tokens = 0, temperature = 0, stop = -1;
  CHECK(session->env.settings->model.kind == TRAIN_KIND_DECODER, CORE_ERR_ARGUMENT,
        "--generate: only a decoder continues prompts");
  TRY(read_number(arguments->generate, "--generate", &tokens));
  TRY(read_number(arguments->temperature, "--temperature", &temperature));
  TRY(read_number(arguments->stop, "--stop", &stop));
  const train_generate_options options = {(int64_t)tokens, temperature, (int32_t)stop};
  TRY(train_generate_run(session, &options, print_tokens, session));
  return CORE_OK;
}

static core_status measure_retrieval(train_session *session, ckpt_reader *reader, int64_t step) {
  train_retrieval *result = calloc(1, sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = train_retrieval_run(session, result);
  if (status == CORE_OK && comm_rank(session->env.world) == 0) {
    printf("%s, step %lld, %lld samples\n", ckpt_reader_path(reader), (long long)step,
           (long long)result->samples);
    train_retrieval_print(result, session->env.settings, stdout);
  }
  free(result);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status evaluate(train_session *session, ckpt_reader *reader, int64_t step,
                            const launch_arguments *arguments) {
  bool decoder = session->env.settings->model.kind == TRAIN_KIND_DECODER;
  TRY(load(session, reader, step));
  if (arguments->generate)
    TRY(generate(session, arguments));
  else
    TRY(decoder ? measure_captions(session, reader, step) : measure_retrieval(session, reader, step));
  return CORE_OK;
}

static core_status with_config(comm_world *world, const launch_arguments *arguments, ckpt_reader *reader,
                               const train_state_meta *meta) {
  core_config *config = NULL;
  train_session *session = NULL;
  TRY(launch_config(world, "the checkpoint's configuration", meta->config, arguments, &config));
  const train_settings *settings = core_config_data(config);
  train_session_options options = {
      .config = config,
      .comm = world,
      .purpose = TRAIN_PURPOSE_EVALUATE,
      .data_path = arguments->positional_count > 1 ? arguments->positional[1] : settings->data.path,
      .evaluation_split = arguments->split ? arguments->split : settings->data.validation,
      .without_responses = arguments->generate != NULL};
  core_status status = train_session_open(&options, &session);
  if (status == CORE_OK) status = evaluate(session, reader, meta->step, arguments);
  core_error saved;
  core_error_save(&saved);
  train_session_close(session);
  core_config_destroy(config);
  if (status != CORE_OK) {
    (void)core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static core_status open_checkpoint(comm_world *world, const char *path, ckpt_reader **reader) {
  comm_group *control = comm_control_group(world);
  int32_t single = ckpt_is(path);
  TRY(comm_broadcast(control, 0, &single, sizeof single));
  if (single) {
    TRY(ckpt_reader_open(control, path, reader));
    return CORE_OK;
  }
  char inside[1024]; /* a run directory: its newest */
  snprintf(inside, sizeof inside, "%.1000s/checkpoints", path);
  TRY(ckpt_reader_newest(control, inside, reader));
  CHECK(*reader, CORE_ERR_NOT_FOUND, "%s is neither a checkpoint nor a run directory that holds one", path);
  return CORE_OK;
}

static core_status eval(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  ckpt_reader *reader = NULL;
  train_state_meta meta = {0};
  char batch[64];
  add_defaults(arguments, batch, comm_size(comm_world_group(world)));
  TRY(open_checkpoint(world, arguments->positional[0], &reader));
  core_status status = train_state_meta_read(ckpt_reader_meta(reader), &meta);
  if (status == CORE_OK) status = with_config(world, arguments, reader, &meta);
  free(meta.config);
  ckpt_reader_close(reader);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  return launch_collective(command, argc, argv, 1, 2, eval);
}

const launch_command launch_eval_command = {
    "eval", "retrieval of a checkpoint on held-out data, or a decoder's loss and responses",
    "usage: antiphon eval CHECKPOINT [DATA] [--split NAME] [--generate N [--temperature T] [--stop TOKEN]]"
    " [--set key=value]...\n\n"
    "CHECKPOINT is a step-NNNNNNNN directory or a run directory (its newest sound checkpoint).\n"
    "DATA is a directory of splits; left out, the one the run was trained on.\n"
    "Noise is off and no token is dropped, whatever training used. Prints R@1, R@5 and R@10 next to "
    "chance;\nof a decoder the loss of the response tokens.\n\n"
    "  --generate N     continues every prompt by at most N tokens, a line of JSON a sample; on one rank\n"
    "  --temperature T  draws tokens (by run.seed) instead of taking the likeliest\n"
    "  --stop TOKEN     ends a response, and is not printed\n",
    run};
