#include "core/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h> /* isatty */

/* The one piece of process-wide state: there is one standard error. */
static struct {
  pthread_mutex_t lock;
  core_log_level level;
  int32_t rank;
  char label[72]; /* "[label] ", or empty */
  FILE *file;
  bool progress_shown;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .level = CORE_LOG_INFO};

void core_log_set_level(core_log_level level) {
  pthread_mutex_lock(&state.lock);
  state.level = level;
  pthread_mutex_unlock(&state.lock);
}

void core_log_set_rank(int32_t rank) {
  pthread_mutex_lock(&state.lock);
  state.rank = rank;
  pthread_mutex_unlock(&state.lock);
}

void core_log_set_label(const char *label) {
  pthread_mutex_lock(&state.lock);
  state.label[0] = '\0';
  if (label[0]) snprintf(state.label, sizeof state.label, "[%.63s] ", label);
  pthread_mutex_unlock(&state.lock);
}

static void take_file(FILE *file) {
  pthread_mutex_lock(&state.lock);
  if (state.file) fclose(state.file);
  state.file = file;
  pthread_mutex_unlock(&state.lock);
}

core_status core_log_open(const char *path) {
  FILE *file = fopen(path, "ae");
  CHECK(file, CORE_ERR_IO, "cannot open the log %s: %s", path, strerror(errno));
  setvbuf(file, NULL, _IOLBF, 0);
  take_file(file);
  return CORE_OK;
}

void core_log_close(void) {
  take_file(NULL);
}

bool core_log_is_terminal(void) {
  return isatty(STDERR_FILENO) == 1;
}

static void clear_progress(void) {
  if (state.progress_shown) fputs("\r\033[K", stderr);
  state.progress_shown = false;
}

static const char *level_prefix(core_log_level level) {
  static const char *const prefix[] = {"debug: ", "", "warning: ", "error: "};
  return prefix[level];
}

static void write_lines(core_log_level level, const char *text) {
  char rank[24] = "", stamp[32] = "";
  if (state.rank > 0) snprintf(rank, sizeof rank, "[rank %d] ", state.rank);
  clear_progress();
  fprintf(stderr, "%s%s%s%s\n", rank, state.label, level_prefix(level), text);
  if (!state.file) return;
  time_t now = time(NULL);
  struct tm parts;
  strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &parts));
  fprintf(state.file, "%s %s%s%s%s\n", stamp, rank, state.label, level_prefix(level), text);
}

void core_log(core_log_level level, const char *format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&state.lock);
  core_log_level floor = state.rank > 0 && state.level < CORE_LOG_WARNING ? CORE_LOG_WARNING : state.level;
  if (level >= floor) write_lines(level, text);
  pthread_mutex_unlock(&state.lock);
}

void core_log_progress(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&state.lock);
  clear_progress();
  if (text[0]) {
    fprintf(stderr, "\r%s%s", state.label, text);
    fflush(stderr);
    state.progress_shown = true;
  }
  pthread_mutex_unlock(&state.lock);
}
