/* Outline: plan all stages, read their records, then group by group: pass over what is done, run the rest. A
 * group of several stages parts the world. */
#include "trainer/schedule/stages.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h> /* flock */
#include <unistd.h>

#include "checkpoint/checkpoint.h"
#include "core/file.h"
#include "core/log.h"
#include "core/stop.h"
#include "trainer/forgetting.h"
#include "trainer/schedule/stages_impl.h"

/* ---- before anything runs ---- */

static core_status take_lock(train_stages *stages) {
  char path[TRAIN_STAGE_PATH];
  const char *directory = stages->settings->run.directory;
  TRY(core_file_make_directories(directory));
  snprintf(path, sizeof path, "%.900s/lock", directory);
  TRY(core_file_open(path, O_RDWR | O_CREAT, &stages->lock));
  CHECK(flock(stages->lock, LOCK_EX | LOCK_NB) == 0, CORE_ERR_IO,
        "another process is running in %s (its lock is held); wait for it or choose another run.directory",
        directory);
  return CORE_OK;
}

/* A source that was retrained since a finished stage began from it makes that one a stranger. */
static core_status check_sources(const train_stages *stages, const train_stage *stage) {
  for (int32_t i = 0; stage->done && i < stage->sources; i++) {
    const train_stage_source *source = &stage->source[i];
    if (source->stage < 0 || source->best) continue;
    const train_stage *from = &stages->list[source->stage];
    CHECK(from->done && from->content == source->content, CORE_ERR_MISMATCH,
          "it is done, but '%s', which it began from, %s; remove %.200s to train it again", source->text,
          from->done ? "has been trained anew since" : "is not", stage->directory);
  }
  return CORE_OK;
}

static core_status read_records(train_stages *stages, const char *resume) {
  for (int32_t i = 0; i < stages->count; i++) {
    train_stage *stage = &stages->list[i];
    core_status status = train_stage_take_extension_priv(stages->control, stages, i);
    if (status == CORE_OK) status = train_stage_read_priv(stages->control, stage);
    if (status == CORE_OK) status = check_sources(stages, stage);
    if (status == CORE_OK && stage->begun && strcmp(resume, "never") == 0)
      status = core_error_begin(CORE_ERR_ARGUMENT, __func__, __FILE__, __LINE__,
                                "it has begun in %s; use --resume auto, or another run.directory",
                                stage->directory);
    if (status != CORE_OK) status = core_error_context(status, "stage '%s'", stage->settings->name);
    TRY(status);
  }
  return CORE_OK;
}

/* ---- one stage ---- */

/* The last checkpoint of a stage that is done; the best one has its path already. */
static void place_sources(const train_stages *stages, train_stage *stage) {
  for (int32_t i = 0; i < stage->sources; i++) {
    train_stage_source *source = &stage->source[i];
    if (source->stage < 0 || source->best) continue;
    const train_stage *from = &stages->list[source->stage];
    snprintf(source->path, sizeof source->path, "%s/checkpoints/step-%08lld", from->directory,
             (long long)from->step);
  }
}

/* What it did to what was there before, against the first source: what it began with, or extends. */
static core_status compare(comm_world *world, const train_stage *stage, const char *after) {
  char report[TRAIN_STAGE_PATH];
  snprintf(report, sizeof report, "%s/forgetting.json", stage->directory);
  const train_forgetting forgetting = {.comm = world,
                                       .run = stage->config,
                                       .before = stage->sources > 0 ? stage->source[0].path : NULL,
                                       .after = after,
                                       .report = report};
  if (stage->settings->kind != TRAIN_STAGE_ASSEMBLE) TRY(train_forgetting_run(&forgetting));
  return CORE_OK;
}

/* What it ends with is read and verified before it counts as done. */
static core_status record_done(comm_world *world, train_stage *stage) {
  char directory[TRAIN_STAGE_PATH], path[TRAIN_STAGE_PATH];
  comm_group *control = comm_control_group(world);
  const train_settings *s = core_config_data(stage->config);
  ckpt_reader *reader = NULL;
  snprintf(directory, sizeof directory, "%s/checkpoints", stage->directory);
  TRY(ckpt_reader_newest(control, directory, (int32_t)s->checkpoint.threads, &reader));
  CHECK(reader, CORE_ERR_INTERNAL, "%s: a stage has ended without a checkpoint", directory);
  stage->step = ckpt_reader_step(reader);
  stage->content = ckpt_reader_content_hash(reader);
  snprintf(path, sizeof path, "%s", ckpt_reader_path(reader));
  ckpt_reader_close(reader);
  TRY(compare(world, stage, path));
  stage->done = true;
  TRY(train_stage_write_priv(control, stage));
  return CORE_OK;
}

static core_status train(comm_world *world, train_stage *stage, train_outcome *outcome) {
  const train_run_options run = {.config = stage->config,
                                 .comm = world,
                                 .resume = "auto",
                                 .from = stage->sources > 0 ? stage->source[0].path : NULL,
                                 .stage = stage->settings->name,
                                 .number = stage->depth};
  TRY(train_run(&run, outcome));
  return CORE_OK;
}

static core_status run_stage(comm_world *world, train_stages *stages, train_stage *stage,
                             train_outcome *outcome) {
  comm_group *control = comm_control_group(world);
  TRY(train_stage_take_extension_priv(control, stages, (int32_t)(stage - stages->list)));
  place_sources(stages, stage);
  comm_note(world, 0, -1, "stage");
  TRY(train_stage_open_sources_priv(control, stage));
  TRY(train_stage_write_priv(control, stage));
  if (stage->settings->kind == TRAIN_STAGE_ASSEMBLE)
    TRY(train_stage_assemble_priv(control, stage));
  else if (stage->settings->kind == TRAIN_STAGE_EXTEND)
    TRY(train_stage_extend_priv(world, stage));
  else
    TRY(train(world, stage, outcome));
  if (*outcome == TRAIN_FINISHED) TRY(record_done(world, stage));
  return CORE_OK;
}

/* The same with its name before every line and error. */
static core_status run_named(comm_world *world, train_stages *stages, train_stage *stage,
                             train_outcome *outcome) {
  core_log_set_label(stage->settings->name);
  LOG_INFO("stage %d of %d, in %s", (int)(stage - stages->list) + 1, stages->count, stage->directory);
  core_status status = run_stage(world, stages, stage, outcome);
  core_log_set_label("");
  if (status != CORE_OK && status != CORE_ERR_STOPPED)
    status = core_error_context(status, "stage '%s'", stage->settings->name);
  TRY(status);
  return CORE_OK;
}

static bool pass_over(const train_stage *stage) {
  if (stage->done)
    LOG_INFO("stage '%s' is done since step %lld, content %016llx", stage->settings->name,
             (long long)stage->step, (unsigned long long)stage->content);
  return stage->done;
}

/* ---- side by side ---- */

/* An error in one ends all: its first rank says which stage it was, the others wait for the end of the job.
 */
static void end_job(comm_world *part, core_status status) {
  bool alone = status == CORE_ERR_TIMEOUT || status == CORE_ERR_COMM; /* agreed with nobody */
  if (alone || comm_rank(comm_world_group(part)) == 0) comm_fail_stop(part, status);
}

static core_status run_part(comm_world *part, train_stages *stages, train_stage *stage,
                            train_outcome *outcome) {
  int32_t rank = comm_rank(stages->control);
  core_log_set_rank(comm_rank(comm_world_group(part))); /* the first rank of each stage speaks */
  core_status status = run_named(part, stages, stage, outcome);
  core_log_set_rank(rank);
  if (status == CORE_ERR_STOPPED) *outcome = TRAIN_STOPPED;
  if (status != CORE_OK && status != CORE_ERR_STOPPED) end_job(part, status);
  return CORE_OK;
}

static core_status run_together(train_stages *stages, int32_t begin, int32_t end, train_outcome *outcome) {
  comm_world *part = NULL;
  int32_t rank = comm_rank(stages->control), mine = -1;
  for (int32_t i = begin; i < end; i++) {
    const train_stage *stage = &stages->list[i];
    bool member = rank >= stage->first_rank && rank < stage->first_rank + stage->ranks;
    if (member && !pass_over(stage)) mine = i;
  }
  TRY(comm_part(stages->comm, mine, &part));
  if (part) TRY(run_part(part, stages, &stages->list[mine], outcome));
  TRY(comm_join(stages->comm));
  comm_finish(part);
  int64_t stopped = *outcome == TRAIN_STOPPED;
  TRY(comm_all_reduce(stages->control, COMM_MAX, CORE_INT64, &stopped, 1));
  if (stopped) *outcome = TRAIN_STOPPED;
  for (int32_t i = begin; i < end; i++) {
    TRY(train_stage_take_extension_priv(stages->control, stages, i)); /* as the ranks that ran it did */
    TRY(train_stage_read_priv(stages->control, &stages->list[i]));
  }
  return CORE_OK;
}

/* ---- all ---- */

static core_status run_group(train_stages *stages, int32_t begin, int32_t end, train_outcome *outcome) {
  if (stages->list[begin].ranks < comm_size(stages->control)) {
    TRY(run_together(stages, begin, end, outcome));
    return CORE_OK;
  }
  for (int32_t i = begin; i < end && *outcome == TRAIN_FINISHED; i++)
    if (!pass_over(&stages->list[i])) TRY(run_named(stages->comm, stages, &stages->list[i], outcome));
  return CORE_OK;
}

/* Between stages nobody else looks. */
static core_status ask_to_stop(const train_stages *stages, train_outcome *outcome) {
  int64_t stop = core_stop_requested();
  TRY(comm_all_reduce(stages->control, COMM_MAX, CORE_INT64, &stop, 1));
  if (stop && *outcome == TRAIN_FINISHED) LOG_INFO("stopped on request between stages; start again to go on");
  if (stop) *outcome = TRAIN_STOPPED;
  return CORE_OK;
}

static core_status run_all(train_stages *stages, const char *resume, train_outcome *outcome) {
  bool first = comm_rank(stages->control) == 0;
  CHECK(strcmp(resume, "auto") == 0 || strcmp(resume, "never") == 0, CORE_ERR_USAGE,
        "--resume %s: a configuration with stages finds its place by itself; expected auto or never", resume);
  TRY(comm_agree(stages->control, train_stages_plan_priv(stages, comm_size(stages->control))));
  TRY(comm_agree(stages->control, first ? take_lock(stages) : CORE_OK));
  TRY(read_records(stages, resume));
  for (int32_t i = 0, end; i < stages->count && *outcome == TRAIN_FINISHED; i = end) {
    end = train_stages_group_end_priv(stages, i);
    TRY(run_group(stages, i, end, outcome));
    if (end < stages->count && *outcome == TRAIN_FINISHED) TRY(ask_to_stop(stages, outcome));
  }
  return CORE_OK;
}

core_status train_stages_run(const train_stages_options *options, train_outcome *outcome) {
  train_stages stages = {.config = options->config,
                         .settings = core_config_data(options->config),
                         .comm = options->comm,
                         .control = comm_control_group(options->comm),
                         .lock = -1};
  *outcome = TRAIN_FINISHED;
  core_status status = run_all(&stages, options->resume, outcome);
  if (stages.lock >= 0) close(stages.lock);
  train_stages_free_priv(&stages);
  TRY(status);
  return CORE_OK;
}
