/* Power cuts behind every single operation of a save, with whatever was not synced lost, kept or torn: the
 * next run finds a sound checkpoint that is not older than the last one published; one whose commit has
 * returned is published for good. */
#include "ckpt_disk.h"
#include "ckpt_scene.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/file.h"

/* What may happen to names and to data; the mixed ones have as many tries as there are rows. */
static const struct {
  disk_fate names, data;
} fates[] = {
    {DISK_LOST, DISK_LOST},  {DISK_KEPT, DISK_LOST},   {DISK_LOST, DISK_KEPT},   {DISK_KEPT, DISK_KEPT},
    {DISK_KEPT, DISK_MIXED}, {DISK_MIXED, DISK_KEPT},  {DISK_MIXED, DISK_LOST},  {DISK_MIXED, DISK_MIXED},
    {DISK_KEPT, DISK_MIXED}, {DISK_MIXED, DISK_MIXED}, {DISK_MIXED, DISK_MIXED},
};
enum { FATES = sizeof fates / sizeof *fates };

/* A save under observation. *committed: operations when its commit had returned. */
static disk *watch_save(const fixture *f, const char *directory, const scene *s, int64_t *committed) {
  layout l;
  ckpt_writer *writer;
  disk *d = disk_watch(directory);
  scene_open(f, directory, s, &l, &writer);
  EXPECT_OK(save_step(f, writer, &l, TINY, s->step, NEW));
  *committed = disk_operations(d);
  ckpt_writer_destroy(writer);
  disk_stop(d);
  layout_free(&l);
  return d;
}

static void power_cut_at_every_operation(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], after[CKPT_PATH];
  for (int i = 0; i < SCENES; i++) {
    const scene *s = &scenes[i];
    int64_t committed;
    fixture_directory(f, s->name, directory);
    fixture_directory(f, "after", after);
    scene_set(f, directory, s);
    disk *d = watch_save(f, directory, s, &committed);
    int64_t operations = disk_operations(d);
    assert_in_range(operations, 12, 200); /* fewer would mean that they are not seen */
    for (int64_t at = 0; at <= operations; at += SCENE_STRIDE) {
      bool published = at >= committed && s->step >= 20;
      for (int fate = 0; fate < FATES; fate++) {
        disk_materialise(d, at, fates[fate].names, fates[fate].data, (uint64_t)(at * FATES + fate), after);
        scene_expect_recovery(f, after, s, published ? s->step : 20, published ? NEW : OLD);
      }
    }
    disk_free(d);
  }
}

/* What a power cut left is cleaned up, and the power fails again. */
static void power_cut_while_cleaning(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], after[CKPT_PATH], again[CKPT_PATH];
  const scene *s = &scenes[2];
  int64_t committed;
  fixture_directory(f, "first", directory);
  fixture_directory(f, "second", after);
  fixture_directory(f, "third", again);
  scene_set(f, directory, s);
  disk *d = watch_save(f, directory, s, &committed);
  for (int64_t at = 5; at <= disk_operations(d); at += SCENE_STRIDE) {
    disk_materialise(d, at, DISK_MIXED, DISK_MIXED, (uint64_t)at, after);
    layout l;
    ckpt_writer *writer;
    disk *second = disk_watch(after);
    scene_open(f, after, s, &l, &writer);
    ckpt_writer_destroy(writer);
    layout_free(&l);
    disk_stop(second);
    for (int64_t then = 0; then <= disk_operations(second); then++) {
      disk_materialise(second, then, DISK_LOST, DISK_LOST, 0, again);
      scene_expect_recovery(f, again, s, 20, OLD);
      disk_materialise(second, then, DISK_MIXED, DISK_MIXED, (uint64_t)then, again);
      scene_expect_recovery(f, again, s, 20, OLD);
    }
    disk_free(second);
  }
  disk_free(d);
}

/* ---- the model itself: it must be able to show the classical mistakes ---- */

static void write_file(const char *path, const char *text, bool sync) {
  int fd;
  EXPECT_OK(core_file_open(path, O_WRONLY | O_CREAT | O_TRUNC, &fd));
  EXPECT_OK(core_file_write(fd, path, text, strlen(text)));
  if (sync) EXPECT_OK(core_file_sync(fd, path));
  EXPECT_OK(core_file_close(fd, path));
}

/* What the file holds after a power cut now; "none" when it is not there. */
static const char *after_cut(disk *d, const char *root, const char *name, disk_fate names, disk_fate data) {
  static char text[256];
  char target[CKPT_PATH], path[CKPT_PATH + 64];
  size_t count;
  snprintf(target, sizeof target, "%.*s-after", CKPT_PATH - 64, root);
  disk_materialise(d, disk_operations(d), names, data, 1, target);
  snprintf(path, sizeof path, "%s/%s", target, name);
  snprintf(text, sizeof text, "none");
  if (!core_file_exists(path)) return text;
  char *bytes = slurp(path, &count);
  snprintf(text, sizeof text, "%s", bytes);
  free(bytes);
  return text;
}

static void the_disk_loses_what_was_not_synced(void **state) {
  char root[CKPT_PATH], a[CKPT_PATH + 8], b[CKPT_PATH + 8];
  fixture_directory(*state, "disk", root);
  snprintf(a, sizeof a, "%s/a", root);
  snprintf(b, sizeof b, "%s/b", root);
  EXPECT_OK(core_file_make_directory(root));
  write_file(b, "old", false);
  disk *d = disk_watch(root);
  assert_string_equal(after_cut(d, root, "b", DISK_LOST, DISK_LOST), "old");
  write_file(a, "new", false);
  EXPECT_OK(core_file_rename(a, b));
  assert_string_equal(after_cut(d, root, "b", DISK_LOST, DISK_LOST), "old");
  assert_string_equal(after_cut(d, root, "b", DISK_KEPT, DISK_LOST),
                      ""); /* renamed, and the data never came */
  assert_string_equal(after_cut(d, root, "b", DISK_KEPT, DISK_KEPT), "new");
  EXPECT_OK(core_file_sync_directory(root));
  assert_string_equal(after_cut(d, root, "b", DISK_LOST, DISK_LOST), "");
  write_file(a, "next", true);
  assert_string_equal(after_cut(d, root, "a", DISK_LOST, DISK_LOST), "none"); /* a file without a name */
  assert_string_equal(after_cut(d, root, "a", DISK_KEPT, DISK_LOST), "next");
  EXPECT_OK(core_file_rename(a, b));
  EXPECT_OK(core_file_sync_directory(root));
  assert_string_equal(after_cut(d, root, "b", DISK_LOST, DISK_LOST), "next");
  EXPECT_OK(core_file_remove(b));
  assert_string_equal(after_cut(d, root, "b", DISK_LOST, DISK_LOST), "next");
  assert_string_equal(after_cut(d, root, "b", DISK_KEPT, DISK_LOST), "none");
  disk_stop(d);
  disk_free(d);
}

static void the_disk_tears_what_was_not_synced(void **state) {
  char root[CKPT_PATH], path[CKPT_PATH + 8], text[129], after[CKPT_PATH + 16];
  bool whole = false, absent = false, cut = false, torn = false;
  fixture_directory(*state, "torn", root);
  snprintf(path, sizeof path, "%s/a", root);
  snprintf(after, sizeof after, "%s-after/a", root);
  memset(text, 'x', 128);
  text[128] = 0;
  EXPECT_OK(core_file_make_directory(root));
  disk *d = disk_watch(root);
  write_file(path, text, false);
  disk_stop(d);
  char target[CKPT_PATH + 8];
  snprintf(target, sizeof target, "%s-after", root);
  for (uint64_t seed = 0; seed < 40; seed++) {
    size_t count;
    disk_materialise(d, disk_operations(d), DISK_KEPT, DISK_MIXED, seed, target);
    char *bytes = slurp(after, &count);
    bool zeros = memchr(bytes, 0, count) != NULL;
    whole |= count == 128 && !zeros;
    absent |= count == 0;
    cut |= count > 0 && count < 128 && !zeros;
    torn |= count == 128 && zeros;
    free(bytes);
  }
  assert_true(whole && absent && cut && torn);
  disk_free(d);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_disk_loses_what_was_not_synced),
      cmocka_unit_test(the_disk_tears_what_was_not_synced),
      cmocka_unit_test(power_cut_at_every_operation),
      cmocka_unit_test(power_cut_while_cleaning),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
