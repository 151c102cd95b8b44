/* Outline: attributes; the small datasets; the shape of the latents; where their chunks lie. */
#include <stdlib.h>
#include <string.h>

#include "data/memory_impl.h"
#include "data/shard_impl.h"

void data_column_release_priv(data_column *column) {
  free(column->path);
  free(column->offset);
  *column = (data_column){0};
}

void data_shard_release_priv(data_shard *shard) {
  data_column_release_priv(&shard->column);
  free(shard->id);
  free(shard->label);
  *shard = (data_shard){0};
}

int64_t data_column_row_bytes_priv(const data_column *column) {
  return column->width * (int64_t)core_dtype_size(column->dtype);
}

int64_t data_column_band_bytes_priv(const data_column *column) {
  return column->band_rows * data_column_row_bytes_priv(column);
}

int64_t data_column_tile_bytes_priv(const data_column *column) {
  return column->band_rows * column->tile_width * (int64_t)core_dtype_size(column->dtype);
}

int64_t data_column_band_count_priv(const data_column *column, int64_t band) {
  const int64_t left = column->rows - band * column->band_rows;
  return left < column->band_rows ? left : column->band_rows;
}

/* ---- attributes ---- */

static core_status read_attributes(const data_hdf5_file *file, const char *modality, data_shard *shard) {
  char text[4096];
  int64_t version = 0;
  data_column *column = &shard->column;
  TRY(data_hdf5_text_priv(file, "format", text, sizeof text));
  CHECK(strcmp(text, DATA_FORMAT_NAME) == 0, CORE_ERR_FORMAT, "%s: format is \"%.64s\", expected \"%s\"",
        file->path, text, DATA_FORMAT_NAME);
  TRY(data_hdf5_integer_priv(file, "version", &version));
  CHECK(version == DATA_VERSION, CORE_ERR_UNSUPPORTED, "%s: version is %lld, this program reads version %d",
        file->path, (long long)version, DATA_VERSION);
  TRY(data_hdf5_text_priv(file, "modality", shard->modality, sizeof shard->modality));
  CHECK(modality == NULL || strcmp(modality, shard->modality) == 0, CORE_ERR_MISMATCH,
        "%s: modality is \"%s\", the file name says \"%s\"", file->path, shard->modality, modality);
  TRY(data_hdf5_text_priv(file, "encoder", shard->encoder, sizeof shard->encoder));
  TRY(data_hdf5_text_priv(file, "dtype", text, sizeof text));
  column->dtype = core_dtype_parse(text);
  CHECK(column->dtype == CORE_FLOAT16 || column->dtype == CORE_BFLOAT16 || column->dtype == CORE_FLOAT32,
        CORE_ERR_FORMAT, "%s: dtype is \"%.64s\", expected float16, bfloat16 or float32", file->path, text);
  TRY(data_hdf5_integer_priv(file, "width", &column->width));
  CHECK(column->width >= 1 && column->width <= DATA_MOST_WIDTH, CORE_ERR_FORMAT,
        "%s: width is %lld, expected 1 to %d", file->path, (long long)column->width, DATA_MOST_WIDTH);
  return CORE_OK;
}

/* ---- small datasets ---- */

static core_status read_ids(const data_hdf5_file *file, data_shard *shard) {
  data_hdf5_dataset dataset;
  TRY(data_hdf5_dataset_open_priv(file, "id", 1, &dataset));
  shard->column.samples = dataset.extent[0];
  core_status status = DATA_ALLOCATE(dataset.extent[0], "ids", &shard->id);
  if (status == CORE_OK) status = data_hdf5_read_unsigned_priv(&dataset, shard->id);
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  return CORE_OK;
}

/* Offsets of `samples` sequences in `rows` rows: start 0, never decrease, end at rows. */
static core_status check_offsets(const data_hdf5_dataset *dataset, int64_t samples, int64_t rows,
                                 const uint64_t *offset) {
  const char *path = dataset->file->path, *name = dataset->name;
  CHECK(offset[0] == 0, CORE_ERR_CORRUPT, "%s: \"%s\" starts with %llu, expected 0", path, name,
        (unsigned long long)offset[0]);
  for (int64_t i = 0; i < samples; ++i)
    CHECK(offset[i] <= offset[i + 1], CORE_ERR_CORRUPT,
          "%s: \"%s\" decreases from %llu to %llu at sample %lld", path, name, (unsigned long long)offset[i],
          (unsigned long long)offset[i + 1], (long long)i);
  CHECK(offset[samples] == (uint64_t)rows, CORE_ERR_CORRUPT,
        "%s: \"%s\" ends with %llu, expected the %lld rows", path, name, (unsigned long long)offset[samples],
        (long long)rows);
  return CORE_OK;
}

static core_status read_offsets(const data_hdf5_file *file, const char *name, int64_t samples, int64_t rows,
                                int64_t **out) {
  data_hdf5_dataset dataset;
  uint64_t *offset = NULL;
  core_status status = CORE_OK;
  *out = NULL;
  TRY(data_hdf5_dataset_open_priv(file, name, 1, &dataset));
  if (dataset.extent[0] != samples + 1)
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__,
                              "%s: \"%s\" has %lld entries, expected %lld (samples + 1)", file->path, name,
                              (long long)dataset.extent[0], (long long)samples + 1);
  if (status == CORE_OK) status = DATA_ALLOCATE(samples + 1, "offsets", &offset);
  if (status == CORE_OK) status = data_hdf5_read_unsigned_priv(&dataset, offset);
  if (status == CORE_OK) status = check_offsets(&dataset, samples, rows, offset);
  data_hdf5_dataset_close_priv(&dataset);
  if (status != CORE_OK) free(offset);
  TRY(status);
  *out = (int64_t *)offset; /* all values are at most `rows`, so they fit */
  return CORE_OK;
}

static core_status read_labels(const data_hdf5_file *file, data_shard *shard) {
  data_hdf5_dataset dataset;
  const int64_t samples = shard->column.samples;
  core_status status = CORE_OK;
  if (!data_hdf5_has_priv(file, "label")) return CORE_OK;
  TRY(data_hdf5_dataset_open_priv(file, "label", 1, &dataset));
  if (dataset.extent[0] != samples)
    status = core_error_begin(CORE_ERR_CORRUPT, __func__, __FILE__, __LINE__,
                              "%s: \"label\" has %lld entries, expected %lld (one a sample)", file->path,
                              (long long)dataset.extent[0], (long long)samples);
  if (status == CORE_OK) status = DATA_ALLOCATE(samples, "labels", &shard->label);
  if (status == CORE_OK) status = data_hdf5_read_int32_priv(&dataset, shard->label);
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  return CORE_OK;
}

/* prompt_token with prompt_offset, target_token with target_offset: both or neither. */
static core_status check_tokens(const data_hdf5_file *file, const char *kind, int64_t samples) {
  char token[32], offset[32];
  data_hdf5_dataset dataset;
  int64_t *offsets = NULL;
  (void)snprintf(token, sizeof token, "%s_token", kind);
  (void)snprintf(offset, sizeof offset, "%s_offset", kind);
  const bool has = data_hdf5_has_priv(file, token);
  CHECK(has == data_hdf5_has_priv(file, offset), CORE_ERR_FORMAT,
        "%s: \"%s\" and \"%s\" belong together, one is missing", file->path, token, offset);
  if (!has) return CORE_OK;
  TRY(data_hdf5_dataset_open_priv(file, token, 1, &dataset));
  const bool integers = dataset.type_class == H5T_INTEGER;
  const int64_t count = dataset.extent[0];
  data_hdf5_dataset_close_priv(&dataset);
  CHECK(integers, CORE_ERR_FORMAT, "%s: \"%s\" must hold integers", file->path, token);
  TRY(read_offsets(file, offset, samples, count, &offsets));
  free(offsets);
  return CORE_OK;
}

static core_status check_keys(const data_hdf5_file *file, int64_t samples) {
  data_hdf5_dataset dataset;
  if (!data_hdf5_has_priv(file, "key")) return CORE_OK;
  TRY(data_hdf5_dataset_open_priv(file, "key", 1, &dataset));
  const bool strings = dataset.type_class == H5T_STRING;
  const int64_t count = dataset.extent[0];
  data_hdf5_dataset_close_priv(&dataset);
  CHECK(strings && count == samples, CORE_ERR_FORMAT,
        "%s: \"key\" must hold %lld strings (one a sample), it has %lld %s", file->path, (long long)samples,
        (long long)count, strings ? "strings" : "other values");
  return CORE_OK;
}

/* ---- latents ---- */

/* The type in the file that `dtype` stands for. */
static bool latent_type_fits(const data_hdf5_dataset *latent, core_dtype dtype) {
  const H5T_class_t wanted = dtype == CORE_BFLOAT16 ? H5T_INTEGER : H5T_FLOAT;
  return latent->type_class == wanted && latent->type_bytes == (int64_t)core_dtype_size(dtype) &&
         latent->little_endian && !latent->is_signed;
}

static core_status check_latent(const data_hdf5_dataset *latent, const data_column *column) {
  CHECK(
      latent_type_fits(latent, column->dtype), CORE_ERR_FORMAT,
      "%s: \"latent\" holds %lld-byte %s (%s-endian), expected little-endian %s as the attribute dtype says",
      latent->file->path, (long long)latent->type_bytes,
      latent->type_class == H5T_FLOAT     ? "floats"
      : latent->type_class == H5T_INTEGER ? "integers"
                                          : "values that are no numbers",
      latent->little_endian ? "little" : "big",
      column->dtype == CORE_BFLOAT16 ? "uint16 (bfloat16)" : core_dtype_text(column->dtype));
  CHECK(latent->extent[1] == column->width, CORE_ERR_CORRUPT,
        "%s: \"latent\" is %lld wide, the attribute width says %lld", latent->file->path,
        (long long)latent->extent[1], (long long)column->width);
  return CORE_OK;
}

/* The bands of the latents. */
static core_status lay_out(const data_hdf5_dataset *latent, data_column *column) {
  const int64_t row_bytes = data_column_row_bytes_priv(column);
  column->rows = latent->extent[0];
  column->chunked = latent->chunked;
  column->partial_unfiltered = latent->partial_unfiltered;
  column->pipeline = latent->pipeline;
  column->tile_width = latent->chunked ? latent->chunk[1] : column->width;
  column->tiles = (column->width + column->tile_width - 1) / column->tile_width;
  column->band_rows = latent->chunked ? latent->chunk[0] : DATA_DEFAULT_CHUNK_BYTES / row_bytes;
  if (column->band_rows < 1) column->band_rows = 1;
  /* Only decoding needs the padding rows of a chunk, and a band of several chunks is copied row by row. */
  CHECK(column->band_rows <= DATA_MOST_CHUNK_BYTES / row_bytes, CORE_ERR_UNSUPPORTED,
        "%s: \"latent\" has chunks of %lld rows of %lld bytes, expected at most %d bytes", latent->file->path,
        (long long)column->band_rows, (long long)row_bytes, DATA_MOST_CHUNK_BYTES);
  column->bands = (column->rows + column->band_rows - 1) / column->band_rows;
  CHECK(column->bands <= latent->file->bytes, CORE_ERR_CORRUPT,
        "%s: \"latent\" claims %lld chunks in a file of %lld bytes", latent->file->path,
        (long long)column->bands, (long long)latent->file->bytes);
  return CORE_OK;
}

static core_status read_latent_shape(const data_hdf5_file *file, data_column *column) {
  data_hdf5_dataset latent;
  TRY(data_hdf5_dataset_open_priv(file, "latent", 2, &latent));
  core_status status = check_latent(&latent, column);
  if (status == CORE_OK) status = lay_out(&latent, column);
  data_hdf5_dataset_close_priv(&latent);
  TRY(status);
  return CORE_OK;
}

static core_status read_shard(const data_hdf5_file *file, const char *modality, data_shard *shard) {
  data_column *column = &shard->column;
  TRY(data_text_priv(&column->path, "%s", file->path));
  TRY(data_hdf5_identity_priv(file, &column->identity));
  TRY(read_attributes(file, modality, shard));
  TRY(read_ids(file, shard));
  TRY(read_latent_shape(file, column));
  TRY(read_offsets(file, "offset", column->samples, column->rows, &column->offset));
  TRY(read_labels(file, shard));
  TRY(check_keys(file, column->samples));
  TRY(check_tokens(file, "prompt", column->samples));
  TRY(check_tokens(file, "target", column->samples));
  return CORE_OK;
}

core_status data_shard_open_priv(const char *path, const char *modality, data_shard *out) {
  data_hdf5_file file;
  *out = (data_shard){0};
  TRY(data_hdf5_enter_priv());
  core_status status = data_hdf5_open_priv(path, &file);
  if (status == CORE_OK) status = read_shard(&file, modality, out);
  data_hdf5_close_priv(&file);
  data_hdf5_leave_priv();
  if (status != CORE_OK) data_shard_release_priv(out);
  TRY(status);
  return CORE_OK;
}

/* ---- reading ---- */

/* The very file that was seen when the set was opened: shards are published by rename and never change. */
static core_status check_same_file(const data_column *column, const data_hdf5_file *file) {
  data_file_identity now;
  TRY(data_hdf5_identity_priv(file, &now));
  CHECK(data_identity_equal_priv(&now, &column->identity), CORE_ERR_MISMATCH,
        "%s: was changed while it was in use", column->path);
  return CORE_OK;
}

static bool same_layout(const data_column *a, const data_column *b) {
  if (a->rows != b->rows || a->band_rows != b->band_rows || a->tile_width != b->tile_width ||
      a->chunked != b->chunked || a->partial_unfiltered != b->partial_unfiltered ||
      a->pipeline.count != b->pipeline.count)
    return false;
  for (int32_t i = 0; i < a->pipeline.count; ++i)
    if (a->pipeline.id[i] != b->pipeline.id[i] || a->pipeline.value[i] != b->pipeline.value[i]) return false;
  return true;
}

core_status data_column_open_priv(const data_column *column, data_hdf5_file *file,
                                  data_hdf5_dataset *latent) {
  data_column now = {.width = column->width, .dtype = column->dtype};
  latent->id = -1;
  TRY(data_hdf5_open_priv(column->path, file));
  core_status status = check_same_file(column, file);
  if (status == CORE_OK) status = data_hdf5_dataset_open_priv(file, "latent", 2, latent);
  if (status == CORE_OK) status = check_latent(latent, column);
  if (status == CORE_OK) status = lay_out(latent, &now);
  if (status != CORE_OK) data_hdf5_close_priv(file);
  TRY(status);
  if (!same_layout(&now, column)) data_hdf5_close_priv(file);
  CHECK(file->id >= 0, CORE_ERR_MISMATCH, "%s: was changed while it was in use", column->path);
  return CORE_OK;
}

/* A dataset without chunks lies in one piece, or (small ones) among the metadata. */
static void locate_band(const data_column *column, const data_hdf5_dataset *latent, data_tile *tile) {
  const int64_t row_bytes = data_column_row_bytes_priv(column);
  const haddr_t start = H5Dget_offset(latent->id);
  (void)H5Eclear2(H5E_DEFAULT);
  tile->skipped = 0;
  tile->bytes = data_column_band_count_priv(column, tile->band) * row_bytes;
  tile->at = start == HADDR_UNDEF ? -1 : (int64_t)start + tile->band * column->band_rows * row_bytes;
}

static core_status locate_chunk(const data_column *column, const data_hdf5_dataset *latent, data_tile *tile) {
  const int64_t row = tile->band * column->band_rows, feature = tile->tile * column->tile_width;
  const int64_t most = data_stored_most_priv(data_column_tile_bytes_priv(column));
  const hsize_t corner[2] = {(hsize_t)row, (hsize_t)feature};
  haddr_t at = HADDR_UNDEF;
  hsize_t size = 0;
  data_hdf5_reason reason = {.code = CORE_OK};
  if (H5Dget_chunk_info_by_coord(latent->id, corner, &tile->skipped, &at, &size) < 0)
    reason = data_hdf5_reason_priv();
  CHECK(reason.code == CORE_OK, reason.code, "%s: chunk at row %lld: %s", column->path, (long long)row,
        reason.text);
  CHECK(size > 0 && at != HADDR_UNDEF, CORE_ERR_CORRUPT, "%s: chunk at row %lld was never written",
        column->path, (long long)row);
  CHECK(size <= (hsize_t)most, CORE_ERR_CORRUPT,
        "%s: chunk at row %lld claims %llu stored bytes, expected at most %lld", column->path, (long long)row,
        (unsigned long long)size, (long long)most);
  CHECK(column->pipeline.count > 0 || (int64_t)size == data_column_tile_bytes_priv(column), CORE_ERR_CORRUPT,
        "%s: chunk at row %lld stores %llu bytes, expected %lld", column->path, (long long)row,
        (unsigned long long)size, (long long)data_column_tile_bytes_priv(column));
  const bool partial = row + column->band_rows > column->rows || feature + column->tile_width > column->width;
  if (partial && column->partial_unfiltered) tile->skipped = UINT32_MAX;
  tile->at = at <= INT64_MAX ? (int64_t)at : INT64_MAX;
  tile->bytes = (int64_t)size;
  return CORE_OK;
}

core_status data_column_locate_priv(const data_column *column, const data_hdf5_dataset *latent,
                                    data_tile *tile) {
  if (column->chunked)
    TRY(locate_chunk(column, latent, tile));
  else
    locate_band(column, latent, tile);
  const int64_t file = latent->file->bytes;
  CHECK(tile->at <= file && tile->bytes <= file - (tile->at > 0 ? tile->at : 0), CORE_ERR_CORRUPT,
        "%s: chunk %lld lies at byte %lld, %lld long, in a file of %lld", column->path, (long long)tile->band,
        (long long)tile->at, (long long)tile->bytes, (long long)file);
  return CORE_OK;
}

core_status data_column_read_band_priv(const data_column *column, const data_hdf5_dataset *latent,
                                       int64_t band, uint8_t *rows) {
  const hsize_t start[2] = {(hsize_t)(band * column->band_rows), 0};
  const hsize_t count[2] = {(hsize_t)data_column_band_count_priv(column, band), (hsize_t)column->width};
  const hid_t type = H5Dget_type(latent->id); /* of the file: nothing is converted */
  const hid_t from = H5Dget_space(latent->id), to = H5Screate_simple(2, count, NULL);
  const bool good = type >= 0 && from >= 0 && to >= 0 &&
                    H5Sselect_hyperslab(from, H5S_SELECT_SET, start, NULL, count, NULL) >= 0 &&
                    H5Dread(latent->id, type, to, from, H5P_DEFAULT, rows) >= 0;
  const data_hdf5_reason reason = good ? (data_hdf5_reason){.code = CORE_OK} : data_hdf5_reason_priv();
  if (type >= 0) (void)H5Tclose(type);
  if (from >= 0) (void)H5Sclose(from);
  if (to >= 0) (void)H5Sclose(to);
  CHECK(good, reason.code, "%s: rows from %llu on cannot be read: %s", column->path,
        (unsigned long long)start[0], reason.text);
  return CORE_OK;
}
