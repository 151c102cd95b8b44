/* Root attributes of older files, decoded without HDF5. Private to data/.
 *
 * Files of HDF5's older structure (the default of h5py) have object headers without checksums, and the
 * library decodes damaged attribute messages beyond their end (seen with 1.10.8 under mutation). Newer object
 * headers have checksums: there the library may be trusted with attributes. */
#ifndef DATA_HEADER_IMPL_H
#define DATA_HEADER_IMPL_H

#include "data/hdf5_impl.h"

enum { DATA_MOST_ATTRIBUTE = 4096 };

/* Classes as the file format numbers them. */
typedef enum data_attribute_class {
  DATA_ATTRIBUTE_INTEGER = 0,
  DATA_ATTRIBUTE_STRING = 3,
  DATA_ATTRIBUTE_VARIABLE_STRING = 9
} data_attribute_class;

/* One value, as stored. */
typedef struct data_attribute {
  bool found;
  int32_t type_class; /* data_attribute_class, or another of the format's */
  bool is_signed, big_endian, space_padded;
  int64_t points; /* values; bytes are kept for one */
  int64_t bytes;
  uint8_t value[DATA_MOST_ATTRIBUTE];
} data_attribute;

/* *older: the root group has a header of the older kind, and *out tells about the attribute (found or not).
 * Inside. */
CORE_NODISCARD core_status data_header_attribute_priv(const data_hdf5_file *file, const char *name,
                                                      bool *older, data_attribute *out);
/* The number that `count` bytes, at most 8, stand for. */
uint64_t data_little_priv(const uint8_t *bytes, int64_t count);

#endif
