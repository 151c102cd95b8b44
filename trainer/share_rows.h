/* Rows that every rank computes for its samples, shared with all: embeddings, softmax denominators. */
#ifndef TRAIN_SHARE_ROWS_H
#define TRAIN_SHARE_ROWS_H

#include "trainer/env.h"

/* Pieces that train_share_rows may need. */
int64_t train_share_pieces(const train_layout *layout);
/* rows: device memory [layout->batch, ...], of which each rank has filled the samples of modality m that
 * train_layout_range gives it; afterwards every rank has all. send, recv: scratch of train_share_pieces
 * entries each. Collective over the world. */
CORE_NODISCARD core_status train_share_rows(train_env *env, const train_layout *layout, int32_t m,
                                            core_tensor rows, comm_piece *send, comm_piece *recv);

#endif
