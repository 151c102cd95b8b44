#include <inttypes.h>
#include <string.h>

#include "comm/comm_impl.h"

/* The highest code wins, then the lowest rank: MAXLOC as one integer, so that the common case costs one
 * small reduction. Then the winner's record goes round. */
core_status comm_agree(comm_group *group, core_status local) {
  core_error error;
  core_error_save(&error);
  int64_t key = local == CORE_OK ? 0 : (int64_t)local << 32 | (group->size - group->rank);
  TRY(comm_all_reduce(group, COMM_MAX, CORE_INT64, &key, 1));
  if (key == 0) return CORE_OK;
  int32_t winner = group->size - (int32_t)(key & 0xffffffff);
  TRY(comm_broadcast(group, winner, &error, sizeof error));
  error.code = (int32_t)(key >> 32);
  return core_error_restore(&error);
}

core_status comm_agree_value(comm_group *group, const char *what, uint64_t value) {
  uint64_t low = value, high = value;
  TRY(comm_all_reduce(group, COMM_MIN, CORE_UINT64, &low, 1));
  TRY(comm_all_reduce(group, COMM_MAX, CORE_UINT64, &high, 1));
  if (low == high) return CORE_OK;
  int64_t holder[2] = {value == low ? group->rank : INT64_MAX, value == high ? group->rank : INT64_MAX};
  TRY(comm_all_reduce(group, COMM_MIN, CORE_INT64, holder, 2));
  FAIL(CORE_ERR_MISMATCH, "%s differs between ranks: %016" PRIx64 " on rank %d, %016" PRIx64 " on rank %d",
       what, low, group->world_rank[holder[0]], high, group->world_rank[holder[1]]);
}
