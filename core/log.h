/* Log: levelled lines to standard error and to the run's log.txt. Thread-safe. Rank 0 prints from INFO on,
 * the others from WARNING on; every line of a rank other than 0 carries its rank. */
#ifndef CORE_LOG_H
#define CORE_LOG_H

#include "core/status.h"

typedef enum core_log_level {
  CORE_LOG_DEBUG,
  CORE_LOG_INFO,
  CORE_LOG_WARNING,
  CORE_LOG_ERROR
} core_log_level;

void core_log_set_level(core_log_level level);
void core_log_set_rank(int32_t rank);
/* From now on every line, of progress too, begins with "[label] "; an empty one: no longer. At most 63 bytes.
 */
void core_log_set_label(const char *label);
/* Opens (appends to) a file that receives every line too. */
CORE_NODISCARD core_status core_log_open(const char *path);
void core_log_close(void);
void core_log(core_log_level level, const char *format, ...) CORE_PRINTF(2, 3);

#define LOG_DEBUG(...) core_log(CORE_LOG_DEBUG, __VA_ARGS__)
#define LOG_INFO(...) core_log(CORE_LOG_INFO, __VA_ARGS__)
#define LOG_WARNING(...) core_log(CORE_LOG_WARNING, __VA_ARGS__)
#define LOG_ERROR(...) core_log(CORE_LOG_ERROR, __VA_ARGS__)

/* A line that the next log line or core_log_progress replaces on a terminal; a plain line elsewhere is the
 * caller's choice. Empty text ends it. */
void core_log_progress(const char *format, ...) CORE_PRINTF(1, 2);
bool core_log_is_terminal(void);

#endif
