/* What to say when a deadline passes: who is waited for, where this rank is, and from where the others
 * answer. */
#include <stdio.h>
#include <string.h>

#include "comm/comm_impl.h"

void comm_place_now_priv(const comm_group *group, comm_place *out) {
  const comm_world *world = group->world;
  memset(out, 0, sizeof *out);
  out->step = world->step;
  out->sequence = group->sequence;
  out->rank = world->rank;
  out->layer = world->layer;
  snprintf(out->phase, sizeof out->phase, "%s", world->phase);
  snprintf(out->operation, sizeof out->operation, "%s", group->operation);
  snprintf(out->group, sizeof out->group, "%s", group->name);
}

static void append(char *text, size_t capacity, const char *more) {
  size_t used = strlen(text);
  snprintf(text + used, capacity - used, "%s", more);
}

static void describe_place(const comm_place *place, char *out, size_t capacity) {
  char layer[24] = "";
  if (place->layer >= 0) snprintf(layer, sizeof layer, ", layer %d", place->layer);
  snprintf(out, capacity, "step %lld%s, %s, %s %lld of group '%s'", (long long)place->step, layer,
           place->phase, place->operation, (long long)place->sequence, place->group);
}

core_status comm_watchdog_report_priv(const comm_group *group, const bool *pending, const bool *answered,
                                      const comm_place *place) {
  char here[256], text[CORE_ERROR_TEXT] = "", one[320], there[256];
  comm_place own;
  comm_place_now_priv(group, &own);
  describe_place(&own, here, sizeof here);
  for (int32_t r = 0; r < group->size; r++) {
    int32_t world_rank = group->world_rank[r];
    if (!pending[r]) continue;
    if (answered[world_rank]) {
      describe_place(&place[world_rank], there, sizeof there);
      snprintf(one, sizeof one, "; rank %d is at %s", world_rank, there);
    } else {
      snprintf(one, sizeof one, "; rank %d is missing (no answer: ended, stopped or computing)", world_rank);
    }
    append(text, sizeof text, one);
  }
  FAIL(CORE_ERR_TIMEOUT, "the deadline of %g s passed at %s%s", group->world->deadline, here, text);
}
