/* What the tests of checkpoint/ share: a world, a scratch directory common to all ranks, tensors whose
 * contents are a function of (generation, tensor, element) and layouts that cut them up. */
#ifndef CKPT_FIXTURE_H
#define CKPT_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h> /* pid_t */
#include <cmocka.h>

#include "checkpoint/checkpoint_impl.h"

typedef struct fixture {
  comm_world *world;
  comm_group *control;
  int32_t rank, ranks;
  char directory[256];
} fixture;

/* cmocka group setup and teardown. */
int fixture_setup(void **state);
int fixture_setup_small(void **state); /* for many saves of few bytes */
int fixture_teardown(void **state);
/* A name under the scratch directory that no call before returned; equal on all ranks. */
void fixture_directory(const fixture *f, const char *name, char out[CKPT_PATH]);
void remove_tree(const char *path);

typedef struct spec {
  const char *name;
  core_dtype dtype;
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
} spec;

/* Every dtype; odd, zero, one-cell and many-cell sizes; a scalar; the longest name. */
extern const spec all_specs[];
extern const int32_t all_specs_count;
/* A few hundred bytes in all. */
extern const spec tiny_specs[];
extern const int32_t tiny_specs_count;

/* Ranges of this rank with memory of their own. */
typedef struct layout {
  ckpt_tensor *tensor;
  int32_t count;
} layout;

/* Appends a range of a tensor, with memory of its own, filled with 0xa5. The spec's name is borrowed. */
void layout_add(layout *l, const spec *s, int64_t first, int64_t count, bool owner);
/* Cuts every tensor into ranges of `cells` cells (0: not at all); range i of tensor t belongs to rank (i + t
 * + shift) mod `ranks`. Memory is filled with 0xa5. */
layout layout_make(const spec *specs, int32_t count, int64_t cells, int32_t shift, int32_t rank,
                   int32_t ranks);
/* Every rank holds everything; nobody owns it. */
layout layout_full(const spec *specs, int32_t count);
void layout_fill(const layout *l, const spec *specs, int32_t count, uint64_t generation);
/* First tensor whose memory is not what `generation` filled in; NULL when all is. */
const char *layout_difference(const layout *l, const spec *specs, int32_t count, uint64_t generation);
void layout_free(layout *l);

/* Fails the test with the error's message. */
void expect_ok(core_status status, const char *file, int line);
#define EXPECT_OK(expression) expect_ok((expression), __FILE__, __LINE__)

/* Saves `generation` of the specs, cut by `cells`, as `step`. */
core_status save_step(const fixture *f, ckpt_writer *writer, const layout *l, const spec *specs,
                      int32_t count, int64_t step, uint64_t generation);
/* Opens the newest, loads everything, returns its step (-1: none), and fails unless the contents are those of
 * one of the two generations. */
int64_t load_newest(const fixture *f, const char *directory, const spec *specs, int32_t count, uint64_t one,
                    uint64_t other);
/* Waits for a child that ran with an exit injected into its file operations: whether it ended of that. Any
 * other end but 0 fails the test. */
bool child_crashed(pid_t child);
/* Names in a directory, sorted, joined by blanks: "step-00000010 step-00000020". */
void list_names(const char *directory, char *out, size_t capacity);

/* Whole files, by plain calls. */
char *slurp(const char *path, size_t *count);
void spit(const char *path, const void *bytes, size_t count);

#endif
