/* Latents as stored (float32, float16, bfloat16 or core_real) to standardised core_real. */
#include "vecmath_impl.h" /* kern_half_to_float */

#define STANDARDIZE_ROWS(suffix, type, convert)                                                        \
  KERN_CLONES static void standardize_##suffix(const void *data, const core_real *restrict shift,      \
                                               const core_real *restrict scale, core_real *restrict y, \
                                               int64_t begin, int64_t end, int64_t d) {                \
    const type *restrict x = data;                                                                     \
    for (int64_t t = begin; t < end; t++) {                                                            \
      _Pragma("omp simd") for (int64_t i = 0; i < d; i++) y[t * d + i] =                               \
          ((core_real)convert(x[t * d + i]) - shift[i]) * scale[i];                                    \
    }                                                                                                  \
  }
STANDARDIZE_ROWS(real, core_real, )
STANDARDIZE_ROWS(half, uint16_t, kern_half_to_float)
STANDARDIZE_ROWS(bfloat, uint16_t, core_float_from_bfloat)
#ifdef ANTIPHON_DOUBLE
STANDARDIZE_ROWS(float, float, )
#endif
#undef STANDARDIZE_ROWS

typedef void (*standardize_rows)(const void *data, const core_real *restrict shift,
                                 const core_real *restrict scale, core_real *restrict y, int64_t begin,
                                 int64_t end, int64_t d);

static standardize_rows standardize_of(core_dtype dtype) {
  if (dtype == CORE_REAL_DTYPE) return standardize_real;
  if (dtype == CORE_FLOAT16) return standardize_half;
  if (dtype == CORE_BFLOAT16) return standardize_bfloat;
#ifdef ANTIPHON_DOUBLE
  if (dtype == CORE_FLOAT32) return standardize_float;
#endif
  return NULL;
}

core_status kern_standardize_cpu(kern_context *context, core_tensor x, core_tensor shift, core_tensor scale,
                                 core_tensor y) {
  const standardize_rows run = standardize_of(x.dtype);
  CHECK(run != NULL, CORE_ERR_UNSUPPORTED, "%s: x is %s, expected float32, float16 or bfloat16", __func__,
        core_dtype_text(x.dtype));
  KERN_CHECK_REAL(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], d = y.shape[1];
  KERN_CHECK(x, x.dtype, rows, d);
  KERN_CHECK_REAL(shift, d);
  KERN_CHECK_REAL(scale, d);
  const kern_split split = kern_split_rows(rows, d);
  KERN_FOR_BLOCKS(context, split, block) {
    run(x.data, shift.data, scale.data, y.data, kern_split_at(split, block), kern_split_at(split, block + 1),
        d);
  }
  return CORE_OK;
}
