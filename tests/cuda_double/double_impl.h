/* What the files of the emulation share: reports, random numbers, memory, queues of work. One lock guards all
 * of it; everything below is called with the lock held, or from a kernel. */
#ifndef CUDA_DOUBLE_IMPL_H
#define CUDA_DOUBLE_IMPL_H

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/cuda_double/cuda_double.h"

namespace cuda_double {

/* ---- double_state.cpp: settings, reports, faults ---- */

/* From the environment, at first use; README.md lists the variables. */
struct Settings {
  int devices, driver, capability;
  size_t memory;
  uint64_t seed;
  cuda_double_order order;
  bool protect;
  std::string bus; /* PCI bus of device 0, so that processes can pretend to share or not to share devices */
};
const Settings &settings();

struct Faults {
  int64_t allocation, nccl_error, nccl_absent; /* count down; 0: none */
  bool hang_abort;
};
Faults &faults();
/* Counts one down; true when this is the one. */
bool strikes(int64_t *countdown);

std::recursive_mutex &lock();
using Guard = std::lock_guard<std::recursive_mutex>;

/* Prints and keeps; `broken` makes later calls fail as on a GPU whose context is lost. */
void report(bool broken, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The error of a broken context, or success. */
cudaError_t context_error();
/* Remembers the error for cudaGetLastError and returns it. */
cudaError_t result(cudaError_t error);

uint64_t random_u64();
uint64_t mix(uint64_t value);

/* ---- double_symbols.cpp ---- */

/* Name of a function of this program, "?" where it has none. */
std::string symbol_of(const void *address);
struct Range {
  char *data;
  size_t bytes;
};
/* The `__shared__` variables of the program in this thread. */
const std::vector<Range> &shared_variables();

/* ---- double_memory.cpp ---- */

enum class Kind { pageable, pinned, device };
/* What kind of memory this is; reports and returns false when [pointer, pointer + bytes) leaves its
 * allocation. */
Kind kind_of(const void *pointer);
bool inside(const void *pointer, size_t bytes, const char *what);
/* While one lives, device memory can be touched. */
struct Access {
  Access();
  ~Access();
  Access(const Access &) = delete;
};

/* ---- double_stream.cpp ---- */

struct Operation {
  virtual ~Operation() = default;
  /* Does it, or as much as can be done now; false: not yet. */
  virtual bool run() = 0;
  /* The stream whose work it waits for, if any. */
  virtual CUstream_st *needs() {
    return nullptr;
  }
};
cudaError_t enqueue(cudaStream_t stream, std::unique_ptr<Operation> operation);
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
bool is_stream(cudaStream_t stream);
/* Does some work of any stream, for callers that wait for something outside. */
void progress();
/* Does everything; false when that took longer than `seconds`. */
bool drain(double seconds);
double now();

/* ---- double_block.cpp ---- */

/* Where a fault arose: "kernel f, block (1,0,0), thread (3,0,0)", or "" outside kernels. */
std::string running();

}  // namespace cuda_double

#endif
