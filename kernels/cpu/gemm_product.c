/* One matrix product, by dnnl_sgemm in the float build and by plain loops in the double build.
 *
 * dnnl_sgemm and not the matmul primitive: at tower shapes it is as fast or faster in every form (README), it
 * needs no cached objects, and it accumulates into c directly. It takes the thread count of the caller.
 *
 * bfloat16 operands go to dnnl_gemm_bf16bf16f32 where the processor multiplies them, else tile by tile
 * through scratch, widened. A bfloat16 result is accumulated in scratch and rounded once. */
#include <omp.h>    /* omp_set_num_threads */
#include <string.h> /* memset */

#include "active_impl.h" /* kern_element */
#include "gemm_impl.h"   /* kern_product */

#ifndef ANTIPHON_DOUBLE
#include <oneapi/dnnl/dnnl.h> /* dnnl_sgemm */

/* Exported by the library, but in no header of it; that it is there is seen when the program is loaded. */
extern dnnl_status_t dnnl_gemm_bf16bf16f32(char transpose_a, char transpose_b, dnnl_dim_t m, dnnl_dim_t n,
                                           dnnl_dim_t k, float alpha, const uint16_t *a, dnnl_dim_t a_row,
                                           const uint16_t *b, dnnl_dim_t b_row, float beta, float *c,
                                           dnnl_dim_t c_row) __attribute__((weak));
#endif

/* The scratch and the threads that a product may use. */
typedef struct worker {
  const kern_context *context;
  core_real *a, *b, *c;
  int32_t threads;
} worker;

/* A matrix as it lies in memory. */
typedef struct matrix {
  const void *at;
  core_dtype type;
  int64_t row; /* elements from one row to the next */
} matrix;

/* c (+)= op(a) op(b); a and b of one type. */
typedef struct part {
  kern_form form;
  kern_extent extent;
  matrix a, b;
  core_real *c;
  int64_t c_row;
  bool add;
} part;

#ifdef ANTIPHON_DOUBLE

bool kern_bfloat_units_priv(void) {
  return false;
}

static core_status part_multiply(const part *p) {
  const core_real *a = p->a.at, *b = p->b.at;
  const int64_t a_row = p->form == KERN_TN ? 1 : p->a.row, a_inner = p->form == KERN_TN ? p->a.row : 1;
  const int64_t b_column = p->form == KERN_NT ? p->b.row : 1, b_inner = p->form == KERN_NT ? 1 : p->b.row;
  for (int64_t i = 0; i < p->extent.m; i++) {
    core_real *restrict c = p->c + i * p->c_row;
    for (int64_t j = 0; j < p->extent.n; j++) {
      core_real sum = 0;
      for (int64_t l = 0; l < p->extent.k; l++)
        sum += a[i * a_row + l * a_inner] * b[j * b_column + l * b_inner];
      c[j] = p->add ? c[j] + sum : sum;
    }
  }
  return CORE_OK;
}

#else

bool kern_bfloat_units_priv(void) {
  const int wanted = dnnl_cpu_isa_avx512_core_bf16; /* AMX contains it */
  return dnnl_gemm_bf16bf16f32 != NULL && ((int)dnnl_get_effective_cpu_isa() & wanted) == wanted;
}

static core_status part_multiply(const part *p) {
  const char transpose_a = p->form == KERN_TN ? 'T' : 'N', transpose_b = p->form == KERN_NT ? 'T' : 'N';
  const float beta = p->add ? 1.0f : 0.0f;
  const int64_t m = p->extent.m, n = p->extent.n, k = p->extent.k;
  const dnnl_status_t status = p->a.type == CORE_BFLOAT16
                                   ? dnnl_gemm_bf16bf16f32(transpose_a, transpose_b, m, n, k, 1.0f, p->a.at,
                                                           p->a.row, p->b.at, p->b.row, beta, p->c, p->c_row)
                                   : dnnl_sgemm(transpose_a, transpose_b, m, n, k, 1.0f, p->a.at, p->a.row,
                                                p->b.at, p->b.row, beta, p->c, p->c_row);
  CHECK(status != dnnl_out_of_memory, CORE_ERR_MEMORY, "matrix product %lld x %lld x %lld: no memory",
        (long long)m, (long long)n, (long long)k);
  CHECK(status == dnnl_success, CORE_ERR_INTERNAL, "matrix product %lld x %lld x %lld of %s: oneDNN says %d",
        (long long)m, (long long)n, (long long)k, core_dtype_text(p->a.type), (int)status);
  return CORE_OK;
}

#endif

/* Rows [row, row + rows) and columns [column, column + columns) of x, whose rows are `width` long: in place,
 * or widened into scratch. */
static matrix matrix_part(const worker *by, matrix x, int64_t row, int64_t column, int64_t rows,
                          int64_t columns, bool widened, core_real *scratch) {
  x.at = kern_element(x.at, x.type, row * x.row + column);
  if (!widened || x.type != CORE_BFLOAT16) return x;
  const int64_t scratch_row = columns + KERN_TILE_PAD;
  kern_widen_rows_priv(x.at, x.row, rows, columns, scratch, scratch_row, by->threads);
  return (matrix){scratch, CORE_REAL_DTYPE, scratch_row};
}

/* c's rows from m0 and columns from n0 on, summed over k in steps. */
static core_status product_sum(const worker *by, const kern_product *p, part *sum, int64_t m0, int64_t n0,
                               int64_t k_step, bool widened) {
  const kern_extent whole = p->extent;
  const int64_t m = sum->extent.m, n = sum->extent.n;
  const matrix a = {p->a, p->a_type, p->form == KERN_TN ? whole.m : whole.k};
  const matrix b = {p->b, p->b_type, p->form == KERN_NT ? whole.k : whole.n};
  for (int64_t k0 = 0; k0 < whole.k; k0 += k_step) {
    const int64_t k = whole.k - k0 < k_step ? whole.k - k0 : k_step;
    sum->extent.k = k;
    sum->a = p->form == KERN_TN ? matrix_part(by, a, k0, m0, k, m, widened, by->a)
                                : matrix_part(by, a, m0, k0, m, k, widened, by->a);
    sum->b = p->form == KERN_NT ? matrix_part(by, b, n0, k0, n, k, widened, by->b)
                                : matrix_part(by, b, k0, n0, k, n, widened, by->b);
    TRY(part_multiply(sum));
    sum->add = true;
  }
  return CORE_OK;
}

/* In steps where something passes through scratch, else as a whole. */
static core_status product_steps(const worker *by, const kern_product *p) {
  const kern_extent whole = p->extent, tile = by->context->tile;
  const bool brief = p->c_type == CORE_BFLOAT16, mixed = p->a_type != p->b_type;
  const bool widened = mixed || (p->a_type == CORE_BFLOAT16 && !by->context->bfloat_units);
  const int64_t m_step = widened || brief ? tile.m : whole.m, n_step = widened || brief ? tile.n : whole.n;
  for (int64_t n0 = 0; n0 < whole.n; n0 += n_step)
    for (int64_t m0 = 0; m0 < whole.m; m0 += m_step) {
      const int64_t m = whole.m - m0 < m_step ? whole.m - m0 : m_step;
      const int64_t n = whole.n - n0 < n_step ? whole.n - n0 : n_step;
      void *target = kern_element(p->c, p->c_type, m0 * whole.n + n0);
      part sum = {.form = p->form,
                  .extent = {m, n, 0},
                  .c = brief ? by->c : target,
                  .c_row = brief ? n + KERN_TILE_PAD : whole.n,
                  .add = !brief && p->write == KERN_ADD};
      TRY(product_sum(by, p, &sum, m0, n0, widened ? tile.k : whole.k, widened));
      if (brief) kern_narrow_rows_priv(sum.c, sum.c_row, m, n, p->write, target, whole.n, by->threads);
    }
  return CORE_OK;
}

static core_status product_run(const kern_context *context, int32_t thread, int32_t threads,
                               const kern_product *p) {
  const kern_extent e = p->extent;
  if (e.m == 0 || e.n == 0) return CORE_OK;
  if (e.k == 0) {
    if (p->write == KERN_SET) memset(p->c, 0, (size_t)(e.m * e.n) * core_dtype_size(p->c_type));
    return CORE_OK;
  }
  worker w = {.context = context, .threads = threads};
  w.a = context->product + thread * context->product_count;
  w.b = w.a + kern_product_a(context->tile);
  w.c = w.b + kern_product_b(context->tile);
  TRY(product_steps(&w, p));
  return CORE_OK;
}

core_status kern_product_run_alone_priv(const kern_context *context, int32_t thread,
                                        const kern_product *product) {
  TRY(product_run(context, thread, 1, product));
  return CORE_OK;
}

core_status kern_product_run_priv(const kern_context *context, const kern_product *product) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(context->threads);
  const core_status status = product_run(context, 0, context->threads, product);
  omp_set_num_threads(before);
  TRY(status);
  return CORE_OK;
}
