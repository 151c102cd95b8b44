/* Battery: runs ops of any backend on tensors with guard zones and judges every tensor afterwards, inputs
 * included, against a mirror in double that the case's own naive reference has brought up to date.
 *
 * A case adds tensors (random content, the same in memory of the backend and in the mirror), calls the op of
 * `b->ops` with them, applies the reference to the mirrors, and calls battery_judge. The cases know nothing
 * of the backend: battery_run_all takes the op table to judge, and the type that Active tensors have. Tensors
 * are reached through the device only. */
#ifndef TESTS_BATTERY_H
#define TESTS_BATTERY_H

#include "kernels/kernels.h"

/* Largest normalised mean squared error, sum d^2 / sum (r^2 + 0.01), by what the op does to its numbers. d is
 * the distance of the reference r from the result; from a bfloat16 result g, it is the distance from all that
 * rounds to g. So one rounding to bfloat16 is free, a second one is not, and a tolerance means the same for
 * both types: inputs are exactly representable, and what is computed inside is float32. */
typedef enum tolerance {
  TOL_EXACT,  /* copies, integers, inputs: no rounding at all */
  TOL_DOUBLE, /* sums taken in double: 1e-24 */
  TOL_ROUND,  /* a few roundings an element: 1e-12, about 8 units in the last place in float32 */
  TOL_SUM,    /* sums of hundreds of terms in another order, or differences of like terms: 1e-11 */
  TOL_CHAIN   /* sums of products of sums: attention gradients, normalisation gradients: 1e-10 */
} tolerance;

typedef struct item {
  const char *name;
  core_tensor tensor; /* in memory of the backend */
  double *ref;        /* mirror */
  char *block;        /* allocation: guard, data, guard */
  int64_t count;
  tolerance allowed;
  /* A device whose units take bfloat16 factors may round what lies between (attention's probabilities and
   * their gradients): 1e-5, about (2^-8)^2. Never the CPU, which is the specification. */
  bool rounded_inside;
  bool shifted; /* begins one element past a cache line, not on it */
} item;

typedef struct sizes {
  int64_t t, c, e, k; /* rows, width, experts or heads or groups, choices; a case says how it reads them */
  kern_write write;
  int variant; /* forms and masks */
} sizes;

typedef struct battery {
  const kern_ops *ops;
  kern_context *context;
  core_dtype active; /* of tensors that the table calls Active */
  bool shifted;      /* of the items that are added */
  const char *name;
  sizes s;
  uint64_t stream;
  int32_t count;
  item items[16];
} battery;

typedef struct battery_case {
  const char *name;
  void (*run)(battery *b);
  int writes;   /* 1: only KERN_SET; 2: KERN_SET and KERN_ADD */
  int variants; /* 1: none */
} battery_case;

/* Adds a tensor of random normals times `scale` (integers: zeros). Pointers stay valid until battery_judge.
 */
item *battery_add(battery *b, const char *name, core_dtype dtype, tolerance allowed, double scale,
                  const int64_t *shape, int32_t rank);
#define ADD(b, name, allowed, scale, ...)                                                       \
  battery_add((b), (name), CORE_REAL_DTYPE, (allowed), (scale), (const int64_t[]){__VA_ARGS__}, \
              (int32_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
#define ADD_ACTIVE(b, name, allowed, scale, ...)                                            \
  battery_add((b), (name), (b)->active, (allowed), (scale), (const int64_t[]){__VA_ARGS__}, \
              (int32_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
#define ADD_INT(b, name, ...)                                                        \
  battery_add((b), (name), CORE_INT32, TOL_EXACT, 0, (const int64_t[]){__VA_ARGS__}, \
              (int32_t)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)))
/* Writes the mirror into the backend's memory (after a case has set its content). */
void battery_upload(battery *b, item *it);
/* Fails the test unless the op succeeded. */
void battery_expect_ok(const battery *b, core_status status);
/* Uniform integer in [0, n). */
int64_t battery_pick(battery *b, int64_t n);
/* T rows cut into segments, empty ones among them; offset has room for *count + 1 <= T + 4. Its copy in the
 * backend's memory is an item like any other. */
kern_segments battery_segments(battery *b, int64_t t, int64_t *offset);
/* Compares one tensor and takes over what the backend holds: a further call on it starts from the same bits.
 */
void battery_settle(battery *b, item *it);
/* Compares all tensors and guards and releases them. */
void battery_judge(battery *b);

/* Each case at every size, with every write and variant, on aligned data and on others, with Active tensors
 * of type `active`; and all there are. */
void battery_run(const kern_ops *ops, core_dtype active, const battery_case *cases, int count);
void battery_run_all(const kern_ops *ops, core_dtype active);

extern const battery_case battery_dense[], battery_flat[], battery_sequence[], battery_router[],
    battery_gates[], battery_permutation[], battery_loss[];
extern const int battery_dense_count, battery_flat_count, battery_sequence_count, battery_router_count,
    battery_gates_count, battery_permutation_count, battery_loss_count;

#endif
