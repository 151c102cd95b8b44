/* File operations: what each does, what each says when it fails, and that nothing is lost in between. The
 * linker sends open, write, pread and fsync through the wrappers below, which interrupt them and cut them
 * short. */
#include "core/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/test_set.h" /* test_remove_tree */
#include "tests/support/test_unit.h"

static char directory[64];

static const char *path_of(const char *name) {
  static char path[4][160];
  static int turn;
  turn = (turn + 1) % 4;
  snprintf(path[turn], sizeof path[turn], "%s/%s", directory, name);
  return path[turn];
}

/* ---- system calls ---- */

int __real_open(const char *path, int flags, ...);
ssize_t __real_write(int fd, const void *bytes, size_t count);
ssize_t __real_pread(int fd, void *bytes, size_t count, off_t offset);
int __real_fsync(int fd);
int __wrap_open(const char *path, int flags, ...);
ssize_t __wrap_write(int fd, const void *bytes, size_t count);
ssize_t __wrap_pread(int fd, void *bytes, size_t count, off_t offset);
int __wrap_fsync(int fd);

static int interruptions; /* of the following calls, before one succeeds */
static size_t most;       /* bytes that one call moves; 0: all */
static int failure;       /* errno of every call */
static int calls;

static bool interrupted(void) {
  calls++;
  errno = failure ? failure : EINTR;
  return failure || interruptions-- > 0;
}

int __wrap_open(const char *path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  int mode = flags & O_CREAT ? va_arg(arguments, int) : 0;
  va_end(arguments);
  return interrupted() ? -1 : __real_open(path, flags, mode);
}

ssize_t __wrap_write(int fd, const void *bytes, size_t count) {
  return interrupted() ? -1 : __real_write(fd, bytes, most && count > most ? most : count);
}

ssize_t __wrap_pread(int fd, void *bytes, size_t count, off_t offset) {
  return interrupted() ? -1 : __real_pread(fd, bytes, most && count > most ? most : count, offset);
}

int __wrap_fsync(int fd) {
  return interrupted() ? -1 : __real_fsync(fd);
}

static int set_up(void **state) {
  (void)state;
  interruptions = failure = calls = 0;
  most = 0;
  core_file_inject(NULL);
  snprintf(directory, sizeof directory, "/tmp/antiphon-file-XXXXXX");
  return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
  (void)state;
  interruptions = failure = 0;
  most = 0;
  core_file_inject(NULL);
  test_remove_tree(directory);
  return 0;
}

static void assert_content(const char *path, const char *expected) {
  char *text = NULL;
  int64_t count = 0;
  assert_ok(core_file_read_all(path, 1 << 20, &text, &count));
  assert_int_equal(count, strlen(expected));
  assert_string_equal(text, expected);
  free(text);
}

/* ---- what the operations do ---- */

static void a_file_is_written_read_and_removed(void **state) {
  (void)state;
  const char *path = path_of("a");
  int fd = -1;
  char bytes[8] = {0};
  int64_t size = 0;
  assert_false(core_file_exists(path));
  assert_ok(core_file_open(path, O_RDWR | O_CREAT, &fd));
  assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  assert_ok(core_file_write(fd, path, "hello world", 11));
  assert_ok(core_file_write(fd, path, NULL, 0));
  assert_ok(core_file_sync(fd, path));
  assert_ok(core_file_read_at(fd, path, bytes, 5, 6));
  assert_string_equal(bytes, "world");
  assert_error(core_file_read_at(fd, path, bytes, 5, 8), CORE_ERR_CORRUPT, "ends at byte 11, 2 bytes early");
  assert_ok(core_file_close(fd, path));
  assert_ok(core_file_size(path, &size));
  assert_int_equal(size, 11);
  assert_ok(core_file_rename(path, path_of("b")));
  assert_false(core_file_exists(path));
  assert_ok(core_file_remove(path_of("b")));
  assert_false(core_file_exists(path_of("b")));
}

static void directories_are_made_with_their_parents(void **state) {
  (void)state;
  assert_ok(core_file_make_directories(path_of("x/y//z/")));
  assert_ok(core_file_make_directories(path_of("x/y/z")));
  assert_ok(core_file_make_directory(path_of("x")));
  assert_ok(core_file_sync_directory(path_of("x/y/z")));
  assert_error(core_file_remove_directory(path_of("x")), CORE_ERR_IO, "not empty");
  assert_ok(core_file_remove_directory(path_of("x/y/z")));
  assert_false(core_file_exists(path_of("x/y/z")));
  assert_ok(core_file_replace(path_of("file"), "1", 1));
  assert_error(core_file_make_directory(path_of("file")), CORE_ERR_IO, "file");
  assert_error(core_file_make_directories(path_of("file/inner")), CORE_ERR_IO, "Not a directory");
  assert_error(core_file_make_directory(path_of("no/parent")), CORE_ERR_IO, "No such file");
  assert_error(core_file_make_directories(""), CORE_ERR_ARGUMENT, "0 bytes");
  char name[PATH_MAX + 10];
  memset(name, 'n', sizeof name - 1);
  name[sizeof name - 1] = '\0';
  assert_error(core_file_make_directories(name), CORE_ERR_ARGUMENT, "bytes");
}

static void what_is_missing_is_named(void **state) {
  (void)state;
  int fd = -1;
  int64_t size;
  char *text = directory;
  assert_error(core_file_open(path_of("none"), O_RDONLY, &fd), CORE_ERR_NOT_FOUND, path_of("none"));
  assert_error(core_file_size(path_of("none"), &size), CORE_ERR_NOT_FOUND, path_of("none"));
  assert_error(core_file_remove(path_of("none")), CORE_ERR_NOT_FOUND, path_of("none"));
  assert_error(core_file_rename(path_of("none"), path_of("other")), CORE_ERR_IO, path_of("other"));
  assert_error(core_file_remove_directory(path_of("none")), CORE_ERR_IO, path_of("none"));
  assert_error(core_file_sync_directory(path_of("none")), CORE_ERR_NOT_FOUND, path_of("none"));
  assert_error(core_file_read_all(path_of("none"), 100, &text, &size), CORE_ERR_NOT_FOUND, path_of("none"));
  assert_null(text);
  assert_error(core_file_read_all(directory, 1 << 20, &text, &size), CORE_ERR_IO, directory);
  assert_null(text);
  assert_error(core_file_close(-1, "gone"), CORE_ERR_IO, "cannot close gone");
  assert_error(core_file_write(-1, "gone", "x", 1), CORE_ERR_IO, "cannot write 1 bytes to gone");
}

static void reading_whole_files_is_bounded(void **state) {
  (void)state;
  char *text = NULL;
  int64_t count = 0;
  assert_ok(core_file_replace(path_of("f"), "12345\0006", 7));
  assert_error(core_file_read_all(path_of("f"), 6, &text, &count), CORE_ERR_FORMAT, "has 7 bytes; at most 6");
  assert_null(text);
  assert_ok(core_file_read_all(path_of("f"), 7, &text, &count));
  assert_int_equal(count, 7);
  assert_memory_equal(text, "12345\0006\0", 8);
  free(text);
  assert_ok(core_file_replace(path_of("f"), "", 0));
  assert_content(path_of("f"), "");
}

/* ---- interruptions and short transfers ---- */

static void interrupted_calls_are_repeated(void **state) {
  (void)state;
  const char *path = path_of("f");
  int fd = -1;
  char bytes[32] = {0};
  interruptions = 3;
  assert_ok(core_file_open(path, O_RDWR | O_CREAT, &fd));
  assert_int_equal(calls, 4);
  interruptions = 3;
  most = 4;
  assert_ok(core_file_write(fd, path, "abcdefghijklmnopq", 17));
  assert_int_equal(calls, 4 + 3 + 5);
  interruptions = 3;
  assert_ok(core_file_read_at(fd, path, bytes, 16, 1));
  assert_string_equal(bytes, "bcdefghijklmnopq");
  interruptions = 3;
  assert_ok(core_file_sync(fd, path));
  interruptions = 0;
  assert_ok(core_file_close(fd, path));
}

static void failing_calls_are_reported_with_their_reason(void **state) {
  (void)state;
  const char *path = path_of("f");
  int fd = -1;
  char byte;
  assert_ok(core_file_open(path, O_RDWR | O_CREAT, &fd));
  failure = ENOSPC;
  assert_error(core_file_write(fd, path, "abc", 3), CORE_ERR_IO, "No space left");
  assert_message(path);
  failure = EIO;
  assert_error(core_file_read_at(fd, path, &byte, 1, 0), CORE_ERR_IO, "cannot read 1 bytes of");
  assert_error(core_file_sync(fd, path), CORE_ERR_IO, "cannot sync");
  failure = 0;
  assert_ok(core_file_close(fd, path));
}

/* ---- injected faults ---- */

static core_status run_operation(int which, int fd, const char *path) {
  char byte;
  int other = -1;
  int64_t size;
  switch (which) {
    case 0:
      return core_file_open(path, O_RDONLY, &other);
    case 1:
      return core_file_write(fd, path, "x", 1);
    case 2:
      return core_file_read_at(fd, path, &byte, 1, 0);
    case 3:
      return core_file_sync(fd, path);
    case 4:
      return core_file_rename(path, path);
    case 5:
      return core_file_remove(path);
    case 6:
      return core_file_make_directory(path);
    case 7:
      return core_file_remove_directory(path);
    case 8:
      return core_file_size(path, &size);
    default:
      return core_file_close(fd, path);
  }
}

static void every_operation_passes_the_gate(void **state) {
  (void)state;
  static const char *const verbs[] = {
      "open",    "write", "read", "sync", "rename", "remove", "make the directory", "remove the directory",
      "look at", "close"};
  const char *path = path_of("f");
  assert_ok(core_file_replace(path, "old", 3));
  for (int which = 0; which < 10; which++) {
    core_file_fault fault = {.at = 1, .error = EDQUOT, .containing = "/f"};
    char expected[300];
    int fd = -1;
    core_file_inject(NULL);
    assert_ok(core_file_open(path, O_RDWR, &fd));
    core_file_inject(&fault);
    snprintf(expected, sizeof expected, "cannot %s %s: %s", verbs[which], path, strerror(EDQUOT));
    assert_error(run_operation(which, fd, path), CORE_ERR_IO, expected);
    assert_int_equal(core_file_operations(), 1);
    if (which < 9) close(fd);
    core_file_inject(NULL);
    assert_content(path, "old"); /* nothing was done */
  }
}

static void faults_count_only_paths_that_contain_the_text(void **state) {
  (void)state;
  core_file_fault fault = {.at = 2, .error = EIO, .containing = "mani"};
  int64_t size;
  assert_ok(core_file_replace(path_of("manifest"), "m", 1));
  assert_ok(core_file_replace(path_of("tensor"), "t", 1));
  core_file_inject(&fault);
  for (int i = 0; i < 5; i++) assert_ok(core_file_size(path_of("tensor"), &size));
  assert_ok(core_file_size(path_of("manifest"), &size));
  assert_error(core_file_size(path_of("manifest"), &size), CORE_ERR_IO, "manifest");
  assert_ok(core_file_size(path_of("manifest"), &size)); /* not sticky */
  assert_int_equal(core_file_operations(), 3);
  fault.sticky = 1;
  core_file_inject(&fault);
  assert_ok(core_file_size(path_of("manifest"), &size));
  for (int i = 0; i < 3; i++)
    assert_error(core_file_size(path_of("manifest"), &size), CORE_ERR_IO, "manifest");
}

/* Operations of one replacement, counted by a clean run. */
static int64_t count_replace(void) {
  core_file_inject(NULL);
  assert_ok(core_file_replace(path_of("count"), "1", 1));
  int64_t count = core_file_operations();
  assert_true(count >= 7); /* open, write, sync, close, rename, and open, sync, close of the directory */
  return count;
}

static void replacement_is_all_or_nothing(void **state) {
  (void)state;
  const char *path = path_of("f"), *temporary = path_of("f.tmp");
  int64_t operations = count_replace(), kept = 0;
  for (int64_t at = 1; at <= operations; at++)
    for (int sticky = 0; sticky < 2; sticky++) {
      core_file_fault fault = {.at = at, .error = EIO, .sticky = sticky};
      core_file_inject(NULL);
      assert_ok(core_file_replace(path, "old content", 11));
      core_file_inject(&fault);
      assert_int_equal(core_file_replace(path, "new", 3), CORE_ERR_IO);
      core_file_inject(NULL);
      char *text = NULL;
      int64_t count = 0;
      assert_ok(core_file_read_all(path, 100, &text, &count));
      bool old = strcmp(text, "old content") == 0;
      assert_true(old || strcmp(text, "new") == 0);
      kept += old;
      free(text);
      assert_false(core_file_exists(temporary));
    }
  assert_true(kept >= 2 * 5); /* up to the rename; after it only the directory's sync can fail */
}

static void a_process_that_ends_in_a_replacement_leaves_a_whole_file(void **state) {
  (void)state;
  const char *path = path_of("f");
  int64_t operations = count_replace();
  for (int64_t at = 1; at <= operations + 1; at++) {
    core_file_inject(NULL);
    assert_ok(core_file_replace(path, "old content", 11));
    pid_t child = fork();
    if (child == 0) {
      core_file_fault fault = {.at = at, .error = 0};
      core_file_inject(&fault);
      _exit(core_file_replace(path, "new", 3) == CORE_OK ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), at <= operations ? 137 : 0);
    char *text = NULL;
    int64_t count = 0;
    assert_ok(core_file_read_all(path, 100, &text, &count));
    assert_true(strcmp(text, "old content") == 0 || strcmp(text, "new") == 0);
    if (at <= 5) assert_string_equal(text, "old content");
    free(text);
  }
  assert_content(path, "new");
}

/* A link is the old one or the new one, whenever the process dies; what a death left is no obstacle. */
static void a_link_is_replaced_whole_or_not_at_all(void **state) {
  (void)state;
  char path[PATH_MAX], target[64];
  snprintf(path, sizeof path, "%s", path_of("link"));
  assert_ok(core_file_link("old", path));
  core_file_inject(&(core_file_fault){0});
  assert_ok(core_file_link("old", path));
  int64_t operations = core_file_operations();
  assert_true(operations >= 3); /* link, rename, sync */
  for (int64_t at = 1; at <= operations + 1; at++) {
    assert_ok(core_file_link("old", path));
    pid_t child = fork();
    if (child == 0) {
      core_file_fault fault = {.at = at, .error = 0};
      core_file_inject(&fault);
      _exit(core_file_link("new", path) == CORE_OK ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert_int_equal(WEXITSTATUS(status), at <= operations ? 137 : 0);
    ssize_t length = readlink(path, target, sizeof target - 1);
    assert_int_equal(length, 3);
    target[3] = '\0';
    assert_string_equal(target, at <= 2 ? "old" : "new");
  }
  core_file_inject(&(core_file_fault){.at = 2, .error = 28});
  assert_error(core_file_link("other", path), CORE_ERR_IO, "link.tmp");
  core_file_inject(&(core_file_fault){0});
  assert_false(core_file_exists(path_of("link.tmp")));
  assert_int_equal(readlink(path, target, sizeof target), 3);
}

static void replacement_works_without_a_directory_and_refuses_long_names(void **state) {
  (void)state;
  char before[PATH_MAX], name[PATH_MAX + 10];
  assert_non_null(getcwd(before, sizeof before));
  assert_int_equal(chdir(directory), 0);
  assert_ok(core_file_replace("plain", "text", 4));
  assert_content("plain", "text");
  assert_int_equal(chdir(before), 0);
  memset(name, 'n', sizeof name - 1);
  name[sizeof name - 1] = '\0';
  assert_error(core_file_replace(name, "x", 1), CORE_ERR_ARGUMENT, "bytes");
  assert_error(core_file_replace(path_of("none/f"), "x", 1), CORE_ERR_NOT_FOUND, "none/f.tmp");
}

/* ---- faults from the environment: read once a process, so each case is a process ---- */

static int with_environment(const char *text, int operations, const char *name) {
  int status = 0;
  pid_t child = fork();
  if (child == 0) {
    setenv("ANTIPHON_FAULT_FILE", text, 1);
    execl("/proc/self/exe", "test", "child", path_of(name), operations == 1 ? "1" : "3", (char *)NULL);
    _exit(99);
  }
  waitpid(child, &status, 0);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

/* Exit status: the number of the first operation that failed, 0 none; 100 and more: another reason. */
static int child_main(const char *path, int operations) {
  int64_t size;
  for (int i = 1; i <= operations; i++)
    if (core_file_size(path, &size) != CORE_OK)
      return strstr(core_error_get()->message, "space") ? i : 100 + i;
  return 0;
}

static void faults_come_from_the_environment(void **state) {
  (void)state;
  assert_ok(core_file_replace(path_of("f"), "x", 1));
  assert_int_equal(with_environment("2:28", 3, "f"), 2); /* ENOSPC */
  assert_int_equal(with_environment("2:28", 1, "f"), 0);
  assert_int_equal(with_environment("3:5", 3, "f"), 103); /* EIO */
  assert_int_equal(with_environment("1:28:other", 3, "f"), 0);
  assert_int_equal(with_environment("1:28:/f", 3, "f"), 1);
  assert_int_equal(with_environment("2:exit", 3, "f"), 137);
  assert_int_equal(with_environment("2:exit:other", 3, "f"), 0);
  assert_int_equal(with_environment("", 3, "f"), 0);
  assert_int_equal(with_environment("0:28", 3, "f"), 0);
}

/* ---- observation ---- */

static void note_event(void *context, const core_file_event *event) {
  static const char letter[] = "owrscmxdD";
  char *text = context, name[64];
  snprintf(name, sizeof name, "%s", strrchr(event->path, '/') + 1);
  sprintf(text + strlen(text), "%c:%s:%zu ", letter[event->kind], name, event->count);
  if (event->kind == CORE_FILE_WRITE) assert_memory_equal(event->bytes, "new", 3);
  if (event->kind == CORE_FILE_RENAME) assert_string_equal(strrchr(event->to, '/'), "/f");
}

static void an_observer_sees_what_succeeded_in_order(void **state) {
  (void)state;
  char text[1024] = "", expected[256];
  core_file_observe(note_event, text);
  assert_ok(core_file_replace(path_of("f"), "new", 3));
  const char *own = strrchr(directory, '/') + 1;
  snprintf(expected, sizeof expected,
           "o:f.tmp:0 w:f.tmp:3 s:f.tmp:0 c:f.tmp:0 m:f.tmp:0 o:%s:0 s:%s:0 c:%s:0 ", own, own, own);
  assert_string_equal(text, expected);
  text[0] = 0;
  core_file_fault fault = {.at = 1, .error = EIO};
  core_file_inject(&fault);
  assert_error(core_file_remove(path_of("f")), CORE_ERR_IO, "cannot remove");
  assert_error(core_file_remove(path_of("absent")), CORE_ERR_NOT_FOUND, "absent");
  assert_string_equal(text, ""); /* what failed has not happened */
  assert_ok(core_file_remove(path_of("f")));
  assert_ok(core_file_make_directory(path_of("d")));
  assert_ok(core_file_remove_directory(path_of("d")));
  assert_string_equal(text, "x:f:0 d:d:0 D:d:0 ");
  core_file_observe(NULL, NULL);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      TEST(a_file_is_written_read_and_removed),
      TEST(directories_are_made_with_their_parents),
      TEST(what_is_missing_is_named),
      TEST(reading_whole_files_is_bounded),
      TEST(interrupted_calls_are_repeated),
      TEST(failing_calls_are_reported_with_their_reason),
      TEST(every_operation_passes_the_gate),
      TEST(faults_count_only_paths_that_contain_the_text),
      TEST(replacement_is_all_or_nothing),
      TEST(a_process_that_ends_in_a_replacement_leaves_a_whole_file),
      TEST(a_link_is_replaced_whole_or_not_at_all),
      TEST(replacement_works_without_a_directory_and_refuses_long_names),
      TEST(faults_come_from_the_environment),
      TEST(an_observer_sees_what_succeeded_in_order),
  };
  if (argc == 4 && strcmp(argv[1], "child") == 0) return child_main(argv[2], atoi(argv[3]));
  return cmocka_run_group_tests_name("core/file", tests, NULL, NULL);
}
