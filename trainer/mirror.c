#include "trainer/mirror.h"

#include <string.h>

core_status train_mirror_plan(const train_arenas *arenas, core_arena *device, core_dtype dtype, int64_t rows,
                              int64_t columns, train_mirror *out) {
  TRY(train_take(device, dtype, rows, columns, &out->device));
  out->host = out->device.data;
  if (!arenas->host_access)
    TRY(core_arena_take(arenas->host, rows * columns, core_dtype_size(dtype), &out->host));
  return CORE_OK;
}

static core_status move(const train_env *env, void *target, const void *source, const train_mirror *mirror,
                        int64_t rows) {
  core_tensor part = train_rows(mirror->device, rows);
  size_t bytes = core_tensor_bytes(&part);
  if (target != source && bytes > 0) TRY(env->ops->device->copy(target, source, bytes, NULL));
  return CORE_OK;
}

core_status train_mirror_up(const train_env *env, const train_mirror *mirror, int64_t rows) {
  TRY(move(env, mirror->device.data, mirror->host, mirror, rows));
  return CORE_OK;
}

core_status train_mirror_down(const train_env *env, const train_mirror *mirror, int64_t rows) {
  TRY(move(env, mirror->host, mirror->device.data, mirror, rows));
  return CORE_OK;
}

core_status train_mirror_clear(const train_env *env, const train_mirror *mirror) {
  size_t bytes = core_tensor_bytes(&mirror->device);
  if (bytes == 0) return CORE_OK;
  memset(mirror->host, 0, bytes);
  if (mirror->host != mirror->device.data) TRY(env->ops->device->fill(mirror->device.data, 0, bytes, NULL));
  return CORE_OK;
}
