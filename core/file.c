#include "core/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h> /* PATH_MAX */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/clock.h"

static struct {
  pthread_mutex_t lock;
  core_file_fault fault;
  int64_t count;
  int from_environment; /* the environment has been looked at */
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER};

void core_file_inject(const core_file_fault *fault) {
  pthread_mutex_lock(&gate.lock);
  gate.fault = fault ? *fault : (core_file_fault){0};
  gate.count = 0;
  gate.from_environment = 1;
  pthread_mutex_unlock(&gate.lock);
}

int64_t core_file_operations(void) {
  pthread_mutex_lock(&gate.lock);
  int64_t count = gate.count;
  pthread_mutex_unlock(&gate.lock);
  return count;
}

static core_file_observer observe;
static void *observe_context;

void core_file_observe(core_file_observer observer, void *context) {
  observe = observer;
  observe_context = context;
}

#define DONE(where, ...)                                                                     \
  do {                                                                                       \
    if (observe) observe(observe_context, &(core_file_event){.path = (where), __VA_ARGS__}); \
  } while (0)

/* "<n>:<errno|exit|sleep=milliseconds>[:<containing>]" */
static void read_environment(void) {
  gate.from_environment = 1;
  const char *text = getenv("ANTIPHON_FAULT_FILE");
  if (!text) return;
  char *rest = NULL;
  gate.fault.at = strtoll(text, &rest, 10);
  if (*rest != ':') return;
  bool slow = strncmp(rest + 1, "sleep=", 6) == 0;
  if (slow) gate.fault.sleep = (double)strtol(rest + 7, NULL, 10) / 1000;
  gate.fault.error = slow || strncmp(rest + 1, "exit", 4) == 0 ? 0 : (int)strtol(rest + 1, NULL, 10);
  gate.fault.sticky = slow || gate.fault.error != 0;
  const char *containing = strchr(rest + 1, ':');
  if (containing) snprintf(gate.fault.containing, sizeof gate.fault.containing, "%s", containing + 1);
}

/* Every operation passes here first: 0, or the errno that a test wants it to fail with. */
static int pass_gate(const char *path) {
  int error = 0;
  double sleep = 0;
  pthread_mutex_lock(&gate.lock);
  if (!gate.from_environment) read_environment();
  if (!gate.fault.containing[0] || strstr(path, gate.fault.containing)) {
    gate.count++;
    int64_t at = gate.fault.at;
    if (at > 0 && (gate.count == at || (gate.fault.sticky && gate.count > at))) {
      sleep = gate.fault.sleep;
      if (gate.fault.error == 0 && sleep <= 0) _exit(137);
      error = gate.fault.error;
    }
  }
  pthread_mutex_unlock(&gate.lock);
  if (sleep > 0) core_clock_sleep(sleep);
  return error;
}

#define GATE(path, what)                                                                           \
  do {                                                                                             \
    int gate_error = pass_gate(path);                                                              \
    CHECK(gate_error == 0, CORE_ERR_IO, "cannot %s %s: %s", (what), (path), strerror(gate_error)); \
  } while (0)

core_status core_file_open(const char *path, int flags, int *fd) {
  GATE(path, "open");
  do *fd = open(path, flags | O_CLOEXEC, 0666);
  while (*fd < 0 && errno == EINTR);
  CHECK(*fd >= 0, errno == ENOENT ? CORE_ERR_NOT_FOUND : CORE_ERR_IO, "cannot open %s: %s", path,
        strerror(errno));
  DONE(path, .kind = CORE_FILE_OPEN, .fd = *fd, .flags = flags);
  return CORE_OK;
}

core_status core_file_write(int fd, const char *path, const void *bytes, size_t count) {
  GATE(path, "write");
  const char *at = bytes;
  while (count > 0) {
    ssize_t done = write(fd, at, count);
    if (done < 0 && errno == EINTR) continue;
    CHECK(done >= 0, CORE_ERR_IO, "cannot write %zu bytes to %s: %s", count, path, strerror(errno));
    at += done;
    count -= (size_t)done;
  }
  DONE(path, .kind = CORE_FILE_WRITE, .fd = fd, .bytes = bytes, .count = (size_t)(at - (const char *)bytes));
  return CORE_OK;
}

core_status core_file_read_at(int fd, const char *path, void *bytes, size_t count, int64_t offset) {
  GATE(path, "read");
  char *at = bytes;
  while (count > 0) {
    ssize_t done = pread(fd, at, count, (off_t)offset);
    if (done < 0 && errno == EINTR) continue;
    CHECK(done >= 0, CORE_ERR_IO, "cannot read %zu bytes of %s: %s", count, path, strerror(errno));
    CHECK(done > 0, CORE_ERR_CORRUPT, "%s ends at byte %lld, %zu bytes early", path, (long long)offset,
          count);
    at += done;
    offset += done;
    count -= (size_t)done;
  }
  DONE(path, .kind = CORE_FILE_READ, .fd = fd, .count = (size_t)(at - (char *)bytes));
  return CORE_OK;
}

core_status core_file_sync(int fd, const char *path) {
  GATE(path, "sync");
  int result;
  do result = fsync(fd);
  while (result != 0 && errno == EINTR);
  CHECK(result == 0, CORE_ERR_IO, "cannot sync %s: %s", path, strerror(errno));
  DONE(path, .kind = CORE_FILE_SYNC, .fd = fd);
  return CORE_OK;
}

core_status core_file_close(int fd, const char *path) {
  int gate_error = pass_gate(path);
  int result = close(fd); /* the descriptor is gone whatever close says */
  CHECK(gate_error == 0, CORE_ERR_IO, "cannot close %s: %s", path, strerror(gate_error));
  CHECK(result == 0, CORE_ERR_IO, "cannot close %s: %s", path, strerror(errno));
  DONE(path, .kind = CORE_FILE_CLOSE, .fd = fd);
  return CORE_OK;
}

core_status core_file_rename(const char *from, const char *to) {
  GATE(from, "rename");
  CHECK(rename(from, to) == 0, CORE_ERR_IO, "cannot rename %s to %s: %s", from, to, strerror(errno));
  DONE(from, .kind = CORE_FILE_RENAME, .fd = -1, .to = to);
  return CORE_OK;
}

core_status core_file_remove(const char *path) {
  GATE(path, "remove");
  CHECK(unlink(path) == 0, errno == ENOENT ? CORE_ERR_NOT_FOUND : CORE_ERR_IO, "cannot remove %s: %s", path,
        strerror(errno));
  DONE(path, .kind = CORE_FILE_REMOVE, .fd = -1);
  return CORE_OK;
}

core_status core_file_make_directory(const char *path) {
  GATE(path, "make the directory");
  struct stat info;
  bool made = mkdir(path, 0777) == 0;
  bool there = made || (errno == EEXIST && stat(path, &info) == 0 && S_ISDIR(info.st_mode));
  CHECK(there, CORE_ERR_IO, "cannot make the directory %s: %s", path, strerror(errno));
  DONE(path, .kind = CORE_FILE_MAKE_DIRECTORY, .fd = -1);
  return CORE_OK;
}

core_status core_file_make_directories(const char *path) {
  char part[PATH_MAX];
  size_t length = strlen(path);
  CHECK(length > 0 && length < sizeof part, CORE_ERR_ARGUMENT, "a directory name of %zu bytes", length);
  memcpy(part, path, length + 1);
  for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = '\0';
    if (!core_file_exists(part)) TRY(core_file_make_directory(part));
    *slash = '/';
  }
  TRY(core_file_make_directory(path));
  return CORE_OK;
}

core_status core_file_remove_directory(const char *path) {
  GATE(path, "remove the directory");
  CHECK(rmdir(path) == 0, CORE_ERR_IO, "cannot remove the directory %s: %s", path, strerror(errno));
  DONE(path, .kind = CORE_FILE_REMOVE_DIRECTORY, .fd = -1);
  return CORE_OK;
}

core_status core_file_sync_directory(const char *path) {
  int fd = -1;
  TRY(core_file_open(path, O_RDONLY | O_DIRECTORY, &fd));
  core_status status = core_file_sync(fd, path);
  core_error saved;
  core_error_save(&saved);
  return core_keep_first(status, &saved, core_file_close(fd, path));
}

core_status core_file_size(const char *path, int64_t *bytes) {
  struct stat info;
  GATE(path, "look at");
  CHECK(stat(path, &info) == 0, errno == ENOENT ? CORE_ERR_NOT_FOUND : CORE_ERR_IO, "cannot look at %s: %s",
        path, strerror(errno));
  *bytes = info.st_size;
  return CORE_OK;
}

bool core_file_exists(const char *path) {
  return access(path, F_OK) == 0;
}

core_status core_file_read_all(const char *path, int64_t limit, char **text, int64_t *count) {
  int fd = -1;
  *text = NULL;
  TRY(core_file_size(path, count));
  CHECK(*count <= limit, CORE_ERR_FORMAT, "%s has %lld bytes; at most %lld are expected", path,
        (long long)*count, (long long)limit);
  TRY(core_file_open(path, O_RDONLY, &fd));
  core_status status = CORE_OK;
  core_error saved = {0};
  char *bytes = malloc((size_t)*count + 1);
  if (!bytes)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory to read %s", path);
  if (status == CORE_OK) status = core_file_read_at(fd, path, bytes, (size_t)*count, 0);
  core_error_save(&saved);
  status = core_keep_first(status, &saved, core_file_close(fd, path));
  if (status != CORE_OK) {
    free(bytes);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  bytes[*count] = '\0';
  *text = bytes;
  return CORE_OK;
}

static core_status write_and_sync(const char *path, const void *bytes, size_t count) {
  int fd = -1;
  TRY(core_file_open(path, O_WRONLY | O_CREAT | O_TRUNC, &fd));
  core_status status = core_file_write(fd, path, bytes, count);
  if (status == CORE_OK) status = core_file_sync(fd, path);
  core_error saved;
  core_error_save(&saved);
  return core_keep_first(status, &saved, core_file_close(fd, path));
}

/* The names that a replacement needs: a temporary one beside `path`, and its directory. */
typedef struct beside {
  char temporary[PATH_MAX], parent[PATH_MAX];
} beside;

static core_status name_beside(const char *path, beside *out) {
  int length = snprintf(out->temporary, sizeof out->temporary, "%s.tmp", path);
  CHECK(length < (int)sizeof out->temporary, CORE_ERR_ARGUMENT, "a file name of %d bytes", length);
  snprintf(out->parent, sizeof out->parent, "%s", path);
  char *slash = strrchr(out->parent, '/');
  if (!slash) snprintf(out->parent, sizeof out->parent, ".");
  if (slash == out->parent) slash++; /* a file directly under the root */
  if (slash) *slash = '\0';
  return CORE_OK;
}

static core_status move_into_place(core_status made, const beside *names, const char *path) {
  core_status status = made == CORE_OK ? core_file_rename(names->temporary, path) : made;
  if (status != CORE_OK) {
    (void)unlink(names->temporary);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  TRY(core_file_sync_directory(names->parent));
  return CORE_OK;
}

core_status core_file_replace(const char *path, const void *bytes, size_t count) {
  beside names;
  TRY(name_beside(path, &names));
  TRY(move_into_place(write_and_sync(names.temporary, bytes, count), &names, path));
  return CORE_OK;
}

static core_status make_link(const char *target, const char *path) {
  GATE(path, "link");
  if (unlink(path) != 0 && errno != ENOENT) /* what a crash left */
    FAIL(CORE_ERR_IO, "cannot remove %s: %s", path, strerror(errno));
  CHECK(symlink(target, path) == 0, CORE_ERR_IO, "cannot link %s to %s: %s", path, target, strerror(errno));
  DONE(path, .kind = CORE_FILE_LINK, .fd = -1, .to = target);
  return CORE_OK;
}

core_status core_file_link(const char *target, const char *path) {
  beside names;
  TRY(name_beside(path, &names));
  TRY(move_into_place(make_link(target, names.temporary), &names, path));
  return CORE_OK;
}
