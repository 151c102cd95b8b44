/* The table of an index in memory, parsed and compared with its hash. Private to data/. */
#ifndef DATA_INDEX_OPEN_IMPL_H
#define DATA_INDEX_OPEN_IMPL_H

#include "data/index_impl.h"

typedef struct data_index_entry {
  const data_index_modality *modality;
  const data_length_run *run; /* [modality->runs] */
  const int64_t *bad;         /* [modality->bad] */
} data_index_entry;

/* Owns bytes, shard and column; everything else points into bytes. */
typedef struct data_index_table {
  const char *path; /* borrowed */
  uint8_t *bytes;
  int64_t count, taken;
  int64_t blocks_end; /* where the table begins in the file */
  const data_index_head *head;
  data_index_entry entry[CORE_MAX_MODALITIES];
  const data_index_shard **shard;   /* [shards] */
  const data_index_column **column; /* [shards][modalities] */
} data_index_table;

/* Reads and checks footer and table; *fd stays open for the blocks. path is borrowed until unloading. Errors:
 * ERR_FORMAT, ERR_UNSUPPORTED (version), ERR_CORRUPT. */
CORE_NODISCARD core_status data_index_load_priv(const char *path, int *fd, data_index_table *table);
void data_index_unload_priv(data_index_table *table);
/* What a set needs of the table for reading blocks, and fd, which it owns from then on. from[count]: the
 * modalities of the set among those of the table. */
CORE_NODISCARD core_status data_index_create_priv(const data_index_table *table, int fd, const int32_t *from,
                                                  int32_t count, data_index **out);

#endif
