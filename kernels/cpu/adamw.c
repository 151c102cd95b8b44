/* AdamW as torch.optim.AdamW does it: decay first, then moments, then the step. One pass over four arrays:
 * the op is bound by memory traffic, so nothing is split off. */
#include "vecmath_impl.h" /* kern_bfloat_of */

typedef struct adamw_factors {
  core_real gradient, keep, first, first_rest, second, second_rest, denominator, epsilon, step;
} adamw_factors;

typedef struct adamw_arrays {
  const core_real *gradient;
  core_real *parameter, *m, *v;
  uint16_t *copy; /* or NULL */
} adamw_arrays;

KERN_CLONES static void adamw_run(const adamw_factors *factors, const adamw_arrays *arrays, int64_t begin,
                                  int64_t end) {
  const adamw_factors f = *factors;
  const core_real *restrict gradient = arrays->gradient;
  core_real *restrict parameter = arrays->parameter, *restrict m = arrays->m, *restrict v = arrays->v;
  uint16_t *restrict copy = arrays->copy;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) {
    const core_real g = gradient[i] * f.gradient;
    m[i] = f.first * m[i] + f.first_rest * g;
    v[i] = f.second * v[i] + f.second_rest * (g * g);
    const core_real denominator = core_real_sqrt(v[i]) * f.denominator + f.epsilon;
    parameter[i] = parameter[i] * f.keep - f.step * (m[i] / denominator);
    if (copy != NULL) copy[i] = kern_bfloat_of(parameter[i]);
  }
}

static adamw_factors adamw_factors_of(const kern_adamw *adamw) {
  return (adamw_factors){.gradient = (core_real)adamw->gradient_scale,
                         .keep = (core_real)(1 - adamw->rate * adamw->decay),
                         .first = (core_real)adamw->beta1,
                         .first_rest = (core_real)(1 - adamw->beta1),
                         .second = (core_real)adamw->beta2,
                         .second_rest = (core_real)(1 - adamw->beta2),
                         .denominator = (core_real)(1 / sqrt(adamw->correction2)),
                         .epsilon = (core_real)adamw->epsilon,
                         .step = (core_real)(adamw->rate / adamw->correction1)};
}

/* Every range is checked before anything is changed. */
static core_status adamw_check(const char *op, const kern_adamw *list, int64_t n, int64_t elements) {
  for (int64_t i = 0; i < n; i++) {
    const kern_adamw *a = &list[i];
    CHECK(a->first >= 0 && a->count >= 0 && a->first <= elements && a->count <= elements - a->first,
          CORE_ERR_ARGUMENT, "%s: range %lld is %lld elements from %lld on, but there are %lld", op,
          (long long)i, (long long)a->count, (long long)a->first, (long long)elements);
    CHECK(a->correction1 > 0 && a->correction2 > 0, CORE_ERR_ARGUMENT,
          "%s: bias corrections %g and %g of range %lld, expected above 0 (steps are counted from 1)", op,
          a->correction1, a->correction2, (long long)i);
  }
  return CORE_OK;
}

core_status kern_adamw_cpu(kern_context *context, const kern_adamw *list, int64_t n, core_tensor gradient,
                           core_tensor parameter, core_tensor m, core_tensor v, core_tensor copy) {
  KERN_CHECK_ANY(parameter);
  KERN_CHECK_LIKE(gradient, parameter);
  KERN_CHECK_LIKE(m, parameter);
  KERN_CHECK_LIKE(v, parameter);
  if (copy.data != NULL)
    KERN_CHECK(copy, kern_active_dtype(CORE_BFLOAT16), parameter.shape[0], parameter.shape[1],
               parameter.shape[2], parameter.shape[3]);
  TRY(kern_check_limit_priv(__func__, "the list's length", n, context->limits.updates));
  TRY(adamw_check(__func__, list, n, core_tensor_count(&parameter)));
  const adamw_arrays arrays = {gradient.data, parameter.data, m.data, v.data, copy.data};
  for (int64_t i = 0; i < n; i++) {
    const adamw_factors factors = adamw_factors_of(&list[i]);
    const int64_t first = list[i].first, count = list[i].count;
    const kern_split split = kern_split_lines(count);
    KERN_FOR_BLOCKS(context, split, block) {
      adamw_run(&factors, &arrays, first + kern_line_at(split, block, count),
                first + kern_line_at(split, block + 1, count));
    }
  }
  return CORE_OK;
}
