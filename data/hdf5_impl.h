/* The narrow door to HDF5. Private to data/.
 *
 * HDF5 is not thread-safe in every build, and where it is, one lock covers the whole library. So one
 * process-wide lock is ours: every call of an H5 function lies between data_hdf5_enter_priv and
 * data_hdf5_leave_priv. Functions below marked "inside" are called by a thread that has entered.
 *
 * Files may be hostile: whatever they claim is checked against the file's size before memory is taken. */
#ifndef DATA_HDF5_IMPL_H
#define DATA_HDF5_IMPL_H

#include <hdf5.h>
#include <stdbool.h>

#include "core/status.h"
#include "data/filter_impl.h" /* data_pipeline */

/* Largest chunk that is accepted; a chunk of this size may be claimed by any file; most bytes that one stored
 * byte may stand for (deflate: by its format; zstd: by what makes sense). */
enum {
  DATA_MOST_CHUNK_BYTES = 1 << 30,
  DATA_FREE_CHUNK_BYTES = 4 << 20,
  DATA_MOST_DEFLATE = 1100,
  DATA_MOST_ZSTD = 1 << 14
};

/* Most bytes that one stored byte may stand for behind this filter. */
int64_t data_filter_most_priv(int32_t id);

/* Takes the lock, silences HDF5's own printing on this thread, registers zstd the first time. When it fails
 * the lock is not held. */
CORE_NODISCARD core_status data_hdf5_enter_priv(void);
void data_hdf5_leave_priv(void);

/* The innermost message on HDF5's error stack, for our messages, and what it means: ERR_IO when the system
 * refused a read or write, ERR_CORRUPT when the file does not make sense. Clears the stack. Inside. */
typedef struct data_hdf5_reason {
  char text[192];
  core_status code;
} data_hdf5_reason;
data_hdf5_reason data_hdf5_reason_priv(void);

typedef struct data_hdf5_file {
  hid_t id;
  const char *path; /* borrowed */
  int64_t bytes;
} data_hdf5_file;

/* Opens read-only, without file locks (shards are published by rename and never change). Closing the file
 * closes what was opened in it. Errors: ERR_NOT_FOUND, ERR_IO, ERR_FORMAT (not HDF5), ERR_CORRUPT. Inside. */
CORE_NODISCARD core_status data_hdf5_open_priv(const char *path, data_hdf5_file *out);
void data_hdf5_close_priv(data_hdf5_file *file);

/* What tells one version of a file from another. */
typedef struct data_file_identity {
  int64_t device, node, bytes, seconds, nanoseconds; /* the last two: of the last change of its content */
} data_file_identity;

bool data_identity_equal_priv(const data_file_identity *a, const data_file_identity *b);
/* Of a name, without opening it; ERR_NOT_FOUND, ERR_IO. Not inside. */
CORE_NODISCARD core_status data_identity_of_priv(const char *path, data_file_identity *out);
/* Whether the open file is still the one that was seen: ERR_MISMATCH when it was written to since. */
CORE_NODISCARD core_status data_identity_unchanged_priv(const char *path, int fd,
                                                        const data_file_identity *seen);
/* Of the file that is open, whatever its name now stands for. Inside. */
CORE_NODISCARD core_status data_hdf5_identity_priv(const data_hdf5_file *file, data_file_identity *out);
/* A descriptor of the open file for reading outside HDF5; the caller closes it. Inside. */
CORE_NODISCARD core_status data_hdf5_descriptor_priv(const data_hdf5_file *file, int *fd);

/* Root attribute as NUL-terminated text: fixed or variable length, ASCII or UTF-8, any padding. Inside. */
CORE_NODISCARD core_status data_hdf5_text_priv(const data_hdf5_file *file, const char *name, char *text,
                                               size_t capacity);
/* Root attribute, any integer type. Inside. */
CORE_NODISCARD core_status data_hdf5_integer_priv(const data_hdf5_file *file, const char *name,
                                                  int64_t *value);

/* A dataset and what its header claims, checked. */
typedef struct data_hdf5_dataset {
  hid_t id;
  const data_hdf5_file *file;
  char name[32];
  H5T_class_t type_class;
  int64_t type_bytes;
  bool is_signed;     /* integers */
  bool little_endian; /* or without order */
  int32_t rank;       /* 1 or 2 */
  int64_t extent[2];
  bool chunked;
  int64_t chunk[2];
  bool partial_unfiltered; /* chunks over the edge are stored without filters */
  data_pipeline pipeline;
} data_hdf5_dataset;

/* Whether the root group has a link of this name. Inside. */
bool data_hdf5_has_priv(const data_hdf5_file *file, const char *name);
/* Opens /name, which must lie in this very file and have `rank` dimensions. Inside. */
CORE_NODISCARD core_status data_hdf5_dataset_open_priv(const data_hdf5_file *file, const char *name,
                                                       int32_t rank, data_hdf5_dataset *out);
void data_hdf5_dataset_close_priv(data_hdf5_dataset *dataset);

/* All values of a one-dimensional integer dataset of any width, sign and byte order. ERR_FORMAT when the type
 * is not an integer or a value does not fit. Inside. */
CORE_NODISCARD core_status data_hdf5_read_unsigned_priv(const data_hdf5_dataset *dataset, uint64_t *values);
CORE_NODISCARD core_status data_hdf5_read_int32_priv(const data_hdf5_dataset *dataset, int32_t *values);

#endif
