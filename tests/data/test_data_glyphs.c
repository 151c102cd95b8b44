/* The embedded set is sound: every shard, every value; and no label of the training split is in the
 * validation split. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "data_fixture.h"

static const char *const names[3] = {"image", "text", "speech"};

static data_set *open_split(const char *split) {
  data_set *set = NULL;
  const core_status status = data_set_open(ANTIPHON_SOURCE_DIR "/data/glyphs", split, names, 3, &set);
  if (status != CORE_OK) print_error("%s\n", core_error_get()->message);
  assert_int_equal(status, CORE_OK);
  return set;
}

static void every_value(void **state) {
  (void)state;
  const char *const splits[] = {"train", "validation"};
  FILE *nowhere = fopen("/dev/null", "w");
  for (int s = 0; s < 2; ++s) {
    data_set *set = open_split(splits[s]);
    for (int32_t m = 0; m < 3; ++m)
      for (int32_t k = 0; k < data_set_shards(set); ++k) {
        char path[1024];
        (void)snprintf(path, sizeof path, "%s/data/glyphs/%s/%s-%05d.h5", ANTIPHON_SOURCE_DIR, splits[s],
                       names[m], k);
        const core_status status = data_shard_describe(path, true, nowhere);
        if (status != CORE_OK) print_error("%s\n", core_error_get()->message);
        assert_int_equal(status, CORE_OK);
      }
    data_set_close(set);
  }
  (void)fclose(nowhere);
}

/* All labels of a split, in file order. */
static int32_t *labels_of(data_set *set) {
  const int64_t samples = data_set_samples(set);
  const data_range range[3] = {{0, 0}};
  const data_stream_options options = {.batch = samples, .micro_batches = 1, .range = range};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  int32_t *label = malloc((size_t)samples * sizeof *label);
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
  memcpy(label, batch->label, (size_t)samples * sizeof *label);
  data_stream_close(stream);
  return label;
}

static void splits_share_no_label(void **state) {
  (void)state;
  data_set *train = open_split("train"), *validation = open_split("validation");
  int32_t *seen = labels_of(train), *held_out = labels_of(validation);
  int64_t shared = 0;
  assert_true(data_set_has_labels(train) && data_set_has_labels(validation));
  assert_int_not_equal(data_set_fingerprint(train), data_set_fingerprint(validation));
  for (int64_t i = 0; i < data_set_samples(validation); ++i)
    for (int64_t j = 0; j < data_set_samples(train); ++j) shared += held_out[i] == seen[j];
  assert_int_equal(shared, 0);
  free(seen);
  free(held_out);
  data_set_close(train);
  data_set_close(validation);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(every_value), cmocka_unit_test(splits_share_no_label)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
