/* Counts of what the router chose, for metrics and for the balance of experts. Integers, so blocks of rows
 * need no order; serial, because it reads T K small integers once. */
#include "cpu_impl.h" /* checks */

core_status kern_router_count_cpu(kern_context *context, core_tensor choice, core_tensor slot,
                                  core_tensor count) {
  (void)context;
  KERN_CHECK(choice, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = choice.shape[0], k = choice.shape[1], experts = (count.shape[0] - 2) / 2;
  KERN_CHECK(slot, CORE_INT32, rows, k);
  KERN_CHECK(count, CORE_INT64, 2 * experts + 2);
  KERN_CHECK_INDEX(choice, 0, experts);
  const int32_t *chosen = choice.data, *row = slot.data;
  int64_t *of = count.data, *kept = of + experts, *rows_kept = kept + experts;
  for (int64_t t = 0; t < rows; t++) {
    bool any = false;
    for (int64_t i = t * k; i < (t + 1) * k; i++) {
      of[chosen[i]]++;
      kept[chosen[i]] += row[i] >= 0;
      any = any || row[i] >= 0;
    }
    rows_kept[0] += any;
    rows_kept[1]++;
  }
  return CORE_OK;
}
