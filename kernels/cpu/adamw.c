/* AdamW as torch.optim.AdamW does it: decay first, then moments, then the step. One pass over four arrays:
 * the op is bound by memory traffic, so nothing is split off. */
#include "cpu_impl.h" /* checks, blocks */

typedef struct adamw_factors {
  core_real gradient, keep, first, first_rest, second, second_rest, denominator, epsilon, step;
} adamw_factors;

KERN_CLONES static void adamw_run(const adamw_factors *factors, const core_real *restrict gradient,
                                  core_real *restrict parameter, core_real *restrict m, core_real *restrict v,
                                  int64_t n) {
  const adamw_factors f = *factors;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const core_real g = gradient[i] * f.gradient;
    m[i] = f.first * m[i] + f.first_rest * g;
    v[i] = f.second * v[i] + f.second_rest * (g * g);
    const core_real denominator = core_real_sqrt(v[i]) * f.denominator + f.epsilon;
    parameter[i] = parameter[i] * f.keep - f.step * (m[i] / denominator);
  }
}

core_status kern_adamw_cpu(kern_context *context, const kern_adamw *adamw, core_tensor gradient,
                           core_tensor parameter, core_tensor m, core_tensor v) {
  KERN_CHECK_ANY(parameter);
  KERN_CHECK_LIKE(gradient, parameter);
  KERN_CHECK_LIKE(m, parameter);
  KERN_CHECK_LIKE(v, parameter);
  CHECK(adamw->correction1 > 0 && adamw->correction2 > 0, CORE_ERR_ARGUMENT,
        "%s: bias corrections %g and %g, expected above 0 (steps are counted from 1)", __func__,
        adamw->correction1, adamw->correction2);
  const adamw_factors factors = {.gradient = (core_real)adamw->gradient_scale,
                                 .keep = (core_real)(1 - adamw->rate * adamw->decay),
                                 .first = (core_real)adamw->beta1,
                                 .first_rest = (core_real)(1 - adamw->beta1),
                                 .second = (core_real)adamw->beta2,
                                 .second_rest = (core_real)(1 - adamw->beta2),
                                 .denominator = (core_real)(1 / sqrt(adamw->correction2)),
                                 .epsilon = (core_real)adamw->epsilon,
                                 .step = (core_real)(adamw->rate / adamw->correction1)};
  const int64_t n = core_tensor_count(&parameter);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    adamw_run(&factors, (const core_real *)gradient.data + begin, (core_real *)parameter.data + begin,
              (core_real *)m.data + begin, (core_real *)v.data + begin,
              kern_line_at(split, block + 1, n) - begin);
  }
  return CORE_OK;
}
