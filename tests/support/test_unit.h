/* cmocka with the headers it needs before it, and assertions on error records. */
#ifndef TEST_UNIT_H
#define TEST_UNIT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "core/status.h"

static inline void test_assert_ok(core_status status, const char *text, const char *file, int line) {
  char record[4096];
  if (status == CORE_OK) return;
  core_error_format(core_error_get(), true, record, sizeof record);
  print_error("%s failed: %s\n", text, record);
  _fail(file, line);
}

static inline void test_assert_error(core_status status, core_status expected, const char *fragment,
                                     const char *text, const char *file, int line) {
  const core_error *error = core_error_get();
  bool good = status == expected && error->code == (int32_t)expected && strstr(error->message, fragment);
  if (good) return;
  print_error("%s: expected %s with \"%s\"\n     got %s with \"%s\"\n", text, core_status_name(expected),
              fragment, core_status_name(status), status == CORE_OK ? "" : error->message);
  _fail(file, line);
}

/* Success, with the whole record printed where it fails. */
#define assert_ok(expression) test_assert_ok((expression), #expression, __FILE__, __LINE__)
/* A failure of this code whose message contains the fragment. */
#define assert_error(expression, code, fragment) \
  test_assert_error((expression), (code), (fragment), #expression, __FILE__, __LINE__)
/* The current record's message contains a further fragment. */
#define assert_message(fragment)                                                        \
  do {                                                                                  \
    const char *test_message = core_error_get()->message;                               \
    if (!strstr(test_message, (fragment)))                                              \
      fail_msg("the message \"%s\" does not contain \"%s\"", test_message, (fragment)); \
  } while (0)

#endif
