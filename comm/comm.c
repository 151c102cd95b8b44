#include "comm/comm.h"

#include <cJSON.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* alarm */

#include "comm/comm_impl.h"
#include "core/file.h" /* core_file_replace */
#include "core/log.h"

enum { ABORT_SECONDS = 10 };
static const double default_deadline = 600;
static const int64_t largest_message = (int64_t)1 << 30; /* MPI counts are int */

core_status comm_group_allocate_priv(comm_world *world, const comm_transport *transport, const char *name,
                                     int32_t rank, int32_t size, comm_group **out) {
  CHECK(world->group_count < COMM_MAX_GROUPS, CORE_ERR_ARGUMENT, "more than %d groups", COMM_MAX_GROUPS);
  comm_group *group = calloc(1, sizeof *group);
  CHECK(group, CORE_ERR_MEMORY, "no memory for the group '%s'", name);
  world->group[world->group_count++] = group;
  group->world = world;
  group->transport = transport;
  group->rank = rank;
  group->size = size;
  group->operation = "idle";
  snprintf(group->name, sizeof group->name, "%s", name);
  /* Reduction pieces: enough to hide latency, bounded in sum over the peers. */
  group->piece = size == 1 ? 0 : (4 << 20) / size < (64 << 10) ? 64 << 10 : ((4 << 20) / size) & ~63;
  group->world_rank = calloc((size_t)size, sizeof *group->world_rank);
  group->list = calloc((size_t)size * 2, sizeof *group->list);
  group->first = calloc((size_t)size, sizeof *group->first);
  group->slice = calloc((size_t)size, sizeof *group->slice);
  group->scratch = malloc((size_t)(group->piece * size) + 64);
  CHECK(group->world_rank && group->list && group->first && group->slice && group->scratch, CORE_ERR_MEMORY,
        "no memory for the group '%s'", name);
  *out = group;
  return CORE_OK;
}

static void group_free(comm_group *group) {
  if (group->device_ops && group->device_ops->destroy) group->device_ops->destroy(group);
  comm_pending_destroy_priv(group);
  if (group->transport->group_destroy) group->transport->group_destroy(group);
  free(group->world_rank);
  free(group->list);
  free(group->first);
  free(group->slice);
  free(group->scratch);
  free(group);
}

static core_status start_alone(comm_world *world) {
  world->size = world->local_size = 1;
  TRY(comm_group_allocate_priv(world, &comm_transport_self_priv, "world", 0, 1, &world->world_group));
  TRY(comm_group_allocate_priv(world, &comm_transport_self_priv, "control", 0, 1, &world->control_group));
  return CORE_OK;
}

static core_status start(comm_world *world, bool alone) {
  int32_t tasks = 0;
  bool launched = !alone && comm_mpi_launched_priv(&tasks);
  CHECK(launched || tasks <= 1, CORE_ERR_COMM,
        "srun started %d tasks without PMIx, so they cannot find one another; use `srun --mpi=pmix`", tasks);
  if (launched) {
    comm_start_guard guard;
    TRY(comm_start_guard_begin_priv(&guard, world->deadline));
    core_status status = comm_mpi_start_priv(world);
    comm_start_guard_end_priv(&guard);
    TRY(status);
  } else {
    TRY(start_alone(world));
  }
  if (!alone) {
    core_error_set_rank(world->rank);
    core_log_set_rank(world->rank);
  }
  return CORE_OK;
}

core_status comm_start(const comm_options *options, comm_world **out) {
  comm_world *world = calloc(1, sizeof *world);
  CHECK(world, CORE_ERR_MEMORY, "no memory for communication");
  world->phase = "start";
  world->layer = -1;
  world->largest_message = largest_message;
  core_status status = comm_configure(world, options);
  if (status == CORE_OK) status = start(world, options && options->alone);
  if (status != CORE_OK) {
    comm_finish(world);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = world;
  return CORE_OK;
}

static core_status make_part(comm_world *world, int32_t color, comm_world *part) {
  part->part = true;
  part->phase = "start";
  part->layer = -1;
  part->largest_message = world->largest_message;
  part->deadline = world->deadline;
  memcpy(part->directory, world->directory, sizeof part->directory);
  if (world->mpi)
    TRY(comm_mpi_part_priv(world, color, part));
  else
    TRY(start_alone(part));
  part->local_rank = world->local_rank; /* devices are counted by host */
  part->local_size = world->local_size;
  return CORE_OK;
}

core_status comm_part(comm_world *world, int32_t color, comm_world **out) {
  *out = NULL;
  comm_world *part = calloc(1, sizeof *part);
  TRY(comm_agree(world->control_group, part ? CORE_OK
                                            : core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__,
                                                               "no memory for communication")));
  if (color < 0 && !world->mpi) {
    free(part);
    return CORE_OK;
  }
  core_status status = make_part(world, color, part);
  if (status != CORE_OK || color < 0) {
    comm_finish(part);
    part = NULL;
  }
  TRY(status);
  *out = part;
  return CORE_OK;
}

core_status comm_join(comm_world *world) {
  const double deadline = world->deadline;
  world->deadline = 1e18;
  core_status status = comm_barrier(world->control_group);
  world->deadline = deadline;
  TRY(status);
  return CORE_OK;
}

core_status comm_configure(comm_world *world, const comm_options *options) {
  world->deadline = options && options->deadline > 0 ? options->deadline : default_deadline;
  const char *directory = options && options->directory ? options->directory : "";
  CHECK(strlen(directory) < sizeof world->directory, CORE_ERR_ARGUMENT, "a directory name of %zu bytes",
        strlen(directory));
  memcpy(world->directory, directory, strlen(directory) + 1);
  return CORE_OK;
}

void comm_finish(comm_world *world) {
  if (!world) return;
  comm_device_unwatch_priv(world);
  for (int32_t i = 0; i < world->group_count; i++) group_free(world->group[i]);
  if (world->mpi) comm_mpi_finish_priv(world);
  free(world);
}

static void write_error_file(const comm_world *world, const core_error *error, const char *text) {
  if (!world->directory[0]) return;
  char path[sizeof world->directory + 32];
  snprintf(path, sizeof path, "%s/error.%d.json", world->directory, world->rank);
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "code", core_status_name((core_status)error->code));
  cJSON_AddNumberToObject(object, "rank", error->rank);
  cJSON_AddNumberToObject(object, "reported_by", world->rank);
  cJSON_AddNumberToObject(object, "step", (double)world->step);
  cJSON_AddStringToObject(object, "phase", world->phase);
  cJSON_AddStringToObject(object, "message", error->message);
  cJSON_AddStringToObject(object, "trace", text);
  char *json = cJSON_Print(object);
  if (json && core_file_replace(path, json, strlen(json)) != CORE_OK)
    LOG_WARNING("%s", core_error_get()->message);
  free(json);
  cJSON_Delete(object);
}

/* A transport that does not let go of its device must not keep the job: if the end takes longer than this,
 * the process ends without it, and the launcher ends the others. */
static void on_last_resort(int signal) {
  (void)signal;
  _exit(1);
}

static void drop_device_work(comm_world *world) {
  signal(SIGALRM, on_last_resort);
  alarm(ABORT_SECONDS);
  for (int32_t i = 0; i < world->group_count; i++)
    if (world->group[i]->device_ops && world->group[i]->device_ops->abort)
      world->group[i]->device_ops->abort(world->group[i]);
}

void comm_fail_stop(comm_world *world, core_status status) {
  core_error error;
  char text[4096];
  core_error_save(&error);
  error.code = status;
  const char *trace = getenv("ANTIPHON_TRACE"); /* the file has the frames in any case */
  core_error_format(&error, trace && trace[0] == '1', text, sizeof text);
  LOG_ERROR("%s", text);
  core_error_format(&error, true, text, sizeof text);
  write_error_file(world, &error, text);
  drop_device_work(world);
  if (world->mpi) comm_mpi_abort_priv();
  exit(1);
}

comm_group *comm_world_group(comm_world *world) {
  return world->world_group;
}

comm_group *comm_control_group(comm_world *world) {
  return world->control_group;
}

int32_t comm_rank(const comm_group *group) {
  return group->rank;
}

int32_t comm_size(const comm_group *group) {
  return group->size;
}

int32_t comm_world_rank_of(const comm_group *group, int32_t rank) {
  return group->world_rank[rank];
}

int32_t comm_local_rank(const comm_world *world) {
  return world->local_rank;
}

int32_t comm_local_size(const comm_world *world) {
  return world->local_size;
}

const char *comm_transport_name(const comm_group *group) {
  return group->transport->name;
}

double comm_group_seconds(const comm_group *group) {
  return group->seconds;
}

int64_t comm_group_bytes(const comm_group *group) {
  return group->bytes;
}

core_status comm_group_create(comm_world *world, int32_t color, const char *name, comm_group **out) {
  *out = NULL;
  if (world->mpi)
    TRY(comm_mpi_split_priv(world, color, name, out));
  else if (color >= 0)
    TRY(comm_group_allocate_priv(world, &comm_transport_self_priv, name, 0, 1, out));
  return CORE_OK;
}

void comm_group_destroy(comm_group *group) {
  if (!group) return;
  comm_world *world = group->world;
  int32_t kept = 0;
  for (int32_t i = 0; i < world->group_count; i++)
    if (world->group[i] != group) world->group[kept++] = world->group[i];
  world->group_count = kept;
  group_free(group);
}

void comm_note(comm_world *world, int64_t step, int32_t layer, const char *phase) {
  world->step = step;
  world->layer = layer;
  world->phase = phase;
}
