/* Outline: the columns of a shard are gathered in memory, latents are compressed and go to the file chunk by
 * chunk. The file has a temporary name until it is complete and on the disk.
 *
 * Every byte that matters has a checksum: metadata by HDF5's newer structures (1.10), small columns by its
 * checksum filter, latents by their compressor, attributes by lying inside the metadata (fixed length).
 *
 * The latents' dataset is made with the first full chunk or at the end, so that a small shard gets a chunk of
 * its own size instead of a mostly empty one. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "data/writer_impl.h"

/* ---- opening ---- */

static core_status check_options(const data_writer_options *o) {
  CHECK(o->directory != NULL && o->modality != NULL && o->encoder != NULL, CORE_ERR_ARGUMENT,
        "data_writer_open: directory, modality and encoder must be given");
  CHECK(o->modality[0] != '\0' && strlen(o->modality) < CORE_NAME && strchr(o->modality, '/') == NULL,
        CORE_ERR_ARGUMENT, "modality \"%.120s\": expected 1 to %d bytes without \"/\"", o->modality,
        CORE_NAME - 1);
  CHECK(strlen(o->encoder) < CORE_NAME, CORE_ERR_ARGUMENT, "encoder \"%.120s\": expected at most %d bytes",
        o->encoder, CORE_NAME - 1);
  CHECK(o->dtype == CORE_FLOAT16 || o->dtype == CORE_BFLOAT16 || o->dtype == CORE_FLOAT32, CORE_ERR_ARGUMENT,
        "%s: latents cannot be stored as %s", o->modality, core_dtype_text(o->dtype));
  CHECK(o->width >= 1 && o->width <= DATA_MOST_WIDTH, CORE_ERR_ARGUMENT, "%s: width %lld, expected 1 to %d",
        o->modality, (long long)o->width, DATA_MOST_WIDTH);
  CHECK(o->origin == NULL || strlen(o->origin) < CORE_NAME, CORE_ERR_ARGUMENT,
        "origin \"%.120s\": expected at most %d bytes", o->origin, CORE_NAME - 1);
  CHECK(o->shard >= 0, CORE_ERR_ARGUMENT, "%s: shard %d, expected 0 or more", o->modality, o->shard);
  CHECK(o->filter >= DATA_FILTER_NONE && o->filter <= DATA_FILTER_SHUFFLE_ZSTD, CORE_ERR_ARGUMENT,
        "%s: filter %d is none of data_filter", o->modality, (int)o->filter);
  CHECK(o->level >= 0 && o->level <= (o->filter >= DATA_FILTER_ZSTD ? 22 : 9), CORE_ERR_ARGUMENT,
        "%s: level %d, expected 0 to 9 (gzip) or 22 (zstd)", o->modality, o->level);
  CHECK(o->chunk_bytes >= 0 && o->chunk_bytes <= DATA_MOST_CHUNK_BYTES, CORE_ERR_ARGUMENT,
        "%s: chunks of %lld bytes, expected at most %d", o->modality, (long long)o->chunk_bytes,
        DATA_MOST_CHUNK_BYTES);
  return CORE_OK;
}

static core_status create_file(data_writer *writer) {
  TRY(data_hdf5_enter_priv());
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS), creation = H5Pcreate(H5P_FILE_CREATE);
  /* without the times of its objects, so that equal samples make equal files */
  if (access >= 0 && creation >= 0 && H5Pset_obj_track_times(creation, false) >= 0 &&
      H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_LATEST) >= 0)
    writer->file = H5Fcreate(writer->temporary, H5F_ACC_TRUNC, creation, access);
  if (access >= 0) (void)H5Pclose(access);
  if (creation >= 0) (void)H5Pclose(creation);
  const data_hdf5_reason reason =
      writer->file < 0 ? data_hdf5_reason_priv() : (data_hdf5_reason){.code = CORE_OK};
  data_hdf5_leave_priv();
  CHECK(writer->file >= 0, CORE_ERR_IO, "%s: cannot be created: %s", writer->temporary, reason.text);
  writer->created = true;
  return CORE_OK;
}

static core_status prepare(data_writer *writer, const data_writer_options *o) {
  const int64_t chunk_bytes = o->chunk_bytes > 0 ? o->chunk_bytes : DATA_DEFAULT_CHUNK_BYTES;
  writer->width = o->width;
  writer->dtype = o->dtype;
  writer->filter = o->filter;
  writer->level = o->level;
  writer->row_bytes = o->width * (int64_t)core_dtype_size(o->dtype);
  writer->chunk_rows = chunk_bytes / writer->row_bytes > 0 ? chunk_bytes / writer->row_bytes : 1;
  (void)snprintf(writer->modality, sizeof writer->modality, "%s", o->modality);
  (void)snprintf(writer->encoder, sizeof writer->encoder, "%s", o->encoder);
  (void)snprintf(writer->origin, sizeof writer->origin, "%s", o->origin != NULL ? o->origin : "");
  TRY(data_text_priv(&writer->directory, "%s", o->directory));
  TRY(data_text_priv(&writer->path, "%s/%s-%05d.h5", o->directory, o->modality, o->shard));
  TRY(data_text_priv(&writer->temporary, "%s.part", writer->path));
  TRY(DATA_ALLOCATE(writer->chunk_rows * writer->row_bytes, "chunk of a shard", &writer->chunk));
  TRY(data_encoder_create_priv(o->filter, o->level, (int64_t)core_dtype_size(o->dtype),
                               writer->chunk_rows * writer->row_bytes, &writer->compressor));
  TRY(core_file_make_directories(o->directory));
  TRY(create_file(writer));
  return CORE_OK;
}

core_status data_writer_open(const data_writer_options *options, data_writer **out) {
  data_writer *writer = NULL;
  *out = NULL;
  TRY(check_options(options));
  TRY(DATA_ALLOCATE(1, "writer", &writer));
  writer->file = writer->latent = -1;
  const core_status status = prepare(writer, options);
  if (status != CORE_OK) data_writer_abandon(writer);
  TRY(status);
  *out = writer;
  return CORE_OK;
}

core_dtype data_writer_dtype_priv(const data_writer *writer) {
  return writer->dtype;
}

/* ---- latents ---- */

static herr_t add_filters(hid_t creation, const data_writer *writer) {
  const unsigned level = (unsigned)data_encoder_level_priv(writer->filter, writer->level);
  herr_t result = 0;
  if (writer->filter == DATA_FILTER_NONE) result = H5Pset_fletcher32(creation);
  if (writer->filter == DATA_FILTER_SHUFFLE_GZIP || writer->filter == DATA_FILTER_SHUFFLE_ZSTD)
    result = H5Pset_shuffle(creation);
  if (writer->filter == DATA_FILTER_GZIP || writer->filter == DATA_FILTER_SHUFFLE_GZIP)
    result = result < 0 ? result : H5Pset_deflate(creation, level);
  if (writer->filter == DATA_FILTER_ZSTD || writer->filter == DATA_FILTER_SHUFFLE_ZSTD)
    result = result < 0 ? result : H5Pset_filter(creation, DATA_FILTER_ID_ZSTD, H5Z_FLAG_OPTIONAL, 1, &level);
  return result;
}

static hid_t latent_type(core_dtype dtype) {
  if (dtype == CORE_BFLOAT16) return H5Tcopy(H5T_STD_U16LE);
  const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  if (dtype == CORE_FLOAT32 || type < 0) return type;
  /* IEEE binary16: sign at bit 15, 5 exponent bits from bit 10, 10 bits of mantissa. */
  const bool good =
      H5Tset_fields(type, 15, 10, 5, 0, 10) >= 0 && H5Tset_size(type, 2) >= 0 && H5Tset_ebias(type, 15) >= 0;
  if (good) return type;
  (void)H5Tclose(type);
  return -1;
}

/* Inside HDF5. */
static bool create_latent(data_writer *writer, int64_t chunk_rows) {
  const hsize_t none[2] = {0, (hsize_t)writer->width}, most[2] = {H5S_UNLIMITED, (hsize_t)writer->width};
  const hsize_t chunk[2] = {(hsize_t)chunk_rows, (hsize_t)writer->width};
  const hid_t space = H5Screate_simple(2, none, most), type = latent_type(writer->dtype);
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  if (space >= 0 && type >= 0 && creation >= 0 && H5Pset_obj_track_times(creation, false) >= 0 &&
      H5Pset_chunk(creation, 2, chunk) >= 0 && add_filters(creation, writer) >= 0)
    writer->latent = H5Dcreate2(writer->file, "latent", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  if (space >= 0) (void)H5Sclose(space);
  if (type >= 0) (void)H5Tclose(type);
  if (creation >= 0) (void)H5Pclose(creation);
  return writer->latent >= 0;
}

/* Inside HDF5. */
static bool append_chunk(data_writer *writer, const uint8_t *stored, int64_t bytes) {
  const hsize_t start[2] = {(hsize_t)(writer->rows - writer->pending), 0};
  const hsize_t extent[2] = {(hsize_t)writer->rows, (hsize_t)writer->width};
  return H5Dset_extent(writer->latent, extent) >= 0 &&
         H5Dwrite_chunk(writer->latent, H5P_DEFAULT, 0, start, (size_t)bytes, stored) >= 0;
}

/* The stored form of the pending rows. A chunk over the end of the rows is padded with zeros. */
static core_status encode_rows(data_writer *writer, const uint8_t **stored, int64_t *bytes) {
  const int64_t used = writer->pending * writer->row_bytes, whole = writer->stored_rows * writer->row_bytes;
  memset(writer->chunk + used, 0, (size_t)(whole - used));
  const core_status status = data_encode_priv(writer->compressor, writer->chunk, whole, stored, bytes);
  if (status != CORE_OK) return core_error_context(status, "%s", writer->temporary);
  return CORE_OK;
}

/* Writes the pending rows; at the end also makes the dataset of a shard that never filled a chunk. */
static core_status flush_rows(data_writer *writer) {
  const uint8_t *stored = NULL;
  int64_t bytes = 0;
  if (writer->latent < 0) writer->stored_rows = writer->pending > 0 ? writer->pending : 1;
  if (writer->pending > 0) TRY(encode_rows(writer, &stored, &bytes));
  TRY(data_hdf5_enter_priv());
  bool good = writer->latent >= 0 || create_latent(writer, writer->stored_rows);
  if (good && writer->pending > 0) good = append_chunk(writer, stored, bytes);
  const data_hdf5_reason reason = good ? (data_hdf5_reason){.code = CORE_OK} : data_hdf5_reason_priv();
  data_hdf5_leave_priv();
  CHECK(good, CORE_ERR_IO, "%s: latents cannot be written: %s", writer->temporary, reason.text);
  writer->pending = 0;
  return CORE_OK;
}

/* One row in the stored type. False when a value is not finite, or not in the stored type. */
static bool convert_row(core_dtype dtype, const float *restrict row, int64_t width, void *restrict out) {
  if (dtype == CORE_FLOAT32)
    memcpy(out, row, (size_t)width * sizeof *row);
  else if (dtype == CORE_FLOAT16)
    for (int64_t i = 0; i < width; ++i) ((uint16_t *)out)[i] = core_half_from_float(row[i]);
  else
    for (int64_t i = 0; i < width; ++i) ((uint16_t *)out)[i] = core_bfloat_from_float(row[i]);
  return data_first_non_finite_priv(dtype, out, width) < 0;
}

/* Row r of the sample into `out`; false as convert_row. */
static bool put_row(const data_writer *writer, const data_sample *sample, int64_t r, uint8_t *out) {
  if (sample->stored == NULL)
    return convert_row(writer->dtype, sample->latent + r * writer->width, writer->width, out);
  memcpy(out, (const uint8_t *)sample->stored + r * writer->row_bytes, (size_t)writer->row_bytes);
  return data_first_non_finite_priv(writer->dtype, out, writer->width) < 0;
}

static core_status add_rows(data_writer *writer, const data_sample *sample) {
  for (int64_t r = 0; r < sample->rows; ++r) {
    uint8_t *out = writer->chunk + writer->pending * writer->row_bytes;
    CHECK(put_row(writer, sample, r, out), CORE_ERR_NON_FINITE,
          "%s: sample %llu, row %lld holds a value that is NaN, infinite or beyond %s", writer->path,
          (unsigned long long)sample->id, (long long)r, core_dtype_text(writer->dtype));
    ++writer->pending;
    ++writer->rows;
    if (writer->pending == writer->chunk_rows) TRY(flush_rows(writer));
  }
  return CORE_OK;
}

/* ---- the other columns ---- */

static core_status add_tokens(data_writer *writer, const char *kind, const int32_t *token, int64_t count,
                              token_column *column) {
  if (writer->samples == 0) column->given = token != NULL;
  CHECK(column->given == (token != NULL), CORE_ERR_ARGUMENT, "%s: all samples of a shard have a %s, or none",
        writer->path, kind);
  if (token == NULL) return CORE_OK;
  CHECK(count >= 0 && count <= INT64_MAX / 8, CORE_ERR_ARGUMENT, "%s: %s of %lld tokens", writer->path, kind,
        (long long)count);
  TRY(data_bytes_append_priv(&column->token, token, count * (int64_t)sizeof *token));
  const uint64_t end = (uint64_t)column->token.count / sizeof *token;
  TRY(data_bytes_append_priv(&column->offset, &end, sizeof end));
  return CORE_OK;
}

static core_status add_key(data_writer *writer, const char *key) {
  if (writer->samples == 0) writer->keyed = key != NULL;
  CHECK(writer->keyed == (key != NULL), CORE_ERR_ARGUMENT, "%s: all samples of a shard have a key, or none",
        writer->path);
  if (key != NULL) TRY(data_bytes_append_priv(&writer->key, key, (int64_t)strlen(key) + 1));
  return CORE_OK;
}

static core_status add_sample(data_writer *writer, const data_sample *sample) {
  const bool given = sample->latent != NULL || sample->stored != NULL;
  CHECK(sample->rows >= 0 && (sample->rows == 0 || given), CORE_ERR_ARGUMENT,
        "%s: sample %llu has %lld rows%s", writer->path, (unsigned long long)sample->id,
        (long long)sample->rows, given ? "" : " and no latents");
  TRY(add_tokens(writer, "prompt", sample->prompt, sample->prompt_count, &writer->prompt));
  TRY(add_tokens(writer, "target", sample->target, sample->target_count, &writer->target));
  TRY(add_key(writer, sample->key));
  TRY(add_rows(writer, sample));
  const uint64_t end = (uint64_t)writer->rows;
  TRY(data_bytes_append_priv(&writer->id, &sample->id, sizeof sample->id));
  TRY(data_bytes_append_priv(&writer->offset, &end, sizeof end));
  TRY(data_bytes_append_priv(&writer->label, &sample->label, sizeof sample->label));
  writer->labelled = writer->labelled || sample->label != -1;
  ++writer->samples;
  return CORE_OK;
}

core_status data_writer_add(data_writer *writer, const data_sample *sample) {
  const core_status status = add_sample(writer, sample);
  writer->failed = writer->failed || status != CORE_OK;
  TRY(status);
  return CORE_OK;
}

/* ---- finishing ---- */

/* Closes what is open; false when HDF5 could not write what it still held. */
static bool close_file(data_writer *writer) {
  bool good = true;
  if (writer->latent >= 0) good = H5Dclose(writer->latent) >= 0;
  if (writer->file >= 0) good = H5Fclose(writer->file) >= 0 && good;
  writer->latent = writer->file = -1;
  return good;
}

static core_status finish(data_writer *writer) {
  int fd = -1;
  CHECK(!writer->failed, CORE_ERR_ARGUMENT, "%s: not written, a sample of it was refused before",
        writer->path);
  TRY(flush_rows(writer));
  TRY(data_hdf5_enter_priv());
  const bool good = data_writer_put_columns_priv(writer) && H5Fflush(writer->file, H5F_SCOPE_LOCAL) >= 0 &&
                    close_file(writer);
  const data_hdf5_reason reason = good ? (data_hdf5_reason){.code = CORE_OK} : data_hdf5_reason_priv();
  data_hdf5_leave_priv();
  CHECK(good, CORE_ERR_IO, "%s: cannot be written: %s", writer->temporary, reason.text);
  TRY(core_file_open(writer->temporary, O_RDONLY, &fd));
  const core_status status = core_file_sync(fd, writer->temporary);
  core_error saved;
  core_error_save(&saved);
  TRY(core_keep_first(status, &saved, core_file_close(fd, writer->temporary)));
  TRY(core_file_rename(writer->temporary, writer->path));
  writer->created = false; /* nothing to remove any more */
  TRY(core_file_sync_directory(writer->directory));
  return CORE_OK;
}

core_status data_writer_close(data_writer *writer) {
  const core_status status = finish(writer);
  core_error saved;
  core_error_save(&saved);
  data_writer_abandon(writer);
  TRY(core_keep_first(status, &saved, CORE_OK));
  return CORE_OK;
}

static void free_columns(data_writer *writer) {
  data_bytes *columns[] = {&writer->id,           &writer->offset,       &writer->label,
                           &writer->key,          &writer->prompt.token, &writer->prompt.offset,
                           &writer->target.token, &writer->target.offset};
  for (size_t i = 0; i < sizeof columns / sizeof *columns; ++i) free(columns[i]->bytes);
}

void data_writer_abandon(data_writer *writer) {
  if (writer == NULL) return;
  if (writer->file >= 0 && data_hdf5_enter_priv() == CORE_OK) {
    (void)close_file(writer);
    data_hdf5_leave_priv();
  }
  if (writer->created) (void)remove(writer->temporary);
  free_columns(writer);
  data_encoder_destroy_priv(writer->compressor);
  free(writer->chunk);
  free(writer->directory);
  free(writer->path);
  free(writer->temporary);
  free(writer);
}
