/* Private to kernels/cuda, for tests and benchmarks too: how a grouped product is run. */
#ifndef KERN_CUDA_GROUPING_IMPL_H
#define KERN_CUDA_GROUPING_IMPL_H

#include "kernels/kernels.h" /* kern_context */

/* All forms give the same sums, up to the last bits. */
typedef enum kern_grouping {
  KERN_GROUPING_STREAMS, /* a product per non-empty group, dealt to side streams */
  KERN_GROUPING_GROUPED, /* cublasGemmGroupedBatchedEx where it serves (one type, aligned), else streams */
  KERN_GROUPING_STRIDED, /* cublasGemmStridedBatchedEx where groups are equal, else streams */
  KERN_GROUPING_COUNT
} kern_grouping;

/* The form that a context of the CUDA table uses from now on; it begins with streams. */
void kern_cuda_set_grouping_priv(kern_context *context, kern_grouping grouping);

#endif
