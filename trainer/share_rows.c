#include "trainer/share_rows.h"

int64_t train_share_pieces(const train_layout *layout) {
  return (int64_t)layout->ranks * layout->micro_batches;
}

core_status train_share_rows(train_env *env, const train_layout *layout, int32_t m, core_tensor rows,
                             comm_piece *send, comm_piece *recv) {
  if (layout->ranks == 1) return CORE_OK;
  core_tensor row = train_rows(rows, 1);
  int64_t row_bytes = (int64_t)core_tensor_bytes(&row);
  int32_t sends = 0, recvs = 0;
  for (int32_t r = 0; r < layout->ranks; r++) {
    if (r == layout->rank) continue;
    for (int64_t micro = 0; micro < layout->micro_batches; micro++) {
      data_range own = train_layout_range(layout, layout->rank, m, micro);
      data_range other = train_layout_range(layout, r, m, micro);
      if (own.hi > own.lo)
        send[sends++] =
            (comm_piece){r, (char *)rows.data + own.lo * row_bytes, (own.hi - own.lo) * row_bytes};
      if (other.hi > other.lo)
        recv[recvs++] =
            (comm_piece){r, (char *)rows.data + other.lo * row_bytes, (other.hi - other.lo) * row_bytes};
    }
  }
  TRY(comm_device_exchange(env->world, send, sends, recv, recvs, NULL));
  return CORE_OK;
}
