/* Outline: what a shard says about itself; with `deep`, what its values say: every chunk is decompressed,
 * every latent seen, every token read. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "data/memory_impl.h"
#include "data/set_impl.h"

bool data_shard_is(const char *path) {
  data_hdf5_file file;
  char text[64] = "";
  if (data_hdf5_enter_priv() != CORE_OK) return false;
  const bool opened = data_hdf5_open_priv(path, &file) == CORE_OK;
  const bool is = opened && data_hdf5_text_priv(&file, "format", text, sizeof text) == CORE_OK &&
                  strcmp(text, DATA_FORMAT_NAME) == 0;
  data_hdf5_close_priv(&file);
  data_hdf5_leave_priv();
  core_error_clear(); /* "no" is an answer here, not a failure */
  return is;
}

static void describe_latents(const data_column *column, FILE *out) {
  char filters[96];
  data_pipeline_text_priv(&column->pipeline, filters, sizeof filters);
  (void)fprintf(out, "latents    %" PRId64 " rows of %" PRId64 " %s\n", column->rows, column->width,
                core_dtype_text(column->dtype));
  if (!column->chunked)
    (void)fprintf(out, "storage    contiguous\n");
  else
    (void)fprintf(out, "storage    chunks of %" PRId64 " x %" PRId64 " (%.0f KiB), filter %s\n",
                  column->band_rows, column->tile_width, (double)data_column_tile_bytes_priv(column) / 1024,
                  filters);
}

static void describe_samples(const data_set *set, FILE *out) {
  const data_modality_info *info = &set->info[0];
  int64_t labelled = 0;
  for (int64_t i = 0; i < set->samples; ++i) labelled += set->label[i] != -1;
  (void)fprintf(out, "samples    %" PRId64 ", %" PRId64 " of them without this modality\n", set->samples,
                info->absent);
  const int64_t present = set->samples - info->absent;
  if (present > 0)
    (void)fprintf(out, "rows       %.2f a sample that has any, at most %" PRId64 "\n",
                  (double)info->tokens / (double)present, info->longest);
  if (set->samples > 0)
    (void)fprintf(out, "ids        from %" PRIu64 " to %" PRIu64 " in file order\n", set->id[0],
                  set->id[set->samples - 1]);
  (void)fprintf(out, "labels     %" PRId64 " of %" PRId64 " samples\n", labelled, set->samples);
}

static core_status describe_size(const data_set *set, FILE *out) {
  const data_column *column = data_set_column_priv(set, 0, 0);
  int64_t bytes = 0;
  TRY(core_file_size(column->path, &bytes));
  const double raw = (double)column->rows * (double)data_column_row_bytes_priv(column);
  (void)fprintf(out, "size       %.2f MiB, %.2f MiB of latents before filters\n", (double)bytes / 1048576,
                raw / 1048576);
  return CORE_OK;
}

/* ---- deep ---- */

/* Inside HDF5. */
static core_status read_tokens(const data_hdf5_file *file, const char *name) {
  data_hdf5_dataset dataset;
  int32_t *values = NULL;
  if (!data_hdf5_has_priv(file, name)) return CORE_OK;
  TRY(data_hdf5_dataset_open_priv(file, name, 1, &dataset));
  core_status status = DATA_ALLOCATE(dataset.extent[0], name, &values);
  if (status == CORE_OK) status = data_hdf5_read_int32_priv(&dataset, values);
  free(values);
  data_hdf5_dataset_close_priv(&dataset);
  TRY(status);
  return CORE_OK;
}

static core_status read_columns(const char *path) {
  data_hdf5_file file;
  TRY(data_hdf5_enter_priv());
  core_status status = data_hdf5_open_priv(path, &file);
  if (status == CORE_OK) status = read_tokens(&file, "prompt_token");
  if (status == CORE_OK) status = read_tokens(&file, "target_token");
  data_hdf5_close_priv(&file);
  data_hdf5_leave_priv();
  TRY(status);
  return CORE_OK;
}

static core_status describe_values(data_set *set, FILE *out) {
  double *mean = NULL, *deviation = NULL, centre = 0, spread = 0;
  const int64_t width = set->info[0].width;
  TRY(DATA_ALLOCATE(width, "moments", &mean));
  core_status status = DATA_ALLOCATE(width, "moments", &deviation);
  if (status == CORE_OK)
    status = data_set_moments(set, 0, DATA_NON_FINITE_ERROR, NULL, NULL, mean, deviation);
  for (int64_t c = 0; status == CORE_OK && c < width; ++c) {
    centre += mean[c] / (double)width;
    spread += deviation[c] * deviation[c] / (double)width;
  }
  free(mean);
  free(deviation);
  TRY(status);
  (void)fprintf(out, "values     all finite; mean over features %.4g, deviation %.4g\n", centre,
                sqrt(spread));
  return CORE_OK;
}

static core_status describe_set(data_set *set, const char *path, bool deep, FILE *out) {
  const data_column *column = data_set_column_priv(set, 0, 0);
  (void)fprintf(out, "%s\nformat     %s, version %d\nmodality   %s\nencoder    %s\n", path, DATA_FORMAT_NAME,
                DATA_VERSION, set->info[0].name, set->info[0].encoder);
  describe_latents(column, out);
  describe_samples(set, out);
  TRY(describe_size(set, out));
  if (!deep) return CORE_OK;
  TRY(read_columns(path));
  if (set->samples > 0) TRY(describe_values(set, out));
  return CORE_OK;
}

core_status data_shard_describe(const char *path, bool deep, FILE *out) {
  data_set *set = NULL;
  TRY(data_set_open_file_priv(path, &set));
  const core_status status = describe_set(set, path, deep, out);
  data_set_close(set);
  TRY(status);
  return CORE_OK;
}
