/* Expectations of programs of several ranks: where one fails, the job ends, since the other ranks would wait
 * for this one. */
#ifndef COMM_EXPECT_H
#define COMM_EXPECT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "comm/comm.h"

static comm_world *job;

static inline void comm_expect(bool good, core_status status, const char *text, const char *file, int line) {
  if (good) return;
  fprintf(stderr, "%s:%d: rank %d: %s\n", file, line, comm_rank(comm_world_group(job)), text);
  comm_fail_stop(job, status);
}

#define EXPECT(condition) comm_expect((condition), CORE_ERR_INTERNAL, #condition, __FILE__, __LINE__)
#define EXPECT_OK(expression)                                                              \
  do {                                                                                     \
    core_status expect_status = (expression);                                              \
    comm_expect(expect_status == CORE_OK, expect_status, #expression, __FILE__, __LINE__); \
  } while (0)
#define EXPECT_ERROR(expression, expected, fragment)                                                 \
  do {                                                                                               \
    core_status expect_status = (expression);                                                        \
    bool expect_good = expect_status == (expected) && strstr(core_error_get()->message, (fragment)); \
    comm_expect(expect_good, expect_status, #expression, __FILE__, __LINE__);                        \
  } while (0)

static inline int comm_expect_start(void **state) {
  const comm_options options = {.deadline = 20};
  (void)state;
  return comm_start(&options, &job) == CORE_OK ? 0 : -1;
}

static inline int comm_expect_finish(void **state) {
  (void)state;
  comm_finish(job);
  return 0;
}

#endif
