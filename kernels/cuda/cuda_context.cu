/* Context: one block of device memory carved into the scratch that ops borrow, staging, cuBLAS handles and
 * side streams. Sizes follow from the limits alone. */
#include <stdlib.h> /* calloc, free */

#include "cuda_impl.h" /* kern_context */

/* What cuBLAS asks for on Hopper; smaller ones cost it some of its kernels. */
#define KERN_WORKSPACE ((size_t)32 << 20)
enum { ALIGN = 256, STAGED_ENTRY = 96 }; /* bytes that one entry of a list takes at most when staged */

/* Takes pieces off a block; a dry run (base NULL) counts bytes. */
struct carver {
  unsigned char *base;
  size_t bytes;
  bool overflow;

  template <typename T>
  void take(T *&out, int64_t count) {
    size_t piece, end;
    overflow |= __builtin_mul_overflow((size_t)count, sizeof(T), &piece) ||
                __builtin_add_overflow(bytes, piece, &end) || end > (size_t)INT64_MAX / 2;
    if (overflow) return;
    out = base == NULL ? NULL : (T *)(base + bytes);
    bytes = (end + ALIGN - 1) / ALIGN * ALIGN;
  }
};

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* limits.width and limits.updates are below 2^40 here, see limits_checked. */
static void context_plan(kern_context *context, carver *device) {
  const kern_limits *limits = &context->limits;
  context->partial_count =
      larger(2 * KERN_PARTIALS * limits->width, (int64_t)KERN_PARTIALS * KERN_GEMM_TILE * KERN_GEMM_TILE);
  context->sums_count = larger(KERN_PARTIALS * (3 + 2 * limits->experts), larger(limits->segments, 4096));
  context->slot_bytes = (size_t)larger(limits->updates, limits->experts) * STAGED_ENTRY + ALIGN;
  device->take(context->partial, context->partial_count);
  device->take(context->sums, context->sums_count);
  device->take(context->chunks, limits->experts * KERN_CHUNKS);
  device->take(context->totals, 2 * CORE_MAX_EXPERTS);
  int64_t deltas;
  device->overflow |= __builtin_mul_overflow(limits->rows, limits->heads, &deltas);
  if (device->overflow) return;
  device->take(context->delta, deltas);
  device->take(context->range, limits->rows);
  device->take(context->workspace, (int64_t)(KERN_WORKSPACE * (1 + KERN_STREAMS)));
  device->take(context->staged, (int64_t)(KERN_SLOTS * context->slot_bytes));
}

static core_status limits_checked(const kern_limits *limits) {
  const struct {
    const char *name;
    int64_t value, most;
  } fields[] = {{"rows", limits->rows, INT32_MAX},
                {"width", limits->width, (int64_t)1 << 32},
                {"experts", limits->experts, CORE_MAX_EXPERTS},
                {"sequence", limits->sequence, INT32_MAX},
                {"segments", limits->segments, INT32_MAX},
                {"heads", limits->heads, 65535},
                {"updates", limits->updates, INT32_MAX}};
  for (const auto &field : fields) {
    CHECK(field.value >= 0, CORE_ERR_ARGUMENT, "kernel limits must not be negative: %s %lld", field.name,
          (long long)field.value);
    CHECK(field.value <= field.most, CORE_ERR_ARGUMENT, "kernel limits overflow: %s %lld, at most %lld",
          field.name, (long long)field.value, (long long)field.most);
  }
  return CORE_OK;
}

static bool plan_dry(const kern_limits *limits, carver *device) {
  kern_context context = {};
  context.limits = *limits;
  *device = carver{};
  context_plan(&context, device);
  return !device->overflow;
}

extern "C" size_t kern_context_bytes_cuda(const kern_limits *limits) {
  carver device;
  const core_error before = *core_error_get();
  if (limits_checked(limits) != CORE_OK || !plan_dry(limits, &device)) {
    core_error_restore(&before);
    return SIZE_MAX;
  }
  return device.bytes;
}

extern "C" int32_t kern_context_threads_cuda(const kern_context *context) {
  return context->limits.threads > 0 ? context->limits.threads : 1;
}

static core_status memory_made(kern_context *context) {
  carver device;
  CHECK(plan_dry(&context->limits, &device), CORE_ERR_ARGUMENT,
        "kernel limits overflow: rows %lld times heads %lld, or width %lld", (long long)context->limits.rows,
        (long long)context->limits.heads, (long long)context->limits.width);
  const core_device *memory = kern_cuda_device_priv();
  TRY(memory->allocate(device.bytes, &context->memory));
  device = carver{(unsigned char *)context->memory, 0, false};
  context_plan(context, &device);
  TRY(memory->host_allocate(KERN_SLOTS * context->slot_bytes, (void **)&context->pinned));
  TRY(memory->host_allocate(CORE_MAX_EXPERTS * sizeof(int64_t), (void **)&context->pinned_counts));
  return CORE_OK;
}

/* A handle per stream: changing a handle's stream would take its workspace away. Reductions in the type of
 * the output would round more than once. */
static core_status products_made(kern_context *context) {
  for (int i = 0; i < KERN_STREAMS; i++) {
    KERN_CUDA(cudaStreamCreateWithFlags(&context->side[i], cudaStreamNonBlocking));
    KERN_CUDA(cudaEventCreateWithFlags(&context->join[i], cudaEventDisableTiming));
  }
  KERN_CUDA(cudaEventCreateWithFlags(&context->fork, cudaEventDisableTiming));
  for (int i = 0; i < 1 + KERN_STREAMS; i++) {
    KERN_CUBLAS(cublasCreate(&context->blas[i]));
    KERN_CUBLAS(cublasSetStream(context->blas[i], i == 0 ? context->stream : context->side[i - 1]));
    KERN_CUBLAS(
        cublasSetWorkspace(context->blas[i], context->workspace + i * KERN_WORKSPACE, KERN_WORKSPACE));
    KERN_CUBLAS(cublasSetMathMode(
        context->blas[i],
        (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  }
  return CORE_OK;
}

static core_status context_made(kern_context *context) {
  TRY(kern_cuda_use_priv());
  context->stream = kern_cuda_stream_priv();
  TRY(memory_made(context));
  for (cudaEvent_t &event : context->slot_free)
    KERN_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  TRY(products_made(context));
  return CORE_OK;
}

extern "C" core_status kern_context_create_cuda(const kern_limits *limits, kern_context **out) {
  *out = NULL;
  TRY(limits_checked(limits));
  kern_context *context = (kern_context *)calloc(1, sizeof *context);
  CHECK(context != NULL, CORE_ERR_MEMORY, "kernel context: no memory for %zu bytes", sizeof *context);
  context->limits = *limits;
  const core_status status = context_made(context);
  if (status != CORE_OK) {
    core_error saved;
    core_error_save(&saved);
    kern_context_destroy_cuda(context);
    core_error_restore(&saved);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = context;
  return CORE_OK;
}

/* Work of the context may still run: its memory is given back after that. A device that fails here has failed
 * elsewhere before, where it was reported. */
extern "C" void kern_context_destroy_cuda(kern_context *context) {
  if (context == NULL) return;
  const core_status waited = context->stream != NULL ? kern_cuda_wait_stream_priv(context->stream) : CORE_OK;
  (void)waited;
  for (cublasHandle_t handle : context->blas)
    if (handle != NULL) (void)cublasDestroy(handle);
  for (cudaStream_t stream : context->side)
    if (stream != NULL) (void)cudaStreamDestroy(stream);
  for (cudaEvent_t event : context->join)
    if (event != NULL) (void)cudaEventDestroy(event);
  for (cudaEvent_t event : context->slot_free)
    if (event != NULL) (void)cudaEventDestroy(event);
  if (context->fork != NULL) (void)cudaEventDestroy(context->fork);
  const core_device *memory = kern_cuda_device_priv();
  memory->host_release(context->pinned);
  memory->host_release(context->pinned_counts);
  memory->release(context->memory);
  free(context);
}

extern "C" void kern_cuda_set_grouping_priv(kern_context *context, kern_grouping grouping) {
  context->grouping = grouping;
}

core_status kern_stage_begin_priv(kern_context *context, size_t bytes, void **host) {
  CHECK(bytes <= context->slot_bytes, CORE_ERR_ARGUMENT,
        "a list of %zu bytes is staged, but the context was made for %zu: raise its limit of updates or "
        "experts",
        bytes, context->slot_bytes);
  context->slot = (context->slot + 1) % KERN_SLOTS;
  TRY(kern_cuda_wait_event_priv(context->slot_free[context->slot]));
  *host = context->pinned + context->slot * context->slot_bytes;
  return CORE_OK;
}

core_status kern_stage_send_priv(kern_context *context, size_t bytes, void **device) {
  const size_t at = context->slot * context->slot_bytes;
  *device = context->staged + at;
  KERN_CUDA(cudaMemcpyAsync(*device, context->pinned + at, bytes, cudaMemcpyHostToDevice, context->stream));
  KERN_CUDA(cudaEventRecord(context->slot_free[context->slot], context->stream));
  return CORE_OK;
}
