/* The order of an epoch into memory that a stream planned. Private to data/. */
#ifndef DATA_ORDER_IMPL_H
#define DATA_ORDER_IMPL_H

#include "data/set_impl.h"

/* As data_set_order. Scratch: shard int64 [shards], start int64 [shards + 1]. */
void data_order_fill_priv(const data_set *set, const data_order_options *options, int64_t stage,
                          int64_t epoch, int64_t *shard, int64_t *start, int64_t *order);

#endif
