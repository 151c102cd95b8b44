/* What the tests of the emulated runtime share: a stream, arrays on the device, launches, reports. */
#ifndef TEST_DOUBLE_H
#define TEST_DOUBLE_H

#include <cuda_runtime.h>

#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <cstdarg>
#include <cstring>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include <cmocka.h>
}

#include "tests/cuda_double/cuda_double.h"

#define CALL(expression) assert_int_equal((expression), cudaSuccess)

static cudaStream_t stream;

[[maybe_unused]] static int begin(void **) {
  return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess ? 0 : -1;
}

[[maybe_unused]] static int end(void **) {
  return cudaStreamDestroy(stream) == cudaSuccess ? 0 : -1;
}

[[maybe_unused]] static void expect_report(const char *fragment) {
  if (!strstr(cuda_double_reports(), fragment))
    fail_msg("the reports \"%s\" do not contain \"%s\"", cuda_double_reports(), fragment);
  cuda_double_forget();
}

[[maybe_unused]] static void expect_no_report() {
  assert_string_equal(cuda_double_reports(), "");
}

template <class T>
struct Array {
  T *data;
  size_t count;
  explicit Array(size_t n) : data(nullptr), count(n) {
    CALL(cudaMalloc((void **)&data, n * sizeof(T)));
  }
  explicit Array(const std::vector<T> &from) : Array(from.size()) {
    CALL(cudaMemcpyAsync(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice, stream));
  }
  ~Array() {
    cudaFree(data);
  }
  Array(const Array &) = delete;
  std::vector<T> get() const {
    std::vector<T> result(count);
    CALL(cudaMemcpyAsync(result.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    return result;
  }
};

template <class... P, class... A>
static cudaError_t launch_on(cudaStream_t on, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                             A &&...arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = on;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}

template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, A &&...arguments) {
  return launch_on(stream, kernel, grid, block, 0, std::forward<A>(arguments)...);
}

#endif
