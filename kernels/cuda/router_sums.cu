/* Sums over the tokens that the router losses are made of, and their gradient. Sums are kept in double, by
 * block, and combined in order. Logarithms of the softmax come from the largest probability: with l* the
 * largest logit, lse = l* - log p(l*), which costs one logarithm a row. */
#include "router_row.cuh"

struct sums_rows {
  const float *logits, *prob, *noisy; /* noisy NULL: no load */
  const int32_t *choice;
  int64_t rows;
  int experts, k;
  float inverse_sigma;
  kern_fault fault;
};

/* What one row contributes to z and entropy: its largest logit, logsumexp, H(p). */
struct row_measures {
  double lse, entropy;
};

template <typename R>
static __device__ __forceinline__ row_measures measure_row(const float (&logit)[R::N],
                                                           const float (&p)[R::N]) {
  float most = -INFINITY, top = -INFINITY;
#pragma unroll
  for (int n = 0; n < R::N; n++) most = fmaxf(most, logit[n]), top = fmaxf(top, p[n]);
  most = R::most(most), top = R::most(top);
  double mean = 0; /* of logit - most under p; an impossible expert counts nothing */
#pragma unroll
  for (int n = 0; n < R::N; n++) mean += p[n] > 0 ? (double)p[n] * ((double)logit[n] - (double)most) : 0;
  const double spread = -log((double)top);
  return row_measures{(double)most + spread, spread - R::sum(mean)};
}

/* Expert of the row's last choice, whose noisy logit is the threshold. */
static __device__ __forceinline__ int64_t last_choice(const sums_rows &job, int64_t row) {
  const int64_t e = job.choice[row * job.k + job.k - 1];
  return job.fault.inside(e, 0, job.experts) ? e : 0;
}

/* partial[blockIdx.x] = [tokens, z, entropy, prob[E], load[E]] of the block's rows. */
template <typename R>
static __global__ void __launch_bounds__(R::BLOCK) sums_kernel(sums_rows job, double *partial) {
  constexpr int N = R::N;
  const int width = 3 + 2 * job.experts, team = threadIdx.x / R::LANES;
  double tokens = 0, z = 0, entropy = 0, prob[N] = {}, load[N] = {};
  for (int64_t first = (int64_t)blockIdx.x * R::ROWS; first < job.rows;
       first += (int64_t)gridDim.x * R::ROWS) {
    const int64_t row = first + team;
    float logit[N], p[N];
    R::load(job.logits, row, job.rows, job.experts, -INFINITY, logit);
    R::load(job.prob, row, job.rows, job.experts, 0.0f, p);
    const row_measures measures = measure_row<R>(logit, p);
    if (row >= job.rows) continue;
    tokens += 1, z += measures.lse * measures.lse, entropy += measures.entropy;
    const float threshold = job.noisy != NULL ? job.noisy[row * job.experts + last_choice(job, row)] : 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      prob[n] += (double)p[n];
      if (job.noisy != NULL) load[n] += (double)kern_normal_below((logit[n] - threshold) * job.inverse_sigma);
    }
  }
  double *const teams = KERN_SHARED(double), *const own = teams + team * width;
  if (R::lane() == 0) own[0] = tokens, own[1] = z, own[2] = entropy;
#pragma unroll
  for (int n = 0; n < N; n++)
    if (R::expert(n) < job.experts)
      own[3 + R::expert(n)] = prob[n], own[3 + job.experts + R::expert(n)] = load[n];
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += R::BLOCK) {
    double sum = 0;
    for (int t = 0; t < R::ROWS; t++) sum += teams[t * width + i];
    partial[(int64_t)blockIdx.x * width + i] = sum;
  }
}

/* d/dl_e of each sum: z 2 lse p_e; entropy -p_e (log p_e + H); prob p_e (w_e - <w, p>);
 * load_e = Phi((l_e - thr) / sigma), with thr the noisy logit of the K-th choice, which takes the gradient of
 * thr. */
template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    sums_backward(sums_rows job, const double *weights, float *dlogits) {
  constexpr int N = R::N;
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  const bool there = row < job.rows;
  const double *const by_prob = weights + 3, *const by_load = by_prob + job.experts;
  float logit[N], p[N], to[N];
  R::load(job.logits, row, job.rows, job.experts, -INFINITY, logit);
  R::load(job.prob, row, job.rows, job.experts, 0.0f, p);
  R::load(dlogits, row, job.rows, job.experts, 0.0f, to);
  const row_measures measures = measure_row<R>(logit, p);
  double dot = 0;
#pragma unroll
  for (int n = 0; n < N; n++)
    if (R::expert(n) < job.experts) dot += by_prob[R::expert(n)] * (double)p[n];
  const double base =
      2 * weights[1] * measures.lse + weights[2] * (measures.lse - measures.entropy) - R::sum(dot);
  const int64_t last = there && job.noisy != NULL ? last_choice(job, row) : -1;
  const float threshold = last >= 0 ? job.noisy[row * job.experts + last] : 0.0f;
  float total = 0;
#pragma unroll
  for (int n = 0; n < N; n++) {
    if (R::expert(n) >= job.experts) continue;
    if (p[n] > 0 || p[n] != p[n])
      to[n] += (float)((double)p[n] * (base + by_prob[R::expert(n)] - weights[2] * (double)logit[n]));
    if (last < 0) continue;
    const float d = (float)by_load[R::expert(n)] * job.inverse_sigma *
                    kern_normal_density((logit[n] - threshold) * job.inverse_sigma);
    to[n] += d;
    total += d;
  }
  total = R::sum(total);
#pragma unroll
  for (int n = 0; n < N; n++) {
    if (!there || R::expert(n) >= job.experts) continue;
    dlogits[row * job.experts + R::expert(n)] = R::expert(n) == last ? to[n] - total : to[n];
  }
}

static core_status sums_checked(const char *op, core_tensor logits, core_tensor prob, core_tensor noisy,
                                core_tensor choice, double sigma, core_tensor sums) {
  TRY(kern_check_cuda_priv(op, "logits", logits, CORE_FLOAT32, {KERN_ANY, KERN_ANY}));
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  TRY(kern_check_cuda_priv(op, "prob", prob, CORE_FLOAT32, {rows, experts}));
  TRY(kern_check_cuda_priv(op, "noisy", noisy, CORE_FLOAT32, {rows, experts}));
  TRY(kern_check_cuda_priv(op, "choice", choice, CORE_INT32, {rows, KERN_ANY}));
  CHECK(experts >= 1 && choice.shape[1] >= 1, CORE_ERR_ARGUMENT, "%s: %lld choices among %lld experts", op,
        (long long)choice.shape[1], (long long)experts);
  CHECK(sigma >= 0, CORE_ERR_ARGUMENT, "%s: sigma is %g, expected 0 or more", op, sigma);
  TRY(kern_check_cuda_priv(op, "sums", sums, CORE_FLOAT64, {kern_router_sums_count(experts)}));
  return CORE_OK;
}

static sums_rows sums_job(core_tensor logits, core_tensor prob, core_tensor noisy, core_tensor choice,
                          double sigma, kern_cuda_op op) {
  const bool loaded = sigma > 0 && noisy.data != logits.data;
  return sums_rows{kern_data<const float>(logits),
                   kern_data<const float>(prob),
                   loaded ? kern_data<const float>(noisy) : NULL,
                   kern_data<const int32_t>(choice),
                   logits.shape[0],
                   (int)logits.shape[1],
                   (int)choice.shape[1],
                   loaded ? (float)(1 / sigma) : 0.0f,
                   kern_cuda_fault_priv(op)};
}

core_status kern_router_sums_cuda(kern_context *context, core_tensor logits, core_tensor prob,
                                  core_tensor noisy, core_tensor choice, double sigma, core_tensor sums) {
  TRY(sums_checked(__func__, logits, prob, noisy, choice, sigma, sums));
  const int64_t rows = logits.shape[0], experts = logits.shape[1], width = kern_router_sums_count(experts);
  KERN_CHECK_LIMIT("experts", experts, context->limits.experts);
  if (rows == 0) return CORE_OK;
  const sums_rows job = sums_job(logits, prob, noisy, choice, sigma, KERN_CUDA_OP_router_sums);
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    const int64_t blocks = kern_least(kern_divide_up(rows, 4 * R::ROWS), KERN_PARTIALS);
    KERN_LAUNCH(context, kern_grid(blocks, dim3(R::BLOCK), 1, (size_t)(R::ROWS * width) * sizeof(double)),
                sums_kernel<R>, job, context->sums);
    TRY(kern_combine_doubles_priv(context, context->sums, blocks, width, width, kern_data<double>(sums)));
    return CORE_OK;
  });
}

core_status kern_router_sums_bwd_cuda(kern_context *context, core_tensor weights, core_tensor logits,
                                      core_tensor prob, core_tensor noisy, core_tensor choice, double sigma,
                                      core_tensor dlogits) {
  TRY(sums_checked(__func__, logits, prob, noisy, choice, sigma, weights));
  KERN_CHECK_LIKE(dlogits, logits);
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  KERN_CHECK_LIMIT("experts", experts, CORE_MAX_EXPERTS);
  const sums_rows job = sums_job(logits, prob, noisy, choice, sigma, KERN_CUDA_OP_router_sums_bwd);
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), sums_backward<R>, job,
                kern_data<const double>(weights), kern_data<float>(dlogits));
    return CORE_OK;
  });
}
