/* Operations on a group, all built on the ragged exchange. Every peer of every wait is therefore known by
 * name, and sums are taken in rank order: the same bits on every rank and in every run. */
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "core/clock.h"

/* Pieces to oneself are copied here, in order; the rest goes to the transport. Lists are compacted in
 * place, so callers pass scratch lists. */
static core_status copy_own(const comm_group *group, const comm_piece *send, int32_t send_count,
                            const comm_piece *recv, int32_t recv_count) {
  int32_t r = 0;
  for (int32_t s = 0; s < send_count; s++) {
    if (send[s].peer != group->rank) continue;
    while (r < recv_count && recv[r].peer != group->rank) r++;
    CHECK(r < recv_count && recv[r].bytes == send[s].bytes, CORE_ERR_INTERNAL,
          "group '%s': a piece of %lld bytes to oneself is not expected", group->name,
          (long long)send[s].bytes);
    if (recv[r].data != send[s].data) memcpy(recv[r].data, send[s].data, (size_t)send[s].bytes);
    r++;
  }
  while (r < recv_count && recv[r].peer != group->rank) r++;
  CHECK(r == recv_count, CORE_ERR_INTERNAL, "group '%s': a piece from oneself is missing", group->name);
  return CORE_OK;
}

core_status comm_exchange_as_priv(comm_group *group, const char *operation, const comm_piece *send,
                                  int32_t send_count, const comm_piece *recv, int32_t recv_count) {
  double start = core_clock_now();
  group->operation = operation;
  group->sequence++;
  for (int32_t i = 0; i < send_count; i++)
    if (send[i].peer != group->rank) group->bytes += send[i].bytes;
  TRY(copy_own(group, send, send_count, recv, recv_count));
  CHECK(group->size == 1 || !group->world->overdue, CORE_ERR_TIMEOUT,
        "group '%s': a deadline has passed before; the job can only end", group->name);
  core_status status =
      group->size > 1 ? group->transport->exchange(group, send, send_count, recv, recv_count) : CORE_OK;
  if (status == CORE_ERR_TIMEOUT) group->world->overdue = true;
  TRY(status);
  group->operation = "computing";
  group->seconds += core_clock_now() - start;
  return CORE_OK;
}

core_status comm_check_pieces_priv(const comm_group *group, const char *side, const comm_piece *piece,
                                   int32_t count) {
  CHECK(count >= 0, CORE_ERR_ARGUMENT, "group '%s': %d pieces to %s", group->name, count, side);
  for (int32_t i = 0; i < count; i++)
    CHECK(piece[i].peer >= 0 && piece[i].peer < group->size && piece[i].bytes >= 0, CORE_ERR_ARGUMENT,
          "group '%s' of %d ranks: piece %d to %s has %lld bytes for rank %d", group->name, group->size, i,
          side, (long long)piece[i].bytes, piece[i].peer);
  return CORE_OK;
}

core_status comm_exchange(comm_group *group, const comm_piece *send, int32_t send_count,
                          const comm_piece *recv, int32_t recv_count) {
  TRY(comm_check_pieces_priv(group, "send", send, send_count));
  TRY(comm_check_pieces_priv(group, "receive", recv, recv_count));
  TRY(comm_exchange_as_priv(group, "exchange", send, send_count, recv, recv_count));
  return CORE_OK;
}

core_status comm_barrier(comm_group *group) {
  char out = 1, *in = (char *)group->scratch;
  if (group->size == 1) return CORE_OK;
  int32_t n = 0;
  comm_piece *send = group->list, *recv = group->list + group->size;
  for (int32_t r = 0; r < group->size; r++) {
    if (r == group->rank) continue;
    send[n] = (comm_piece){r, &out, 1};
    recv[n++] = (comm_piece){r, in + r, 1};
  }
  TRY(comm_exchange_as_priv(group, "barrier", send, n, recv, n));
  return CORE_OK;
}

core_status comm_broadcast(comm_group *group, int32_t root, void *data, size_t bytes) {
  comm_piece *send = group->list, recv = {root, data, (int64_t)bytes};
  CHECK(root >= 0 && root < group->size, CORE_ERR_ARGUMENT, "root %d of a group of %d", root, group->size);
  int32_t n = 0;
  for (int32_t r = 0; r < group->size && group->rank == root && bytes > 0; r++)
    if (r != root) send[n++] = (comm_piece){r, data, (int64_t)bytes};
  int32_t expected = group->rank != root && bytes > 0;
  TRY(comm_exchange_as_priv(group, "broadcast", send, n, &recv, expected));
  return CORE_OK;
}

core_status comm_all_gather(comm_group *group, const void *send_data, const int64_t *bytes, void *recv_data) {
  comm_piece *send = group->list, *recv = group->list + group->size;
  int32_t sends = 0, recvs = 0;
  int64_t at = 0;
  for (int32_t r = 0; r < group->size; r++) {
    if (bytes[group->rank] > 0)
      send[sends++] = (comm_piece){r, (void *)(uintptr_t)send_data, bytes[group->rank]};
    if (bytes[r] > 0) recv[recvs++] = (comm_piece){r, (char *)recv_data + at, bytes[r]};
    at += bytes[r];
  }
  TRY(comm_exchange_as_priv(group, "all-gather", send, sends, recv, recvs));
  return CORE_OK;
}

core_status comm_gather_bytes(comm_group *group, int32_t root, const void *send_data, int64_t bytes,
                              char **recv_data, int64_t **offset) {
  *recv_data = NULL;
  *offset = NULL;
  CHECK(root >= 0 && root < group->size && bytes >= 0, CORE_ERR_ARGUMENT,
        "%lld bytes to root %d of a group of %d", (long long)bytes, root, group->size);
  int64_t *sizes = calloc((size_t)group->size * 2 + 1, sizeof *sizes);
  CHECK(sizes, CORE_ERR_MEMORY, "no memory to gather from %d ranks", group->size);
  int64_t *each = sizes + group->size + 1;
  for (int32_t r = 0; r < group->size; r++) each[r] = sizeof bytes;
  core_status status = comm_all_gather(group, &bytes, each, sizes + 1);
  comm_piece own = {root, (void *)(uintptr_t)send_data, bytes}, *recv = group->list;
  int32_t recvs = 0;
  char *all = NULL;
  if (status == CORE_OK && group->rank == root) {
    for (int32_t r = 0; r < group->size; r++) sizes[r + 1] += sizes[r];
    all = malloc((size_t)sizes[group->size] + 1);
    if (!all) status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory to gather");
    for (int32_t r = 0; r < group->size && all; r++)
      if (sizes[r + 1] > sizes[r]) recv[recvs++] = (comm_piece){r, all + sizes[r], sizes[r + 1] - sizes[r]};
  }
  if (status == CORE_OK) status = comm_exchange_as_priv(group, "gather", &own, bytes > 0, recv, recvs);
  if (status != CORE_OK || group->rank != root) {
    free(all);
    free(sizes);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
    return CORE_OK;
  }
  all[sizes[group->size]] = '\0';
  *recv_data = all;
  *offset = sizes;
  return CORE_OK;
}

#define REDUCE_LOOP(type, expression)                              \
  do {                                                             \
    type *a = target;                                              \
    const type *b = source;                                        \
    for (int64_t i = 0; i < count; i++) a[i] = (type)(expression); \
  } while (0)
#define REDUCE_TYPE(type)                                                    \
  do {                                                                       \
    if (operation == COMM_SUM) REDUCE_LOOP(type, a[i] + b[i]);               \
    if (operation == COMM_MAX) REDUCE_LOOP(type, a[i] > b[i] ? a[i] : b[i]); \
    if (operation == COMM_MIN) REDUCE_LOOP(type, a[i] < b[i] ? a[i] : b[i]); \
  } while (0)

static void reduce_into(comm_reduction operation, core_dtype dtype, void *restrict target,
                        const void *restrict source, int64_t count) {
  switch (dtype) {
    case CORE_FLOAT32:
      REDUCE_TYPE(float);
      break;
    case CORE_FLOAT64:
      REDUCE_TYPE(double);
      break;
    case CORE_INT32:
      REDUCE_TYPE(int32_t);
      break;
    case CORE_INT64:
      REDUCE_TYPE(int64_t);
      break;
    default:
      REDUCE_TYPE(uint64_t);
      break;
  }
}

/* Rank r sums slice r, elements [first[r], first[r] + slice[r]) of everybody's data, in rank order. The own
 * sum is left in the scratch. first, slice: the group's lists, filled by the caller alike on all ranks. */
static core_status reduce_slices(comm_group *group, const char *operation_name, comm_reduction operation,
                                 core_dtype dtype, char *data) {
  int64_t width = (int64_t)core_dtype_size(dtype), own = group->slice[group->rank];
  comm_piece *send = group->list, *recv = group->list + group->size;
  int32_t sends = 0, recvs = 0;
  for (int32_t r = 0; r < group->size; r++) {
    if (group->slice[r] > 0)
      send[sends++] = (comm_piece){r, data + group->first[r] * width, group->slice[r] * width};
    if (own > 0) recv[recvs++] = (comm_piece){r, group->scratch + r * group->piece, own * width};
  }
  TRY(comm_exchange_as_priv(group, operation_name, send, sends, recv, recvs));
  for (int32_t r = 1; r < group->size && own > 0; r++)
    reduce_into(operation, dtype, group->scratch, group->scratch + r * group->piece, own);
  return CORE_OK;
}

/* One round: `data` is cut into `size` slices of at most `slice` elements, which are summed and handed round.
 */
static core_status reduce_round(comm_group *group, comm_reduction operation, core_dtype dtype, char *data,
                                int64_t count, int64_t slice) {
  int64_t width = (int64_t)core_dtype_size(dtype);
  comm_piece *send = group->list, *recv = group->list + group->size;
  for (int32_t r = 0; r < group->size; r++) {
    int64_t left = count - r * slice;
    group->first[r] = r * slice;
    group->slice[r] = left < 0 ? 0 : left < slice ? left : slice;
  }
  TRY(reduce_slices(group, "all-reduce", operation, dtype, data));
  int64_t own = group->slice[group->rank];
  int32_t sends = 0, recvs = 0;
  for (int32_t r = 0; r < group->size; r++) {
    if (own > 0) send[sends++] = (comm_piece){r, group->scratch, own * width};
    if (group->slice[r] > 0)
      recv[recvs++] = (comm_piece){r, data + group->first[r] * width, group->slice[r] * width};
  }
  TRY(comm_exchange_as_priv(group, "all-reduce", send, sends, recv, recvs));
  return CORE_OK;
}

core_status comm_check_reduction_priv(core_dtype dtype, int64_t count) {
  bool known = dtype == CORE_FLOAT32 || dtype == CORE_FLOAT64 || dtype == CORE_INT32 || dtype == CORE_INT64 ||
               dtype == CORE_UINT64;
  CHECK(known && count >= 0, CORE_ERR_ARGUMENT, "all-reduce of %lld x %s", (long long)count,
        core_dtype_text(dtype));
  return CORE_OK;
}

core_status comm_all_reduce(comm_group *group, comm_reduction operation, core_dtype dtype, void *data,
                            int64_t count) {
  TRY(comm_check_reduction_priv(dtype, count));
  if (group->size == 1) return CORE_OK;
  int64_t width = (int64_t)core_dtype_size(dtype), most = group->piece / width;
  for (int64_t done = 0; done < count; done += most * group->size) {
    int64_t left = count - done, round = left < most * group->size ? left : most * group->size;
    int64_t slice = (round + group->size - 1) / group->size;
    TRY(reduce_round(group, operation, dtype, (char *)data + done * width, round, slice));
  }
  return CORE_OK;
}

/* Rounds of at most a piece of every rank's range. */
core_status comm_reduce_scatter_priv(comm_group *group, core_dtype dtype, void *data, const int64_t *count) {
  int64_t width = (int64_t)core_dtype_size(dtype), most = group->piece / width, longest = 0, at = 0;
  if (group->size == 1) return CORE_OK;
  for (int32_t r = 0; r < group->size; r++)
    if (count[r] > longest) longest = count[r];
  for (int64_t done = 0; done < longest; done += most) {
    at = 0;
    for (int32_t r = 0; r < group->size; at += count[r++]) {
      int64_t left = count[r] - done;
      group->first[r] = at + done;
      group->slice[r] = left < 0 ? 0 : left < most ? left : most;
    }
    TRY(reduce_slices(group, "reduce-scatter", COMM_SUM, dtype, data));
    int64_t own = group->slice[group->rank];
    if (own > 0)
      memcpy((char *)data + group->first[group->rank] * width, group->scratch, (size_t)(own * width));
  }
  return CORE_OK;
}
