/* Private to kernels/cuda, host side: the opened device, the context and its scratch, checks, launches and
 * the prototypes of the ops.
 *
 * One device is opened per process and owns the main stream; a context owns all scratch, cuBLAS handles and
 * staging, and ops only borrow them during a call. Kernels are C++ templates inside one .cu each; what they
 * have in common is in cuda_vector.cuh (device) and here (host). */
#ifndef KERN_CUDA_IMPL_H
#define KERN_CUDA_IMPL_H

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <initializer_list>
#include <math.h>
#include <stdint.h>
#include <type_traits> /* std::remove_pointer_t */

extern "C" {
#include "cuda_grouping_impl.h" /* kern_grouping */
#include "kernels/kernels.h"    /* kern_ops */
}

typedef __nv_bfloat16 kern_bfloat;

enum {
  KERN_BLOCK = 256,           /* threads of a block where nothing else is said */
  KERN_BLOCKS_MOST = 4096,    /* most blocks of a grid whose blocks loop */
  KERN_PARTIALS = 512,        /* most blocks that leave a partial sum each */
  KERN_CHUNKS = 1024,         /* most stretches that a dispatch plan is counted in */
  KERN_SLOTS = 4,             /* of the staging ring */
  KERN_STREAMS = 4,           /* side streams of grouped products */
  KERN_MAX_HEAD_WIDTH = 256,  /* A */
  KERN_MAX_NORM_WIDTH = 8192, /* C of a row that is normalised */
  KERN_GEMM_TILE = 64         /* rows and columns of c of one block of kern_tile_gemm */
};

/* Ops that are named in the table; the order is that of the table. */
// clang-format off
#define KERN_CUDA_OPS(X)                                                                                   \
  X(gemm) X(gemm_grouped) X(bias_fwd) X(bias_bwd) X(gelu_fwd) X(gelu_bwd) X(swiglu_fwd) X(swiglu_bwd)      \
  X(rmsnorm_fwd) X(rmsnorm_bwd) X(layernorm_fwd) X(layernorm_bwd) X(rope)                                  \
  X(attention_fwd) X(attention_bwd) X(attention_cross_fwd) X(attention_cross_bwd) X(attention_cached) X(router_logits) X(router_logits_bwd) X(router_noise) X(softmax_fwd)   \
  X(router_choose) X(router_gate_bwd) X(router_sums) X(router_sums_bwd) X(router_count) X(dispatch_plan)   \
  X(softmax_bwd) X(router_second) X(router_gate_fwd) X(router_calibrated_bwd) X(router_balance)            \
  X(router_balance_bwd) X(gather_rows) X(combine_fwd) X(combine_bwd) X(segment_mean_fwd) X(segment_mean_bwd)                     \
  X(position_fwd) X(position_bwd) X(l2norm_fwd) X(l2norm_bwd) X(contrastive_fwd) X(contrastive_bwd)        \
  X(cross_entropy_fwd) X(cross_entropy_bwd) X(embedding_bwd) X(standardize) X(adamw) X(sum_squares) X(cast) X(axpy)         \
  X(scale) X(fill) X(bias_grouped_fwd) X(bias_grouped_bwd) X(dropout) X(regression)
#define KERN_CUDA_MANAGEMENT(X) X(context_create) X(context_destroy) X(context_bytes) X(context_threads)
// clang-format on

/* The prototypes are those of the table, so they cannot drift from it. */
extern "C" {
#define KERN_CUDA_DECLARE(op) std::remove_pointer_t<decltype(kern_ops::op)> kern_##op##_cuda;
KERN_CUDA_OPS(KERN_CUDA_DECLARE)
KERN_CUDA_MANAGEMENT(KERN_CUDA_DECLARE)
#undef KERN_CUDA_DECLARE
}

enum kern_cuda_op {
#define KERN_CUDA_ENUM(op) KERN_CUDA_OP_##op,
  KERN_CUDA_OPS(KERN_CUDA_ENUM)
#undef KERN_CUDA_ENUM
      KERN_CUDA_OP_COUNT
};

/* Where a kernel says that an index in device memory was out of range: one word of page-locked host memory,
 * which the host reads whenever it has waited. Any one of several is kept. */
struct kern_fault {
  volatile unsigned long long *word; /* NULL: somebody else has said it */
  uint32_t op;                       /* kern_cuda_op */

  __device__ void report(int64_t index) const {
    if (word != NULL) *word = (unsigned long long)(op + 1) << 32 | (uint32_t)index;
  }
  /* True where low <= index < high; reports it otherwise. */
  __device__ bool inside(int64_t index, int64_t low, int64_t high) const {
    const bool good = index >= low && index < high;
    if (!good) report(index);
    return good;
  }
};

struct kern_context {
  kern_limits limits;
  cudaStream_t stream; /* the device's main stream */
  /* One block of device memory, carved by context_plan in cuda_context.cu. */
  void *memory;
  float *partial; /* [partial_count], partial sums by block */
  int64_t partial_count;
  double *sums; /* [KERN_PARTIALS][3 + 2 limits.experts], and of flat arrays and rows */
  int64_t sums_count;
  int32_t *chunks;          /* [limits.experts][KERN_CHUNKS] counts of a dispatch plan */
  int64_t *totals;          /* [2][CORE_MAX_EXPERTS] count and first row of each expert */
  float *delta;             /* [limits.rows, limits.heads] of attention's gradient */
  int2 *range;              /* [limits.rows] segment of each row */
  unsigned char *workspace; /* [1 + KERN_STREAMS][KERN_WORKSPACE] of cuBLAS */
  unsigned char *staged;    /* [KERN_SLOTS][slot_bytes] */
  /* Page-locked host memory. */
  unsigned char *pinned;  /* [KERN_SLOTS][slot_bytes] */
  int64_t *pinned_counts; /* [CORE_MAX_EXPERTS] */
  size_t slot_bytes;
  int32_t slot;
  cudaEvent_t slot_free[KERN_SLOTS];
  /* Products. Handle 0 belongs to the main stream. */
  kern_grouping grouping;
  cublasHandle_t blas[1 + KERN_STREAMS];
  cudaStream_t side[KERN_STREAMS];
  cudaEvent_t fork, join[KERN_STREAMS];
};

/* --- the opened device (cuda_device.cu) --- */
CORE_NODISCARD core_status kern_cuda_open_priv(int32_t ordinal);
const core_device *kern_cuda_device_priv(void);
cudaStream_t kern_cuda_stream_priv(void);
/* Makes the opened device current for the calling thread. */
CORE_NODISCARD core_status kern_cuda_use_priv(void);
/* The host waits, polling what core_device.watch registered; then faults are reported. */
CORE_NODISCARD core_status kern_cuda_wait_stream_priv(cudaStream_t stream);
CORE_NODISCARD core_status kern_cuda_wait_event_priv(cudaEvent_t event);
kern_fault kern_cuda_fault_priv(kern_cuda_op op);

/* A failed CUDA call; returns ERR_DEVICE, or ERR_MEMORY where memory was short. */
CORE_NODISCARD core_status kern_cuda_failed_priv(cudaError_t error, const char *what, const char *function,
                                                 const char *file, int line);
CORE_NODISCARD core_status kern_cublas_failed_priv(cublasStatus_t error, const char *what,
                                                   const char *function, const char *file, int line);
#define KERN_CUDA(call)                                                              \
  do {                                                                               \
    const cudaError_t cuda_error = (call);                                           \
    if (cuda_error != cudaSuccess)                                                   \
      return kern_cuda_failed_priv(cuda_error, #call, __func__, __FILE__, __LINE__); \
  } while (0)
#define KERN_CUBLAS(call)                                                                \
  do {                                                                                   \
    const cublasStatus_t cublas_error = (call);                                          \
    if (cublas_error != CUBLAS_STATUS_SUCCESS)                                           \
      return kern_cublas_failed_priv(cublas_error, #call, __func__, __FILE__, __LINE__); \
  } while (0)

/* --- staging (cuda_context.cu): host bytes that a kernel reads --- */
/* A free slot of the ring, at least `bytes` long; waits when all are in flight. */
CORE_NODISCARD core_status kern_stage_begin_priv(kern_context *context, size_t bytes, void **host);
/* Sends the slot that begin gave to the device; *device is valid for kernels launched until the ring has come
 * round, which the order of the stream makes sure of. */
CORE_NODISCARD core_status kern_stage_send_priv(kern_context *context, size_t bytes, void **device);

/* --- checks (cuda_check.cu) --- */
enum { KERN_ANY = -1 };
/* dtype, extents (KERN_ANY: whatever it is, but not negative) and presence. Errors: ERR_ARGUMENT;
 * ERR_UNSUPPORTED for a bfloat16 where float32 is needed. */
CORE_NODISCARD core_status kern_check_cuda_priv(const char *op, const char *name, const core_tensor &tensor,
                                                core_dtype dtype, std::initializer_list<int64_t> shape);
/* float32 or bfloat16. */
CORE_NODISCARD core_status kern_check_active_cuda_priv(const char *op, const char *name,
                                                       const core_tensor &tensor);
CORE_NODISCARD core_status kern_check_segments_cuda_priv(const char *op, const kern_segments &segments,
                                                         int64_t rows, int64_t longest);
CORE_NODISCARD core_status kern_check_offset_cuda_priv(const char *op, const char *name,
                                                       const int64_t *offset, int64_t count, int64_t rows);
CORE_NODISCARD core_status kern_check_columns_cuda_priv(const char *op, int64_t first, int64_t n,
                                                        int64_t all);
CORE_NODISCARD core_status kern_check_limit_cuda_priv(const char *op, const char *name, int64_t size,
                                                      int64_t limit);
#define KERN_CHECK(tensor, dtype, ...) \
  TRY(kern_check_cuda_priv(__func__, #tensor, (tensor), (dtype), {__VA_ARGS__}))
#define KERN_CHECK_REAL(tensor, ...) KERN_CHECK(tensor, CORE_FLOAT32, __VA_ARGS__)
/* The first Active tensor of a call decides the type of the others. */
#define KERN_CHECK_ACTIVE(tensor, ...)                             \
  do {                                                             \
    TRY(kern_check_active_cuda_priv(__func__, #tensor, (tensor))); \
    KERN_CHECK(tensor, (tensor).dtype, __VA_ARGS__);               \
  } while (0)
#define KERN_CHECK_LIKE(tensor, other) \
  KERN_CHECK(tensor, (other).dtype, (other).shape[0], (other).shape[1], (other).shape[2], (other).shape[3])
#define KERN_CHECK_LIMIT(name, size, limit) TRY(kern_check_limit_cuda_priv(__func__, (name), (size), (limit)))

/* --- launches --- */
__host__ __device__ static inline int64_t kern_divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
__host__ __device__ static inline int64_t kern_least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
template <typename T>
T *kern_data(const core_tensor &tensor) {
  return (T *)tensor.data;
}

struct kern_grid {
  int64_t x;
  dim3 block;
  int64_t y, z;
  size_t shared; /* bytes of dynamic shared memory */

  kern_grid(int64_t blocks, dim3 threads, int64_t blocks_y = 1, size_t shared_bytes = 0, int64_t blocks_z = 1)
      : x(blocks), block(threads), y(blocks_y), z(blocks_z), shared(shared_bytes) {}
};

/* Enqueues a kernel on the main stream. A grid without blocks is nothing to do. */
template <typename... P, typename... A>
CORE_NODISCARD core_status kern_launch_priv(const kern_context *context, const char *op,
                                            const kern_grid &grid, void (*kernel)(P...), A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return CORE_OK;
  CHECK(grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535, CORE_ERR_ARGUMENT,
        "%s: %lld x %lld x %lld blocks are more than a grid can have", op, (long long)grid.x,
        (long long)grid.y, (long long)grid.z);
  if (grid.shared > 48 * 1024)
    KERN_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)grid.shared));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z);
  config.blockDim = grid.block;
  config.dynamicSmemBytes = grid.shared;
  config.stream = context->stream;
  KERN_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
  KERN_CUDA(cudaGetLastError());
  return CORE_OK;
}
#define KERN_LAUNCH(context, grid, ...) TRY(kern_launch_priv((context), __func__, (grid), __VA_ARGS__))

/* Calls run with a value of the type that an Active tensor has. */
template <typename F>
core_status kern_with_active(core_dtype dtype, F run) {
  return dtype == CORE_BFLOAT16 ? run(kern_bfloat()) : run(float());
}

/* A constant as a type, to choose a template by a run-time value. */
template <int N>
using kern_int = std::integral_constant<int, N>;

/* True where every pointer (NULL counts) is aligned for 16-byte accesses. */
static inline bool kern_aligned(std::initializer_list<const void *> pointers) {
  uintptr_t all = 0;
  for (const void *pointer : pointers) all |= (uintptr_t)pointer;
  return all % 16 == 0;
}

/* --- reductions shared by ops (reduce.cu) --- */
/* out[i] += sum over p < count, in order, of partial[p * stride + i], i < n. */
CORE_NODISCARD core_status kern_combine_partials_priv(const kern_context *context, const float *partial,
                                                      int64_t count, int64_t stride, int64_t n, float *out);
CORE_NODISCARD core_status kern_combine_doubles_priv(const kern_context *context, const double *partial,
                                                     int64_t count, int64_t stride, int64_t n, double *out);
/* out[0] += sum of partial[count], in a fixed order. */
CORE_NODISCARD core_status kern_sum_doubles_priv(const kern_context *context, const double *partial,
                                                 int64_t count, double *out);
/* out[g, c] += sums over the rows [offset[g], offset[g + 1]) of x[rows, c], Active. offset: device memory, or
 * NULL for one group of all rows; longest: rows of the largest group. Uses the context's partials. */
CORE_NODISCARD core_status kern_sum_rows_priv(const kern_context *context, const core_tensor &x,
                                              const int64_t *offset, int64_t groups, int64_t longest,
                                              float *out);

#endif
