#include "core/arena.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
enum { RED_ZONE = 64 };
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
enum { RED_ZONE = 0 };
#endif

enum { ALIGNMENT = 64 };

typedef enum phase { PHASE_DRY, PHASE_REAL, PHASE_SEALED } phase;

struct core_arena {
  char name[48];
  const core_device *device; /* NULL: host */
  bool staging;              /* the device's host memory */
  phase phase;
  size_t used, peak, capacity;
  unsigned char *base;
};

core_status core_arena_create(const char *name, const core_device *device, core_arena **out) {
  core_arena *arena = calloc(1, sizeof *arena);
  CHECK(arena, CORE_ERR_MEMORY, "no memory for the arena '%s'", name);
  snprintf(arena->name, sizeof arena->name, "%s", name);
  arena->device = device;
  *out = arena;
  return CORE_OK;
}

core_status core_arena_create_staging(const char *name, const core_device *device, core_arena **out) {
  TRY(core_arena_create(name, device, out));
  (*out)->staging = device != NULL;
  return CORE_OK;
}

static bool host_memory(const core_arena *arena) {
  return !arena->device || arena->staging || arena->device->host_access;
}

void core_arena_destroy(core_arena *arena) {
  if (!arena) return;
  if (arena->base) {
    if (host_memory(arena)) UNPOISON(arena->base, arena->capacity);
    if (arena->staging)
      arena->device->host_release(arena->base);
    else if (arena->device)
      arena->device->release(arena->base);
    else
      free(arena->base);
  }
  free(arena);
}

/* Reads of memory that nobody wrote must show: all-ones bytes are NaN in every floating type. */
static void mark_fresh(const core_arena *arena, void *pointer, size_t bytes) {
  if (!host_memory(arena)) return;
  UNPOISON(pointer, bytes);
#ifndef NDEBUG
  memset(pointer, 0xff, bytes);
#endif
}

core_status core_arena_take(core_arena *arena, int64_t count, size_t size, void **out) {
  *out = NULL;
  CHECK(arena->phase != PHASE_SEALED, CORE_ERR_INTERNAL, "arena '%s' is sealed", arena->name);
  CHECK(count >= 0 && (count == 0 || size <= (SIZE_MAX / 4) / (size_t)count), CORE_ERR_ARGUMENT,
        "arena '%s': %lld items of %zu bytes", arena->name, (long long)count, size);
  size_t bytes = (size_t)count * size;
  if (bytes == 0) return CORE_OK;
  size_t padded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + RED_ZONE;
  CHECK(arena->used <= SIZE_MAX / 2 - padded, CORE_ERR_ARGUMENT, "arena '%s' would exceed the address space",
        arena->name);
  if (arena->phase == PHASE_REAL) {
    CHECK(arena->used + padded <= arena->capacity, CORE_ERR_INTERNAL,
          "arena '%s': the real run takes more than the %zu bytes of the dry run", arena->name,
          arena->capacity);
    *out = arena->base + arena->used;
    mark_fresh(arena, *out, bytes);
  }
  arena->used += padded;
  if (arena->used > arena->peak) arena->peak = arena->used;
  return CORE_OK;
}

core_status core_arena_commit(core_arena *arena) {
  CHECK(arena->phase == PHASE_DRY, CORE_ERR_INTERNAL, "arena '%s' is committed twice", arena->name);
  size_t bytes = arena->peak > 0 ? arena->peak : ALIGNMENT;
  void *base = NULL;
  if (arena->staging)
    TRY(arena->device->host_allocate(bytes, &base));
  else if (arena->device)
    TRY(arena->device->allocate(bytes, &base));
  else
    base = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  CHECK(base, CORE_ERR_MEMORY, "arena '%s' needs %.1f MiB, which the system does not give", arena->name,
        (double)bytes / 1048576.0);
  arena->base = base;
  arena->capacity = bytes;
  arena->used = 0;
  arena->phase = PHASE_REAL;
  if (host_memory(arena)) {
    memset(base, 0, bytes); /* every page is there from now on: no fault inside a step, no surprise later */
    POISON(base, bytes);
  }
  return CORE_OK;
}

void core_arena_seal(core_arena *arena) {
  arena->phase = PHASE_SEALED;
}

bool core_arena_is_dry(const core_arena *arena) {
  return arena->phase == PHASE_DRY;
}

size_t core_arena_mark(const core_arena *arena) {
  return arena->used;
}

void core_arena_rewind(core_arena *arena, size_t mark) {
  if (arena->phase == PHASE_SEALED || mark > arena->used) return;
  if (arena->base && host_memory(arena)) POISON(arena->base + mark, arena->used - mark);
  arena->used = mark;
}

size_t core_arena_peak(const core_arena *arena) {
  return arena->peak;
}

size_t core_arena_used(const core_arena *arena) {
  return arena->used;
}

const char *core_arena_name(const core_arena *arena) {
  return arena->name;
}
