/* CUDA's short vectors with their sizes and alignments. A misaligned access through one of them is an error
 * on a GPU; here the compiler's aligned moves fault for those of 16 bytes. */
#ifndef CUDA_DOUBLE_CUDA_VECTOR_TYPES_H
#define CUDA_DOUBLE_CUDA_VECTOR_TYPES_H

#define CUDA_DOUBLE_VECTORS(base, type)                                   \
  struct base##1 {                                                        \
    type x;                                                               \
  };                                                                      \
  struct alignas(2 * sizeof(type)) base##2 {                              \
    type x, y;                                                            \
  };                                                                      \
  struct base##3 {                                                        \
    type x, y, z;                                                         \
  };                                                                      \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) base##4 { \
    type x, y, z, w;                                                      \
  };                                                                      \
  static inline base##2 make_##base##2(type x, type y) {                  \
    return {x, y};                                                        \
  }                                                                       \
  static inline base##3 make_##base##3(type x, type y, type z) {          \
    return {x, y, z};                                                     \
  }                                                                       \
  static inline base##4 make_##base##4(type x, type y, type z, type w) {  \
    return {x, y, z, w};                                                  \
  }

CUDA_DOUBLE_VECTORS(char, signed char)
CUDA_DOUBLE_VECTORS(uchar, unsigned char)
CUDA_DOUBLE_VECTORS(short, short)
CUDA_DOUBLE_VECTORS(ushort, unsigned short)
CUDA_DOUBLE_VECTORS(int, int)
CUDA_DOUBLE_VECTORS(uint, unsigned)
CUDA_DOUBLE_VECTORS(longlong, long long)
CUDA_DOUBLE_VECTORS(ulonglong, unsigned long long)
CUDA_DOUBLE_VECTORS(float, float)
CUDA_DOUBLE_VECTORS(double, double)
#undef CUDA_DOUBLE_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#endif
