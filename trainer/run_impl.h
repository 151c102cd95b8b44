/* What the files of a run share: run.c (the loop), run_open.c (start), run_resume.c, run_save.c,
 * run_evaluate.c. All of it is Collective over the world unless it says otherwise. */
#ifndef TRAIN_RUN_IMPL_H
#define TRAIN_RUN_IMPL_H

#include "checkpoint/checkpoint.h"
#include "trainer/metrics.h"
#include "trainer/run.h"
#include "trainer/session.h"
#include "trainer/state.h"

enum { TRAIN_RUN_PATH = 1024, TRAIN_NO_STEP = -1 };

/* What a new run took over from a checkpoint. */
typedef struct train_begun {
  char path[TRAIN_RUN_PATH]; /* empty: nothing */
  int64_t step;
  uint64_t content;
  int64_t fresh_count;
  char *fresh; /* names of this rank's tensors that the checkpoint lacks, a line each; malloc'ed, or NULL */
} train_begun;

typedef struct train_run_state {
  train_session *session;
  train_env *env;
  const train_settings *settings;
  char directory[TRAIN_RUN_PATH], checkpoints[TRAIN_RUN_PATH];
  int lock;
  data_stream *stream;
  data_position position;
  const char *stage; /* NULL: none */
  train_begun begun;
  bool resumed;       /* at a checkpoint of its own */
  int64_t saved_step; /* step of the newest checkpoint begun, -1 none */
  bool save_due;      /* since a step when the writer had no room for another save */
  int64_t failures;   /* non-finite steps in a row */
  train_early_stopping stopping;
  int64_t evaluated;         /* step of the last evaluation of this process, -1 none */
  train_state_tensors saved; /* what the writer writes */
  train_base base;           /* of a run that saves what is trained alone */
  ckpt_writer *writer;
  train_metrics *metrics;   /* rank 0 */
  double process_mebibytes; /* resident beside what is planned: libraries, MPI, the index of the shards */
  bool metrics_failed;      /* the last line could not be written */
  double started, last_line;
  int64_t first_step;
  double waited, save_seconds; /* since the last step */
  double rate_tokens;          /* tokens per second, smoothed, for the progress line */
} train_run_state;

/* ---- run_open.c ---- */

/* Opens session, run directory, writer, checkpoint to go on from, metrics, stream. The lock must be -1. */
core_status train_run_open_priv(train_run_state *r, const train_run_options *options);
void train_run_close_priv(train_run_state *r);
/* Largest resident size of this process so far. Local. */
double train_run_peak_mebibytes_priv(void);

/* ---- run_resume.c ---- */

/* The run's own newest checkpoint, the one that `resume` names, or a new run that takes what `from` (NULL:
 * nothing) has. */
core_status train_run_start_or_resume_priv(train_run_state *r, const char *resume, const char *from);

/* Whether checkpoints hold what is trained alone. Local. */
bool train_run_saves_trained_priv(const train_run_state *r);

/* ---- run_manifest.c ---- */

typedef enum train_manifest_moment { TRAIN_MANIFEST_BEGIN, TRAIN_MANIFEST_END } train_manifest_moment;
/* Prints what trains and what is frozen, group by group, and what the memory for it is on every rank, and
 * writes it to manifest.json with what the run began from; a run that was resumed keeps what stands there of
 * that. Of each group's frozen parameters it holds a hash, as they were when the run began and as they are;
 * at the end, where nothing is printed, these must be the same: ERR_INTERNAL. */
core_status train_run_manifest_priv(const train_run_state *r, train_manifest_moment moment);

/* ---- run_save.c ---- */

/* Shows the best step's checkpoint under its name, once it is published. What cannot be marked is tried again
 * after the next save. Local. */
void train_run_mark_best_priv(const train_run_state *r);
core_status train_run_begin_save_priv(train_run_state *r);
/* A save that fails does not stop training: the previous checkpoint is still there. But ranks that no longer
 * understand one another cannot go on. */
core_status train_run_warn_save_priv(train_run_state *r, int64_t step, core_status status);
/* Waits for the oldest pending save and publishes it; one that fails is a warning, as above. */
core_status train_run_settle_save_priv(train_run_state *r);
/* All that are pending, but for that of step `except`, which is the newest, if it is there. */
core_status train_run_settle_saves_priv(train_run_state *r, int64_t except);
/* Now and to the end; used when the run ends. */
core_status train_run_save_now_priv(train_run_state *r);

/* ---- run_evaluate.c ---- */

bool train_run_stops_early_priv(const train_run_state *r);
/* table: print it, if the run prints one at its end and this is it. */
core_status train_run_evaluate_priv(train_run_state *r, bool table);

#endif
