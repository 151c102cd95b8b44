/* Matrix products by cuBLAS, accumulated in float32. cuBLAS counts by columns, so a row-major product is
 * asked for as c^T = op(b)^T op(a)^T: operands change places and nothing is transposed.
 *
 * Grouped products have three forms behind one entry, chosen by the context. Workspaces are set, so nothing
 * allocates and results are the same from run to run. */
#include "cuda_impl.h" /* kern_context */

/* c[m,n] = op(a) op(b) + (write == KERN_ADD ? c : 0), k the inner extent. */
struct product {
  kern_form form;
  kern_write write;
  int64_t m, n, k;
  const unsigned char *a, *b;
  unsigned char *c;
  core_dtype in, out;

  int64_t lda() const {
    return form == KERN_TN ? m : k;
  }
  int64_t ldb() const {
    return form == KERN_NT ? k : n;
  }
  cublasOperation_t op_a() const {
    return form == KERN_TN ? CUBLAS_OP_T : CUBLAS_OP_N;
  }
  cublasOperation_t op_b() const {
    return form == KERN_NT ? CUBLAS_OP_T : CUBLAS_OP_N;
  }
  float beta() const {
    return write == KERN_ADD ? 1.0f : 0.0f;
  }
};

static cudaDataType_t data_type(core_dtype dtype) {
  return dtype == CORE_BFLOAT16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* Extents that the form demands, from the shapes of a and b given as rows and columns. */
static core_status product_of(const char *op, kern_form form, const int64_t a[2], const int64_t b[2],
                              product *out) {
  CHECK(form == KERN_NN || form == KERN_NT || form == KERN_TN, CORE_ERR_ARGUMENT, "%s: unknown form %d", op,
        (int)form);
  out->form = form;
  out->m = form == KERN_TN ? a[1] : a[0];
  out->k = form == KERN_TN ? a[0] : a[1];
  out->n = form == KERN_NT ? b[0] : b[1];
  const int64_t inner = form == KERN_NT ? b[1] : b[0];
  CHECK(inner == out->k, CORE_ERR_ARGUMENT,
        "%s: inner extents differ: a [%lld, %lld] and b [%lld, %lld] in form %s", op, (long long)a[0],
        (long long)a[1], (long long)b[0], (long long)b[1],
        form == KERN_NN   ? "NN"
        : form == KERN_NT ? "NT"
                          : "TN");
  return CORE_OK;
}

/* Types of a product's operands; c is of theirs or float32. */
static core_status product_types(const char *op, core_tensor a, core_tensor b, core_tensor c, product *out) {
  TRY(kern_check_active_cuda_priv(op, "a", a));
  CHECK(b.dtype == a.dtype && (c.dtype == a.dtype || c.dtype == CORE_FLOAT32), CORE_ERR_UNSUPPORTED,
        "%s: a is %s, b %s, c %s; expected a and b of one type, c of theirs or float32", op,
        core_dtype_text(a.dtype), core_dtype_text(b.dtype), core_dtype_text(c.dtype));
  out->in = a.dtype, out->out = c.dtype;
  out->a = kern_data<const unsigned char>(a), out->b = kern_data<const unsigned char>(b);
  out->c = kern_data<unsigned char>(c);
  return CORE_OK;
}

/* An empty inner extent: the product is zero. */
static core_status product_of_nothing(const product &p, cudaStream_t stream) {
  if (p.write == KERN_SET)
    KERN_CUDA(cudaMemsetAsync(p.c, 0, (size_t)(p.m * p.n) * core_dtype_size(p.out), stream));
  return CORE_OK;
}

/* On the stream of the handle. */
static core_status product_run(cublasHandle_t handle, cudaStream_t stream, const product &p) {
  if (p.m == 0 || p.n == 0) return CORE_OK;
  if (p.k == 0) return product_of_nothing(p, stream);
  CHECK(p.m <= INT32_MAX && p.n <= INT32_MAX && p.k <= INT32_MAX, CORE_ERR_ARGUMENT,
        "a product of %lld x %lld x %lld: an extent is beyond 32 bits", (long long)p.m, (long long)p.n,
        (long long)p.k);
  const float alpha = 1.0f, beta = p.beta();
  KERN_CUBLAS(cublasGemmEx(handle, p.op_b(), p.op_a(), (int)p.n, (int)p.m, (int)p.k, &alpha, p.b,
                           data_type(p.in), (int)p.ldb(), p.a, data_type(p.in), (int)p.lda(), &beta, p.c,
                           data_type(p.out), (int)p.n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return CORE_OK;
}

core_status kern_gemm_cuda(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                           kern_write write, core_tensor c) {
  product p;
  TRY(product_types(__func__, a, b, c, &p));
  KERN_CHECK(a, a.dtype, KERN_ANY, KERN_ANY);
  KERN_CHECK(b, b.dtype, KERN_ANY, KERN_ANY);
  TRY(product_of(__func__, form, a.shape, b.shape, &p));
  KERN_CHECK(c, c.dtype, p.m, p.n);
  p.write = write;
  TRY(product_run(context->blas[0], context->stream, p));
  return CORE_OK;
}

/* --- grouped --- */
/* The product of one group, as a view into the whole. */
static product group_view(const product &whole, const int64_t *row, int64_t group) {
  const int64_t begin = row[group], rows = row[group + 1] - row[group];
  const int64_t in = (int64_t)core_dtype_size(whole.in), out = (int64_t)core_dtype_size(whole.out);
  product p = whole;
  if (p.form == KERN_TN) {
    p.k = rows;
    p.a += begin * p.m * in, p.b += begin * p.n * in, p.c += group * p.m * p.n * out;
  } else {
    p.m = rows;
    p.a += begin * p.k * in, p.b += group * p.k * p.n * in, p.c += begin * p.n * out;
  }
  return p;
}

/* Groups dealt to the side streams in turn, between a fork and a join with the main stream. A failure still
 * joins, so that the main stream never runs ahead. */
static core_status groups_dealt(kern_context *context, const product &whole, const int64_t *row,
                                int64_t groups) {
  int64_t at = 0;
  for (int64_t group = 0; group < groups; group++) {
    const product p = group_view(whole, row, group);
    if (p.m == 0 || p.n == 0 || (p.k == 0 && p.write == KERN_ADD)) continue;
    const int64_t lane = at++ % KERN_STREAMS;
    TRY(product_run(context->blas[1 + lane], context->side[lane], p));
  }
  return CORE_OK;
}

static core_status groups_on_streams(kern_context *context, const product &whole, const int64_t *row,
                                     int64_t groups) {
  KERN_CUDA(cudaEventRecord(context->fork, context->stream));
  for (cudaStream_t stream : context->side) KERN_CUDA(cudaStreamWaitEvent(stream, context->fork, 0));
  const core_status status = groups_dealt(context, whole, row, groups);
  for (int i = 0; i < KERN_STREAMS; i++) {
    KERN_CUDA(cudaEventRecord(context->join[i], context->side[i]));
    KERN_CUDA(cudaStreamWaitEvent(context->stream, context->join[i], 0));
  }
  TRY(status);
  return CORE_OK;
}

/* One call for all groups serves where c has the type of a and b and every matrix lies on 16 bytes. */
static bool grouped_serves(const product &whole) {
  const int64_t in = (int64_t)core_dtype_size(whole.in);
  const int64_t step_a = whole.form == KERN_TN ? whole.m : whole.k, step_b = whole.n;
  const int64_t step_c = whole.n;
  return whole.in == whole.out && whole.form != KERN_TN && kern_aligned({whole.a, whole.b, whole.c}) &&
         step_a * in % 16 == 0 && step_b * in % 16 == 0 && step_c * in % 16 == 0 && whole.k * in % 16 == 0;
}

/* Pointers of a, b and c of the filled groups, one after another in a staging slot. */
struct group_lists {
  int m[CORE_MAX_EXPERTS], n[CORE_MAX_EXPERTS], k[CORE_MAX_EXPERTS], size[CORE_MAX_EXPERTS];
  int lda[CORE_MAX_EXPERTS], ldb[CORE_MAX_EXPERTS];
  cublasOperation_t op_a[CORE_MAX_EXPERTS], op_b[CORE_MAX_EXPERTS];
  float alpha[CORE_MAX_EXPERTS], beta[CORE_MAX_EXPERTS];
  int count;
};

static void groups_listed(const product &whole, const int64_t *row, int64_t groups, group_lists *lists,
                          const void **pointers) {
  lists->count = 0;
  for (int64_t group = 0; group < groups; group++) {
    const product p = group_view(whole, row, group);
    if (p.m == 0 || p.n == 0) continue;
    const int at = lists->count++;
    lists->m[at] = (int)p.m, lists->n[at] = (int)p.n, lists->k[at] = (int)p.k, lists->size[at] = 1;
    lists->lda[at] = (int)p.lda(), lists->ldb[at] = (int)p.ldb();
    lists->op_a[at] = p.op_a(), lists->op_b[at] = p.op_b();
    lists->alpha[at] = 1.0f, lists->beta[at] = p.beta();
    pointers[at] = p.a, pointers[groups + at] = p.b, pointers[2 * groups + at] = p.c;
  }
}

static core_status groups_in_one_call(kern_context *context, const product &whole, const int64_t *row,
                                      int64_t groups) {
  CHECK(groups <= CORE_MAX_EXPERTS, CORE_ERR_ARGUMENT, "%lld groups of a product, at most %d",
        (long long)groups, (int)CORE_MAX_EXPERTS);
  group_lists lists;
  void *host, *device;
  const size_t bytes = 3 * (size_t)groups * sizeof(void *);
  TRY(kern_stage_begin_priv(context, bytes, &host));
  groups_listed(whole, row, groups, &lists, (const void **)host);
  if (lists.count == 0) return CORE_OK;
  TRY(kern_stage_send_priv(context, bytes, &device));
  void **const lists_at = (void **)device;
  KERN_CUBLAS(cublasGemmGroupedBatchedEx(
      context->blas[0], lists.op_b, lists.op_a, lists.n, lists.m, lists.k, lists.alpha,
      (const void *const *)(lists_at + groups), data_type(whole.in), lists.ldb, (const void *const *)lists_at,
      data_type(whole.in), lists.lda, lists.beta, lists_at + 2 * groups, data_type(whole.out), lists.n,
      lists.count, lists.size, CUBLAS_COMPUTE_32F));
  return CORE_OK;
}

/* Groups of equal row counts, none empty. */
static bool groups_are_equal(const int64_t *row, int64_t groups) {
  for (int64_t group = 1; group < groups; group++)
    if (row[group + 1] - row[group] != row[1] - row[0]) return false;
  return groups > 0 && row[1] > row[0];
}

static core_status groups_strided(kern_context *context, const product &whole, const int64_t *row,
                                  int64_t groups) {
  const product p = group_view(whole, row, 0);
  const float alpha = 1.0f, beta = p.beta();
  KERN_CUBLAS(cublasGemmStridedBatchedEx(
      context->blas[0], p.op_b(), p.op_a(), (int)p.n, (int)p.m, (int)p.k, &alpha, p.b, data_type(p.in),
      (int)p.ldb(), p.k * p.n, p.a, data_type(p.in), (int)p.lda(), p.m * p.k, &beta, p.c, data_type(p.out),
      (int)p.n, p.m * p.n, (int)groups, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return CORE_OK;
}

static core_status groups_run(kern_context *context, const product &whole, const int64_t *row,
                              int64_t groups) {
  const bool empty = whole.n == 0 || (whole.form == KERN_TN ? whole.m == 0 : whole.k == 0);
  if (!empty && context->grouping == KERN_GROUPING_STRIDED && groups_are_equal(row, groups))
    return groups_strided(context, whole, row, groups);
  if (!empty && context->grouping == KERN_GROUPING_GROUPED && grouped_serves(whole))
    return groups_in_one_call(context, whole, row, groups);
  return groups_on_streams(context, whole, row, groups);
}

core_status kern_gemm_grouped_cuda(kern_context *context, kern_form form, const int64_t *row, core_tensor a,
                                   core_tensor b, kern_write write, core_tensor c) {
  product p;
  TRY(product_types(__func__, a, b, c, &p));
  KERN_CHECK(a, a.dtype, KERN_ANY, KERN_ANY);
  const int64_t rows = a.shape[0], groups = form == KERN_TN ? c.shape[0] : b.shape[0];
  p.form = form, p.write = write;
  if (form == KERN_TN) {
    KERN_CHECK(b, b.dtype, rows, KERN_ANY);
    p.m = a.shape[1], p.n = b.shape[1], p.k = rows;
    KERN_CHECK(c, c.dtype, groups, p.m, p.n);
  } else {
    KERN_CHECK(b, b.dtype, groups, KERN_ANY, KERN_ANY);
    TRY(product_of(__func__, form, a.shape, b.shape + 1, &p));
    KERN_CHECK(c, c.dtype, rows, p.n);
  }
  TRY(kern_check_offset_cuda_priv(__func__, "row", row, groups, rows));
  TRY(groups_run(context, p, row, groups));
  return CORE_OK;
}
