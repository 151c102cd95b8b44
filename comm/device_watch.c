/* What a device has been given and not finished, and when to stop waiting for it.
 *
 * An operation on a device returns before it is done. Each is followed by an event, and the place where it
 * was issued is kept. While the host waits for the device, for whatever reason, the device calls back here:
 * the oldest operation must end within the deadline, counted from when it was issued or its predecessor
 * ended. */
#include <stdlib.h>

#include "comm/comm_impl.h"
#include "core/clock.h"

enum { PENDING = 256, POLLS = 64 };

struct comm_pending {
  core_event *event[PENDING];
  comm_place place[PENDING];
  int64_t first, end; /* counts of operations; slot: count modulo PENDING */
  double since;       /* when the oldest became the oldest */
};

core_status comm_pending_create_priv(comm_group *group) {
  comm_pending *pending = calloc(1, sizeof *pending);
  CHECK(pending, CORE_ERR_MEMORY, "group '%s': no memory for the watchdog", group->name);
  group->pending = pending;
  for (int i = 0; i < PENDING; i++) TRY(group->device->event_create(&pending->event[i]));
  return CORE_OK;
}

void comm_pending_destroy_priv(comm_group *group) {
  if (!group->pending) return;
  for (int i = 0; i < PENDING; i++)
    if (group->pending->event[i]) group->device->event_destroy(group->pending->event[i]);
  free(group->pending);
  group->pending = NULL;
}

static core_status check_transport(comm_group *group, const comm_place *here) {
  char at[256];
  core_status status = group->device_ops->check ? group->device_ops->check(group) : CORE_OK;
  if (status == CORE_OK) return CORE_OK;
  comm_place_text_priv(here, at, sizeof at);
  return core_error_trace(core_error_context(status, "at %s", at), __func__, __FILE__, __LINE__);
}

core_status comm_device_overdue_priv(comm_group *group, const comm_place *here, double since) {
  TRY(check_transport(group, here));
  double waited = core_clock_now() - since;
  if (waited > 0.5) comm_mpi_answer_priv(group->world, here);
  if (waited > group->world->deadline) TRY(comm_watchdog_over_priv(group, here, NULL));
  return CORE_OK;
}

/* Forgets what is done, then judges the oldest that is not. */
static core_status poll_group(comm_group *group) {
  comm_pending *pending = group->pending;
  comm_place here;
  while (pending->first < pending->end) {
    bool done = false;
    TRY(group->device->event_query(pending->event[pending->first % PENDING], &done));
    if (!done) break;
    pending->first++;
    pending->since = core_clock_now();
  }
  if (pending->first < pending->end) {
    TRY(comm_device_overdue_priv(group, &pending->place[pending->first % PENDING], pending->since));
    return CORE_OK;
  }
  comm_place_now_priv(group, &here);
  TRY(check_transport(group, &here));
  return CORE_OK;
}

core_status comm_pending_add_priv(comm_group *group, core_stream *stream) {
  comm_pending *pending = group->pending;
  while (pending->end - pending->first == PENDING) TRY(poll_group(group));
  if (pending->first == pending->end) pending->since = core_clock_now();
  comm_place_now_priv(group, &pending->place[pending->end % PENDING]);
  TRY(group->device->event_record(pending->event[pending->end % PENDING], stream));
  pending->end++;
  return CORE_OK;
}

/* A rank that waits for its device, but not in an operation of a group, is somewhere too. */
static void answer_idle(comm_world *world) {
  comm_place here;
  comm_place_now_priv(world->world_group, &here);
  comm_mpi_answer_priv(world, &here);
}

/* Called in a tight loop, so only every so often it looks. */
core_status comm_device_poll_priv(void *context) {
  comm_world *world = context;
  bool waiting = false;
  if (world->polls++ % POLLS != 0) return CORE_OK;
  for (int32_t i = 0; i < world->group_count; i++) {
    comm_group *group = world->group[i];
    if (!group->pending) continue;
    TRY(poll_group(group));
    waiting |= group->pending->first < group->pending->end;
  }
  if (!waiting) answer_idle(world);
  return CORE_OK;
}

void comm_device_watch_priv(comm_world *world, const core_device *device) {
  if (!device->watch) return;
  device->watch(comm_device_poll_priv, world);
  world->watched = device;
}

void comm_device_unwatch_priv(comm_world *world) {
  if (world->watched) world->watched->watch(NULL, NULL);
  world->watched = NULL;
}
