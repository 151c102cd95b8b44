#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>  /* snprintf, vsnprintf */
#include <string.h> /* memcpy, strlen */

static _Thread_local core_error error_record = {.rank = -1};
static int32_t error_rank = -1; /* written once, before other threads start */

const char *core_status_name(core_status code) {
  static const char *const names[] = {
#define CORE_STATUS_NAME(name, text) #name,
      CORE_STATUS_LIST(CORE_STATUS_NAME)
#undef CORE_STATUS_NAME
  };
  return (unsigned)code < CORE_STATUS_COUNT ? names[code] : "UNKNOWN";
}

const char *core_status_text(core_status code) {
  static const char *const texts[] = {
#define CORE_STATUS_TEXT(name, text) text,
      CORE_STATUS_LIST(CORE_STATUS_TEXT)
#undef CORE_STATUS_TEXT
  };
  return (unsigned)code < CORE_STATUS_COUNT ? texts[code] : "unknown status";
}

const core_error *core_error_get(void) {
  return &error_record;
}

void core_error_clear(void) {
  memset(&error_record, 0, sizeof error_record);
  error_record.rank = error_rank;
}

/* The end of a path says more than its beginning. */
static void copy_tail(char *target, const char *source) {
  size_t length = strlen(source);
  const char *start = length < CORE_ERROR_NAME ? source : source + length - (CORE_ERROR_NAME - 1);
  snprintf(target, CORE_ERROR_NAME, "%s", start);
}

static void add_frame(const char *function, const char *file, int line) {
  if (error_record.depth >= CORE_ERROR_FRAMES) {
    error_record.missed++;
    return;
  }
  core_frame *frame = &error_record.frame[error_record.depth++];
  copy_tail(frame->function, function);
  copy_tail(frame->file, file);
  frame->line = line;
}

core_status core_error_begin(core_status code, const char *function, const char *file, int line,
                             const char *format, ...) {
  char message[CORE_ERROR_TEXT]; /* the arguments may point into the record itself */
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  core_error_clear();
  error_record.code = code;
  memcpy(error_record.message, message, sizeof message);
  add_frame(function, file, line);
  return code;
}

core_status core_error_trace(core_status code, const char *function, const char *file, int line) {
  if (error_record.code != (int32_t)code) { /* a code without a record, from a table of another backend */
    core_error_clear();
    error_record.code = code;
    snprintf(error_record.message, CORE_ERROR_TEXT, "%s", core_status_text(code));
  }
  add_frame(function, file, line);
  return code;
}

core_status core_error_context(core_status code, const char *format, ...) {
  char text[CORE_ERROR_TEXT], joined[2 * CORE_ERROR_TEXT + 4];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(joined, sizeof joined, "%s: %s", text, error_record.message);
  joined[CORE_ERROR_TEXT - 1] = '\0';
  memcpy(error_record.message, joined, CORE_ERROR_TEXT);
  return code;
}

void core_error_save(core_error *out) {
  *out = error_record;
}

core_status core_error_restore(const core_error *error) {
  error_record = *error;
  return (core_status)error->code;
}

void core_error_set_rank(int32_t rank) {
  error_rank = rank;
  error_record.rank = rank;
}

core_status core_keep_first(core_status first, const core_error *saved, core_status later) {
  return first == CORE_OK ? later : core_error_restore(saved);
}

int core_error_format(const core_error *error, bool with_frames, char *out, int64_t capacity) {
  core_status code = (core_status)error->code;
  char rank[32] = "";
  if (error->rank >= 0) snprintf(rank, sizeof rank, ", rank %d", error->rank);
  int used = snprintf(out, (size_t)capacity, "%s (%s: %s%s)", error->message, core_status_name(code),
                      core_status_text(code), rank);
  for (int32_t i = 0; with_frames && i < error->depth && i < CORE_ERROR_FRAMES && used < capacity; i++) {
    const core_frame *frame = &error->frame[i];
    used += snprintf(out + used, (size_t)(capacity - used), "\n    in %s, %s:%d", frame->function,
                     frame->file, frame->line);
  }
  return used < capacity ? used : (int)capacity - 1;
}
