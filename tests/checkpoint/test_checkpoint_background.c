/* Saves in the background: what is stored is the state of its step, however slow the writing; it gives way to
 * training; a slow part does not use up the deadline of the other ranks. 1 to 3 ranks. */
#include "ckpt_fixture.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/file.h"

#define ALL all_specs, all_specs_count

enum { THREADS = 3 };

typedef struct watched {
  double delay;          /* seconds that every write and read of a rank's file takes */
  atomic_llong released; /* the files of later steps do not get on */
  atomic_llong latest;   /* step whose file was touched last */
  atomic_int operations, given_way, backward;
  int nice;    /* of the main thread */
  int threads; /* of this process that have given way, at most, while a block is written */
} watched;

/* Threads of this process that have the priority of a save's threads. */
static int count_threads(int nice) {
  int count = 0;
  DIR *stream = opendir("/proc/self/task");
  assert_non_null(stream);
  for (const struct dirent *e = readdir(stream); e != NULL; e = readdir(stream))
    if (atoi(e->d_name) > 0 && getpriority(PRIO_PROCESS, (id_t)atoi(e->d_name)) == nice) count++;
  closedir(stream);
  return count;
}

static void watch(void *context, const core_file_event *event) {
  watched *w = context;
  if (strstr(event->path, "/rank-") == NULL) return;
  if (event->kind != CORE_FILE_WRITE && event->kind != CORE_FILE_READ) return;
  long long step = strtoll(strstr(event->path, "/step-") + strlen("/step-"), NULL, 10);
  if (atomic_exchange(&w->latest, step) > step) atomic_fetch_add(&w->backward, 1);
  if (w->delay > 0) core_clock_sleep(w->delay);
  while (step > atomic_load(&w->released)) core_clock_sleep(0.001);
  if (getpriority(PRIO_PROCESS, 0) == w->nice + CKPT_NICE) atomic_fetch_add(&w->given_way, 1);
  if (atomic_fetch_add(&w->operations, 1) == 0) w->threads = count_threads(w->nice + CKPT_NICE);
}

static ckpt_writer *open_writer(const fixture *f, const char *directory, const layout *l, int32_t buffers) {
  const ckpt_options options = {.directory = directory, .keep = 100, .threads = THREADS, .buffers = buffers};
  ckpt_writer *writer;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l->tensor, l->count, &writer));
  return writer;
}

static void expect_generation(const fixture *f, const char *directory, int64_t step, uint64_t generation) {
  char path[CKPT_PATH + 32];
  ckpt_reader *reader;
  layout full = layout_full(ALL);
  snprintf(path, sizeof path, "%s/step-%08lld", directory, (long long)step);
  EXPECT_OK(ckpt_reader_open(f->control, path, &reader));
  EXPECT_OK(ckpt_reader_load(reader, full.tensor, full.count));
  assert_null(layout_difference(&full, ALL, generation));
  ckpt_reader_close(reader);
  layout_free(&full);
}

/* Every step changes all data and every second one is saved, while a save does not end before the next one is
 * due: it is the next save that waits. */
static void a_slow_writer_stores_the_state_of_each_step(void **state) {
  enum { STEPS = 6, EVERY = 2 };
  const fixture *f = *state;
  char directory[CKPT_PATH];
  watched w = {.delay = 0.01};
  fixture_directory(f, "slow", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  ckpt_writer *writer = open_writer(f, directory, &l, 1);
  core_file_observe(watch, &w);
  for (int64_t step = 1; step <= STEPS; step++) {
    layout_fill(&l, ALL, (uint64_t)step);
    if (step % EVERY != 0) continue;
    if (step > EVERY) assert_false(ckpt_writer_ready(writer));
    atomic_store(&w.released, step - EVERY);
    EXPECT_OK(ckpt_writer_begin(writer, step, "{}"));
    assert_true(ckpt_writer_busy(writer));
    assert_false(ckpt_writer_ready(writer));
  }
  layout_fill(&l, ALL, STEPS + 1);
  atomic_store(&w.released, STEPS);
  EXPECT_OK(ckpt_writer_commit(writer));
  core_file_observe(NULL, NULL);
  ckpt_writer_destroy(writer);
  layout_free(&l);
  for (int64_t step = EVERY; step <= STEPS; step += EVERY)
    expect_generation(f, directory, step, (uint64_t)step);
}

static void begin(ckpt_writer *writer, const layout *l, int64_t step) {
  layout_fill(l, ALL, (uint64_t)step);
  EXPECT_OK(ckpt_writer_begin(writer, step, "{}"));
  layout_fill(l, ALL, (uint64_t)step + 1);
}

static void expect_names(const fixture *f, const char *directory, const char *expected) {
  char names[1024];
  EXPECT_OK(comm_barrier(f->control)); /* rank 0 works alone there */
  list_names(directory, names, sizeof names);
  assert_string_equal(names, expected);
  EXPECT_OK(comm_barrier(f->control));
}

/* With a second copy a save begins while the one before has not written a byte, behind which it is written; a
 * third waits for a copy. */
static void two_saves_are_in_flight_and_a_third_waits(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  watched w = {.delay = 0.002};
  fixture_directory(f, "flight", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  ckpt_writer *writer = open_writer(f, directory, &l, 2);
  assert_int_equal(ckpt_writer_oldest(writer), -1);
  core_file_observe(watch, &w);
  begin(writer, &l, 2);
  assert_false(ckpt_writer_full(writer));
  begin(writer, &l, 4);
  assert_true(ckpt_writer_full(writer));
  assert_int_equal(ckpt_writer_oldest(writer), 2);
  assert_false(ckpt_writer_ready(writer));
  expect_names(f, directory, "step-00000002.tmp step-00000004.tmp");
  atomic_store(&w.released, 2);
  begin(writer, &l, 6);
  assert_int_equal(ckpt_writer_oldest(writer), 4);
  assert_false(ckpt_writer_ready(writer));
  expect_names(f, directory, "step-00000002 step-00000004.tmp step-00000006.tmp");
  atomic_store(&w.released, 6);
  EXPECT_OK(ckpt_writer_commit(writer));
  expect_names(f, directory, "step-00000002 step-00000004 step-00000006.tmp");
  EXPECT_OK(ckpt_writer_commit(writer));
  assert_false(ckpt_writer_busy(writer));
  core_file_observe(NULL, NULL);
  assert_int_equal(w.backward, 0);
  ckpt_writer_destroy(writer);
  layout_free(&l);
  for (int64_t step = 2; step <= 6; step += 2) expect_generation(f, directory, step, (uint64_t)step);
}

/* One rank's disk refuses the first of two: all ranks are told, and the second is published all the same. */
static void a_save_that_fails_leaves_the_one_behind_it(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "behind", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  ckpt_writer *writer = open_writer(f, directory, &l, 2);
  ckpt_writer_hold_priv(writer, true);
  begin(writer, &l, 2);
  begin(writer, &l, 4);
  if (f->rank == f->ranks - 1)
    core_file_inject(&(core_file_fault){.at = 2, .error = ENOSPC, .containing = "step-00000002.tmp/rank-"});
  ckpt_writer_hold_priv(writer, false);
  assert_int_equal(ckpt_writer_commit(writer), CORE_ERR_IO);
  assert_non_null(strstr(core_error_get()->message, "No space left"));
  core_file_inject(NULL);
  expect_names(f, directory, "step-00000004.tmp");
  EXPECT_OK(ckpt_writer_commit(writer));
  expect_names(f, directory, "step-00000004");
  ckpt_writer_destroy(writer);
  layout_free(&l);
  expect_generation(f, directory, 4, 4);
}

static void the_threads_of_a_save_give_way(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  watched w = {.released = LLONG_MAX, .nice = getpriority(PRIO_PROCESS, 0)};
  if (w.nice + CKPT_NICE > 19) w.nice = 19 - CKPT_NICE; /* there is nothing lower */
  fixture_directory(f, "gives-way", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  layout_fill(&l, ALL, 1);
  ckpt_writer *writer = open_writer(f, directory, &l, 1);
  int before = getpriority(PRIO_PROCESS, 0);
  core_file_observe(watch, &w);
  EXPECT_OK(ckpt_writer_begin(writer, 1, "{}"));
  EXPECT_OK(ckpt_writer_commit(writer));
  core_file_observe(NULL, NULL);
  assert_true(w.operations > 0);
  assert_int_equal(w.given_way, w.operations);
  assert_in_range(w.threads, 1, 1 + THREADS);
  if (f->ranks == 1) assert_int_equal(w.threads, 1 + THREADS); /* enough blocks to keep them there */
  assert_int_equal(getpriority(PRIO_PROCESS, 0), before);
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* Rank 0 writes everything, and takes longer than any wait may: the others wait with it, since it gets on. */
static void a_slow_part_does_not_use_up_the_deadline(void **state) {
  const fixture *f = *state;
  const double deadline = 3;
  char directory[CKPT_PATH];
  watched w = {.delay = 0.25, .released = LLONG_MAX};
  fixture_directory(f, "deadline", directory);
  layout l = f->rank == 0 ? layout_make(ALL, 1, 0, 0, 1) : (layout){NULL, 0};
  layout_fill(&l, ALL, 5);
  ckpt_writer *writer = open_writer(f, directory, &l, 1);
  EXPECT_OK(comm_configure(f->world, &(comm_options){.deadline = deadline}));
  if (f->rank == 0) core_file_observe(watch, &w);
  double start = core_clock_now();
  EXPECT_OK(ckpt_writer_begin(writer, 1, "{}"));
  EXPECT_OK(ckpt_writer_commit(writer));
  double seconds = core_clock_now() - start;
  core_file_observe(NULL, NULL);
  EXPECT_OK(comm_configure(f->world, &(comm_options){.deadline = 60}));
  assert_true(seconds > deadline);
  expect_generation(f, directory, 1, 5);
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* ---- a device whose memory the CPU cannot read: it holds every byte inverted ---- */

static int staged, copies, waits; /* calls of host_allocate, copy_later, stream_wait */

static core_status device_allocate(size_t bytes, void **out) {
  *out = malloc(bytes);
  return *out == NULL ? CORE_ERR_MEMORY : CORE_OK;
}

static core_status device_host_allocate(size_t bytes, void **out) {
  staged++;
  return device_allocate(bytes, out);
}

static core_status device_copy(void *target, const void *source, size_t bytes, core_stream *stream) {
  (void)stream;
  for (size_t i = 0; i < bytes; i++) ((uint8_t *)target)[i] = (uint8_t) ~((const uint8_t *)source)[i];
  return CORE_OK;
}

static core_status device_copy_later(void *target, const void *source, size_t bytes, core_stream *stream) {
  copies++;
  return device_copy(target, source, bytes, stream);
}

static core_status device_wait(core_stream *stream) {
  waits += stream == NULL;
  return CORE_OK;
}

static const core_device device = {.kind = CORE_DEVICE_CUDA,
                                   .name = "inverting",
                                   .allocate = device_allocate,
                                   .release = free,
                                   .host_allocate = device_host_allocate,
                                   .host_release = free,
                                   .copy = device_copy,
                                   .copy_later = device_copy_later,
                                   .stream_wait = device_wait};

static void invert(const layout *l) {
  for (int32_t t = 0; t < l->count; t++) {
    size_t bytes = (size_t)l->tensor[t].count * core_dtype_size(l->tensor[t].dtype);
    (void)device_copy(l->tensor[t].data, l->tensor[t].data, bytes, NULL);
    l->tensor[t].device = &device;
  }
}

/* The copy goes to memory of the device's own kind (page-locked), one behind the other, with one wait. */
static void tensors_of_a_device_are_copied_at_full_speed(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  ckpt_reader *reader;
  fixture_directory(f, "device", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  layout_fill(&l, ALL, 4);
  invert(&l);
  staged = copies = waits = 0;
  ckpt_writer *writer = open_writer(f, directory, &l, 1);
  assert_int_equal(staged, 1);
  EXPECT_OK(ckpt_writer_begin(writer, 1, "{}"));
  int32_t ranges = 0;
  for (int32_t t = 0; t < l.count; t++) ranges += l.tensor[t].count > 0;
  assert_int_equal(copies, ranges);
  assert_int_equal(waits, 1);
  EXPECT_OK(ckpt_writer_commit(writer));
  ckpt_writer_destroy(writer);
  expect_generation(f, directory, 1, 4);
  for (int32_t t = 0; t < l.count; t++)
    memset(l.tensor[t].data, 0xa5, (size_t)l.tensor[t].count * core_dtype_size(l.tensor[t].dtype));
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  EXPECT_OK(ckpt_reader_threads(reader, 2));
  EXPECT_OK(ckpt_reader_load(reader, l.tensor, l.count));
  ckpt_reader_close(reader);
  invert(&l);
  assert_null(layout_difference(&l, ALL, 4));
  layout_free(&l);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_slow_writer_stores_the_state_of_each_step),
      cmocka_unit_test(two_saves_are_in_flight_and_a_third_waits),
      cmocka_unit_test(a_save_that_fails_leaves_the_one_behind_it),
      cmocka_unit_test(the_threads_of_a_save_give_way),
      cmocka_unit_test(a_slow_part_does_not_use_up_the_deadline),
      cmocka_unit_test(tensors_of_a_device_are_copied_at_full_speed),
  };
  return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
