/* The order of an epoch in parts, so that nobody needs all of it at once. Private to data/. */
#ifndef DATA_ORDER_IMPL_H
#define DATA_ORDER_IMPL_H

#include "data/set_impl.h"

/* The shards in the order of the epoch, and the positions at which their samples begin before shuffling.
 * shard: int64 [shards], start: int64 [shards + 1]. */
void data_order_shards_priv(const data_set *set, const data_order_options *options, int64_t stage,
                            int64_t epoch, int64_t *shard, int64_t *start);
/* Which of the shards, in that order, owns `position`. */
int32_t data_order_find_priv(const int64_t *start, int32_t shards, int64_t position);
/* How the `count` samples of shuffle buffer number `buffer` are permuted. pick: int64 [count]. */
void data_order_buffer_priv(const data_order_options *options, int64_t stage, int64_t epoch, int64_t buffer,
                            int64_t count, int64_t *pick);

/* data_set_order with the memory of the caller. order: int64 [samples]; shard and start as above. */
void data_order_fill_priv(const data_set *set, const data_order_options *options, int64_t stage,
                          int64_t epoch, int64_t *shard, int64_t *start, int64_t *order);

#endif
