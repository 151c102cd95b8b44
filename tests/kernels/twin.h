/* Twins: the same tensors in memory of two backends, on which an op is run by both and the results are
 * compared. A test adds twins, runs ops by BOTH and calls twin_finish, which compares every one and releases
 * it. */
#ifndef TESTS_TWIN_H
#define TESTS_TWIN_H

#include "kernels/kernels.h"

enum { CPU, CUDA, SIDES, MOST_TWINS = 20 };

/* The same tensor in memory of both backends. */
typedef struct twin {
  const char *name;
  core_tensor of[SIDES];
} twin;

typedef struct session {
  const kern_ops *ops[SIDES];
  kern_context *context[SIDES];
  core_dtype active;
  double bar; /* for the next comparison; 0: as the type allows */
  uint64_t stream;
  int count;
  twin twins[MOST_TWINS];
} session;

/* Fails the test unless the op succeeded. */
void twin_expect_ok(core_status status);
/* Adds a tensor of random normals times `scale` (integers: zeros), the same on both sides. */
twin *twin_add(session *s, const char *name, core_dtype dtype, double scale, int64_t rows, int64_t columns);
twin *twin_add_active(session *s, const char *name, double scale, int64_t rows, int64_t columns);
twin *twin_add_real(session *s, const char *name, double scale, int64_t rows, int64_t columns);
/* Copies the CPU's content, as a test has changed it, to the device. */
void twin_publish(session *s, twin *t);
/* Compares all twins and releases them. width: for messages. */
void twin_finish(session *s, int64_t width);

/* As one-dimensional, or with other extents over the same memory. */
static inline core_tensor line(core_tensor t) {
  t.rank = 1;
  t.shape[0] = core_tensor_count(&(core_tensor){.rank = 2, .shape = {t.shape[0], t.shape[1], 1, 1}});
  t.shape[1] = 1;
  return t;
}
static inline core_tensor stack(core_tensor t, int64_t n) {
  return core_tensor_3(t.data, t.dtype, n, t.shape[0] / n, t.shape[1]);
}

/* The op on both backends; `side` is the index of the backend in the arguments. */
#define BOTH(s, op, ...) \
  for (int side = 0; side < SIDES; side++) twin_expect_ok((s)->ops[side]->op((s)->context[side], __VA_ARGS__))

#endif
