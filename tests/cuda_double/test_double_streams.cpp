/* The emulation judged by itself: memory, streams, events. What it must detect is made to happen. */
#include <sys/wait.h>
#include <unistd.h>

#include "tests/cuda_double/test_double.h"

/* ---- memory ---- */

__global__ static void write_at(char *data, long long at) {
  if (threadIdx.x == 0) data[at] = 1;
}

static void fresh_memory_is_nan_and_guards_are_checked(void **) {
  for (long long at : {-1LL, 1000LL}) {
    Array<float> fresh(1000);
    for (float value : fresh.get()) assert_true(std::isnan(value));
    char *data = nullptr;
    CALL(cudaMalloc((void **)&data, 1000));
    assert_int_equal((uintptr_t)data % 256, 0);
    CALL(launch(write_at, 1, 32, data, at));
    CALL(cudaStreamSynchronize(stream));
    expect_no_report();
    CALL(cudaFree(data));
    expect_report(at < 0 ? "byte -1 of 1000 bytes of device memory was overwritten"
                         : "byte 1000 of 1000 bytes of device memory was overwritten");
  }
}

/* How a child process ends that does this. */
template <class F>
static int child(F what) {
  pid_t pid = fork();
  if (pid == 0) {
    what();
    _exit(0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void device_memory_is_closed_to_the_host_and_beyond_its_end(void **) {
  float *data = nullptr;
  CALL(cudaMalloc((void **)&data, 1 << 20));
  CALL(cudaMemsetAsync(data, 0, 1 << 20, stream));
  CALL(cudaStreamSynchronize(stream));
  assert_int_equal(child([&] { *(volatile float *)data = 1; }), -SIGSEGV);
  assert_int_equal(child([&] {
                     launch(write_at, 1, 32, (char *)data, 1LL << 20);
                     cudaStreamSynchronize(stream);
                   }),
                   -SIGSEGV);
  assert_int_equal(child([&] {
                     launch(write_at, 1, 32, (char *)data, (1LL << 20) - 1);
                     cudaStreamSynchronize(stream);
                   }),
                   0);
  CALL(cudaFree(data));
}

static void copies_stay_inside_their_allocations(void **) {
  std::vector<char> host(4096);
  char *data = nullptr;
  CALL(cudaMalloc((void **)&data, 1000));
  assert_int_equal(cudaMemcpyAsync(data, host.data(), 1001, cudaMemcpyHostToDevice, stream),
                   cudaErrorInvalidValue);
  expect_report("a copy touches bytes 0 to 1001 of 1000 bytes of device memory");
  assert_int_equal(cudaMemcpyAsync(data, host.data(), 10, cudaMemcpyDeviceToHost, stream),
                   cudaErrorInvalidMemcpyDirection);
  assert_int_equal(cudaMemcpy(data, host.data(), 10, cudaMemcpyHostToDevice), cudaErrorNotSupported);
  expect_report("cudaMemcpy uses the legacy stream");
  assert_int_equal(cudaFree(data + 1), cudaErrorInvalidValue);
  expect_report("is no device allocation");
  assert_int_equal(cudaFreeHost(data), cudaErrorInvalidValue);
  expect_report("is no page-locked allocation");
  CALL(cudaFree(data));
}

static void memory_is_counted_and_can_run_out(void **) {
  size_t before = 0, after = 0, total = 0;
  void *data = nullptr;
  CALL(cudaMemGetInfo(&before, &total));
  CALL(cudaMalloc(&data, 1 << 20));
  CALL(cudaMemGetInfo(&after, &total));
  assert_int_equal(before - after, 1 << 20);
  CALL(cudaFree(data));
  assert_int_equal(cudaMalloc(&data, total + 1), cudaErrorMemoryAllocation);
  assert_null(data);
  cuda_double_fail_allocation(2);
  CALL(cudaMalloc(&data, 1));
  CALL(cudaFree(data));
  assert_int_equal(cudaHostAlloc(&data, 1, cudaHostAllocDefault), cudaErrorMemoryAllocation);
  CALL(cudaHostAlloc(&data, 1, cudaHostAllocDefault));
  CALL(cudaFreeHost(data));
}

/* ---- streams and events ---- */

__global__ static void add_one(float *x) {
  x[threadIdx.x] += 1;
}

__global__ static void copy_row(const float *x, float *y) {
  y[threadIdx.x] = x[threadIdx.x];
}

static void nothing_is_done_before_somebody_asks(void **) {
  float *pinned = nullptr;
  CALL(cudaHostAlloc((void **)&pinned, 4 * 32, cudaHostAllocDefault));
  memset(pinned, 0, 4 * 32);
  Array<float> x(std::vector<float>(32, 5));
  CALL(launch(add_one, 1, 32, x.data));
  CALL(cudaMemcpyAsync(pinned, x.data, 4 * 32, cudaMemcpyDeviceToHost, stream));
  assert_true(cuda_double_pending() > 0 && pinned[0] == 0);
  while (cudaStreamQuery(stream) == cudaErrorNotReady) continue;
  assert_true(pinned[31] == 6);
  /* from page-locked memory the source is read when the copy is made, from other memory at the call */
  float pageable[32] = {1};
  pinned[0] = 1;
  CALL(cudaMemcpyAsync(x.data, pinned, 4, cudaMemcpyHostToDevice, stream));
  CALL(cudaMemcpyAsync(x.data + 1, pageable, 4, cudaMemcpyHostToDevice, stream));
  pinned[0] = pageable[0] = 2;
  assert_true(x.get()[0] == 2);
  assert_true(x.get()[1] == 1);
  CALL(cudaFreeHost(pinned));
}

/* A writer on one stream, a reader on another; with the event the reader always sees what was written. */
static int wrong_without(bool event, int attempts) {
  cudaStream_t other;
  cudaEvent_t written;
  int wrong = 0;
  CALL(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  CALL(cudaEventCreateWithFlags(&written, cudaEventDisableTiming));
  for (int i = 0; i < attempts; i++) {
    Array<float> x(std::vector<float>(32, 0)), y(32);
    CALL(cudaStreamSynchronize(stream));
    CALL(launch_on(other, add_one, 1, 32, 0, x.data));
    CALL(cudaEventRecord(written, other));
    if (event) CALL(cudaStreamWaitEvent(stream, written, 0));
    CALL(launch(copy_row, 1, 32, x.data, y.data));
    wrong += y.get()[0] != 1;
    CALL(cudaEventSynchronize(written));
  }
  CALL(cudaEventDestroy(written));
  CALL(cudaStreamDestroy(other));
  return wrong;
}

static void a_missing_event_shows(void **) {
  assert_int_equal(wrong_without(true, 50), 0);
  assert_in_range(wrong_without(false, 50), 5, 45); /* some orders happen to be right */
  cuda_double_set_order(CUDA_DOUBLE_LAZY);
  assert_int_equal(wrong_without(false, 10), 10);
  cuda_double_set_order(CUDA_DOUBLE_EAGER);
  assert_int_equal(wrong_without(false, 10), 0);
  cuda_double_set_order(CUDA_DOUBLE_RANDOM);
}

static void events_say_how_far_a_stream_has_come(void **) {
  cudaEvent_t event;
  CALL(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  assert_int_equal(cudaEventQuery(event), cudaSuccess); /* never recorded */
  Array<float> x(std::vector<float>(32, 0));
  cuda_double_set_order(CUDA_DOUBLE_LAZY);
  CALL(launch(add_one, 1, 32, x.data));
  CALL(cudaEventRecord(event, stream));
  CALL(launch(add_one, 1, 32, x.data));
  CALL(cudaEventSynchronize(event));
  assert_int_equal(cuda_double_pending(), 1);
  assert_true(x.get()[0] == 2);
  cuda_double_set_order(CUDA_DOUBLE_RANDOM);
  CALL(cudaEventDestroy(event));
  assert_int_equal(cudaEventRecord(event, stream), cudaErrorInvalidResourceHandle);
  cuda_double_forget();
}

/* ---- devices ---- */

static const char *program;

/* What this program says of its device when it is run with these settings. */
static std::string described(const std::string &settings) {
  char line[512] = "";
  FILE *pipe = popen((settings + " " + program + " describe").c_str(), "r");
  assert_non_null(pipe);
  assert_non_null(fgets(line, sizeof line, pipe));
  assert_int_equal(pclose(pipe), 0);
  return line;
}

static int describe_device() {
  int count = 0, driver = 0;
  cudaDeviceProp properties = {};
  char bus[32] = "none";
  cudaError_t error = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, count - 1);
  if (error == cudaSuccess) error = cudaDeviceGetPCIBusId(bus, sizeof bus, count - 1);
  printf("%s, %d devices, driver %d, %d.%d, %zu bytes, %s\n", cudaGetErrorName(error), count, driver,
         properties.major, properties.minor, properties.totalGlobalMem, bus);
  return 0;
}

static void devices_are_as_the_environment_says(void **) {
  static const struct {
    const char *settings, *expected;
  } cases[] = {{"CUDA_DOUBLE_DEVICES=1",
                "cudaSuccess, 1 devices, driver 13000, 9.0, 8589934592 bytes, 0000:10:00.0\n"},
               {"CUDA_DOUBLE_DEVICES=3 CUDA_DOUBLE_CAPABILITY=75 CUDA_DOUBLE_MEMORY=4096",
                "cudaSuccess, 3 devices, driver 13000, 7.5, 4096 bytes, 0000:12:00.0\n"},
               {"CUDA_DOUBLE_DEVICES=0", "cudaErrorNoDevice, 0 devices, driver 13000, 0.0, 0 bytes, none\n"},
               {"CUDA_DOUBLE_DRIVER=12040",
                "cudaErrorInsufficientDriver, 0 devices, driver 12040, 0.0, 0 bytes, none\n"},
               {"CUDA_DOUBLE_DRIVER=0", "cudaErrorNoDevice, 0 devices, driver 0, 0.0, 0 bytes, none\n"}};
  for (const auto &one : cases) assert_string_equal(described(one.settings).c_str(), one.expected);
}

int main(int argc, char **argv) {
  if (argc > 1) return describe_device();
  program = argv[0];
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(fresh_memory_is_nan_and_guards_are_checked),
      cmocka_unit_test(device_memory_is_closed_to_the_host_and_beyond_its_end),
      cmocka_unit_test(copies_stay_inside_their_allocations),
      cmocka_unit_test(memory_is_counted_and_can_run_out),
      cmocka_unit_test(nothing_is_done_before_somebody_asks),
      cmocka_unit_test(a_missing_event_shows),
      cmocka_unit_test(devices_are_as_the_environment_says),
      cmocka_unit_test(events_say_how_far_a_stream_has_come),
  };
  return cmocka_run_group_tests_name("emulated memory and streams", tests, begin, end);
}
