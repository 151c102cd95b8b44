#include "core/arena.h"

#include <math.h>
#include <stdlib.h>

#include "core/random.h"
#include "tests/support/test_unit.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum { BLOCKS = 20 };

static core_arena *make(void) {
  core_arena *arena = NULL;
  assert_ok(core_arena_create("test", NULL, &arena));
  return arena;
}

/* A module's plan: blocks of odd sizes, scratch that is rewound in between. */
static void plan(core_arena *arena, unsigned char *block[BLOCKS]) {
  for (int i = 0; i < BLOCKS; i++) {
    size_t mark = core_arena_mark(arena);
    double *scratch;
    assert_ok(ARENA_TAKE(arena, 50, &scratch));
    core_arena_rewind(arena, mark);
    assert_int_equal(core_arena_used(arena), mark);
    assert_ok(core_arena_take(arena, 1 + i * 7, 3, (void **)&block[i]));
  }
}

static void one_code_path_sizes_and_carves(void **state) {
  (void)state;
  core_arena *arena = make();
  unsigned char *block[BLOCKS];
  assert_true(core_arena_is_dry(arena));
  plan(arena, block);
  for (int i = 0; i < BLOCKS; i++) assert_null(block[i]);
  size_t peak = core_arena_peak(arena);
  assert_ok(core_arena_commit(arena));
  assert_false(core_arena_is_dry(arena));
  assert_int_equal(core_arena_used(arena), 0);
  plan(arena, block);
  assert_int_equal(core_arena_peak(arena), peak); /* the real run needed exactly what was counted */
  for (int i = 0; i < BLOCKS; i++) {
    assert_non_null(block[i]);
    assert_int_equal((uintptr_t)block[i] % 64, 0);
    memset(block[i], i, (size_t)(1 + i * 7) * 3);
  }
  for (int i = 0; i < BLOCKS; i++) /* no block reached into another */
    for (int j = 0; j < (1 + i * 7) * 3; j++) assert_int_equal(block[i][j], i);
  core_arena_seal(arena);
  core_arena_destroy(arena);
}

static void a_sealed_arena_gives_nothing(void **state) {
  (void)state;
  core_arena *arena = make();
  float *numbers = NULL;
  assert_ok(ARENA_TAKE(arena, 10, &numbers));
  assert_ok(core_arena_commit(arena));
  assert_ok(ARENA_TAKE(arena, 10, &numbers));
  core_arena_seal(arena);
  size_t used = core_arena_used(arena);
  float *more = numbers;
  assert_error(ARENA_TAKE(arena, 1, &more), CORE_ERR_INTERNAL, "'test' is sealed");
  assert_null(more);
  core_arena_rewind(arena, 0);
  assert_int_equal(core_arena_used(arena), used);
  core_arena_destroy(arena);
}

static void more_than_planned_is_refused(void **state) {
  (void)state;
  core_arena *arena = make();
  char *bytes = NULL;
  assert_ok(ARENA_TAKE(arena, 100, &bytes));
  assert_ok(core_arena_commit(arena));
  assert_ok(ARENA_TAKE(arena, 40, &bytes));
  assert_error(ARENA_TAKE(arena, 100, &bytes), CORE_ERR_INTERNAL, "more than the");
  assert_null(bytes);
  assert_error(core_arena_commit(arena), CORE_ERR_INTERNAL, "twice");
  core_arena_destroy(arena);
}

static void impossible_sizes_are_refused(void **state) {
  (void)state;
  core_arena *arena = make();
  void *out = arena;
  assert_error(core_arena_take(arena, -1, 4, &out), CORE_ERR_ARGUMENT, "-1 items of 4 bytes");
  assert_null(out);
  assert_error(core_arena_take(arena, INT64_MAX, 8, &out), CORE_ERR_ARGUMENT, "items of 8 bytes");
  assert_error(core_arena_take(arena, 2, SIZE_MAX, &out), CORE_ERR_ARGUMENT, "2 items");
  assert_error(core_arena_take(arena, INT64_MAX, SIZE_MAX, &out), CORE_ERR_ARGUMENT, "items");
  for (int i = 0; i < 2; i++) assert_ok(core_arena_take(arena, (int64_t)1 << 60, 3, &out));
  core_status status = CORE_OK;
  for (int i = 0; i < 8 && status == CORE_OK; i++) status = core_arena_take(arena, (int64_t)1 << 60, 3, &out);
  assert_error(status, CORE_ERR_ARGUMENT, "address space"); /* a sum that would wrap */
#ifndef __SANITIZE_ADDRESS__ /* which ends the process instead of returning NULL */
  assert_error(core_arena_commit(arena), CORE_ERR_MEMORY, "'test' needs");
#endif
  core_arena_destroy(arena);
}

static void nothing_takes_nothing(void **state) {
  (void)state;
  core_arena *arena = make();
  for (int phase = 0; phase < 2; phase++) {
    double *none = (double *)arena;
    assert_ok(ARENA_TAKE(arena, 0, &none));
    assert_null(none);
    assert_ok(core_arena_take(arena, 5, 0, (void **)&none));
    assert_null(none);
    assert_int_equal(core_arena_used(arena), 0);
    if (phase == 0) assert_ok(core_arena_commit(arena)); /* an empty plan can be committed */
  }
  core_arena_destroy(arena);
  core_arena_destroy(NULL);
}

static void rewinding_gives_the_same_memory_again(void **state) {
  (void)state;
  core_arena *arena = make();
  char *kept = NULL, *first = NULL, *second = NULL;
  for (int phase = 0; phase < 2; phase++) {
    assert_ok(ARENA_TAKE(arena, 10, &kept));
    size_t mark = core_arena_mark(arena);
    assert_ok(ARENA_TAKE(arena, 1000, &first));
    core_arena_rewind(arena, mark);
    core_arena_rewind(arena, mark + 64); /* never forward */
    assert_int_equal(core_arena_used(arena), mark);
    assert_ok(ARENA_TAKE(arena, 500, &second));
    assert_true(core_arena_peak(arena) >= 1000 + 64 && core_arena_peak(arena) < 1500);
    if (phase == 0) {
      core_arena_rewind(arena, 0);
      assert_ok(core_arena_commit(arena));
    }
  }
  assert_ptr_equal(first, second);
  memset(second, 1, 500);
  core_arena_destroy(arena);
}

static void fresh_memory_shows_in_debug_builds(void **state) {
  (void)state;
  core_arena *arena = make();
  double *numbers = NULL;
  size_t start = core_arena_mark(arena);
  assert_ok(ARENA_TAKE(arena, 33, &numbers));
  assert_ok(core_arena_commit(arena));
  for (int round = 0; round < 2; round++) {
    assert_ok(ARENA_TAKE(arena, 33, &numbers));
#ifndef NDEBUG
    for (int i = 0; i < 33; i++) assert_true(isnan(numbers[i])); /* after a rewind too */
#endif
    for (int i = 0; i < 33; i++) numbers[i] = 1;
    core_arena_rewind(arena, start);
  }
  core_arena_destroy(arena);
}

static void red_zones_lie_between_blocks(void **state) {
  (void)state;
#ifdef __SANITIZE_ADDRESS__
  core_arena *arena = make();
  char *a = NULL, *b = NULL;
  for (int phase = 0; phase < 2; phase++) {
    assert_ok(ARENA_TAKE(arena, 100, &a));
    assert_ok(ARENA_TAKE(arena, 64, &b));
    if (phase == 0) assert_ok(core_arena_commit(arena));
  }
  assert_false(__asan_address_is_poisoned(a + 99));
  assert_true(__asan_address_is_poisoned(a + 104)); /* ASan's granules have 8 bytes */
  assert_true(__asan_address_is_poisoned(b - 1));
  assert_true(__asan_address_is_poisoned(b + 64));
  core_arena_rewind(arena, 0);
  assert_true(__asan_address_is_poisoned(a));
  core_arena_destroy(arena);
#else
  skip();
#endif
}

/* ---- memory of a device ---- */

static int allocated, released;

static core_status device_allocate(size_t bytes, void **out) {
  CHECK(bytes < 100000, CORE_ERR_MEMORY, "the device has no %zu bytes", bytes);
  allocated++;
  *out = aligned_alloc(64, (bytes + 63) / 64 * 64);
  return CORE_OK;
}

static void device_release(void *pointer) {
  released++;
  free(pointer);
}

static void device_memory_comes_from_the_device(void **state) {
  (void)state;
  const core_device device = {
      .name = "fake", .host_access = false, .allocate = device_allocate, .release = device_release};
  core_arena *arena = NULL;
  char name[100], *bytes = NULL;
  memset(name, 'n', sizeof name - 1);
  name[sizeof name - 1] = '\0';
  assert_ok(core_arena_create(name, &device, &arena)); /* a long name is cut */
  assert_true(strlen(core_arena_name(arena)) > 20 && strlen(core_arena_name(arena)) < sizeof name);
  assert_ok(ARENA_TAKE(arena, 1000, &bytes));
  assert_ok(core_arena_commit(arena));
  assert_ok(ARENA_TAKE(arena, 1000, &bytes));
  assert_non_null(bytes);
  core_arena_destroy(arena);
  assert_int_equal(allocated, 1);
  assert_int_equal(released, 1);
  assert_ok(core_arena_create("large", &device, &arena));
  assert_ok(ARENA_TAKE(arena, 200000, &bytes));
  assert_error(core_arena_commit(arena), CORE_ERR_MEMORY, "the device has no 200");
  core_arena_destroy(arena);
  assert_int_equal(released, 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(one_code_path_sizes_and_carves),
      cmocka_unit_test(a_sealed_arena_gives_nothing),
      cmocka_unit_test(more_than_planned_is_refused),
      cmocka_unit_test(impossible_sizes_are_refused),
      cmocka_unit_test(nothing_takes_nothing),
      cmocka_unit_test(rewinding_gives_the_same_memory_again),
      cmocka_unit_test(fresh_memory_shows_in_debug_builds),
      cmocka_unit_test(red_zones_lie_between_blocks),
      cmocka_unit_test(device_memory_comes_from_the_device),
  };
  return cmocka_run_group_tests_name("core/arena", tests, NULL, NULL);
}
