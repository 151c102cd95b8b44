/* Standard error goes to a file while a test writes; cmocka reports after it is back. */
#include "core/log.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/test_unit.h"

static char directory[64];
static int saved_error = -1;

static const char *path_of(const char *name) {
  static char path[128];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return path;
}

static void capture(void) {
  int fd = open(path_of("stderr"), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  fflush(stderr);
  saved_error = dup(STDERR_FILENO);
  dup2(fd, STDERR_FILENO);
  close(fd);
}

static void release(void) {
  fflush(stderr);
  dup2(saved_error, STDERR_FILENO);
  close(saved_error);
}

/* Whole file, to be freed. */
static char *slurp(const char *name) {
  FILE *file = fopen(path_of(name), "r");
  char *text = calloc(1, 1 << 20);
  assert_non_null(file);
  assert_non_null(text);
  (void)!fread(text, 1, (1 << 20) - 1, file);
  fclose(file);
  return text;
}

static void assert_file(const char *name, const char *expected) {
  char *text = slurp(name);
  assert_string_equal(text, expected);
  free(text);
}

static int set_up(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "/tmp/antiphon-log-XXXXXX");
  return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
  (void)state;
  core_log_close();
  core_log_set_level(CORE_LOG_INFO);
  core_log_set_rank(0);
  unlink(path_of("stderr"));
  unlink(path_of("log.txt"));
  return rmdir(directory);
}

static void say_everything(void) {
  LOG_DEBUG("a %d", 1);
  LOG_INFO("b %d", 2);
  LOG_WARNING("c %d", 3);
  LOG_ERROR("d %d", 4);
}

static void rank_0_prints_from_its_level_on(void **state) {
  (void)state;
  capture();
  say_everything();
  release();
  assert_file("stderr", "b 2\nwarning: c 3\nerror: d 4\n");
  core_log_set_level(CORE_LOG_DEBUG);
  capture();
  say_everything();
  release();
  assert_file("stderr", "debug: a 1\nb 2\nwarning: c 3\nerror: d 4\n");
  core_log_set_level(CORE_LOG_ERROR);
  capture();
  say_everything();
  release();
  assert_file("stderr", "error: d 4\n");
}

static void other_ranks_print_warnings_with_their_number(void **state) {
  (void)state;
  core_log_set_rank(3);
  capture();
  say_everything();
  release();
  assert_file("stderr", "[rank 3] warning: c 3\n[rank 3] error: d 4\n");
}

static void the_file_receives_every_line_and_keeps_old_ones(void **state) {
  (void)state;
  capture();
  assert_ok(core_log_open(path_of("log.txt")));
  LOG_INFO("first");
  core_log_close();
  LOG_INFO("only on standard error");
  assert_ok(core_log_open(path_of("log.txt")));
  LOG_WARNING("second");
  assert_ok(core_log_open(path_of("log.txt"))); /* again, while open */
  LOG_INFO("third");
  release();
  core_log_close();
  char *text = slurp("log.txt"), *line = text;
  static const char *const expected[] = {"first", "warning: second", "third"};
  for (int i = 0; i < 3; i++) {
    char *end = strchr(line, '\n');
    assert_non_null(end);
    *end = '\0';
    assert_true(line[4] == '-' && line[10] == 'T' && line[19] == 'Z' && line[20] == ' '); /* time in UTC */
    assert_string_equal(line + 21, expected[i]);
    line = end + 1;
  }
  assert_string_equal(line, "");
  free(text);
}

static void a_log_that_cannot_be_opened_is_an_error(void **state) {
  (void)state;
  assert_error(core_log_open("/nonexistent/directory/log.txt"), CORE_ERR_IO,
               "/nonexistent/directory/log.txt");
  assert_error(core_log_open(directory), CORE_ERR_IO, "irectory");
  capture();
  LOG_INFO("still here");
  release();
  assert_file("stderr", "still here\n");
}

static void progress_is_replaced_by_the_next_line(void **state) {
  (void)state;
  assert_ok(core_log_open(path_of("log.txt")));
  capture();
  core_log_progress("step %d", 1);
  core_log_progress("step %d", 2);
  LOG_INFO("line");
  core_log_progress("step 3");
  core_log_progress("%s", "");
  LOG_INFO("end");
  assert_false(core_log_is_terminal());
  release();
  core_log_close();
  assert_file("stderr", "\rstep 1\r\033[K\rstep 2\r\033[Kline\n\rstep 3\r\033[Kend\n");
  char *text = slurp("log.txt");
  assert_null(strstr(text, "step"));
  free(text);
}

static void an_overlong_line_is_cut_and_ended(void **state) {
  (void)state;
  char text[10000];
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  capture();
  LOG_INFO("%s", text);
  LOG_INFO("next");
  release();
  char *got = slurp("stderr"), *end = strchr(got, '\n');
  assert_non_null(end);
  assert_true(end - got > 1000 && end - got < 10000);
  assert_string_equal(end, "\nnext\n");
  free(got);
}

enum { THREADS = 4, LINES = 300 };

static void *say_lines(void *argument) {
  for (int i = 0; i < LINES; i++)
    LOG_WARNING("thread %d says line %d of %d.", (int)(intptr_t)argument, i, LINES);
  return NULL;
}

static void threads_write_whole_lines(void **state) {
  (void)state;
  pthread_t thread[THREADS];
  capture();
  for (int i = 0; i < THREADS; i++) pthread_create(&thread[i], NULL, say_lines, (void *)(intptr_t)i);
  for (int i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
  release();
  char *text = slurp("stderr"), *line = text;
  int next[THREADS] = {0}, number, at, of;
  for (int i = 0; i < THREADS * LINES; i++) {
    assert_int_equal(sscanf(line, "warning: thread %d says line %d of %d.", &number, &at, &of), 3);
    assert_int_equal(at, next[number]++); /* lines of a thread stay in order */
    line = strchr(line, '\n') + 1;
  }
  assert_string_equal(line, "");
  free(text);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(rank_0_prints_from_its_level_on),
      TEST(other_ranks_print_warnings_with_their_number),
      TEST(the_file_receives_every_line_and_keeps_old_ones),
      TEST(a_log_that_cannot_be_opened_is_an_error),
      TEST(progress_is_replaced_by_the_next_line),
      TEST(an_overlong_line_is_cut_and_ended),
      TEST(threads_write_whole_lines),
  };
  return cmocka_run_group_tests_name("core/log", tests, NULL, NULL);
}
