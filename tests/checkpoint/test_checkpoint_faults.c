/* Crashes and failures at every single file operation of a save: begin, commit and retention. Whatever
 * happens, the next process finds a sound checkpoint that is not older than the last one published. */
#include "ckpt_scene.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"

enum { MOST = 400 };

/* In a child: saves with an exit at the n-th operation. Returns true when the child died of it. */
static bool crash_at(const fixture *f, const char *directory, const scene *s, int64_t at) {
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    layout l;
    ckpt_writer *writer;
    core_file_inject(&(core_file_fault){.at = at});
    scene_open(f, directory, s, &l, &writer);
    EXPECT_OK(save_step(f, writer, &l, TINY, s->step, NEW));
    _exit(0);
  }
  return child_crashed(child);
}

static void crash_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  for (int i = 0; i < SCENES; i++) {
    int64_t at = 1;
    fixture_directory(f, scenes[i].name, directory);
    for (bool crashed = true; crashed; at += SCENE_STRIDE) {
      assert_true(at < MOST);
      scene_set(f, directory, &scenes[i]);
      crashed = crash_at(f, directory, &scenes[i], at);
      scene_expect_recovery(f, directory, &scenes[i], 20, OLD);
    }
    assert_true(at >
                15); /* a save has at least so many operations; fewer would mean that none was injected */
  }
}

/* In whatever order the system lists the files, the manifest is the first to go. */
static void removal_begins_with_the_manifest(void **state) {
  const fixture *f = *state;
  char path[CKPT_PATH], file[CKPT_PATH + 32];
  fixture_directory(f, "step-00000001", path);
  EXPECT_OK(core_file_make_directory(path));
  for (int i = 0; i < 21; i++) {
    snprintf(file, sizeof file, "%s/rank-%05d.ckpt", path, i);
    if (i == 10) snprintf(file, sizeof file, "%s/manifest.json", path);
    spit(file, "x", 1);
  }
  pid_t child = fork();
  if (child == 0) {
    core_file_inject(&(core_file_fault){.at = 2});
    _exit(ckpt_remove(path) == CORE_OK ? 0 : 1);
  }
  assert_true(child_crashed(child));
  snprintf(file, sizeof file, "%s/manifest.json", path);
  assert_false(core_file_exists(file));
  snprintf(file, sizeof file, "%s/rank-00000.ckpt", path);
  assert_true(core_file_exists(file));
  EXPECT_OK(ckpt_remove(path));
  assert_false(core_file_exists(path));
}

/* A crash while the next run cleans up after a crash. */
static void crash_while_cleaning(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  const scene *s = &scenes[2];
  fixture_directory(f, "cleaning", directory);
  for (int64_t first = 12; first < 24; first++) {
    for (int64_t second = 1; second < 8; second++) {
      scene_set(f, directory, s);
      (void)crash_at(f, directory, s, first);
      (void)crash_at(f, directory, s, second);
      scene_expect_recovery(f, directory, s, 20, OLD);
    }
  }
}

/* ---- errors: the same process goes on ---- */

/* Returns false when the save had fewer operations. */
static bool fail_at(const fixture *f, const char *directory, const scene *s, const core_file_fault *fault) {
  layout l;
  ckpt_writer *writer;
  char names[512];
  scene_set(f, directory, s);
  scene_open(f, directory, s, &l, &writer);
  core_file_inject(fault);
  core_status status = save_step(f, writer, &l, TINY, s->step, NEW);
  bool reached = core_file_operations() >= fault->at;
  core_file_inject(NULL);
  assert_false(ckpt_writer_busy(writer));
  if (status != CORE_OK) {
    assert_true(reached);
    assert_int_equal(status, CORE_ERR_IO);
    assert_non_null(strstr(core_error_get()->message, strerror(fault->error)));
    assert_non_null(strstr(core_error_get()->message, directory));
  }
  int64_t newest = load_newest(f, directory, TINY, OLD, NEW);
  assert_true(newest >= 20);
  if (status == CORE_OK && s->step >= 20) assert_int_equal(newest, s->step);
  list_names(directory, names, sizeof names);
  if (!fault->sticky && status != CORE_OK) assert_null(strstr(names, ".tmp"));
  EXPECT_OK(save_step(f, writer, &l, TINY, 40, OLD + 40)); /* the same writer is usable */
  assert_int_equal(load_newest(f, directory, TINY, OLD + 40, OLD + 40), 40);
  list_names(directory, names, sizeof names);
  assert_null(strstr(names, ".tmp"));
  assert_null(strstr(names, ".old"));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  return reached;
}

static void fail_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "errors", directory);
  const core_file_fault kinds[] = {
      {.error = ENOSPC}, {.error = EDQUOT}, {.error = EIO}, {.error = EIO, .sticky = 1}, {.error = EACCES}};
  for (int i = 0; i < SCENES; i++) {
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
      core_file_fault fault = kinds[kind];
      for (fault.at = 1; fail_at(f, directory, &scenes[i], &fault); fault.at += SCENE_STRIDE)
        assert_true(fault.at < MOST);
      assert_true(fault.at > 15);
    }
  }
}

/* A full disk for good: every save fails, nothing piles up, the old one stays. */
static void full_disk(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], names[512];
  layout l;
  ckpt_writer *writer;
  fixture_directory(f, "full", directory);
  scene_set(f, directory, &scenes[0]);
  scene_open(f, directory, &scenes[0], &l, &writer);
  for (int64_t step = 30; step < 34; step++) {
    core_file_fault fault = {.at = 2, .error = ENOSPC, .containing = "rank-"};
    core_file_inject(&fault);
    core_status status = save_step(f, writer, &l, TINY, step, NEW);
    core_file_inject(NULL);
    assert_int_equal(status, CORE_ERR_IO);
    assert_non_null(strstr(core_error_get()->message, "No space left"));
    list_names(directory, names, sizeof names);
    assert_string_equal(names, "step-00000010 step-00000020");
  }
  assert_int_equal(load_newest(f, directory, TINY, OLD, OLD), 20);
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* A disk that keeps other bytes than it was given: one is inverted when the file is synced. */
static void invert_a_byte(void *context, const core_file_event *event) {
  int *inverted = context;
  uint8_t byte;
  if (event->kind != CORE_FILE_SYNC || strstr(event->path, "rank-00000") == NULL) return;
  assert_int_equal(pread(event->fd, &byte, 1, 100), 1);
  byte ^= 8;
  assert_int_equal(pwrite(event->fd, &byte, 1, 100), 1);
  ++*inverted;
}

/* Reading back finds it, and nothing older goes on the strength of such a save. */
static void what_reads_back_otherwise_is_no_checkpoint(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  for (int i = 0; i < SCENES; i++) {
    layout l;
    ckpt_writer *writer;
    int inverted = 0;
    fixture_directory(f, scenes[i].name, directory);
    scene_set(f, directory, &scenes[i]);
    scene_open(f, directory, &scenes[i], &l, &writer);
    core_file_observe(invert_a_byte, &inverted);
    assert_int_equal(save_step(f, writer, &l, TINY, scenes[i].step, NEW), CORE_ERR_CORRUPT);
    core_file_observe(NULL, NULL);
    assert_int_equal(inverted, 1);
    assert_non_null(strstr(core_error_get()->message, "reads back otherwise"));
    ckpt_writer_destroy(writer);
    layout_free(&l);
    scene_expect_recovery(f, directory, &scenes[i], 20, OLD);
  }
}

/* Reading fails once, at every operation: the newest one is taken all the same. Loading may give the error.
 */
static void reading_fails_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "reading", directory);
  scene_set(f, directory, &scenes[0]);
  layout full = layout_full(TINY);
  int64_t at = 0;
  for (bool reached = true; reached;) {
    ckpt_reader *reader;
    core_file_inject(&(core_file_fault){.at = ++at, .error = EIO});
    core_status status = ckpt_reader_newest(f->control, directory, 1, &reader);
    if (status == CORE_OK && reader != NULL) {
      int64_t step = ckpt_reader_step(reader);
      status = ckpt_reader_load(reader, full.tensor, full.count);
      assert_int_equal(step, 20);
      if (status == CORE_OK) {
        assert_null(layout_difference(&full, TINY, OLD));
      } else {
        assert_int_equal(status, CORE_ERR_IO);
      }
    }
    reached = core_file_operations() >= at;
    ckpt_reader_close(reader);
  }
  core_file_inject(NULL);
  assert_true(at > 10);
  layout_free(&full);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(crash_at_every_operation),
      cmocka_unit_test(crash_while_cleaning),
      cmocka_unit_test(removal_begins_with_the_manifest),
      cmocka_unit_test(fail_at_every_operation),
      cmocka_unit_test(full_disk),
      cmocka_unit_test(what_reads_back_otherwise_is_no_checkpoint),
      cmocka_unit_test(reading_fails_at_every_operation),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
