/* NCCL of the emulation at 1, 2 and 4 ranks of one host, each with a device of its own. */
#include <mpi.h>
#include <nccl.h>

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
#include <cmocka.h>
}

#include "tests/cuda_double/cuda_double.h"

static int rank, size;
static cudaStream_t stream;

/* One rank that fails ends the job: the others would wait for it. */
static void expect(bool good, const char *text, int line) {
  if (good) return;
  fprintf(stderr, "line %d: rank %d: %s; last error: %s\n%s", line, rank, text, ncclGetLastError(nullptr),
          cuda_double_reports());
  MPI_Abort(MPI_COMM_WORLD, 1);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

static ncclResult_t settle(ncclComm_t comm) {
  ncclResult_t state = ncclInProgress;
  while (state == ncclInProgress) EXPECT(ncclCommGetAsyncError(comm, &state) == ncclSuccess);
  return state;
}

/* Waits as the product does: by asking, so that asynchronous errors are seen. */
static ncclResult_t wait(ncclComm_t comm) {
  for (;;) {
    ncclResult_t state = settle(comm);
    if (state != ncclSuccess) return state;
    cudaError_t error = cudaStreamQuery(stream);
    if (error == cudaSuccess) return ncclSuccess;
    EXPECT(error == cudaErrorNotReady);
  }
}

/* A barrier that polls, as the product's waits do: what is queued goes on meanwhile. */
static void meet() {
  MPI_Request barrier;
  int done = 0;
  MPI_Ibarrier(MPI_COMM_WORLD, &barrier);
  while (!done) MPI_Testall(1, &barrier, &done, MPI_STATUSES_IGNORE);
}

static ncclResult_t connect(ncclComm_t *comm, int device) {
  ncclUniqueId id;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  if (rank == 0) EXPECT(ncclGetUniqueId(&id) == ncclSuccess);
  MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
  EXPECT(cudaSetDevice(device) == cudaSuccess);
  EXPECT(ncclCommInitRankConfig(comm, size, id, rank, &config) == ncclInProgress);
  return settle(*comm);
}

static bool accepted(ncclResult_t result, ncclComm_t comm) {
  return (result == ncclSuccess || result == ncclInProgress) && settle(comm) == ncclSuccess;
}

struct Buffer {
  float *data;
  size_t count;
  explicit Buffer(std::vector<float> from) : data(nullptr), count(from.size()) {
    EXPECT(cudaMalloc((void **)&data, count * 4) == cudaSuccess);
    EXPECT(cudaMemcpyAsync(data, from.data(), count * 4, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  }
  ~Buffer() {
    cudaFree(data);
  }
  Buffer(const Buffer &) = delete;
  std::vector<float> get() const {
    std::vector<float> result(count);
    EXPECT(cudaMemcpyAsync(result.data(), data, count * 4, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
    return result;
  }
};

static std::vector<float> values_of(int r, size_t count) {
  std::vector<float> result(count);
  for (size_t i = 0; i < count; i++) result[i] = (float)(100 * r + (int)i + 1);
  return result;
}

static void collectives_give_what_they_should(void **) {
  ncclComm_t comm;
  EXPECT(connect(&comm, rank) == ncclSuccess);
  size_t n = 6;
  Buffer own(values_of(rank, n)), all(std::vector<float>(n * (size_t)size)),
      wide(values_of(rank, n * (size_t)size)), out(std::vector<float>(n * (size_t)size));
  EXPECT(accepted(ncclAllGather(own.data, all.data, n, ncclFloat32, comm, stream), comm));
  EXPECT(accepted(ncclReduceScatter(wide.data, out.data, n, ncclFloat32, ncclSum, comm, stream), comm));
  EXPECT(accepted(ncclAllReduce(own.data, own.data, n, ncclFloat32, ncclMax, comm, stream), comm));
  EXPECT(wait(comm) == ncclSuccess);
  for (int r = 0; r < size; r++)
    for (size_t i = 0; i < n; i++) {
      float sum = 0;
      for (int s = 0; s < size; s++) sum += (float)(100 * s + (int)(n * (size_t)rank + i) + 1);
      EXPECT(all.get()[(size_t)r * n + i] == (float)(100 * r + (int)i + 1));
      EXPECT(out.get()[i] == sum);
      EXPECT(own.get()[i] == (float)(100 * (size - 1) + (int)i + 1));
    }
  Buffer root(values_of(rank, n));
  EXPECT(accepted(ncclBroadcast(root.data, root.data, n, ncclFloat32, size - 1, comm, stream), comm));
  EXPECT(accepted(ncclReduce(root.data, own.data, n, ncclFloat32, ncclSum, 0, comm, stream), comm));
  EXPECT(accepted(ncclAlltoAll(wide.data, out.data, n, ncclFloat32, comm, stream), comm));
  EXPECT(wait(comm) == ncclSuccess);
  for (size_t i = 0; i < n; i++) {
    EXPECT(root.get()[i] == (float)(100 * (size - 1) + (int)i + 1));
    if (rank == 0) EXPECT(own.get()[i] == (float)(size * (100 * (size - 1) + (int)i + 1)));
    for (int r = 0; r < size; r++)
      EXPECT(out.get()[(size_t)r * n + i] == (float)(100 * r + (int)(n * (size_t)rank + i) + 1));
  }
  EXPECT(ncclCommFinalize(comm) == ncclSuccess && ncclCommDestroy(comm) == ncclSuccess);
}

static void messages_of_a_group_are_matched_in_order(void **) {
  ncclComm_t comm;
  EXPECT(connect(&comm, rank) == ncclSuccess);
  Buffer out(values_of(rank, (size_t)size * 8)), in(std::vector<float>((size_t)size * 8));
  EXPECT(ncclGroupStart() == ncclSuccess);
  for (int r = 0; r < size; r++) /* two messages of 3 and 5 numbers to everybody, oneself too */
    for (int part = 0; part < 2; part++) {
      size_t n = part ? 5 : 3, at = (size_t)r * 8 + (part ? 3 : 0);
      EXPECT(ncclRecv(in.data + at, n, ncclFloat32, r, comm, stream) == ncclSuccess);
      EXPECT(ncclSend(out.data + at, n, ncclFloat32, r, comm, stream) == ncclSuccess);
    }
  EXPECT(accepted(ncclGroupEnd(), comm));
  EXPECT(wait(comm) == ncclSuccess);
  for (int r = 0; r < size; r++)
    for (int i = 0; i < 8; i++) EXPECT(in.get()[(size_t)(r * 8 + i)] == (float)(100 * r + rank * 8 + i + 1));
  EXPECT(ncclCommDestroy(comm) == ncclSuccess);
}

static void an_operation_waits_for_the_one_before_it(void **) {
  ncclComm_t comm;
  EXPECT(connect(&comm, rank) == ncclSuccess);
  Buffer own(values_of(rank, 4));
  int at_once = 0;
  for (int i = 0; i < 40; i++) { /* without asking in between, a second call comes too early, or not */
    ncclResult_t result = ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclMax, comm, stream);
    at_once += result == ncclSuccess;
    EXPECT(result == ncclSuccess || result == ncclInProgress);
    if (result == ncclInProgress)
      EXPECT(ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclMax, comm, stream) == ncclInvalidArgument);
    EXPECT(settle(comm) == ncclSuccess);
  }
  EXPECT(at_once > 0 && at_once < 40);
  EXPECT(wait(comm) == ncclSuccess && own.get()[0] == (float)(100 * (size - 1) + 1));
  EXPECT(ncclCommDestroy(comm) == ncclSuccess);
}

static void ranks_that_disagree_are_named(void **) {
  if (size == 1) return;
  for (int how = 0; how < 3; how++) {
    ncclComm_t comm;
    EXPECT(connect(&comm, rank) == ncclSuccess);
    Buffer own(values_of(rank, 64)), out(std::vector<float>(64));
    bool odd = rank == size - 1;
    ncclResult_t result =
        how == 0 && odd ? ncclBroadcast(own.data, own.data, 4, ncclFloat32, size - 1, comm, stream)
        : how == 2 && odd
            ? ncclAllReduce(own.data, own.data, 4, ncclInt32, ncclSum, comm, stream)
            : ncclAllReduce(own.data, own.data, how == 1 && odd ? 5 : 4, ncclFloat32, ncclSum, comm, stream);
    EXPECT(accepted(result, comm));
    if (rank == 0) {
      static const char *const theirs[] = {"broadcast of 4 elements of type 7",
                                           "all-reduce of 5 elements of type 7",
                                           "all-reduce of 4 elements of type 2"};
      char expected[192];
      EXPECT(wait(comm) == ncclInternalError);
      snprintf(expected, sizeof expected,
               "rank 0 is at operation 1, all-reduce of 4 elements of type 7; rank %d sent operation 1, %s",
               size - 1, theirs[how]);
      EXPECT(strstr(cuda_double_reports(), expected) != nullptr);
    }
    meet();
    EXPECT(ncclCommAbort(comm) == ncclSuccess);
    EXPECT(cudaStreamSynchronize(stream) == cudaSuccess);
    meet();
    cuda_double_forget();
  }
}

static void two_ranks_on_one_device_are_refused(void **) {
  ncclComm_t comm;
  if (size == 1) return;
  EXPECT(connect(&comm, rank / 2) == ncclInvalidUsage);
  EXPECT(strstr(ncclGetLastError(comm), "Duplicate GPU detected : rank 0 and rank 1") != nullptr);
  EXPECT(ncclCommAbort(comm) == ncclSuccess);
  EXPECT(cudaSetDevice(rank) == cudaSuccess);
}

static void injected_faults_arise_where_they_should(void **) {
  ncclComm_t comm;
  EXPECT(connect(&comm, rank) == ncclSuccess);
  Buffer own(values_of(rank, 4));
  if (rank == 0) cuda_double_fail_nccl(2);
  EXPECT(accepted(ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclSum, comm, stream), comm));
  EXPECT(wait(comm) == ncclSuccess);
  ncclResult_t result = ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclSum, comm, stream);
  EXPECT(result == ncclSuccess || result == ncclInProgress);
  if (rank == 0) EXPECT(wait(comm) == ncclRemoteError);
  meet();
  EXPECT(ncclCommAbort(comm) == ncclSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaSuccess);

  EXPECT(connect(&comm, rank) == ncclSuccess);
  if (rank == size - 1) cuda_double_leave_nccl(1);
  EXPECT(accepted(ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclSum, comm, stream), comm));
  for (int i = 0; i < 1000; i++) EXPECT(cudaStreamQuery(stream) == cudaErrorNotReady);
  meet();
  EXPECT(ncclCommAbort(comm) == ncclSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaSuccess);
}

/* A rank that waits for MPI does its part of what is queued: real devices would. */
static void devices_go_on_while_the_host_waits_elsewhere(void **) {
  ncclComm_t comm;
  EXPECT(connect(&comm, rank) == ncclSuccess);
  Buffer own(values_of(rank, 4));
  EXPECT(accepted(ncclAllReduce(own.data, own.data, 4, ncclFloat32, ncclMax, comm, stream), comm));
  if (rank == 0) EXPECT(wait(comm) == ncclSuccess);
  meet();
  EXPECT(wait(comm) == ncclSuccess && own.get()[3] == (float)(100 * (size - 1) + 4));
  EXPECT(ncclCommDestroy(comm) == ncclSuccess);
}

static int begin(void **) {
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return error == cudaSuccess ? 0 : -1;
}

int main(int argc, char **argv) {
  setenv("CUDA_DOUBLE_DEVICES", "4", 0);
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(collectives_give_what_they_should),
      cmocka_unit_test(messages_of_a_group_are_matched_in_order),
      cmocka_unit_test(an_operation_waits_for_the_one_before_it),
      cmocka_unit_test(ranks_that_disagree_are_named),
      cmocka_unit_test(two_ranks_on_one_device_are_refused),
      cmocka_unit_test(injected_faults_arise_where_they_should),
      cmocka_unit_test(devices_go_on_while_the_host_waits_elsewhere),
  };
  int failed = cmocka_run_group_tests_name("emulated NCCL", tests, begin, nullptr);
  MPI_Finalize();
  return failed;
}
