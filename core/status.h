/* Status codes, the error record and the five error macros.
 *
 * Every function that can fail returns a `core_status`. The first failure on a thread fills a fixed,
 * thread-local `core_error`: code, message, and one frame per function that passed the failure on. Nothing
 * here allocates, so an out-of-memory error can be reported. A worker thread hands its record to the thread
 * that waits for it with core_error_save / core_error_restore; ranks agree on one record with comm_agree.
 *
 * Local: nothing in this header communicates. */
#ifndef CORE_STATUS_H
#define CORE_STATUS_H

#include <stdbool.h>
#include <stdint.h> /* int32_t, int64_t */

/* name, short text. The order is part of the checkpoint and error-file formats: append only. */
#define CORE_STATUS_LIST(X)                           \
  X(OK, "success")                                    \
  X(ERR_ARGUMENT, "invalid argument")                 \
  X(ERR_USAGE, "wrong command line")                  \
  X(ERR_CONFIG, "invalid configuration")              \
  X(ERR_MEMORY, "out of memory")                      \
  X(ERR_IO, "input/output error")                     \
  X(ERR_FORMAT, "not in the expected format")         \
  X(ERR_CORRUPT, "damaged data")                      \
  X(ERR_MISMATCH, "data that do not belong together") \
  X(ERR_NOT_FOUND, "not found")                       \
  X(ERR_UNSUPPORTED, "not supported")                 \
  X(ERR_COMM, "communication failed")                 \
  X(ERR_TIMEOUT, "deadline passed")                   \
  X(ERR_NON_FINITE, "non-finite value")               \
  X(ERR_STOPPED, "stopped on request")                \
  X(ERR_INTERNAL, "internal error")                   \
  X(ERR_DEVICE, "device failure")

typedef enum core_status {
#define CORE_STATUS_ENUM(name, text) CORE_##name,
  CORE_STATUS_LIST(CORE_STATUS_ENUM)
#undef CORE_STATUS_ENUM
      CORE_STATUS_COUNT
} core_status;

#define CORE_NODISCARD __attribute__((warn_unused_result))
#define CORE_PRINTF(text, first) __attribute__((format(printf, text, first)))

enum { CORE_ERROR_FRAMES = 16, CORE_ERROR_TEXT = 512, CORE_ERROR_NAME = 64 };

typedef struct core_frame {
  char function[CORE_ERROR_NAME];
  char file[CORE_ERROR_NAME]; /* last components of the path, cut from the left */
  int32_t line;
} core_frame;

/* A plain record without pointers: it can be copied between threads and sent between ranks. */
typedef struct core_error {
  int32_t code;   /* core_status */
  int32_t rank;   /* world rank on which it arose, -1 before communication exists */
  int32_t depth;  /* frames in use */
  int32_t missed; /* frames that did not fit */
  char message[CORE_ERROR_TEXT];
  core_frame frame[CORE_ERROR_FRAMES];
} core_error;

/* Name ("ERR_IO") and text ("input/output error") of a code; never NULL. */
const char *core_status_name(core_status code);
const char *core_status_text(core_status code);

/* The calling thread's record. Valid until the next failure on this thread. */
const core_error *core_error_get(void);
void core_error_clear(void);

/* Starts a record (code, message, first frame); returns `code` so that FAIL can return it. */
core_status core_error_begin(core_status code, const char *function, const char *file, int line,
                             const char *format, ...) CORE_PRINTF(5, 6);
/* Adds the frame of a caller to the record; returns `code`. */
core_status core_error_trace(core_status code, const char *function, const char *file, int line);
/* Puts "<text>: " before the message, for a caller that knows what was being done ("reading shard x"). */
core_status core_error_context(core_status code, const char *format, ...) CORE_PRINTF(2, 3);

void core_error_save(core_error *out);
/* Makes `error` the calling thread's record and returns its code. */
core_status core_error_restore(const core_error *error);
/* Rank that new records carry; set once when communication starts. */
void core_error_set_rank(int32_t rank);
/* "message (ERR_IO: input/output error, rank 1)" and, with frames, one line a frame. Returns its length. */
int core_error_format(const core_error *error, bool with_frames, char *out, int64_t capacity);

/* Passes a failure on, adding this function to the record. */
#define TRY(expression)                                                                           \
  do {                                                                                            \
    core_status try_status = (expression);                                                        \
    if (try_status != CORE_OK) return core_error_trace(try_status, __func__, __FILE__, __LINE__); \
  } while (0)

/* As TRY, but goes to `label` with the local variable `status` set. A later failure during the cleanup must
 * not overwrite the first: cleanup calls that can fail are wrapped in core_keep_first. */
#define TRY_OUT(expression, label)                                  \
  do {                                                              \
    status = (expression);                                          \
    if (status != CORE_OK) {                                        \
      (void)core_error_trace(status, __func__, __FILE__, __LINE__); \
      goto label;                                                   \
    }                                                               \
  } while (0)

#define FAIL(code, ...) return core_error_begin((code), __func__, __FILE__, __LINE__, __VA_ARGS__)

#define CHECK(condition, code, ...)                                   \
  do {                                                                \
    if (__builtin_expect(!(condition), 0)) FAIL((code), __VA_ARGS__); \
  } while (0)

/* What the program itself must guarantee. Debug builds only. */
#ifndef NDEBUG
#define ASSERT(condition)                                                                               \
  do {                                                                                                  \
    if (__builtin_expect(!(condition), 0)) FAIL(CORE_ERR_INTERNAL, "assertion failed: %s", #condition); \
  } while (0)
#else
#define ASSERT(condition) ((void)0)
#endif

/* Runs a cleanup call without losing the failure that led to it: returns `first` with its record restored
 * when it is a failure, otherwise the result of the cleanup. Usage: status = core_keep_first(status, &saved,
 * close_it(x)) after core_error_save(&saved). */
core_status core_keep_first(core_status first, const core_error *saved, core_status later);

#endif
