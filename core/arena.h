/* Arena: one block of memory, planned by a dry run, carved in the real run by the same code.
 *
 *   core_arena_create("activations", device, &arena);
 *   x_plan(arena);            dry: counts bytes, returns NULL pointers
 *   core_arena_commit(arena); allocates what was counted, all pages touched
 *   x_plan(arena);            real: returns pointers
 *   core_arena_seal(arena);   any later core_arena_take fails with ERR_INTERNAL
 *
 * One code path sizes and carves, so sizes and pointers cannot drift apart. A real run that takes more than
 * the dry run counted fails. Scratch arenas may be rewound to a mark between uses. In debug builds fresh
 * memory is filled with NaN bytes; under AddressSanitizer red zones lie between blocks. Not thread-safe. */
#ifndef CORE_ARENA_H
#define CORE_ARENA_H

#include "core/device.h" /* core_device */
#include "core/status.h"

typedef struct core_arena core_arena;

/* Creates an arena in the dry phase. `name` is copied (for messages and the memory report).
 * device: where the memory will be; NULL is host memory by aligned_alloc. */
CORE_NODISCARD core_status core_arena_create(const char *name, const core_device *device, core_arena **out);
/* The same for memory of the host that `device` copies to and from at full speed (core_device.host_allocate).
 */
CORE_NODISCARD core_status core_arena_create_staging(const char *name, const core_device *device,
                                                     core_arena **out);
/* NULL is allowed. Frees the block; pointers taken from it die. */
void core_arena_destroy(core_arena *arena);

/* Takes `count` items of `size` bytes, 64-byte aligned. *out is NULL in the dry phase and for count 0.
 * Errors: ERR_ARGUMENT on overflow, ERR_INTERNAL when sealed or beyond the plan. */
CORE_NODISCARD core_status core_arena_take(core_arena *arena, int64_t count, size_t size, void **out);
/* Typed: ARENA_TAKE(arena, n, &pointer) */
#define ARENA_TAKE(arena, count, pointer) \
  core_arena_take((arena), (count), sizeof(**(pointer)), (void **)(pointer))

/* Ends the dry phase: allocates the peak that was counted and rewinds. Errors: ERR_MEMORY with the sizes. */
CORE_NODISCARD core_status core_arena_commit(core_arena *arena);
/* No more takes; marks and rewinds included. */
void core_arena_seal(core_arena *arena);
bool core_arena_is_dry(const core_arena *arena);

/* Position now, and back to it: for scratch whose uses do not overlap in time. */
size_t core_arena_mark(const core_arena *arena);
void core_arena_rewind(core_arena *arena, size_t mark);

/* Bytes planned (peak) so far, and bytes in use. */
size_t core_arena_peak(const core_arena *arena);
size_t core_arena_used(const core_arena *arena);
const char *core_arena_name(const core_arena *arena);

#endif
