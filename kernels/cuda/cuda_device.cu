/* The opened CUDA device: memory, copies, streams and events as core/device.h says.
 *
 * The host never blocks inside the driver: it polls, calling in between what `watch` registered, so that a
 * peer that hangs or a deadline that passes ends the wait. Threads other than the one that opened the device
 * may use it too: every entry makes it current first. */
#include <sched.h>  /* sched_yield */
#include <stdio.h>  /* snprintf */
#include <stdlib.h> /* getenv */
#include <time.h>   /* nanosleep */

#include "cuda_impl.h" /* declarations */

enum { SPINS = 2000, YIELDS = 20000, NAP_NANOSECONDS = 20000 };
/* bfloat16 arithmetic and conversions in hardware. */
enum { NEEDED_MAJOR = 8, NEEDED_MINOR = 0 };

static struct {
  bool open;
  int device;
  cudaStream_t stream;
  unsigned long long *fault; /* page-locked; see kern_fault */
  char name[320];
  core_status (*poll)(void *);
  void *poll_context;
} state;
static thread_local bool in_use; /* the device is current on this thread */

/* --- failures --- */
core_status kern_cuda_failed_priv(cudaError_t error, const char *what, const char *function, const char *file,
                                  int line) {
  (void)cudaGetLastError(); /* not to be reported a second time */
  const core_status code = error == cudaErrorMemoryAllocation ? CORE_ERR_MEMORY : CORE_ERR_DEVICE;
  return core_error_begin(code, function, file, line, "%s: %s: %s (%s)", state.open ? state.name : "cuda",
                          what, cudaGetErrorString(error), cudaGetErrorName(error));
}

core_status kern_cublas_failed_priv(cublasStatus_t error, const char *what, const char *function,
                                    const char *file, int line) {
  const core_status code = error == CUBLAS_STATUS_ALLOC_FAILED ? CORE_ERR_MEMORY : CORE_ERR_DEVICE;
  return core_error_begin(code, function, file, line, "%s: %s: %s", state.name, what,
                          cublasGetStatusString(error));
}

static const char *op_name(uint32_t op) {
  static const char *const names[] = {
#define OP_NAME(op) "kern_" #op "_cuda",
      KERN_CUDA_OPS(OP_NAME)
#undef OP_NAME
  };
  return op < KERN_CUDA_OP_COUNT ? names[op] : "an op";
}

kern_fault kern_cuda_fault_priv(kern_cuda_op op) {
  return kern_fault{state.fault, (uint32_t)op};
}

/* A fault is reported once; what kernels did with it was harmless. */
static core_status faults_reported(void) {
  const unsigned long long fault = *(volatile unsigned long long *)state.fault;
  if (fault == 0) return CORE_OK;
  *state.fault = 0;
  FAIL(CORE_ERR_ARGUMENT, "%s: an index in device memory is %d, which is out of range",
       op_name((uint32_t)(fault >> 32) - 1), (int)(int32_t)(uint32_t)fault);
}

/* --- waiting --- */
/* One round between two queries; tries counts them. */
static core_status wait_round(int64_t tries) {
  if (state.poll != NULL) TRY(state.poll(state.poll_context));
  if (tries > YIELDS) {
    const struct timespec nap = {0, NAP_NANOSECONDS};
    (void)nanosleep(&nap, NULL);
  } else if (tries > SPINS) {
    (void)sched_yield();
  }
  return CORE_OK;
}

core_status kern_cuda_wait_stream_priv(cudaStream_t stream) {
  cudaError_t error;
  for (int64_t tries = 0; (error = cudaStreamQuery(stream)) == cudaErrorNotReady; tries++)
    TRY(wait_round(tries));
  KERN_CUDA(error);
  return faults_reported();
}

core_status kern_cuda_wait_event_priv(cudaEvent_t event) {
  cudaError_t error;
  for (int64_t tries = 0; (error = cudaEventQuery(event)) == cudaErrorNotReady; tries++)
    TRY(wait_round(tries));
  KERN_CUDA(error);
  return faults_reported();
}

/* --- core_device --- */
core_status kern_cuda_use_priv(void) {
  if (in_use) return CORE_OK;
  KERN_CUDA(cudaSetDevice(state.device));
  in_use = true;
  return CORE_OK;
}
cudaStream_t kern_cuda_stream_priv(void) {
  return state.stream;
}
static cudaStream_t stream_of(core_stream *stream) {
  return stream != NULL ? (cudaStream_t)stream : state.stream;
}

static core_status cuda_allocate(size_t bytes, void **out) {
  *out = NULL;
  TRY(kern_cuda_use_priv());
  const cudaError_t error = cudaMalloc(out, bytes > 0 ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    size_t available = 0, total = 0;
    (void)cudaMemGetInfo(&available, &total);
    FAIL(CORE_ERR_MEMORY, "%s: no memory for %zu bytes; %zu of %zu are free", state.name, bytes, available,
         total);
  }
  KERN_CUDA(error);
  return CORE_OK;
}
static void cuda_release(void *pointer) {
  if (pointer != NULL && kern_cuda_use_priv() == CORE_OK) (void)cudaFree(pointer);
}
static core_status cuda_host_allocate(size_t bytes, void **out) {
  *out = NULL;
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaHostAlloc(out, bytes > 0 ? bytes : 1, cudaHostAllocDefault));
  return CORE_OK;
}
static void cuda_host_release(void *pointer) {
  if (pointer != NULL && kern_cuda_use_priv() == CORE_OK) (void)cudaFreeHost(pointer);
}
static core_status cuda_memory(size_t *available, size_t *total) {
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaMemGetInfo(available, total));
  return CORE_OK;
}

static core_status cuda_copy_later(void *target, const void *source, size_t bytes, core_stream *stream) {
  TRY(kern_cuda_use_priv());
  if (bytes > 0) KERN_CUDA(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream_of(stream)));
  return CORE_OK;
}

static core_status memory_type(const void *pointer, cudaMemoryType *out) {
  cudaPointerAttributes attributes;
  KERN_CUDA(cudaPointerGetAttributes(&attributes, pointer));
  *out = attributes.type;
  return CORE_OK;
}

/* The driver copies pageable memory while the caller stands still, after all earlier work of the stream: that
 * is waited for here, where the wait is watched. */
static core_status cuda_copy(void *target, const void *source, size_t bytes, core_stream *stream) {
  if (bytes == 0) return CORE_OK;
  TRY(kern_cuda_use_priv());
  cudaMemoryType from = cudaMemoryTypeUnregistered, to = cudaMemoryTypeUnregistered;
  TRY(memory_type(source, &from));
  TRY(memory_type(target, &to));
  if (from == cudaMemoryTypeUnregistered || to == cudaMemoryTypeUnregistered)
    TRY(kern_cuda_wait_stream_priv(stream_of(stream)));
  TRY(cuda_copy_later(target, source, bytes, stream));
  if (from != cudaMemoryTypeDevice || to != cudaMemoryTypeDevice)
    TRY(kern_cuda_wait_stream_priv(stream_of(stream)));
  return CORE_OK;
}

static core_status cuda_fill(void *target, int byte, size_t bytes, core_stream *stream) {
  TRY(kern_cuda_use_priv());
  if (bytes > 0) KERN_CUDA(cudaMemsetAsync(target, byte, bytes, stream_of(stream)));
  return CORE_OK;
}

static core_status cuda_stream_create(core_stream **out) {
  *out = NULL;
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaStreamCreateWithFlags((cudaStream_t *)out, cudaStreamNonBlocking));
  return CORE_OK;
}
static void cuda_stream_destroy(core_stream *stream) {
  if (stream != NULL && kern_cuda_use_priv() == CORE_OK) (void)cudaStreamDestroy((cudaStream_t)stream);
}
static core_status cuda_stream_wait(core_stream *stream) {
  TRY(kern_cuda_use_priv());
  TRY(kern_cuda_wait_stream_priv(stream_of(stream)));
  return CORE_OK;
}
static core_status cuda_event_create(core_event **out) {
  *out = NULL;
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaEventCreateWithFlags((cudaEvent_t *)out, cudaEventDisableTiming));
  return CORE_OK;
}
static void cuda_event_destroy(core_event *event) {
  if (event != NULL && kern_cuda_use_priv() == CORE_OK) (void)cudaEventDestroy((cudaEvent_t)event);
}
static core_status cuda_event_record(core_event *event, core_stream *stream) {
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaEventRecord((cudaEvent_t)event, stream_of(stream)));
  return CORE_OK;
}
static core_status cuda_event_query(core_event *event, bool *done) {
  TRY(kern_cuda_use_priv());
  const cudaError_t error = cudaEventQuery((cudaEvent_t)event);
  *done = error == cudaSuccess;
  if (error == cudaErrorNotReady) return CORE_OK;
  KERN_CUDA(error);
  return CORE_OK;
}
static core_status cuda_event_before(core_stream *stream, core_event *event) {
  TRY(kern_cuda_use_priv());
  KERN_CUDA(cudaStreamWaitEvent(stream_of(stream), (cudaEvent_t)event, 0));
  return CORE_OK;
}
static void cuda_watch(core_status (*poll)(void *), void *context) {
  state.poll = poll;
  state.poll_context = context;
}

const core_device *kern_cuda_device_priv(void) {
  static core_device device;
  device.kind = CORE_DEVICE_CUDA;
  device.name = state.name;
  device.host_access = false;
  device.allocate = cuda_allocate;
  device.release = cuda_release;
  device.host_allocate = cuda_host_allocate;
  device.host_release = cuda_host_release;
  device.memory = cuda_memory;
  device.copy = cuda_copy;
  device.copy_later = cuda_copy_later;
  device.fill = cuda_fill;
  device.stream_create = cuda_stream_create;
  device.stream_destroy = cuda_stream_destroy;
  device.stream_wait = cuda_stream_wait;
  device.event_create = cuda_event_create;
  device.event_destroy = cuda_event_destroy;
  device.event_record = cuda_event_record;
  device.event_query = cuda_event_query;
  device.event_before = cuda_event_before;
  device.watch = cuda_watch;
  return &device;
}

/* --- opening --- */
static void version_text(int version, char text[16]) {
  snprintf(text, 16, "%d.%d", version / 1000, version % 1000 / 10);
}

static core_status driver_checked(void) {
  int driver = 0, runtime = 0;
  char has[16], needs[16];
  const cudaError_t error = cudaDriverGetVersion(&driver);
  KERN_CUDA(cudaRuntimeGetVersion(&runtime));
  version_text(driver, has), version_text(runtime, needs);
  CHECK(error == cudaSuccess && driver > 0, CORE_ERR_UNSUPPORTED,
        "device \"cuda\": no NVIDIA driver is installed; this program needs one for CUDA %s or newer", needs);
  /* Within one major version a newer runtime runs on an older driver. */
  CHECK(driver / 1000 >= runtime / 1000, CORE_ERR_UNSUPPORTED,
        "device \"cuda\": the driver is for CUDA %s, this program needs one for CUDA %d.0 or newer "
        "(built with %s)",
        has, runtime / 1000, needs);
  return CORE_OK;
}

static core_status devices_counted(int *count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (error != cudaSuccess) (void)cudaGetLastError();
  CHECK(error == cudaSuccess || error == cudaErrorNoDevice, CORE_ERR_UNSUPPORTED,
        "device \"cuda\": devices cannot be counted: %s (%s); CUDA_VISIBLE_DEVICES is %s",
        cudaGetErrorString(error), cudaGetErrorName(error), visible != NULL ? visible : "not set");
  CHECK(error == cudaSuccess && *count > 0, CORE_ERR_UNSUPPORTED,
        "device \"cuda\": there is no CUDA device; CUDA_VISIBLE_DEVICES is %s",
        visible != NULL ? visible : "not set");
  return CORE_OK;
}

static core_status device_checked(int device) {
  cudaDeviceProp properties;
  KERN_CUDA(cudaGetDeviceProperties(&properties, device));
  CHECK(properties.major > NEEDED_MAJOR ||
            (properties.major == NEEDED_MAJOR && properties.minor >= NEEDED_MINOR),
        CORE_ERR_UNSUPPORTED,
        "device \"cuda\": %s has compute capability %d.%d, but %d.%d or newer is needed for bfloat16",
        properties.name, properties.major, properties.minor, (int)NEEDED_MAJOR, (int)NEEDED_MINOR);
  snprintf(state.name, sizeof state.name, "cuda:%d %s", device, properties.name);
  return CORE_OK;
}

/* What was made stays until the process ends, so that memory may be released late; there is one such device.
 */
static core_status device_opened(int device) {
  state.device = device;
  TRY(kern_cuda_use_priv());
  if (state.stream == NULL) KERN_CUDA(cudaStreamCreateWithFlags(&state.stream, cudaStreamNonBlocking));
  if (state.fault == NULL)
    KERN_CUDA(cudaHostAlloc((void **)&state.fault, sizeof *state.fault, cudaHostAllocDefault));
  *state.fault = 0;
  state.open = true;
  return CORE_OK;
}

core_status kern_cuda_open_priv(int32_t ordinal) {
  int count = 0;
  TRY(driver_checked());
  TRY(devices_counted(&count));
  CHECK(ordinal >= 0, CORE_ERR_ARGUMENT, "kern_cuda: ordinal is %d, expected 0 or more", (int)ordinal);
  const int device = ordinal % count;
  CHECK(!state.open || state.device == device, CORE_ERR_ARGUMENT,
        "kern_cuda: device %d was asked for, but this process has opened %s", device, state.name);
  if (state.open) return kern_cuda_use_priv();
  TRY(device_checked(device));
  TRY(device_opened(device));
  return CORE_OK;
}
