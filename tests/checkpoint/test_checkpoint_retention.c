/* Which checkpoints are kept, what is cleaned up, and that saving does not touch the data it left behind:
 * asynchronous saves store the moment of their begin. */
#include "ckpt_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/file.h"

#define TINY tiny_specs, tiny_specs_count

typedef struct run {
  const fixture *f;
  layout l;
  ckpt_writer *writer;
  char directory[CKPT_PATH];
} run;

static run run_make(const fixture *f, const char *name, ckpt_options options) {
  run r = {.f = f, .l = layout_make(TINY, 0, 0, 0, 1)};
  fixture_directory(f, name, r.directory);
  options.directory = r.directory;
  EXPECT_OK(ckpt_writer_create(f->control, &options, r.l.tensor, r.l.count, &r.writer));
  return r;
}

static run run_open(const fixture *f, const char *name, int32_t keep, int64_t keep_every) {
  return run_make(f, name, (ckpt_options){.keep = keep, .keep_every = keep_every});
}

static void run_close(run *r) {
  ckpt_writer_destroy(r->writer);
  layout_free(&r->l);
}

static void run_save(run *r, int64_t step) {
  EXPECT_OK(save_step(r->f, r->writer, &r->l, TINY, step, (uint64_t)step));
}

static void expect_names(const run *r, const char *expected) {
  char names[1024];
  list_names(r->directory, names, sizeof names);
  assert_string_equal(names, expected);
}

static void damage(const run *r, const char *file) {
  char path[2 * CKPT_PATH];
  size_t count;
  snprintf(path, sizeof path, "%s/%s", r->directory, file);
  char *bytes = slurp(path, &count);
  bytes[count / 2] ^= 4;
  spit(path, bytes, count);
  free(bytes);
}

static void newest_are_kept(void **state) {
  run r = run_open(*state, "newest", 2, 0);
  for (int64_t step = 1; step <= 5; step++) run_save(&r, step);
  expect_names(&r, "step-00000004 step-00000005");
  run_close(&r);
}

static void every_so_many_are_kept(void **state) {
  run r = run_open(*state, "every", 1, 10);
  for (int64_t step = 5; step <= 35; step += 5) run_save(&r, step);
  expect_names(&r, "step-00000010 step-00000020 step-00000030 step-00000035");
  run_close(&r);
}

/* A save that was delayed by the one before it counts for the multiple that it missed. */
static void late_saves_are_kept_too(void **state) {
  static const int64_t steps[] = {5, 12, 15, 23, 27, 38, 40};
  run r = run_open(*state, "late", 1, 10);
  for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) run_save(&r, steps[i]);
  expect_names(&r, "step-00000012 step-00000023 step-00000038 step-00000040");
  run_close(&r);
}

/* The best one stays, under its name as well; a step that is to become it stays before it has the name. */
static void the_best_is_kept(void **state) {
  char best[2 * CKPT_PATH];
  ckpt_reader *reader;
  run r = run_open(*state, "best", 1, 0);
  snprintf(best, sizeof best, "%s/" CKPT_BEST, r.directory);
  EXPECT_OK(ckpt_mark_best(r.directory, 1)); /* not published: nothing happens */
  assert_int_not_equal(access(best, F_OK), 0);
  run_save(&r, 1);
  EXPECT_OK(ckpt_mark_best(r.directory, 1));
  for (int64_t step = 2; step <= 4; step++) run_save(&r, step);
  expect_names(&r, CKPT_BEST " step-00000001 step-00000004");
  EXPECT_OK(ckpt_reader_open(r.f->control, best, &reader));
  assert_int_equal(ckpt_reader_step(reader), 1);
  ckpt_reader_close(reader);
  ckpt_writer_spare(r.writer, 4);
  run_save(&r, 5);
  expect_names(&r, CKPT_BEST " step-00000001 step-00000004 step-00000005");
  EXPECT_OK(ckpt_mark_best(r.directory, 4));
  run_save(&r, 6);
  expect_names(&r, CKPT_BEST " step-00000004 step-00000006");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 6, 6), 6);
  run_close(&r);
}

/* After going back past a damaged checkpoint, the damaged one must not push out the good one just written. */
static void damaged_later_one_does_not_count(void **state) {
  run r = run_open(*state, "later", 1, 0);
  run_save(&r, 30);
  damage(&r, "step-00000030/rank-00000.ckpt");
  run_save(&r, 20);
  expect_names(&r, "step-00000020 step-00000030");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 20, 20), 20);
  run_save(&r, 30); /* the run comes by again and replaces it */
  expect_names(&r, "step-00000030");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 30, 30), 30);
  run_close(&r);
}

static void damaged_manifest_is_passed_over(void **state) {
  run r = run_open(*state, "manifest", 3, 0);
  for (int64_t step = 1; step <= 3; step++) run_save(&r, step);
  damage(&r, "step-00000003/manifest.json");
  damage(&r, "step-00000002/rank-00000.ckpt");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 1, 1), 1);
  run_close(&r);
}

static void make(const run *r, const char *name, const char *file) {
  char path[2 * CKPT_PATH];
  snprintf(path, sizeof path, "%s/%s", r->directory, name);
  EXPECT_OK(core_file_make_directories(path));
  if (file == NULL) return;
  snprintf(path, sizeof path, "%s/%s/%s", r->directory, name, file);
  spit(path, "x", 1);
}

static void leftovers_are_cleaned_and_others_left(void **state) {
  run r = run_open(*state, "leftovers", 3, 0);
  run_save(&r, 7);
  run_close(&r);
  make(&r, "step-00000008.tmp", "rank-00000.ckpt");
  make(&r, "step-00000006", "rank-00003.ckpt"); /* its manifest went first */
  make(&r, "step-00000005.old", "manifest.json.tmp");
  make(&r, "step-9", NULL); /* names that are not ours */
  make(&r, "step-00000011.bak", "rank-00000.ckpt");
  make(&r, "best", "manifest.json");
  make(&r, "step-00000012.tmp", "notes.txt"); /* a file that is not ours keeps its directory */
  assert_int_equal(load_newest(r.f, r.directory, TINY, 7, 7), 7);
  r = run_open(*state, "leftovers", 3, 0);
  expect_names(&r, "best step-00000007 step-00000011.bak step-00000012.tmp step-9");
  run_close(&r);
}

/* A crash between the two renames of a replacement: the old one is found under either name. */
static void replaced_one_is_found_and_put_back(void **state) {
  char from[2 * CKPT_PATH], to[2 * CKPT_PATH];
  run r = run_open(*state, "replaced", 3, 0);
  run_save(&r, 7);
  run_close(&r);
  snprintf(from, sizeof from, "%s/step-00000007", r.directory);
  snprintf(to, sizeof to, "%s/step-00000007.old", r.directory);
  assert_int_equal(rename(from, to), 0);
  assert_int_equal(load_newest(r.f, r.directory, TINY, 7, 7), 7);
  r = run_open(*state, "replaced", 3, 0);
  expect_names(&r, "step-00000007");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 7, 7), 7);
  run_close(&r);
}

/* ---- asynchronous ---- */

static void data_of_the_begin_is_saved(void **state) {
  run r = run_open(*state, "async", 3, 0);
  layout_fill(&r.l, TINY, 1);
  ckpt_writer_hold_priv(r.writer, true);
  EXPECT_OK(ckpt_writer_begin(r.writer, 1, "{}"));
  layout_fill(&r.l, TINY, 2); /* training goes on */
  core_clock_sleep(0.02);
  assert_true(ckpt_writer_busy(r.writer));
  assert_false(ckpt_writer_ready(r.writer));
  expect_names(&r, "step-00000001.tmp");
  ckpt_writer_hold_priv(r.writer, false);
  while (!ckpt_writer_ready(r.writer)) core_clock_sleep(0.001);
  assert_true(ckpt_writer_busy(r.writer));
  expect_names(&r, "step-00000001.tmp"); /* complete, and yet nothing is published before the commit */
  EXPECT_OK(ckpt_writer_commit(r.writer));
  assert_false(ckpt_writer_busy(r.writer));
  assert_int_equal(load_newest(r.f, r.directory, TINY, 1, 1), 1);
  run_close(&r);
}

static void begin_publishes_the_one_in_progress(void **state) {
  run r = run_open(*state, "twice", 3, 0);
  for (int64_t step = 1; step <= 3; step++) {
    layout_fill(&r.l, TINY, (uint64_t)step);
    EXPECT_OK(ckpt_writer_begin(r.writer, step, "{}"));
  }
  expect_names(&r, "step-00000001 step-00000002 step-00000003.tmp");
  EXPECT_OK(ckpt_writer_commit(r.writer));
  assert_int_equal(load_newest(r.f, r.directory, TINY, 3, 3), 3);
  run_close(&r);
}

/* The unfinished directory of a step belongs to one save at a time, whatever room there is. */
static void begin_of_a_pending_step_publishes_it_first(void **state) {
  run r = run_make(*state, "twins", (ckpt_options){.buffers = 2});
  for (uint64_t generation = 1; generation <= 2; generation++) {
    layout_fill(&r.l, TINY, generation);
    EXPECT_OK(ckpt_writer_begin(r.writer, 5, "{}"));
  }
  expect_names(&r, "step-00000005 step-00000005.tmp");
  EXPECT_OK(ckpt_writer_commit(r.writer));
  expect_names(&r, "step-00000005");
  assert_int_equal(load_newest(r.f, r.directory, TINY, 2, 2), 5);
  run_close(&r);
}

static void destroy_abandons_two(void **state) {
  for (int held = 0; held < 2; held++) {
    run r = run_make(*state, "abandon-two", (ckpt_options){.buffers = 2});
    ckpt_writer_hold_priv(r.writer, held == 1);
    EXPECT_OK(ckpt_writer_begin(r.writer, 5, "{}"));
    EXPECT_OK(ckpt_writer_begin(r.writer, 6, "{}"));
    run_close(&r);
    expect_names(&r, "");
  }
}

static void destroy_abandons(void **state) {
  for (int held = 0; held < 2; held++) {
    run r = run_open(*state, "abandon", 3, 0);
    ckpt_writer_hold_priv(r.writer, held == 1);
    EXPECT_OK(ckpt_writer_begin(r.writer, 5, "{}"));
    run_close(&r);
    expect_names(&r, "");
  }
}

static void figures_and_memory_are_right(void **state) {
  run r = run_open(*state, "figures", 3, 0);
  ckpt_figures figures;
  int64_t raw = 0, bytes;
  char path[2 * CKPT_PATH];
  run_save(&r, 1);
  for (int32_t i = 0; i < r.l.count; i++)
    raw += r.l.tensor[i].count * (int64_t)core_dtype_size(r.l.tensor[i].dtype);
  snprintf(path, sizeof path, "%s/step-00000001/rank-00000.ckpt", r.directory);
  EXPECT_OK(core_file_size(path, &bytes));
  ckpt_writer_figures(r.writer, &figures);
  assert_int_equal(figures.raw_bytes, raw);
  assert_int_equal(figures.stored_bytes, bytes);
  assert_true(figures.stall_seconds > 0 && figures.write_seconds > 0);
  int64_t scratch = CKPT_BLOCK_BYTES + 2 * CKPT_STORED_BYTES; /* one compressor */
  assert_in_range(ckpt_writer_bytes(r.writer), raw + scratch, raw + scratch + 64 * 1024);
  int64_t one = ckpt_writer_bytes(r.writer);
  run_close(&r);
  r = run_make(*state, "figures", (ckpt_options){.buffers = 2}); /* a copy more, and what lists its blocks */
  assert_in_range(ckpt_writer_bytes(r.writer), one + raw, one + raw + 16 * 1024);
  run_close(&r);
}

/* Compressing on more threads gives the same file, byte for byte. */
static void threads_do_not_change_the_file(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], path[2 * CKPT_PATH], *first = NULL;
  size_t first_count = 0;
  layout l = layout_make(all_specs, all_specs_count, 1, 0, 0, 1);
  for (int32_t threads = 1; threads <= 5; threads += 2) {
    fixture_directory(f, threads == 1 ? "threads1" : threads == 3 ? "threads3" : "threads5", directory);
    const ckpt_options options = {.directory = directory, .threads = threads};
    ckpt_writer *writer;
    EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
    EXPECT_OK(save_step(f, writer, &l, all_specs, all_specs_count, 1, 3));
    ckpt_writer_destroy(writer);
    snprintf(path, sizeof path, "%s/step-00000001/rank-00000.ckpt", directory);
    size_t count;
    char *bytes = slurp(path, &count);
    if (first == NULL) {
      first = bytes;
      first_count = count;
      continue;
    }
    assert_int_equal(count, first_count);
    assert_memory_equal(bytes, first, count);
    free(bytes);
  }
  free(first);
  layout_free(&l);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(newest_are_kept),
      cmocka_unit_test(every_so_many_are_kept),
      cmocka_unit_test(late_saves_are_kept_too),
      cmocka_unit_test(the_best_is_kept),
      cmocka_unit_test(damaged_later_one_does_not_count),
      cmocka_unit_test(damaged_manifest_is_passed_over),
      cmocka_unit_test(leftovers_are_cleaned_and_others_left),
      cmocka_unit_test(replaced_one_is_found_and_put_back),
      cmocka_unit_test(data_of_the_begin_is_saved),
      cmocka_unit_test(begin_publishes_the_one_in_progress),
      cmocka_unit_test(begin_of_a_pending_step_publishes_it_first),
      cmocka_unit_test(destroy_abandons),
      cmocka_unit_test(destroy_abandons_two),
      cmocka_unit_test(figures_and_memory_are_right),
      cmocka_unit_test(threads_do_not_change_the_file),
  };
  return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
