/* Private to kernels/cuda, device side: a plain tiled matrix product in float32 for the router, whose sums
 * must run over the inner extent in one order whatever rows lie beside a row, and whose types cuBLAS does not
 * mix.
 *
 * c[m,n] = op(a) op(b) by blocks of 64 x 64, 256 threads with 4 x 4 sums each, 16 of the inner extent at a
 * time in shared memory. What is done with a sum is F's affair: __device__ void operator()(row, column,
 * value). */
#ifndef KERN_TILE_GEMM_CUH
#define KERN_TILE_GEMM_CUH

#include "cuda_vector.cuh"

enum { KERN_GEMM_INNER = 16, KERN_GEMM_PITCH = KERN_GEMM_TILE + 4 };

/* A matrix of `rows` (m or n) by `inner`; ld elements from one line to the next. */
template <typename T>
struct kern_operand {
  const T *data;
  int64_t rows, inner, ld;
  bool vectors; /* four elements along a line may be read as one */
};

template <typename T>
kern_operand<T> kern_operand_of(const T *data, int64_t rows, int64_t inner, int64_t ld) {
  const bool vectors = ld % 4 == 0 && (uintptr_t)data % (4 * sizeof(T)) == 0;
  return kern_operand<T>{data, rows, inner, ld, vectors};
}

/* Four elements along a line, zeros past its end. */
template <typename T>
__device__ __forceinline__ void kern_load_four(const T *line, int64_t at, int64_t end, bool vectors,
                                               float (&to)[4]) {
  if (vectors && at + 4 <= end) {
    kern_load(line + at, to);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = at + i < end ? kern_get(line + at + i) : 0.0f;
  }
}

/* tile[inner][row] of 64 rows from `row` and 16 inner from `inner`; INNER_LINES: a line of memory runs along
 * the inner extent (the operand is not transposed), else along the rows. */
template <bool INNER_LINES, typename T>
__device__ __forceinline__ void kern_load_tile(const kern_operand<T> &from, int64_t row, int64_t inner,
                                               int64_t inner_end, float (*tile)[KERN_GEMM_PITCH]) {
  float four[4] = {};
  if constexpr (INNER_LINES) {
    const int r = threadIdx.x / 4, k = threadIdx.x % 4 * 4;
    if (row + r < from.rows)
      kern_load_four(from.data + (row + r) * from.ld, inner + k, inner_end, from.vectors, four);
#pragma unroll
    for (int i = 0; i < 4; i++) tile[k + i][r] = four[i];
  } else {
    const int k = threadIdx.x / 16, r = threadIdx.x % 16 * 4;
    if (inner + k < inner_end)
      kern_load_four(from.data + (inner + k) * from.ld, row + r, from.rows, from.vectors, four);
    kern_store(&tile[k][r], four);
  }
}

/* Block (x: rows of c, y: columns of c, z: stretch of the inner extent). F also gets z. */
template <kern_form FORM, typename A, typename B, typename F>
__global__ void __launch_bounds__(KERN_BLOCK)
    kern_tile_gemm(kern_operand<A> a, kern_operand<B> b, int64_t stretch, F done) {
  alignas(16) __shared__ float as[KERN_GEMM_INNER][KERN_GEMM_PITCH];
  alignas(16) __shared__ float bs[KERN_GEMM_INNER][KERN_GEMM_PITCH];
  const int64_t row = (int64_t)blockIdx.x * KERN_GEMM_TILE, column = (int64_t)blockIdx.y * KERN_GEMM_TILE;
  const int64_t begin = blockIdx.z * stretch, end = kern_least(begin + stretch, a.inner);
  const int tx = threadIdx.x % 16 * 4, ty = threadIdx.x / 16 * 4;
  float sum[4][4] = {};
  for (int64_t k = begin; k < end; k += KERN_GEMM_INNER) {
    kern_load_tile<FORM != KERN_TN>(a, row, k, end, as);
    kern_load_tile<FORM == KERN_NT>(b, column, k, end, bs);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < KERN_GEMM_INNER; i++) {
      float x[4], y[4];
      kern_load(&as[i][ty], x);
      kern_load(&bs[i][tx], y);
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum[r][c] = fmaf(x[r], y[c], sum[r][c]);
    }
    __syncthreads();
  }
  for (int r = 0; r < 4; r++)
    for (int c = 0; c < 4; c++)
      if (row + ty + r < a.rows && column + tx + c < b.rows)
        done((int64_t)blockIdx.z, row + ty + r, column + tx + c, sum[r][c]);
}

template <kern_form FORM, typename A, typename B, typename F>
core_status kern_tile_gemm_priv(const kern_context *context, const char *op, const kern_operand<A> &a,
                                const kern_operand<B> &b, int64_t stretches, const F &done) {
  const int64_t stretch =
      kern_divide_up(kern_divide_up(a.inner, stretches), KERN_GEMM_INNER) * KERN_GEMM_INNER;
  const kern_grid grid(kern_divide_up(a.rows, KERN_GEMM_TILE), dim3(KERN_BLOCK),
                       kern_divide_up(b.rows, KERN_GEMM_TILE), 0, stretches);
  return kern_launch_priv(context, op, grid, kern_tile_gemm<FORM, A, B, F>, a, b, stretch, done);
}

#endif
