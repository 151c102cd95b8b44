/* Private to attention_{fwd,bwd}.cu: tiles of packed segments and their products.
 *
 * A tile is 32 consecutive rows of the packed tensor, whatever segments they belong to, so that short
 * segments share one; each row knows its segment, and what a row may not see gets probability 0. A block of
 * 128 threads works on a tile of own rows (queries, or keys when their gradient is sought) against tiles of
 * other rows that pass by. Thread (ty, tx) owns rows 2 ty and 2 ty + 1; products are
 *
 *   scores   s[2][4]    = own rows . other rows tx + 8 j          (inner extent: the head's width)
 *   mix      acc[2][..] += weights[own row][other row] other row  (columns 4 tx + 32 j .. + 3)
 *
 * and the weights pass from one to the other through shared memory, among lanes of one warp. These two and
 * the loading of tiles are all that touches the layout: units for tiny matrix products can take their place.
 * Tiles are float32, columns past the head's width and rows past the end are 0. */
#ifndef KERN_ATTENTION_TILE_CUH
#define KERN_ATTENTION_TILE_CUH

#include "cuda_vector.cuh"

enum {
  KERN_TILE_ROWS = 32,
  KERN_TILE_BLOCK = 128,
  KERN_TILE_LANES = 8,
  KERN_TILE_PITCH = KERN_TILE_ROWS + 4
};

/* What all kernels of a call share. */
struct kern_attention_job {
  const int2 *range; /* [rows] begin and end, among the rows that pass by, of each own row's segment */
  int64_t rows;      /* own ones */
  int64_t query_row, source_row; /* elements from one row to the next: of queries, of keys and values */
  int64_t key_first;             /* column of the first key head in a row of the source */
  int32_t heads, kv_heads, width;
  bool causal, vectors;
  float scale;

  __device__ int64_t out_row() const {
    return (int64_t)heads * width;
  }
  /* Columns of a query head in a row of queries, of a key or value head in a row of the source. */
  __device__ int64_t query_column(int head) const {
    return (int64_t)head * width;
  }
  __device__ int64_t key_column(int kv_head) const {
    return key_first + (int64_t)kv_head * width;
  }
  __device__ int64_t value_column(int kv_head) const {
    return key_first + (int64_t)(kv_heads + kv_head) * width;
  }
  /* Segment of an own row; empty past the end. */
  __device__ int2 segment(int64_t row) const {
    return row < rows ? range[row] : make_int2(0, 0);
  }
};

template <int D>
constexpr int kern_tile_pitch = D + 4;
/* Floats of shared memory for so many tiles and the weights. */
template <int D>
constexpr size_t kern_tile_floats(int tiles) {
  return (size_t)tiles * KERN_TILE_ROWS * kern_tile_pitch<D> + KERN_TILE_ROWS * KERN_TILE_PITCH;
}

__device__ __forceinline__ int kern_tile_x() {
  return threadIdx.x % KERN_TILE_LANES;
}
/* First of the two rows that the thread owns. */
__device__ __forceinline__ int kern_tile_own() {
  return threadIdx.x / KERN_TILE_LANES * 2;
}

/* tile[r] = the head's columns of row first + r, for first + r < end. data points at the head in row 0. */
template <int D, int V, typename T>
__device__ __forceinline__ void kern_tile_load_by(const T *data, int64_t row_step, int64_t first, int64_t end,
                                                  int width, float *tile) {
  for (int i = threadIdx.x; i < KERN_TILE_ROWS * (D / V); i += KERN_TILE_BLOCK) {
    const int r = i / (D / V), at = i % (D / V) * V;
    float value[V] = {};
    if (first + r < end && at < width) kern_load(data + (first + r) * row_step + at, value);
    kern_store(tile + r * kern_tile_pitch<D> + at, value);
  }
}
template <int D, typename T>
__device__ __forceinline__ void kern_tile_load(const kern_attention_job &job, const T *data, int64_t row_step,
                                               int64_t first, int64_t end, float *tile) {
  if (job.vectors)
    kern_tile_load_by<D, kern_vector<T>>(data, row_step, first, end, job.width, tile);
  else
    kern_tile_load_by<D, 1>(data, row_step, first, end, job.width, tile);
}

template <int D>
__device__ __forceinline__ void kern_tile_scores(const float *own, const float *other, float (&s)[2][4]) {
  constexpr int P = kern_tile_pitch<D>;
  const float *const x = own + kern_tile_own() * P, *const y = other + kern_tile_x() * P;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[r][j] = 0;
#pragma unroll 4
  for (int a = 0; a < D; a += 4) {
    float left[2][4], right[4][4];
#pragma unroll
    for (int r = 0; r < 2; r++) kern_load(x + r * P + a, left[r]);
#pragma unroll
    for (int j = 0; j < 4; j++) kern_load(y + j * KERN_TILE_LANES * P + a, right[j]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[r][j] = fmaf(left[r][i], right[j][i], s[r][j]);
  }
}

/* Weights of the own rows for kern_tile_mix. Lanes of one warp share them, so a barrier of the warp is
 * enough: one before, when they may still be read, and one after. */
__device__ __forceinline__ void kern_tile_weights(const float (&s)[2][4], float *weights) {
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      weights[(kern_tile_own() + r) * KERN_TILE_PITCH + kern_tile_x() + j * KERN_TILE_LANES] = s[r][j];
  __syncwarp();
}

template <int D>
__device__ __forceinline__ void kern_tile_mix(const float *weights, const float *other,
                                              float (&acc)[2][D / 8]) {
  const float *const w = weights + kern_tile_own() * KERN_TILE_PITCH, *const y = other + kern_tile_x() * 4;
#pragma unroll 2
  for (int key = 0; key < KERN_TILE_ROWS; key += 4) {
    float by[2][4];
#pragma unroll
    for (int r = 0; r < 2; r++) kern_load(w + r * KERN_TILE_PITCH + key, by[r]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < D / 32; j++) {
        float value[4];
        kern_load(y + (key + i) * kern_tile_pitch<D> + 32 * j, value);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int c = 0; c < 4; c++) acc[r][4 * j + c] = fmaf(by[r][i], value[c], acc[r][4 * j + c]);
      }
  }
}

/* to[row][columns of the head] = acc * by, for the thread's own rows that exist; to points at the head in the
 * tile's first row. */
template <int D, typename T>
__device__ __forceinline__ void kern_tile_store(const kern_attention_job &job, int64_t first,
                                                int64_t row_step, const float (&acc)[2][D / 8],
                                                const float (&by)[2], T *to) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (first + kern_tile_own() + r >= job.rows) continue;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
      const int at = kern_tile_x() * 4 + 32 * j;
      float value[4];
#pragma unroll
      for (int c = 0; c < 4; c++) value[c] = acc[r][4 * j + c] * by[r];
      T *const line = to + (kern_tile_own() + r) * row_step + at;
      if (job.vectors) {
        if (at < job.width) kern_store(line, value);
      } else {
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (at + c < job.width) kern_set(line + c, value[c]);
      }
    }
  }
}

/* --- host side (attention_fwd.cu) --- */
/* Shapes, limits and segments of a call. */
CORE_NODISCARD core_status kern_attention_checked_priv(const char *op, const kern_context *context,
                                                       const kern_attention *attention, core_tensor qkv,
                                                       core_tensor out, core_tensor lse);
CORE_NODISCARD core_status kern_cross_checked_priv(const char *op, const kern_context *context,
                                                   const kern_cross *cross);
/* Fills context->range and says what kernels need to know. */
CORE_NODISCARD core_status kern_attention_job_priv(const kern_context *context,
                                                   const kern_attention *attention, core_tensor qkv,
                                                   kern_fault fault, kern_attention_job *job);
/* The same for queries against the keys of another tensor; and then for its keys against the queries. */
CORE_NODISCARD core_status kern_cross_job_priv(const kern_context *context, const kern_cross *cross,
                                               kern_fault fault, kern_attention_job *job);
CORE_NODISCARD core_status kern_cross_turn_priv(const kern_context *context, const kern_cross *cross,
                                                kern_fault fault, kern_attention_job *job);

/* Calls run with the padded width of a head. */
template <typename F>
core_status kern_with_head(int width, F run) {
  if (width <= 32) return run(kern_int<32>());
  if (width <= 64) return run(kern_int<64>());
  if (width <= 128) return run(kern_int<128>());
  return run(kern_int<256>());
}

#endif
