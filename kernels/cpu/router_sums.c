/* Sums over the tokens that the router losses are made of, and their gradient.
 *
 * Accumulated in double over fixed blocks of rows that are combined in order, so that they do not depend on
 * the number of threads. Logarithms of the softmax come from the largest probability: with l* the largest
 * logit, lse = l* - log p(l*), which costs one logarithm a row. */
#include <string.h> /* memset */

#include "vecmath_impl.h" /* kern_normal_below */

typedef struct sums_rows {
  int64_t experts, k;
  const core_real *logits, *prob, *noisy; /* noisy NULL: no load */
  const int32_t *choice;
  double sigma;
} sums_rows;

/* What one row contributes to z and entropy: logsumexp relative to the largest logit, and H(p). */
typedef struct row_measures {
  double most, lse, entropy;
} row_measures;

KERN_INLINE row_measures measure_row(const core_real *restrict logits, const core_real *restrict prob,
                                     int64_t experts) {
  int64_t top = 0;
  for (int64_t e = 1; e < experts; e++)
    if (logits[e] > logits[top]) top = e;
  const double most = (double)logits[top], spread = -log((double)prob[top]);
  double mean = 0; /* of logit - most under p; an impossible expert counts nothing */
  for (int64_t e = 0; e < experts; e++)
    mean += prob[e] > 0 ? (double)prob[e] * ((double)logits[e] - most) : 0;
  return (row_measures){.most = most, .lse = most + spread, .entropy = spread - mean};
}

/* The K-th largest noisy logit of row t. */
KERN_INLINE core_real row_threshold(const sums_rows *job, int64_t t) {
  return job->noisy[t * job->experts + job->choice[t * job->k + job->k - 1]];
}

/* sum: [z, entropy, prob[E], load[E]] of one block. */
KERN_CLONES static void sums_run(const sums_rows *job, double *restrict sum, int64_t begin, int64_t end) {
  const int64_t experts = job->experts;
  double *restrict prob_sum = sum + 2, *restrict load_sum = sum + 2 + experts;
  for (int64_t t = begin; t < end; t++) {
    const core_real *restrict logits = job->logits + t * experts, *restrict prob = job->prob + t * experts;
    const row_measures row = measure_row(logits, prob, experts);
    sum[0] += row.lse * row.lse;
    sum[1] += row.entropy;
#pragma omp simd
    for (int64_t e = 0; e < experts; e++) prob_sum[e] += (double)prob[e];
    if (job->noisy == NULL) continue;
    const core_real threshold = row_threshold(job, t), inverse = (core_real)(1 / job->sigma);
#pragma omp simd
    for (int64_t e = 0; e < experts; e++)
      load_sum[e] += (double)kern_normal_below((logits[e] - threshold) * inverse);
  }
}

static core_status sums_check(const char *op, core_tensor logits, core_tensor prob, core_tensor noisy,
                              core_tensor choice, double sigma) {
  const int64_t rows = logits.shape[0], experts = logits.shape[1];
  TRY(kern_check_priv(op, "logits", &logits, CORE_REAL_DTYPE, (const int64_t[]){KERN_ANY, KERN_ANY}, 2));
  TRY(kern_check_priv(op, "prob", &prob, CORE_REAL_DTYPE, logits.shape, 2));
  TRY(kern_check_priv(op, "noisy", &noisy, CORE_REAL_DTYPE, logits.shape, 2));
  TRY(kern_check_priv(op, "choice", &choice, CORE_INT32, (const int64_t[]){rows, KERN_ANY}, 2));
  CHECK(experts >= 1 && choice.shape[1] >= 1, CORE_ERR_ARGUMENT, "%s: %lld choices among %lld experts", op,
        (long long)choice.shape[1], (long long)experts);
  CHECK(sigma >= 0, CORE_ERR_ARGUMENT, "%s: sigma is %g, expected 0 or more", op, sigma);
  TRY(kern_check_index_priv(op, "choice", &choice, 0, experts));
  return CORE_OK;
}

static sums_rows sums_job(core_tensor logits, core_tensor prob, core_tensor noisy, core_tensor choice,
                          double sigma) {
  const bool loaded = sigma > 0 && noisy.data != logits.data;
  return (sums_rows){.experts = logits.shape[1],
                     .k = choice.shape[1],
                     .logits = logits.data,
                     .prob = prob.data,
                     .noisy = loaded ? noisy.data : NULL,
                     .choice = choice.data,
                     .sigma = sigma};
}

core_status kern_router_sums_cpu(kern_context *context, core_tensor logits, core_tensor prob,
                                 core_tensor noisy, core_tensor choice, double sigma, core_tensor sums) {
  TRY(sums_check(__func__, logits, prob, noisy, choice, sigma));
  const int64_t rows = logits.shape[0], experts = logits.shape[1], stride = 2 + 2 * experts;
  KERN_CHECK(sums, CORE_FLOAT64, kern_router_sums_count(experts));
  TRY(kern_check_limit_priv(__func__, "experts", experts, context->limits.experts));
  const sums_rows job = sums_job(logits, prob, noisy, choice, sigma);
  const kern_split split = kern_split_of(rows, 32);
  KERN_FOR_BLOCKS(context, split, block) {
    double *sum = context->sums + block * stride;
    memset(sum, 0, (size_t)stride * sizeof *sum);
    sums_run(&job, sum, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  double *total = sums.data;
  total[0] += (double)rows;
  for (int64_t block = 0; block < split.count; block++)
    for (int64_t i = 0; i < stride; i++) total[1 + i] += context->sums[block * stride + i];
  return CORE_OK;
}

/* Derivatives of the loss by the sums, as they lie in the tensor. */
typedef struct sums_weights {
  double z, entropy;
  const double *prob, *load;
} sums_weights;

/* d/dl_e of each sum: z 2 lse p_e; entropy -p_e (log p_e + H); prob p_e (w_e - <w, p>). */
KERN_INLINE void sums_row_back(const sums_weights *weights, const core_real *restrict logits,
                               const core_real *restrict prob, int64_t experts, core_real *restrict dlogits) {
  const row_measures row = measure_row(logits, prob, experts);
  double dot = 0;
  for (int64_t e = 0; e < experts; e++) dot += weights->prob[e] * (double)prob[e];
  const double base = 2 * weights->z * row.lse + weights->entropy * (row.lse - row.entropy) - dot;
  for (int64_t e = 0; e < experts; e++) {
    if (!(prob[e] > 0) && prob[e] == prob[e]) continue;
    dlogits[e] +=
        (core_real)((double)prob[e] * (base + weights->prob[e] - weights->entropy * (double)logits[e]));
  }
}

/* load_e = Phi((l_e - thr) / sigma); thr is the noisy logit of the K-th choice, so its gradient is that
 * one's. */
KERN_INLINE void load_row_back(const sums_rows *job, const double *restrict weight, int64_t t,
                               core_real *restrict dlogits) {
  const core_real *restrict logits = job->logits + t * job->experts;
  const core_real threshold = row_threshold(job, t), inverse = (core_real)(1 / job->sigma);
  core_real total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t e = 0; e < job->experts; e++) {
    const core_real d =
        (core_real)weight[e] * inverse * kern_normal_density((logits[e] - threshold) * inverse);
    dlogits[e] += d;
    total += d;
  }
  dlogits[job->choice[t * job->k + job->k - 1]] -= total;
}

KERN_CLONES static void sums_run_back(const sums_rows *job, const sums_weights *weights, core_real *dlogits,
                                      int64_t begin, int64_t end) {
  const int64_t experts = job->experts;
  for (int64_t t = begin; t < end; t++) {
    sums_row_back(weights, job->logits + t * experts, job->prob + t * experts, experts,
                  dlogits + t * experts);
    if (job->noisy != NULL) load_row_back(job, weights->load, t, dlogits + t * experts);
  }
}

core_status kern_router_sums_bwd_cpu(kern_context *context, core_tensor weights, core_tensor logits,
                                     core_tensor prob, core_tensor noisy, core_tensor choice, double sigma,
                                     core_tensor dlogits) {
  TRY(sums_check(__func__, logits, prob, noisy, choice, sigma));
  const int64_t experts = logits.shape[1];
  KERN_CHECK(weights, CORE_FLOAT64, kern_router_sums_count(experts));
  KERN_CHECK_LIKE(dlogits, logits);
  const double *w = weights.data;
  const sums_weights by = {.z = w[1], .entropy = w[2], .prob = w + 3, .load = w + 3 + experts};
  const sums_rows job = sums_job(logits, prob, noisy, choice, sigma);
  const kern_split split = kern_split_of(logits.shape[0], 32);
  KERN_FOR_BLOCKS(context, split, block) {
    sums_run_back(&job, &by, dlogits.data, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
