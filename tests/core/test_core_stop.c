/* Requests to stop, and the clock. */
#include "core/stop.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "tests/support/test_unit.h"

static void the_three_signals_ask_for_a_stop(void **state) {
  (void)state;
  static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
  assert_false(core_stop_requested());
  assert_ok(core_stop_install());
  for (int i = 0; i < 3; i++) {
    core_stop_request(0);
    assert_false(core_stop_requested());
    raise(signals[i]);
    assert_true(core_stop_requested());
    assert_int_equal(core_stop_signal(), signals[i]);
  }
  core_stop_request(SIGUSR1);
  assert_int_equal(core_stop_signal(), SIGUSR1);
  core_stop_request(0);
}

static int end_of(const int *signals, int count) {
  int status = 0;
  pid_t child = fork();
  if (child == 0) {
    if (core_stop_install() != CORE_OK) _exit(9);
    for (int i = 0; i < count; i++) raise(signals[i]);
    _exit(core_stop_requested() ? 0 : 8);
  }
  assert_true(child > 0);
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

static void a_second_interrupt_ends_the_process(void **state) {
  (void)state;
  assert_int_equal(end_of((const int[]){SIGINT}, 1), 0);
  assert_int_equal(end_of((const int[]){SIGINT, SIGINT}, 2), 128 + SIGINT);
  assert_int_equal(end_of((const int[]){SIGTERM, SIGTERM, SIGUSR1}, 3), 0);
}

static void the_clock_goes_on_through_interrupted_sleep(void **state) {
  (void)state;
  double start = core_clock_now();
  core_clock_sleep(-1);
  core_clock_sleep(0);
  assert_true(core_clock_now() - start < 0.2);
  assert_ok(core_stop_install());
  pid_t parent = getpid(), child = fork();
  if (child == 0) {
    for (int i = 0; i < 5; i++) {
      usleep(20000);
      kill(parent, SIGUSR1);
    }
    _exit(0);
  }
  start = core_clock_now();
  core_clock_sleep(0.25);
  double slept = core_clock_now() - start;
  waitpid(child, NULL, 0);
  assert_true(slept >= 0.25);
  assert_true(core_stop_requested());
  core_stop_request(0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_three_signals_ask_for_a_stop),
      cmocka_unit_test(a_second_interrupt_ends_the_process),
      cmocka_unit_test(the_clock_goes_on_through_interrupted_sleep),
  };
  return cmocka_run_group_tests_name("core/stop", tests, NULL, NULL);
}
