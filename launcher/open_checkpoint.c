/* What commands that take a checkpoint share. */
#include <stdio.h>

#include "launcher/launcher.h"

void launch_checkpoint_defaults(launch_arguments *arguments, const char *capacity,
                                launch_checkpoint_words *words, int32_t ranks) {
  launch_arguments given = *arguments;
  snprintf(words->batch, sizeof words->batch, "optimizer.batch=%d", ranks);
  snprintf(words->capacity, sizeof words->capacity, "evaluate.capacity='%.32s'",
           capacity ? capacity : "none");
  const char *defaults[] = {"parallel.experts=1", "parallel.placement=shared",   "optimizer.accumulate=1",
                            words->batch,         "model.moe.dispatch=dropless", words->capacity,
                            "objective.balance=0"};
  int32_t count = sizeof defaults / sizeof *defaults;
  for (int32_t i = 0; i < count; i++) arguments->override[i] = defaults[i];
  for (int32_t i = 0; i < given.override_count && count + i < LAUNCH_MOST_OVERRIDES; i++)
    arguments->override[count + i] = given.override[i];
  arguments->override_count = count + given.override_count;
  if (arguments->override_count > LAUNCH_MOST_OVERRIDES) arguments->override_count = LAUNCH_MOST_OVERRIDES;
}

core_status launch_checkpoint_open(comm_world *world, const char *path, ckpt_reader **out) {
  comm_group *control = comm_control_group(world);
  int32_t single = ckpt_is(path);
  TRY(comm_broadcast(control, 0, &single, sizeof single));
  if (single) {
    TRY(ckpt_reader_open(control, path, out));
    return CORE_OK;
  }
  char inside[1024]; /* a run directory: its newest */
  snprintf(inside, sizeof inside, "%.1000s/checkpoints", path);
  TRY(ckpt_reader_newest(control, inside, 1, out));
  CHECK(*out, CORE_ERR_NOT_FOUND, "%s is neither a checkpoint nor a run directory that holds one", path);
  return CORE_OK;
}
