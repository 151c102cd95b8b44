/* Private to kernels/cuda, device side: elementary functions that do not cancel, and the online logsumexp. */
#ifndef KERN_CUDA_MATH_CUH
#define KERN_CUDA_MATH_CUH

#include "cuda_vector.cuh"

__device__ __forceinline__ float kern_sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
/* Standard normal distribution function, by erfc: 1 + erf would cancel in the lower tail. */
__device__ __forceinline__ float kern_normal_below(float x) {
  return 0.5f * erfcf(x * -0.70710678118654752440f);
}
/* Standard normal density. */
__device__ __forceinline__ float kern_normal_density(float x) {
  return 0.39894228040143267794f * expf(-0.5f * x * x);
}

/* sum of exp(x_i) as exp(most) * sum; starts empty. NaN shows in the sum. */
struct kern_logsum {
  float most = -INFINITY, sum = 0;

  /* Terms of -infinity count nothing; the sum is rescaled when a larger one appears. */
  template <int V>
  __device__ void add(const float (&x)[V]) {
    float top = most;
#pragma unroll
    for (int i = 0; i < V; i++) top = fmaxf(top, x[i]);
    const float base = top > -INFINITY ? top : 0.0f;
    if (top > most) sum *= expf(most - base);
    most = top;
#pragma unroll
    for (int i = 0; i < V; i++) sum += expf(x[i] - base);
  }
  __device__ float value() const {
    return most + logf(sum);
  }
};

/* The team's logsums joined: every thread gets the whole, in a fixed order. */
template <int THREADS>
__device__ __forceinline__ kern_logsum kern_team_logsum(kern_logsum own) {
  kern_logsum all;
  all.most = kern_team_reduce<THREADS>(own.most, kern_larger());
  const float base = all.most > -INFINITY ? all.most : 0.0f;
  all.sum = kern_team_sum<THREADS>(own.sum * expf(own.most - base));
  return all;
}

#endif
