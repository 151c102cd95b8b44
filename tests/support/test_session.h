/* A training session over a made-up set, opened whole or not at all: a failure ends the test. */
#ifndef TESTS_TEST_SESSION_H
#define TESTS_TEST_SESSION_H

#include "trainer/session.h"

typedef struct test_session {
  core_config *config;
  train_session *session;
  data_stream *stream; /* of training batches, from the first sample on */
} test_session;

/* config: YAML text; set: overrides, ended by NULL. The standardisation is measured. Collective over `world`.
 */
void test_session_open(comm_world *world, const char *config, const char *const *set, const char *data_path,
                       test_session *out);
void test_session_close(test_session *test);

#endif
