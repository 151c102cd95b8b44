/* The matrix products of a training step: recorded as they are called, then repeated alone. */
#ifndef LAUNCH_BENCH_PRODUCTS_H
#define LAUNCH_BENCH_PRODUCTS_H

#include "trainer/session.h"

/* One step's products on this rank. One record exists at a time: the op table's functions carry no context of
 * the bench. */
typedef struct launch_products {
  double seconds; /* all of them, each its shortest time alone, by the fastest library at hand */
  double flops;   /* 2 m n k, summed */
  int64_t forward, input_gradients, weight_gradients; /* how many of each kind */
  const char *library;                                /* who repeated them */
} launch_products;

/* Runs one step of `batch` with a table that records. Collective. */
CORE_NODISCARD core_status launch_products_record(train_session *session, const data_batch *batch);
/* Repeats what was recorded on buffers of its own and frees the record. Local. */
CORE_NODISCARD core_status launch_products_time(train_session *session, launch_products *out);
/* FLOP/s of one large square product of the session's active type, its best of a few: what a matrix product
 * can reach here. Local. */
CORE_NODISCARD core_status launch_products_ceiling(train_session *session, double *flops_per_second);

#endif
