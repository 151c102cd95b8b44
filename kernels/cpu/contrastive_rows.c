/* Rows of a contrastive loss over all keys of the global batch, with masks.
 *
 * A row is worked off in chunks of columns: the mask, of mixed types, is first turned into one number a
 * column, and the arithmetic then runs over plain reals, which vectorises. */
#include "vecmath_impl.h" /* kern_exp, kern_row_max */

enum { CHUNK = 256 };

typedef struct contrastive_job {
  int64_t columns, first;
  const uint8_t *valid;
  const int32_t *label; /* or NULL */
  const uint64_t *id;   /* or NULL */
  double scale;
  core_real *cosine;                     /* [n, B] */
  core_real *lse, *positive;             /* forward, [n] */
  const core_real *lse_row, *lse_column; /* backward, [n] and [B] */
  double weight;
} contrastive_job;

/* open[j] = 0 where column begin + j takes part in the softmax of a row whose positive is `own`, else -inf.
 */
KERN_INLINE void mask_chunk(const contrastive_job *job, int64_t own, int64_t begin, int64_t count,
                            core_real *restrict open) {
  for (int64_t j = 0; j < count; j++) open[j] = job->valid[begin + j] != 0 ? 0 : -INFINITY;
  if (job->label != NULL && job->label[own] >= 0)
    for (int64_t j = 0; j < count; j++)
      open[j] = job->label[begin + j] != job->label[own] ? open[j] : -INFINITY;
  if (job->id != NULL)
    for (int64_t j = 0; j < count; j++) open[j] = job->id[begin + j] != job->id[own] ? open[j] : -INFINITY;
  if (own >= begin && own < begin + count) open[own - begin] = 0;
}

/* Online logsumexp over chunks: the sum is rescaled when a larger logit appears. */
KERN_CLONES static void contrastive_row(const contrastive_job *job, int64_t row) {
  const core_real *restrict cosine = job->cosine + row * job->columns, scale = (core_real)job->scale;
  const int64_t own = job->first + row;
  core_real logit[CHUNK], most = -INFINITY, sum = 0;
  for (int64_t begin = 0; begin < job->columns; begin += CHUNK) {
    const int64_t count = job->columns - begin < CHUNK ? job->columns - begin : CHUNK;
    mask_chunk(job, own, begin, count, logit);
#pragma omp simd
    for (int64_t j = 0; j < count; j++) logit[j] = logit[j] < 0 ? logit[j] : scale * cosine[begin + j];
    const core_real here = kern_row_max(logit, count);
    if (here > most) {
      sum *= kern_exp(most - here);
      most = here;
    }
    const core_real base = most > -INFINITY ? most : 0;
    core_real part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < count; j++) part += kern_exp(logit[j] - base);
    sum += part;
  }
  job->lse[row] = most + core_real_log(sum);
  job->positive[row] = scale * cosine[own];
}

/* Returns the row's part of dscale. The diagonal's -1 belongs to both directions. */
KERN_CLONES static double contrastive_row_back(const contrastive_job *job, int64_t row) {
  core_real *restrict cosine = job->cosine + row * job->columns;
  const core_real scale = (core_real)job->scale, lse_row = job->lse_row[row];
  const core_real factor = (core_real)(job->weight * job->scale);
  const int64_t own = job->first + row;
  const core_real positive = cosine[own];
  core_real open[CHUNK];
  double dscale = 0;
  for (int64_t begin = 0; begin < job->columns; begin += CHUNK) {
    const int64_t count = job->columns - begin < CHUNK ? job->columns - begin : CHUNK;
    mask_chunk(job, own, begin, count, open);
    core_real part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < count; j++) {
      const core_real logit = scale * cosine[begin + j];
      const core_real along = open[j] < 0 ? 0 : kern_exp(logit - lse_row);
      const core_real across = open[j] < 0 ? 0 : kern_exp(logit - job->lse_column[begin + j]);
      part += along * cosine[begin + j];
      cosine[begin + j] = factor * (along + across);
    }
    dscale += (double)part;
  }
  cosine[own] -= 2 * factor;
  return job->weight * (dscale - (double)positive);
}

/* Checks what both directions share and fills it in. */
static core_status contrastive_start(const char *op, const kern_contrastive *rows, core_tensor cosine,
                                     contrastive_job *job) {
  TRY(kern_check_priv(op, "cosine", &cosine, CORE_REAL_DTYPE, (const int64_t[]){KERN_ANY, KERN_ANY}, 2));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  TRY(kern_check_priv(op, "valid", &rows->valid, CORE_UINT8, &columns, 1));
  if (rows->label.data != NULL) TRY(kern_check_priv(op, "label", &rows->label, CORE_INT32, &columns, 1));
  if (rows->id.data != NULL) TRY(kern_check_priv(op, "id", &rows->id, CORE_UINT64, &columns, 1));
  CHECK(rows->first >= 0 && rows->first <= columns - n, CORE_ERR_ARGUMENT,
        "%s: %lld rows from column %lld on, but there are %lld columns", op, (long long)n,
        (long long)rows->first, (long long)columns);
  job->columns = columns, job->first = rows->first, job->scale = rows->scale;
  job->valid = rows->valid.data, job->label = rows->label.data, job->id = rows->id.data;
  job->cosine = cosine.data;
  return CORE_OK;
}

core_status kern_contrastive_fwd_cpu(kern_context *context, const kern_contrastive *rows, core_tensor cosine,
                                     core_tensor lse, core_tensor positive) {
  const int64_t n = cosine.shape[0];
  contrastive_job job = {.lse = lse.data, .positive = positive.data};
  TRY(contrastive_start(__func__, rows, cosine, &job));
  KERN_CHECK_REAL(lse, n);
  KERN_CHECK_REAL(positive, n);
  const kern_split split = kern_split_rows(n, job.columns);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t row = kern_split_at(split, block); row < kern_split_at(split, block + 1); row++) {
      if (job.valid[job.first + row])
        contrastive_row(&job, row);
      else
        job.lse[row] = job.positive[row] = 0;
    }
  }
  return CORE_OK;
}

core_status kern_contrastive_bwd_cpu(kern_context *context, const kern_contrastive *rows, double weight,
                                     core_tensor lse_row, core_tensor lse_column, core_tensor cosine,
                                     core_tensor dscale) {
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  contrastive_job job = {.lse_row = lse_row.data, .lse_column = lse_column.data, .weight = weight};
  TRY(contrastive_start(__func__, rows, cosine, &job));
  KERN_CHECK_REAL(lse_row, n);
  KERN_CHECK_REAL(lse_column, columns);
  KERN_CHECK(dscale, CORE_FLOAT64, 1);
  double partial[KERN_BLOCKS], *total = dscale.data;
  const kern_split split = kern_split_rows(n, columns);
  KERN_FOR_BLOCKS(context, split, block) {
    partial[block] = 0;
    for (int64_t row = kern_split_at(split, block); row < kern_split_at(split, block + 1); row++) {
      if (job.valid[job.first + row])
        partial[block] += contrastive_row_back(&job, row);
      else
        for (int64_t j = 0; j < columns; j++) job.cosine[row * columns + j] = 0;
    }
  }
  for (int64_t block = 0; block < split.count; block++) *total += partial[block];
  return CORE_OK;
}
