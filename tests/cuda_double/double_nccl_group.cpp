/* One NCCL operation, that is, a group of calls. It starts when it is the first of its stream and of its
 * communicator, sends what others need, and ends when it has what it needs and its messages have been taken.
 * Every message says what it is part of, so that ranks that disagree on the order of operations, on counts or
 * types are told so by name instead of hanging. */
#include <algorithm>
#include <cstring>

#include "tests/cuda_double/double_nccl.h"

namespace cuda_double {

static const char *const names[] = {"all-reduce", "reduce",     "reduce-scatter", "all-gather",
                                    "broadcast",  "all-to-all", "send/receive"};

static int64_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

/* ---- reductions ---- */

template <class T>
static void combine(T *into, const T *from, int64_t count, ncclRedOp_t op) {
  for (int64_t i = 0; i < count; i++) {
    if (op == ncclSum) into[i] = (T)(into[i] + from[i]);
    if (op == ncclProd) into[i] = (T)(into[i] * from[i]);
    if (op == ncclMax) into[i] = from[i] > into[i] ? from[i] : into[i];
    if (op == ncclMin) into[i] = from[i] < into[i] ? from[i] : into[i];
  }
}

static void combine(void *into, const void *from, int64_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
#define TYPE(name, host)                                  \
  case name:                                              \
    combine((host *)into, (const host *)from, count, op); \
    break
    TYPE(ncclInt8, int8_t);
    TYPE(ncclUint8, uint8_t);
    TYPE(ncclInt32, int32_t);
    TYPE(ncclUint32, uint32_t);
    TYPE(ncclInt64, int64_t);
    TYPE(ncclUint64, uint64_t);
    TYPE(ncclFloat16, __half);
    TYPE(ncclFloat32, float);
    TYPE(ncclFloat64, double);
    TYPE(ncclBfloat16, __nv_bfloat16);
#undef TYPE
  }
}

/* ---- the operation ---- */

std::pair<int64_t, int64_t> Group::part(const Call &call, int from, int to) const {
  int64_t bytes = call.count * size_of(call.type);
  switch (call.what) {
    case What::all_reduce:
    case What::all_gather:
      return {bytes, 0};
    case What::reduce:
      return {to == call.root ? bytes : -1, 0};
    case What::broadcast:
      return {from == call.root ? bytes : -1, 0};
    case What::message:
      return {call.root == to ? bytes : -1, 0};
    default: /* reduce-scatter, all-to-all */
      return {bytes, to * bytes};
  }
}

Header Group::header(size_t index) const {
  const Call &call = calls[index];
  bool message = call.what == What::message;
  return {sequence[index], call.count, call.what, call.type, call.op, message ? -1 : call.root};
}

/* The k-th message to oneself is received by the k-th call that expects one. */
void Group::start_own() {
  std::deque<size_t> sends;
  for (size_t i = 0; i < calls.size(); i++)
    if (calls[i].what == What::message && calls[i].root == comm->rank && calls[i].send) sends.push_back(i);
  for (size_t i = 0; i < calls.size() && !sends.empty(); i++) {
    if (calls[i].what != What::message || calls[i].root != comm->rank || !calls[i].recv) continue;
    arrived[{i, comm->rank}] = std::move(arrived[{sends.front(), comm->rank}]);
    sends.pop_front();
  }
}

void Group::start() {
  Access access;
  expected.resize((size_t)comm->size);
  for (size_t i = 0; i < calls.size(); i++) {
    const Call &call = calls[i];
    for (int peer = 0; peer < comm->size; peer++) {
      auto [bytes, offset] = part(call, comm->rank, peer);
      bool sends = bytes >= 0 && call.send, receives = call.what == What::message
                                                           ? call.recv && call.root == peer
                                                           : part(call, peer, comm->rank).first >= 0;
      if (sends && bytes > 0 && !inside((const char *)call.send + offset, (size_t)bytes, "NCCL")) continue;
      if (sends && peer == comm->rank)
        arrived[{i, peer}].assign((const char *)call.send + offset, (const char *)call.send + offset + bytes);
      if (peer == comm->rank) continue;
      if (sends) {
        Bytes message(sizeof(Header) + (size_t)bytes);
        Header head = header(i);
        memcpy(message.data(), &head, sizeof head);
        if (bytes > 0) memcpy(message.data() + sizeof head, (const char *)call.send + offset, (size_t)bytes);
        sendings.push_back(wire_send(comm->world[(size_t)peer], comm->tag, std::move(message)));
      }
      if (receives) expected[(size_t)peer].push_back({i, {}, false});
    }
  }
  start_own();
  started = true;
}

bool Group::agrees(const Header &mine, const Header &theirs, int peer) {
  bool message = mine.what == What::message || theirs.what == What::message;
  bool same =
      mine.what == theirs.what && mine.count == theirs.count && mine.type == theirs.type &&
      (message || (mine.op == theirs.op && mine.root == theirs.root && mine.sequence == theirs.sequence));
  if (same) return true;
  report(
      false,
      "ranks disagree: rank %d is at operation %lld, %s of %lld elements of type %d; rank %d sent operation "
      "%lld, %s of %lld elements of type %d",
      comm->world[(size_t)comm->rank], (long long)mine.sequence, names[(int)mine.what], (long long)mine.count,
      mine.type, comm->world[(size_t)peer], (long long)theirs.sequence, names[(int)theirs.what],
      (long long)theirs.count, theirs.type);
  comm->state = ncclInternalError;
  comm->last_error = "ranks disagree on an operation";
  return false;
}

/* Takes what has come; true when nothing is missing and everything sent was taken. */
bool Group::receive() {
  bool complete = true;
  for (int peer = 0; peer < comm->size; peer++) {
    auto &list = expected[(size_t)peer];
    Bytes bytes;
    int from = comm->world[(size_t)peer];
    while (!list.empty() && wire_take(&from, comm->tag, &bytes)) {
      Header theirs;
      memcpy(&theirs, bytes.data(), sizeof theirs);
      if (!agrees(header(list.front().call), theirs, peer)) return false;
      arrived[{list.front().call, peer}].assign(bytes.begin() + sizeof theirs, bytes.end());
      list.pop_front();
    }
    complete &= list.empty();
  }
  for (auto &sending : sendings) complete &= wire_arrived(*sending);
  return complete;
}

void Group::finish_call(size_t index) {
  const Call &call = calls[index];
  int64_t bytes = call.count * size_of(call.type);
  bool reduces =
      call.what == What::all_reduce || call.what == What::reduce || call.what == What::reduce_scatter;
  bool gathers = call.what == What::all_gather || call.what == What::all_to_all;
  if (call.what == What::reduce && call.root != comm->rank) return;
  if (!call.recv || bytes == 0) return;
  if (!inside(call.recv, (size_t)(gathers ? bytes * comm->size : bytes), "NCCL")) return;
  bool first = true;
  for (int peer = 0; peer < comm->size; peer++) {
    auto found = arrived.find({index, peer});
    if (found == arrived.end()) continue;
    char *to = (char *)call.recv + (gathers ? peer * bytes : 0);
    if (reduces && !first)
      combine(to, found->second.data(), call.count, call.type, call.op);
    else
      memcpy(to, found->second.data(), (size_t)bytes);
    first = false;
  }
}

void Group::finish() {
  Access access;
  for (size_t i = 0; i < calls.size(); i++) finish_call(i);
}

bool Group::run() {
  if (comm->aborted) return true;
  if (comm->state != ncclSuccess && comm->state != ncclInProgress) return false;
  if (comm->order.front() != this || absent) return false;
  if (failing) {
    comm->state = ncclRemoteError;
    comm->last_error = "injected failure";
    return false;
  }
  if (!started) start();
  if (!receive()) return false;
  finish();
  return true;
}

}  // namespace cuda_double
