/* One shard in memory: everything but the latents, checked. Private to data/.
 *
 * Latents are seen as *bands*: band_rows consecutive rows over the whole width. A chunked dataset has one
 * band per row of chunks; a band consists of `tiles` chunks side by side (one, in files that follow the
 * format's advice). A dataset without chunks is cut into bands of about half a MiB. Bands are the unit of
 * reading, decoding and caching. */
#ifndef DATA_SHARD_IMPL_H
#define DATA_SHARD_IMPL_H

#include "core/dims.h"
#include "core/tensor.h"
#include "data/filter_impl.h"
#include "data/hdf5_impl.h"

enum { DATA_VERSION = 1, DATA_DEFAULT_CHUNK_BYTES = 512 * 1024, DATA_MOST_WIDTH = 1 << 20 };
#define DATA_FORMAT_NAME "antiphon-latents"

/* The latents of one modality in one shard. Owns path and offset. */
typedef struct data_column {
  char *path;
  data_file_identity identity;
  int64_t samples, rows, width;
  core_dtype dtype;
  int64_t *offset; /* [samples + 1]; NULL when the set has an index */
  int64_t band_rows, bands;
  int64_t tile_width, tiles;
  bool chunked, partial_unfiltered;
  data_pipeline pipeline;
  int64_t first_band; /* of this shard among the bands of its modality; set by the set */
} data_column;

/* What a file holds. Owns all arrays until the set takes them. */
typedef struct data_shard {
  data_column column;
  char modality[CORE_NAME];
  char encoder[CORE_NAME];
  uint64_t *id;   /* [samples] */
  int32_t *label; /* [samples], NULL: none */
} data_shard;

/* Reads and checks the file. Takes the HDF5 lock. modality: the expected one, NULL: any. */
CORE_NODISCARD core_status data_shard_open_priv(const char *path, const char *modality, data_shard *out);
void data_shard_release_priv(data_shard *shard);
void data_column_release_priv(data_column *column);

int64_t data_column_row_bytes_priv(const data_column *column);
int64_t data_column_band_bytes_priv(const data_column *column); /* decoded, padding rows included */
int64_t data_column_tile_bytes_priv(const data_column *column); /* decoded, one chunk */
/* Rows of band `band` that exist. */
int64_t data_column_band_count_priv(const data_column *column, int64_t band);

/* Opens the latents of `column` for reading and checks that file and layout are still what the column says:
 * otherwise ERR_MISMATCH. Inside HDF5. */
CORE_NODISCARD core_status data_column_open_priv(const data_column *column, data_hdf5_file *file,
                                                 data_hdf5_dataset *latent);
/* Where one chunk lies and how it is stored. */
typedef struct data_tile {
  int64_t band, tile; /* in: which */
  int64_t at, bytes;  /* out: stored bytes in the file; at = -1: among the metadata, HDF5 must read them */
  uint32_t skipped;   /* out: filters that were not applied */
} data_tile;
/* Finds a chunk, or a band of a dataset without chunks. What the file claims is checked against its size and
 * against what the filters can make. Inside. */
CORE_NODISCARD core_status data_column_locate_priv(const data_column *column, const data_hdf5_dataset *latent,
                                                   data_tile *tile);
/* A band of a dataset without chunks into `rows`. Inside. */
CORE_NODISCARD core_status data_column_read_band_priv(const data_column *column,
                                                      const data_hdf5_dataset *latent, int64_t band,
                                                      uint8_t *rows);
/* Index of the first NaN or infinity among `count` values, -1: none. */
int64_t data_first_non_finite_priv(core_dtype dtype, const void *values, int64_t count);

#endif
