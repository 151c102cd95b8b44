/* Two saves pending at once: a crash, a failure or a power cut at every file operation from the begin of the
 * first to the commit of the second. What is found is sound, of the state of its step, and never older than
 * the last one whose commit has returned; a save that fails does not take the one behind it with it. */
#include "ckpt_disk.h"
#include "ckpt_scene.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/file.h"

enum { MOST = 400, FIRST = 30, SECOND = 40, STEPS = 2 };

/* Steps 10 and 20 are there; retention keeps two, so that publishing 30 removes 10 while 40 is written. */
static const scene before = {"pair", true, 2, SECOND};

typedef struct pair {
  layout l;
  ckpt_writer *writer;
} pair;

static pair pair_open(const fixture *f, const char *directory) {
  const ckpt_options options = {.directory = directory, .keep = before.keep, .buffers = 2};
  pair p = {.l = layout_make(TINY, 0, 0, 0, 1)};
  EXPECT_OK(ckpt_writer_create(f->control, &options, p.l.tensor, p.l.count, &p.writer));
  return p;
}

static void pair_close(pair *p) {
  ckpt_writer_destroy(p->writer);
  layout_free(&p->l);
}

/* What is saved as a step; 20 is of OLD, as the scene has it. */
static uint64_t generation_of(int64_t step) {
  return step == 20 ? OLD : NEW + (uint64_t)step;
}

/* Begins both, the second before the first is written, and commits both. The step of a commit that has
 * returned well goes to *published; what each said, to status[STEPS]. A begin that fails is the status of
 * its step. */
static void pair_save(const pair *p, volatile int64_t *published, core_status status[STEPS]) {
  const int64_t step[STEPS] = {FIRST, SECOND};
  ckpt_writer_hold_priv(p->writer, true);
  for (int i = 0; i < STEPS; i++) {
    layout_fill(&p->l, TINY, generation_of(step[i]));
    status[i] = ckpt_writer_begin(p->writer, step[i], "{}");
  }
  layout_fill(&p->l, TINY, 1); /* training goes on */
  ckpt_writer_hold_priv(p->writer, false);
  for (int i = 0; i < STEPS; i++) {
    if (status[i] != CORE_OK) continue;
    assert_int_equal(ckpt_writer_oldest(p->writer), step[i]);
    status[i] = ckpt_writer_commit(p->writer);
    if (status[i] == CORE_OK) *published = step[i];
  }
  assert_false(ckpt_writer_busy(p->writer));
}

/* The newest holds the state of its own step, and is of step `oldest` or later. */
static int64_t expect_newest(const fixture *f, const char *directory, int64_t oldest) {
  ckpt_reader *reader;
  layout full = layout_full(TINY);
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  assert_non_null(reader);
  int64_t step = ckpt_reader_step(reader);
  EXPECT_OK(ckpt_reader_load(reader, full.tensor, full.count));
  assert_null(layout_difference(&full, TINY, generation_of(step)));
  if (step < oldest) fail_msg("step %lld is found, %lld was published", (long long)step, (long long)oldest);
  ckpt_reader_close(reader);
  layout_free(&full);
  return step;
}

static void expect_recovery(const fixture *f, const char *directory, int64_t oldest) {
  int64_t step = expect_newest(f, directory, oldest);
  scene_expect_recovery(f, directory, &before, oldest, step == 20 ? OLD : generation_of(step));
}

/* In a child, which dies at the n-th operation. True when it did. */
static bool crash_at(const fixture *f, const char *directory, int64_t at, volatile int64_t *published) {
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    core_status status[STEPS];
    core_file_inject(&(core_file_fault){.at = at});
    pair p = pair_open(f, directory);
    pair_save(&p, published, status);
    _exit(status[0] == CORE_OK && status[1] == CORE_OK ? 0 : 1);
  }
  return child_crashed(child);
}

static void crash_at_every_operation_of_two(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  int64_t at = 1, seen = 0;
  volatile int64_t *published =
      mmap(NULL, sizeof *published, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  assert_true((void *)(uintptr_t)published != MAP_FAILED);
  fixture_directory(f, before.name, directory);
  for (bool crashed = true; crashed; at += SCENE_STRIDE) {
    assert_true(at < MOST);
    scene_set(f, directory, &before);
    *published = 20;
    crashed = crash_at(f, directory, at, published);
    if (crashed && *published == FIRST) seen++; /* between the two */
    expect_recovery(f, directory, *published);
  }
  assert_true(at > 35);
  assert_true(seen > 0);
  munmap((void *)(uintptr_t)published, sizeof *published);
}

/* ---- the same process goes on ---- */

/* False when there were fewer operations. */
static bool fail_at(const fixture *f, const char *directory, const core_file_fault *fault) {
  volatile int64_t published = 20;
  core_status status[STEPS];
  char names[512];
  scene_set(f, directory, &before);
  pair p = pair_open(f, directory);
  core_file_inject(fault);
  pair_save(&p, &published, status);
  bool reached = core_file_operations() >= fault->at;
  core_file_inject(NULL);
  for (int i = 0; i < STEPS; i++) assert_true(status[i] == CORE_OK || (reached && status[i] == CORE_ERR_IO));
  /* one failure costs one save at most */
  if (!fault->sticky) assert_true(status[0] == CORE_OK || status[1] == CORE_OK);
  assert_true(expect_newest(f, directory, published) >= published);
  EXPECT_OK(save_step(f, p.writer, &p.l, TINY, 50, generation_of(50)));
  assert_int_equal(expect_newest(f, directory, 50), 50);
  list_names(directory, names, sizeof names);
  assert_null(strstr(names, ".tmp"));
  pair_close(&p);
  return reached;
}

static void fail_at_every_operation_of_two(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "errors", directory);
  const core_file_fault kinds[] = {{.error = ENOSPC}, {.error = EIO, .sticky = 1}};
  for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
    core_file_fault fault = kinds[kind];
    for (fault.at = 1; fail_at(f, directory, &fault); fault.at += SCENE_STRIDE) assert_true(fault.at < MOST);
    assert_true(fault.at > 35);
  }
}

/* ---- power ---- */

static void power_cut_at_every_operation_of_two(void **state) {
  const fixture *f = *state;
  const disk_fate fates[][2] = {
      {DISK_LOST, DISK_LOST}, {DISK_KEPT, DISK_LOST}, {DISK_MIXED, DISK_MIXED}, {DISK_MIXED, DISK_MIXED}};
  enum { FATES = sizeof fates / sizeof *fates };
  char directory[CKPT_PATH], after[CKPT_PATH];
  volatile int64_t published = 20;
  core_status status[STEPS];
  fixture_directory(f, before.name, directory);
  fixture_directory(f, "after", after);
  scene_set(f, directory, &before);
  disk *d = disk_watch(directory);
  pair p = pair_open(f, directory);
  pair_save(&p, &published, status);
  assert_int_equal(published, SECOND);
  int64_t operations = disk_operations(d);
  pair_close(&p);
  disk_stop(d);
  assert_in_range(operations, 24, 200);
  for (int64_t at = 0; at <= operations; at += SCENE_STRIDE)
    for (int fate = 0; fate < FATES; fate++) {
      disk_materialise(d, at, fates[fate][0], fates[fate][1], (uint64_t)(at * FATES + fate), after);
      expect_recovery(f, after, at == operations ? SECOND : 20);
    }
  disk_free(d);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(crash_at_every_operation_of_two),
      cmocka_unit_test(fail_at_every_operation_of_two),
      cmocka_unit_test(power_cut_at_every_operation_of_two),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
