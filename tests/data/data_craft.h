/* Shards made with the HDF5 library alone, in the styles of other programs and with deliberate faults. */
#ifndef DATA_CRAFT_H
#define DATA_CRAFT_H

#include <stdbool.h>
#include <stdint.h>

typedef enum craft_text {
  CRAFT_VARIABLE_UTF8,
  CRAFT_VARIABLE_ASCII,
  CRAFT_FIXED_NUL,
  CRAFT_FIXED_SPACE
} craft_text;

/* Zero-initialised plus craft_sound() is a small sound shard of modality "image": 4 samples, 6 rows of
 * width 3. */
typedef struct craft {
  const char *format, *modality, *encoder, *dtype;
  int64_t version, width; /* attributes */
  craft_text text;
  bool small_integers; /* attributes as 16 bits, ids as big-endian int32, offsets as int32, labels as int8 */
  bool wide_labels;    /* labels as uint64 */
  bool extra;          /* attributes, groups and datasets that the format does not know */
  int64_t samples, rows, columns;
  const int64_t *id, *offset, *label; /* label NULL: none */
  const float *latent;                /* [rows, columns] */
  bool contiguous, double_latent, flat_latent, big_endian_latent;
  int64_t chunk_rows, chunk_columns; /* 0: all rows, all columns */
  bool gzip, shuffle, checksum, nbit, no_fill_of_edges;
  int64_t offsets;      /* entries of offset, 0: samples + 1 */
  int64_t claimed_rows; /* extent of latent beyond what is written, 0: rows */
  const char *left_out; /* name of a dataset or attribute that is missing */
  const char *linked;   /* name of a dataset that is an external link to nowhere */
  bool hole;            /* the first chunk is never written */
  const void *raw;      /* stored bytes of the first chunk instead of the right ones */
  int64_t raw_bytes;
  int zstd_declared; /* declare filter 32015 and write `raw` */
} craft;

craft craft_sound(void);
void craft_write(const craft *c, const char *path);

#endif
