/* Squared and smooth absolute differences of rows, and their gradients. */
#include <math.h>

#include "active_impl.h" /* kern_to */

typedef struct regression_job {
  core_dtype dtype; /* of the gradient */
  kern_regression kind;
  core_real weight;
  int64_t d;
  const core_real *prediction, *target;
  const uint8_t *valid;
  core_real *loss;
  void *gradient; /* NULL: none */
} regression_job;

/* Value and derivative of one coordinate. */
KERN_INLINE core_real coordinate(kern_regression kind, core_real d, core_real *derivative) {
  if (kind == KERN_SQUARED) {
    *derivative = 2 * d;
    return d * d;
  }
  const core_real size = core_real_fabs(d);
  *derivative = size < 1 ? d : d > 0 ? 1 : d < 0 ? -1 : d; /* NaN stays */
  return size < 1 ? d * d / 2 : size - (core_real)0.5;
}

KERN_INLINE void regression_rows(const regression_job *job, core_dtype dtype, int64_t begin, int64_t end) {
  const core_real share = job->kind == KERN_SQUARED || job->d == 0 ? 1 : 1 / (core_real)job->d;
  for (int64_t r = begin; r < end; r++) {
    const core_real *restrict p = job->prediction + r * job->d, *restrict t = job->target + r * job->d;
    void *gradient = job->gradient == NULL ? NULL : kern_element(job->gradient, dtype, r * job->d);
    core_real sum = 0, derivative = 0;
    for (int64_t i = 0; i < job->d; i++) {
      const core_real value = coordinate(job->kind, p[i] - t[i], &derivative);
      sum += job->valid[r] ? value : 0;
      if (gradient != NULL)
        kern_to(gradient, dtype, i, KERN_SET, job->valid[r] ? job->weight * share * derivative : 0);
    }
    job->loss[r] = sum * share;
  }
}
KERN_ACTIVE_RUN(regression_rows, regression_job)

core_status kern_regression_cpu(kern_context *context, kern_regression kind, double weight,
                                core_tensor prediction, core_tensor target, core_tensor valid,
                                core_tensor loss, core_tensor dprediction) {
  KERN_CHECK_REAL(prediction, KERN_ANY, KERN_ANY);
  const int64_t rows = prediction.shape[0], d = prediction.shape[1];
  KERN_CHECK_LIKE(target, prediction);
  KERN_CHECK(valid, CORE_UINT8, rows);
  KERN_CHECK_REAL(loss, rows);
  if (dprediction.data != NULL) KERN_CHECK_ACTIVE(dprediction, rows, d);
  const regression_job job = {.dtype = dprediction.data != NULL ? dprediction.dtype : CORE_REAL_DTYPE,
                              .kind = kind,
                              .weight = (core_real)weight,
                              .d = d,
                              .prediction = prediction.data,
                              .target = target.data,
                              .valid = valid.data,
                              .loss = loss.data,
                              .gradient = dprediction.data};
  const kern_split split = kern_split_rows(rows, d);
  KERN_FOR_BLOCKS(context, split, block) {
    regression_rows_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
