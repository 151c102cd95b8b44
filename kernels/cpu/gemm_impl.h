/* Private to the matrix products of kernels/cpu: gemm.c (ops and groups), gemm_product.c (one product, of
 * core_real or bfloat16) and whatever needs a product of its own. */
#ifndef KERN_GEMM_IMPL_H
#define KERN_GEMM_IMPL_H

#include "cpu_impl.h" /* kern_context, kern_extent */

/* c[m,n] = op(a) op(b) + (write == KERN_ADD ? c : 0), each operand core_real or bfloat16. */
typedef struct kern_product {
  kern_form form;
  kern_write write;
  kern_extent extent;
  const void *a, *b;
  void *c;
  core_dtype a_type, b_type, c_type;
} kern_product;

/* With all threads of the context; and on the calling thread alone, with the scratch of thread number
 * `thread`, for callers that are inside a parallel region. Errors: ERR_MEMORY, ERR_INTERNAL. */
CORE_NODISCARD core_status kern_product_run_priv(const kern_context *context, const kern_product *product);
CORE_NODISCARD core_status kern_product_run_alone_priv(const kern_context *context, int32_t thread,
                                                       const kern_product *product);

/* Whether products of bfloat16 run on the processor's own units. */
bool kern_bfloat_units_priv(void);

/* Rows of scratch are this much longer than they need be: rows a power of two apart share cache sets. */
enum { KERN_TILE_PAD = 16 };

/* Widest part of a product whose operands pass through scratch. 1024 x 1024 x 512: in what remains after the
 * widening, sgemm is as fast as on the whole (README). */
static inline kern_extent kern_product_tile(const kern_limits *limits) {
  const int64_t longest = limits->rows > limits->width ? limits->rows : limits->width;
  const int64_t most = longest < 1024 ? kern_round_lanes(longest) + KERN_LANES : 1024;
  return (kern_extent){most, most, most < 512 ? most : 512};
}
/* Elements of scratch: a, b, c. */
static inline int64_t kern_product_a(kern_extent tile) {
  return (tile.m + KERN_TILE_PAD) * (tile.k + KERN_TILE_PAD);
}
static inline int64_t kern_product_b(kern_extent tile) {
  return (tile.k + KERN_TILE_PAD) * (tile.n + KERN_TILE_PAD);
}
static inline int64_t kern_product_scratch(kern_extent tile) {
  const int64_t c = tile.m * (tile.n + KERN_TILE_PAD);
  return CORE_REAL_DTYPE == CORE_FLOAT32 ? kern_product_a(tile) + kern_product_b(tile) + c : 0;
}

#endif
