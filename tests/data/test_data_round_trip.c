/* What the writer writes, a stream delivers: all filters, types and odd shapes. And what lies in the file is
 * what other programs expect of these filters. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>
#include <hdf5.h>

#include "core/random.h"
#include "data_fixture.h"

/* Streams the whole split in file order and checks everything. Returns the batches seen. */
static int64_t check_all(const fixture *f, int64_t batch_samples, int32_t threads) {
  data_set *set = fixture_open(f, "train");
  const int64_t samples = data_set_samples(set);
  data_range range[3] = {{0, batch_samples}, {0, batch_samples}, {0, batch_samples}};
  const data_stream_options options = {
      .batch = batch_samples, .micro_batches = 1, .range = range, .threads = threads};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  int64_t seen = 0, batches = 0;
  int64_t *order = malloc((size_t)samples * sizeof *order);
  for (int64_t i = 0; i < samples; ++i) order[i] = i;
  assert_int_equal(samples, fixture_samples(f));
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (;; ++batches) {
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    if (batch == NULL) break;
    assert_int_equal(batch->before.consumed, seen);
    fixture_check_batch(f, batch, order + seen);
    seen += batch->samples;
    assert_int_equal(batch->after.consumed, seen);
    data_stream_put(stream, batch);
  }
  assert_int_equal(seen, samples);
  data_stream_close(stream);
  data_set_close(set);
  free(order);
  return batches;
}

static void filters_types_and_sizes(void **state) {
  (void)state;
  const core_dtype dtypes[] = {CORE_FLOAT16, CORE_BFLOAT16, CORE_FLOAT32};
  const struct {
    int64_t width, most_rows, samples, chunk_bytes;
    int32_t shards;
  } shapes[] = {
      {1, 1, 1, 1, 1}, {7, 40, 23, 64, 2}, {33, 3, 50, 0, 3}, {384, 5, 9, 4096, 1}, {5, 1000, 6, 1000, 2},
  };
  for (int filter = DATA_FILTER_NONE; filter <= DATA_FILTER_SHUFFLE_ZSTD; ++filter)
    for (size_t d = 0; d < 3; ++d)
      for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s) {
        fixture f = fixture_small();
        f.filter = (data_filter)filter;
        f.dtype = dtypes[d];
        f.width[0] = shapes[s].width;
        f.most_rows = shapes[s].most_rows;
        f.shard_samples = shapes[s].samples;
        f.chunk_bytes = shapes[s].chunk_bytes;
        f.shards = shapes[s].shards;
        fixture_write(&f, "train");
        const int64_t samples = fixture_samples(&f);
        assert_int_equal(check_all(&f, 8, 1 + (int32_t)(s % 3)), (samples + 7) / 8);
        fixture_remove(f.directory);
      }
}

/* A shard in which no sample has the modality, and one without samples between others. */
static void empty_shards(void **state) {
  (void)state;
  fixture f = fixture_small();
  const float latent[12] = {1, 2, 3};
  char directory[300];
  (void)snprintf(directory, sizeof directory, "%s/train", f.directory);
  const int64_t samples[3] = {2, 0, 1};
  uint64_t id = 0;
  for (int32_t k = 0; k < 3; ++k) {
    data_writer *writer = NULL;
    const data_writer_options options = {.directory = directory,
                                         .modality = "image",
                                         .encoder = "x",
                                         .dtype = CORE_FLOAT32,
                                         .width = 3,
                                         .shard = k,
                                         .filter = DATA_FILTER_GZIP};
    assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
    for (int64_t i = 0; i < samples[k]; ++i, ++id) {
      const data_sample sample = {.id = id, .rows = k == 2 ? 1 : 0, .latent = latent, .label = -1};
      assert_int_equal(data_writer_add(writer, &sample), CORE_OK);
    }
    assert_int_equal(data_writer_close(writer), CORE_OK);
  }
  f.modalities = 1;
  data_set *set = fixture_open(&f, "train");
  assert_int_equal(data_set_samples(set), 3);
  assert_int_equal(data_set_modality(set, 0)->tokens, 1);
  assert_int_equal(data_set_modality(set, 0)->absent, 2);
  assert_false(data_set_has_labels(set));
  const data_range range = {0, 3};
  const data_stream_options options = {.batch = 3, .micro_batches = 1, .range = &range};
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
  assert_int_equal(batch->part[0].offset[3], 1);
  assert_memory_equal(batch->part[0].latent, latent, 12);
  assert_int_equal(batch->present[1], 0);
  assert_int_equal(batch->present[2], 1);
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(f.directory);
}

/* Filter 32015 as other programs register it: the level is its value, a chunk is one zstd frame. */
static void zstd_in_the_file(void **state) {
  (void)state;
  fixture f = fixture_small();
  fixture_write(&f, "train");
  char path[320];
  (void)snprintf(path, sizeof path, "%s/train/image-00000.h5", f.directory);
  const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT), id = H5Dopen2(file, "latent", H5P_DEFAULT);
  const hid_t creation = H5Dget_create_plist(id);
  unsigned flags = 0, value = 0, configuration = 0;
  size_t count = 1;
  assert_int_equal(H5Pget_nfilters(creation), 1);
  assert_int_equal(H5Pget_filter2(creation, 0, &flags, &count, &value, 0, NULL, &configuration), 32015);
  assert_int_equal(count, 1);
  assert_int_equal(value, 3);
  const hsize_t at[2] = {0, 0};
  hsize_t bytes = 0;
  uint32_t mask = 9;
  uint8_t frame[4096] = {0};
  assert_true(H5Dget_chunk_storage_size(id, at, &bytes) >= 0 && bytes < sizeof frame);
  assert_true(H5Dread_chunk(id, H5P_DEFAULT, at, &mask, frame) >= 0);
  assert_int_equal(mask, 0);
  assert_memory_equal(frame, "\x28\xb5\x2f\xfd", 4);
  H5Pclose(creation);
  H5Dclose(id);
  H5Fclose(file);
  fixture_remove(f.directory);
}

/* The name appears only with the whole file; what is refused or abandoned leaves nothing behind. */
static void publishing(void **state) {
  (void)state;
  fixture f = fixture_small();
  char path[320], part[330];
  (void)snprintf(path, sizeof path, "%s/train/image-00004.h5", f.directory);
  (void)snprintf(part, sizeof part, "%s.part", path);
  char directory[300];
  (void)snprintf(directory, sizeof directory, "%s/train", f.directory);
  const data_writer_options options = {.directory = directory,
                                       .modality = "image",
                                       .encoder = "x",
                                       .dtype = CORE_FLOAT16,
                                       .width = 2,
                                       .shard = 4};
  const float good[2] = {1, 2}, large[2] = {1, 1e6f}, nan_row[2] = {0, 0.0f / 0.0f};
  struct stat about;
  data_writer *writer = NULL;
  assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
  assert_int_equal(data_writer_add(writer, &(data_sample){.id = 1, .latent = good, .rows = 1}), CORE_OK);
  assert_int_not_equal(stat(path, &about), 0);
  assert_int_equal(stat(part, &about), 0);
  data_writer_abandon(writer);
  assert_int_not_equal(stat(part, &about), 0);

  for (int i = 0; i < 2; ++i) {
    assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
    fixture_expect(
        data_writer_add(writer, &(data_sample){.id = 77, .latent = i ? large : nan_row, .rows = 1}),
        CORE_ERR_NON_FINITE, "image-00004.h5", "sample 77");
    fixture_expect(data_writer_close(writer), CORE_ERR_ARGUMENT, "image-00004.h5", "refused before");
    assert_int_not_equal(stat(path, &about), 0);
    assert_int_not_equal(stat(part, &about), 0);
  }
  assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
  assert_int_equal(data_writer_add(writer, &(data_sample){.id = 1, .latent = good, .rows = 1}), CORE_OK);
  fixture_expect(data_writer_add(writer, &(data_sample){.id = 2, .latent = good, .rows = 1, .key = "k"}),
                 CORE_ERR_ARGUMENT, "key", NULL);
  data_writer_abandon(writer);
  fixture_remove(f.directory);
}

static void writer_arguments(void **state) {
  (void)state;
  fixture f = fixture_small();
  const data_writer_options good = {
      .directory = f.directory, .modality = "image", .encoder = "x", .dtype = CORE_FLOAT16, .width = 2};
  data_writer *writer = NULL;
  for (int i = 0; i < 6; ++i) {
    data_writer_options bad = good;
    if (i == 0) bad.dtype = CORE_FLOAT64;
    if (i == 1) bad.width = 0;
    if (i == 2) bad.modality = "a/b";
    if (i == 3) bad.level = 10;
    if (i == 4) bad.shard = -1;
    if (i == 5) bad.chunk_bytes = (int64_t)1 << 40;
    fixture_expect(data_writer_open(&bad, &writer), CORE_ERR_ARGUMENT, NULL, NULL);
    assert_null(writer);
  }
  fixture_remove(f.directory);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(filters_types_and_sizes),
                                     cmocka_unit_test(empty_shards), cmocka_unit_test(zstd_in_the_file),
                                     cmocka_unit_test(publishing), cmocka_unit_test(writer_arguments)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
