/* What to say when a deadline passes: who is waited for, where this rank is, and from where the others
 * answer. */
#include <stdio.h>
#include <stdlib.h>
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

void comm_place_text_priv(const comm_place *place, char *out, size_t capacity) {
  char layer[24] = "";
  if (place->layer >= 0) snprintf(layer, sizeof layer, ", layer %d", place->layer);
  snprintf(out, capacity, "step %lld%s, %s, %s %lld of group '%s'", (long long)place->step, layer,
           place->phase, place->operation, (long long)place->sequence, place->group);
}

core_status comm_watchdog_report_priv(const comm_group *group, const comm_place *here, const bool *pending,
                                      const bool *answered, const comm_place *place) {
  char at[256], text[CORE_ERROR_TEXT] = "", one[320], there[256];
  comm_place_text_priv(here, at, sizeof at);
  for (int32_t r = 0; r < group->size; r++) {
    int32_t world_rank = group->world_rank[r];
    if (!pending[r]) continue;
    if (answered[world_rank]) {
      comm_place_text_priv(&place[world_rank], there, sizeof there);
      snprintf(one, sizeof one, "; rank %d is at %s", world_rank, there);
    } else {
      snprintf(one, sizeof one, "; rank %d is missing (no answer: ended, stopped or computing)", world_rank);
    }
    append(text, sizeof text, one);
  }
  if (!text[0])
    append(text, sizeof text, "; all its ranks are there: a device or the network between them stands still");
  FAIL(CORE_ERR_TIMEOUT, "the deadline of %g s passed at %s%s", group->world->deadline, at, text);
}

static bool same_place(const comm_place *a, const comm_place *b) {
  return a->sequence == b->sequence && strcmp(a->group, b->group) == 0 &&
         strcmp(a->operation, b->operation) == 0;
}

core_status comm_watchdog_over_priv(const comm_group *group, const comm_place *here, const bool *pending) {
  const comm_world *world = group->world;
  bool *answered = calloc((size_t)world->size, sizeof *answered);
  bool *away = calloc((size_t)group->size, sizeof *away);
  comm_place *place = calloc((size_t)world->size, sizeof *place);
  CHECK(answered && away && place, CORE_ERR_MEMORY, "no memory for the watchdog");
  comm_mpi_ask_priv(world, here, answered, place);
  for (int32_t r = 0; r < group->size && !pending; r++) {
    int32_t other = group->world_rank[r];
    away[r] = r != group->rank && !(answered[other] && same_place(here, &place[other]));
  }
  core_status result = comm_watchdog_report_priv(group, here, pending ? pending : away, answered, place);
  free(answered);
  free(away);
  free(place);
  return core_error_trace(result, __func__, __FILE__, __LINE__);
}
