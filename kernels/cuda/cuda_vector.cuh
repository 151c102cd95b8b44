/* Private to kernels/cuda, device side: vector accesses, teams of threads that share a row, and the loops
 * that many ops have in common (flat arrays, rows of columns, rows of segments).
 *
 * A vector is V consecutive elements: 16 bytes of T where data are aligned and the width divides, else one
 * element. Arithmetic is in float32; an Active element is rounded once, to nearest even, when it is stored.
 */
#ifndef KERN_CUDA_VECTOR_CUH
#define KERN_CUDA_VECTOR_CUH

#include "cuda_impl.h"

/* Elements of T in 16 bytes. */
template <typename T>
constexpr int kern_vector = 16 / (int)sizeof(T);

/* --- accesses --- */
template <int V>
__device__ __forceinline__ void kern_load(const float *from, float (&to)[V]) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V / 4; i++) {
      const float4 four = reinterpret_cast<const float4 *>(from)[i];
      to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}

__device__ __forceinline__ void kern_unpack(uint32_t bits, float &low, float &high) {
  low = __uint_as_float(bits << 16);
  high = __uint_as_float(bits & 0xffff0000u);
}
__device__ __forceinline__ uint32_t kern_pack(float low, float high) {
  return (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
}

template <int V>
__device__ __forceinline__ void kern_load(const kern_bfloat *from, float (&to)[V]) {
  if constexpr (V % 8 == 0) {
#pragma unroll
    for (int i = 0; i < V / 8; i++) {
      const uint4 eight = reinterpret_cast<const uint4 *>(from)[i];
      kern_unpack(eight.x, to[8 * i], to[8 * i + 1]);
      kern_unpack(eight.y, to[8 * i + 2], to[8 * i + 3]);
      kern_unpack(eight.z, to[8 * i + 4], to[8 * i + 5]);
      kern_unpack(eight.w, to[8 * i + 6], to[8 * i + 7]);
    }
  } else if constexpr (V == 4) {
    const uint2 four = *reinterpret_cast<const uint2 *>(from);
    kern_unpack(four.x, to[0], to[1]);
    kern_unpack(four.y, to[2], to[3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = __bfloat162float(from[i]);
  }
}

template <int V>
__device__ __forceinline__ void kern_store(float *to, const float (&from)[V]) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V / 4; i++)
      reinterpret_cast<float4 *>(to)[i] =
          make_float4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from[i];
  }
}

template <int V>
__device__ __forceinline__ void kern_store(kern_bfloat *to, const float (&from)[V]) {
  if constexpr (V % 8 == 0) {
#pragma unroll
    for (int i = 0; i < V / 8; i++)
      reinterpret_cast<uint4 *>(to)[i] = make_uint4(
          kern_pack(from[8 * i], from[8 * i + 1]), kern_pack(from[8 * i + 2], from[8 * i + 3]),
          kern_pack(from[8 * i + 4], from[8 * i + 5]), kern_pack(from[8 * i + 6], from[8 * i + 7]));
  } else if constexpr (V == 4) {
    reinterpret_cast<uint2 *>(to)[0] = make_uint2(kern_pack(from[0], from[1]), kern_pack(from[2], from[3]));
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = __float2bfloat16_rn(from[i]);
  }
}

/* Stores value, or value added to what is there. */
template <int V, typename T>
__device__ __forceinline__ void kern_put(T *to, kern_write write, float (&value)[V]) {
  if (write == KERN_ADD) {
    float old[V];
    kern_load(to, old);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] += old[i];
  }
  kern_store(to, value);
}

template <typename T>
__device__ __forceinline__ float kern_get(const T *from) {
  float value[1];
  kern_load(from, value);
  return value[0];
}
template <typename T>
__device__ __forceinline__ void kern_set(T *to, float value) {
  const float one[1] = {value};
  kern_store(to, one);
}

/* --- sums and maxima over lanes; every lane of the group gets the same bits --- */
struct kern_plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
/* NaN loses against any number. */
struct kern_larger {
  __device__ float operator()(float a, float b) const {
    return fmaxf(a, b);
  }
};

/* Over groups of LANES neighbouring lanes of a warp, by exchange, in a fixed order. */
template <int LANES, typename T, typename F>
__device__ __forceinline__ T kern_lanes_reduce(T value, F join) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

/* Over a team: a part of a warp or a warp, or a whole block of THREADS, whose threads must all come here. */
template <int THREADS, typename T, typename F>
__device__ __forceinline__ T kern_team_reduce(T value, F join) {
  if constexpr (THREADS <= 32) {
    return kern_lanes_reduce<THREADS>(value, join);
  } else {
    __shared__ T part[THREADS / 32];
    value = kern_lanes_reduce<32>(value, join);
    __syncthreads(); /* what an earlier call left has been read */
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    value = part[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) value = join(value, part[warp]);
    return value;
  }
}
template <int THREADS, typename T>
__device__ __forceinline__ T kern_team_sum(T value) {
  return kern_team_reduce<THREADS>(value, kern_plus());
}

/* --- a row held in the registers of its team --- */
/* THREADS threads hold N vectors of V each: THREADS * N * V >= the width. A team below a warp pair shares its
 * block with others; a larger one is the block. */
template <int THREADS_, int N_, int V_>
struct kern_team {
  static constexpr int THREADS = THREADS_, N = N_, V = V_;
  static constexpr int BLOCK = THREADS < 128 ? 128 : THREADS;
  static constexpr int TEAMS = BLOCK / THREADS;

  __device__ static int64_t first() {
    return (int64_t)blockIdx.x * TEAMS + threadIdx.x / THREADS;
  }
  __device__ static int64_t stride() {
    return (int64_t)gridDim.x * TEAMS;
  }
  /* Column of the thread's n-th vector. */
  __device__ static int64_t column(int n) {
    return ((int64_t)n * THREADS + threadIdx.x % THREADS) * V;
  }
  template <typename T>
  __device__ static void load(const T *row, int64_t c, float (&to)[N][V]) {
#pragma unroll
    for (int n = 0; n < N; n++)
      if (column(n) < c) kern_load(row + column(n), to[n]);
  }
};

/* Calls run with the kern_team that fits rows of c elements: vectors if they may be used. */
template <typename T, typename F>
core_status kern_with_team(int64_t c, bool vectors, F run) {
  constexpr int V = kern_vector<T>;
  if (vectors && c % V == 0) {
    if (c <= 32 * 4 * V) return run(kern_team<32, 4, V>());
    if (c <= 128 * 4 * V) return run(kern_team<128, 4, V>());
    if (c <= 512 * 16) return run(kern_team<512, 16 / V, V>());
  }
  if (c <= 32 * 16) return run(kern_team<32, 16, 1>());
  return run(kern_team<512, 16, 1>());
}

/* Blocks of teams of W for `rows` rows. */
template <typename W>
kern_grid kern_team_grid(int64_t rows, int64_t most, size_t shared = 0) {
  return kern_grid(kern_least(kern_divide_up(rows, W::TEAMS), most), dim3(W::BLOCK), 1, shared);
}

/* Dynamic shared memory of a block. */
#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char kern_shared_bytes[];
#define KERN_SHARED(type) reinterpret_cast<type *>(kern_shared_bytes)
#else
#define KERN_SHARED(type) reinterpret_cast<type *>(antiphon_emulated_shared())
#endif

/* Bytes of dynamic shared memory that kern_block_partial needs for rows of c columns. */
template <typename W>
constexpr size_t kern_partial_bytes(int64_t c) {
  return W::TEAMS > 1 ? (size_t)(W::TEAMS * c) * sizeof(float) : 0;
}

/* out[c] = sums of the block's teams, in their order. */
template <typename W>
__device__ __forceinline__ void kern_block_partial(float (&own)[W::N][W::V], int64_t c, float *out) {
  const int team = threadIdx.x / W::THREADS;
  float *const teams = KERN_SHARED(float);
  if constexpr (W::TEAMS > 1) {
    __syncthreads(); /* an earlier call has read its sums */
#pragma unroll
    for (int n = 0; n < W::N; n++)
      if (W::column(n) < c) kern_store(teams + team * c + W::column(n), own[n]);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < c; i += W::BLOCK) {
      float sum = teams[i];
      for (int t = 1; t < W::TEAMS; t++) sum += teams[t * c + i];
      out[i] = sum;
    }
  } else {
#pragma unroll
    for (int n = 0; n < W::N; n++)
      if (W::column(n) < c) kern_store(out + W::column(n), own[n]);
  }
}

/* --- flat arrays --- */
/* F has template <int V> run(int64_t at): treats elements at .. at + V. */
template <int V, typename F>
__global__ void __launch_bounds__(KERN_BLOCK) kern_flat_kernel(F f, int64_t count) {
  const int64_t thread = (int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x, whole = count / V;
  const int64_t threads = (int64_t)gridDim.x * KERN_BLOCK;
  for (int64_t i = thread; i < whole; i += threads) f.template run<V>(i * V);
  for (int64_t i = whole * V + thread; i < count; i += threads) f.template run<1>(i);
}

template <int V, typename F>
core_status kern_flat_of(const kern_context *context, const char *op, const F &f, int64_t count) {
  const int64_t blocks = kern_divide_up(kern_divide_up(count, V), KERN_BLOCK);
  return kern_launch_priv(context, op, kern_grid(kern_least(blocks, 1 << 20), dim3(KERN_BLOCK)),
                          kern_flat_kernel<V, F>, f, count);
}
template <int V, typename F>
core_status kern_flat_priv(const kern_context *context, const char *op, const F &f, int64_t count,
                           bool aligned) {
  return aligned ? kern_flat_of<V>(context, op, f, count) : kern_flat_of<1>(context, op, f, count);
}

/* --- rows of columns --- */
/* F has template <int V> run(int64_t row, int64_t at): treats columns at .. at + V of a row. A block is
 * threadIdx.x along columns and threadIdx.y along rows. */
template <int V, typename F>
__global__ void __launch_bounds__(KERN_BLOCK) kern_rows_kernel(F f, int64_t rows, int64_t c) {
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < rows;
       row += (int64_t)gridDim.x * blockDim.y)
    for (int64_t at = (int64_t)threadIdx.x * V; at < c; at += (int64_t)blockDim.x * V)
      f.template run<V>(row, at);
}

/* Threads of a block so that a row of `vectors` is covered by x, the rest goes along y. */
static inline dim3 kern_rows_block(int64_t vectors) {
  int x = 1;
  while (x < vectors && x < KERN_BLOCK) x *= 2;
  return dim3((unsigned)x, (unsigned)(KERN_BLOCK / x));
}

template <int V, typename F>
core_status kern_rows_of(const kern_context *context, const char *op, const F &f, int64_t rows, int64_t c) {
  if (c == 0) return CORE_OK;
  const dim3 block = kern_rows_block(kern_divide_up(c, V));
  const kern_grid grid(kern_least(kern_divide_up(rows, block.y), 1 << 20), block);
  return kern_launch_priv(context, op, grid, kern_rows_kernel<V, F>, f, rows, c);
}
template <int V, typename F>
core_status kern_rows_priv(const kern_context *context, const char *op, const F &f, int64_t rows, int64_t c,
                           bool aligned) {
  return aligned && c % V == 0 ? kern_rows_of<V>(context, op, f, rows, c)
                               : kern_rows_of<1>(context, op, f, rows, c);
}

/* --- rows of segments --- */
/* Begin and end of segment s, kept inside [0, rows] whatever lies in device memory. */
struct kern_span {
  int64_t begin, end;
  __device__ kern_span(const int64_t *offset, int64_t s, int64_t rows, const kern_fault &fault) {
    begin = offset[s], end = offset[s + 1];
    if (begin < 0 || end > rows || begin > end) {
      fault.report(s);
      begin = end = 0;
    }
  }
};

/* F has template <int V> run(int64_t segment, const kern_span &, int64_t row, int64_t at). Blocks (segment,
 * every gridDim.y-th part of its rows). */
template <int V, typename F>
__global__ void __launch_bounds__(KERN_BLOCK)
    kern_segments_kernel(F f, const int64_t *offset, int64_t rows, int64_t c, kern_fault fault) {
  const kern_span span(offset, blockIdx.x, rows, fault);
  for (int64_t row = span.begin + blockIdx.y * blockDim.y + threadIdx.y; row < span.end;
       row += (int64_t)gridDim.y * blockDim.y)
    for (int64_t at = (int64_t)threadIdx.x * V; at < c; at += (int64_t)blockDim.x * V)
      f.template run<V>((int64_t)blockIdx.x, span, row, at);
}

/* parts: blocks a segment, for few long ones. offset: [count + 1], device memory. */
template <int V, typename F>
core_status kern_segments_of(const kern_context *context, const char *op, const F &f, const int64_t *offset,
                             int64_t count, int64_t parts, int64_t rows, int64_t c, kern_fault fault) {
  if (c == 0 || rows == 0) return CORE_OK;
  return kern_launch_priv(context, op, kern_grid(count, kern_rows_block(kern_divide_up(c, V)), parts),
                          kern_segments_kernel<V, F>, f, offset, rows, c, fault);
}
template <int V, typename F>
core_status kern_segments_priv(const kern_context *context, const char *op, const F &f,
                               const kern_segments &segments, int64_t rows, int64_t c, kern_fault fault,
                               bool aligned) {
  const int64_t *const offset = kern_data<const int64_t>(segments.device_offset);
  return aligned && c % V == 0
             ? kern_segments_of<V>(context, op, f, offset, segments.count, 1, rows, c, fault)
             : kern_segments_of<1>(context, op, f, offset, segments.count, 1, rows, c, fault);
}

#endif
