/* Matrix products: shapes, types and groups. gemm_product.c multiplies. */
#include <omp.h> /* omp_get_thread_num */

#include "active_impl.h" /* kern_element */
#include "gemm_impl.h"   /* kern_product */

/* Extents that the form demands, from the shapes of a and b given as rows and columns. */
static core_status product_of(const char *op, kern_form form, const int64_t a[2], const int64_t b[2],
                              kern_product *out) {
  CHECK(form == KERN_NN || form == KERN_NT || form == KERN_TN, CORE_ERR_ARGUMENT, "%s: unknown form %d", op,
        (int)form);
  out->form = form;
  out->extent.m = form == KERN_TN ? a[1] : a[0];
  out->extent.k = form == KERN_TN ? a[0] : a[1];
  out->extent.n = form == KERN_NT ? b[0] : b[1];
  const int64_t inner = form == KERN_NT ? b[1] : b[0];
  CHECK(inner == out->extent.k, CORE_ERR_ARGUMENT,
        "%s: inner extents differ: a [%lld, %lld] and b [%lld, %lld] in form %s", op, (long long)a[0],
        (long long)a[1], (long long)b[0], (long long)b[1],
        form == KERN_NN   ? "NN"
        : form == KERN_NT ? "NT"
                          : "TN");
  return CORE_OK;
}

static void product_fill(kern_product *p, core_tensor a, core_tensor b, kern_write write, core_tensor c) {
  p->a = a.data, p->b = b.data, p->c = c.data, p->write = write;
  p->a_type = a.dtype, p->b_type = b.dtype, p->c_type = c.dtype;
}

/* What c must be: of the type of a and b, or core_real. */
static core_dtype result_type(core_tensor a, core_tensor c) {
  return c.dtype == a.dtype ? a.dtype : CORE_REAL_DTYPE;
}

core_status kern_gemm_cpu(kern_context *context, kern_form form, core_tensor a, core_tensor b,
                          kern_write write, core_tensor c) {
  kern_product p;
  KERN_CHECK_ACTIVE(a, KERN_ANY, KERN_ANY);
  KERN_CHECK(b, a.dtype, KERN_ANY, KERN_ANY);
  TRY(product_of(__func__, form, a.shape, b.shape, &p));
  KERN_CHECK(c, result_type(a, c), p.extent.m, p.extent.n);
  product_fill(&p, a, b, write, c);
  TRY(kern_product_run_priv(context, &p));
  return CORE_OK;
}

/* The product of one group, as a view into the whole. */
static kern_product group_view(const kern_product *whole, const int64_t *row, int64_t group) {
  const int64_t begin = row[group], rows = row[group + 1] - row[group];
  kern_product p = *whole;
  const int64_t m = p.extent.m, n = p.extent.n, k = p.extent.k;
  if (p.form == KERN_TN) {
    p.extent.k = rows;
    p.a = kern_element(p.a, p.a_type, begin * m);
    p.b = kern_element(p.b, p.b_type, begin * n);
    p.c = kern_element(p.c, p.c_type, group * m * n);
  } else {
    p.extent.m = rows;
    p.a = kern_element(p.a, p.a_type, begin * k);
    p.b = kern_element(p.b, p.b_type, group * k * n);
    p.c = kern_element(p.c, p.c_type, begin * n);
  }
  return p;
}

/* Many small groups: one thread each (oneDNN stays serial inside a parallel region). The result does not
 * depend on which thread takes a group. Errors of several groups: the first group's. */
static core_status groups_across(const kern_context *context, const kern_product *whole, const int64_t *row,
                                 int64_t groups) {
  core_status first = CORE_OK;
  int64_t failed = groups;
  core_error record;
#pragma omp parallel for schedule(dynamic) num_threads(context->threads)
  for (int64_t group = 0; group < groups; group++) {
    const kern_product p = group_view(whole, row, group);
    const core_status status = kern_product_run_alone_priv(context, omp_get_thread_num(), &p);
    if (status == CORE_OK) continue;
#pragma omp critical(kern_gemm_grouped)
    if (group < failed) {
      failed = group, first = status;
      core_error_save(&record);
    }
  }
  return first == CORE_OK ? CORE_OK : core_error_restore(&record);
}

static core_status groups_in_turn(const kern_context *context, const kern_product *whole, const int64_t *row,
                                  int64_t groups) {
  for (int64_t group = 0; group < groups; group++) {
    const kern_product p = group_view(whole, row, group);
    TRY(kern_product_run_priv(context, &p));
  }
  return CORE_OK;
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
  KERN_CHECK_ACTIVE(a, KERN_ANY, KERN_ANY);
  const int64_t rows = a.shape[0];
  const core_tensor *const stacked = form == KERN_TN ? &c : &b;
  const int64_t groups = stacked->shape[0];
  kern_product p = {.form = form};
  if (form == KERN_TN) {
    KERN_CHECK(b, a.dtype, rows, KERN_ANY);
    p.extent.m = a.shape[1], p.extent.n = b.shape[1];
    KERN_CHECK(c, result_type(a, c), groups, p.extent.m, p.extent.n);
  } else {
    KERN_CHECK(b, a.dtype, groups, KERN_ANY, KERN_ANY);
    TRY(product_of(__func__, form, a.shape, b.shape + 1, &p));
    KERN_CHECK(c, result_type(a, c), rows, p.extent.n);
  }
  TRY(kern_check_offset_priv(__func__, "row", row, groups, rows));
  product_fill(&p, a, b, write, c);
  TRY(groups_are_even(context, row, groups) ? groups_across(context, &p, row, groups)
                                            : groups_in_turn(context, &p, row, groups));
  return CORE_OK;
}
