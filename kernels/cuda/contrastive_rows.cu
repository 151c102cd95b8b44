/* Rows of a contrastive loss over all keys of the global batch, with masks. A block takes ROWS rows, so that
 * what is known of a column is read once for all of them, and reads their logits once, by an online
 * logsumexp. */
#include "cuda_math.cuh"

enum { ROWS = 4 }; /* as many as own_sample is called for */

struct contrastive_mask {
  float scale;
  int64_t first, rows, columns;
  const uint8_t *valid;
  const int32_t *label; /* or NULL */
  const uint64_t *id;   /* or NULL */
};

/* What masks look at, of one sample. */
struct contrastive_sample {
  int64_t at;
  bool valid;
  int32_t label; /* -1: none */
  uint64_t id;

  /* Past the end: a sample that is not valid. */
  __device__ contrastive_sample(const contrastive_mask &mask, int64_t column) : at(column) {
    valid = column < mask.columns && mask.valid[column] != 0;
    label = valid && mask.label != NULL ? mask.label[column] : -1;
    id = valid && mask.id != NULL ? mask.id[column] : 0;
  }
  /* True where `other` takes part in the softmax of the row whose positive this is. */
  __device__ bool sees(const contrastive_sample &other, bool by_id) const {
    if (other.at == at) return true;
    return other.valid && !(label >= 0 && other.label == label) && !(by_id && other.id == id);
  }
};

/* The positives of the block's rows; rows past the end count as invalid ones. */
static __device__ __forceinline__ contrastive_sample own_sample(const contrastive_mask &mask, int r) {
  const int64_t row = (int64_t)blockIdx.x * ROWS + r;
  return contrastive_sample(mask, row < mask.rows ? mask.first + row : mask.columns);
}

static __global__ void __launch_bounds__(KERN_BLOCK)
    contrastive_forward(contrastive_mask mask, const float *cosine, float *lse, float *positive) {
  const contrastive_sample own[ROWS] = {own_sample(mask, 0), own_sample(mask, 1), own_sample(mask, 2),
                                        own_sample(mask, 3)};
  const float *const x = cosine + (int64_t)blockIdx.x * ROWS * mask.columns;
  kern_logsum sum[ROWS];
  for (int64_t j = threadIdx.x; j < mask.columns; j += 2 * KERN_BLOCK) {
    const contrastive_sample one(mask, j), two(mask, j + KERN_BLOCK);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (!own[r].valid) continue;
      float logit[2] = {-INFINITY, -INFINITY};
      if (own[r].sees(one, mask.id != NULL)) logit[0] = mask.scale * x[r * mask.columns + one.at];
      if (two.at < mask.columns && own[r].sees(two, mask.id != NULL))
        logit[1] = mask.scale * x[r * mask.columns + two.at];
      sum[r].add(logit);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64_t row = (int64_t)blockIdx.x * ROWS + r;
    const kern_logsum all = kern_team_logsum<KERN_BLOCK>(sum[r]);
    if (threadIdx.x != 0 || row >= mask.rows) continue;
    lse[row] = own[r].valid ? all.value() : 0.0f;
    positive[row] = own[r].valid ? mask.scale * x[r * mask.columns + own[r].at] : 0.0f;
  }
}

/* dscale: [rows], the row's part. The diagonal's -1 belongs to both directions. */
static __global__ void __launch_bounds__(KERN_BLOCK)
    contrastive_backward(contrastive_mask mask, double weight, const float *lse_row, const float *lse_column,
                         float *cosine, double *dscale) {
  const contrastive_sample own[ROWS] = {own_sample(mask, 0), own_sample(mask, 1), own_sample(mask, 2),
                                        own_sample(mask, 3)};
  const int64_t first = (int64_t)blockIdx.x * ROWS;
  const int rows = (int)kern_least(ROWS, mask.rows - first);
  float *const x = cosine + first * mask.columns;
  const float factor = (float)(weight * (double)mask.scale);
  double part[ROWS] = {};
  for (int64_t j = threadIdx.x; j < mask.columns; j += KERN_BLOCK) {
    const contrastive_sample column(mask, j);
    const float lse = lse_column[j];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) break;
      const bool open = own[r].valid && own[r].sees(column, mask.id != NULL);
      const float c = x[r * mask.columns + j], logit = mask.scale * c;
      const float diagonal = open && j == own[r].at ? 1.0f : 0.0f;
      const float along = open ? expf(logit - lse_row[first + r]) : 0.0f,
                  across = open ? expf(logit - lse) : 0.0f;
      part[r] += (double)(along - diagonal) * (double)c;
      x[r * mask.columns + j] = factor * (along + across - 2.0f * diagonal);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const double sum = kern_team_sum<KERN_BLOCK>(part[r]);
    if (threadIdx.x == 0 && r < rows) dscale[first + r] = weight * sum;
  }
}

static core_status contrastive_checked(const char *op, const kern_contrastive *rows, core_tensor cosine) {
  TRY(kern_check_cuda_priv(op, "cosine", cosine, CORE_FLOAT32, {KERN_ANY, KERN_ANY}));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  TRY(kern_check_cuda_priv(op, "valid", rows->valid, CORE_UINT8, {columns}));
  if (rows->label.data != NULL) TRY(kern_check_cuda_priv(op, "label", rows->label, CORE_INT32, {columns}));
  if (rows->id.data != NULL) TRY(kern_check_cuda_priv(op, "id", rows->id, CORE_UINT64, {columns}));
  CHECK(rows->first >= 0 && rows->first <= columns - n, CORE_ERR_ARGUMENT,
        "%s: %lld rows whose own columns begin at %lld of %lld", op, (long long)n, (long long)rows->first,
        (long long)columns);
  return CORE_OK;
}

static contrastive_mask mask_of(const kern_contrastive *rows, int64_t n, int64_t columns) {
  return contrastive_mask{(float)rows->scale,
                          rows->first,
                          n,
                          columns,
                          kern_data<const uint8_t>(rows->valid),
                          kern_data<const int32_t>(rows->label),
                          kern_data<const uint64_t>(rows->id)};
}

core_status kern_contrastive_fwd_cuda(kern_context *context, const kern_contrastive *rows, core_tensor cosine,
                                      core_tensor lse, core_tensor positive) {
  TRY(contrastive_checked(__func__, rows, cosine));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  KERN_CHECK_REAL(lse, n);
  KERN_CHECK_REAL(positive, n);
  KERN_LAUNCH(context, kern_grid(kern_divide_up(n, ROWS), dim3(KERN_BLOCK)), contrastive_forward,
              mask_of(rows, n, columns), kern_data<const float>(cosine), kern_data<float>(lse),
              kern_data<float>(positive));
  return CORE_OK;
}

core_status kern_contrastive_bwd_cuda(kern_context *context, const kern_contrastive *rows, double weight,
                                      core_tensor lse_row, core_tensor lse_column, core_tensor cosine,
                                      core_tensor dscale) {
  TRY(contrastive_checked(__func__, rows, cosine));
  const int64_t n = cosine.shape[0], columns = cosine.shape[1];
  KERN_CHECK_REAL(lse_row, n);
  KERN_CHECK_REAL(lse_column, columns);
  KERN_CHECK(dscale, CORE_FLOAT64, 1);
  KERN_CHECK_LIMIT("a block of rows", n, context->limits.segments);
  if (n == 0) return CORE_OK;
  KERN_LAUNCH(context, kern_grid(kern_divide_up(n, ROWS), dim3(KERN_BLOCK)), contrastive_backward,
              mask_of(rows, n, columns), weight, kern_data<const float>(lse_row),
              kern_data<const float>(lse_column), kern_data<float>(cosine), context->sums);
  TRY(kern_sum_doubles_priv(context, context->sums, n, kern_data<double>(dscale)));
  return CORE_OK;
}
