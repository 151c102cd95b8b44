#include "tests/support/test_session.h"

#include "tests/support/test_device.h"

void test_session_open(comm_world *world, const char *config, const char *const *set, const char *data_path,
                       test_session *out) {
  int32_t count = 0;
  data_position start = {0, 0, 0};
  while (set && set[count]) count++;
  *out = (test_session){0};
  test_device_must(core_config_load(train_settings_spec(), "the test", config, set, count, &out->config));
  train_session_options options = {.config = out->config,
                                   .comm = world,
                                   .purpose = TRAIN_PURPOSE_TRAIN,
                                   .data_path = data_path,
                                   .training_split = "train"};
  test_device_must(train_session_open(&options, &out->session));
  test_device_must(train_session_standardise(out->session));
  test_device_must(train_session_stream(out->session, out->session->training, &out->session->env.layout,
                                        &start, true, &out->stream));
}

void test_session_close(test_session *test) {
  data_stream_close(test->stream);
  train_session_close(test->session);
  core_config_destroy(test->config);
}
