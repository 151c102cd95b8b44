/* Matrix products of the emulation against plain loops, and its refusals against the library's documentation.
 */
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstring>
#include <vector>

extern "C" {
#include <cmocka.h>
}

#include "tests/cuda_double/cuda_double.h"

#define CALL(expression) assert_int_equal((expression), 0)

static cudaStream_t stream;
static cublasHandle_t handle;

static int begin(void **) {
  return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
                 cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS &&
                 cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS
             ? 0
             : -1;
}

static int end(void **) {
  return cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS && cudaStreamDestroy(stream) == cudaSuccess ? 0 : -1;
}

/* A matrix on the device and what it holds. */
struct Matrix {
  cudaDataType type;
  std::vector<float> value;
  void *data;
  Matrix(cudaDataType type_, size_t count, int seed) : type(type_), value(count), data(nullptr) {
    for (size_t i = 0; i < count; i++) value[i] = (float)((int)((i * 7 + (size_t)seed * 13) % 19) - 9) / 8;
    CALL(cudaMalloc(&data, count * size()));
    std::vector<__nv_bfloat16> narrow(value.begin(), value.end());
    const void *from = type == CUDA_R_32F ? (const void *)value.data() : (const void *)narrow.data();
    CALL(cudaMemcpyAsync(data, from, count * size(), cudaMemcpyHostToDevice, stream));
  }
  ~Matrix() {
    cudaFree(data);
  }
  Matrix(const Matrix &) = delete;
  size_t size() const {
    return type == CUDA_R_32F ? 4 : 2;
  }
  std::vector<float> get() const {
    std::vector<float> wide(value.size());
    std::vector<__nv_bfloat16> narrow(value.size());
    void *to = type == CUDA_R_32F ? (void *)wide.data() : (void *)narrow.data();
    CALL(cudaMemcpyAsync(to, data, value.size() * size(), cudaMemcpyDeviceToHost, stream));
    CALL(cudaStreamSynchronize(stream));
    if (type != CUDA_R_32F) wide.assign(narrow.begin(), narrow.end());
    return wide;
  }
};

static float expected(const Matrix &a, const Matrix &b, bool ta, bool tb, int row, int column, int k, int lda,
                      int ldb) {
  double sum = 0;
  for (int i = 0; i < k; i++)
    sum += (double)a.value[(size_t)(ta ? row * lda + i : i * lda + row)] *
           (double)b.value[(size_t)(tb ? i * ldb + column : column * ldb + i)];
  return (float)sum;
}

/* Products of small eighths are exact in float, so equality is the right question. */
static void check(cudaDataType in, cudaDataType out, bool ta, bool tb, float beta) {
  int m = 7, n = 5, k = 9, lda = (ta ? k : m) + 2, ldb = (tb ? n : k) + 1, ldc = m + 3;
  Matrix a(in, (size_t)(lda * (ta ? m : k)), 1), b(in, (size_t)(ldb * (tb ? k : n)), 2),
      c(out, (size_t)(ldc * n), 3);
  float alpha = 2;
  CALL(cublasGemmEx(handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha,
                    a.data, in, lda, b.data, in, ldb, &beta, c.data, out, ldc, CUBLAS_COMPUTE_32F,
                    CUBLAS_GEMM_DEFAULT));
  alpha = 77; /* was read at the call */
  std::vector<float> got = c.get();
  for (int column = 0; column < n; column++)
    for (int row = 0; row < ldc; row++) {
      size_t at = (size_t)(column * ldc + row);
      float want = c.value[at];
      if (row < m) want = 2 * expected(a, b, ta, tb, row, column, k, lda, ldb) + beta * c.value[at];
      if (out == CUDA_R_16BF) want = (float)__float2bfloat16_rn(want);
      assert_true(got[at] == want);
    }
}

static void products_are_those_of_plain_loops(void **) {
  for (int form = 0; form < 4; form++)
    for (float beta : {0.0f, 1.0f, -0.5f}) {
      check(CUDA_R_32F, CUDA_R_32F, form & 1, form & 2, beta);
      check(CUDA_R_16BF, CUDA_R_32F, form & 1, form & 2, beta);
      check(CUDA_R_16BF, CUDA_R_16BF, form & 1, form & 2, beta);
    }
}

static void strided_and_grouped_products_are_single_ones(void **) {
  const int m = 8, n = 16, k = 8, count = 3;
  Matrix a(CUDA_R_16BF, m * k * count, 1), b(CUDA_R_16BF, k * n * count, 2), c(CUDA_R_16BF, m * n * count, 3),
      d(CUDA_R_16BF, m * n * count, 3);
  float one = 1, zero = 0, ones[3] = {1, 1, 1}, zeros[3] = {0, 0, 0};
  CALL(cublasGemmStridedBatchedEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, a.data, CUDA_R_16BF, m,
                                  m * k, b.data, CUDA_R_16BF, k, k * n, &zero, c.data, CUDA_R_16BF, m, m * n,
                                  count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  const void *list[9];
  for (int i = 0; i < count; i++) {
    list[i] = (const char *)a.data + i * m * k * 2;
    list[3 + i] = (const char *)b.data + i * k * n * 2;
    list[6 + i] = (const char *)d.data + i * m * n * 2;
  }
  const void **device = nullptr;
  CALL(cudaMalloc((void **)&device, sizeof list));
  CALL(cudaMemcpyAsync(device, list, sizeof list, cudaMemcpyHostToDevice, stream));
  cublasOperation_t none[2] = {CUBLAS_OP_N, CUBLAS_OP_N};
  int ms[2] = {m, m}, ns[2] = {n, n}, ks[2] = {k, k}, sizes[2] = {1, 2};
  auto grouped = [&](const void **pointers, cudaDataType out) {
    return cublasGemmGroupedBatchedEx(handle, none, none, ms, ns, ks, ones, pointers, CUDA_R_16BF, ms,
                                      pointers + 3, CUDA_R_16BF, ks, zeros, (void *const *)(pointers + 6),
                                      out, ms, 2, sizes, CUBLAS_COMPUTE_32F);
  };
  CALL(grouped(device, CUDA_R_16BF));
  assert_true(c.get() == d.get());
  for (int i = 0; i < count; i++) {
    float sum = 0;
    for (int j = 0; j < k; j++)
      sum += a.value[(size_t)(i * m * k + j * m + 2)] * b.value[(size_t)(i * k * n + 3 * k + j)];
    assert_true(c.get()[(size_t)(i * m * n + 3 * m + 2)] == (float)__float2bfloat16_rn(sum));
  }
  assert_int_equal(grouped(device, CUDA_R_32F),
                   CUBLAS_STATUS_NOT_SUPPORTED); /* the library has no such form */
  assert_int_equal(grouped(list, CUDA_R_16BF), CUBLAS_STATUS_INVALID_VALUE); /* pointers in host memory */
  CALL(cudaFree(device));
}

static void wrong_arguments_are_refused(void **) {
  Matrix a(CUDA_R_32F, 64, 1), c(CUDA_R_32F, 64, 2);
  float one = 1;
  auto attempt = [&](int m, int lda, int ldc, cudaDataType in, cudaDataType out, cublasComputeType_t compute,
                     void *to) {
    return cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, 8, 8, &one, a.data, in, lda, a.data, in, 8, &one,
                        to, out, ldc, compute, CUBLAS_GEMM_DEFAULT);
  };
  CALL(attempt(8, 8, 8, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, c.data));
  CALL(attempt(0, 1, 1, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, nullptr));
  assert_int_equal(attempt(8, 7, 8, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, c.data),
                   CUBLAS_STATUS_INVALID_VALUE);
  assert_int_equal(attempt(8, 8, 7, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, c.data),
                   CUBLAS_STATUS_INVALID_VALUE);
  assert_int_equal(attempt(-1, 8, 8, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, c.data),
                   CUBLAS_STATUS_INVALID_VALUE);
  assert_int_equal(attempt(8, 8, 8, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, nullptr),
                   CUBLAS_STATUS_INVALID_VALUE);
  assert_int_equal(attempt(8, 8, 8, CUDA_R_32F, CUDA_R_16BF, CUBLAS_COMPUTE_32F, c.data),
                   CUBLAS_STATUS_NOT_SUPPORTED);
  assert_int_equal(attempt(8, 8, 8, CUDA_R_16BF, CUDA_R_16F, CUBLAS_COMPUTE_32F, c.data),
                   CUBLAS_STATUS_NOT_SUPPORTED);
  assert_int_equal(attempt(8, 8, 8, CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_64F, c.data),
                   CUBLAS_STATUS_NOT_SUPPORTED);
  CALL(cudaStreamSynchronize(stream));
  assert_string_equal(cuda_double_reports(), "");
}

static void operands_stay_inside_their_memory(void **) {
  Matrix a(CUDA_R_32F, 63, 1), b(CUDA_R_32F, 64, 2), c(CUDA_R_32F, 64, 3);
  float one = 1;
  CALL(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, a.data, CUDA_R_32F, 8, b.data,
                    CUDA_R_32F, 8, &one, c.data, CUDA_R_32F, 8, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  assert_int_equal(cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
  assert_non_null(strstr(cuda_double_reports(), "touches bytes 0 to 256 of 252 bytes"));
  cuda_double_forget();
}

static void the_workspace_is_scratch(void **) {
  Matrix a(CUDA_R_32F, 64, 1), c(CUDA_R_32F, 64, 2), workspace(CUDA_R_32F, 256, 3);
  float one = 1, zero = 0;
  CALL(cublasSetWorkspace(handle, workspace.data, 1024));
  CALL(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, a.data, CUDA_R_32F, 8, a.data,
                    CUDA_R_32F, 8, &zero, c.data, CUDA_R_32F, 8, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  for (float value : workspace.get()) assert_true(std::isnan(value));
  char host[256];
  assert_int_equal(cublasSetWorkspace(handle, host, sizeof host), CUBLAS_STATUS_INVALID_VALUE);
  CALL(cublasSetStream(handle, stream));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(products_are_those_of_plain_loops),
      cmocka_unit_test(strided_and_grouped_products_are_single_ones),
      cmocka_unit_test(wrong_arguments_are_refused),
      cmocka_unit_test(operands_stay_inside_their_memory),
      cmocka_unit_test(the_workspace_is_scratch),
  };
  return cmocka_run_group_tests_name("emulated cuBLAS", tests, begin, end);
}
