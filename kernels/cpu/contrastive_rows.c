/* Rows of a contrastive loss over all keys of the global batch, with masks.
 *
 * A row is worked off in chunks of columns: the mask, of mixed types, is first turned into one number a
 * column, and the arithmetic then runs over plain reals, which vectorises. */
#include "vecmath_impl.h" /* kern_exp, kern_row_max */

enum { CHUNK = 256 };

typedef struct contrastive_job {
  const kern_contrastive *rows;
  int64_t columns;
  core_real *cosine;                     /* [n, B] */
  core_real *lse, *positive;             /* forward, [n] */
  const core_real *lse_row, *lse_column; /* backward, [n] and [B] */
  double weight;
} contrastive_job;

KERN_INLINE bool row_counts(const kern_contrastive *rows, int64_t row) {
  return rows->valid == NULL || rows->valid[rows->own[row]] != 0;
}

/* open[j] = 0 where column begin + j takes part in the softmax of a row whose positive is `own`, else -inf.
 */
KERN_INLINE void mask_chunk(const kern_contrastive *rows, int64_t own, int64_t begin, int64_t count,
                            core_real *restrict open) {
  for (int64_t j = 0; j < count; j++) open[j] = 0;
  if (rows->valid != NULL)
    for (int64_t j = 0; j < count; j++) open[j] = rows->valid[begin + j] != 0 ? open[j] : -INFINITY;
  if (rows->label != NULL && rows->label[own] >= 0)
    for (int64_t j = 0; j < count; j++)
      open[j] = rows->label[begin + j] != rows->label[own] ? open[j] : -INFINITY;
  if (rows->id != NULL)
    for (int64_t j = 0; j < count; j++) open[j] = rows->id[begin + j] != rows->id[own] ? open[j] : -INFINITY;
  if (own >= begin && own < begin + count) open[own - begin] = 0;
}

/* Online logsumexp over chunks: the sum is rescaled when a larger logit appears. */
KERN_CLONES static void contrastive_row(const contrastive_job *job, int64_t row) {
  const kern_contrastive *rows = job->rows;
  const core_real *restrict cosine = job->cosine + row * job->columns, scale = (core_real)rows->scale;
  const int64_t own = rows->own[row];
  core_real logit[CHUNK], most = -INFINITY, sum = 0;
  for (int64_t begin = 0; begin < job->columns; begin += CHUNK) {
    const int64_t count = job->columns - begin < CHUNK ? job->columns - begin : CHUNK;
    mask_chunk(rows, own, begin, count, logit);
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
  const kern_contrastive *rows = job->rows;
  core_real *restrict cosine = job->cosine + row * job->columns;
  const core_real scale = (core_real)rows->scale, lse_row = job->lse_row[row];
  const core_real factor = (core_real)(job->weight * rows->scale);
  const int64_t own = rows->own[row];
  const core_real positive = cosine[own];
  core_real open[CHUNK];
  double dscale = 0;
  for (int64_t begin = 0; begin < job->columns; begin += CHUNK) {
    const int64_t count = job->columns - begin < CHUNK ? job->columns - begin : CHUNK;
    mask_chunk(rows, own, begin, count, open);
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

static core_status contrastive_check(const char *op, const kern_contrastive *rows, core_tensor cosine) {
  TRY(kern_check_priv(op, "cosine", &cosine, CORE_REAL_DTYPE, (const int64_t[]){KERN_ANY, KERN_ANY}, 2));
  CHECK(rows->own != NULL || cosine.shape[0] == 0, CORE_ERR_ARGUMENT, "%s: own is absent", op);
  for (int64_t row = 0; row < cosine.shape[0]; row++)
    CHECK(rows->own[row] >= 0 && rows->own[row] < cosine.shape[1], CORE_ERR_ARGUMENT,
          "%s: own[%lld] is %lld, expected 0 to %lld", op, (long long)row, (long long)rows->own[row],
          (long long)cosine.shape[1] - 1);
  return CORE_OK;
}

core_status kern_contrastive_fwd_cpu(kern_context *context, const kern_contrastive *rows, core_tensor cosine,
                                     core_tensor lse, core_tensor positive) {
  TRY(contrastive_check(__func__, rows, cosine));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  KERN_CHECK_REAL(lse, n);
  KERN_CHECK_REAL(positive, n);
  const contrastive_job job = {
      .rows = rows, .columns = columns, .cosine = cosine.data, .lse = lse.data, .positive = positive.data};
  const kern_split split = kern_split_rows(n, columns);
  KERN_FOR_BLOCKS(context, split, block) {
    for (int64_t row = kern_split_at(split, block); row < kern_split_at(split, block + 1); row++) {
      if (row_counts(rows, row))
        contrastive_row(&job, row);
      else
        job.lse[row] = job.positive[row] = 0;
    }
  }
  return CORE_OK;
}

core_status kern_contrastive_bwd_cpu(kern_context *context, const kern_contrastive *rows, double weight,
                                     core_tensor lse_row, core_tensor lse_column, core_tensor cosine,
                                     double *dscale) {
  TRY(contrastive_check(__func__, rows, cosine));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  KERN_CHECK_REAL(lse_row, n);
  KERN_CHECK_REAL(lse_column, columns);
  const contrastive_job job = {.rows = rows,
                               .columns = columns,
                               .cosine = cosine.data,
                               .lse_row = lse_row.data,
                               .lse_column = lse_column.data,
                               .weight = weight};
  double partial[KERN_BLOCKS];
  const kern_split split = kern_split_rows(n, columns);
  KERN_FOR_BLOCKS(context, split, block) {
    partial[block] = 0;
    for (int64_t row = kern_split_at(split, block); row < kern_split_at(split, block + 1); row++) {
      if (row_counts(rows, row))
        partial[block] += contrastive_row_back(&job, row);
      else
        for (int64_t j = 0; j < columns; j++) job.cosine[row * columns + j] = 0;
    }
  }
  for (int64_t block = 0; block < split.count; block++) *dscale += partial[block];
  return CORE_OK;
}
