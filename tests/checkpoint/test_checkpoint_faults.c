/* Crashes and failures at every single file operation of a save: begin, commit and retention. Whatever
 * happens, the next process finds a sound checkpoint that is not older than the last one published. */
#include "ckpt_fixture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/file.h"

#define TINY tiny_specs, tiny_specs_count

enum { CRASHED = 137, MOST = 400 };

/* What is published before (steps 10 and 20, or 20 alone), and the save that is disturbed. */
typedef struct scene {
  const char *name;
  bool ten;
  int32_t keep;
  int64_t step;
} scene;

static const scene scenes[] = {
    {"next", true, 2, 30},  /* retention removes 10 */
    {"only", false, 1, 30}, /* retention removes 20; what was written is read back */
    {"again", true, 2, 20}, /* 20 is replaced */
    {"only-again", false, 1, 20}, {"back", true, 2, 15}, /* behind the newest, as after going back */
};
enum { SCENES = sizeof scenes / sizeof *scenes, OLD = 100, NEW = 200 };

static void open_writer(const fixture *f, const char *directory, const scene *s, layout *l,
                        ckpt_writer **writer) {
  const ckpt_options options = {.directory = directory, .keep = s->keep};
  *l = layout_make(TINY, 0, 0, 0, 1);
  EXPECT_OK(ckpt_writer_create(f->control, &options, l->tensor, l->count, writer));
}

static void set_scene(const fixture *f, const char *directory, const scene *s) {
  layout l;
  ckpt_writer *writer;
  remove_tree(directory);
  open_writer(f, directory, s, &l, &writer);
  if (s->ten) EXPECT_OK(save_step(f, writer, &l, TINY, 10, OLD - 10));
  EXPECT_OK(save_step(f, writer, &l, TINY, 20, OLD));
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* Whatever still has a manifest is whole: removal must begin with it. */
static void expect_marked_are_sound(const char *directory) {
  ckpt_place *place;
  int32_t count;
  char path[CKPT_PATH];
  EXPECT_OK(ckpt_places(directory, &place, &count));
  for (int32_t i = 0; i < count; i++) {
    if (!place[i].manifest) continue;
    EXPECT_OK(ckpt_place_path(directory, place[i].step, (ckpt_place_kind)place[i].kind, path));
    EXPECT_OK(ckpt_verify(path, NULL));
  }
  free(place);
}

/* A new run over what the disturbed one left: sound, not older, and nothing stays lying about after the next
 * save. */
static void expect_recovery(const fixture *f, const char *directory, const scene *s) {
  layout l;
  ckpt_writer *writer;
  char names[512];
  expect_marked_are_sound(directory);
  int64_t step = load_newest(f, directory, TINY, OLD, NEW);
  if (step < 20) fail_msg("step %lld is older than the last one published", (long long)step);
  open_writer(f, directory, s, &l, &writer);
  step = load_newest(f, directory, TINY, OLD, NEW);
  if (step < 20) fail_msg("after cleaning up, step %lld is the newest", (long long)step);
  EXPECT_OK(save_step(f, writer, &l, TINY, 40, OLD + 40));
  assert_int_equal(load_newest(f, directory, TINY, OLD + 40, OLD + 40), 40);
  list_names(directory, names, sizeof names);
  assert_null(strstr(names, ".tmp"));
  assert_null(strstr(names, ".old"));
  for (const char *at = names; (at = strstr(at, "step-")) != NULL; at += 5) {
    char path[2 * CKPT_PATH];
    snprintf(path, sizeof path, "%s/%.13s", directory, at);
    assert_true(ckpt_is(path));
  }
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* In a child: saves with an exit at the n-th operation. Returns true when the child died of it. */
static bool crash_at(const fixture *f, const char *directory, const scene *s, int64_t at) {
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    layout l;
    ckpt_writer *writer;
    core_file_inject(&(core_file_fault){.at = at});
    open_writer(f, directory, s, &l, &writer);
    EXPECT_OK(save_step(f, writer, &l, TINY, s->step, NEW));
    _exit(0);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  if (WEXITSTATUS(status) != 0) assert_int_equal(WEXITSTATUS(status), CRASHED);
  return WEXITSTATUS(status) == CRASHED;
}

static void crash_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  for (int i = 0; i < SCENES; i++) {
    int64_t at = 1;
    fixture_directory(f, scenes[i].name, directory);
    for (bool crashed = true; crashed; at++) {
      assert_true(at < MOST);
      set_scene(f, directory, &scenes[i]);
      crashed = crash_at(f, directory, &scenes[i], at);
      expect_recovery(f, directory, &scenes[i]);
    }
    assert_true(at >
                15); /* a save has at least so many operations; fewer would mean that none was injected */
  }
}

/* In whatever order the system lists the files, the manifest is the first to go. */
static void removal_begins_with_the_manifest(void **state) {
  const fixture *f = *state;
  char path[CKPT_PATH], file[CKPT_PATH + 32];
  int status;
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
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(WEXITSTATUS(status), CRASHED);
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
      set_scene(f, directory, s);
      (void)crash_at(f, directory, s, first);
      (void)crash_at(f, directory, s, second);
      expect_recovery(f, directory, s);
    }
  }
}

/* ---- errors: the same process goes on ---- */

/* Returns false when the save had fewer operations. */
static bool fail_at(const fixture *f, const char *directory, const scene *s, const core_file_fault *fault) {
  layout l;
  ckpt_writer *writer;
  char names[512];
  set_scene(f, directory, s);
  open_writer(f, directory, s, &l, &writer);
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
      {.error = ENOSPC}, {.error = EIO}, {.error = EIO, .sticky = 1}, {.error = EACCES}};
  for (int i = 0; i < SCENES; i++) {
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
      core_file_fault fault = kinds[kind];
      for (fault.at = 1; fail_at(f, directory, &scenes[i], &fault); fault.at++) assert_true(fault.at < MOST);
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
  set_scene(f, directory, &scenes[0]);
  open_writer(f, directory, &scenes[0], &l, &writer);
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

/* Reading fails at every operation: an error or the next older one, never a crash or wrong data. */
static void reading_fails_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "reading", directory);
  set_scene(f, directory, &scenes[0]);
  layout full = layout_full(TINY);
  int64_t at = 0;
  for (bool reached = true; reached;) {
    ckpt_reader *reader;
    core_file_inject(&(core_file_fault){.at = ++at, .error = EIO});
    core_status status = ckpt_reader_newest(f->control, directory, &reader);
    if (status == CORE_OK && reader != NULL) {
      int64_t step = ckpt_reader_step(reader);
      status = ckpt_reader_load(reader, full.tensor, full.count);
      if (status == CORE_OK) {
        assert_null(layout_difference(&full, TINY, step == 20 ? OLD : OLD - 10));
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
      cmocka_unit_test(reading_fails_at_every_operation),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
