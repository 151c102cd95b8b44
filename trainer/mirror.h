/* Mirror: numbers that both the host and the device work on. Where the host can read the device's memory they
 * are one piece of memory and the copies below do nothing. */
#ifndef TRAIN_MIRROR_H
#define TRAIN_MIRROR_H

#include "trainer/env.h"

typedef struct train_mirror {
  void *host;
  core_tensor device; /* [rows, columns] */
} train_mirror;

/* Takes memory in `arenas->host` and in `device`, one of its arenas. Two passes, as core_arena. */
CORE_NODISCARD core_status train_mirror_plan(const train_arenas *arenas, core_arena *device, core_dtype dtype,
                                             int64_t rows, int64_t columns, train_mirror *out);
/* The first `rows` rows, host to device and back. Afterwards the side that was read may be changed. */
CORE_NODISCARD core_status train_mirror_up(const train_env *env, const train_mirror *mirror, int64_t rows);
CORE_NODISCARD core_status train_mirror_down(const train_env *env, const train_mirror *mirror, int64_t rows);
/* Zero bytes on both sides. */
CORE_NODISCARD core_status train_mirror_clear(const train_env *env, const train_mirror *mirror);

#endif
