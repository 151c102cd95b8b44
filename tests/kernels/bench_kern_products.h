/* Times of matrix products on a device, as JSON lines: plain ones, and those of experts in every form that
 * there is, each against a loop of plain ones over the groups that have rows. */
#ifndef TESTS_BENCH_KERN_PRODUCTS_H
#define TESTS_BENCH_KERN_PRODUCTS_H

#include "kernels/kernels.h"

typedef struct bench_sizes {
  int64_t rows, width, groups;
  int64_t times; /* calls that are timed together */
} bench_sizes;

/* Plain: [rows, width] by [2 width, width] in each form, and a square of 8 widths, TFLOP/s as a share of the
 * fastest ("of_best"). Grouped: rows by a square matrix for each group, gradients of these added up in
 * float32, with equal groups, mild skew, and extreme skew with empty groups; TFLOP/s also as a share of the
 * loop's
 * ("of_loop"). The context's form is the one that it began with afterwards. */
CORE_NODISCARD core_status bench_products(const kern_ops *ops, kern_context *context, core_dtype active,
                                          bench_sizes sizes);
/* A matrix of standard normals; ends the process where there is no memory. */
core_tensor bench_normals(const kern_ops *ops, core_dtype dtype, int64_t rows, int64_t columns);

#endif
