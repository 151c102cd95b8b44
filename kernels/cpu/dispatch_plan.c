/* Counting sort of the kept choices by expert. Serial: it moves T K small integers, and its order must not
 * depend on the number of threads. */
#include <string.h> /* memset */

#include "cpu_impl.h" /* checks */

core_status kern_dispatch_plan_cpu(kern_context *context, core_tensor choice, core_tensor keep,
                                   int64_t experts, int64_t *count, core_tensor slot, core_tensor index) {
  (void)context;
  KERN_CHECK(choice, CORE_INT32, KERN_ANY, KERN_ANY);
  const int64_t rows = choice.shape[0], k = choice.shape[1], pairs = rows * k;
  if (keep.data != NULL) KERN_CHECK(keep, CORE_UINT8, rows, k);
  KERN_CHECK(slot, CORE_INT32, rows, k);
  KERN_CHECK(index, CORE_INT32, KERN_ANY);
  CHECK(experts >= 1 && experts <= CORE_MAX_EXPERTS && index.shape[0] >= pairs, CORE_ERR_ARGUMENT,
        "%s: %lld experts, %lld choices, room for %lld rows", __func__, (long long)experts, (long long)pairs,
        (long long)index.shape[0]);
  KERN_CHECK_INDEX(choice, 0, experts);
  const int32_t *chosen = choice.data;
  const uint8_t *kept = keep.data;
  int32_t *row = slot.data, *source = index.data;
  memset(count, 0, (size_t)experts * sizeof *count);
  for (int64_t i = 0; i < pairs; i++)
    if (!kept || kept[i]) count[chosen[i]]++;
  int64_t next[CORE_MAX_EXPERTS], at = 0;
  for (int64_t e = 0; e < experts; at += count[e++]) next[e] = at;
  for (int64_t i = 0; i < pairs; i++) {
    row[i] = -1;
    if (kept && !kept[i]) continue;
    row[i] = (int32_t)next[chosen[i]]++;
    source[row[i]] = (int32_t)(i / k);
  }
  return CORE_OK;
}
