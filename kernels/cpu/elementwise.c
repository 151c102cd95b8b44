/* Flat arrays and changes of type: sum of squares, y += alpha x, x *= alpha, x = value. */
#include <string.h> /* memmove */

#include "active_impl.h" /* kern_at, kern_to */

KERN_CLONES static double squares(const core_real *restrict x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}
typedef struct axpy_job {
  core_dtype dtype;
  core_real alpha;
  const void *x;
  void *y;
} axpy_job;

KERN_INLINE void add_scaled(const axpy_job *job, core_dtype dtype, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; i++)
    kern_to(job->y, dtype, i, KERN_ADD, job->alpha * kern_at(job->x, dtype, i));
}
KERN_ACTIVE_RUN(add_scaled, axpy_job)

KERN_CLONES static void multiply(core_real alpha, core_real *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= alpha;
}
KERN_INLINE void narrow_rows(const core_real *restrict x, int64_t x_row, int64_t rows, int64_t columns,
                             kern_write write, uint16_t *restrict y, int64_t y_row) {
  for (int64_t r = 0; r < rows; r++) {
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) kern_to(y + r * y_row, CORE_BFLOAT16, i, write, x[r * x_row + i]);
  }
}
KERN_CLONES static void narrow(const core_real *x, int64_t x_row, int64_t rows, int64_t columns,
                               kern_write write, uint16_t *y, int64_t y_row) {
  if (write == KERN_ADD)
    narrow_rows(x, x_row, rows, columns, KERN_ADD, y, y_row);
  else
    narrow_rows(x, x_row, rows, columns, KERN_SET, y, y_row);
}
KERN_CLONES static void widen(const uint16_t *restrict x, int64_t x_row, int64_t rows, int64_t columns,
                              core_real *restrict y, int64_t y_row) {
  for (int64_t r = 0; r < rows; r++) {
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) y[r * y_row + i] = kern_at(x, CORE_BFLOAT16, r * x_row + i);
  }
}
KERN_CLONES static void set_brief(uint16_t value, uint16_t *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = value;
}
KERN_CLONES static void set(core_real value, core_real *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = value;
}

/* Blocks of rows for that many threads; one block is run without a parallel region, which costs as much as a
 * thousand elements. */
static kern_split rows_split(int64_t rows, int64_t columns, int32_t threads) {
  const kern_split most = kern_split_rows(rows, columns);
  return (kern_split){rows, most.count < threads ? most.count : threads};
}

void kern_widen_rows_priv(const uint16_t *x, int64_t x_row, int64_t rows, int64_t columns, core_real *y,
                          int64_t y_row, int32_t threads) {
  const kern_split split = rows_split(rows, columns, threads);
  if (split.count == 1) {
    widen(x, x_row, rows, columns, y, y_row);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < split.count; block++) {
    const int64_t begin = kern_split_at(split, block), count = kern_split_at(split, block + 1) - begin;
    widen(x + begin * x_row, x_row, count, columns, y + begin * y_row, y_row);
  }
}

void kern_narrow_rows_priv(const core_real *x, int64_t x_row, int64_t rows, int64_t columns, kern_write write,
                           uint16_t *y, int64_t y_row, int32_t threads) {
  const kern_split split = rows_split(rows, columns, threads);
  if (split.count == 1) {
    narrow(x, x_row, rows, columns, write, y, y_row);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < split.count; block++) {
    const int64_t begin = kern_split_at(split, block), count = kern_split_at(split, block + 1) - begin;
    narrow(x + begin * x_row, x_row, count, columns, write, y + begin * y_row, y_row);
  }
}

core_status kern_sum_squares_cpu(kern_context *context, core_tensor x, core_tensor out) {
  KERN_CHECK_ANY(x);
  KERN_CHECK(out, CORE_FLOAT64, 1);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  double partial[KERN_BLOCKS], *total = out.data;
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    partial[block] = squares((const core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  for (int64_t block = 0; block < split.count; block++) *total += partial[block];
  return CORE_OK;
}

/* Elements [begin, begin + n) of x into y. */
static void cast_run(core_tensor x, core_tensor y, int64_t begin, int64_t n) {
  char *to = (char *)y.data + (size_t)begin * core_dtype_size(y.dtype);
  const char *from = (const char *)x.data + (size_t)begin * core_dtype_size(x.dtype);
  if (x.dtype == y.dtype)
    memmove(to, from, (size_t)n * core_dtype_size(x.dtype));
  else if (x.dtype == CORE_BFLOAT16)
    widen((const uint16_t *)from, n, 1, n, (core_real *)to, n);
  else
    narrow((const core_real *)from, n, 1, n, KERN_SET, (uint16_t *)to, n);
}

core_status kern_cast_cpu(kern_context *context, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY_ACTIVE(x);
  KERN_CHECK_ANY_ACTIVE(y);
  const int64_t n = core_tensor_count(&x);
  CHECK(core_tensor_count(&y) == n, CORE_ERR_ARGUMENT, "%s: x has %lld elements and y has %lld", __func__,
        (long long)n, (long long)core_tensor_count(&y));
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    if (count > 0) cast_run(x, y, begin, count);
  }
  return CORE_OK;
}

core_status kern_axpy_cpu(kern_context *context, double alpha, core_tensor x, core_tensor y) {
  KERN_CHECK_ANY_ACTIVE(x);
  KERN_CHECK_LIKE(y, x);
  const int64_t n = core_tensor_count(&x);
  const axpy_job job = {.dtype = x.dtype, .alpha = (core_real)alpha, .x = x.data, .y = y.data};
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    add_scaled_run(&job, kern_line_at(split, block, n), kern_line_at(split, block + 1, n));
  }
  return CORE_OK;
}

core_status kern_scale_cpu(kern_context *context, double alpha, core_tensor x) {
  KERN_CHECK_ANY(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n);
    multiply((core_real)alpha, (core_real *)x.data + begin, kern_line_at(split, block + 1, n) - begin);
  }
  return CORE_OK;
}

core_status kern_fill_cpu(kern_context *context, double value, core_tensor x) {
  KERN_CHECK_ANY_ACTIVE(x);
  const int64_t n = core_tensor_count(&x);
  const kern_split split = kern_split_lines(n);
  KERN_FOR_BLOCKS(context, split, block) {
    const int64_t begin = kern_line_at(split, block, n), count = kern_line_at(split, block + 1, n) - begin;
    if (x.dtype == CORE_BFLOAT16)
      set_brief(kern_bfloat_of((core_real)value), (uint16_t *)x.data + begin, count);
    else
      set((core_real)value, (core_real *)x.data + begin, count);
  }
  return CORE_OK;
}
