/* NCCL over messages: communicators and calls. A communicator comes to be as in NCCL: its ranks say who they
 * are to the process that made the unique id, which answers everybody with the list. */
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/cuda_double/double_nccl.h"

using namespace cuda_double;

static std::set<ncclComm_t> comms;
static thread_local std::string last_error;

static ncclResult_t refuse(ncclResult_t code, const std::string &text) {
  last_error = text;
  return code;
}

/* ---- how communicators come to be ---- */

constexpr int tag_hello = 1, tag_table = 2, first_tag = 100;

struct Identity { /* of a unique id */
  uint64_t magic, serial;
  int32_t maker;
};

struct Hello {
  uint64_t serial;
  int32_t size, rank, world, bus;
  char host[64];
};

static uint64_t serials;
static std::map<uint64_t, std::vector<Hello>> waiting_room; /* of ids made here */
static std::map<uint64_t, std::vector<Hello>> tables;       /* answers that came */
static std::vector<std::shared_ptr<Sending>> letters;

static void answer(const std::vector<Hello> &table) {
  for (const Hello &one : table) {
    if (one.world == wire_rank()) {
      tables[one.serial] = table;
      continue;
    }
    Bytes bytes(table.size() * sizeof(Hello));
    memcpy(bytes.data(), table.data(), bytes.size());
    letters.push_back(wire_send(one.world, tag_table, std::move(bytes)));
  }
}

static void welcome(const Hello &hello) {
  auto &room = waiting_room[hello.serial];
  room.push_back(hello);
  if ((int)room.size() < hello.size) return;
  std::sort(room.begin(), room.end(), [](const Hello &a, const Hello &b) { return a.rank < b.rank; });
  answer(room);
  waiting_room.erase(hello.serial);
}

static void read_letters() {
  Bytes bytes;
  for (int from = -1; wire_take(&from, tag_hello, &bytes); from = -1) {
    Hello hello;
    memcpy(&hello, bytes.data(), sizeof hello);
    welcome(hello);
  }
  for (int from = -1; wire_take(&from, tag_table, &bytes); from = -1) {
    std::vector<Hello> table(bytes.size() / sizeof(Hello));
    memcpy(table.data(), bytes.data(), bytes.size());
    tables[table[0].serial] = table;
  }
  letters.erase(std::remove_if(letters.begin(), letters.end(), [](auto &l) { return wire_arrived(*l); }),
                letters.end());
}

static bool duplicate(ncclComm_t comm, const std::vector<Hello> &table) {
  for (size_t a = 0; a < table.size(); a++)
    for (size_t b = 0; b < a; b++) {
      if (table[a].bus != table[b].bus || strcmp(table[a].host, table[b].host) != 0) continue;
      char text[128];
      snprintf(text, sizeof text, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %x",
               (int)b, (int)a, table[a].bus);
      comm->last_error = last_error = text;
      return true;
    }
  return false;
}

static void try_to_become_ready(ncclComm_t comm) {
  read_letters();
  auto found = tables.find(comm->serial);
  if (comm->ready || found == tables.end()) return;
  for (const Hello &one : found->second) comm->world.push_back(one.world);
  comm->ready = true;
  comm->state = duplicate(comm, found->second) ? ncclInvalidUsage : ncclSuccess;
  tables.erase(found);
}

/* Lets a call end that went on in the background. */
static void advance(ncclComm_t comm) {
  if (!comm->ready) try_to_become_ready(comm);
  if (comm->state != ncclInProgress || !comm->ready || comm->polls-- > 0) return;
  comm->state = ncclSuccess;
  if (!comm->held) return;
  comm->order.push_back(comm->held.get());
  if (enqueue(comm->held_stream, std::move(comm->held)) == cudaSuccess) return;
  comm->order.pop_back();
  comm->state = ncclUnhandledCudaError;
}

static bool is_comm(ncclComm_t comm) {
  return comms.count(comm) > 0;
}

ncclResult_t ncclGetVersion(int *version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  Guard guard(lock());
  Identity identity = {0x616e7469, (uint64_t)wire_rank() << 32 | serials++, wire_rank()};
  memset(id, 0, sizeof *id);
  memcpy(id, &identity, sizeof identity);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
  Guard guard(lock());
  Identity identity;
  memcpy(&identity, &id, sizeof identity);
  *out = nullptr;
  if (config && (config->size != sizeof *config || config->magic != 0xcafebeef))
    return refuse(ncclInvalidArgument, "ncclConfig_t was not initialized");
  if (identity.magic != 0x616e7469 || rank < 0 || rank >= size)
    return refuse(ncclInvalidArgument, "bad rank, size or unique id");
  if (size > wire_size()) return refuse(ncclSystemError, "more ranks than the job has processes");
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return refuse(ncclUnhandledCudaError, "no CUDA device");
  Hello hello = {identity.serial, size, rank, wire_rank(), properties.pciBusID, {}};
  snprintf(hello.host, sizeof hello.host, "%s", wire_host().c_str());
  ncclComm_t comm = new ncclComm{};
  comm->rank = rank;
  comm->size = size;
  comm->serial = identity.serial;
  comm->tag = first_tag + (int)((identity.serial & 0xffff) * (uint64_t)wire_size()) + identity.maker;
  comm->blocking = !config || config->blocking != 0;
  comm->state = ncclInProgress;
  comm->polls = (int)(random_u64() % 3);
  comms.insert(comm);
  *out = comm;
  if (identity.maker == wire_rank()) {
    welcome(hello);
  } else {
    Bytes bytes(sizeof hello);
    memcpy(bytes.data(), &hello, sizeof hello);
    letters.push_back(wire_send(identity.maker, tag_hello, std::move(bytes)));
  }
  if (!comm->blocking) return ncclInProgress;
  while (comm->state == ncclInProgress) {
    advance(comm);
    sched_yield();
  }
  return comm->state;
}

ncclResult_t ncclCommInitRank(ncclComm_t *out, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(out, size, id, rank, nullptr);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
  Guard guard(lock());
  if (!is_comm(comm)) return refuse(ncclInvalidArgument, "no communicator");
  advance(comm);
  *error = comm->state;
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
  *count = comm->size;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
  *rank = comm->rank;
  return ncclSuccess;
}

static ncclResult_t ensure_ready(ncclComm_t comm) {
  if (!is_comm(comm)) return refuse(ncclInvalidArgument, "no communicator");
  if (comm->aborted || comm->finalizing) return refuse(ncclInvalidUsage, "the communicator has ended");
  if (comm->state == ncclInProgress)
    return refuse(ncclInvalidArgument,
                  "the communicator is used before the previous operation returned ncclSuccess");
  return comm->state;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  Guard guard(lock());
  ncclResult_t code = ensure_ready(comm);
  if (code != ncclSuccess) return code;
  comm->finalizing = true;
  return drain(30) ? ncclSuccess : ncclInProgress;
}

static void end(ncclComm_t comm) {
  comm->aborted = true;
  comm->held.reset();
  drain(0.001); /* its operations leave the streams */
}

/* The object stays, as operations of it may still be queued. */
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  Guard guard(lock());
  if (!is_comm(comm)) return refuse(ncclInvalidArgument, "no communicator");
  bool quiet = comm->state == ncclSuccess && comm->order.empty();
  if (!quiet && comm->state == ncclSuccess && !drain(30))
    report(false, "ncclCommDestroy waits for operations that do not end");
  end(comm);
  comms.erase(comm);
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  while (faults().hang_abort) pause();
  Guard guard(lock());
  if (!is_comm(comm)) return refuse(ncclInvalidArgument, "no communicator");
  end(comm);
  comms.erase(comm);
  return ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void *data, size_t bytes, void **handle) {
  Guard guard(lock());
  if (!is_comm(comm) || kind_of(data) == Kind::pageable || !inside(data, bytes, "ncclCommRegister"))
    return refuse(ncclInvalidArgument, "no memory of a device");
  *handle = data;
  return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *) {
  return is_comm(comm) ? ncclSuccess : ncclInvalidArgument;
}

const char *ncclGetErrorString(ncclResult_t result) {
  static const char *const texts[] = {"no error",
                                      "unhandled cuda error",
                                      "unhandled system error",
                                      "internal error",
                                      "invalid argument",
                                      "invalid usage",
                                      "remote process exited or there was a network error",
                                      "NCCL operation in progress"};
  return result <= ncclInProgress ? texts[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t comm) {
  return is_comm(comm) && !comm->last_error.empty() ? comm->last_error.c_str() : last_error.c_str();
}

/* ---- operations ---- */

struct Asked {
  ncclComm_t comm;
  cudaStream_t stream;
  Call call;
};
static thread_local int group_depth;
static thread_local std::vector<Asked> asked;

/* Collectives first, as messages between two ranks are matched in order. */
static std::unique_ptr<Group> make_group(ncclComm_t comm, cudaStream_t stream) {
  auto group = std::make_unique<Group>();
  group->comm = comm;
  group->stream = stream;
  for (bool messages : {false, true})
    for (const Asked &one : asked)
      if (one.comm == comm && (one.call.what == What::message) == messages) {
        group->calls.push_back(one.call);
        group->sequence.push_back(messages ? comm->sequence : ++comm->sequence);
      }
  group->absent = strikes(&faults().nccl_absent);
  group->failing = strikes(&faults().nccl_error);
  return group;
}

static ncclResult_t launch(ncclComm_t comm, cudaStream_t stream) {
  for (const Asked &one : asked)
    if (one.comm == comm && one.stream != stream)
      return refuse(ncclInvalidUsage, "the emulation takes one stream for each group");
  if (!is_stream(stream)) return refuse(ncclInvalidUsage, "no stream");
  comm->held = make_group(comm, stream);
  comm->held_stream = stream;
  comm->state = ncclInProgress;
  comm->polls = comm->blocking ? 0 : (int)(random_u64() % 3);
  if (comm->blocking || random_u64() % 2 == 0)
    advance(comm); /* the library, too, is sometimes done at once */
  return comm->state;
}

ncclResult_t ncclGroupStart(void) {
  group_depth++;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
  Guard guard(lock());
  if (group_depth == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
  if (--group_depth > 0) return ncclSuccess;
  ncclResult_t result = ncclSuccess;
  std::set<ncclComm_t> done;
  for (size_t i = 0; i < asked.size(); i++) {
    if (!done.insert(asked[i].comm).second) continue;
    ncclResult_t one = launch(asked[i].comm, asked[i].stream);
    if (one != ncclSuccess && (result == ncclSuccess || result == ncclInProgress)) result = one;
  }
  asked.clear();
  return result;
}

static ncclResult_t ask(ncclComm_t comm, cudaStream_t stream, Call call) {
  Guard guard(lock());
  ncclResult_t code = ensure_ready(comm);
  if (code != ncclSuccess) return code;
  if (call.root < 0 || call.root >= comm->size) return refuse(ncclInvalidArgument, "no such root or peer");
  for (const void *data : {call.send, (const void *)call.recv})
    if (data && call.count > 0 && kind_of(data) == Kind::pageable)
      return refuse(ncclInvalidArgument, "an address that is no memory of the device");
  ncclGroupStart();
  asked.push_back({comm, stream, call});
  return ncclGroupEnd();
}

ncclResult_t ncclReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {What::reduce, send, recv, (int64_t)count, type, op, root});
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {What::broadcast, send, recv, (int64_t)count, type, ncclSum, root});
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {What::all_reduce, send, recv, (int64_t)count, type, op, 0});
}

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return ask(comm, stream, {What::reduce_scatter, send, recv, (int64_t)count, type, op, 0});
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return ask(comm, stream, {What::all_gather, send, recv, (int64_t)count, type, ncclSum, 0});
}

ncclResult_t ncclAlltoAll(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream) {
  return ask(comm, stream, {What::all_to_all, send, recv, (int64_t)count, type, ncclSum, 0});
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return ask(comm, stream, {What::message, send, nullptr, (int64_t)count, type, ncclSum, peer});
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return ask(comm, stream, {What::message, nullptr, recv, (int64_t)count, type, ncclSum, peer});
}
