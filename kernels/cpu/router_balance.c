/* Sums of probabilities and of choices by group of tokens, which a balance loss is made of, and its gradient.
 *
 * A block owns groups and reads the tokens in order, so the sums do not depend on the number of threads; a
 * group's tokens need not lie together. */
#include "cpu_impl.h" /* checks, blocks */

typedef struct balance_job {
  int64_t rows, experts, k, columns;
  const core_real *prob;
  const int32_t *choice, *group;
} balance_job;

/* sums: [G][1 + 2 E] */
static void balance_run(const balance_job *job, int64_t begin, int64_t end, double *sums) {
  const int64_t experts = job->experts;
  for (int64_t t = 0; t < job->rows; t++) {
    if (job->group[t] < begin || job->group[t] >= end) continue;
    double *restrict of = sums + job->group[t] * (1 + 2 * experts);
    const core_real *restrict prob = job->prob + t * experts;
    of[0] += 1;
    for (int64_t e = 0; e < experts; e++) of[1 + e] += (double)prob[e];
    for (int64_t i = 0; i < job->columns; i++) of[1 + experts + job->choice[t * job->k + i]] += 1;
  }
}

core_status kern_router_balance_cpu(kern_context *context, core_tensor prob, core_tensor choice,
                                    core_tensor group, int64_t columns, core_tensor sums) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  const int64_t rows = prob.shape[0], experts = prob.shape[1];
  KERN_CHECK(choice, CORE_INT32, rows, KERN_ANY);
  KERN_CHECK(group, CORE_INT32, rows);
  KERN_CHECK(sums, CORE_FLOAT64, KERN_ANY, 1 + 2 * experts);
  CHECK(columns >= 1 && columns <= choice.shape[1], CORE_ERR_ARGUMENT,
        "%s: %lld columns of %lld choices, expected 1 to all", __func__, (long long)columns,
        (long long)choice.shape[1]);
  KERN_CHECK_INDEX(choice, 0, experts);
  KERN_CHECK_INDEX(group, 0, sums.shape[0]);
  const balance_job job = {.rows = rows,
                           .experts = experts,
                           .k = choice.shape[1],
                           .columns = columns,
                           .prob = prob.data,
                           .choice = choice.data,
                           .group = group.data};
  const kern_split split = kern_split_of(sums.shape[0], 1);
  KERN_FOR_BLOCKS(context, split, block) {
    balance_run(&job, kern_split_at(split, block), kern_split_at(split, block + 1), sums.data);
  }
  return CORE_OK;
}

/* d / dl_e of sum over groups of <w, sum p>: p_e (w_e - <w, p>). */
static void back_row(const double *restrict weight, const core_real *restrict prob, int64_t experts,
                     core_real *restrict dlogits) {
  double dot = 0;
  for (int64_t e = 0; e < experts; e++) dot += weight[e] * (double)prob[e];
  for (int64_t e = 0; e < experts; e++) dlogits[e] += (core_real)((double)prob[e] * (weight[e] - dot));
}

core_status kern_router_balance_bwd_cpu(kern_context *context, core_tensor weights, core_tensor group,
                                        core_tensor prob, core_tensor dlogits) {
  KERN_CHECK_REAL(prob, KERN_ANY, KERN_ANY);
  const int64_t rows = prob.shape[0], experts = prob.shape[1];
  KERN_CHECK(weights, CORE_FLOAT64, KERN_ANY, experts);
  KERN_CHECK(group, CORE_INT32, rows);
  KERN_CHECK_LIKE(dlogits, prob);
  KERN_CHECK_INDEX(group, 0, weights.shape[0]);
  const double *weight = weights.data;
  const int32_t *of = group.data;
  const core_real *p = prob.data;
  core_real *to = dlogits.data;
  const kern_split split = kern_split_rows(rows, experts);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t t = kern_split_at(split, block); t < kern_split_at(split, block + 1); t++)
      back_row(weight + of[t] * experts, p + t * experts, experts, to + t * experts);
  }
  return CORE_OK;
}
