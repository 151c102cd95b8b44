/* antiphon eval */
#include <stdio.h>
#include <stdlib.h>

#include "launcher/launcher.h"
#include "trainer/retrieval.h"
#include "trainer/state.h"

static core_status evaluate(train_session *session, ckpt_reader *reader, int64_t step) {
  train_state_tensors tensors;
  train_retrieval *result = calloc(1, sizeof *result);
  CHECK(result, CORE_ERR_MEMORY, "no memory for the evaluation");
  core_status status = comm_agree(session->env.control,
                                  train_state_list(session->model, NULL, TRAIN_STATE_LOAD_MODEL, &tensors));
  if (status == CORE_OK) status = ckpt_reader_load(reader, tensors.list, tensors.count);
  train_state_free(&tensors);
  session->env.step = step;
  if (status == CORE_OK) status = comm_agree(session->env.control, train_state_loaded(session->model));
  if (status == CORE_OK) status = train_retrieval_run(session, result);
  if (status == CORE_OK && comm_rank(session->env.world) == 0) {
    printf("%s, step %lld, %lld samples\n", ckpt_reader_path(reader), (long long)step,
           (long long)result->samples);
    train_retrieval_print(result, session->env.settings, stdout);
  }
  free(result);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
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
      .evaluation_split = arguments->split ? arguments->split : settings->data.validation};
  core_status status = train_session_open(&options, &session);
  if (status == CORE_OK) status = evaluate(session, reader, meta->step);
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

static core_status eval(comm_world *world, launch_arguments *arguments, int *code) {
  (void)code;
  ckpt_reader *reader = NULL;
  train_state_meta meta = {0};
  char batch[64];
  launch_checkpoint_defaults(arguments, batch, comm_size(comm_world_group(world)));
  TRY(launch_checkpoint_open(world, arguments->positional[0], &reader));
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
    "eval", "retrieval of a checkpoint on held-out data, in every direction",
    "usage: antiphon eval CHECKPOINT [DATA] [--split NAME] [--set key=value]...\n\n"
    "CHECKPOINT is a step-NNNNNNNN directory or a run directory (its newest sound checkpoint).\n"
    "DATA is a directory of splits; left out, the one the run was trained on.\n"
    "Noise is off and no token is dropped, whatever training used. Prints R@1, R@5 and R@10 next to "
    "chance.\n",
    run};
