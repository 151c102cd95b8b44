/* Matrix products: dnnl_sgemm in the float build, plain loops in the double build.
 *
 * dnnl_sgemm and not the matmul primitive: at tower shapes it is as fast or faster in every form (README), it
 * needs no cached objects, and it accumulates into c directly. It takes the thread count of the caller. */
#include <omp.h> /* omp_set_num_threads */

#include "cpu_impl.h" /* kern_context */

#ifndef ANTIPHON_DOUBLE
#include <oneapi/dnnl/dnnl.h> /* dnnl_sgemm */
#endif

/* c[m,n] = op(a) op(b) + (write == KERN_ADD ? c : 0), k the inner extent. */
typedef struct product {
  kern_form form;
  kern_write write;
  int64_t m, n, k;
  const core_real *a, *b;
  core_real *c;
} product;

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

#ifdef ANTIPHON_DOUBLE

static core_status product_run(const product *p) {
  const int64_t a_row = p->form == KERN_TN ? 1 : p->k, a_inner = p->form == KERN_TN ? p->m : 1;
  const int64_t b_column = p->form == KERN_NT ? p->k : 1, b_inner = p->form == KERN_NT ? 1 : p->n;
  for (int64_t i = 0; i < p->m; i++) {
    core_real *restrict c = p->c + i * p->n;
    for (int64_t j = 0; j < p->n; j++) {
      core_real sum = 0;
      for (int64_t l = 0; l < p->k; l++)
        sum += p->a[i * a_row + l * a_inner] * p->b[j * b_column + l * b_inner];
      c[j] = p->write == KERN_ADD ? c[j] + sum : sum;
    }
  }
  return CORE_OK;
}

#else

static core_status product_run(const product *p) {
  if (p->m == 0 || p->n == 0) return CORE_OK;
  if (p->k == 0) {
    for (int64_t i = 0; p->write == KERN_SET && i < p->m * p->n; i++) p->c[i] = 0;
    return CORE_OK;
  }
  const dnnl_status_t status =
      dnnl_sgemm(p->form == KERN_TN ? 'T' : 'N', p->form == KERN_NT ? 'T' : 'N', p->m, p->n, p->k, 1.0f, p->a,
                 p->form == KERN_TN ? p->m : p->k, p->b, p->form == KERN_NT ? p->k : p->n,
                 p->write == KERN_ADD ? 1.0f : 0.0f, p->c, p->n);
  CHECK(status != dnnl_out_of_memory, CORE_ERR_MEMORY, "matrix product %lld x %lld x %lld: no memory",
        (long long)p->m, (long long)p->n, (long long)p->k);
  CHECK(status == dnnl_success, CORE_ERR_INTERNAL, "matrix product %lld x %lld x %lld: dnnl_sgemm says %d",
        (long long)p->m, (long long)p->n, (long long)p->k, (int)status);
  return CORE_OK;
}

#endif

core_status kern_gemm_cpu(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                          kern_write write, core_tensor c) {
  product p;
  KERN_CHECK_REAL(a, KERN_ANY, KERN_ANY);
  KERN_CHECK_REAL(b, KERN_ANY, KERN_ANY);
  TRY(product_of(__func__, form, a.shape, b.shape, &p));
  KERN_CHECK_REAL(c, p.m, p.n);
  p.a = a.data, p.b = b.data, p.c = c.data, p.write = write;
  const int before = omp_get_max_threads();
  omp_set_num_threads(context->threads);
  const core_status status = product_run(&p);
  omp_set_num_threads(before);
  TRY(status);
  return CORE_OK;
}

/* The product of one group, as a view into the whole. */
static product group_view(const product *whole, const int64_t *row, int64_t group) {
  const int64_t begin = row[group], rows = row[group + 1] - row[group];
  product p = *whole;
  if (p.form == KERN_TN) {
    p.k = rows;
    p.a += begin * p.m;
    p.b += begin * p.n;
    p.c += group * p.m * p.n;
  } else {
    p.m = rows;
    p.a += begin * p.k;
    p.b += group * p.k * p.n;
    p.c += begin * p.n;
  }
  return p;
}

/* Many small groups: one thread each (oneDNN stays serial inside a parallel region). The result does not
 * depend on which thread takes a group. Errors of several groups: the first group's. */
static core_status groups_across(const kern_context *context, const product *whole, const int64_t *row,
                                 int64_t groups) {
  core_status first = CORE_OK;
  int64_t failed = groups;
  core_error record;
#pragma omp parallel for schedule(dynamic) num_threads(context->threads)
  for (int64_t group = 0; group < groups; group++) {
    const product p = group_view(whole, row, group);
    const core_status status = product_run(&p);
    if (status == CORE_OK) continue;
#pragma omp critical(kern_gemm_grouped)
    if (group < failed) {
      failed = group, first = status;
      core_error_save(&record);
    }
  }
  return first == CORE_OK ? CORE_OK : core_error_restore(&record);
}

static core_status groups_in_turn(const kern_context *context, const product *whole, const int64_t *row,
                                  int64_t groups) {
  core_status status = CORE_OK;
  const int before = omp_get_max_threads();
  omp_set_num_threads(context->threads);
  for (int64_t group = 0; group < groups && status == CORE_OK; group++) {
    const product p = group_view(whole, row, group);
    status = product_run(&p);
  }
  omp_set_num_threads(before);
  return status;
}

/* Across groups only when no group holds more than its thread's fair share of the rows by half. */
static bool groups_are_even(const kern_context *context, const int64_t *row, int64_t groups) {
  if (context->threads == 1 || groups < 2 * (int64_t)context->threads) return false;
  int64_t most = 0;
  for (int64_t group = 0; group < groups; group++)
    if (row[group + 1] - row[group] > most) most = row[group + 1] - row[group];
  return most * context->threads * 2 <= row[groups];
}

core_status kern_gemm_grouped_cpu(kern_context *context, kern_form form, const int64_t *row, core_tensor a,
                                  core_tensor b, kern_write write, core_tensor c) {
  KERN_CHECK_REAL(a, KERN_ANY, KERN_ANY);
  const int64_t rows = a.shape[0];
  const core_tensor *const stacked = form == KERN_TN ? &c : &b;
  const int64_t groups = stacked->shape[0];
  product p = {.form = form, .write = write};
  if (form == KERN_TN) {
    KERN_CHECK_REAL(b, rows, KERN_ANY);
    p.m = a.shape[1], p.n = b.shape[1];
    KERN_CHECK_REAL(c, groups, p.m, p.n);
  } else {
    KERN_CHECK_REAL(b, groups, KERN_ANY, KERN_ANY);
    TRY(product_of(__func__, form, a.shape, b.shape + 1, &p));
    KERN_CHECK_REAL(c, rows, p.n);
  }
  TRY(kern_check_offset_priv(__func__, "row", row, groups, rows));
  p.a = a.data, p.b = b.data, p.c = c.data, p.write = write;
  TRY(groups_are_even(context, row, groups) ? groups_across(context, &p, row, groups)
                                            : groups_in_turn(context, &p, row, groups));
  return CORE_OK;
}
