#include "ckpt_scene.h"

#include <stdlib.h>

const scene scenes[SCENES] = {
    {"next", true, 2, 30},  /* retention removes 10 */
    {"only", false, 1, 30}, /* retention removes 20; what was written is read back */
    {"again", true, 2, 20}, /* 20 is replaced */
    {"only-again", false, 1, 20}, {"back", true, 2, 15}, /* behind the newest, as after going back */
};

void scene_open(const fixture *f, const char *directory, const scene *s, layout *l, ckpt_writer **writer) {
  const ckpt_options options = {.directory = directory, .keep = s->keep};
  *l = layout_make(TINY, 0, 0, 0, 1);
  EXPECT_OK(ckpt_writer_create(f->control, &options, l->tensor, l->count, writer));
}

void scene_set(const fixture *f, const char *directory, const scene *s) {
  layout l;
  ckpt_writer *writer;
  remove_tree(directory);
  scene_open(f, directory, s, &l, &writer);
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

void scene_expect_recovery(const fixture *f, const char *directory, const scene *s, int64_t oldest,
                           uint64_t least) {
  layout l;
  ckpt_writer *writer;
  char names[512];
  expect_marked_are_sound(directory);
  int64_t step = load_newest(f, directory, TINY, least, NEW);
  if (step < oldest) fail_msg("step %lld is older than the last one published", (long long)step);
  scene_open(f, directory, s, &l, &writer);
  step = load_newest(f, directory, TINY, least, NEW);
  if (step < oldest) fail_msg("after cleaning up, step %lld is the newest", (long long)step);
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
