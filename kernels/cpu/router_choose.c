/* Softmax of the logits, choice of the K largest, the gates of the chosen, and the gates' gradient.
 *
 * NaN ranks below every number, equal to minus infinity: a row of NaN chooses experts 0..K-1 and its gates
 * are NaN, which the loss then shows; an index is never out of range. */
#include "vecmath_impl.h" /* kern_exp, kern_put */

typedef struct choose_rows {
  kern_gate form;
  int64_t experts, k;
  const core_real *logits;
  core_real *prob, *gate;
  int32_t *choice;
} choose_rows;

/* Insertion into the list of the best so far; only a strictly larger logit passes an earlier expert. */
static void choose_row(const core_real *restrict logits, int64_t experts, int64_t k, int32_t *restrict choice,
                       core_real *restrict best) {
  for (int64_t e = 0; e < experts; e++) {
    const core_real value = logits[e] >= -INFINITY ? logits[e] : -INFINITY;
    int64_t at = e < k ? e : k;
    if (at == k && !(value > best[k - 1])) continue;
    if (at == k) at--;
    for (; at > 0 && value > best[at - 1]; at--) {
      best[at] = best[at - 1];
      choice[at] = choice[at - 1];
    }
    best[at] = value;
    choice[at] = (int32_t)e;
  }
}

static void choose_run(const choose_rows *job, int64_t begin, int64_t end) {
  core_real best[CORE_MAX_CHOICES];
  kern_softmax_rows_priv(job->logits + begin * job->experts, job->prob + begin * job->experts, end - begin,
                         job->experts);
  for (int64_t t = begin; t < end; t++) {
    const core_real *logits = job->logits + t * job->experts;
    int32_t *choice = job->choice + t * job->k;
    core_real *gate = job->gate + t * job->k;
    choose_row(logits, job->experts, job->k, choice, best);
    core_real sum = 0;
    for (int64_t k = 0; k < job->k; k++) {
      gate[k] = job->form == KERN_GATE_SOFTMAX ? job->prob[t * job->experts + choice[k]]
                                               : kern_exp(logits[choice[k]] - logits[choice[0]]);
      sum += gate[k];
    }
    for (int64_t k = 0; job->form == KERN_GATE_RENORMALISED && k < job->k; k++) gate[k] /= sum;
  }
}

core_status kern_router_choose_cpu(kern_context *context, kern_gate form, core_tensor logits,
                                   core_tensor prob, core_tensor choice, core_tensor gate) {
  KERN_CHECK_REAL(logits, KERN_ANY, KERN_ANY);
  KERN_CHECK(choice, CORE_INT32, logits.shape[0], KERN_ANY);
  const int64_t rows = logits.shape[0], experts = logits.shape[1], k = choice.shape[1];
  CHECK(k >= 1 && k <= CORE_MAX_CHOICES && k <= experts, CORE_ERR_ARGUMENT,
        "%s: %lld choices among %lld experts, expected 1 to %d and at most the experts", __func__,
        (long long)k, (long long)experts, (int)CORE_MAX_CHOICES);
  KERN_CHECK_LIKE(prob, logits);
  KERN_CHECK_REAL(gate, rows, k);
  const choose_rows job = {.form = form,
                           .experts = experts,
                           .k = k,
                           .logits = logits.data,
                           .prob = prob.data,
                           .choice = choice.data,
                           .gate = gate.data};
  const kern_split split = kern_split_rows(rows, experts * 4);
  KERN_FOR_BLOCKS(context, split, block) {
    choose_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}

typedef struct gate_rows {
  kern_gate form;
  kern_write write;
  int64_t experts, k;
  const core_real *dgate, *prob, *gate;
  const int32_t *choice;
  core_real *dlogits;
} gate_rows;

/* Softmax gates: dl = p (d - <p, d>) with d the gate gradients spread over the experts.
 * Renormalised: the same softmax over the chosen alone. */
KERN_CLONES static void gate_run_back(const gate_rows *job, int64_t begin, int64_t end) {
  const int64_t experts = job->experts;
  for (int64_t t = begin; t < end; t++) {
    const core_real *restrict dgate = job->dgate + t * job->k, *restrict prob = job->prob + t * experts;
    const core_real *restrict gate = job->gate + t * job->k;
    const int32_t *restrict choice = job->choice + t * job->k;
    core_real *restrict to = job->dlogits + t * experts;
    const bool soft = job->form == KERN_GATE_SOFTMAX;
    core_real dot = 0;
    for (int64_t k = 0; k < job->k; k++) dot += (soft ? prob[choice[k]] : gate[k]) * dgate[k];
    for (int64_t e = 0; e < experts; e++) kern_put(&to[e], job->write, soft ? -prob[e] * dot : 0);
    for (int64_t k = 0; k < job->k; k++)
      to[choice[k]] += soft ? prob[choice[k]] * dgate[k] : gate[k] * (dgate[k] - dot);
  }
}

core_status kern_router_gate_bwd_cpu(kern_context *context, kern_gate form, core_tensor dgate,
                                     core_tensor prob, core_tensor choice, core_tensor gate, kern_write write,
                                     core_tensor dlogits) {
  KERN_CHECK_REAL(dlogits, KERN_ANY, KERN_ANY);
  KERN_CHECK(choice, CORE_INT32, dlogits.shape[0], KERN_ANY);
  const int64_t rows = dlogits.shape[0], experts = dlogits.shape[1], k = choice.shape[1];
  KERN_CHECK_REAL(dgate, rows, k);
  if (form == KERN_GATE_SOFTMAX) KERN_CHECK_LIKE(prob, dlogits);
  if (form == KERN_GATE_RENORMALISED) KERN_CHECK_REAL(gate, rows, k);
  KERN_CHECK_INDEX(choice, 0, experts);
  const gate_rows job = {.form = form,
                         .write = write,
                         .experts = experts,
                         .k = k,
                         .dgate = dgate.data,
                         .prob = prob.data,
                         .gate = gate.data,
                         .choice = choice.data,
                         .dlogits = dlogits.data};
  const kern_split split = kern_split_rows(rows, experts * 4);
  KERN_FOR_BLOCKS(context, split, block) {
    gate_run_back(&job, kern_split_at(split, block), kern_split_at(split, block + 1));
  }
  return CORE_OK;
}
