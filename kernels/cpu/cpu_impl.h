/* Private to kernels/cpu: the context, the splitting of work among threads, the checks and the prototypes of
 * the ops. The context owns all scratch; ops only borrow it during a call. */
#ifndef KERN_CPU_IMPL_H
#define KERN_CPU_IMPL_H

#include "kernels/kernels.h" /* kern_ops, core_real */

/* One binary for any x86-64: the compiler makes three versions of a function and the loader picks one.
 * Only leaf loops carry this: a parallel region is outlined before the cloning and would stay generic.
 * Sanitizers instrument the resolvers, which run before their runtime is up, so there it is off. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__) && defined(__OPTIMIZE__)
#define KERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KERN_CLONES
#endif
/* A helper that must melt into its caller's version. */
#define KERN_INLINE static inline __attribute__((always_inline))

enum {
  KERN_BLOCKS = 64,          /* most blocks that work is split into, hence most useful threads */
  KERN_LANES = 16,           /* elements of a cache line and of the widest vector, as float */
  KERN_QUERY_ROWS = 24,      /* query rows of one attention tile: a usual short segment whole */
  KERN_MAX_HEAD_WIDTH = 256, /* A */
  KERN_MAX_THREADS = 1024
};

/* Extents of a matrix product or of a part of it: c[m,n], k the inner one. */
typedef struct kern_extent {
  int64_t m, n, k;
} kern_extent;

struct kern_context {
  kern_limits limits;
  int32_t threads;
  void *memory;
  core_real *partial;   /* [KERN_BLOCKS][2 * limits.width], gradients of shared vectors by block */
  double *sums;         /* [KERN_BLOCKS][2 * limits.experts + 3] */
  core_real *attention; /* [threads][attention_count], see attention_impl.h */
  int64_t attention_count;
  core_real *product; /* [threads][product_count], see gemm_impl.h */
  int64_t product_count;
  kern_extent tile;  /* of a product whose operands are widened */
  bool bfloat_units; /* the processor multiplies bfloat16 by itself, and the library knows how */
};

static inline int64_t kern_round_lanes(int64_t n) {
  return (n + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
}

/* Splits `items` into at most KERN_BLOCKS contiguous blocks of at least about `grain`. The split depends on
 * the shape alone, so that sums combined block by block do not depend on the number of threads. */
typedef struct kern_split {
  int64_t items, count;
} kern_split;

static inline kern_split kern_split_of(int64_t items, int64_t grain) {
  int64_t count = items / (grain > 0 ? grain : 1);
  if (count > KERN_BLOCKS) count = KERN_BLOCKS;
  return (kern_split){items, count > 0 ? count : 1};
}
static inline int64_t kern_split_at(kern_split split, int64_t block) {
  return split.items / split.count * block + split.items % split.count * block / split.count;
}
/* Rows of `width` elements: blocks of at least 8 Ki elements, below which a thread costs more than it gives.
 */
static inline kern_split kern_split_rows(int64_t rows, int64_t width) {
  return kern_split_of(rows, 8192 / (width > 0 ? width : 1) + 1);
}
/* Elements of a flat array, in whole cache lines: begin and end of a block by kern_line_at. */
static inline kern_split kern_split_lines(int64_t elements) {
  return kern_split_of((elements + KERN_LANES - 1) / KERN_LANES, 8192 / KERN_LANES);
}
static inline int64_t kern_line_at(kern_split split, int64_t block, int64_t elements) {
  const int64_t at = kern_split_at(split, block) * KERN_LANES;
  return at < elements ? at : elements;
}

#define KERN_PRAGMA(text) _Pragma(#text)
/* Runs the following statement for each block of `split`, over the context's threads. */
#define KERN_FOR_BLOCKS(context, split, block)                                                          \
  KERN_PRAGMA(omp parallel for schedule(static) num_threads((context)->threads) if ((split).count > 1)) \
  for (int64_t block = 0; block < (split).count; block++)

/* y[rows, n] = softmax of the rows of x; a row's bits do not depend on its address. y may be x. */
void kern_softmax_rows_priv(const core_real *x, core_real *y, int64_t rows, int64_t n);

/* y[r][i] = x[r][i], bfloat16 to core_real, x_row and y_row elements from row to row, on `threads` threads.
 */
void kern_widen_rows_priv(const uint16_t *x, int64_t x_row, int64_t rows, int64_t columns, core_real *y,
                          int64_t y_row, int32_t threads);
/* y[r][i] = x[r][i] or y[r][i] + x[r][i], rounded once. */
void kern_narrow_rows_priv(const core_real *x, int64_t x_row, int64_t rows, int64_t columns, kern_write write,
                           uint16_t *y, int64_t y_row, int32_t threads);

/* out[i] += sum over blocks, in order, of partial[block * stride + i]. */
void kern_partial_add_priv(const core_real *partial, int64_t blocks, int64_t stride, int64_t n,
                           core_real *out);

/* --- checks (cpu_check.c) --- */
enum { KERN_ANY = -1 };
/* dtype, extents (KERN_ANY: whatever it is, but not negative) and presence. A trailing extent 1 may be left
 * out on either side. Errors: ERR_ARGUMENT; ERR_UNSUPPORTED for bfloat16 where the backend's type is needed.
 */
CORE_NODISCARD core_status kern_check_priv(const char *op, const char *name, const core_tensor *tensor,
                                           core_dtype dtype, const int64_t *shape, int32_t rank);
#define KERN_CHECK(tensor, dtype, ...)                                                       \
  TRY(kern_check_priv(__func__, #tensor, &(tensor), (dtype), (const int64_t[]){__VA_ARGS__}, \
                      (int32_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))))
/* What an Active tensor must be, given what it is: the build in double has no bfloat16. */
static inline core_dtype kern_active_dtype(core_dtype dtype) {
  return dtype == CORE_BFLOAT16 && CORE_REAL_DTYPE == CORE_FLOAT32 ? CORE_BFLOAT16 : CORE_REAL_DTYPE;
}
#define KERN_CHECK_REAL(tensor, ...) KERN_CHECK(tensor, CORE_REAL_DTYPE, __VA_ARGS__)
/* core_real, or bfloat16 in the float build. */
#define KERN_CHECK_ACTIVE(tensor, ...) KERN_CHECK(tensor, kern_active_dtype((tensor).dtype), __VA_ARGS__)
/* Any shape; and the shape and type of another tensor. */
#define KERN_CHECK_ANY(tensor) KERN_CHECK_REAL(tensor, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY)
#define KERN_CHECK_ANY_ACTIVE(tensor) KERN_CHECK_ACTIVE(tensor, KERN_ANY, KERN_ANY, KERN_ANY, KERN_ANY)
#define KERN_CHECK_LIKE(tensor, other) \
  KERN_CHECK(tensor, (other).dtype, (other).shape[0], (other).shape[1], (other).shape[2], (other).shape[3])

/* Every int32 of the tensor lies in [low, high). */
CORE_NODISCARD core_status kern_check_index_priv(const char *op, const char *name, const core_tensor *tensor,
                                                 int64_t low, int64_t high);
#define KERN_CHECK_INDEX(tensor, low, high) \
  TRY(kern_check_index_priv(__func__, #tensor, &(tensor), (low), (high)))
/* offset[0] = 0, ascending, offset[count] = rows. */
CORE_NODISCARD core_status kern_check_offset_priv(const char *op, const char *name, const int64_t *offset,
                                                  int64_t count, int64_t rows);
/* Columns [first, first + n) of `all`. */
CORE_NODISCARD core_status kern_check_columns_priv(const char *op, int64_t first, int64_t n, int64_t all);
/* A size against the limit that the context was made for. */
CORE_NODISCARD core_status kern_check_limit_priv(const char *op, const char *name, int64_t size,
                                                 int64_t limit);

/* --- the ops; contracts in kernels.h --- */
extern const core_device kern_device_cpu_priv;

core_status kern_context_create_cpu(const kern_limits *limits, kern_context **out);
void kern_context_destroy_cpu(kern_context *context);
size_t kern_context_bytes_cpu(const kern_limits *limits);
int32_t kern_context_threads_cpu(const kern_context *context);
core_status kern_gemm_cpu(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                          kern_write write, core_tensor c);
core_status kern_gemm_grouped_cpu(kern_context *context, kern_form form, const int64_t *row, core_tensor a,
                                  core_tensor b, kern_write write, core_tensor c);
core_status kern_bias_fwd_cpu(kern_context *context, core_tensor bias, core_tensor x);
core_status kern_bias_bwd_cpu(kern_context *context, core_tensor dy, core_tensor dbias);
core_status kern_gelu_fwd_cpu(kern_context *context, kern_gelu form, core_tensor x, core_tensor y);
core_status kern_gelu_bwd_cpu(kern_context *context, kern_gelu form, core_tensor dy, core_tensor x,
                              kern_write write, core_tensor dx);
core_status kern_swiglu_fwd_cpu(kern_context *context, core_tensor x, core_tensor y);
core_status kern_swiglu_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, kern_write write,
                                core_tensor dx);
core_status kern_rmsnorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, double epsilon,
                                 core_tensor y, core_tensor inv);
core_status kern_rmsnorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                 core_tensor inv, kern_write write, core_tensor dx, core_tensor dweight);
core_status kern_layernorm_fwd_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   double epsilon, core_tensor y, core_tensor stat);
core_status kern_layernorm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor weight,
                                   core_tensor stat, kern_write write, core_tensor dx, core_tensor dweight,
                                   core_tensor dbias);
core_status kern_rope_cpu(kern_context *context, kern_rotation rotation, int32_t heads, core_tensor position,
                          core_tensor inverse_frequency, core_tensor x);
core_status kern_attention_fwd_cpu(kern_context *context, const kern_attention *attention, core_tensor qkv,
                                   core_tensor out, core_tensor lse);
core_status kern_attention_bwd_cpu(kern_context *context, const kern_attention *attention, core_tensor dout,
                                   core_tensor qkv, core_tensor out, core_tensor lse, core_tensor dqkv);
core_status kern_attention_cross_fwd_cpu(kern_context *context, const kern_cross *cross);
core_status kern_attention_cross_bwd_cpu(kern_context *context, const kern_cross *cross, core_tensor dout,
                                         core_tensor dq, core_tensor dkv);
core_status kern_attention_cached_cpu(kern_context *context, const kern_attention *attention,
                                      core_tensor first, core_tensor length, core_tensor qkv,
                                      core_tensor cache, core_tensor out);
core_status kern_router_logits_cpu(kern_context *context, core_tensor x, core_tensor weight, core_tensor bias,
                                   core_tensor logits);
core_status kern_router_logits_bwd_cpu(kern_context *context, core_tensor dlogits, core_tensor x,
                                       core_tensor weight, kern_write write, core_tensor dx,
                                       core_tensor dweight, core_tensor dbias);
core_status kern_router_noise_cpu(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                  core_tensor key, double sigma, core_tensor noisy);
core_status kern_softmax_fwd_cpu(kern_context *context, core_tensor logits, core_tensor prob);
core_status kern_router_choose_cpu(kern_context *context, kern_gate form, core_tensor logits,
                                   core_tensor prob, core_tensor choice, core_tensor gate);
core_status kern_router_gate_bwd_cpu(kern_context *context, kern_gate form, core_tensor dgate,
                                     core_tensor prob, core_tensor choice, core_tensor gate, kern_write write,
                                     core_tensor dlogits);
core_status kern_router_sums_cpu(kern_context *context, core_tensor logits, core_tensor prob,
                                 core_tensor noisy, core_tensor choice, double sigma, core_tensor sums);
core_status kern_router_sums_bwd_cpu(kern_context *context, core_tensor weights, core_tensor logits,
                                     core_tensor prob, core_tensor noisy, core_tensor choice, double sigma,
                                     core_tensor dlogits);
core_status kern_router_count_cpu(kern_context *context, core_tensor choice, core_tensor slot,
                                  core_tensor count);
core_status kern_softmax_bwd_cpu(kern_context *context, core_tensor dprob, core_tensor prob, kern_write write,
                                 core_tensor dlogits);
core_status kern_router_second_cpu(kern_context *context, core_tensor logits, uint64_t seed, uint64_t stream,
                                   core_tensor key, core_tensor choice);
core_status kern_router_gate_fwd_cpu(kern_context *context, kern_gate form, kern_calibration kind,
                                     core_tensor prob, core_tensor correction, core_tensor choice,
                                     core_tensor gate);
core_status kern_router_calibrated_bwd_cpu(kern_context *context, kern_gate form, kern_calibration kind,
                                           core_tensor dgate, core_tensor prob, core_tensor correction,
                                           core_tensor choice, core_tensor dprob, core_tensor dcorrection);
core_status kern_router_balance_cpu(kern_context *context, core_tensor prob, core_tensor choice,
                                    core_tensor group, int64_t columns, core_tensor sums);
core_status kern_router_balance_bwd_cpu(kern_context *context, core_tensor weights, core_tensor group,
                                        core_tensor prob, core_tensor dlogits);
core_status kern_dispatch_plan_cpu(kern_context *context, core_tensor choice, core_tensor keep,
                                   int64_t experts, int64_t *count, core_tensor slot, core_tensor index);
core_status kern_gather_rows_cpu(kern_context *context, core_tensor x, core_tensor index, core_tensor y);
core_status kern_combine_fwd_cpu(kern_context *context, core_tensor x, core_tensor slot, core_tensor weight,
                                 kern_write write, core_tensor y);
core_status kern_combine_bwd_cpu(kern_context *context, core_tensor dy, core_tensor x, core_tensor slot,
                                 core_tensor weight, core_tensor dx, core_tensor dweight);
core_status kern_segment_mean_fwd_cpu(kern_context *context, kern_segments segments, core_tensor x,
                                      core_tensor y);
core_status kern_segment_mean_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dy,
                                      kern_write write, core_tensor dx);
core_status kern_position_fwd_cpu(kern_context *context, kern_segments segments, core_tensor table,
                                  core_tensor x);
core_status kern_position_bwd_cpu(kern_context *context, kern_segments segments, core_tensor dx,
                                  core_tensor dtable);
core_status kern_l2norm_fwd_cpu(kern_context *context, core_tensor x, core_tensor y, core_tensor norm);
core_status kern_l2norm_bwd_cpu(kern_context *context, core_tensor dy, core_tensor y, core_tensor norm,
                                kern_write write, core_tensor dx);
core_status kern_contrastive_fwd_cpu(kern_context *context, const kern_contrastive *rows, core_tensor cosine,
                                     core_tensor lse, core_tensor positive);
core_status kern_contrastive_bwd_cpu(kern_context *context, const kern_contrastive *rows, double weight,
                                     core_tensor lse_row, core_tensor lse_column, core_tensor cosine,
                                     core_tensor dscale);
core_status kern_cross_entropy_fwd_cpu(kern_context *context, core_tensor logits, int64_t first, int64_t all,
                                       core_tensor target, core_tensor lse, core_tensor positive);
core_status kern_cross_entropy_bwd_cpu(kern_context *context, double weight, core_tensor lse, int64_t first,
                                       int64_t all, core_tensor target, core_tensor logits,
                                       core_tensor dlogits);
core_status kern_embedding_bwd_cpu(kern_context *context, kern_segments segments, core_tensor row,
                                   core_tensor entry, core_tensor dx, core_tensor dtable);
core_status kern_standardize_cpu(kern_context *context, core_tensor x, core_tensor shift, core_tensor scale,
                                 core_tensor y);
core_status kern_adamw_cpu(kern_context *context, const kern_adamw *list, int64_t n, core_tensor gradient,
                           core_tensor parameter, core_tensor m, core_tensor v, core_tensor copy);
core_status kern_sum_squares_cpu(kern_context *context, core_tensor x, core_tensor out);
core_status kern_cast_cpu(kern_context *context, core_tensor x, core_tensor y);
core_status kern_axpy_cpu(kern_context *context, double alpha, core_tensor x, core_tensor y);
core_status kern_scale_cpu(kern_context *context, double alpha, core_tensor x);
core_status kern_fill_cpu(kern_context *context, double value, core_tensor x);
core_status kern_bias_grouped_fwd_cpu(kern_context *context, const int64_t *row, core_tensor bias,
                                      core_tensor x);
core_status kern_bias_grouped_bwd_cpu(kern_context *context, const int64_t *row, core_tensor dy,
                                      core_tensor dbias);
core_status kern_dropout_cpu(kern_context *context, uint64_t seed, uint64_t stream, double rate,
                             core_tensor key, core_tensor slot, core_tensor x);
core_status kern_regression_cpu(kern_context *context, kern_regression kind, double weight,
                                core_tensor prediction, core_tensor target, core_tensor valid,
                                core_tensor loss, core_tensor dprediction);

#endif
