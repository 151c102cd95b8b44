/* The block before the HDF5 file: where everything lies, and checksums of it. Private to trainer/serve. */
#ifndef TRAIN_VECTORS_IMPL_H
#define TRAIN_VECTORS_IMPL_H

#include "trainer/serve/vectors.h"

enum { TRAIN_VECTORS_HEADER = 4096, TRAIN_VECTORS_VERSION = 1 };

/* Little-endian, as it lies at the beginning of the file; the rest of TRAIN_VECTORS_HEADER bytes is zero. */
typedef struct train_vectors_header {
  char magic[16]; /* "antiphon-vectors" */
  uint32_t version, complete;
  uint64_t checkpoint, identity;
  int64_t step, samples, block_samples, blocks, rows, width;
  int64_t key_bytes; /* 0: no keys */
  int32_t labelled, kind, dtype, unused;
  char modality[CORE_NAME], toward[CORE_NAME];
  int64_t vectors_at, id_at, label_at, key_at, block_row_at, block_hash_at; /* bytes from the beginning */
  uint64_t tables;             /* of id, label, block_row as they lie in the file */
  uint64_t keys, block_hashes; /* of keys and of the table of blocks' checksums; once complete */
  uint64_t hash;               /* of all before it */
} train_vectors_header;

/* What lies where. */
typedef struct train_vectors_section {
  const char *name;
  int64_t at, bytes; /* 0 bytes: it is not there */
} train_vectors_section;
enum { TRAIN_VECTORS_SECTIONS = 6 };
/* Vectors, id, label, key, block_row, block_hash. ERR_CORRUPT when sizes overflow. */
CORE_NODISCARD core_status train_vectors_sections_priv(const train_vectors_header *header, const char *path,
                                                       train_vectors_section section[TRAIN_VECTORS_SECTIONS]);
/* Checksum of a section as it lies in the file; the seed chains several. */
CORE_NODISCARD core_status train_vectors_hash_priv(int fd, const char *path,
                                                   const train_vectors_section *section, uint64_t seed,
                                                   uint64_t *hash);
/* Checksum of one block's bytes; never 0, which stands for a block that is not there yet. */
uint64_t train_vectors_block_hash_priv(const void *bytes, size_t count);
/* Reads and checks the header and that everything lies inside the file. */
CORE_NODISCARD core_status train_vectors_header_read_priv(int fd, const char *path,
                                                          train_vectors_header *header);
/* Puts the checksum in and writes it. */
CORE_NODISCARD core_status train_vectors_header_write_priv(int fd, const char *path,
                                                           train_vectors_header *header);
CORE_NODISCARD core_status train_write_at_priv(int fd, const char *path, int64_t at, const void *bytes,
                                               int64_t count);

/* Makes the HDF5 file of this header, without values, and fills in where the datasets lie. */
CORE_NODISCARD core_status train_vectors_make_priv(const char *path, train_vectors_header *header);

#endif
