/* Outline: the rows of a modality pass by in file order, in batches whose borders depend on the set alone.
 * Sums of a batch are taken about the mean so far and merged by the update of Chan, Golub and LeVeque 1979
 * ("Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1), so neither a large
 * mean nor a long set loses digits, and the result does not depend on the number of threads. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "data/memory_impl.h"
#include "data/set_impl.h"

typedef struct moments {
  int64_t rows, width;
  double *mean, *square; /* square: sum of squared deviations */
  double *shift, *first, *second;
  float *row;
} moments;

static void widen_row(core_dtype dtype, const void *restrict values, int64_t width, float *restrict row) {
  if (dtype == CORE_FLOAT32)
    for (int64_t c = 0; c < width; ++c) row[c] = ((const float *)values)[c];
  else if (dtype == CORE_FLOAT16)
    for (int64_t c = 0; c < width; ++c) row[c] = core_float_from_half(((const uint16_t *)values)[c]);
  else
    for (int64_t c = 0; c < width; ++c) row[c] = core_float_from_bfloat(((const uint16_t *)values)[c]);
}

static void add_row(moments *sums) {
  for (int64_t c = 0; c < sums->width; ++c) {
    const double x = (double)sums->row[c] - sums->shift[c];
    sums->first[c] += x;
    sums->second[c] += x * x;
  }
}

static void merge(moments *sums, int64_t rows) {
  const double n = (double)sums->rows, k = (double)rows;
  for (int64_t c = 0; c < sums->width; ++c) {
    const double delta = sums->shift[c] + sums->first[c] / k - sums->mean[c];
    const double square = sums->second[c] - sums->first[c] * sums->first[c] / k;
    sums->square[c] += square + delta * delta * n * k / (n + k);
    sums->mean[c] += delta * k / (n + k);
  }
  sums->rows += rows;
}

static void add_part(moments *sums, const data_part *part) {
  const int64_t rows = part->offset[part->hi - part->lo];
  const int64_t row_bytes = part->width * (int64_t)core_dtype_size(part->dtype);
  if (rows == 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    widen_row(part->dtype, (const uint8_t *)part->latent + r * row_bytes, part->width, sums->row);
    for (int64_t c = 0; r == 0 && c < part->width; ++c) {
      sums->shift[c] = sums->rows > 0 ? sums->mean[c] : (double)sums->row[c];
      sums->first[c] = sums->second[c] = 0;
    }
    add_row(sums);
  }
  merge(sums, rows);
}

int64_t data_set_moment_batch_priv(const data_set *set, int32_t m) {
  const data_modality_info *info = &set->info[m];
  const double bytes = (double)info->tokens * (double)info->width * (double)core_dtype_size(info->dtype);
  const double samples = bytes > 0 ? 4194304.0 * (double)set->samples / bytes : 1;
  if (samples < 1) return 1;
  return samples < (double)set->samples ? (int64_t)samples : set->samples;
}

int64_t data_set_moment_steps(const data_set *set, int32_t m) {
  const int64_t batch = data_set_moment_batch_priv(set, m);
  return (set->samples + batch - 1) / batch;
}

static core_status stream_rows(data_set *set, int32_t m, data_non_finite policy, data_tick tick,
                               void *context, moments *sums) {
  data_range range[CORE_MAX_MODALITIES] = {0};
  const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  data_stream *stream = NULL;
  data_stream_options options = {
      .batch = data_set_moment_batch_priv(set, m), .micro_batches = 1, .range = range, .non_finite = policy};
  options.threads = processors < 1 ? 1 : processors > 8 ? 8 : (int32_t)processors;
  options.cache_bytes = 32 << 20;
  range[m].hi = options.batch;
  TRY(data_stream_open(set, &options, &stream));
  core_status status = CORE_OK;
  for (data_batch *batch = NULL; status == CORE_OK;) {
    status = data_stream_get(stream, &batch);
    if (status != CORE_OK || batch == NULL) break;
    add_part(sums, &batch->part[m]);
    data_stream_put(stream, batch);
    if (tick != NULL) status = tick(context);
  }
  data_stream_close(stream);
  TRY(status);
  return CORE_OK;
}

core_status data_set_moments(data_set *set, int32_t m, data_non_finite policy, data_tick tick, void *context,
                             double *mean, double *deviation) {
  CHECK(m >= 0 && m < set->modalities, CORE_ERR_ARGUMENT, "modality %d of a set of %d", m, set->modalities);
  const int64_t width = set->info[m].width;
  moments sums = {.width = width, .mean = mean, .square = deviation};
  double *scratch = NULL;
  TRY(DATA_ALLOCATE(4 * width, "moments", &scratch));
  sums.shift = scratch;
  sums.first = scratch + width;
  sums.second = scratch + 2 * width;
  sums.row = (float *)(void *)(scratch + 3 * width);
  for (int64_t c = 0; c < width; ++c) mean[c] = deviation[c] = 0;
  const core_status status = stream_rows(set, m, policy, tick, context, &sums);
  free(scratch);
  TRY(status);
  for (int64_t c = 0; c < width && sums.rows > 0; ++c)
    deviation[c] = sqrt((deviation[c] > 0 ? deviation[c] : 0) / (double)sums.rows);
  return CORE_OK;
}
