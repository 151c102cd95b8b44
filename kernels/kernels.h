/* Every computation on a device: one op table, implemented in cpu/ (the specification) and, file for file,
 * in cuda/. Callers hold a `const kern_ops *` and never ask which one it is.
 *
 * Conventions
 *   - Tensors are contiguous row-major core_tensor by value; an optional tensor is absent when data == NULL.
 *     Shapes and dtypes are checked by every op (ERR_ARGUMENT names op, argument and sizes).
 *   - core_real tensors have dtype CORE_REAL_DTYPE. The table already carries bfloat16 in its types: an op
 * that does not implement a dtype returns ERR_UNSUPPORTED, never a silent conversion.
 *   - Gradients of parameters are always ACCUMULATED. Gradients of activations follow `kern_write`: KERN_SET
 *     overwrites, KERN_ADD accumulates.
 *   - Zero rows, zero segments and zero experts rows are legal in every op.
 *   - Deterministic: fixed summation order for given shapes and thread count; no atomics on floats.
 *   - Local: no op communicates. Ops of one context run in order; a context belongs to one thread at a time.
 *   - offset / group arrays (int64, host memory) are read during the call only.
 *   - No op allocates: scratch comes from the context and was sized at creation. (The CPU's GEMM library
 * takes and returns its own packing buffer within a call.)
 *   - A trailing extent of 1 may be left out: [T] and [T,1] are the same shape.
 * Dimension letters: core/dims.h. */
#ifndef KERN_KERNELS_H
#define KERN_KERNELS_H

#include "core/device.h"
#include "core/dims.h"
#include "core/status.h"
#include "core/tensor.h" /* core_tensor, core_real */

typedef struct kern_context kern_context;

typedef enum kern_write { KERN_SET, KERN_ADD } kern_write;
/* C = op(A) op(B): NT is a linear layer's forward (weights are [out, in]), NN its input gradient, TN its
 * weight gradient. */
typedef enum kern_form { KERN_NN, KERN_NT, KERN_TN } kern_form;
typedef enum kern_gelu { KERN_GELU_ERF, KERN_GELU_TANH } kern_gelu;
typedef enum kern_mask { KERN_BIDIRECTIONAL, KERN_CAUSAL } kern_mask;
typedef enum kern_gate { KERN_GATE_SOFTMAX, KERN_GATE_RENORMALISED } kern_gate;
typedef enum kern_rotation { KERN_ROTATE, KERN_ROTATE_BACK } kern_rotation;

/* Largest sizes that a context will meet, to size its scratch. */
typedef struct kern_limits {
  int64_t rows;     /* T, or rows of expert buffers */
  int64_t width;    /* largest of C, 2F, D, Z, (H + 2G) A */
  int64_t experts;  /* E */
  int64_t sequence; /* longest segment */
  int64_t heads;    /* H */
  int32_t threads;  /* 0: all that OpenMP offers */
} kern_limits;

/* Sequences of one packed tensor. offset: int64 [segments + 1], host. */
typedef struct kern_segments {
  const int64_t *offset;
  int64_t count;
} kern_segments;

typedef struct kern_attention {
  kern_segments segments;
  int32_t heads, kv_heads; /* H, G; G divides H; query head h uses key/value head h / (H / G) */
  int32_t head_width;      /* A */
  kern_mask mask;
  double scale; /* usually 1 / sqrt(A) */
} kern_attention;

/* Sums over the tokens of one modality in one layer, all from noise-free logits unless said. Additive over
 * ranks and micro-batches: all-reduce them, then form losses (trainer/objective). */
typedef struct kern_router_sums {
  double tokens;
  double z;       /* sum of logsumexp(logits)^2 */
  double entropy; /* sum of H(p), natural log */
  double *prob;   /* [E] sum of p_e */
  double *load;   /* [E] sum of 1 - Phi((thr - logit_e) / sigma), thr the K-th largest noisy logit; untouched
                     when sigma = 0 */
} kern_router_sums;

/* Derivatives of the total loss with respect to those sums, for the same tokens. */
typedef struct kern_router_weights {
  double z, entropy;
  const double *prob; /* [E] or NULL */
  const double *load; /* [E] or NULL */
  double sigma;       /* deviation of the router noise; 0: no load term */
} kern_router_weights;

/* One direction of a contrastive pair on a block of rows: cosine[n, B] between n queries and all B keys of
 * the global batch. */
typedef struct kern_contrastive {
  double scale;       /* 1 / temperature */
  const int64_t *own; /* [n] column of the row's own positive */
  const uint8_t
      *valid; /* [B] sample has both modalities of the pair; a row is valid iff valid[own]; NULL: all */
  const int32_t
      *label; /* [B] samples of equal label >= 0 are masked, except the positive itself; NULL: none */
  const uint64_t
      *id; /* [B] samples of equal id are masked likewise (a batch across an epoch's end); NULL: none */
} kern_contrastive;

typedef struct kern_adamw {
  double rate, beta1, beta2, epsilon, decay;
  double correction1, correction2; /* 1 - beta^t of this parameter's own step count */
  double gradient_scale;           /* clipping factor; 1 when not clipped */
} kern_adamw;

typedef struct kern_ops {
  const char *name;          /* "cpu", "cuda" */
  const core_device *device; /* where tensors of this table live */

  core_status (*context_create)(const kern_limits *limits, kern_context **out);
  void (*context_destroy)(kern_context *context);
  /* Bytes that context_create will allocate for these limits. */
  size_t (*context_bytes)(const kern_limits *limits);
  int32_t (*context_threads)(const kern_context *context);

  /* c = op(a) op(b) + (write == KERN_ADD ? c : 0). NN: a[m,k] b[k,n]; NT: a[m,k] b[n,k]; TN: a[k,m] b[k,n].
   */
  core_status (*gemm)(kern_context *, kern_form, core_tensor a, core_tensor b, kern_write, core_tensor c);
  /* One matrix product per group g of rows [row[g], row[g+1]); row: int64 [groups + 1], host.
   * NT: a[R,k] b[G,n,k] c[R,n]; NN: a[R,n] b[G,n,k] c[R,k]; TN: a[R,n] b[R,k] c[G,n,k]. */
  core_status (*gemm_grouped)(kern_context *, kern_form, const int64_t *row, core_tensor a, core_tensor b,
                              kern_write, core_tensor c);
  /* x[T,C] += bias[C], in place; and dbias[C] += sum over rows of dy. */
  core_status (*bias_fwd)(kern_context *, core_tensor bias, core_tensor x);
  core_status (*bias_bwd)(kern_context *, core_tensor dy, core_tensor dbias);

  /* Hendrycks and Gimpel 2016: y = x Phi(x), or the tanh form. dx from x. y may alias x in forward only if
   * x is not needed again; dx may alias dy. */
  core_status (*gelu_fwd)(kern_context *, kern_gelu, core_tensor x, core_tensor y);
  core_status (*gelu_bwd)(kern_context *, kern_gelu, core_tensor dy, core_tensor x, kern_write,
                          core_tensor dx);
  /* Shazeer 2020: x[T,2F] = [gate | up], y[T,F] = silu(gate) * up. */
  core_status (*swiglu_fwd)(kern_context *, core_tensor x, core_tensor y);
  core_status (*swiglu_bwd)(kern_context *, core_tensor dy, core_tensor x, kern_write, core_tensor dx);

  /* Zhang and Sennrich 2019: y = x * inv * weight, inv[T] = 1 / sqrt(mean(x^2) + epsilon). */
  core_status (*rmsnorm_fwd)(kern_context *, core_tensor x, core_tensor weight, double epsilon, core_tensor y,
                             core_tensor inv);
  core_status (*rmsnorm_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor weight,
                             core_tensor inv, kern_write, core_tensor dx, core_tensor dweight);
  /* Ba, Kiros, Hinton 2016, population variance. stat[T,2] = (mean, 1 / sqrt(var + epsilon)). */
  core_status (*layernorm_fwd)(kern_context *, core_tensor x, core_tensor weight, core_tensor bias,
                               double epsilon, core_tensor y, core_tensor stat);
  core_status (*layernorm_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor weight,
                               core_tensor stat, kern_write, core_tensor dx, core_tensor dweight,
                               core_tensor dbias);

  /* Su et al. 2021, pairs (i, i + A/2). Rotates, in place, the first `heads` heads of every row of
   * x[T, width]; position: int32 [T]; inverse_frequency: core_real [A/2]. */
  core_status (*rope)(kern_context *, kern_rotation, int32_t heads, core_tensor position,
                      core_tensor inverse_frequency, core_tensor x);
  /* Vaswani et al. 2017 on packed segments. qkv[T, (H + 2G) A] = [q | k | v]; out[T, H A]; lse[T, H] the
   * logarithm of each softmax's denominator. dqkv is set. */
  core_status (*attention_fwd)(kern_context *, const kern_attention *, core_tensor qkv, core_tensor out,
                               core_tensor lse);
  core_status (*attention_bwd)(kern_context *, const kern_attention *, core_tensor dout, core_tensor qkv,
                               core_tensor out, core_tensor lse, core_tensor dqkv);

  /* logits[T,E] = x[T,C] weight[E,C]^T + bias[E]: row by row in one fixed order, so that a row's logits
   * never depend on how many rows lie beside it. bias optional. (Gradients: gemm.) */
  core_status (*router_logits)(kern_context *, core_tensor x, core_tensor weight, core_tensor bias,
                               core_tensor logits);
  /* noisy[t,e] = logits[t,e] + sigma * normal(seed, stream, key[t] * E + e); key: uint64 [T]. */
  core_status (*router_noise)(kern_context *, core_tensor logits, uint64_t seed, uint64_t stream,
                              core_tensor key, double sigma, core_tensor noisy);
  /* prob[T,E] = softmax(logits). */
  core_status (*softmax_fwd)(kern_context *, core_tensor logits, core_tensor prob);
  /* The K largest logits of each row, largest first, ties by lower expert: choice int32 [T,K]; gate[T,K] =
   * prob of the chosen, or the softmax of the chosen logits. K <= min(E, CORE_MAX_CHOICES). NaN ranks as
   * -infinity, so an index is always in range. prob is not read for KERN_GATE_RENORMALISED. */
  core_status (*router_choose)(kern_context *, kern_gate, core_tensor logits, core_tensor prob,
                               core_tensor choice, core_tensor gate);
  /* dlogits[T,E] from dgate[T,K]. */
  core_status (*router_gate_bwd)(kern_context *, kern_gate, core_tensor dgate, core_tensor prob,
                                 core_tensor choice, core_tensor gate, kern_write, core_tensor dlogits);
  /* Adds to *sums the sums over these rows. logits and prob noise-free; noisy == logits when noise is off
   * (then load is not counted). choice int32 [T,K] was made from noisy. */
  core_status (*router_sums)(kern_context *, core_tensor logits, core_tensor prob, core_tensor noisy,
                             core_tensor choice, double sigma, kern_router_sums *sums);
  /* dlogits += gradient of the losses whose derivatives by the sums are given; through thr too. */
  core_status (*router_sums_bwd)(kern_context *, const kern_router_weights *, core_tensor logits,
                                 core_tensor prob, core_tensor noisy, core_tensor choice,
                                 core_tensor dlogits);

  /* Plan of a dispatch: the kept choices sorted by expert, then token, then choice. count: int64 [experts],
   * host; slot int32 [T,K]: row of each choice, -1 where keep (uint8 [T,K], optional) is 0; index int32 [>= T
   * K]: source token of each row. */
  core_status (*dispatch_plan)(kern_context *, core_tensor choice, core_tensor keep, int64_t experts,
                               int64_t *count, core_tensor slot, core_tensor index);
  /* y[R,C] = rows of x[T,C] named by index int32 [R]. */
  core_status (*gather_rows)(kern_context *, core_tensor x, core_tensor index, core_tensor y);
  /* y[t] = sum over k of weight[t,k] x[slot[t,k]]; slot int32 [T,K] rows of x[R,C], -1 none; weight optional
   * (then 1), sum in order of k. This is the combine, and without weights the gradient of gather_rows. */
  core_status (*combine_fwd)(kern_context *, core_tensor x, core_tensor slot, core_tensor weight, kern_write,
                             core_tensor y);
  /* dx[slot[t,k]] = weight[t,k] dy[t] (rows no slot names are left alone); dweight[t,k] = <dy[t], x[slot]>, 0
   * where slot is -1. Slots are distinct. dx may alias x. weight and dweight optional. */
  core_status (*combine_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor slot,
                             core_tensor weight, core_tensor dx, core_tensor dweight);

  /* y[S,C] = mean of each segment's rows; zeros for an empty one. */
  core_status (*segment_mean_fwd)(kern_context *, kern_segments, core_tensor x, core_tensor y);
  core_status (*segment_mean_bwd)(kern_context *, kern_segments, core_tensor dy, kern_write, core_tensor dx);
  /* x[offset[s] + i] += table[i], i < length of s <= rows of table; and dtable[i] += sum over s of dx. */
  core_status (*position_fwd)(kern_context *, kern_segments, core_tensor table, core_tensor x);
  core_status (*position_bwd)(kern_context *, kern_segments, core_tensor dx, core_tensor dtable);
  /* y = x / max(|x|, 1e-12), norm[S] = |x|. */
  core_status (*l2norm_fwd)(kern_context *, core_tensor x, core_tensor y, core_tensor norm);
  core_status (*l2norm_bwd)(kern_context *, core_tensor dy, core_tensor y, core_tensor norm, kern_write,
                            core_tensor dx);

  /* lse[n] = log sum over unmasked columns of exp(scale cosine); positive[n] = scale cosine[i, own]. Invalid
   * rows give 0 and 0. Radford et al. 2021 with masks. */
  core_status (*contrastive_fwd)(kern_context *, const kern_contrastive *, core_tensor cosine,
                                 core_tensor lse, core_tensor positive);
  /* In place cosine -> d loss / d cosine for this row block, where loss = weight * sum over valid samples of
   * (lse_row - positive) + (lse_column - positive): both directions' terms that contain these rows' logits.
   * lse_column[B]: of the opposite direction, all samples. *dscale += the gradient by `scale` of the ROW
   * direction only (so that summing over all row blocks of both directions counts each term once). */
  core_status (*contrastive_bwd)(kern_context *, const kern_contrastive *, double weight, core_tensor lse_row,
                                 core_tensor lse_column, core_tensor cosine, double *dscale);
  /* Per row of logits[T,V]: loss[T] = lse - logit[target], lse[T]; target int32 [T], -1 = not counted (0). */
  core_status (*cross_entropy_fwd)(kern_context *, core_tensor logits, core_tensor target, core_tensor lse,
                                   core_tensor loss);
  /* In place logits -> weight * (softmax - onehot); zero rows where target is -1. */
  core_status (*cross_entropy_bwd)(kern_context *, double weight, core_tensor lse, core_tensor target,
                                   core_tensor logits);

  /* y[T,D] = (x - shift[D]) * scale[D]; x float32, float16, bfloat16 or core_real; y core_real. */
  core_status (*standardize)(kern_context *, core_tensor x, core_tensor shift, core_tensor scale,
                             core_tensor y);
  /* Loshchilov and Hutter 2019 (decoupled decay times rate), all same-shaped core_real, in place. */
  core_status (*adamw)(kern_context *, const kern_adamw *, core_tensor gradient, core_tensor parameter,
                       core_tensor m, core_tensor v);
  /* *out = sum of squares, in double, fixed order. */
  core_status (*sum_squares)(kern_context *, core_tensor x, double *out);
  /* y += alpha x; x *= alpha; x = value. */
  core_status (*axpy)(kern_context *, double alpha, core_tensor x, core_tensor y);
  core_status (*scale)(kern_context *, double alpha, core_tensor x);
  core_status (*fill)(kern_context *, double value, core_tensor x);
} kern_ops;

/* The CPU backend; always there. */
const kern_ops *kern_cpu(void);
/* Backend by name: "cpu"; "cuda" where it was built and a device is present; "auto" the best of these.
 * Errors: ERR_UNSUPPORTED, saying what is missing. */
CORE_NODISCARD core_status kern_select(const char *name, const kern_ops **out);

#endif
