/* File operations with errors that name the path and the reason. Every call goes through one numbered gate,
 * so that tests can make the n-th operation fail, tear or end the process. Local. */
#ifndef CORE_FILE_H
#define CORE_FILE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/status.h"

/* Opens as open(2) with O_CLOEXEC; mode 0666 under the umask. */
CORE_NODISCARD core_status core_file_open(const char *path, int flags, int *fd);
/* Writes all bytes / reads exactly `count` bytes at `offset`; a short file is ERR_CORRUPT. EINTR is retried.
 */
CORE_NODISCARD core_status core_file_write(int fd, const char *path, const void *bytes, size_t count);
CORE_NODISCARD core_status core_file_read_at(int fd, const char *path, void *bytes, size_t count,
                                             int64_t offset);
CORE_NODISCARD core_status core_file_sync(int fd, const char *path);
CORE_NODISCARD core_status core_file_close(int fd, const char *path);
CORE_NODISCARD core_status core_file_rename(const char *from, const char *to);
CORE_NODISCARD core_status core_file_remove(const char *path);
/* mkdir; an existing directory is success. `core_file_make_directories` makes parents too. */
CORE_NODISCARD core_status core_file_make_directory(const char *path);
CORE_NODISCARD core_status core_file_make_directories(const char *path);
CORE_NODISCARD core_status core_file_remove_directory(const char *path);
/* fsync of a directory, so that names in it survive a power cut. */
CORE_NODISCARD core_status core_file_sync_directory(const char *path);
CORE_NODISCARD core_status core_file_size(const char *path, int64_t *bytes);
bool core_file_exists(const char *path);
/* Whole file into malloc'ed, NUL-terminated memory that the caller frees; larger than `limit` is refused. */
CORE_NODISCARD core_status core_file_read_all(const char *path, int64_t limit, char **text, int64_t *count);
/* Atomic replacement: temporary beside it, write, fsync, rename, fsync of the directory. */
CORE_NODISCARD core_status core_file_replace(const char *path, const void *bytes, size_t count);

/* A symbolic link `path` to `target`, atomically in the place of an older one: made beside it, renamed, fsync
 * of the directory. */
CORE_NODISCARD core_status core_file_link(const char *target, const char *path);

/* Fault injection, for tests only (also by the environment:
 * ANTIPHON_FAULT_FILE="<n>:<errno|exit|sleep=milliseconds>[:<part>]" counts only operations on paths that
 * contain <part>; with an errno or a sleep, this and all later ones fail or are late). */
typedef struct core_file_fault {
  int64_t at;   /* which operation, from 1; 0 off */
  int error;    /* errno to report; 0: the process ends at once, as if killed, unless it is to sleep */
  double sleep; /* seconds before the operation, which then goes on */
  char containing[256]; /* only paths that contain this; empty all */
  int sticky;           /* non-zero: this one and all later ones fail */
} core_file_fault;
void core_file_inject(const core_file_fault *fault);
/* Operations that passed the gate (and matched) since the last injection. */
int64_t core_file_operations(void);

typedef enum core_file_kind {
  CORE_FILE_OPEN,
  CORE_FILE_WRITE,
  CORE_FILE_READ,
  CORE_FILE_SYNC,
  CORE_FILE_CLOSE,
  CORE_FILE_RENAME,
  CORE_FILE_REMOVE,
  CORE_FILE_MAKE_DIRECTORY,
  CORE_FILE_REMOVE_DIRECTORY,
  CORE_FILE_LINK
} core_file_kind;

/* One operation that succeeded. What does not belong to its kind is 0, and fd -1. */
typedef struct core_file_event {
  core_file_kind kind;
  int fd, flags;         /* flags: of an open */
  const char *path, *to; /* to: of a rename; of a link what it names */
  const void *bytes;     /* of a write */
  size_t count;          /* of a write or a read */
} core_file_event;

/* Observation, for tests only: `observer` is called after every operation that succeeded, on the thread that
 * did it; NULL: none. A directory that was there already is reported as made. Set it while nothing runs. */
typedef void (*core_file_observer)(void *context, const core_file_event *event);
void core_file_observe(core_file_observer observer, void *context);

#endif
