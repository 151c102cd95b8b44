/* Gates of a choice that is made, from probabilities that a calibration may have corrected, and the gradients
 * of corrected ones. */
#include "cpu_impl.h" /* checks, blocks */

/* The least weight of a chosen expert (Zhong et al. 2024): a correction may be negative. */
static const core_real least = (core_real)1e-6;

typedef struct gate_job {
  kern_gate form;
  kern_calibration kind;
  int64_t experts, k;
  const core_real *prob, *correction; /* correction NULL: none */
  const int32_t *choice;
} gate_job;

/* The weight of expert e in row t before it is bounded. */
KERN_INLINE core_real raw_weight(const gate_job *job, int64_t t, int64_t e) {
  const int64_t at = t * job->experts + e;
  if (job->correction == NULL) return job->prob[at];
  return job->kind == KERN_CALIBRATE_ADD ? job->prob[at] + job->correction[at]
                                         : job->prob[at] * (1 + job->correction[at]);
}

/* Weights of the chosen of row t into `weight`; returns what they are divided by. A NaN stays one. */
KERN_INLINE core_real row_weights(const gate_job *job, int64_t t, core_real *weight) {
  core_real sum = 0;
  for (int64_t k = 0; k < job->k; k++) {
    const core_real raw = raw_weight(job, t, job->choice[t * job->k + k]);
    weight[k] = job->correction != NULL && raw < least ? least : raw;
    sum += weight[k];
  }
  return job->form == KERN_GATE_RENORMALISED ? sum : 1;
}

static core_status gate_check(const char *op, core_tensor prob, core_tensor correction, core_tensor choice) {
  TRY(kern_check_priv(op, "prob", &prob, CORE_REAL_DTYPE, (const int64_t[]){KERN_ANY, KERN_ANY}, 2));
  if (correction.data != NULL)
    TRY(kern_check_priv(op, "correction", &correction, CORE_REAL_DTYPE, prob.shape, 2));
  TRY(kern_check_priv(op, "choice", &choice, CORE_INT32, (const int64_t[]){prob.shape[0], KERN_ANY}, 2));
  CHECK(choice.shape[1] <= CORE_MAX_CHOICES, CORE_ERR_ARGUMENT, "%s: %lld choices, expected at most %d", op,
        (long long)choice.shape[1], (int)CORE_MAX_CHOICES);
  TRY(kern_check_index_priv(op, "choice", &choice, 0, prob.shape[1]));
  return CORE_OK;
}

static gate_job job_of(kern_gate form, kern_calibration kind, core_tensor prob, core_tensor correction,
                       core_tensor choice) {
  return (gate_job){.form = form,
                    .kind = kind,
                    .experts = prob.shape[1],
                    .k = choice.shape[1],
                    .prob = prob.data,
                    .correction = correction.data,
                    .choice = choice.data};
}

core_status kern_router_gate_fwd_cpu(kern_context *context, kern_gate form, kern_calibration kind,
                                     core_tensor prob, core_tensor correction, core_tensor choice,
                                     core_tensor gate) {
  TRY(gate_check(__func__, prob, correction, choice));
  const int64_t rows = prob.shape[0], k = choice.shape[1];
  KERN_CHECK_REAL(gate, rows, k);
  const gate_job job = job_of(form, kind, prob, correction, choice);
  core_real *to = gate.data;
  const kern_split split = kern_split_rows(rows, 8 * k);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++) {
      const core_real sum = row_weights(&job, t, to + t * k);
      for (int64_t i = 0; i < k; i++) to[t * k + i] /= sum;
    }
  }
  return CORE_OK;
}

/* gate = w / sum: dw = (d - <gate, d>) / sum, or d where they are not divided; 0 at the bound. */
static void back_row(const gate_job *job, const core_real *dgate, int64_t t, core_real *dprob,
                     core_real *dcorrection) {
  core_real weight[CORE_MAX_CHOICES], dot = 0;
  const core_real sum = row_weights(job, t, weight);
  for (int64_t k = 0; k < job->k; k++) dot += weight[k] / sum * dgate[k];
  if (job->form == KERN_GATE_SOFTMAX) dot = 0;
  for (int64_t e = 0; e < job->experts; e++) dprob[e] = dcorrection[e] = 0;
  for (int64_t k = 0; k < job->k; k++) {
    const int64_t e = job->choice[t * job->k + k], at = t * job->experts + e;
    if (raw_weight(job, t, e) < least) continue;
    const core_real d = (dgate[k] - dot) / sum;
    const bool adds = job->kind == KERN_CALIBRATE_ADD;
    dprob[e] = adds ? d : d * (1 + job->correction[at]);
    dcorrection[e] = adds ? d : d * job->prob[at];
  }
}

core_status kern_router_calibrated_bwd_cpu(kern_context *context, kern_gate form, kern_calibration kind,
                                           core_tensor dgate, core_tensor prob, core_tensor correction,
                                           core_tensor choice, core_tensor dprob, core_tensor dcorrection) {
  CHECK(correction.data != NULL, CORE_ERR_ARGUMENT, "%s: correction must be given", __func__);
  TRY(gate_check(__func__, prob, correction, choice));
  const int64_t rows = prob.shape[0], experts = prob.shape[1], k = choice.shape[1];
  KERN_CHECK_REAL(dgate, rows, k);
  KERN_CHECK_LIKE(dprob, prob);
  KERN_CHECK_LIKE(dcorrection, prob);
  const gate_job job = job_of(form, kind, prob, correction, choice);
  const core_real *d = dgate.data;
  core_real *to_prob = dprob.data, *to_correction = dcorrection.data;
  const kern_split split = kern_split_rows(rows, 2 * experts);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++)
      back_row(&job, d + t * k, t, to_prob + t * experts, to_correction + t * experts);
  }
  return CORE_OK;
}
