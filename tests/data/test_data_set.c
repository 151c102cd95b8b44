/* Opening a set: what is missing or does not belong together is named; tables over the whole set are exact.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "data_craft.h"
#include "data_fixture.h"

static core_status open_status(const fixture *f, const char *split, const char *const *names, int32_t count) {
  data_set *set = NULL;
  const core_status status = data_set_open(f->directory, split, names, count, &set);
  assert_true((set != NULL) == (status == CORE_OK));
  data_set_close(set);
  return status;
}

static void what_is_missing(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  fixture_write(&f, "validation");
  const char *const wrong[] = {"image", "video"}, *const twice[] = {"text", "text"};
  fixture_expect(open_status(&f, "test", f.names, 3), CORE_ERR_NOT_FOUND, "no such split \"test\"",
                 "validation");
  fixture_expect(open_status(&f, "train", wrong, 2), CORE_ERR_NOT_FOUND, "no shards of modality \"video\"",
                 "speech");
  fixture_expect(open_status(&f, "train", twice, 2), CORE_ERR_ARGUMENT, "text", "twice");
  fixture_expect(open_status(&f, "train", f.names, 0), CORE_ERR_ARGUMENT, "modalities", NULL);
  fixture nowhere = f;
  (void)snprintf(nowhere.directory, sizeof nowhere.directory, "/nowhere/at/all");
  fixture_expect(open_status(&nowhere, "train", f.names, 3), CORE_ERR_NOT_FOUND, "/nowhere/at/all", NULL);
  assert_int_equal(open_status(&f, "validation", f.names, 3), CORE_OK);

  char path[320];
  (void)snprintf(path, sizeof path, "%s/train/text-00001.h5", f.directory);
  assert_int_equal(unlink(path), 0);
  fixture_expect(open_status(&f, "train", f.names, 3), CORE_ERR_NOT_FOUND, "text-00001.h5", "missing");
  (void)snprintf(path, sizeof path, "%s/validation/speech-00002.h5", f.directory);
  assert_int_equal(unlink(path), 0);
  fixture_expect(open_status(&f, "validation", f.names, 3), CORE_ERR_NOT_FOUND, "speech-00002.h5", "missing");
  assert_int_equal(open_status(&f, "validation", f.names, 2), CORE_OK);
  fixture_remove(f.directory);
}

/* Directory <root>/train with crafted shards. */
static void put_shard(const char *root, const char *name, const craft *c) {
  char path[512];
  (void)snprintf(path, sizeof path, "%s/train", root);
  (void)mkdir(path, 0777);
  (void)snprintf(path, sizeof path, "%s/train/%s", root, name);
  craft_write(c, path);
}

static void what_does_not_belong_together(void **state) {
  (void)state;
  static const int64_t other_id[4] = {5, 3, 8, 100}, more_id[5] = {1, 2, 4, 6, 8}, fresh_id[4] = {1, 2, 4, 6};
  static const int64_t more_offset[6] = {0, 1, 2, 3, 4, 6}, other_label[4] = {1, -1, 7, 8};
  const char *const names[] = {"image", "text"};
  const struct {
    const char *first, *second;
  } expected[] = {{"image-00000.h5", "text-00000.h5 has 8"},
                  {"text-00000.h5 has 5", "image-00000.h5 has 4"},
                  {"label 8", "text-00000.h5"},
                  {"image-00001.h5 is 2", "image-00000.h5 is 3 wide"},
                  {"sample id 3 comes twice", "image-00001"},
                  {"encoder \"by hand\"", "image-00001.h5 from \"other\""}};
  for (int i = 0; i < 6; ++i) {
    fixture f = fixture_small();
    craft first = craft_sound(), second = craft_sound();
    if (i < 3) {
      second.modality = "text";
      if (i == 0) second.id = other_id;
      if (i == 1) {
        second.samples = 5;
        second.id = more_id;
        second.offset = more_offset;
        second.label = NULL;
      }
      if (i == 2) second.label = other_label;
      put_shard(f.directory, "text-00000.h5", &second);
    } else {
      second.id = i == 4 ? first.id : fresh_id;
      if (i == 4) first.samples = 2, first.rows = 2;
      if (i == 3) second.width = second.columns = 2;
      if (i == 5) second.encoder = "other";
      put_shard(f.directory, "image-00001.h5", &second);
    }
    put_shard(f.directory, "image-00000.h5", &first);
    fixture_expect(open_status(&f, "train", names, i < 3 ? 2 : 1), CORE_ERR_MISMATCH, expected[i].first,
                   expected[i].second);
    fixture_remove(f.directory);
  }
}

static void no_samples(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.shards = 1;
  f.shard_samples = 0;
  fixture_write(&f, "train");
  fixture_expect(open_status(&f, "train", f.names, 3), CORE_ERR_FORMAT, "/train", "no samples");
  fixture_remove(f.directory);
}

static void fingerprint_tells_sets_apart(void **state) {
  (void)state;
  uint64_t seen[4];
  for (int i = 0; i < 4; ++i) {
    fixture f = fixture_small();
    f.modalities = 2;
    if (i == 2) f.shard_samples = 41;
    if (i == 3) f.width[1] = 8;
    if (i == 1) f.filter = DATA_FILTER_NONE; /* the same latents, stored otherwise */
    fixture_write(&f, "train");
    data_set *set = fixture_open(&f, "train");
    seen[i] = data_set_fingerprint(set);
    data_set_close(set);
    fixture_remove(f.directory);
  }
  assert_int_equal(seen[0], seen[1]);
  assert_int_not_equal(seen[0], seen[2]);
  assert_int_not_equal(seen[0], seen[3]);
  assert_int_not_equal(seen[2], seen[3]);
}

static int falling(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

static void info_and_bounds(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  const int64_t samples = data_set_samples(set);
  int64_t *rows = malloc((size_t)samples * sizeof *rows);
  for (int32_t m = 0; m < 3; ++m) {
    int64_t tokens = 0, absent = 0;
    for (int64_t i = 0; i < samples; ++i) {
      rows[i] = fixture_rows(&f, m, fixture_id(i));
      tokens += rows[i];
      absent += rows[i] == 0;
    }
    qsort(rows, (size_t)samples, sizeof *rows, falling);
    const data_modality_info *info = data_set_modality(set, m);
    assert_string_equal(info->name, f.names[m]);
    assert_string_equal(info->encoder, "known values");
    assert_int_equal(info->tokens, tokens);
    assert_int_equal(info->absent, absent);
    assert_int_equal(info->longest, rows[0]);
    /* Consecutive positions may reach over the end of an epoch, so the longest may come twice. */
    assert_int_equal(data_set_most_rows(set, m, 0), 0);
    assert_int_equal(data_set_most_rows(set, m, 1), rows[0]);
    assert_int_equal(data_set_most_rows(set, m, 3), 2 * rows[0] + rows[1]);
    assert_int_equal(data_set_most_rows(set, m, 6), 2 * (rows[0] + rows[1] + rows[2]));
    assert_int_equal(data_set_most_rows(set, m, samples * 3) >= 3 * tokens, 1);
  }
  assert_null(data_set_modality(set, 3));
  assert_true(data_set_has_labels(set));
  assert_int_equal(data_set_shards(set), 3);
  free(rows);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void moments_are_exact(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  data_set *set = fixture_open(&f, "train");
  for (int32_t m = 0; m < 3; ++m) {
    double mean[33], deviation[33];
    assert_int_equal(data_set_moments(set, m, DATA_NON_FINITE_ERROR, NULL, NULL, mean, deviation), CORE_OK);
    for (int64_t c = 0; c < f.width[m]; ++c) {
      long double sum = 0, square = 0, count = 0;
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t i = 0; i < data_set_samples(set); ++i)
          for (int64_t r = 0; r < fixture_rows(&f, m, fixture_id(i)); ++r) {
            const long double x = fixture_value(m, fixture_id(i), r, c);
            if (pass == 0) {
              sum += x;
              count += 1;
            } else {
              square += (x - sum / count) * (x - sum / count);
            }
          }
      assert_true(fabsl(mean[c] - sum / count) < 1e-12L);
      assert_true(fabsl(deviation[c] - sqrtl(square / count)) < 1e-12L);
    }
  }
  double none[1];
  fixture_expect(data_set_moments(set, 3, DATA_NON_FINITE_ERROR, NULL, NULL, none, none), CORE_ERR_ARGUMENT,
                 "modality", NULL);
  data_set_close(set);
  fixture_remove(f.directory);
}

/* A mean of 60000 and a deviation of 1e-2: sums of squares would lose everything. */
static void moments_far_from_zero(void **state) {
  (void)state;
  fixture f = fixture_small();
  char directory[300];
  (void)snprintf(directory, sizeof directory, "%s/train", f.directory);
  data_writer *writer = NULL;
  const data_writer_options options = {
      .directory = directory, .modality = "image", .encoder = "x", .dtype = CORE_FLOAT32, .width = 1};
  assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
  for (uint64_t i = 0; i < 3000; ++i) {
    const float x = 60000.0f + (i % 2 ? 0.015625f : -0.015625f);
    assert_int_equal(data_writer_add(writer, &(data_sample){.id = i, .latent = &x, .rows = 1, .label = -1}),
                     CORE_OK);
  }
  assert_int_equal(data_writer_close(writer), CORE_OK);
  f.modalities = 1;
  data_set *set = fixture_open(&f, "train");
  double mean = 0, deviation = 0;
  assert_int_equal(data_set_moments(set, 0, DATA_NON_FINITE_ERROR, NULL, NULL, &mean, &deviation), CORE_OK);
  assert_true(fabs(mean - 60000) < 1e-9);
  assert_true(fabs(deviation - 0.015625) < 1e-9);
  data_set_close(set);
  fixture_remove(f.directory);
}

static void describing(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  char path[320], *text = NULL;
  size_t length = 0;
  (void)snprintf(path, sizeof path, "%s/train/text-00000.h5", f.directory);
  assert_true(data_shard_is(path));
  FILE *out = open_memstream(&text, &length);
  assert_int_equal(data_shard_describe(path, true, out), CORE_OK);
  (void)fclose(out);
  const char *expected[] = {"modality   text", "known values",  "of 7 float16",
                            "filter zstd",     "samples    40", "all finite"};
  for (size_t i = 0; i < sizeof expected / sizeof *expected; ++i) assert_non_null(strstr(text, expected[i]));
  free(text);
  (void)snprintf(path, sizeof path, "%s/train", f.directory);
  assert_false(data_shard_is(path));
  (void)snprintf(path, sizeof path, "%s/none.h5", f.directory);
  assert_false(data_shard_is(path));
  fixture_expect(data_shard_describe(path, false, stderr), CORE_ERR_NOT_FOUND, "none.h5", NULL);
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(what_is_missing),
                                     cmocka_unit_test(what_does_not_belong_together),
                                     cmocka_unit_test(no_samples),
                                     cmocka_unit_test(fingerprint_tells_sets_apart),
                                     cmocka_unit_test(info_and_bounds),
                                     cmocka_unit_test(moments_are_exact),
                                     cmocka_unit_test(moments_far_from_zero),
                                     cmocka_unit_test(describing)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
