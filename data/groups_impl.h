/* Samples by the modalities that they have, and the order of an epoch of homogeneous batches. Private to
 * data/. */
#ifndef DATA_GROUPS_IMPL_H
#define DATA_GROUPS_IMPL_H

#include "data/set_impl.h"

struct data_groups {
  int64_t batch;
  bool drop;
  int32_t kinds;    /* signatures that occur */
  int64_t *samples; /* [kinds] */
  uint16_t *kind;   /* [samples of the set] */
  int32_t *length;  /* [samples of the set] rows that all modalities count as, and tokens */
};

/* What computing an epoch takes; all memory is the caller's. */
typedef struct data_groups_scratch {
  int64_t *order;   /* [samples of the set] */
  int64_t *shard;   /* [shards] */
  int64_t *start;   /* [shards + 1] */
  int64_t *pending; /* [kinds][batch] */
  int64_t *held;    /* [kinds] how many are pending */
  int64_t *pick;    /* [data_groups_most_batches_priv] */
} data_groups_scratch;

void data_groups_free_priv(data_groups *groups); /* NULL is allowed */
/* Most samples, and most batches, that an epoch can have. */
int64_t data_groups_most_priv(const data_set *set);
int64_t data_groups_most_batches_priv(const data_set *set);
/* How often a batch can hold the same sample. */
int64_t data_groups_copies_priv(const data_groups *groups);
/* The order of one epoch into out [data_set_epoch_samples]. */
void data_groups_order_priv(const data_set *set, const data_order_options *options, int64_t stage,
                            int64_t epoch, const data_groups_scratch *scratch, int64_t *out);

#endif
