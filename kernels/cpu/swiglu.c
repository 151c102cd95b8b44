/* SwiGLU: y = silu(gate) * up on rows [gate | up]. */
#include "vecmath_impl.h" /* kern_sigmoid */

/* The next row, asked for while this one is worked on: rows come cold from the last product, and the hardware
 * loses its stream at every end of a half row. (Halves the forward pass; the backward one is bound by
 * writing.) */
KERN_INLINE void swiglu_prefetch(const core_real *row, int64_t n) {
  for (int64_t i = 0; i < n; i += KERN_LANES) __builtin_prefetch(row + i);
}

KERN_CLONES static void swiglu_rows(const core_real *restrict x, core_real *restrict y, int64_t rows,
                                    int64_t f) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict gate = x + t * 2 * f, *restrict up = gate + f;
    if (t + 1 < rows) swiglu_prefetch(gate + 2 * f, 2 * f);
#pragma omp simd
    for (int64_t i = 0; i < f; i++) y[t * f + i] = gate[i] * kern_sigmoid(gate[i]) * up[i];
  }
}

/* d silu(g) / dg = s + g s (1 - s), s = sigmoid(g). */
KERN_CLONES static void swiglu_rows_back(const core_real *restrict dy, const core_real *restrict x,
                                         core_real *restrict dx, int64_t rows, int64_t f, kern_write write) {
  for (int64_t t = 0; t < rows; t++) {
    const core_real *restrict gate = x + t * 2 * f, *restrict up = gate + f, *restrict d = dy + t * f;
    core_real *restrict dgate = dx + t * 2 * f, *restrict dup = dgate + f;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      const core_real s = kern_sigmoid(gate[i]);
      const core_real silu = gate[i] * s;
      kern_put(&dgate[i], write, d[i] * up[i] * (s + silu * (1 - s)));
      kern_put(&dup[i], write, d[i] * silu);
    }
  }
}

core_status kern_swiglu_fwd_cpu(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_REAL(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], f = y.shape[1];
  KERN_CHECK_REAL(x, rows, 2 * f);
  const kern_split split = kern_split_rows(rows, 2 * f);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    swiglu_rows((const core_real *)x.data + begin * 2 * f, (core_real *)y.data + begin * f,
                kern_split_at(split, block + 1) - begin, f);
  }
  return CORE_OK;
}

core_status kern_swiglu_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, kern_write write,
                                core_tensor dx) {
  KERN_CHECK_REAL(dy, KERN_ANY, KERN_ANY);
  const int64_t rows = dy.shape[0], f = dy.shape[1];
  KERN_CHECK_REAL(x, rows, 2 * f);
  KERN_CHECK_REAL(dx, rows, 2 * f);
  const kern_split split = kern_split_rows(rows, 2 * f);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_split_at(split, block);
    swiglu_rows_back((const core_real *)dy.data + begin * f, (const core_real *)x.data + begin * 2 * f,
                     (core_real *)dx.data + begin * 2 * f, kern_split_at(split, block + 1) - begin, f, write);
  }
  return CORE_OK;
}
