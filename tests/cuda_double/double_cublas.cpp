/* cuBLAS on the host: every product is checked at the call as the library checks it, and done in the order of
 * the stream: operands widened to float, oneDNN's product, one rounding. */
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/cuda_double/double_impl.h"

struct cublasContext {
  cudaStream_t stream;
  void *workspace;
  size_t workspace_bytes;
  cublasPointerMode_t pointer_mode;
};

using namespace cuda_double;

static std::set<cublasHandle_t> handles;

/* One product in cuBLAS's terms: column-major, C[m,n] = alpha op(A)[m,k] op(B)[k,n] + beta C. */
struct Product {
  cublasOperation_t transa, transb;
  int m, n, k;
  double alpha, beta;
  const void *a, *b;
  void *c;
  int lda, ldb, ldc;
};

struct Types {
  cudaDataType a, b, c;
  cublasComputeType_t compute;
};

static size_t size_of(cudaDataType type) {
  return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

static bool single_precision(cublasComputeType_t compute) {
  return compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
         compute == CUBLAS_COMPUTE_32F_FAST_TF32;
}

/* The combinations that the library's documentation lists, of the types that exist here. */
static bool supported(const Types &t) {
  if (t.a != t.b) return false;
  if (!single_precision(t.compute)) return t.a == CUDA_R_64F && t.c == CUDA_R_64F;
  if (t.compute == CUBLAS_COMPUTE_32F_FAST_TF32) return t.a == CUDA_R_32F && t.c == CUDA_R_32F;
  bool narrow = t.a == CUDA_R_16F || t.a == CUDA_R_16BF;
  return (narrow && (t.c == t.a || t.c == CUDA_R_32F)) || (t.a == CUDA_R_32F && t.c == CUDA_R_32F);
}

static double scalar(const void *value, int index, cublasComputeType_t compute) {
  return single_precision(compute) ? ((const float *)value)[index] : ((const double *)value)[index];
}

static bool sizes_fit(const Product &p) {
  int rows_a = p.transa == CUBLAS_OP_N ? p.m : p.k, rows_b = p.transb == CUBLAS_OP_N ? p.k : p.n;
  return p.m >= 0 && p.n >= 0 && p.k >= 0 && p.lda >= std::max(1, rows_a) && p.ldb >= std::max(1, rows_b) &&
         p.ldc >= std::max(1, p.m);
}

static cublasStatus_t check_handle(cublasHandle_t handle) {
  if (!handles.count(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (context_error() != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  if (!is_stream(handle->stream)) return CUBLAS_STATUS_EXECUTION_FAILED;
  return handle->pointer_mode == CUBLAS_POINTER_MODE_HOST ? CUBLAS_STATUS_SUCCESS
                                                          : CUBLAS_STATUS_NOT_SUPPORTED;
}

/* ---- arithmetic ---- */

static double load(const void *data, cudaDataType type, size_t i) {
  switch (type) {
    case CUDA_R_64F:
      return ((const double *)data)[i];
    case CUDA_R_32F:
      return ((const float *)data)[i];
    case CUDA_R_16F:
      return cuda_double_from_half(((const unsigned short *)data)[i]);
    default:
      return cuda_double_from_bf16(((const unsigned short *)data)[i]);
  }
}

static void store(void *data, cudaDataType type, size_t i, double value) {
  switch (type) {
    case CUDA_R_64F:
      ((double *)data)[i] = value;
      break;
    case CUDA_R_32F:
      ((float *)data)[i] = (float)value;
      break;
    case CUDA_R_16F:
      ((unsigned short *)data)[i] = cuda_double_to_half((float)value);
      break;
    default:
      ((unsigned short *)data)[i] = cuda_double_to_bf16((float)value);
      break;
  }
}

/* Column-major [rows, columns] without gaps. */
static std::vector<float> widened(const void *data, cudaDataType type, int rows, int columns, int ld) {
  std::vector<float> out((size_t)rows * (size_t)columns);
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++)
      out[(size_t)c * (size_t)rows + (size_t)r] = (float)load(data, type, (size_t)c * (size_t)ld + (size_t)r);
  return out;
}

/* oneDNN's matrices are row-major, so it sees everything transposed: C' = op(B)' op(A)'. */
static std::vector<float> multiply_single(const Product &p, const Types &t) {
  int rows_a = p.transa == CUBLAS_OP_N ? p.m : p.k, rows_b = p.transb == CUBLAS_OP_N ? p.k : p.n;
  std::vector<float> a = widened(p.a, t.a, rows_a, p.m + p.k - rows_a, p.lda);
  std::vector<float> b = widened(p.b, t.b, rows_b, p.k + p.n - rows_b, p.ldb);
  std::vector<float> c((size_t)p.m * (size_t)p.n);
  int threads = omp_get_max_threads();
  omp_set_num_threads(1); /* products are small, and threads that wait for the next one take its processor */
  if (p.k > 0)
    dnnl_sgemm(p.transb == CUBLAS_OP_N ? 'N' : 'T', p.transa == CUBLAS_OP_N ? 'N' : 'T', p.n, p.m, p.k, 1,
               b.data(), rows_b, a.data(), rows_a, 0, c.data(), p.m);
  omp_set_num_threads(threads);
  return c;
}

static double multiply_double(const Product &p, int row, int column) {
  double sum = 0;
  for (int i = 0; i < p.k; i++) {
    size_t a = p.transa == CUBLAS_OP_N ? (size_t)i * (size_t)p.lda + (size_t)row
                                       : (size_t)row * (size_t)p.lda + (size_t)i;
    size_t b = p.transb == CUBLAS_OP_N ? (size_t)column * (size_t)p.ldb + (size_t)i
                                       : (size_t)i * (size_t)p.ldb + (size_t)column;
    sum += ((const double *)p.a)[a] * ((const double *)p.b)[b];
  }
  return sum;
}

static bool operand_fits(const void *data, cudaDataType type, int rows, int columns, int ld) {
  if (rows == 0 || columns == 0) return true;
  return inside(data, ((size_t)ld * (size_t)(columns - 1) + (size_t)rows) * size_of(type),
                "a matrix product");
}

static void compute(const Product &p, const Types &t) {
  int rows_a = p.transa == CUBLAS_OP_N ? p.m : p.k, rows_b = p.transb == CUBLAS_OP_N ? p.k : p.n;
  if (p.m == 0 || p.n == 0) return;
  if (!operand_fits(p.a, t.a, rows_a, p.m + p.k - rows_a, p.lda) ||
      !operand_fits(p.b, t.b, rows_b, p.k + p.n - rows_b, p.ldb) || !operand_fits(p.c, t.c, p.m, p.n, p.ldc))
    return;
  bool single = single_precision(t.compute);
  std::vector<float> product = single ? multiply_single(p, t) : std::vector<float>();
  for (int column = 0; column < p.n; column++)
    for (int row = 0; row < p.m; row++) {
      size_t at = (size_t)column * (size_t)p.ldc + (size_t)row;
      double value =
          single ? product[(size_t)column * (size_t)p.m + (size_t)row] : multiply_double(p, row, column);
      value *= p.alpha;
      if (p.beta != 0) value += p.beta * load(p.c, t.c, at); /* beta 0: C is not read */
      store(p.c, t.c, at, value);
    }
}

/* Bytes at each end of the workspace: all of it, at every product, would take most of the time. */
static const size_t kSpoilt = 1 << 16;

static cublasStatus_t queued(cublasHandle_t handle, std::function<void()> work) {
  void *workspace = handle->workspace;
  size_t bytes = handle->workspace_bytes;
  cudaError_t error = enqueue(handle->stream, [=] {
    work();
    if (workspace) { /* nobody else may keep anything there */
      memset(workspace, 0xff, std::min(bytes, kSpoilt));
      memset((char *)workspace + bytes - std::min(bytes, kSpoilt), 0xff, std::min(bytes, kSpoilt));
    }
  });
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

/* ---- the handle ---- */

cublasStatus_t cublasCreate(cublasHandle_t *out) {
  Guard guard(lock());
  if (strikes(&faults().allocation)) return CUBLAS_STATUS_ALLOC_FAILED;
  *out = new cublasContext{};
  handles.insert(*out);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle) {
  Guard guard(lock());
  if (!handles.erase(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  drain(30);
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  if (!handles.count(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = {stream, nullptr, 0, handle->pointer_mode};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream(cublasHandle_t handle, cudaStream_t *stream) {
  if (!handles.count(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  *stream = handle->stream;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t bytes) {
  Guard guard(lock());
  if (!handles.count(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  bool good = bytes == 0 || ((uintptr_t)workspace % 256 == 0 && kind_of(workspace) == Kind::device &&
                             inside(workspace, bytes, "cuBLAS's workspace"));
  if (!good) return CUBLAS_STATUS_INVALID_VALUE;
  handle->workspace = workspace;
  handle->workspace_bytes = bytes;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t) {
  return handles.count(handle) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}

cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode) {
  if (!handles.count(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  handle->pointer_mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion(cublasHandle_t, int *version) {
  *version = 130000;
  return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusName(cublasStatus_t status) {
  switch (status) {
#define NAME(status) \
  case status:       \
    return #status
    NAME(CUBLAS_STATUS_SUCCESS);
    NAME(CUBLAS_STATUS_NOT_INITIALIZED);
    NAME(CUBLAS_STATUS_ALLOC_FAILED);
    NAME(CUBLAS_STATUS_INVALID_VALUE);
    NAME(CUBLAS_STATUS_ARCH_MISMATCH);
    NAME(CUBLAS_STATUS_MAPPING_ERROR);
    NAME(CUBLAS_STATUS_EXECUTION_FAILED);
    NAME(CUBLAS_STATUS_INTERNAL_ERROR);
    NAME(CUBLAS_STATUS_NOT_SUPPORTED);
    NAME(CUBLAS_STATUS_LICENSE_ERROR);
#undef NAME
  }
  return "unknown status";
}

const char *cublasGetStatusString(cublasStatus_t status) {
  return cublasGetStatusName(status);
}

/* ---- products ---- */

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa,
                                          cublasOperation_t transb, int m, int n, int k, const void *alpha,
                                          const void *A, cudaDataType Atype, int lda, long long strideA,
                                          const void *B, cudaDataType Btype, int ldb, long long strideB,
                                          const void *beta, void *C, cudaDataType Ctype, int ldc,
                                          long long strideC, int batchCount, cublasComputeType_t computeType,
                                          cublasGemmAlgo_t) {
  Guard guard(lock());
  cublasStatus_t status = check_handle(handle);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (!alpha || !beta) return CUBLAS_STATUS_INVALID_VALUE;
  Types types = {Atype, Btype, Ctype, computeType};
  Product p = {transa, transb, m, n, k, 0, 0, A, B, C, lda, ldb, ldc};
  if (!sizes_fit(p) || batchCount < 0 || strideC < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (!supported(types)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (m == 0 || n == 0 || batchCount == 0) return CUBLAS_STATUS_SUCCESS;
  if (!C || (k > 0 && (!A || !B))) return CUBLAS_STATUS_INVALID_VALUE;
  p.alpha = scalar(alpha, 0, computeType);
  p.beta = scalar(beta, 0, computeType);
  return queued(handle, [=]() mutable {
    for (int i = 0; i < batchCount; i++) {
      p.a = (const char *)A + i * strideA * (long long)size_of(Atype);
      p.b = (const char *)B + i * strideB * (long long)size_of(Btype);
      p.c = (char *)C + i * strideC * (long long)size_of(Ctype);
      compute(p, types);
    }
  });
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m,
                            int n, int k, const void *alpha, const void *A, cudaDataType Atype, int lda,
                            const void *B, cudaDataType Btype, int ldb, const void *beta, void *C,
                            cudaDataType Ctype, int ldc, cublasComputeType_t computeType,
                            cublasGemmAlgo_t algo) {
  return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb,
                                    0, beta, C, Ctype, ldc, 0, 1, computeType, algo);
}

/* As the library: pointers of 16-bit matrices lie on 16-byte boundaries. */
static bool aligned(const Product &p, const Types &t) {
  uintptr_t all = (uintptr_t)p.a | (uintptr_t)p.b | (uintptr_t)p.c;
  if (size_of(t.a) != 2 || all % 16 == 0) return true;
  report(true, "a grouped matrix product of 16-bit types has a matrix off its 16-byte boundary");
  return false;
}

cublasStatus_t cublasGemmGroupedBatchedEx(cublasHandle_t handle, const cublasOperation_t transa_array[],
                                          const cublasOperation_t transb_array[], const int m_array[],
                                          const int n_array[], const int k_array[], const void *alpha_array,
                                          const void *const Aarray[], cudaDataType_t Atype,
                                          const int lda_array[], const void *const Barray[],
                                          cudaDataType_t Btype, const int ldb_array[], const void *beta_array,
                                          void *const Carray[], cudaDataType_t Ctype, const int ldc_array[],
                                          int group_count, const int group_size[],
                                          cublasComputeType_t computeType) {
  Guard guard(lock());
  cublasStatus_t status = check_handle(handle);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  Types types = {Atype, Btype, Ctype, computeType};
  std::vector<Product> list; /* one per product; pointers follow when the time comes */
  if (group_count < 0) return CUBLAS_STATUS_INVALID_VALUE;
  for (int g = 0; g < group_count; g++) {
    Product p = {transa_array[g],
                 transb_array[g],
                 m_array[g],
                 n_array[g],
                 k_array[g],
                 scalar(alpha_array, g, computeType),
                 scalar(beta_array, g, computeType),
                 nullptr,
                 nullptr,
                 nullptr,
                 lda_array[g],
                 ldb_array[g],
                 ldc_array[g]};
    if (!sizes_fit(p) || group_size[g] < 0) return CUBLAS_STATUS_INVALID_VALUE;
    list.insert(list.end(), (size_t)group_size[g], p);
  }
  if (!supported(types) || Atype != Ctype) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (list.empty()) return CUBLAS_STATUS_SUCCESS;
  for (const void *array : {(const void *)Aarray, (const void *)Barray, (const void *)Carray})
    if (kind_of(array) == Kind::pageable) return CUBLAS_STATUS_INVALID_VALUE;
  return queued(handle, [=]() mutable {
    for (size_t i = 0; i < list.size(); i++) {
      list[i].a = Aarray[i];
      list[i].b = Barray[i];
      list[i].c = Carray[i];
      if (aligned(list[i], types)) compute(list[i], types);
    }
  });
}
