#include <sched.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/cuda_double/double_impl.h"

namespace cuda_double {

static const char *text(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

static int64_t number(const char *name, int64_t otherwise) {
  const char *value = text(name, nullptr);
  return value ? strtoll(value, nullptr, 0) : otherwise;
}

static cuda_double_order order_of(const char *name) {
  if (strcmp(name, "lazy") == 0) return CUDA_DOUBLE_LAZY;
  return strcmp(name, "eager") == 0 ? CUDA_DOUBLE_EAGER : CUDA_DOUBLE_RANDOM;
}

static Settings &mutable_settings() {
  static Settings all = {
      (int)number("CUDA_DOUBLE_DEVICES", 1),     (int)number("CUDA_DOUBLE_DRIVER", CUDART_VERSION),
      (int)number("CUDA_DOUBLE_CAPABILITY", 90), (size_t)number("CUDA_DOUBLE_MEMORY", (int64_t)8 << 30),
      (uint64_t)number("CUDA_DOUBLE_SEED", 1),   order_of(text("CUDA_DOUBLE_ORDER", "random")),
      number("CUDA_DOUBLE_PROTECT", 1) != 0,     text("CUDA_DOUBLE_BUS", "0x10")};
  return all;
}

const Settings &settings() {
  return mutable_settings();
}

/* "rank:n", for the process of that rank of MPI's world. */
static int64_t of_rank(const char *name) {
  const char *value = text(name, nullptr), *colon = value ? strchr(value, ':') : nullptr;
  const char *rank = text("OMPI_COMM_WORLD_RANK", "0");
  return colon && strtol(value, nullptr, 10) == strtol(rank, nullptr, 10) ? strtoll(colon + 1, nullptr, 10)
                                                                          : 0;
}

Faults &faults() {
  static Faults all = {number("CUDA_DOUBLE_FAIL_ALLOCATION", 0), of_rank("CUDA_DOUBLE_FAIL_NCCL"),
                       of_rank("CUDA_DOUBLE_LEAVE_NCCL"), number("CUDA_DOUBLE_HANG_ABORT", 0) != 0};
  return all;
}

bool strikes(int64_t *countdown) {
  return *countdown > 0 && --*countdown == 0;
}

std::recursive_mutex &lock() {
  static std::recursive_mutex mutex;
  return mutex;
}

static std::string reports;
static bool broken_context;
static thread_local cudaError_t last_error;

void report(bool broken, const char *format, ...) {
  char line[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  Guard guard(lock());
  if (reports.size() < 65536) reports += std::string(line) + "\n";
  if (!broken_context || broken) fprintf(stderr, "emulated CUDA: %s\n", line);
  broken_context |= broken;
}

cudaError_t context_error() {
  return broken_context ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t result(cudaError_t error) {
  if (error == cudaSuccess) error = context_error();
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

uint64_t mix(uint64_t value) { /* splitmix64's finaliser */
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
  value = (value ^ value >> 27) * 0x94d049bb133111ebu;
  return value ^ value >> 31;
}

uint64_t random_u64() {
  static uint64_t count;
  return mix(settings().seed * 0x100000000u + count++);
}

}  // namespace cuda_double

using namespace cuda_double;

const char *cuda_double_reports(void) {
  return reports.c_str();
}

void cuda_double_forget(void) {
  Guard guard(lock());
  reports.clear();
  broken_context = false;
  last_error = cudaSuccess;
  faults() = {};
}

void cuda_double_set_order(cuda_double_order order) {
  mutable_settings().order = order;
}

void cuda_double_fail_allocation(int64_t n) {
  faults().allocation = n;
}

void cuda_double_fail_nccl(int64_t n) {
  faults().nccl_error = n;
}

void cuda_double_leave_nccl(int64_t n) {
  faults().nccl_absent = n;
}

void cuda_double_hang_abort(bool hang) {
  faults().hang_abort = hang;
}

/* ---- errors ---- */

static const struct {
  cudaError_t error;
  const char *name, *text;
} errors[] = {
#define ERROR(name, text) \
  { name, #name, text }
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInitializationError, "initialization error"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInvalidSymbol, "invalid device symbol"),
    ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR(cudaErrorNotSupported, "operation not supported"),
    ERROR(cudaErrorUnknown, "unknown error"),
#undef ERROR
};

const char *cudaGetErrorName(cudaError_t error) {
  for (const auto &one : errors)
    if (one.error == error) return one.name;
  return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
  for (const auto &one : errors)
    if (one.error == error) return one.text;
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError(void) {
  return context_error() != cudaSuccess ? context_error() : last_error;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return error;
}
