/* Memory of a device by way of the host: copied to page-locked memory, moved by the group's own transport,
 * copied back. Each direction has one slot per rank, so that what two ranks exchange in one round is known to
 * both from the sizes alone, and rounds cannot wait for one another in a circle. */
#include <stdlib.h>

#include "comm/comm_impl.h"

/* Pieces cut to what fits a slot: in page-locked memory, and where they come from or go to. */
typedef struct fragments {
  comm_piece *host;
  char **device;
  int32_t count, capacity;
} fragments;

/* Where the cutting of one peer's pieces has come. */
typedef struct cursor {
  int32_t piece;
  int64_t done; /* bytes of that piece */
} cursor;

typedef struct staged_group {
  char *out, *in;          /* [size][slot] */
  int64_t slot;            /* bytes, a multiple of 64 */
  int64_t *range;          /* [size] */
  cursor *sent, *received; /* [size] */
  fragments send, recv;
} staged_group;

static core_status copy_out(comm_group *group, core_stream *stream) {
  const staged_group *state = group->device_private;
  for (int32_t i = 0; i < state->send.count; i++)
    TRY(group->device->copy_later(state->send.host[i].data, state->send.device[i],
                                  (size_t)state->send.host[i].bytes, stream));
  return CORE_OK;
}

static core_status copy_in(comm_group *group, core_stream *stream) {
  const staged_group *state = group->device_private;
  for (int32_t i = 0; i < state->recv.count; i++)
    TRY(group->device->copy_later(state->recv.device[i], state->recv.host[i].data,
                                  (size_t)state->recv.host[i].bytes, stream));
  return CORE_OK;
}

static core_status reserve(fragments *list) {
  if (list->count < list->capacity) return CORE_OK;
  int32_t capacity = 2 * list->capacity + 64;
  comm_piece *host = realloc(list->host, (size_t)capacity * sizeof *host);
  if (host) list->host = host;
  char **device = realloc(list->device, (size_t)capacity * sizeof *device);
  if (device) list->device = device;
  CHECK(host && device, CORE_ERR_MEMORY, "no memory for %d fragments", capacity);
  list->capacity = capacity;
  return CORE_OK;
}

/* Adds to `list` what follows the cursor of what is exchanged with `peer`, at most a slot of it. */
static core_status cut(const comm_piece *piece, int32_t count, int32_t peer, cursor *from, char *slot,
                       int64_t room, fragments *list) {
  for (; from->piece < count; from->piece++, from->done = 0) {
    const comm_piece *one = &piece[from->piece];
    if (one->peer != peer) continue;
    int64_t left = one->bytes - from->done, bytes = left < room ? left : room;
    if (left > 0 && bytes == 0) return CORE_OK;
    TRY(reserve(list));
    list->host[list->count] = (comm_piece){peer, slot, bytes};
    list->device[list->count++] = (char *)one->data + from->done;
    slot += bytes;
    room -= bytes;
    from->done += bytes;
    if (from->done < one->bytes) return CORE_OK;
  }
  return CORE_OK;
}

static core_status cut_round(comm_group *group, const comm_piece *send, int32_t send_count,
                             const comm_piece *recv, int32_t recv_count) {
  staged_group *state = group->device_private;
  state->send.count = state->recv.count = 0;
  for (int32_t r = 0; r < group->size; r++) {
    int64_t at = r * state->slot;
    if (r == group->rank) continue;
    TRY(cut(send, send_count, r, &state->sent[r], state->out + at, state->slot, &state->send));
    TRY(cut(recv, recv_count, r, &state->received[r], state->in + at, state->slot, &state->recv));
  }
  return CORE_OK;
}

/* The wait before the exchange also ends the copies of the round before, so the memory is free. */
static core_status staged_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                   const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  staged_group *state = group->device_private;
  for (int32_t r = 0; r < group->size; r++) state->sent[r] = state->received[r] = (cursor){0, 0};
  TRY(comm_device_copy_own_priv(group, send, send_count, recv, recv_count, stream));
  for (;;) {
    TRY(cut_round(group, send, send_count, recv, recv_count));
    if (state->send.count == 0 && state->recv.count == 0) return CORE_OK;
    TRY(copy_out(group, stream));
    TRY(group->device->stream_wait(stream));
    TRY(comm_exchange_as_priv(group, "exchange", state->send.host, state->send.count, state->recv.host,
                              state->recv.count));
    TRY(copy_in(group, stream));
  }
}

static core_status staged_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype,
                                     void *data, int64_t count, core_stream *stream) {
  staged_group *state = group->device_private;
  int64_t width = (int64_t)core_dtype_size(dtype), most = state->slot * group->size / width;
  if (group->size == 1) return CORE_OK;
  for (int64_t done = 0; done < count; done += most) {
    int64_t part = count - done < most ? count - done : most;
    char *there = (char *)data + done * width;
    TRY(group->device->copy(state->out, there, (size_t)(part * width), stream));
    TRY(comm_all_reduce(group, operation, dtype, state->out, part));
    TRY(group->device->copy_later(there, state->out, (size_t)(part * width), stream));
  }
  return CORE_OK;
}

/* One round of an operation on ranges: `most` units of each, from unit `done` on, side by side in the staging
 * memory. Fills state->range; returns whether anything is left. */
static bool next_ranges(comm_group *group, const int64_t *all, int64_t done, int64_t most) {
  staged_group *state = group->device_private;
  bool any = false;
  for (int32_t r = 0; r < group->size; r++) {
    int64_t left = all[r] - done;
    state->range[r] = left < 0 ? 0 : left < most ? left : most;
    any |= state->range[r] > 0;
  }
  return any;
}

/* Copies rank r's part of this round, between its range in `data` and its place in the staging memory. */
static core_status copy_range(comm_group *group, int32_t r, char *data, const int64_t *all, int64_t done,
                              int64_t width, bool to_device, core_stream *stream) {
  staged_group *state = group->device_private;
  int64_t there = done, here = 0;
  for (int32_t i = 0; i < r; i++) there += all[i], here += state->range[i];
  if (state->range[r] == 0) return CORE_OK;
  char *device = data + there * width, *host = state->out + here * width;
  TRY(group->device->copy_later(to_device ? device : host, to_device ? host : device,
                                (size_t)(state->range[r] * width), stream));
  return CORE_OK;
}

static core_status staged_reduce_scatter(comm_group *group, core_dtype dtype, void *data,
                                         const int64_t *count, core_stream *stream) {
  staged_group *state = group->device_private;
  int64_t width = (int64_t)core_dtype_size(dtype), most = state->slot / width;
  if (group->size == 1) return CORE_OK;
  for (int64_t done = 0; next_ranges(group, count, done, most); done += most) {
    for (int32_t r = 0; r < group->size; r++)
      TRY(copy_range(group, r, data, count, done, width, false, stream));
    TRY(group->device->stream_wait(stream));
    TRY(comm_reduce_scatter_priv(group, dtype, state->out, state->range));
    TRY(copy_range(group, group->rank, data, count, done, width, true, stream));
  }
  return CORE_OK;
}

static core_status staged_all_gather(comm_group *group, void *data, const int64_t *bytes,
                                     core_stream *stream) {
  staged_group *state = group->device_private;
  if (group->size == 1) return CORE_OK;
  for (int64_t done = 0; next_ranges(group, bytes, done, state->slot); done += state->slot) {
    int64_t first = 0;
    for (int32_t r = 0; r < group->rank; r++) first += state->range[r];
    TRY(copy_range(group, group->rank, data, bytes, done, 1, false, stream));
    TRY(group->device->stream_wait(stream));
    TRY(comm_all_gather(group, state->out + first, state->range, state->out));
    for (int32_t r = 0; r < group->size; r++)
      if (r != group->rank) TRY(copy_range(group, r, data, bytes, done, 1, true, stream));
  }
  return CORE_OK;
}

static void staged_destroy(comm_group *group) {
  staged_group *state = group->device_private;
  if (!state) return;
  if (state->out) group->device->host_release(state->out);
  if (state->in) group->device->host_release(state->in);
  free(state->range);
  free(state->sent);
  free(state->received);
  free(state->send.host);
  free(state->send.device);
  free(state->recv.host);
  free(state->recv.device);
  free(state);
  group->device_private = NULL;
}

static const comm_device_ops staged_ops = {.name = "staged",
                                           .exchange = staged_exchange,
                                           .all_reduce = staged_all_reduce,
                                           .reduce_scatter = staged_reduce_scatter,
                                           .all_gather = staged_all_gather,
                                           .destroy = staged_destroy};

static core_status create_local(comm_group *group, int64_t staging) {
  size_t size = (size_t)group->size;
  staged_group *state = calloc(1, sizeof *state);
  CHECK(state, CORE_ERR_MEMORY, "group '%s': no memory", group->name);
  group->device_private = state;
  group->device_ops = &staged_ops;
  state->slot = staging / group->size / 64 * 64;
  if (state->slot < 64) state->slot = 64;
  state->range = calloc(size, sizeof *state->range);
  state->sent = calloc(size, sizeof *state->sent);
  state->received = calloc(size, sizeof *state->received);
  CHECK(state->range && state->sent && state->received, CORE_ERR_MEMORY, "group '%s': no memory",
        group->name);
  if (group->size == 1) return CORE_OK;
  TRY(group->device->host_allocate(size * (size_t)state->slot, (void **)&state->out));
  TRY(group->device->host_allocate(size * (size_t)state->slot, (void **)&state->in));
  return CORE_OK;
}

core_status comm_staged_create_priv(comm_group *group, int64_t staging) {
  TRY(comm_agree(group, create_local(group, staging)));
  return CORE_OK;
}
