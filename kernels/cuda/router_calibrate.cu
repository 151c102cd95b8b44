/* Gates of a choice that is made, from probabilities that a calibration may have corrected, and the gradients
 * of corrected ones. */
#include "router_row.cuh"

static const float least_weight = 1e-6f;

struct gate_job {
  kern_gate form;
  kern_calibration kind;
  const float *prob, *correction; /* correction NULL: none */
  const int32_t *choice;
  int64_t rows;
  int experts, k;
  kern_fault fault;

  /* Expert of choice i of a row; -1: a bad one, which is reported. */
  __device__ int chosen(int64_t row, int i) const {
    const int e = choice[row * k + i];
    return fault.inside(e, 0, experts) ? e : -1;
  }
  /* Its weight before it is bounded. */
  __device__ float raw(int64_t row, int e) const {
    const int64_t at = row * experts + e;
    if (correction == NULL) return prob[at];
    return kind == KERN_CALIBRATE_ADD ? prob[at] + correction[at] : prob[at] * (1.0f + correction[at]);
  }
  /* A NaN stays one. */
  __device__ float weight(float raw) const {
    return correction != NULL && raw < least_weight ? least_weight : raw;
  }
};

static __global__ void __launch_bounds__(KERN_BLOCK) gate_kernel(gate_job job, float *gate) {
  const int64_t row = (int64_t)blockIdx.x * KERN_BLOCK + threadIdx.x;
  if (row >= job.rows) return;
  float sum = 0, weight[CORE_MAX_CHOICES];
#pragma unroll
  for (int i = 0; i < CORE_MAX_CHOICES; i++) {
    const int e = i < job.k ? job.chosen(row, i) : -1;
    weight[i] = e < 0 ? 0.0f : job.weight(job.raw(row, e));
    sum += weight[i];
  }
#pragma unroll
  for (int i = 0; i < CORE_MAX_CHOICES; i++)
    if (i < job.k) gate[row * job.k + i] = job.form == KERN_GATE_RENORMALISED ? weight[i] / sum : weight[i];
}

/* gate = w / sum: dw = (d - <gate, d>) / sum, or d where they are not divided; 0 at the bound. Lane i of a
 * row has its i-th choice. */
template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    calibrated_backward(gate_job job, const float *dgate, float *dprob, float *dcorrection) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  const bool there = row < job.rows;
  const int e = there && R::lane() < job.k ? job.chosen(row, R::lane()) : -1;
  const float raw = e < 0 ? 0.0f : job.raw(row, e), weight = e < 0 ? 0.0f : job.weight(raw);
  const float d = e < 0 ? 0.0f : dgate[row * job.k + R::lane()], all = R::sum(weight),
              dot = R::sum(weight * d);
  const bool divided = job.form == KERN_GATE_RENORMALISED;
  float own = divided ? (d - dot / all) / all : d, by_correction = own;
  if (e < 0 || raw < least_weight) own = by_correction = 0;
  if (e >= 0 && job.kind == KERN_CALIBRATE_MULTIPLY && raw >= least_weight) {
    by_correction = own * job.prob[row * job.experts + e];
    own *= 1.0f + job.correction[row * job.experts + e];
  }
  float to_prob[R::N] = {}, to_correction[R::N] = {};
  for (int i = 0; i < job.k; i++) {
    const int expert = __shfl_sync(0xffffffffu, e, R::holder(i));
    const float a = __shfl_sync(0xffffffffu, own, R::holder(i));
    const float b = __shfl_sync(0xffffffffu, by_correction, R::holder(i));
#pragma unroll
    for (int n = 0; n < R::N; n++)
      if (expert == R::expert(n)) to_prob[n] = a, to_correction[n] = b;
  }
#pragma unroll
  for (int n = 0; n < R::N; n++) {
    if (!there || R::expert(n) >= job.experts) continue;
    dprob[row * job.experts + R::expert(n)] = to_prob[n];
    dcorrection[row * job.experts + R::expert(n)] = to_correction[n];
  }
}

static core_status gate_checked(const char *op, core_tensor prob, core_tensor correction,
                                core_tensor choice) {
  TRY(kern_check_cuda_priv(op, "prob", prob, CORE_FLOAT32, {KERN_ANY, KERN_ANY}));
  if (correction.data != NULL)
    TRY(kern_check_cuda_priv(op, "correction", correction, CORE_FLOAT32, {prob.shape[0], prob.shape[1]}));
  TRY(kern_check_cuda_priv(op, "choice", choice, CORE_INT32, {prob.shape[0], KERN_ANY}));
  CHECK(choice.shape[1] <= CORE_MAX_CHOICES && prob.shape[1] <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT,
        "%s: %lld choices among %lld experts, expected at most %d among %d", op, (long long)choice.shape[1],
        (long long)prob.shape[1], (int)CORE_MAX_CHOICES, (int)CORE_MAX_EXPERTS);
  return CORE_OK;
}

static gate_job job_of(kern_gate form, kern_calibration kind, core_tensor prob, core_tensor correction,
                       core_tensor choice, kern_cuda_op op) {
  return gate_job{form,
                  kind,
                  kern_data<const float>(prob),
                  kern_data<const float>(correction),
                  kern_data<const int32_t>(choice),
                  prob.shape[0],
                  (int)prob.shape[1],
                  (int)choice.shape[1],
                  kern_cuda_fault_priv(op)};
}

core_status kern_router_gate_fwd_cuda(kern_context *context, kern_gate form, kern_calibration kind,
                                      core_tensor prob, core_tensor correction, core_tensor choice,
                                      core_tensor gate) {
  TRY(gate_checked(__func__, prob, correction, choice));
  KERN_CHECK_REAL(gate, prob.shape[0], choice.shape[1]);
  const gate_job job = job_of(form, kind, prob, correction, choice, KERN_CUDA_OP_router_gate_fwd);
  KERN_LAUNCH(context, kern_grid(kern_divide_up(job.rows, KERN_BLOCK), dim3(KERN_BLOCK)), gate_kernel, job,
              kern_data<float>(gate));
  return CORE_OK;
}

core_status kern_router_calibrated_bwd_cuda(kern_context *context, kern_gate form, kern_calibration kind,
                                            core_tensor dgate, core_tensor prob, core_tensor correction,
                                            core_tensor choice, core_tensor dprob, core_tensor dcorrection) {
  CHECK(correction.data != NULL, CORE_ERR_ARGUMENT, "%s: correction must be given", __func__);
  TRY(gate_checked(__func__, prob, correction, choice));
  KERN_CHECK_REAL(dgate, prob.shape[0], choice.shape[1]);
  KERN_CHECK_LIKE(dprob, prob);
  KERN_CHECK_LIKE(dcorrection, prob);
  const gate_job job = job_of(form, kind, prob, correction, choice, KERN_CUDA_OP_router_calibrated_bwd);
  return kern_with_router_row(job.experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(job.rows, R::ROWS), dim3(R::BLOCK)), calibrated_backward<R>,
                job, kern_data<const float>(dgate), kern_data<float>(dprob), kern_data<float>(dcorrection));
    return CORE_OK;
  });
}
