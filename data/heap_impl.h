/* Strings of variable length, read without HDF5's own code for them. Private to data/.
 *
 * Such a string is stored as a descriptor (length, address of a collection of the global heap, index in it).
 * The library follows descriptors without checking them: a damaged one makes it read outside its memory or
 * loop for ever (seen with 1.10.8 under mutation). So the descriptor is fetched unconverted, by a conversion
 * that converts nothing, and followed here with every step checked against the size of the file. */
#ifndef DATA_HEAP_IMPL_H
#define DATA_HEAP_IMPL_H

#include "data/hdf5_impl.h"

/* Makes the conversion known to HDF5. Inside. */
CORE_NODISCARD core_status data_heap_register_priv(void);

enum { DATA_DESCRIPTOR_BYTES = 16 };

/* Where the file's addresses count from. Refuses addresses and sizes of other than 8 bytes. Inside. */
CORE_NODISCARD core_status data_heap_base_priv(const data_hdf5_file *file, int64_t *base);
/* The descriptor in the open attribute `attribute`, called `name` in messages. Inside. */
CORE_NODISCARD core_status data_heap_descriptor_priv(const data_hdf5_file *file, const char *name,
                                                     hid_t attribute,
                                                     uint8_t descriptor[DATA_DESCRIPTOR_BYTES]);
/* The string that a descriptor stands for, as NUL-terminated text. Inside. */
CORE_NODISCARD core_status data_heap_text_priv(const data_hdf5_file *file, const char *name,
                                               const uint8_t descriptor[DATA_DESCRIPTOR_BYTES], char *text,
                                               size_t capacity);

/* The descriptors of all strings of a dataset: DATA_DESCRIPTOR_BYTES each. Inside. */
CORE_NODISCARD core_status data_heap_descriptors_priv(const data_hdf5_dataset *dataset, uint8_t *descriptors);
/* For many strings one after another: the collection that the last one came from stays in memory. `name`,
 * borrowed, is for messages. */
typedef struct data_heap_reader data_heap_reader;
CORE_NODISCARD core_status data_heap_open_priv(const data_hdf5_file *file, const char *name,
                                               data_heap_reader **out);
/* As data_heap_text_priv. */
CORE_NODISCARD core_status data_heap_next_priv(data_heap_reader *heap,
                                               const uint8_t descriptor[DATA_DESCRIPTOR_BYTES], char *text,
                                               size_t capacity);
void data_heap_close_priv(data_heap_reader *heap); /* NULL is allowed */

#endif
