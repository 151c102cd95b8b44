/* A communicator of the emulated NCCL and one operation on it; double_nccl.cpp has the communicators and the
 * calls, double_nccl_group.cpp what an operation does. */
#ifndef CUDA_DOUBLE_NCCL_IMPL_H
#define CUDA_DOUBLE_NCCL_IMPL_H

#include <nccl.h>

#include <deque>
#include <map>

#include "tests/cuda_double/double_impl.h"
#include "tests/cuda_double/double_wire.h"

namespace cuda_double {

enum class What : int32_t { all_reduce, reduce, reduce_scatter, all_gather, broadcast, all_to_all, message };

struct Call {
  What what;
  const void *send;
  void *recv;
  int64_t count;
  ncclDataType_t type;
  ncclRedOp_t op;
  int32_t root; /* or peer */
};

/* Heads every message. */
struct Header {
  int64_t sequence, count; /* of the collective operations of the communicator; elements */
  What what;
  int32_t type, op, root;
};

struct Group;

}  // namespace cuda_double

struct ncclComm {
  int rank, size, tag;
  std::vector<int> world;                 /* ranks of the job */
  std::deque<cuda_double::Group *> order; /* operations that are queued and not done */
  std::unique_ptr<cuda_double::Group>
      held; /* accepted, not yet queued: the call has not returned from the background */
  cudaStream_t held_stream;
  int polls; /* questions that are still answered with ncclInProgress */
  int64_t sequence;
  uint64_t serial;
  bool ready, blocking, aborted, finalizing;
  ncclResult_t state;
  std::string last_error;
};

namespace cuda_double {

/* What a call wants from one peer, and what came. */
struct Expected {
  size_t call;
  Bytes payload;
  bool here;
};

struct Group : Operation {
  ncclComm_t comm;
  cudaStream_t stream;
  std::vector<Call> calls;
  std::vector<int64_t> sequence; /* of each call */
  bool started = false, absent = false, failing = false;
  std::vector<std::shared_ptr<Sending>> sendings;
  std::vector<std::deque<Expected>> expected;      /* [peer], in order */
  std::map<std::pair<size_t, int>, Bytes> arrived; /* by call and peer */

  ~Group() override {
    auto &order = comm->order;
    order.erase(std::remove(order.begin(), order.end(), this), order.end());
  }
  bool run() override;
  CUstream_st *needs() override {
    return comm->aborted || comm->order.empty() || comm->order.front() == this ? nullptr
                                                                               : comm->order.front()->stream;
  }

 private:
  void start();
  void start_own();
  bool receive();
  void finish();
  void finish_call(size_t index);
  /* Bytes that rank `from` gives rank `to` in this call, and where they begin in its send buffer. */
  std::pair<int64_t, int64_t> part(const Call &call, int from, int to) const;
  bool agrees(const Header &mine, const Header &theirs, int peer);
  Header header(size_t index) const;
};

}  // namespace cuda_double

#endif
