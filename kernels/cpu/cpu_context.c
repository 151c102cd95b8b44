/* Context: one aligned block, carved into the scratch that ops borrow. Sizes follow from the limits alone. */
#include <omp.h>    /* omp_get_max_threads */
#include <stdlib.h> /* calloc, free */

#include "attention_impl.h" /* kern_attention_per_key */
#include "cpu_impl.h"       /* kern_context */
#include "gemm_impl.h"      /* kern_product_scratch, kern_bfloat_units_priv */

typedef struct context_plan {
  int32_t threads;
  int64_t partial, sums, attention, product; /* elements; the last two of one thread */
  kern_extent tile;
  size_t bytes; /* of all */
} context_plan;

/* Elements of one thread's scratch, in whole vectors: see attention_impl.h. */
static bool attention_count(const kern_limits *limits, int64_t *out) {
  const int64_t third = limits->width / 3 + 1;
  const int64_t width = third < KERN_MAX_HEAD_WIDTH ? third : KERN_MAX_HEAD_WIDTH;
  int64_t columns;
  if (__builtin_add_overflow(limits->sequence, (int64_t)KERN_LANES - 1, &columns)) return false;
  columns = columns / KERN_LANES * KERN_LANES;
  if (__builtin_mul_overflow(columns, kern_attention_per_key(width), out)) return false;
  return !__builtin_add_overflow(*out, kern_attention_per_tile(width) + KERN_LANES, out);
}

static bool add_bytes(int64_t elements, int64_t times, int64_t size, int64_t *bytes) {
  int64_t more;
  return !__builtin_mul_overflow(elements, times, &more) && !__builtin_mul_overflow(more, size, &more) &&
         !__builtin_add_overflow(*bytes, more, bytes);
}

/* False when a size overflows. */
static bool context_plan_make(const kern_limits *limits, context_plan *plan) {
  int64_t bytes = 0;
  plan->threads = limits->threads > 0 ? limits->threads : omp_get_max_threads();
  if (plan->threads > KERN_MAX_THREADS) plan->threads = KERN_MAX_THREADS;
  if (__builtin_mul_overflow(limits->width, (int64_t)2 * KERN_BLOCKS, &plan->partial)) return false;
  plan->sums = (2 * limits->experts + 4) * KERN_BLOCKS;
  if (!attention_count(limits, &plan->attention)) return false;
  plan->attention = kern_round_lanes(plan->attention);
  plan->tile = kern_product_tile(limits);
  plan->product = kern_product_scratch(plan->tile);
  if (!add_bytes(plan->partial, 1, sizeof(core_real), &bytes)) return false;
  if (!add_bytes(plan->sums, 1, sizeof(double), &bytes)) return false;
  if (!add_bytes(plan->attention, plan->threads, sizeof(core_real), &bytes)) return false;
  if (!add_bytes(plan->product, plan->threads, sizeof(core_real), &bytes)) return false;
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
  context->attention_count = plan.attention;
  context->product_count = plan.product;
  context->tile = plan.tile;
  context->bfloat_units = kern_bfloat_units_priv();
  context->sums = context->memory;
  context->partial = (core_real *)(context->sums + plan.sums);
  context->attention = context->partial + plan.partial;
  context->product = context->attention + plan.attention * plan.threads;
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
