/* The index of a split: one file that stands for the headers of all its shards. Private to data/.
 *
 *   blocks   of each shard, DATA_INDEX_BLOCK samples at a time: ids; for each modality labels and offsets;
 *            xxHash64 of the block
 *   table    head, modalities (with their runs of lengths and the samples that hold values that are not
 *            finite), shards (with size, time of change and layout of each file)
 *   footer   where the table lies, and the hash of footer and table
 *
 * Opening reads footer and table and looks at every file's size and time without opening it. Blocks are read
 * when a stream needs them. Numbers are little-endian; blocks and parts of the table are padded to 8 bytes.
 */
#ifndef DATA_INDEX_IMPL_H
#define DATA_INDEX_IMPL_H

#include "data/set_impl.h"

#define DATA_INDEX_FILE "shards.index"
#define DATA_INDEX_MAGIC "antiphix"
enum { DATA_INDEX_VERSION = 1, DATA_INDEX_BLOCK = 4096 };

typedef struct data_index_footer {
  char magic[8];
  int64_t version, table_at, table_bytes;
  uint64_t hash; /* of the fields above and the table */
} data_index_footer;

typedef struct data_index_head {
  int64_t modalities, shards, samples, block_samples;
  int64_t values_checked; /* all latents were read: the lists of non-finite samples are whole */
} data_index_head;

/* Followed by runs[runs] of data_length_run and bad[bad] of int64, samples in file order, rising. */
typedef struct data_index_modality {
  char name[CORE_NAME], encoder[CORE_NAME];
  int64_t dtype, width, tokens, longest, absent, labelled, runs, bad;
} data_index_modality;

/* Followed by one data_index_column for every modality. */
typedef struct data_index_shard {
  int64_t samples, block_at;
  uint64_t id_hash;
} data_index_shard;

typedef struct data_index_column {
  int64_t bytes, seconds, nanoseconds; /* of the file */
  int64_t rows, band_rows, tile_width, chunked, partial_unfiltered;
  uint64_t offset_hash;
  int64_t filters;
  int32_t id[DATA_MAX_FILTERS];
  uint32_t value[DATA_MAX_FILTERS];
} data_index_column;

/* Bytes of a block of `count` samples, its hash included. */
int64_t data_index_block_bytes_priv(int64_t modalities, int64_t count);

/* *indexed: the split has an index; then it must be one of these very shards, else ERR_MISMATCH says what to
 * do. shards: number of files that a modality has now. */
CORE_NODISCARD core_status data_index_open_priv(const char *directory, const char *split,
                                                const char *const *modalities, int32_t modality_count,
                                                int32_t shards, bool *indexed, data_set **out);
void data_index_close_priv(data_index *index); /* NULL is allowed */
int64_t data_index_scratch_priv(const data_index *index);
/* As data_set_read_samples_priv. */
CORE_NODISCARD core_status data_index_read_priv(const data_set *set, int32_t k, int64_t first, int64_t count,
                                                uint8_t *scratch, const data_samples *out, int64_t at);
/* Whether all latents were read when the index was made, and whether sample `index` of the file order then
 * held a value that is not finite. */
bool data_index_values_checked_priv(const data_index *index);
bool data_index_is_bad_priv(const data_index *index, int32_t m, int64_t sample);
int64_t data_index_bad_count_priv(const data_index *index, int32_t m);
/* Compares ids and offsets in the open shard k with what the index says: ERR_MISMATCH. scratch: uint64
 * [data_index_most_samples + 1]. Inside HDF5. */
CORE_NODISCARD core_status data_index_verify_shard_priv(const data_set *set, int32_t m, int32_t k,
                                                        const data_hdf5_file *file, uint64_t *scratch);
/* Samples of the largest shard. */
int64_t data_index_most_samples_priv(const data_set *set);

#endif
