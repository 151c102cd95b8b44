#include "core/status.h"

#include <pthread.h>
#include <stdio.h>

#include "tests/support/test_unit.h"

static const char *const own_file = "test_core_status.c";

static int clear(void **state) {
  (void)state;
  core_error_clear();
  return 0;
}

static core_status leaf(int number) {
  FAIL(CORE_ERR_IO, "cannot read block %d of %s", number, "x.h5");
}

static core_status middle(int number) {
  TRY(leaf(number));
  return CORE_OK;
}

static core_status top(int number) {
  TRY(middle(number));
  return CORE_OK;
}

static core_status deep(int levels) {
  if (levels == 0) return leaf(0);
  TRY(deep(levels - 1));
  return CORE_OK;
}

static void codes_have_names_and_texts(void **state) {
  (void)state;
  for (int code = 0; code < CORE_STATUS_COUNT; code++) {
    assert_true(strlen(core_status_name((core_status)code)) > 1);
    assert_true(strlen(core_status_text((core_status)code)) > 3);
    for (int other = 0; other < code; other++)
      assert_string_not_equal(core_status_name((core_status)code), core_status_name((core_status)other));
  }
  /* numbers are written to files: appending is all that is allowed */
  assert_int_equal(CORE_ERR_CORRUPT, 7);
  assert_int_equal(CORE_ERR_INTERNAL, 15);
  assert_string_equal(core_status_name((core_status)CORE_STATUS_COUNT), "UNKNOWN");
  assert_string_equal(core_status_text((core_status)-1), "unknown status");
}

static void a_failure_collects_one_frame_a_caller(void **state) {
  (void)state;
  static const char *const functions[] = {"leaf", "middle", "top"};
  assert_int_equal(top(7), CORE_ERR_IO);
  const core_error *error = core_error_get();
  assert_int_equal(error->code, CORE_ERR_IO);
  assert_string_equal(error->message, "cannot read block 7 of x.h5");
  assert_int_equal(error->depth, 3);
  assert_int_equal(error->missed, 0);
  for (int i = 0; i < 3; i++) {
    const char *file = error->frame[i].file;
    assert_string_equal(error->frame[i].function, functions[i]);
    assert_string_equal(file + strlen(file) - strlen(own_file), own_file);
    assert_true(error->frame[i].line > 0);
  }
  assert_true(error->frame[0].line < error->frame[1].line);
}

static void a_new_failure_replaces_the_old_record(void **state) {
  (void)state;
  (void)top(1);
  assert_int_equal(leaf(2), CORE_ERR_IO);
  assert_int_equal(core_error_get()->depth, 1);
  assert_string_equal(core_error_get()->message, "cannot read block 2 of x.h5");
  core_error_clear();
  assert_int_equal(core_error_get()->code, CORE_OK);
  assert_string_equal(core_error_get()->message, "");
}

static void frames_beyond_the_record_are_counted(void **state) {
  (void)state;
  assert_int_equal(deep(40), CORE_ERR_IO);
  assert_int_equal(core_error_get()->depth, CORE_ERROR_FRAMES);
  assert_int_equal(core_error_get()->missed, 41 - CORE_ERROR_FRAMES);
  assert_string_equal(core_error_get()->frame[0].function, "leaf");
}

static void long_texts_are_cut_and_ended(void **state) {
  (void)state;
  char text[3 * CORE_ERROR_TEXT], file[300];
  memset(text, 'm', sizeof text - 1);
  text[sizeof text - 1] = '\0';
  memset(file, 'd', sizeof file - 1);
  memcpy(file + sizeof file - 8, "/name.c", 8);
  (void)core_error_begin(CORE_ERR_MEMORY, text, file, 12, "%s", text);
  const core_error *error = core_error_get();
  assert_int_equal(strlen(error->message), CORE_ERROR_TEXT - 1);
  assert_int_equal(strlen(error->frame[0].function), CORE_ERROR_NAME - 1);
  assert_int_equal(strlen(error->frame[0].file), CORE_ERROR_NAME - 1);
  assert_string_equal(error->frame[0].file + CORE_ERROR_NAME - 8, "/name.c");
  (void)core_error_context(CORE_ERR_MEMORY, "%s", text);
  assert_int_equal(strlen(error->message), CORE_ERROR_TEXT - 1);
  (void)core_error_begin(CORE_ERR_IO, "f", "f.c", 1, "short");
  (void)core_error_context(CORE_ERR_IO, "%.500s", text);
  assert_int_equal(strlen(error->message), 500 + 2 + 5);
}

static core_status fail_again(void) {
  FAIL(CORE_ERR_FORMAT, "again: %s", core_error_get()->message);
}

static void a_message_may_quote_the_record(void **state) {
  (void)state;
  (void)leaf(3);
  assert_error(fail_again(), CORE_ERR_FORMAT, "again: cannot read block 3 of x.h5");
}

static void context_comes_before_the_message(void **state) {
  (void)state;
  assert_int_equal(core_error_context(top(4), "step %d", 9), CORE_ERR_IO);
  assert_string_equal(core_error_get()->message, "step 9: cannot read block 4 of x.h5");
  assert_int_equal(core_error_get()->depth, 3);
}

static core_status with_cleanup(bool fail, int *cleaned) {
  core_status status = CORE_OK;
  if (fail) TRY_OUT(leaf(5), out);
  *cleaned += 10;
out:
  *cleaned += 1;
  return status;
}

static void try_out_goes_through_the_cleanup(void **state) {
  (void)state;
  int cleaned = 0;
  assert_ok(with_cleanup(false, &cleaned));
  assert_int_equal(cleaned, 11);
  assert_error(with_cleanup(true, &cleaned), CORE_ERR_IO, "block 5");
  assert_int_equal(cleaned, 12);
  assert_string_equal(core_error_get()->frame[1].function, "with_cleanup");
}

static core_status check_positive(int value) {
  CHECK(value > 0, CORE_ERR_ARGUMENT, "expected a positive number, got %d", value);
  return CORE_OK;
}

static core_status assert_positive(int value) {
  ASSERT(value > 0);
  (void)value;
  return CORE_OK;
}

static void check_is_in_every_build_and_assert_in_debug_builds(void **state) {
  (void)state;
  assert_ok(check_positive(1));
  assert_error(check_positive(-2), CORE_ERR_ARGUMENT, "positive number, got -2");
#ifdef NDEBUG
  assert_ok(assert_positive(-2));
#else
  assert_error(assert_positive(-2), CORE_ERR_INTERNAL, "assertion failed: value > 0");
#endif
}

static core_status bare(void) {
  return CORE_ERR_UNSUPPORTED; /* as from a table of another backend, without a record */
}

static core_status pass_bare(void) {
  TRY(bare());
  return CORE_OK;
}

static void a_code_without_a_record_gets_one(void **state) {
  (void)state;
  (void)leaf(1); /* an old record of another code must not be taken for it */
  assert_error(pass_bare(), CORE_ERR_UNSUPPORTED, "not supported");
  assert_int_equal(core_error_get()->depth, 1);
  assert_string_equal(core_error_get()->frame[0].function, "pass_bare");
}

static void cleanup_keeps_the_first_failure(void **state) {
  (void)state;
  core_error saved;
  core_status first = top(6);
  core_error_save(&saved);
  assert_error(core_keep_first(first, &saved, check_positive(-1)), CORE_ERR_IO, "block 6");
  assert_int_equal(core_error_get()->depth, 3);
  core_error_clear();
  core_error_save(&saved);
  assert_error(core_keep_first(CORE_OK, &saved, check_positive(-1)), CORE_ERR_ARGUMENT, "got -1");
  assert_ok(core_keep_first(CORE_OK, &saved, CORE_OK));
}

/* ---- threads ---- */

typedef struct worker {
  pthread_barrier_t *meet;
  int number;
  core_error record;
} worker;

static void *fail_many_times(void *argument) {
  worker *w = argument;
  char expected[64];
  for (int i = 0; i < 500; i++) {
    int number = w->number * 1000 + i;
    (void)middle(number);
    pthread_barrier_wait(w->meet);
    snprintf(expected, sizeof expected, "cannot read block %d of x.h5", number);
    if (strcmp(core_error_get()->message, expected) != 0) return "another thread's record";
  }
  core_error_save(&w->record);
  return NULL;
}

static void every_thread_has_its_own_record(void **state) {
  (void)state;
  enum { THREADS = 3 };
  pthread_barrier_t meet;
  pthread_t thread[THREADS];
  worker workers[THREADS];
  (void)check_positive(-5);
  pthread_barrier_init(&meet, NULL, THREADS);
  for (int i = 0; i < THREADS; i++) {
    workers[i] = (worker){.meet = &meet, .number = i};
    assert_int_equal(pthread_create(&thread[i], NULL, fail_many_times, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) {
    void *complaint = NULL;
    pthread_join(thread[i], &complaint);
    assert_null(complaint);
  }
  pthread_barrier_destroy(&meet);
  assert_message("got -5");
  assert_int_equal(core_error_restore(&workers[2].record), CORE_ERR_IO); /* handed over */
  assert_message("cannot read block 2499 of x.h5");
  assert_int_equal(core_error_get()->depth, 2);
}

/* ---- printing ---- */

static void records_carry_the_rank(void **state) {
  (void)state;
  char text[512];
  (void)leaf(1);
  assert_int_equal(core_error_get()->rank, -1);
  core_error_format(core_error_get(), false, text, sizeof text);
  assert_string_equal(text, "cannot read block 1 of x.h5 (ERR_IO: input/output error)");
  core_error_set_rank(5);
  (void)leaf(1);
  assert_int_equal(core_error_get()->rank, 5);
  core_error_format(core_error_get(), false, text, sizeof text);
  assert_string_equal(text, "cannot read block 1 of x.h5 (ERR_IO: input/output error, rank 5)");
  core_error_set_rank(-1);
}

static void printing_shows_frames_and_stays_inside_the_buffer(void **state) {
  (void)state;
  char whole[4096], text[4096];
  (void)top(1);
  int length = core_error_format(core_error_get(), true, whole, sizeof whole);
  assert_int_equal(length, strlen(whole));
  assert_non_null(strstr(whole, "\n    in leaf, "));
  assert_non_null(strstr(whole, "\n    in top, "));
  for (int64_t capacity = 1; capacity <= length + 2; capacity++) {
    memset(text, '#', sizeof text);
    int used = core_error_format(core_error_get(), true, text, capacity);
    assert_int_equal(used, strlen(text));
    assert_true(used < capacity);
    assert_int_equal(text[capacity], '#');
    assert_int_equal(memcmp(text, whole, (size_t)used), 0);
  }
}

#define TEST(name) cmocka_unit_test_setup(name, clear)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(codes_have_names_and_texts),
      TEST(a_failure_collects_one_frame_a_caller),
      TEST(a_new_failure_replaces_the_old_record),
      TEST(frames_beyond_the_record_are_counted),
      TEST(long_texts_are_cut_and_ended),
      TEST(a_message_may_quote_the_record),
      TEST(context_comes_before_the_message),
      TEST(try_out_goes_through_the_cleanup),
      TEST(check_is_in_every_build_and_assert_in_debug_builds),
      TEST(a_code_without_a_record_gets_one),
      TEST(cleanup_keeps_the_first_failure),
      TEST(every_thread_has_its_own_record),
      TEST(records_carry_the_rank),
      TEST(printing_shows_frames_and_stays_inside_the_buffer),
  };
  return cmocka_run_group_tests_name("core/status", tests, NULL, NULL);
}
