/* Choice of the K largest logits with softmax and gates, and the gates' gradient. NaN ranks as -infinity: a
 * row of NaN chooses experts 0..K-1 and its gates are NaN, which the loss then shows. */
#include "router_row.cuh"

struct router_best {
  float value;
  int expert;
};
struct router_better {
  __device__ router_best operator()(router_best a, router_best b) const {
    return b.value > a.value || (b.value == a.value && b.expert < a.expert) ? b : a;
  }
};

/* The best of the row's lanes; every lane gets it. */
template <typename R>
static __device__ __forceinline__ router_best best_of_lanes(router_best own) {
#pragma unroll
  for (int distance = R::LANES / 2; distance > 0; distance /= 2) {
    const router_best other = {__shfl_xor_sync(0xffffffffu, own.value, distance),
                               __shfl_xor_sync(0xffffffffu, own.expert, distance)};
    own = router_better()(own, other);
  }
  return own;
}

/* The value that lies with expert e. */
template <typename R>
static __device__ __forceinline__ float value_at(const float (&x)[R::N], int e) {
  float value = 0;
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (n == e / R::LANES) value = x[n];
  return __shfl_sync(0xffffffffu, value, R::holder(e));
}

/* The largest that is not yet taken, ties to the lower expert; marks it. */
template <typename R>
static __device__ __forceinline__ int take_best(const float (&logit)[R::N], int experts, uint32_t *taken) {
  router_best best = {-INFINITY, INT32_MAX};
#pragma unroll
  for (int n = 0; n < R::N; n++) {
    const float value = logit[n] >= -INFINITY ? logit[n] : -INFINITY;
    if (R::expert(n) < experts && (*taken >> n & 1u) == 0)
      best = router_better()(best, router_best{value, R::expert(n)});
  }
  best = best_of_lanes<R>(best);
  if (best.expert % R::LANES == R::lane()) *taken |= 1u << best.expert / R::LANES;
  return best.expert;
}

template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    choose_kernel(kern_gate form, const float *logits, float *prob, int32_t *choice, float *gate,
                  int64_t rows, int experts, int k) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  float logit[R::N], p[R::N];
  R::load(logits, row, rows, experts, -INFINITY, logit);
#pragma unroll
  for (int n = 0; n < R::N; n++) p[n] = logit[n];
  kern_router_softmax<R>(p);
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (row < rows && R::expert(n) < experts) prob[row * experts + R::expert(n)] = p[n];
  /* Lane i keeps the i-th choice. */
  uint32_t taken = 0;
  int own = 0;
  float own_gate = 0, first = 0;
  for (int i = 0; i < k; i++) {
    const int e = take_best<R>(logit, experts, &taken);
    const float value = form == KERN_GATE_SOFTMAX ? value_at<R>(p, e) : value_at<R>(logit, e);
    if (i == 0) first = value;
    if (i == R::lane()) own = e, own_gate = form == KERN_GATE_SOFTMAX ? value : expf(value - first);
  }
  const float sum = R::sum(own_gate);
  if (row >= rows || R::lane() >= k) return;
  choice[row * k + R::lane()] = own;
  gate[row * k + R::lane()] = form == KERN_GATE_SOFTMAX ? own_gate : own_gate / sum;
}

core_status kern_router_choose_cuda(kern_context *context, kern_gate form, core_tensor logits,
                                    core_tensor prob, core_tensor choice, core_tensor gate) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  KERN_CHECK(choice, CORE_INT32, logits.shape[0], KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1], k = choice.shape[1];
  CHECK(k >= 1 && k <= CORE_MAX_CHOICES && k <= experts && experts <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT,
        "%s: %lld choices among %lld experts, expected 1 to %d and at most the experts, of which %d",
        __func__, (long long)k, (long long)experts, (int)CORE_MAX_CHOICES, (int)CORE_MAX_EXPERTS);
  KERN_CHECK_LIKE(prob, logits);
  KERN_CHECK_REAL(gate, rows, k);
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), choose_kernel<R>, form,
                kern_data<const float>(logits), kern_data<float>(prob), kern_data<int32_t>(choice),
                kern_data<float>(gate), rows, (int)experts, (int)k);
    return CORE_OK;
  });
}

/* Softmax gates: dl = p (d - <p, d>) with d the gate gradients spread over the experts. Renormalised: the
 * same softmax over the chosen alone. own: the probability (or gate) of a chosen expert, on the lane of its
 * rank. */
template <typename R>
static __global__ void __launch_bounds__(R::BLOCK)
    gate_backward(kern_gate form, const float *dgate, const float *prob, const int32_t *choice,
                  const float *gate, kern_write write, float *dlogits, int64_t rows, int experts, int k,
                  kern_fault fault) {
  const int64_t row = (int64_t)blockIdx.x * R::ROWS + threadIdx.x / R::LANES;
  const bool soft = form == KERN_GATE_SOFTMAX, mine = row < rows && R::lane() < k;
  const int64_t at = row * k + R::lane();
  int expert = mine ? choice[at] : -1;
  if (mine && !fault.inside(expert, 0, experts)) expert = -1;
  const float d = expert >= 0 ? dgate[at] : 0.0f;
  const float own = expert < 0 ? 0.0f : soft ? prob[row * experts + expert] : gate[at];
  const float dot = R::sum(own * d), extra = soft ? own * d : own * (d - dot);
  float p[R::N], to[R::N] = {};
  R::load(soft ? prob : dlogits, row, rows, experts, 0.0f, p);
  if (write == KERN_ADD) R::load(dlogits, row, rows, experts, 0.0f, to);
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (soft) to[n] -= p[n] * dot;
  for (int i = 0; i < k; i++) {
    const int e = __shfl_sync(0xffffffffu, expert, R::holder(i));
    const float value = __shfl_sync(0xffffffffu, extra, R::holder(i));
#pragma unroll
    for (int n = 0; n < R::N; n++)
      if (e == R::expert(n)) to[n] += value;
  }
#pragma unroll
  for (int n = 0; n < R::N; n++)
    if (row < rows && R::expert(n) < experts) dlogits[row * experts + R::expert(n)] = to[n];
}

core_status kern_router_gate_bwd_cuda(kern_context *context, kern_gate form, core_tensor dgate,
                                      core_tensor prob, core_tensor choice, core_tensor gate,
                                      kern_write write, core_tensor dlogits) {
  KERN_CHECK_REAL(dlogits, KERN_ANY, KERN_ANY);
  KERN_CHECK(choice, CORE_INT32, dlogits.shape[0], KERN_ANY);
  const int64_t rows = dlogits.shape[0], experts = dlogits.shape[1], k = choice.shape[1];
  CHECK(k <= CORE_MAX_CHOICES && experts <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT,
        "%s: %lld choices among %lld experts, expected at most %d among %d", __func__, (long long)k,
        (long long)experts, (int)CORE_MAX_CHOICES, (int)CORE_MAX_EXPERTS);
  KERN_CHECK_REAL(dgate, rows, k);
  if (form == KERN_GATE_SOFTMAX) KERN_CHECK_LIKE(prob, dlogits);
  if (form == KERN_GATE_RENORMALISED) KERN_CHECK_REAL(gate, rows, k);
  return kern_with_router_row(experts, [&](auto shape) -> core_status {
    using R = decltype(shape);
    KERN_LAUNCH(context, kern_grid(kern_divide_up(rows, R::ROWS), dim3(R::BLOCK)), gate_backward<R>, form,
                kern_data<const float>(dgate), kern_data<const float>(prob), kern_data<const int32_t>(choice),
                kern_data<const float>(gate), write, kern_data<float>(dlogits), rows, (int)experts, (int)k,
                kern_cuda_fault_priv(KERN_CUDA_OP_router_gate_bwd));
    return CORE_OK;
  });
}
