/* Outline: arrays of latents, with offsets, ids and labels beside them, as a source of samples. */
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "data/encode_impl.h"
#include "data/memory_impl.h"
#include "data/pack_impl.h"

typedef struct features {
  data_source base;
  data_array latent;
  int64_t per_sample;  /* rows of each sample, when there are no offsets */
  int64_t *offset;     /* [samples + 1], NULL: none */
  int64_t *id, *label; /* [samples], NULL: 0, 1, 2, ... and none */
} features;

/* ---- opening ---- */

static uint64_t mix_identity(uint64_t hash, const data_file_identity *identity) {
  const int64_t facts[3] = {identity->bytes, identity->seconds, identity->nanoseconds};
  return core_hash(facts, sizeof facts, hash);
}

/* The integers of `path`, or of tensor `name` of the latents' file when path is NULL and it is there. */
static core_status open_integers(features *f, const char *path, const char *name, int64_t most, int64_t least,
                                 int64_t *count, int64_t **out) {
  data_array array;
  TRY(data_array_open_priv(path, name, &array));
  const core_status status = data_array_integers_priv(&array, least, most, out);
  *count = data_array_count_priv(&array);
  f->base.identity = mix_identity(f->base.identity, &array.identity);
  data_array_close_priv(&array);
  TRY(status);
  return CORE_OK;
}

static core_status check_offsets(const features *f, const char *path, int64_t count) {
  const int64_t *offset = f->offset, rows = f->latent.shape[0];
  CHECK(f->latent.rank == 2, CORE_ERR_FORMAT, "%s: has %d axes; with offsets, latents are [rows, width]",
        f->latent.path, f->latent.rank);
  CHECK(count >= 1 && offset[0] == 0 && offset[count - 1] == rows, CORE_ERR_FORMAT,
        "%s: offsets must rise from 0 to the %lld rows of %s", path, (long long)rows, f->latent.path);
  for (int64_t i = 0; i + 1 < count; ++i)
    CHECK(offset[i] <= offset[i + 1], CORE_ERR_FORMAT, "%s: offsets decrease at sample %lld", path,
          (long long)i);
  return CORE_OK;
}

static core_status shape_samples(const data_pack_options *o, features *f) {
  int64_t count = 0;
  if (o->offsets != NULL) {
    TRY(open_integers(f, o->offsets, "offset", INT64_MAX, 0, &count, &f->offset));
    TRY(check_offsets(f, o->offsets, count));
    f->base.samples = count - 1;
    f->base.width = f->latent.shape[1];
    return CORE_OK;
  }
  CHECK(f->latent.rank == 2 || f->latent.rank == 3, CORE_ERR_FORMAT,
        "%s: has %d axes; expected [samples, width] or [samples, rows, width]", f->latent.path,
        f->latent.rank);
  f->base.samples = f->latent.shape[0];
  f->per_sample = f->latent.rank == 3 ? f->latent.shape[1] : 1;
  f->base.width = f->latent.shape[f->latent.rank - 1];
  return CORE_OK;
}

static core_status open_columns(const data_pack_options *o, features *f) {
  int64_t ids = f->base.samples, labels = f->base.samples;
  if (o->ids != NULL) TRY(open_integers(f, o->ids, "id", INT64_MAX, 0, &ids, &f->id));
  if (o->labels != NULL) TRY(open_integers(f, o->labels, "label", INT32_MAX, -1, &labels, &f->label));
  CHECK(ids == f->base.samples, CORE_ERR_MISMATCH, "%s: %lld ids for %lld samples", o->ids, (long long)ids,
        (long long)f->base.samples);
  CHECK(labels == f->base.samples, CORE_ERR_MISMATCH, "%s: %lld labels for %lld samples", o->labels,
        (long long)labels, (long long)f->base.samples);
  return CORE_OK;
}

/* ---- copying ---- */

/* Rows as they are when the shard stores them so, else as float32. */
static core_status read_rows(const features *f, int64_t first, int64_t rows, uint8_t *raw, float *latent) {
  const int64_t count = rows * f->base.width;
  TRY(data_array_read_priv(&f->latent, first * f->base.width, count, raw));
  const uint16_t *half = (const uint16_t *)(const void *)raw;
  for (int64_t i = 0; latent != NULL && i < count; ++i) {
    if (f->latent.kind == DATA_NUMBER_FLOAT64)
      latent[i] = (float)((const double *)(const void *)raw)[i];
    else if (f->latent.kind == DATA_NUMBER_FLOAT32)
      latent[i] = ((const float *)(const void *)raw)[i];
    else
      latent[i] = f->latent.kind == DATA_NUMBER_FLOAT16 ? core_float_from_half(half[i])
                                                        : core_float_from_bfloat(half[i]);
  }
  return CORE_OK;
}

static core_dtype stored_type(data_number kind) {
  return kind == DATA_NUMBER_FLOAT16    ? CORE_FLOAT16
         : kind == DATA_NUMBER_BFLOAT16 ? CORE_BFLOAT16
         : kind == DATA_NUMBER_FLOAT32  ? CORE_FLOAT32
                                        : CORE_DTYPE_COUNT;
}

static int64_t rows_of(const features *f, int64_t i, int64_t *first) {
  *first = f->offset != NULL ? f->offset[i] : i * f->per_sample;
  return f->offset != NULL ? f->offset[i + 1] - f->offset[i] : f->per_sample;
}

static core_status add_samples(const features *f, int64_t first, int64_t count, data_writer *writer,
                               uint8_t *raw, float *latent) {
  for (int64_t i = first; i < first + count; ++i) {
    int64_t row = 0;
    data_sample sample = {.id = (uint64_t)(f->id != NULL ? f->id[i] : i),
                          .label = f->label != NULL ? (int32_t)f->label[i] : -1};
    sample.rows = rows_of(f, i, &row);
    sample.latent = latent;
    sample.stored = latent == NULL ? raw : NULL;
    TRY(read_rows(f, row, sample.rows, raw, latent));
    TRY(data_writer_add(writer, &sample));
  }
  return CORE_OK;
}

static core_status copy(const data_source *source, int64_t first, int64_t count, data_writer *writer) {
  const features *f = (const features *)source;
  uint8_t *raw = NULL;
  float *latent = NULL;
  int64_t most = 0, row = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t rows = rows_of(f, i, &row);
    if (rows > most) most = rows;
  }
  TRY(DATA_ALLOCATE(most * source->width * f->latent.value_bytes, "rows of a sample", &raw));
  core_status status = CORE_OK;
  if (stored_type(f->latent.kind) != data_writer_dtype_priv(writer))
    status = DATA_ALLOCATE(most * source->width, "rows of a sample", &latent);
  if (status == CORE_OK) status = add_samples(f, first, count, writer, raw, latent);
  free(raw);
  free(latent);
  TRY(status);
  return CORE_OK;
}

static void close_features(data_source *source) {
  features *f = (features *)source;
  data_array_close_priv(&f->latent);
  free(f->offset);
  free(f->id);
  free(f->label);
  free(f);
}

static core_status open_features(const data_pack_options *o, features *f) {
  TRY(data_array_open_priv(o->from, o->latent_name, &f->latent));
  CHECK(f->latent.kind <= DATA_NUMBER_FLOAT64, CORE_ERR_FORMAT, "%s: holds integers, expected latents",
        o->from);
  f->base.identity = mix_identity(0, &f->latent.identity);
  TRY(shape_samples(o, f));
  TRY(open_columns(o, f));
  CHECK(f->base.samples >= 1 && f->base.width >= 1 && f->base.width <= DATA_MOST_WIDTH, CORE_ERR_FORMAT,
        "%s: %lld samples of width %lld", o->from, (long long)f->base.samples, (long long)f->base.width);
  f->base.dtype = stored_type(f->latent.kind);
  if (f->base.dtype == CORE_DTYPE_COUNT) f->base.dtype = CORE_FLOAT32;
  return CORE_OK;
}

core_status data_source_features_priv(const data_pack_options *options, data_source **out) {
  features *f = NULL;
  TRY(DATA_ALLOCATE(1, "features", &f));
  f->latent.fd = -1;
  f->base.copy = copy;
  f->base.close = close_features;
  const core_status status = open_features(options, f);
  if (status != CORE_OK) close_features(&f->base);
  TRY(status);
  *out = &f->base;
  return CORE_OK;
}
