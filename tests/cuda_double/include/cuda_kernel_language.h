/* The kernel language on the host: qualifiers, the indices of a thread, barriers, warp operations, integer
 * atomics, intrinsics, launches.
 *
 * Threads of a block are fibres of one host thread, so plain loads and stores are atomic with respect to one
 * another, and `__shared__` variables are one per host thread. Barriers and warp operations know the source
 * line that they stand on: threads that meet must come from the same one. */
#ifndef CUDA_DOUBLE_CUDA_KERNEL_LANGUAGE_H
#define CUDA_DOUBLE_CUDA_KERNEL_LANGUAGE_H

#include <math.h>
#include <string.h>

#include <algorithm> /* before min and max below */
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
/* Found again among the thread-local symbols of the program, to be filled with NaN before each block. */
#define __shared__ static thread_local

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

/* ---- meeting points of threads ---- */

struct cuda_double_site {
  const char *file;
  int line;
};
enum cuda_double_meeting { CUDA_DOUBLE_SHUFFLE, CUDA_DOUBLE_VOTE, CUDA_DOUBLE_WARP_BARRIER };

/* Waits for all threads of the block; returns how many gave a predicate other than 0. */
int cuda_double_barrier(int predicate, cuda_double_site site);
/* Waits for the lanes of `mask`. Shuffle: the value that lane `source` gave. Vote: a bit per lane whose value
 * is not 0. */
uint64_t cuda_double_meet(cuda_double_meeting kind, unsigned mask, uint64_t value, int source,
                          cuda_double_site site);
int cuda_double_lane(void);
void cuda_double_trap(cuda_double_site site);
/* Dynamic shared memory of the running block, 16-byte aligned; what `extern __shared__` gives in CUDA. */
unsigned char *antiphon_emulated_shared(void);

#define CUDA_DOUBLE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(CUDA_DOUBLE_HERE) {
  cuda_double_barrier(0, {file, line});
}
static inline int __syncthreads_count(int predicate, CUDA_DOUBLE_HERE) {
  return cuda_double_barrier(predicate, {file, line});
}
static inline int __syncthreads_or(int predicate, CUDA_DOUBLE_HERE) {
  return cuda_double_barrier(predicate, {file, line}) != 0;
}
static inline int __syncthreads_and(int predicate, CUDA_DOUBLE_HERE) {
  return cuda_double_barrier(!predicate, {file, line}) == 0;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_DOUBLE_HERE) {
  cuda_double_meet(CUDA_DOUBLE_WARP_BARRIER, mask, 0, 0, {file, line});
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_DOUBLE_HERE) {
  return (unsigned)cuda_double_meet(CUDA_DOUBLE_VOTE, mask, predicate != 0, 0, {file, line});
}
static inline int __any_sync(unsigned mask, int predicate, CUDA_DOUBLE_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, CUDA_DOUBLE_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

/* Moves up to 8 bytes between lanes. */
template <class T>
T cuda_double_shuffle(unsigned mask, T value, int source, const char *file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = cuda_double_meet(CUDA_DOUBLE_SHUFFLE, mask, bits, source, {file, line});
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_DOUBLE_HERE) {
  int base = cuda_double_lane() & ~(width - 1);
  return cuda_double_shuffle(mask, value, base + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_DOUBLE_HERE) {
  int lane = cuda_double_lane(), source = lane - (int)delta;
  return cuda_double_shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_DOUBLE_HERE) {
  int lane = cuda_double_lane(), source = lane + (int)delta;
  return cuda_double_shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, file,
                             line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_DOUBLE_HERE) {
  int lane = cuda_double_lane(), source = lane ^ bits;
  return cuda_double_shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, file,
                             line);
}
/* Lanes of `mask` that hold the same bits as this one. */
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_DOUBLE_HERE) {
  unsigned same = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    T other = cuda_double_shuffle(mask, value, lane, file, line);
    if (memcmp(&other, &value, sizeof value) == 0) same |= 1u << lane;
  }
  return same;
}
/* Sums, minima, maxima over the lanes of `mask`, as sm_80 and later have for 32-bit integers. */
template <class T, class F>
T cuda_double_reduce(unsigned mask, T value, F combine, const char *file, int line) {
  T result = value;
  for (int lane = 0, own = cuda_double_lane(); lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    T other = cuda_double_shuffle(mask, value, lane, file, line);
    if (lane != own) result = combine(result, other);
  }
  return result;
}
#define CUDA_DOUBLE_REDUCE(name, type, expression)                                         \
  static inline type __reduce_##name##_sync(unsigned mask, type value, CUDA_DOUBLE_HERE) { \
    return cuda_double_reduce(                                                             \
        mask, value, [](type a, type b) { return (type)(expression); }, file, line);       \
  }
CUDA_DOUBLE_REDUCE(add, int, a + b)
CUDA_DOUBLE_REDUCE(add, unsigned, a + b)
CUDA_DOUBLE_REDUCE(min, int, a < b ? a : b)
CUDA_DOUBLE_REDUCE(min, unsigned, a < b ? a : b)
CUDA_DOUBLE_REDUCE(max, int, a > b ? a : b)
CUDA_DOUBLE_REDUCE(max, unsigned, a > b ? a : b)
CUDA_DOUBLE_REDUCE(or, unsigned, a | b)
CUDA_DOUBLE_REDUCE(and, unsigned, a &b)
#undef CUDA_DOUBLE_REDUCE

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __trap(CUDA_DOUBLE_HERE) {
  cuda_double_trap({file, line});
}

/* ---- atomics: integers only, so that nothing depends on the order of threads ---- */

#define CUDA_DOUBLE_ATOMIC(name, expression)                                                       \
  template <class T>                                                                               \
  T name(T *address, std::common_type_t<T> value) {                                                \
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, #name " is offered for integers"); \
    T old = *address;                                                                              \
    *address = (T)(expression);                                                                    \
    return old;                                                                                    \
  }
CUDA_DOUBLE_ATOMIC(atomicAdd, old + value)
CUDA_DOUBLE_ATOMIC(atomicSub, old - value)
CUDA_DOUBLE_ATOMIC(atomicMin, value < old ? value : old)
CUDA_DOUBLE_ATOMIC(atomicMax, value > old ? value : old)
CUDA_DOUBLE_ATOMIC(atomicAnd, old &value)
CUDA_DOUBLE_ATOMIC(atomicOr, old | value)
CUDA_DOUBLE_ATOMIC(atomicXor, old ^ value)
CUDA_DOUBLE_ATOMIC(atomicExch, value)
#undef CUDA_DOUBLE_ATOMIC
template <class T>
T atomicCAS(T *address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  static_assert(std::is_integral<T>::value, "atomicCAS is offered for integers");
  T old = *address;
  if (old == compare) *address = value;
  return old;
}

/* ---- loads and stores with a cache hint: plain ones ---- */

#define CUDA_DOUBLE_LOAD(name) \
  template <class T>           \
  T name(const T *address) {   \
    return *address;           \
  }
#define CUDA_DOUBLE_STORE(name)    \
  template <class T>               \
  void name(T *address, T value) { \
    *address = value;              \
  }
CUDA_DOUBLE_LOAD(__ldg)
CUDA_DOUBLE_LOAD(__ldcs)
CUDA_DOUBLE_LOAD(__ldcg)
CUDA_DOUBLE_LOAD(__ldca)
CUDA_DOUBLE_LOAD(__ldlu)
CUDA_DOUBLE_STORE(__stcs)
CUDA_DOUBLE_STORE(__stcg)
CUDA_DOUBLE_STORE(__stwb)
CUDA_DOUBLE_STORE(__stwt)
#undef CUDA_DOUBLE_LOAD
#undef CUDA_DOUBLE_STORE

/* ---- arithmetic ---- */

/* Macros, as the C library declares functions of these names. */
#define __expf(a) expf(a)
#define __logf(a) logf(a)
#define __log2f(a) log2f(a)
#define __sinf(a) sinf(a)
#define __cosf(a) cosf(a)

#define CUDA_DOUBLE_UNARY(name, type, expression) \
  static inline type name(type a) {               \
    return expression;                            \
  }
#define CUDA_DOUBLE_BINARY(name, type, expression) \
  static inline type name(type a, type b) {        \
    return expression;                             \
  }
CUDA_DOUBLE_UNARY(__frcp_rn, float, 1 / a)
CUDA_DOUBLE_UNARY(__fsqrt_rn, float, sqrtf(a))
CUDA_DOUBLE_UNARY(__frsqrt_rn, float, 1 / sqrtf(a))
CUDA_DOUBLE_UNARY(rsqrtf, float, 1 / sqrtf(a))
CUDA_DOUBLE_UNARY(rsqrt, double, 1 / ::sqrt(a))
CUDA_DOUBLE_UNARY(normcdff, float, 0.5f * erfcf(-a * 0.70710678f))
CUDA_DOUBLE_UNARY(normcdf, double, 0.5 * erfc(-a * 0.70710678118654752440))
CUDA_DOUBLE_UNARY(__saturatef, float, a >= 1 ? 1.0f : a > 0 ? a : 0.0f)
CUDA_DOUBLE_BINARY(__fdividef, float, a / b)
CUDA_DOUBLE_BINARY(__fadd_rn, float, a + b)
CUDA_DOUBLE_BINARY(__fsub_rn, float, a - b)
CUDA_DOUBLE_BINARY(__fmul_rn, float, a *b)
CUDA_DOUBLE_BINARY(__fdiv_rn, float, a / b)
CUDA_DOUBLE_BINARY(__dadd_rn, double, a + b)
CUDA_DOUBLE_BINARY(__dsub_rn, double, a - b)
CUDA_DOUBLE_BINARY(__dmul_rn, double, a *b)
CUDA_DOUBLE_BINARY(__ddiv_rn, double, a / b)
CUDA_DOUBLE_BINARY(__umulhi, unsigned, (unsigned)(((uint64_t)a * b) >> 32))
CUDA_DOUBLE_BINARY(__mulhi, int, (int)(((int64_t)a * b) >> 32))
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
static inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}
#undef CUDA_DOUBLE_UNARY
#undef CUDA_DOUBLE_BINARY

static inline int __popc(unsigned a) {
  return __builtin_popcount(a);
}
static inline int __popcll(unsigned long long a) {
  return __builtin_popcountll(a);
}
static inline int __ffs(int a) {
  return __builtin_ffs(a);
}
static inline int __ffsll(long long a) {
  return __builtin_ffsll(a);
}
static inline int __clz(int a) {
  return a == 0 ? 32 : __builtin_clz((unsigned)a);
}
static inline int __clzll(long long a) {
  return a == 0 ? 64 : __builtin_clzll((unsigned long long)a);
}

template <class To, class From>
To cuda_double_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
static inline int __float_as_int(float a) {
  return cuda_double_bits<int>(a);
}
static inline unsigned __float_as_uint(float a) {
  return cuda_double_bits<unsigned>(a);
}
static inline float __int_as_float(int a) {
  return cuda_double_bits<float>(a);
}
static inline float __uint_as_float(unsigned a) {
  return cuda_double_bits<float>(a);
}
static inline long long __double_as_longlong(double a) {
  return cuda_double_bits<long long>(a);
}
static inline double __longlong_as_double(long long a) {
  return cuda_double_bits<double>(a);
}
static inline int __float2int_rn(float a) {
  return (int)nearbyintf(a);
}
static inline float __int2float_rn(int a) {
  return (float)a;
}
static inline float __uint2float_rn(unsigned a) {
  return (float)a;
}

/* min and max of mixed arithmetic types, as CUDA overloads them; fmin's rule for NaN. */
template <class A, class B>
std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> min(
    A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value)
    return fmin((T)a, (T)b);
  else
    return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B>
std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> max(
    A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value)
    return fmax((T)a, (T)b);
  else
    return (T)a < (T)b ? (T)b : (T)a;
}

/* ---- launches ---- */

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};

/* Checks the configuration and queues `body`, to be called once per thread. kernel: address, identity. */
cudaError_t cuda_double_launch(const void *kernel, const cudaLaunchConfig_t &config,
                               std::function<void()> body);
cudaError_t cuda_double_attribute(const void *kernel, cudaFuncAttribute attribute, int value);
/* Whether a kernel may get this address: memory of a device, page-locked memory or NULL. Reported. */
bool cuda_double_check_argument(const void *kernel, int index, const void *pointer);

template <class T>
bool cuda_double_check(const void *kernel, int index, const T &value) {
  if constexpr (std::is_pointer<T>::value && !std::is_function<std::remove_pointer_t<T>>::value)
    return cuda_double_check_argument(kernel, index, (const void *)value);
  (void)kernel, (void)index, (void)value;
  return true;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A &&...arguments) {
  std::tuple<std::decay_t<P>...> values(std::forward<A>(arguments)...);
  int index = 0;
  bool good = true;
  std::apply(
      [&](const auto &...value) {
        ((good = cuda_double_check((const void *)kernel, index++, value) && good), ...);
      },
      values);
  if (!good) return cudaErrorInvalidValue;
  return cuda_double_launch((const void *)kernel, *config,
                            [kernel, values = std::move(values)] { std::apply(kernel, values); });
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cuda_double_attribute((const void *)kernel, attribute, value);
}

#endif
