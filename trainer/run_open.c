/* Outline: open the session, take the run directory, resume or start, say what it is. */
#include "trainer/run_impl.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h> /* flock */
#include <sys/resource.h>
#include <unistd.h>

#include "core/file.h"
#include "core/log.h"

static core_status take_directory(train_run_state *r) {
  char path[TRAIN_RUN_PATH + 32];
  TRY(core_file_make_directories(r->directory));
  TRY(core_file_make_directories(r->checkpoints));
  snprintf(path, sizeof path, "%s/lock", r->directory);
  TRY(core_file_open(path, O_RDWR | O_CREAT, &r->lock));
  if (flock(r->lock, LOCK_EX | LOCK_NB) != 0)
    FAIL(CORE_ERR_IO,
         "another process is running in %s (its lock is held); wait for it or choose another run.directory",
         r->directory);
  snprintf(path, sizeof path, "%s/log.txt", r->directory);
  TRY(core_log_open(path));
  return CORE_OK;
}

static core_status prepare_directory(train_run_state *r) {
  int32_t rank = comm_rank(r->env->world);
  TRY(comm_agree(r->env->control, rank == 0 ? take_directory(r) : CORE_OK));
  comm_options options = {.deadline = r->settings->run.deadline, .directory = r->directory};
  TRY(comm_configure(r->env->comm, &options));
  return CORE_OK;
}

double train_run_peak_mebibytes_priv(void) {
  struct rusage usage;
  return getrusage(RUSAGE_SELF, &usage) == 0 ? (double)usage.ru_maxrss / 1024 : 0;
}

/* What an item of each modality, or of each direction, passes. */
static core_status describe_arithmetic(const train_run_state *r) {
  train_arithmetic arithmetic;
  TRY(train_session_arithmetic(r->session, &arithmetic));
  for (int32_t i = 0; i < arithmetic.paths; i++) {
    char text[4 * CORE_NAME];
    train_path_describe(&arithmetic.path[i], text, sizeof text);
    LOG_INFO("forward pass of %s", text);
  }
  train_arithmetic_free(&arithmetic);
  return CORE_OK;
}

static core_status describe(train_run_state *r) {
  char layout[512];
  train_memory memory = train_session_memory(r->session);
  train_counts counts;
  TRY(train_session_counts(r->session, &counts));
  train_layout_describe(&r->env->layout, r->settings, layout, sizeof layout);
  int64_t bytes = ckpt_writer_bytes(r->writer) + data_stream_bytes(r->stream);
  bool device = !r->session->arenas.host_access;
  LOG_INFO("%s; %s, %s, %d threads a rank, transport %s%s%s%s", layout, r->env->ops->device->name,
           core_dtype_text(r->env->active), r->env->ops->context_threads(r->env->kern),
           comm_transport_name(r->env->world), device ? ", between devices " : "",
           device ? comm_device_transport_name(r->env->world) : "",
           r->session->stepper.reduction.early ? ", gradients reduced during the backward pass" : "");
  LOG_INFO("%.2f M parameters, %.2f M active, %.2f M frozen; %lld training samples, %lld held out",
           (double)counts.total / 1e6, (double)counts.active / 1e6, (double)counts.frozen / 1e6,
           (long long)data_set_samples(r->session->training),
           (long long)(r->session->evaluation ? data_set_samples(r->session->evaluation) : 0));
  TRY(describe_arithmetic(r));
  /* The arenas' pages are all there; what is resident beside them are libraries, MPI and the index of the
   * shards. */
  double arenas = (double)memory.total / 1048576, process = r->process_mebibytes;
  LOG_INFO(
      "planned memory of rank 0: %.1f MiB (process %.1f, parameters and optimizer %.1f, activations %.1f, "
      "objective %.1f, host %.1f, kernels %.1f, data and checkpoint %.1f)",
      process + arenas + (double)bytes / 1048576, process, (double)memory.parameters / 1048576,
      (double)memory.activations / 1048576, (double)memory.objective / 1048576, (double)memory.host / 1048576,
      (double)memory.kernels / 1048576, (double)bytes / 1048576);
  return CORE_OK;
}

/* Once it is certain that this run goes on here: a refused start must leave the directory as it was. */
static core_status write_config(const train_run_state *r) {
  char path[TRAIN_RUN_PATH + 32];
  snprintf(path, sizeof path, "%s/config.yaml", r->directory);
  const char *text = core_config_text(r->env->config);
  TRY(core_file_replace(path, text, strlen(text)));
  return CORE_OK;
}

static core_status open_local(train_run_state *r) {
  if (comm_rank(r->env->world) == 0) TRY(write_config(r));
  if (comm_rank(r->env->world) == 0)
    TRY(train_metrics_open(r->directory, r->env->step, r->session->model, &r->metrics));
  TRY(train_session_stream(r->session, r->session->training, &r->env->layout, &r->position, true,
                           &r->stream));
  return CORE_OK;
}

core_status train_run_open_priv(train_run_state *r, const train_run_options *options) {
  const train_settings *s = core_config_data(options->config);
  bool evaluates = s->evaluate.interval > 0 || s->evaluate.at_end;
  train_session_options session = {.config = options->config,
                                   .comm = options->comm,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .training_split = s->data.train,
                                   .evaluation_split = evaluates ? s->data.validation : NULL};
  TRY(train_session_open(&session, &r->session));
  /* the arenas' pages are all there by now, streams and checkpoints are still to come */
  r->process_mebibytes =
      train_run_peak_mebibytes_priv() - (double)train_session_memory(r->session).total / 1048576;
  r->env = &r->session->env;
  r->settings = s;
  r->stage = options->stage;
  r->position.stage = options->number;
  train_early_stopping_make(s, &r->stopping);
  CHECK(strlen(s->run.directory) + 64 < TRAIN_RUN_PATH, CORE_ERR_CONFIG, "run.directory is too long");
  snprintf(r->directory, sizeof r->directory, "%s", s->run.directory);
  snprintf(r->checkpoints, sizeof r->checkpoints, "%.900s/checkpoints", s->run.directory);
  TRY(prepare_directory(r));
  TRY(comm_agree(r->env->control, train_state_list(r->session->model, &r->session->stepper.alternation,
                                                   train_run_saves_trained_priv(r) ? TRAIN_STATE_SAVE_TRAINED
                                                                                   : TRAIN_STATE_SAVE,
                                                   &r->saved)));
  ckpt_options saving = {.directory = r->checkpoints,
                         .keep = (int32_t)s->checkpoint.keep,
                         .level = (int32_t)s->checkpoint.level,
                         .threads = (int32_t)s->checkpoint.threads,
                         .buffers = (int32_t)s->checkpoint.buffers,
                         .keep_every = s->checkpoint.keep_every};
  TRY(ckpt_writer_create(r->env->control, &saving, r->saved.list, r->saved.count, &r->writer));
  TRY(train_run_start_or_resume_priv(r, options->resume, options->from));
  TRY(comm_agree(r->env->control, open_local(r)));
  TRY(describe(r));
  TRY(train_run_manifest_priv(r, TRAIN_MANIFEST_BEGIN));
  return CORE_OK;
}

void train_run_close_priv(train_run_state *r) {
  core_log_progress("%s", "");
  ckpt_writer_destroy(r->writer);
  data_stream_close(r->stream);
  train_metrics_close(r->metrics);
  train_state_free(&r->saved);
  free(r->begun.fresh);
  if (r->lock >= 0) close(r->lock);
  train_session_close(r->session);
  core_log_close();
}
