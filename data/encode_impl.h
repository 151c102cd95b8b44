/* The filters of data_filter, applied to one chunk. Private to data/. */
#ifndef DATA_ENCODE_IMPL_H
#define DATA_ENCODE_IMPL_H

#include "data/data.h"
#include "data/filter_impl.h"

/* What the writer stores. */
core_dtype data_writer_dtype_priv(const data_writer *writer);

typedef struct data_encoder data_encoder;

/* The level that 0 stands for, or the level itself. */
int32_t data_encoder_level_priv(data_filter filter, int32_t level);
/* One per thread. element: bytes of a value; largest: bytes of a chunk. */
CORE_NODISCARD core_status data_encoder_create_priv(data_filter filter, int32_t level, int64_t element,
                                                    int64_t largest, data_encoder **out);
void data_encoder_destroy_priv(data_encoder *encoder);
/* *out: the stored bytes, in the encoder's memory until its next use. */
CORE_NODISCARD core_status data_encode_priv(data_encoder *encoder, const uint8_t *in, int64_t bytes,
                                            const uint8_t **out, int64_t *produced);

#endif
