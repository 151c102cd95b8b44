/* Operations on memory of a device: where the host can reach it, they are the operations on host memory. */
#include "comm/comm_impl.h"

core_status comm_group_device(comm_group *group, const core_device *device, comm_device_transport transport,
                              int64_t staging) {
  (void)staging;
  CHECK(device->host_access, CORE_ERR_UNSUPPORTED, "group '%s': no transport for memory of %s", group->name,
        device->name);
  CHECK(transport != COMM_DEVICE_NCCL, CORE_ERR_UNSUPPORTED,
        "group '%s': NCCL moves memory of CUDA devices, not of %s", group->name, device->name);
  return CORE_OK;
}

const char *comm_device_transport_name(const comm_group *group) {
  (void)group;
  return "host";
}

core_status comm_device_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                                 const comm_piece *recv, int32_t recv_count, core_stream *stream) {
  (void)stream;
  TRY(comm_exchange(group, send, send_count, recv, recv_count));
  return CORE_OK;
}

core_status comm_device_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                                   int64_t count, core_stream *stream) {
  (void)stream;
  TRY(comm_all_reduce(group, operation, dtype, data, count));
  return CORE_OK;
}

core_status comm_device_reduce_scatter(comm_group *group, core_dtype dtype, void *data, const int64_t *count,
                                       core_stream *stream) {
  (void)stream;
  CHECK(dtype == CORE_FLOAT32 || dtype == CORE_FLOAT64, CORE_ERR_ARGUMENT, "reduce-scatter of %s",
        core_dtype_text(dtype));
  TRY(comm_reduce_scatter_priv(group, dtype, data, count));
  return CORE_OK;
}

core_status comm_device_all_gather(comm_group *group, void *data, const int64_t *bytes, core_stream *stream) {
  (void)stream;
  int64_t first = 0;
  for (int32_t r = 0; r < group->rank; r++) first += bytes[r];
  TRY(comm_all_gather(group, (char *)data + first, bytes, data));
  return CORE_OK;
}
