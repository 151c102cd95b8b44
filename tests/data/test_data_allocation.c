/* After a stream is open, our own code never calls the allocator. The linker sends every call of our objects
 * through the wrappers below. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "data_fixture.h"

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);

static atomic_long calls;

void *__wrap_malloc(size_t bytes) {
  atomic_fetch_add(&calls, 1);
  return __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
  atomic_fetch_add(&calls, 1);
  return __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
  atomic_fetch_add(&calls, 1);
  return __real_realloc(old, bytes);
}

static void streaming_allocates_nothing(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.filter = DATA_FILTER_SHUFFLE_GZIP;
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const data_range range[3] = {{0, 16}, {0, 16}, {0, 16}};
  const data_stream_options options = {.order = {.seed = 1, .shuffle_samples = 60},
                                       .batch = 16,
                                       .micro_batches = 1,
                                       .range = range,
                                       .threads = 2,
                                       .cache_bytes = 1,
                                       .repeat = true};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  const long before_open = atomic_load(&calls);
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  const long opened = atomic_load(&calls);
  assert_true(opened > before_open); /* the wrappers are in use */
  for (int b = 0; b < 60; ++b) {
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    data_stream_put(stream, batch);
  }
  assert_int_equal(atomic_load(&calls), opened);
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(streaming_allocates_nothing)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
