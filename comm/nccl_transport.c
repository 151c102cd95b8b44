/* The NCCL transport: one communicator for each group, on a stream of its own that waits for the caller's
 * stream and is waited for by it. The communicator does not block: what NCCL has not accepted yet is polled
 * for under the deadline, and what the device has not finished is known to the watch (device_watch.c). */
#include <nccl.h>
#include <sched.h> /* sched_yield */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* gethostname */

#include "comm/comm_impl.h"
#include "core/clock.h"

typedef struct nccl_group {
  ncclComm_t comm;
  core_stream *stream;
  core_event *before, *after;
  bool failed; /* nothing but the end is left */
} nccl_group;

static core_status failed(comm_group *group, const char *what, ncclResult_t code) {
  nccl_group *state = group->device_private;
  const char *more = ncclGetLastError(state->comm);
  state->failed = true;
  FAIL(code == ncclInvalidArgument || code == ncclInvalidUsage ? CORE_ERR_UNSUPPORTED : CORE_ERR_COMM,
       "group '%s': NCCL: %s: %s%s%s", group->name, what, ncclGetErrorString(code), more && *more ? ": " : "",
       more ? more : "");
}

/* Waits until NCCL has done, or taken over, what was just asked of it. */
static core_status settled(comm_group *group, const char *what, ncclResult_t code) {
  nccl_group *state = group->device_private;
  comm_place here;
  double start = core_clock_now();
  comm_place_now_priv(group, &here);
  for (int64_t spin = 0; code == ncclInProgress; spin++) {
    ncclResult_t asked = ncclCommGetAsyncError(state->comm, &code);
    if (asked != ncclSuccess) return failed(group, what, asked);
    if (code != ncclInProgress) break;
    sched_yield();
    if (spin % 64 == 63) TRY(comm_device_overdue_priv(group, &here, start));
  }
  if (code != ncclSuccess) return failed(group, what, code);
  return CORE_OK;
}

static core_status nccl_check(comm_group *group) {
  nccl_group *state = group->device_private;
  ncclResult_t code = ncclSuccess;
  if (!state->comm) return CORE_OK;
  ncclResult_t asked = ncclCommGetAsyncError(state->comm, &code);
  if (asked != ncclSuccess) code = asked;
  if (code == ncclSuccess || code == ncclInProgress) return CORE_OK;
  return failed(group, group->operation, code);
}

/* ---- operations: begin, calls, end ---- */

/* `stream`: the stream that the calls go to. */
static core_status begin(comm_group *group, const char *operation, core_stream *caller,
                         cudaStream_t *stream) {
  nccl_group *state = group->device_private;
  CHECK(!state->failed, CORE_ERR_COMM, "group '%s': NCCL failed before", group->name);
  group->operation = operation;
  group->sequence++;
  TRY(group->device->event_record(state->before, caller));
  TRY(group->device->event_before(state->stream, state->before));
  *stream = (cudaStream_t)state->stream;
  return CORE_OK;
}

static core_status end(comm_group *group, const char *what, ncclResult_t code, core_stream *caller) {
  nccl_group *state = group->device_private;
  TRY(settled(group, what, code));
  TRY(group->device->event_record(state->after, state->stream));
  TRY(group->device->event_before(caller, state->after));
  TRY(comm_pending_add_priv(group, state->stream));
  group->operation = "computing";
  return CORE_OK;
}

/* The first failure among the calls of a group; the group is ended in any case. */
static ncclResult_t group_end(ncclResult_t code) {
  ncclResult_t ended = ncclGroupEnd();
  return code == ncclSuccess || code == ncclInProgress ? ended : code;
}

static bool good(ncclResult_t code) {
  return code == ncclSuccess || code == ncclInProgress;
}

static core_status nccl_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                 const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  nccl_group *state = group->device_private;
  cudaStream_t on;
  ncclResult_t code = ncclSuccess;
  TRY(comm_device_copy_own_priv(group, send, send_count, recv, recv_count, stream));
  TRY(begin(group, "exchange", stream, &on));
  ncclGroupStart();
  for (int32_t i = 0; i < send_count && good(code); i++) {
    if (send[i].peer == group->rank || send[i].bytes == 0) continue;
    code = ncclSend(send[i].data, (size_t)send[i].bytes, ncclInt8, send[i].peer, state->comm, on);
    group->bytes += send[i].bytes;
  }
  for (int32_t i = 0; i < recv_count && good(code); i++) {
    if (recv[i].peer == group->rank || recv[i].bytes == 0) continue;
    code = ncclRecv(recv[i].data, (size_t)recv[i].bytes, ncclInt8, recv[i].peer, state->comm, on);
  }
  TRY(end(group, "exchange", group_end(code), stream));
  return CORE_OK;
}

static core_status nccl_all_to_all(comm_group *group, const void *send, void *recv, int64_t bytes,
                                   core_stream *stream) {
  nccl_group *state = group->device_private;
  cudaStream_t on = NULL;
  TRY(begin(group, "all-to-all", stream, &on));
  ncclResult_t code = ncclAlltoAll(send, recv, (size_t)bytes, ncclInt8, state->comm, on);
  group->bytes += bytes * (group->size - 1);
  TRY(end(group, "all-to-all", code, stream));
  return CORE_OK;
}

static ncclDataType_t type_of(core_dtype dtype) {
  switch (dtype) {
    case CORE_FLOAT32:
      return ncclFloat32;
    case CORE_FLOAT64:
      return ncclFloat64;
    case CORE_INT32:
      return ncclInt32;
    case CORE_INT64:
      return ncclInt64;
    default:
      return ncclUint64;
  }
}

static core_status nccl_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                                   int64_t count, core_stream *stream) {
  nccl_group *state = group->device_private;
  ncclRedOp_t op = operation == COMM_SUM ? ncclSum : operation == COMM_MAX ? ncclMax : ncclMin;
  cudaStream_t on;
  TRY(begin(group, "all-reduce", stream, &on));
  ncclResult_t code = ncclAllReduce(data, data, (size_t)count, type_of(dtype), op, state->comm, on);
  group->bytes += 2 * count * (int64_t)core_dtype_size(dtype) * (group->size - 1) / group->size;
  TRY(end(group, "all-reduce", code, stream));
  return CORE_OK;
}

static bool all_equal(const comm_group *group, const int64_t *list) {
  for (int32_t r = 1; r < group->size; r++)
    if (list[r] != list[0]) return false;
  return true;
}

/* One call where the ranges are equal; else one for each range, in a group. */
static core_status nccl_reduce_scatter(comm_group *group, core_dtype dtype, void *data, const int64_t *count,
                                       core_stream *stream) {
  nccl_group *state = group->device_private;
  int64_t width = (int64_t)core_dtype_size(dtype), first = 0;
  ncclDataType_t type = type_of(dtype);
  ncclResult_t code = ncclSuccess;
  cudaStream_t on;
  TRY(begin(group, "reduce-scatter", stream, &on));
  if (all_equal(group, count)) {
    char *own = (char *)data + group->rank * count[0] * width;
    code = ncclReduceScatter(data, own, (size_t)count[0], type, ncclSum, state->comm, on);
    group->bytes += count[0] * width * (group->size - 1);
  } else {
    ncclGroupStart();
    for (int32_t r = 0; r < group->size && good(code); first += count[r++]) {
      char *range = (char *)data + first * width;
      if (count[r] > 0) code = ncclReduce(range, range, (size_t)count[r], type, ncclSum, r, state->comm, on);
      if (r != group->rank) group->bytes += count[r] * width;
    }
    code = group_end(code);
  }
  TRY(end(group, "reduce-scatter", code, stream));
  return CORE_OK;
}

static core_status nccl_all_gather(comm_group *group, void *data, const int64_t *bytes, core_stream *stream) {
  nccl_group *state = group->device_private;
  ncclResult_t code = ncclSuccess;
  int64_t first = 0;
  cudaStream_t on;
  TRY(begin(group, "all-gather", stream, &on));
  group->bytes += bytes[group->rank] * (group->size - 1);
  if (all_equal(group, bytes)) {
    char *own = (char *)data + group->rank * bytes[0];
    code = ncclAllGather(own, data, (size_t)bytes[0], ncclInt8, state->comm, on);
  } else {
    ncclGroupStart();
    for (int32_t r = 0; r < group->size && good(code); first += bytes[r++]) {
      char *range = (char *)data + first;
      if (bytes[r] > 0) code = ncclBroadcast(range, range, (size_t)bytes[r], ncclInt8, r, state->comm, on);
    }
    code = group_end(code);
  }
  TRY(end(group, "all-gather", code, stream));
  return CORE_OK;
}

/* ---- beginning and end of a communicator ---- */

static void nccl_abort(comm_group *group) {
  nccl_group *state = group->device_private;
  if (state && state->comm) ncclCommAbort(state->comm);
  if (state) state->comm = NULL;
}

/* In order where everything went well; otherwise what is left is dropped. */
static void nccl_destroy(comm_group *group) {
  nccl_group *state = group->device_private;
  if (!state) return;
  if (state->comm && !state->failed) {
    core_status status = settled(group, "end", ncclCommFinalize(state->comm));
    if (status == CORE_OK && ncclCommDestroy(state->comm) == ncclSuccess) state->comm = NULL;
  }
  nccl_abort(group);
  if (state->before) group->device->event_destroy(state->before);
  if (state->after) group->device->event_destroy(state->after);
  if (state->stream) group->device->stream_destroy(state->stream);
  free(state);
  group->device_private = NULL;
}

static const comm_device_ops nccl_ops = {.name = "nccl",
                                         .exchange = nccl_exchange,
                                         .all_to_all = nccl_all_to_all,
                                         .all_reduce = nccl_all_reduce,
                                         .reduce_scatter = nccl_reduce_scatter,
                                         .all_gather = nccl_all_gather,
                                         .check = nccl_check,
                                         .abort = nccl_abort,
                                         .destroy = nccl_destroy};

/* Which physical device this process uses. NCCL refuses two ranks with the same one. */
typedef struct identity {
  char host[192], bus[64];
} identity;

static core_status own_identity(const comm_group *group, identity *out) {
  int device = 0;
  memset(out, 0, sizeof *out);
  CHECK(group->device->kind == CORE_DEVICE_CUDA, CORE_ERR_UNSUPPORTED, "%s is no CUDA device",
        group->device->name);
  gethostname(out->host, sizeof out->host - 1);
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetPCIBusId(out->bus, sizeof out->bus, device);
  CHECK(error == cudaSuccess, CORE_ERR_DEVICE, "%s: %s", group->device->name, cudaGetErrorString(error));
  return CORE_OK;
}

static void name_duplicate(const comm_group *group, const identity *all, char *reason, size_t capacity) {
  reason[0] = '\0';
  for (int32_t a = 0; a < group->size; a++)
    for (int32_t b = a + 1; b < group->size; b++)
      if (memcmp(&all[a], &all[b], sizeof *all) == 0) {
        snprintf(reason, capacity, "ranks %d and %d share the device %s of host %s", group->world_rank[a],
                 group->world_rank[b], all[a].bus, all[a].host);
        return;
      }
}

core_status comm_nccl_possible_priv(comm_group *group, char *reason, size_t capacity) {
  identity own;
  TRY(comm_agree(group, own_identity(group, &own)));
  identity *all = calloc((size_t)group->size, sizeof *all);
  int64_t *bytes = calloc((size_t)group->size, sizeof *bytes);
  core_status status = CORE_OK;
  if (!all || !bytes)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory to compare devices");
  status = comm_agree(group, status);
  for (int32_t r = 0; r < group->size && status == CORE_OK; r++) bytes[r] = sizeof own;
  if (status == CORE_OK) status = comm_all_gather(group, &own, bytes, all);
  if (status == CORE_OK) name_duplicate(group, all, reason, capacity);
  free(all);
  free(bytes);
  TRY(status);
  return CORE_OK;
}

static core_status prepare(comm_group *group, ncclUniqueId *id) {
  nccl_group *state = calloc(1, sizeof *state);
  CHECK(state, CORE_ERR_MEMORY, "group '%s': no memory", group->name);
  group->device_private = state;
  group->device_ops = &nccl_ops;
  TRY(group->device->stream_create(&state->stream));
  TRY(group->device->event_create(&state->before));
  TRY(group->device->event_create(&state->after));
  TRY(comm_pending_create_priv(group));
  if (group->rank == 0) {
    ncclResult_t code = ncclGetUniqueId(id);
    if (code != ncclSuccess) return failed(group, "ncclGetUniqueId", code);
  }
  return CORE_OK;
}

static core_status connect(comm_group *group, ncclUniqueId id) {
  nccl_group *state = group->device_private;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclResult_t code = ncclCommInitRankConfig(&state->comm, group->size, id, group->rank, &config);
  TRY(settled(group, "connecting", code));
  return CORE_OK;
}

core_status comm_nccl_create_priv(comm_group *group) {
  ncclUniqueId id;
  memset(&id, 0, sizeof id);
  TRY(comm_agree(group, prepare(group, &id)));
  TRY(comm_broadcast(group, 0, &id, sizeof id));
  group->operation = "connecting NCCL";
  core_status status = connect(group, id);
  if (status == CORE_ERR_TIMEOUT) return core_error_trace(status, __func__, __FILE__, __LINE__);
  TRY(comm_agree(group, status));
  return CORE_OK;
}
