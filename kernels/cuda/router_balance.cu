/* Sums of probabilities and of choices by group of tokens, which a balance loss is made of, and its gradient.
 * A block takes a stretch of the tokens, one group and a few experts, so that every number has one writer and
 * one order; stretches are combined in order. */
#include "router_row.cuh"

enum { EXPERTS = 32, LINES = KERN_BLOCK / EXPERTS };

struct balance_job {
  const float *prob;
  const int32_t *choice, *group;
  int64_t rows, groups, stretch; /* stretch: tokens of one */
  int experts, k, columns;
  kern_fault fault;
};

/* Choices of expert e among the first columns of a row. */
static __device__ __forceinline__ int times_chosen(const balance_job &job, int64_t row, int e) {
  int times = 0;
  for (int i = 0; i < job.columns; i++) {
    const int chosen = job.choice[row * job.k + i];
    if (job.fault.inside(chosen, 0, job.experts) && chosen == e) times++;
  }
  return times;
}

/* The lines' sums of a column of threads, in order. */
static __device__ double lines_sum(double own, double *shared) {
  shared[threadIdx.x] = own;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < LINES; i++) sum += shared[i * EXPERTS + threadIdx.x % EXPERTS];
  __syncthreads();
  return sum;
}

/* out[stretch][group][1 + 2 E] += */
static __global__ void __launch_bounds__(KERN_BLOCK) balance_kernel(balance_job job, double *out) {
  double *const shared = KERN_SHARED(double);
  const int64_t group = blockIdx.z, first = (int64_t)blockIdx.x * job.stretch,
                last = first + job.stretch < job.rows ? first + job.stretch : job.rows;
  const int e = (int)(blockIdx.y * EXPERTS + threadIdx.x % EXPERTS);
  double tokens = 0, prob = 0, chosen = 0;
  for (int64_t row = first + threadIdx.x / EXPERTS; row < last; row += LINES) {
    const int32_t its = job.group[row];
    if (!job.fault.inside(its, 0, job.groups) || its != group) continue;
    tokens += 1;
    if (e >= job.experts) continue;
    prob += (double)job.prob[row * job.experts + e];
    chosen += times_chosen(job, row, e);
  }
  tokens = lines_sum(tokens, shared);
  prob = lines_sum(prob, shared);
  chosen = lines_sum(chosen, shared);
  if (threadIdx.x >= EXPERTS) return;
  double *const to = out + ((int64_t)blockIdx.x * job.groups + group) * (1 + 2 * job.experts);
  if (e == 0) to[0] += tokens;
  if (e < job.experts) to[1 + e] += prob, to[1 + job.experts + e] += chosen;
}

static __global__ void __launch_bounds__(KERN_BLOCK) clear_kernel(double *x, int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x;
  if (i < count) x[i] = 0;
}

/* One group has nobody beside it: its tokens are cut, as far as there is room for partial sums. */
core_status kern_router_balance_cuda(kern_context *context, core_tensor prob, core_tensor choice,
                                     core_tensor group, int64_t columns, core_tensor sums) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  const int64_t rows = prob.shape[0], experts = prob.shape[1];
  KERN_CHECK(choice, CORE_INT32, rows, KERN_ANY);
  KERN_CHECK(group, CORE_INT32, rows);
  KERN_CHECK(sums, CORE_FLOAT64, KERN_ANY, 1 + 2 * experts);
  CHECK(columns >= 1 && columns <= choice.shape[1], CORE_ERR_ARGUMENT,
        "%s: %lld columns of %lld choices, expected 1 to all", __func__, (long long)columns,
        (long long)choice.shape[1]);
  KERN_CHECK_LIMIT("experts", experts, context->limits.experts);
  const int64_t groups = sums.shape[0], numbers = groups * (1 + 2 * experts);
  if (rows == 0 || groups == 0 || experts == 0) return CORE_OK;
  const int64_t room = context->sums_count / numbers, fair = kern_divide_up(rows, 64 * LINES);
  const int64_t stretches = room > 1 && fair > 1 ? kern_least(kern_least(room, fair), KERN_PARTIALS) : 1;
  double *const out = stretches > 1 ? context->sums : kern_data<double>(sums);
  const balance_job job = {kern_data<const float>(prob),
                           kern_data<const int32_t>(choice),
                           kern_data<const int32_t>(group),
                           rows,
                           groups,
                           kern_divide_up(rows, stretches),
                           (int)experts,
                           (int)choice.shape[1],
                           (int)columns,
                           kern_cuda_fault_priv(KERN_CUDA_OP_router_balance)};
  if (stretches > 1)
    KERN_LAUNCH(context, kern_grid(kern_divide_up(stretches * numbers, KERN_BLOCK), dim3(KERN_BLOCK)),
                clear_kernel, out, stretches * numbers);
  KERN_LAUNCH(context,
              kern_grid(stretches, dim3(KERN_BLOCK), kern_divide_up(experts, EXPERTS),
                        KERN_BLOCK * sizeof(double), groups),
              balance_kernel, job, out);
  if (stretches > 1)
    TRY(kern_combine_doubles_priv(context, out, stretches, numbers, numbers, kern_data<double>(sums)));
  return CORE_OK;
}

/* d / dl_e of sum over groups of <w, sum p>: p_e (w_e - <w, p>). */
template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    balance_backward(const double *weights, int64_t groups, const int32_t *group, const float *prob,
                     float *dlogits, int64_t rows, int experts, kern_fault fault) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  const int32_t its = row < rows ? group[row] : -1;
  const bool good = row < rows && fault.inside(its, 0, groups);
  float p[R::N];
  double dot = 0;
  R::load(prob, row, rows, experts, 0.0f, p);
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (good && R::expert(n) < experts) dot += weights[its * (int64_t)experts + R::expert(n)] * (double)p[n];
  dot = R::sum(dot);
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (good && R::expert(n) < experts)
      dlogits[row * experts + R::expert(n)] +=
          (float)((double)p[n] * (weights[its * (int64_t)experts + R::expert(n)] - dot));
}

core_status kern_router_balance_bwd_cuda(kern_context *context, core_tensor weights, core_tensor group,
                                         core_tensor prob, core_tensor dlogits) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  const int64_t rows = prob.shape[0], experts = prob.shape[1];
  KERN_CHECK(weights, CORE_FLOAT64, KERN_ANY, experts);
  KERN_CHECK(group, CORE_INT32, rows);
  KERN_CHECK_LIKE(dlogits, prob);
  KERN_CHECK_LIMIT("experts", experts, CORE_MAX_EXPERTS);
  const int64_t groups = weights.shape[0];
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), balance_backward<R>,
                kern_data<const double>(weights), groups, kern_data<const int32_t>(group),
                kern_data<const float>(prob), kern_data<float>(dlogits), rows, (int)experts,
                kern_cuda_fault_priv(KERN_CUDA_OP_router_balance_bwd));
    return CORE_OK;
  });
}
