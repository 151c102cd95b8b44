/* Operations on memory of a device: checked here, then done by the transport that was chosen for the group.
 * Where the host reaches the memory they are the operations on host memory. */
#include <stdio.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "core/log.h"

/* ---- a group of one rank: nothing travels ---- */

core_status comm_device_copy_own_priv(const comm_group *group, const comm_piece *send, int32_t send_count,
                                      const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  int32_t r = 0;
  for (int32_t s = 0; s < send_count; s++) {
    if (send[s].peer != group->rank) continue;
    while (r < recv_count && recv[r].peer != group->rank) r++;
    CHECK(r < recv_count && recv[r].bytes == send[s].bytes, CORE_ERR_INTERNAL,
          "group '%s': a piece of %lld bytes to oneself is not expected", group->name,
          (long long)send[s].bytes);
    if (recv[r].data != send[s].data)
      TRY(group->device->copy_later(recv[r].data, send[s].data, (size_t)send[s].bytes, stream));
    r++;
  }
  while (r < recv_count && recv[r].peer != group->rank) r++;
  CHECK(r == recv_count, CORE_ERR_INTERNAL, "group '%s': a piece from oneself is missing", group->name);
  return CORE_OK;
}

static core_status self_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                                   int64_t count, core_stream *stream) {
  (void)group, (void)operation, (void)dtype, (void)data, (void)count, (void)stream;
  return CORE_OK;
}

static core_status self_reduce_scatter(comm_group *group, core_dtype dtype, void *data, const int64_t *count,
                                       core_stream *stream) {
  (void)group, (void)dtype, (void)data, (void)count, (void)stream;
  return CORE_OK;
}

static core_status self_all_gather(comm_group *group, void *data, const int64_t *bytes, core_stream *stream) {
  (void)group, (void)data, (void)bytes, (void)stream;
  return CORE_OK;
}

static core_status self_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                 const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  TRY(comm_device_copy_own_priv(group, send, send_count, recv, recv_count, stream));
  return CORE_OK;
}

static const comm_device_ops self_ops = {.name = "self",
                                         .exchange = self_exchange,
                                         .all_reduce = self_all_reduce,
                                         .reduce_scatter = self_reduce_scatter,
                                         .all_gather = self_all_gather};

/* ---- choice ---- */

#ifndef ANTIPHON_CUDA
core_status comm_nccl_possible_priv(comm_group *group, char *reason, size_t capacity) {
  (void)group;
  snprintf(reason, capacity, "this program was built without CUDA");
  return CORE_OK;
}

core_status comm_nccl_create_priv(comm_group *group) {
  FAIL(CORE_ERR_UNSUPPORTED, "group '%s': no NCCL", group->name);
}
#endif

static core_status choose(comm_group *group, comm_device_transport transport, int64_t staging) {
  char reason[256] = "as configured";
  if (transport == COMM_DEVICE_AUTO && group->size == 1) {
    group->device_ops = &self_ops;
    return CORE_OK;
  }
  if (transport != COMM_DEVICE_STAGED) {
    TRY(comm_nccl_possible_priv(group, reason, sizeof reason));
    CHECK(!reason[0] || transport == COMM_DEVICE_AUTO, CORE_ERR_UNSUPPORTED, "group '%s' cannot use NCCL: %s",
          group->name, reason);
    if (!reason[0]) {
      TRY(comm_nccl_create_priv(group));
      if (group->rank == 0) LOG_INFO("group '%s': %d ranks, nccl", group->name, group->size);
      return CORE_OK;
    }
  }
  TRY(comm_staged_create_priv(group, staging));
  if (group->rank == 0)
    LOG_INFO("group '%s': %d ranks, device memory goes through host memory: %s", group->name, group->size,
             reason);
  return CORE_OK;
}

static void forget_device(comm_group *group) {
  if (group->device_ops && group->device_ops->destroy) group->device_ops->destroy(group);
  comm_pending_destroy_priv(group);
  group->device_ops = NULL;
  group->device = NULL;
}

core_status comm_group_device(comm_group *group, const core_device *device, comm_device_transport transport,
                              int64_t staging) {
  CHECK(!group->device || group->device == device, CORE_ERR_ARGUMENT,
        "group '%s' serves another device already", group->name);
  CHECK(!device->host_access || transport != COMM_DEVICE_NCCL, CORE_ERR_UNSUPPORTED,
        "group '%s' cannot use NCCL: it moves memory of CUDA devices, not of %s", group->name, device->name);
  if (group->device) return CORE_OK;
  group->device = device;
  if (device->host_access) return CORE_OK;
  int64_t sequence = group->sequence;
  core_status status = choose(group, transport, staging);
  if (status != CORE_OK) {
    core_error first;
    core_error_save(&first);
    forget_device(group);
    return core_error_trace(core_error_restore(&first), __func__, __FILE__, __LINE__);
  }
  group->sequence = sequence; /* reports count the operations that were asked for */
  comm_device_watch_priv(group->world, device);
  return CORE_OK;
}

const char *comm_device_transport_name(const comm_group *group) {
  return group->device_ops ? group->device_ops->name : "host";
}

/* ---- operations ---- */

static core_status check_ready(const comm_group *group) {
  CHECK(group->device, CORE_ERR_ARGUMENT, "group '%s' was not told of a device", group->name);
  return CORE_OK;
}

core_status comm_device_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                 const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  TRY(check_ready(group));
  if (!group->device_ops) return comm_exchange(group, send, send_count, recv, recv_count);
  TRY(comm_check_pieces_priv(group, "send", send, send_count));
  TRY(comm_check_pieces_priv(group, "receive", recv, recv_count));
  TRY(group->device_ops->exchange(group, send, send_count, recv, recv_count, stream));
  return CORE_OK;
}

core_status comm_device_all_to_all(comm_group *group, const void *send, void *recv, int64_t bytes,
                                   core_stream *stream) {
  TRY(check_ready(group));
  CHECK(bytes >= 0, CORE_ERR_ARGUMENT, "group '%s': an all-to-all of %lld bytes for each rank", group->name,
        (long long)bytes);
  if (bytes == 0) return CORE_OK;
  if (group->device_ops && group->device_ops->all_to_all) {
    TRY(group->device_ops->all_to_all(group, send, recv, bytes, stream));
    return CORE_OK;
  }
  comm_piece *out = group->list, *in = group->list + group->size;
  for (int32_t r = 0; r < group->size; r++) {
    out[r] = (comm_piece){r, (char *)(uintptr_t)send + r * bytes, bytes};
    in[r] = (comm_piece){r, (char *)recv + r * bytes, bytes};
  }
  TRY(comm_device_exchange(group, out, group->size, in, group->size, stream));
  return CORE_OK;
}

core_status comm_device_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                                   int64_t count, core_stream *stream) {
  TRY(check_ready(group));
  TRY(comm_check_reduction_priv(dtype, count));
  if (!group->device_ops) return comm_all_reduce(group, operation, dtype, data, count);
  if (count > 0) TRY(group->device_ops->all_reduce(group, operation, dtype, data, count, stream));
  return CORE_OK;
}

static core_status check_ranges(const comm_group *group, const char *what, const int64_t *list, bool *empty) {
  *empty = true;
  for (int32_t r = 0; r < group->size; r++) {
    CHECK(list[r] >= 0, CORE_ERR_ARGUMENT, "group '%s': %s of %lld for rank %d", group->name, what,
          (long long)list[r], r);
    *empty &= list[r] == 0;
  }
  return CORE_OK;
}

core_status comm_device_reduce_scatter(comm_group *group, core_dtype dtype, void *data, const int64_t *count,
                                       core_stream *stream) {
  bool empty = true;
  TRY(check_ready(group));
  CHECK(dtype == CORE_FLOAT32 || dtype == CORE_FLOAT64, CORE_ERR_ARGUMENT, "reduce-scatter of %s",
        core_dtype_text(dtype));
  TRY(check_ranges(group, "reduce-scatter", count, &empty));
  if (empty) return CORE_OK;
  if (!group->device_ops) return comm_reduce_scatter_priv(group, dtype, data, count);
  TRY(group->device_ops->reduce_scatter(group, dtype, data, count, stream));
  return CORE_OK;
}

core_status comm_device_all_gather(comm_group *group, void *data, const int64_t *bytes, core_stream *stream) {
  bool empty = true;
  int64_t first = 0;
  TRY(check_ready(group));
  TRY(check_ranges(group, "all-gather", bytes, &empty));
  if (empty) return CORE_OK;
  for (int32_t r = 0; r < group->rank; r++) first += bytes[r];
  if (!group->device_ops) return comm_all_gather(group, (char *)data + first, bytes, data);
  TRY(group->device_ops->all_gather(group, data, bytes, stream));
  return CORE_OK;
}
