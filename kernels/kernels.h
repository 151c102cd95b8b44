/* Every computation on a device: one op table, implemented in cpu/ (the specification) and, file for file,
 * in cuda/. Callers hold a `const kern_ops *` and never ask which one it is.
 *
 * Memory
 *   - Every core_tensor lies in memory of the table's device. Plain pointers (`offset`, `row`, `count`,
 * lists) are host memory, read or written during the call only.
 *   - Ops of one context run in order on the device's main stream and may return before they are done. The
 *     host sees results after device->copy to host memory, or device->stream_wait(NULL). Only dispatch_plan
 *     waits by itself.
 *   - Tensors are contiguous row-major core_tensor by value; an optional tensor is absent when data == NULL.
 *
 * Types
 *   - "Real" is CORE_REAL_DTYPE (float32; double in the build that checks gradients).
 *   - "Active" is Real or BFLOAT16: activations, their gradients and the matrices they are multiplied with.
 *     All Active tensors of one call have one dtype unless the op says otherwise. Sums, exponentials and
 * norms are computed in float32 inside, and rounded once, to nearest even, when an Active tensor is written.
 *   - Everything not called Active below is Real: parameters of norms and biases, router, statistics, logits,
 *     gates, losses, gradients of parameters.
 *   - A dtype that an op does not take is ERR_UNSUPPORTED, never a silent conversion.
 *
 * Conventions
 *   - Shapes and dtypes are checked by every op (ERR_ARGUMENT names op, argument and sizes). Indices that lie
 * in device memory are checked before use by the CPU; another backend may report a bad one at a later call or
 *     wait, but never touches memory outside the tensors.
 *   - Gradients of parameters are always ACCUMULATED. Those of norms and of the router may be absent: the
 *     parameter is frozen, and what only they need is not computed. Gradients of activations follow
 * `kern_write`: KERN_SET overwrites, KERN_ADD accumulates.
 *   - Zero rows, zero segments and zero expert rows are legal in every op.
 *   - Deterministic: fixed summation order for given shapes and thread count; no atomics on floats.
 *   - Local: no op communicates. A context belongs to one thread at a time.
 *   - No op allocates: scratch comes from the context and was sized at creation. (The CPU's GEMM library
 *     takes and returns its own packing buffer within a call.)
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
/* How a correction c changes the weight p of a chosen expert (Zhong et al. 2024): p + c, or p (1 + c). */
typedef enum kern_calibration { KERN_CALIBRATE_ADD, KERN_CALIBRATE_MULTIPLY } kern_calibration;
typedef enum kern_rotation { KERN_ROTATE, KERN_ROTATE_BACK } kern_rotation;
/* |p - t|^2 of a row, or the mean over its coordinates of the smooth absolute difference (Girshick 2015, beta
 * 1): d^2 / 2 where |d| < 1, |d| - 1/2 elsewhere. */
typedef enum kern_regression { KERN_SQUARED, KERN_SMOOTH_L1 } kern_regression;

/* Largest sizes that a context will meet, to size its scratch. */
typedef struct kern_limits {
  int64_t rows;     /* T, or rows of expert buffers */
  int64_t width;    /* largest of C, 2F, D, Z, (H + 2G) A */
  int64_t experts;  /* E */
  int64_t sequence; /* longest segment */
  int64_t segments; /* S, or rows of a block of contrastive logits */
  int64_t heads;    /* H */
  int64_t updates;  /* entries of one adamw list */
  int32_t threads;  /* 0: all that OpenMP offers */
} kern_limits;

/* Sequences of one packed tensor. */
typedef struct kern_segments {
  const int64_t *offset; /* [count + 1], host */
  core_tensor
      device_offset; /* int64 [count + 1], the same numbers in device memory; the CPU does not read it */
  int64_t count;
} kern_segments;

typedef struct kern_attention {
  kern_segments segments;
  int32_t heads, kv_heads; /* H, G; G divides H; query head h uses key/value head h / (H / G) */
  int32_t head_width;      /* A */
  kern_mask mask;
  double scale; /* usually 1 / sqrt(A) */
} kern_attention;

/* Attention of the queries of one packed tensor to keys and values of another: segment s of
 * attention.segments, over the rows of q, to segment s of `keys`, over the rows of kv. As many segments of
 * both; one with queries has keys. No mask. */
typedef struct kern_cross {
  kern_attention attention;
  kern_segments keys;
  core_tensor q, kv;    /* [T, H A]; [R, 2 G A] = [k | v]; Active */
  core_tensor out, lse; /* [T, H A], Active; [T, H], Real: as attention_fwd */
} kern_cross;

/* Sums over the tokens of one modality in one layer, float64 [3 + 2 E] = tokens, sum of logsumexp(logits)^2,
 * sum of H(p) (natural log), sum of p_e [E], sum of 1 - Phi((thr - logit_e) / sigma) [E] with thr the K-th
 * largest noisy logit. Noise-free logits but for thr. Additive over ranks and micro-batches: all-reduce them,
 * then form losses (trainer/objective). A tensor of the same shape carries the derivatives of the loss by
 * them (entry 0 is not read). */
static inline int64_t kern_router_sums_count(int64_t experts) {
  return 3 + 2 * experts;
}

/* One direction of a contrastive pair on a block of rows: cosine[n, B] between n queries and all B keys of
 * the global batch. */
typedef struct kern_contrastive {
  double scale;      /* 1 / temperature */
  int64_t first;     /* row i's own positive is column first + i */
  core_tensor valid; /* uint8 [B] sample has both modalities of the pair; a row is valid iff its own is */
  core_tensor
      label; /* int32 [B] samples of equal label >= 0 are masked, except the positive itself; optional */
  core_tensor
      id; /* uint64 [B] samples of equal id are masked likewise (a batch across an epoch's end); optional */
} kern_contrastive;

/* Update of one range of flat arrays. */
typedef struct kern_adamw {
  int64_t first, count; /* elements */
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
   * a, b Active; c of their dtype or Real. Accumulated in float32. */
  core_status (*gemm)(kern_context *, kern_form, core_tensor a, core_tensor b, kern_write, core_tensor c);
  /* One matrix product per group g of rows [row[g], row[g+1]); row: int64 [groups + 1], host.
   * NT: a[R,k] b[G,n,k] c[R,n]; NN: a[R,n] b[G,n,k] c[R,k]; TN: a[R,n] b[R,k] c[G,n,k]. Types as gemm. */
  core_status (*gemm_grouped)(kern_context *, kern_form, const int64_t *row, core_tensor a, core_tensor b,
                              kern_write, core_tensor c);
  /* x[T,C] += bias[C], in place; and dbias[C] += sum over rows of dy. x, dy Active. */
  core_status (*bias_fwd)(kern_context *, core_tensor bias, core_tensor x);
  core_status (*bias_bwd)(kern_context *, core_tensor dy, core_tensor dbias);

  /* All Active. Hendrycks and Gimpel 2016: y = x Phi(x), or the tanh form. dx from x. y may alias x in
   * forward only if x is not needed again; dx may alias dy. */
  core_status (*gelu_fwd)(kern_context *, kern_gelu, core_tensor x, core_tensor y);
  core_status (*gelu_bwd)(kern_context *, kern_gelu, core_tensor dy, core_tensor x, kern_write,
                          core_tensor dx);
  /* All Active. Shazeer 2020: x[T,2F] = [gate | up], y[T,F] = silu(gate) * up. */
  core_status (*swiglu_fwd)(kern_context *, core_tensor x, core_tensor y);
  core_status (*swiglu_bwd)(kern_context *, core_tensor dy, core_tensor x, kern_write, core_tensor dx);

  /* Zhang and Sennrich 2019: y = x * inv * weight, inv[T] = 1 / sqrt(mean(x^2) + epsilon). x, y, dy, dx
   * Active.
   */
  core_status (*rmsnorm_fwd)(kern_context *, core_tensor x, core_tensor weight, double epsilon, core_tensor y,
                             core_tensor inv);
  core_status (*rmsnorm_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor weight,
                             core_tensor inv, kern_write, core_tensor dx, core_tensor dweight);
  /* Ba, Kiros, Hinton 2016, population variance. stat[T,2] = (mean, 1 / sqrt(var + epsilon)). x, y, dy, dx
   * Active. */
  core_status (*layernorm_fwd)(kern_context *, core_tensor x, core_tensor weight, core_tensor bias,
                               double epsilon, core_tensor y, core_tensor stat);
  core_status (*layernorm_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor weight,
                               core_tensor stat, kern_write, core_tensor dx, core_tensor dweight,
                               core_tensor dbias);

  /* Su et al. 2021, pairs (i, i + A/2). Rotates, in place, the first `heads` heads of every row of
   * x[T, width], Active; position: int32 [T]; inverse_frequency [A/2]. */
  core_status (*rope)(kern_context *, kern_rotation, int32_t heads, core_tensor position,
                      core_tensor inverse_frequency, core_tensor x);
  /* Vaswani et al. 2017 on packed segments. qkv[T, (H + 2G) A] = [q | k | v]; out[T, H A]; lse[T, H] the
   * logarithm of each softmax's denominator. dqkv is set. All Active but lse. */
  core_status (*attention_fwd)(kern_context *, const kern_attention *, core_tensor qkv, core_tensor out,
                               core_tensor lse);
  core_status (*attention_bwd)(kern_context *, const kern_attention *, core_tensor dout, core_tensor qkv,
                               core_tensor out, core_tensor lse, core_tensor dqkv);

  /* The same between two tensors; sets out and lse. dout, dq, dkv like out, q, kv; dq and dkv are set, also
   * for keys that nobody asks. */
  core_status (*attention_cross_fwd)(kern_context *, const kern_cross *);
  core_status (*attention_cross_bwd)(kern_context *, const kern_cross *, core_tensor dout, core_tensor dq,
                                     core_tensor dkv);

  /* One query a row against rows that are kept: q of qkv[n, (H + 2G) A] and the k and v of rows [first[i],
   * first[i] + length[i]) of cache[R, (H + 2G) A], whose q is not read; int32 [n] both. out[n, H A]; 0 where
   * nothing is kept. segments and mask are not read. All Active. */
  core_status (*attention_cached)(kern_context *, const kern_attention *, core_tensor first,
                                  core_tensor length, core_tensor qkv, core_tensor cache, core_tensor out);

  /* logits[T,E] = x[T,C] weight[E,C]^T + bias[E]: row by row in one fixed order, so that a row's logits
   * never depend on how many rows lie beside it. bias optional. x Active. */
  core_status (*router_logits)(kern_context *, core_tensor x, core_tensor weight, core_tensor bias,
                               core_tensor logits);
  /* dx[T,C] from dlogits[T,E]; dweight and dbias, each optional, accumulate. Products in float32. x, dx
   * Active. */
  core_status (*router_logits_bwd)(kern_context *, core_tensor dlogits, core_tensor x, core_tensor weight,
                                   kern_write, core_tensor dx, core_tensor dweight, core_tensor dbias);
  /* noisy[t,e] = logits[t,e] + sigma * normal(seed, stream, key[t] * E + e); key: uint64 [T]. */
  core_status (*router_noise)(kern_context *, core_tensor logits, uint64_t seed, uint64_t stream,
                              core_tensor key, double sigma, core_tensor noisy);
  /* prob[T,E] = softmax(logits). */
  core_status (*softmax_fwd)(kern_context *, core_tensor logits, core_tensor prob);
  /* prob[T,E] = softmax(logits), and the K largest logits of each row, largest first, ties by lower expert:
   * choice int32 [T,K]; gate[T,K] = prob of the chosen, or the softmax of the chosen logits. K <= min(E,
   * CORE_MAX_CHOICES). NaN ranks as -infinity, so an index is always in range. */
  core_status (*router_choose)(kern_context *, kern_gate, core_tensor logits, core_tensor prob,
                               core_tensor choice, core_tensor gate);
  /* dlogits[T,E] from dgate[T,K]. */
  core_status (*router_gate_bwd)(kern_context *, kern_gate, core_tensor dgate, core_tensor prob,
                                 core_tensor choice, core_tensor gate, kern_write, core_tensor dlogits);
  /* sums[3 + 2 E] float64 += the sums over these rows (kern_router_sums_count). logits and prob noise-free;
   * noisy == logits, or sigma 0, when noise is off: then load is not counted. choice int32 [T,K] was made
   * from noisy. */
  core_status (*router_sums)(kern_context *, core_tensor logits, core_tensor prob, core_tensor noisy,
                             core_tensor choice, double sigma, core_tensor sums);
  /* dlogits += gradient of the losses whose derivatives by the sums are weights[3 + 2 E] float64; through thr
   * too. sigma 0: no load term. */
  core_status (*router_sums_bwd)(kern_context *, core_tensor weights, core_tensor logits, core_tensor prob,
                                 core_tensor noisy, core_tensor choice, double sigma, core_tensor dlogits);
  /* count[2 E + 2] int64 += choices per expert [E]; those of them with a slot >= 0 [E]; rows with at least
   * one such; rows. choice, slot int32 [T,K]. */
  core_status (*router_count)(kern_context *, core_tensor choice, core_tensor slot, core_tensor count);

  /* dlogits[T,E] from dprob[T,E]: p (d - <p, d>). */
  core_status (*softmax_bwd)(kern_context *, core_tensor dprob, core_tensor prob, kern_write,
                             core_tensor dlogits);
  /* choice int32 [T,2], in place: the second becomes the largest of logits[t,e] + g(e) without the first,
   * with g = -log(-log u) of u uniform at (seed, stream, key[t] E + e): drawn in proportion to the
   * probabilities of the others (Lepikhin et al. 2021). NaN and ties as router_choose. key: uint64 [T]; E
   * >= 2. */
  core_status (*router_second)(kern_context *, core_tensor logits, uint64_t seed, uint64_t stream,
                               core_tensor key, core_tensor choice);
  /* gate[T,K] of a choice that is made: prob of the chosen, with correction[T,E] (optional) corrected and
   * then at least 1e-6; KERN_GATE_RENORMALISED: divided by their sum over K. */
  core_status (*router_gate_fwd)(kern_context *, kern_gate, kern_calibration, core_tensor prob,
                                 core_tensor correction, core_tensor choice, core_tensor gate);
  /* The gradients of corrected gates by prob and correction, both [T,E] and set; below the bound 0. */
  core_status (*router_calibrated_bwd)(kern_context *, kern_gate, kern_calibration, core_tensor dgate,
                                       core_tensor prob, core_tensor correction, core_tensor choice,
                                       core_tensor dprob, core_tensor dcorrection);
  /* sums[G,1 + 2E] float64 += of each group of tokens: tokens, sum of p_e [E], of the first `columns` choices
   * those of each expert [E]. prob[T,E]; choice int32 [T,K]; group int32 [T] in [0, G), in any order. */
  core_status (*router_balance)(kern_context *, core_tensor prob, core_tensor choice, core_tensor group,
                                int64_t columns, core_tensor sums);
  /* dlogits[T,E] += gradient of the loss whose derivatives by the sums of p_e are weights[G,E] float64. */
  core_status (*router_balance_bwd)(kern_context *, core_tensor weights, core_tensor group, core_tensor prob,
                                    core_tensor dlogits);

  /* Plan of a dispatch: the kept choices sorted by expert, then token, then choice. count: int64 [experts],
   * host: waits for it, the one host synchronisation of a layer; slot int32 [T,K]: row of each choice, -1
   * where keep (uint8 [T,K], optional) is 0; index int32 [>= T K]: source token of each row. */
  core_status (*dispatch_plan)(kern_context *, core_tensor choice, core_tensor keep, int64_t experts,
                               int64_t *count, core_tensor slot, core_tensor index);
  /* y[R,C] = rows of x[T,C] named by index int32 [R]. Active, or both INT32. */
  core_status (*gather_rows)(kern_context *, core_tensor x, core_tensor index, core_tensor y);
  /* y[t] = sum over k of weight[t,k] x[slot[t,k]]; slot int32 [T,K] rows of x[R,C], -1 none; weight optional
   * (then 1), sum in order of k. This is the combine, and without weights the gradient of gather_rows. x, y
   * Active. */
  core_status (*combine_fwd)(kern_context *, core_tensor x, core_tensor slot, core_tensor weight, kern_write,
                             core_tensor y);
  /* dx[slot[t,k]] = weight[t,k] dy[t] (rows no slot names are left alone); dweight[t,k] = <dy[t], x[slot]>, 0
   * where slot is -1. Slots are distinct. dx may alias x. weight and dweight optional. dy, x, dx Active. */
  core_status (*combine_bwd)(kern_context *, core_tensor dy, core_tensor x, core_tensor slot,
                             core_tensor weight, core_tensor dx, core_tensor dweight);

  /* y[S,C] = mean of each segment's rows; zeros for an empty one. Active. */
  core_status (*segment_mean_fwd)(kern_context *, kern_segments, core_tensor x, core_tensor y);
  core_status (*segment_mean_bwd)(kern_context *, kern_segments, core_tensor dy, kern_write, core_tensor dx);
  /* x[offset[s] + i] += table[i], i < length of s <= rows of table; and dtable[i] += sum over s of dx. x, dx
   * Active. */
  core_status (*position_fwd)(kern_context *, kern_segments, core_tensor table, core_tensor x);
  core_status (*position_bwd)(kern_context *, kern_segments, core_tensor dx, core_tensor dtable);
  /* y = x / max(|x|, 1e-12), norm[S] = |x|. dx Active; all else Real. */
  core_status (*l2norm_fwd)(kern_context *, core_tensor x, core_tensor y, core_tensor norm);
  core_status (*l2norm_bwd)(kern_context *, core_tensor dy, core_tensor y, core_tensor norm, kern_write,
                            core_tensor dx);

  /* lse[n] = log sum over unmasked columns of exp(scale cosine); positive[n] = scale cosine[i, own]. Invalid
   * rows give 0 and 0. Radford et al. 2021 with masks. */
  core_status (*contrastive_fwd)(kern_context *, const kern_contrastive *, core_tensor cosine,
                                 core_tensor lse, core_tensor positive);
  /* In place cosine -> d loss / d cosine for this row block, where loss = weight * sum over valid samples of
   * (lse_row - positive) + (lse_column - positive): both directions' terms that contain these rows' logits.
   * lse_column[B]: of the opposite direction, all samples. dscale[1] float64 += the gradient by `scale` of
   * the ROW direction only (so that summing over all row blocks of both directions counts each term once). */
  core_status (*contrastive_bwd)(kern_context *, const kern_contrastive *, double weight, core_tensor lse_row,
                                 core_tensor lse_column, core_tensor cosine, core_tensor dscale);
  /* Columns [first, first + N) of logits over `all` of them, logits[T,N]; calls over all parts give, per row,
   * lse[T] = log of the sum of all exponentials and positive[T] = logit of the target (int32 [T] in [0, all),
   * or -1: none, positive stays). Before the first part lse is -infinity and positive 0: an online logsumexp
   * (Milakov and Gimelshein 2018), so that logits exist a part at a time. */
  core_status (*cross_entropy_fwd)(kern_context *, core_tensor logits, int64_t first, int64_t all,
                                   core_tensor target, core_tensor lse, core_tensor positive);
  /* dlogits[T,N] = weight (softmax - onehot) of the same columns, lse over all; zero rows where target is -1.
   * dlogits Active; may be logits. */
  core_status (*cross_entropy_bwd)(kern_context *, double weight, core_tensor lse, int64_t first, int64_t all,
                                   core_tensor target, core_tensor logits, core_tensor dlogits);
  /* Gradient of a table whose rows were looked up: dtable[entry[g]] += sum, in order, over i in segment g of
   * dx[row[i]]. row int32 [N], the segments lie in it; entry int32 [segments], distinct. dx Active. */
  core_status (*embedding_bwd)(kern_context *, kern_segments, core_tensor row, core_tensor entry,
                               core_tensor dx, core_tensor dtable);

  /* y[T,D] = (x - shift[D]) * scale[D]; x float32, float16, bfloat16 or Real; y Active. */
  core_status (*standardize)(kern_context *, core_tensor x, core_tensor shift, core_tensor scale,
                             core_tensor y);
  /* Loshchilov and Hutter 2019 (decoupled decay times rate) on n ranges of flat arrays of equal length, in
   * place. copy: the new parameters rounded to BFLOAT16, same length, optional. list: host. */
  core_status (*adamw)(kern_context *, const kern_adamw *list, int64_t n, core_tensor gradient,
                       core_tensor parameter, core_tensor m, core_tensor v, core_tensor copy);
  /* out[1] float64 += sum of squares, in double, fixed order. */
  core_status (*sum_squares)(kern_context *, core_tensor x, core_tensor out);
  /* y = x, each Real or BFLOAT16, same count. */
  core_status (*cast)(kern_context *, core_tensor x, core_tensor y);
  /* y += alpha x; x *= alpha; x = value. axpy and fill Active, scale Real. */
  core_status (*axpy)(kern_context *, double alpha, core_tensor x, core_tensor y);
  core_status (*scale)(kern_context *, double alpha, core_tensor x);
  core_status (*fill)(kern_context *, double value, core_tensor x);

  /* A bias per group of rows [row[g], row[g+1]); row: int64 [groups + 1], host. x[R,n] += bias[G,n] of its
   * group; dbias[G,n] += sums over the group's rows of dy. x, dy Active. */
  core_status (*bias_grouped_fwd)(kern_context *, const int64_t *row, core_tensor bias, core_tensor x);
  core_status (*bias_grouped_bwd)(kern_context *, const int64_t *row, core_tensor dy, core_tensor dbias);
  /* Srivastava et al. 2014 on rows that slots name: entry c of row slot[t,k] of x[R,C] becomes 0 where
   * word c mod 4 of core_random_at(seed, stream, (key[t] K + k) ceil(C / 4) + c / 4) is below rate 2^32, and
   * is divided by 1 - rate elsewhere. In place; applied to gradients it is its own backward. slot int32
   * [T,K], -1 none; key uint64 [T]. x Active. */
  core_status (*dropout)(kern_context *, uint64_t seed, uint64_t stream, double rate, core_tensor key,
                         core_tensor slot, core_tensor x);
  /* Per row of prediction[n,D] and target[n,D]: loss[n], and dprediction = weight d loss / d prediction. Rows
   * with valid[n] (uint8) 0 give 0 and 0. dprediction Active, optional. */
  core_status (*regression)(kern_context *, kern_regression, double weight, core_tensor prediction,
                            core_tensor target, core_tensor valid, core_tensor loss, core_tensor dprediction);
} kern_ops;

/* The CPU backend; always there. */
const kern_ops *kern_cpu(void);
/* The CUDA backend on device `ordinal` of this process, made current and opened once (ERR_ARGUMENT for a
 * second, other ordinal). Built in only where ANTIPHON_CUDA is defined. ERR_UNSUPPORTED: no device, driver or
 * architecture too old, with what was found and what is needed. */
CORE_NODISCARD core_status kern_cuda(int32_t ordinal, const kern_ops **out);
/* Backend by name: "cpu"; "cuda" where it was built and a device is present; "auto" the best of these.
 * local_rank: of this process among those of its host; picks its device (local_rank modulo the devices).
 * Errors: ERR_UNSUPPORTED, saying what is missing. */
CORE_NODISCARD core_status kern_select(const char *name, int32_t local_rank, const kern_ops **out);

#endif
