/* What antiphon pack reads. Private to data/. Input files may be hostile: nothing that a header says is
 * believed before it was compared with the size of the file. */
#ifndef DATA_PACK_IMPL_H
#define DATA_PACK_IMPL_H

#include "data/memory_impl.h"
#include "data/set_impl.h"

/* An array in a file. Owns path and descriptor. */
typedef enum data_number {
  DATA_NUMBER_FLOAT16,
  DATA_NUMBER_BFLOAT16,
  DATA_NUMBER_FLOAT32,
  DATA_NUMBER_FLOAT64,
  DATA_NUMBER_SIGNED,
  DATA_NUMBER_UNSIGNED
} data_number;

typedef struct data_array {
  char *path;
  int fd;
  data_number kind;
  int64_t value_bytes, at; /* of a value; where the first one lies */
  int32_t rank;
  int64_t shape[4]; /* unused ones are 1 */
  data_file_identity identity;
} data_array;

/* A .npy file (versions 1 to 3, C order, little-endian), or the tensor `name` of a .safetensors file. Errors:
 * ERR_NOT_FOUND, ERR_FORMAT, ERR_UNSUPPORTED, ERR_CORRUPT. */
CORE_NODISCARD core_status data_array_open_priv(const char *path, const char *name, data_array *out);
void data_array_close_priv(data_array *array);
int64_t data_array_count_priv(const data_array *array); /* of values */
/* `count` values from `first` on as they lie in the file. */
CORE_NODISCARD core_status data_array_read_priv(const data_array *array, int64_t first, int64_t count,
                                                void *out);
/* All values of an array of integers and one dimension, as int64, freed by the caller. ERR_FORMAT when one
 * does not fit between `least` and `most`. */
CORE_NODISCARD core_status data_array_integers_priv(const data_array *array, int64_t least, int64_t most,
                                                    int64_t **out);
/* The header's text of either format, parsed; for tests of hostile ones too. `bytes`: of the file. */
CORE_NODISCARD core_status data_npy_parse_priv(const char *header, int64_t length, data_array *out);
CORE_NODISCARD core_status data_safetensors_parse_priv(const char *header, int64_t length, int64_t room,
                                                       const char *name, data_array *out);

/* Where the samples of one modality come from. */
typedef struct data_source data_source;
struct data_source {
  int64_t samples, width;
  core_dtype dtype; /* as it is stored there, or float32 */
  char encoder[CORE_NAME];
  uint64_t identity; /* of everything that samples are made of */
  /* Adds samples [first, first + count). Threads share the source. */
  core_status (*copy)(const data_source *source, int64_t first, int64_t count, data_writer *writer);
  void (*close)(data_source *source);
};

CORE_NODISCARD core_status data_source_features_priv(const data_pack_options *options, data_source **out);
CORE_NODISCARD core_status data_source_set_priv(const data_pack_options *options, data_source **out);

/* The columns of a shard that a set does not keep: keys and tokens. Owns all arrays. */
typedef struct data_extras {
  int64_t samples;
  bool keyed, prompted, targeted;
  data_bytes key;  /* NUL-terminated, one after another */
  int64_t *key_at; /* [samples] */
  int32_t *prompt, *target;
  int64_t *prompt_offset, *target_offset; /* [samples + 1] */
} data_extras;

CORE_NODISCARD core_status data_extras_read_priv(const data_column *column, data_extras *out);
/* The tokens alone. */
CORE_NODISCARD core_status data_tokens_read_priv(const data_column *column, data_extras *out);
void data_extras_release_priv(data_extras *extras);

#endif
