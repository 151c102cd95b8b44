/* Latents as stored (float32, float16, bfloat16 or core_real) to standardised activations. */
#include "vecmath_impl.h" /* kern_half_to_float */

typedef struct standardize_job {
  core_dtype stored, dtype; /* of x, of y */
  int64_t d;
  const void *x;
  const core_real *shift, *scale;
  void *y;
} standardize_job;

/* Element i of x, whose type is a constant after inlining. */
KERN_INLINE core_real stored_at(const void *x, core_dtype stored, int64_t i) {
  if (stored == CORE_FLOAT16) return (core_real)kern_half_to_float(((const uint16_t *)x)[i]);
  if (stored == CORE_FLOAT32) return (core_real)((const float *)x)[i];
  return kern_at(x, stored, i);
}

KERN_INLINE void standardize_stored(const standardize_job *job, core_dtype stored, core_dtype dtype,
                                    int64_t begin, int64_t end) {
  const core_real *restrict shift = job->shift, *restrict scale = job->scale;
  const void *restrict x = job->x;
  const int64_t d = job->d;
  for (int64_t t = begin; t < end; t++) {
    void *restrict y = kern_element(job->y, dtype, t * d);
#pragma omp simd
    for (int64_t i = 0; i < d; i++)
      kern_to(y, dtype, i, KERN_SET, (stored_at(x, stored, t * d + i) - shift[i]) * scale[i]);
  }
}

KERN_INLINE void standardize_rows(const standardize_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  if (job->stored == CORE_FLOAT16)
    standardize_stored(job, CORE_FLOAT16, dtype, begin, end);
  else if (job->stored == CORE_BFLOAT16)
    standardize_stored(job, CORE_BFLOAT16, dtype, begin, end);
  else if (job->stored == CORE_FLOAT32)
    standardize_stored(job, CORE_FLOAT32, dtype, begin, end);
  else
    standardize_stored(job, CORE_REAL_DTYPE, dtype, begin, end);
}
KERN_ACTIVE_RUN(standardize_rows, standardize_job)

core_status kern_standardize_cpu(kern_context *context, core_tensor x, core_tensor shift, core_tensor scale,
                                 core_tensor y) {
  CHECK(x.dtype == CORE_FLOAT32 || x.dtype == CORE_FLOAT16 || x.dtype == CORE_BFLOAT16 ||
            x.dtype == CORE_REAL_DTYPE,
        CORE_ERR_UNSUPPORTED, "%s: x is %s, expected float32, float16 or bfloat16", __func__,
        core_dtype_text(x.dtype));
  KERN_CHECK_ACTIVE(y, KERN_ANY, KERN_ANY);
  const int64_t rows = y.shape[0], d = y.shape[1];
  KERN_CHECK(x, x.dtype, rows, d);
  KERN_CHECK_REAL(shift, d);
  KERN_CHECK_REAL(scale, d);
  const standardize_job job = {.stored = x.dtype,
                               .dtype = y.dtype,
                               .d = d,
                               .x = x.data,
                               .shift = shift.data,
                               .scale = scale.data,
                               .y = y.data};
  const kern_split split = kern_split_rows(rows, d);
  KERN_FOR_BLOCKS(context, split, block) {
    standardize_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
