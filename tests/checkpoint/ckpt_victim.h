/* A checkpoint to be damaged: written to disk, and its two files kept in memory. One rank. */
#ifndef CKPT_VICTIM_H
#define CKPT_VICTIM_H

#include "ckpt_fixture.h"

#define TINY tiny_specs, tiny_specs_count

enum { SEED = 11 }; /* generation of what victims hold */

/* One checkpoint and its two files in memory. */
typedef struct victim {
  const fixture *f;
  const spec *specs;
  int32_t count;
  char path[CKPT_PATH], manifest_path[CKPT_PATH + 32], rank_path[CKPT_PATH + 32];
  char *manifest, *rank;
  size_t manifest_count, rank_count;
} victim;

/* Saves under `name` in the scratch directory. victim_free frees what it keeps in memory. */
victim victim_make(const fixture *f, const char *name, const spec *specs, int32_t count, int64_t step,
                   uint64_t generation);
/* Writes both files as they were. */
void victim_restore(const victim *v);
void victim_free(victim *v);
/* Loads all; an error, or exactly what was saved. Returns the status. */
core_status victim_load(const victim *v);
/* Checking it must fail with a message; loading it may give an error or what was saved. what, where: for the
 * failure's text. */
void victim_expect_found(const victim *v, const char *what, int64_t where);

#endif
