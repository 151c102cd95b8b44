/* Context: one aligned block, carved into the scratch that ops borrow. Sizes follow from the limits alone. */
#include <omp.h>    /* omp_get_max_threads */
#include <stdlib.h> /* calloc, free */

#include "cpu_impl.h" /* kern_context */

typedef struct context_plan {
  int32_t threads;
  int64_t partial, sums, attention; /* elements */
  size_t bytes;                     /* of all three */
} context_plan;

/* [K transposed | V transposed | scores | score gradients] of one thread: see attention_impl.h. */
static bool attention_count(const kern_limits *limits, int64_t *out) {
  const int64_t third = limits->width / 3 + 1;
  const int64_t width = third < KERN_MAX_HEAD_WIDTH ? third : KERN_MAX_HEAD_WIDTH;
  int64_t columns;
  if (__builtin_add_overflow(limits->sequence, (int64_t)KERN_LANES - 1, &columns)) return false;
  columns = columns / KERN_LANES * KERN_LANES;
  return !__builtin_mul_overflow(columns, 2 * width + 2 * KERN_QUERY_ROWS, out);
}

/* False when a size overflows. */
static bool context_plan_make(const kern_limits *limits, context_plan *plan) {
  plan->threads = limits->threads > 0 ? limits->threads : omp_get_max_threads();
  if (plan->threads > KERN_MAX_THREADS) plan->threads = KERN_MAX_THREADS;
  int64_t row, all, bytes, sum_bytes;
  if (__builtin_mul_overflow(limits->width, (int64_t)2 * KERN_BLOCKS, &plan->partial)) return false;
  plan->partial = (plan->partial + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
  if (__builtin_mul_overflow(limits->experts, (int64_t)2 * KERN_BLOCKS, &plan->sums)) return false;
  plan->sums += 4 * KERN_BLOCKS;
  if (!attention_count(limits, &row)) return false;
  if (__builtin_mul_overflow(row, (int64_t)plan->threads, &plan->attention)) return false;
  if (__builtin_add_overflow(plan->partial, plan->attention, &all)) return false;
  if (__builtin_mul_overflow(all, (int64_t)sizeof(core_real), &bytes)) return false;
  if (__builtin_mul_overflow(plan->sums, (int64_t)sizeof(double), &sum_bytes)) return false;
  if (__builtin_add_overflow(bytes, sum_bytes, &bytes)) return false;
  plan->bytes = (size_t)bytes;
  return true;
}

size_t kern_context_bytes_cpu(const kern_limits *limits) {
  context_plan plan;
  return context_plan_make(limits, &plan) ? plan.bytes + sizeof(kern_context) : SIZE_MAX;
}

int32_t kern_context_threads_cpu(const kern_context *context) {
  return context->threads;
}

core_status kern_context_create_cpu(const kern_limits *limits, kern_context **out) {
  context_plan plan;
  *out = NULL;
  CHECK(limits->rows >= 0 && limits->width >= 0 && limits->experts >= 0 && limits->sequence >= 0 &&
            limits->segments >= 0 && limits->heads >= 0 && limits->updates >= 0 && limits->threads >= 0,
        CORE_ERR_ARGUMENT,
        "kernel limits must not be negative: rows %lld, width %lld, experts %lld, sequence %lld, "
        "segments %lld, heads %lld, updates %lld, threads %d",
        (long long)limits->rows, (long long)limits->width, (long long)limits->experts,
        (long long)limits->sequence, (long long)limits->segments, (long long)limits->heads,
        (long long)limits->updates, (int)limits->threads);
  CHECK(limits->experts <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT, "%lld experts in a layer: the most is %d",
        (long long)limits->experts, (int)CORE_MAX_EXPERTS);
  CHECK(context_plan_make(limits, &plan), CORE_ERR_ARGUMENT,
        "kernel limits overflow: width %lld, sequence %lld, %d threads", (long long)limits->width,
        (long long)limits->sequence, (int)limits->threads);
  kern_context *context = calloc(1, sizeof *context);
  CHECK(context != NULL, CORE_ERR_MEMORY, "kernel context: no memory for %zu bytes", sizeof *context);
  const core_status status = kern_device_cpu_priv.allocate(plan.bytes, &context->memory);
  if (status != CORE_OK) {
    free(context);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  context->limits = *limits;
  context->threads = plan.threads;
  context->attention_count = plan.attention / plan.threads;
  context->attention = context->memory;
  context->partial = context->attention + plan.attention;
  context->sums = (double *)(context->partial + plan.partial);
  *out = context;
  return CORE_OK;
}

void kern_context_destroy_cpu(kern_context *context) {
  if (context == NULL) return;
  kern_device_cpu_priv.release(context->memory);
  free(context);
}

KERN_CLONES void kern_partial_add_priv(const core_real *partial, int64_t blocks, int64_t stride, int64_t n,
                                       core_real *out) {
  for (int64_t block = 0; block < blocks; block++) {
    const core_real *restrict from = partial + block * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] += from[i];
  }
}
