/* Sound shards in the styles of other programs: every kind of string, integers of other widths and byte
 * orders, no chunks, chunks that span columns, unfiltered edges, attributes and datasets of their own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "data_craft.h"
#include "data_fixture.h"

static void check_craft(const craft *c) {
  fixture f = fixture_small();
  const char *const names[] = {"image"};
  char path[512];
  (void)snprintf(path, sizeof path, "%s/train", f.directory);
  assert_int_equal(mkdir(path, 0777), 0);
  (void)snprintf(path, sizeof path, "%s/train/image-00000.h5", f.directory);
  craft_write(c, path);
  f.names = names;
  f.modalities = 1;
  data_set *set = fixture_open(&f, "train");
  assert_string_equal(data_set_modality(set, 0)->encoder, c->encoder);
  const data_range range = {0, 4};
  const data_stream_options options = {.batch = 4, .micro_batches = 1, .range = &range, .threads = 2};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  const core_status status = data_stream_get(stream, &batch);
  if (status != CORE_OK) print_error("%s\n", core_error_get()->message);
  assert_int_equal(status, CORE_OK);
  for (int i = 0; i < 4; ++i) {
    assert_int_equal(batch->id[i], c->id[i]);
    assert_int_equal(batch->label[i], c->label != NULL ? c->label[i] : -1);
    assert_int_equal(batch->part[0].offset[i + 1], c->offset[i + 1]);
  }
  assert_memory_equal(batch->part[0].latent, c->latent, 18 * sizeof(float));
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void strings(void **state) {
  (void)state;
  for (int text = CRAFT_VARIABLE_UTF8; text <= CRAFT_FIXED_SPACE; ++text) {
    craft c = craft_sound();
    c.text = (craft_text)text;
    check_craft(&c);
  }
}

static void integers_and_extras(void **state) {
  (void)state;
  craft c = craft_sound();
  c.small_integers = true;
  check_craft(&c);
  c = craft_sound();
  c.extra = true;
  check_craft(&c);
  c.label = NULL;
  check_craft(&c);
}

static void layouts(void **state) {
  (void)state;
  craft c = craft_sound();
  c.contiguous = true;
  check_craft(&c);
  for (int64_t rows = 1; rows <= 6; ++rows)
    for (int64_t columns = 1; columns <= 3; ++columns)
      for (int filters = 0; filters < 8; ++filters)
        for (int edges = 0; edges < 2; ++edges) {
          c = craft_sound();
          c.chunk_rows = rows;
          c.chunk_columns = columns;
          c.gzip = (filters & 1) != 0;
          c.shuffle = (filters & 2) != 0;
          c.checksum = (filters & 4) != 0;
          c.no_fill_of_edges = edges != 0;
          check_craft(&c);
        }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(strings), cmocka_unit_test(integers_and_extras),
                                     cmocka_unit_test(layouts)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
