/* Galleries in files: as they are, and in memory. */
#include <omp.h>
#include <stdlib.h>

#include "core/stop.h"
#include "kernels/kernels.h"
#include "trainer/serve/search_impl.h"

core_status train_gallery_of_file(const train_vectors *file, train_gallery *out) {
  const train_vectors_about *about = train_vectors_info(file);
  *out = (train_gallery){.file = file,
                         .dtype = about->dtype,
                         .rows = about->rows,
                         .width = about->width,
                         .id = train_vectors_ids(file)};
  CHECK(about->kind != TRAIN_VECTORS_QUERY, CORE_ERR_FORMAT,
        "%s holds queries of %s:%s and cannot be a gallery; make one with `antiphon embed ... --key %s`",
        train_vectors_path(file), about->modality, about->toward, about->toward);
  CHECK(about->rows > 0, CORE_ERR_FORMAT, "%s is an empty gallery: no sample of the split has '%s'",
        train_vectors_path(file), about->modality);
  return CORE_OK;
}

int64_t train_first_bad_priv(const core_real *rows, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; i++) {
    core_real square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < width; c++) square += rows[i * width + c] * rows[i * width + c];
    if (!(square <= (core_real)1.002)) return i;
  }
  return n;
}

/* Checks rows as stored. scratch: core_real [width]. */
static core_status check_rows(const train_gallery *g, const void *stored, int64_t first, int64_t n,
                              core_real *scratch) {
  for (int64_t i = 0; i < n; i++) {
    for (int64_t c = 0; c < g->width; c++)
      scratch[c] = g->dtype == CORE_FLOAT16
                       ? (core_real)core_float_from_half(((const uint16_t *)stored)[i * g->width + c])
                       : (core_real)((const float *)stored)[i * g->width + c];
    CHECK(train_first_bad_priv(scratch, 1, g->width) == 1, CORE_ERR_CORRUPT,
          "%s: vector %lld is not of unit length", train_vectors_path(g->file), (long long)(first + i));
  }
  return CORE_OK;
}

static core_status load_block(const train_gallery *g, char *memory, int64_t block) {
  int64_t first = train_vectors_block_row(g->file, block);
  int64_t n = train_vectors_block_row(g->file, block + 1) - first;
  char *at = memory + first * g->width * (int64_t)core_dtype_size(g->dtype);
  core_real *scratch = malloc((size_t)g->width * sizeof *scratch);
  CHECK(scratch, CORE_ERR_MEMORY, "no memory to read %s", train_vectors_path(g->file));
  core_status status = CORE_OK;
  if (core_stop_requested())
    status = core_error_begin(CORE_ERR_STOPPED, __func__, __FILE__, __LINE__, "stopped while reading");
  if (status == CORE_OK) status = train_vectors_read(g->file, block, block + 1, at);
  if (status == CORE_OK) status = check_rows(g, at, first, n, scratch);
  free(scratch);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* Errors of several blocks: that of the first. */
static core_status load_blocks(const train_gallery *g, char *memory, int32_t threads) {
  core_status first = CORE_OK;
  int64_t blocks = train_vectors_blocks(g->file), failed = blocks;
  core_error record;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    core_status status = load_block(g, memory, b);
    if (status == CORE_OK) continue;
#pragma omp critical(train_gallery)
    if (b < failed) {
      failed = b;
      first = status;
      core_error_save(&record);
    }
  }
  return first == CORE_OK ? CORE_OK : core_error_restore(&record);
}

core_status train_gallery_load(const train_vectors *file, int32_t threads, train_gallery *out) {
  TRY(train_gallery_of_file(file, out));
  size_t bytes = (size_t)(out->rows * out->width) * core_dtype_size(out->dtype);
  void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  CHECK(memory, CORE_ERR_MEMORY, "no memory for the %zu bytes of %s", bytes, train_vectors_path(file));
  core_status status = load_blocks(out, memory, threads > 0 ? threads : omp_get_max_threads());
  if (status != CORE_OK) {
    free(memory);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  out->file = NULL;
  out->memory = memory;
  return CORE_OK;
}

void train_gallery_unload(train_gallery *gallery) {
  free((void *)gallery->memory);
  gallery->memory = NULL;
}
