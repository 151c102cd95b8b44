/* The index: a set opened by it is the set opened by its shards, streams included; no shard is opened for it;
 * whatever changed since is noticed; samples that are not finite are skipped as it says; any damage to it is
 * an error. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"
#include "data/index_impl.h"
#include "data_craft.h"
#include "data_fixture.h"

static void build(const char *directory, bool values, data_index_result *out) {
  const data_index_options options = {.directory = directory, .split = "train", .check_values = values};
  const core_status status = data_index_build(&options, out);
  if (status != CORE_OK) print_error("%s\n", core_error_get()->message);
  assert_int_equal(status, CORE_OK);
}

/* One hash of everything that a shuffled stream delivers in two epochs. */
static core_status hash_stream(data_set *set, data_non_finite policy, uint64_t *hash, int64_t *skipped) {
  const data_range range[3] = {{0, 16}, {4, 12}, {0, 16}};
  const data_stream_options options = {.order = {.seed = 3, .shuffle_samples = 37},
                                       .start = {.consumed = 5},
                                       .batch = 16,
                                       .micro_batches = 1,
                                       .range = range,
                                       .threads = 2,
                                       .non_finite = policy,
                                       .repeat = true};
  data_stream *stream = NULL;
  core_status status = data_stream_open(set, &options, &stream);
  if (status != CORE_OK) return status;
  for (int64_t b = 0; status == CORE_OK && b < 2 * data_set_samples(set) / 16; ++b) {
    data_batch *batch = NULL;
    status = data_stream_get(stream, &batch);
    if (status != CORE_OK) break;
    *hash = core_hash(batch->id, (size_t)batch->samples * sizeof *batch->id, *hash);
    *hash = core_hash(batch->label, (size_t)batch->samples * sizeof *batch->label, *hash);
    *hash = core_hash(batch->present, (size_t)(batch->samples * batch->modalities), *hash);
    for (int32_t m = 0; m < batch->modalities; ++m) {
      const data_part *part = &batch->part[m];
      const int64_t rows = part->offset[part->hi - part->lo];
      *hash = core_hash(part->latent, (size_t)(rows * part->width) * core_dtype_size(part->dtype), *hash);
    }
    data_stream_put(stream, batch);
  }
  *skipped = data_stream_skipped(stream);
  core_error saved;
  core_error_save(&saved);
  data_stream_close(stream);
  return status == CORE_OK ? CORE_OK : core_error_restore(&saved);
}

static void same_set_by_index(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.shards = 5;
  f.shard_samples = 60;
  fixture_write(&f, "train");
  const char *const two[2] = {"speech", "image"}; /* another order, and not all */
  for (int part = 0; part < 2; ++part) {
    const char *const *names = part ? two : f.names;
    const int32_t count = part ? 2 : 3;
    uint64_t hash[2] = {0, 0};
    int64_t skipped = 0;
    data_set *set[2];
    data_index_result result;
    char path[320];
    (void)snprintf(path, sizeof path, "%s/train/shards.index", f.directory);
    (void)unlink(path);
    assert_int_equal(data_set_open(f.directory, "train", names, count, &set[0]), CORE_OK);
    build(f.directory, false, &result);
    assert_int_equal(result.samples, data_set_samples(set[0]));
    assert_int_equal(result.shards, 5);
    assert_int_equal(result.modalities, 3);
    assert_int_equal(data_set_open(f.directory, "train", names, count, &set[1]), CORE_OK);
    assert_int_equal(data_set_fingerprint(set[0]), data_set_fingerprint(set[1]));
    assert_int_equal(data_set_has_labels(set[0]), data_set_has_labels(set[1]));
    for (int32_t m = 0; m < count; ++m) {
      assert_memory_equal(data_set_modality(set[0], m), data_set_modality(set[1], m),
                          sizeof(data_modality_info));
      for (int64_t n = 1; n < 400; n += 57)
        assert_int_equal(data_set_most_rows(set[0], m, n), data_set_most_rows(set[1], m, n));
    }
    for (int i = 0; i < 2; ++i) {
      assert_int_equal(hash_stream(set[i], DATA_NON_FINITE_ERROR, &hash[i], &skipped), CORE_OK);
      data_set_close(set[i]);
    }
    assert_int_equal(hash[0], hash[1]);
    bool found = false;
    assert_int_equal(data_index_verify(f.directory, "train", &found), CORE_OK);
    assert_true(found);
  }
  fixture_remove(f.directory);
}

/* Overwrites a file with zeros and gives it its old time of change: only opening it would tell. */
static void hollow_out(const char *path) {
  struct stat about;
  assert_int_equal(stat(path, &about), 0);
  const int fd = open(path, O_WRONLY);
  uint8_t *zeros = calloc(1, (size_t)about.st_size);
  assert_int_equal(pwrite(fd, zeros, (size_t)about.st_size, 0), about.st_size);
  free(zeros);
  const struct timespec times[2] = {about.st_atim, about.st_mtim};
  assert_int_equal(futimens(fd, times), 0);
  (void)close(fd);
}

static void opens_no_shard(void **state) {
  (void)state;
  fixture f = fixture_small();
  data_index_result result;
  data_set *set = NULL;
  char path[320];
  uint64_t hash = 0;
  int64_t skipped = 0;
  bool found = false;
  fixture_write(&f, "train");
  build(f.directory, false, &result);
  for (int m = 0; m < 3; ++m)
    for (int k = 0; k < 3; ++k) {
      (void)snprintf(path, sizeof path, "%s/train/%s-%05d.h5", f.directory, f.names[m], k);
      hollow_out(path);
    }
  assert_int_equal(data_set_open(f.directory, "train", f.names, 3, &set), CORE_OK);
  assert_int_equal(data_set_samples(set), 100);
  /* What the index cannot notice, the first look into the shard does. */
  fixture_expect(hash_stream(set, DATA_NON_FINITE_ERROR, &hash, &skipped), CORE_ERR_FORMAT, "not an HDF5",
                 NULL);
  data_set_close(set);
  fixture_expect(data_index_verify(f.directory, "train", &found), CORE_ERR_FORMAT, "not an HDF5", NULL);
  fixture_remove(f.directory);
}

/* One shard of 50 samples of one row, uncompressed: its size does not depend on the values. */
static void write_plain(const char *root, uint64_t first_id, bool late_rows) {
  char train[300];
  data_writer *writer = NULL;
  float latent[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  (void)snprintf(train, sizeof train, "%s/train", root);
  const data_writer_options options = {
      .directory = train, .modality = "image", .encoder = "by hand", .dtype = CORE_FLOAT32, .width = 4};
  assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
  for (uint64_t i = 0; i < 50; ++i) {
    const data_sample sample = {
        .id = first_id + i, .latent = latent, .rows = i % 2 == late_rows ? 2 : 0, .label = -1};
    assert_int_equal(data_writer_add(writer, &sample), CORE_OK);
  }
  assert_int_equal(data_writer_close(writer), CORE_OK);
}

/* Another shard of the same size, time of change and layout under the same name: other ids, or other offsets.
 * The set opens; the stream compares. */
static void other_columns_in_a_shard(void **state) {
  (void)state;
  const char *const names[] = {"image"};
  const data_range range = {0, 16};
  const data_stream_options options = {.batch = 16, .micro_batches = 1, .range = &range};
  for (int other = 0; other < 2; ++other) {
    char root[256], path[320];
    data_index_result result;
    data_set *set = NULL;
    data_stream *stream = NULL;
    data_batch *batch = NULL;
    struct stat about;
    fixture_directory(root);
    write_plain(root, 0, false);
    build(root, false, &result);
    (void)snprintf(path, sizeof path, "%s/train/image-00000.h5", root);
    assert_int_equal(stat(path, &about), 0);
    write_plain(root, other == 0 ? 7 : 0, other == 1);
    const struct timespec times[2] = {about.st_atim, about.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    assert_int_equal(data_set_open(root, "train", names, 1, &set), CORE_OK);
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    fixture_expect(data_stream_get(stream, &batch), CORE_ERR_MISMATCH, other == 0 ? "\"id\"" : "\"offset\"",
                   "antiphon index");
    data_stream_close(stream);
    data_set_close(set);
    fixture_remove(root);
  }
}

/* Offsets that give the first samples more rows than the lengths of the set allow any to have, with a right
 * hash: the memory of a batch was planned from the lengths. */
static void offsets_beyond_the_lengths(void **state) {
  (void)state;
  enum { SAMPLES = 50 };
  const char *const names[] = {"image"};
  const data_range range = {0, 16};
  const data_stream_options options = {.batch = 16, .micro_batches = 1, .range = &range};
  const size_t bytes = (size_t)data_index_block_bytes_priv(1, SAMPLES), end = bytes - 8;
  char root[256], path[320];
  uint8_t *block = malloc(bytes);
  data_index_result result;
  data_set *set = NULL;
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  fixture_directory(root);
  write_plain(root, 0, false);
  build(root, false, &result);
  (void)snprintf(path, sizeof path, "%s/train/" DATA_INDEX_FILE, root);
  const int fd = open(path, O_RDWR);
  assert_int_equal(pread(fd, block, bytes, 0), bytes);
  int64_t *offset = (int64_t *)(void *)(block + end) - (SAMPLES + 1);
  assert_int_equal(offset[SAMPLES], SAMPLES);
  for (int i = 0; i <= SAMPLES; ++i) offset[i] = 3 * i < SAMPLES ? 3 * i : SAMPLES;
  const uint64_t hash = core_hash(block, end, 0);
  memcpy(block + end, &hash, sizeof hash);
  assert_int_equal(pwrite(fd, block, bytes, 0), bytes);
  assert_int_equal(close(fd), 0);
  free(block);
  assert_int_equal(data_set_open(root, "train", names, 1, &set), CORE_OK);
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  fixture_expect(data_stream_get(stream, &batch), CORE_ERR_CORRUPT, "expected at most 32", "antiphon index");
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(root);
}

/* The index cannot be read, once or for good: while the set is opened, and while it is streamed. */
static void failing_reads_of_the_index(void **state) {
  (void)state;
  const char *const names[] = {"image"};
  const data_range range = {0, 16};
  const data_stream_options options = {.batch = 16, .micro_batches = 1, .range = &range};
  char root[256];
  data_index_result result;
  fixture_directory(root);
  write_plain(root, 0, false);
  build(root, false, &result);
  for (int sticky = 0; sticky < 2; ++sticky) {
    bool met = true;
    for (int64_t n = 1; met; ++n) {
      data_set *set = NULL;
      data_stream *stream = NULL;
      data_batch *batch = NULL;
      core_file_inject(
          &(core_file_fault){.at = n, .error = EIO, .sticky = sticky, .containing = DATA_INDEX_FILE});
      core_status status = data_set_open(root, "train", names, 1, &set);
      if (status == CORE_OK) status = data_stream_open(set, &options, &stream);
      if (status == CORE_OK) status = data_stream_get(stream, &batch);
      met = core_file_operations() >= n;
      if (sticky && met)
        fixture_expect(status, CORE_ERR_IO, DATA_INDEX_FILE, set != NULL ? "shard 0, attempt 4" : NULL);
      else
        assert_int_equal(status, CORE_OK);
      data_stream_close(stream);
      core_file_inject(NULL);
      data_set_close(set);
      assert_true(n < 50 && (n > 3 || met));
    }
  }
  fixture_remove(root);
}

static void changes_are_noticed(void **state) {
  (void)state;
  for (int change = 0; change < 5; ++change) {
    fixture f = fixture_small();
    data_index_result result;
    data_set *set = NULL;
    char path[320], other[320];
    fixture_write(&f, "train");
    build(f.directory, false, &result);
    (void)snprintf(path, sizeof path, "%s/train/text-00002.h5", f.directory);
    (void)snprintf(other, sizeof other, "%s/train/text-00003.h5", f.directory);
    if (change == 0) /* touched */
      assert_int_equal(utimensat(AT_FDCWD, path, NULL, 0), 0);
    if (change == 1) /* removed */
      assert_int_equal(unlink(path), 0);
    if (change == 2) /* longer */
      assert_int_equal(truncate(path, 100000), 0);
    if (change >= 3) { /* added, of one modality or of all */
      f.shards = 4;
      fixture_write(&f, "train");
      for (int m = 0; change == 3 && m < 3; m += 2) {
        (void)snprintf(other, sizeof other, "%s/train/%s-00003.h5", f.directory, f.names[m]);
        assert_int_equal(unlink(other), 0);
      }
    }
    const core_status status = data_set_open(f.directory, "train", f.names, 3, &set);
    if (change == 1 || change == 3)
      fixture_expect(status, CORE_ERR_NOT_FOUND, "missing", NULL);
    else
      fixture_expect(status, CORE_ERR_MISMATCH, "antiphon index", change == 4 ? "3 shards" : "text-00002.h5");
    assert_null(set);
    fixture_remove(f.directory);
  }
}

/* 300 samples of one row; of every seventh the row holds NaN. */
static void write_not_finite(const char *root) {
  static int64_t id[300], offset[301];
  static float latent[300];
  char path[320];
  (void)snprintf(path, sizeof path, "%s/train", root);
  assert_int_equal(mkdir(path, 0777), 0);
  for (int i = 0; i < 300; ++i) {
    id[i] = offset[i] = i;
    latent[i] = i % 7 == 0 ? NAN : 1;
  }
  offset[300] = 300;
  craft c = craft_sound();
  c.samples = c.rows = 300;
  c.columns = c.width = 1;
  c.chunk_rows = 10;
  c.id = id;
  c.offset = offset;
  c.label = NULL;
  c.latent = latent;
  c.gzip = true;
  (void)snprintf(path, sizeof path, "%s/train/image-00000.h5", root);
  craft_write(&c, path);
}

/* A sample that lacks its modality for this reason is of another signature. */
static void skipping_homogeneous(data_set *set) {
  const data_range range = {0, 30};
  const data_group_options grouping = {.batch = 30, .non_finite = DATA_NON_FINITE_SKIP};
  const data_stream_options options = {.order = {.seed = 3, .shuffle_samples = 60},
                                       .batch = 30,
                                       .micro_batches = 1,
                                       .range = &range,
                                       .non_finite = DATA_NON_FINITE_SKIP,
                                       .grouped = true,
                                       .repeat = true};
  data_stream *stream = NULL;
  int64_t without = 0;
  assert_int_equal(data_set_group(set, &grouping), CORE_OK);
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (int b = 0; b < 100; ++b) { /* 10 epochs: 43 x 10 / 30 batches, rounded down */
    data_batch *batch = NULL;
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    for (int64_t i = 0; i < 30; ++i) assert_int_equal(batch->present[i], batch->present[0]);
    without += !batch->present[0];
    data_stream_put(stream, batch);
  }
  assert_int_equal(without, 43 * 10 / 30);
  assert_int_equal(data_stream_skipped(stream), without * 30);
  data_stream_close(stream);
}

static void skipping(void **state) {
  (void)state;
  const char *const names[] = {"image"};
  const data_range range = {0, 30};
  char root[256];
  data_index_result result;
  data_set *set = NULL;
  data_stream *stream = NULL;
  fixture_directory(root);
  write_not_finite(root);
  for (int values = 0; values < 2; ++values) {
    data_stream_options options = {.batch = 30, .micro_batches = 1, .range = &range};
    data_batch *batch = NULL;
    build(root, values, &result);
    assert_int_equal(result.not_finite, values ? 43 : 0);
    assert_int_equal(data_set_open(root, "train", names, 1, &set), CORE_OK);
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    fixture_expect(data_stream_get(stream, &batch), CORE_ERR_NON_FINITE, "sample 0", NULL);
    data_stream_close(stream);
    options.non_finite = DATA_NON_FINITE_SKIP;
    if (!values)
      fixture_expect(data_stream_open(set, &options, &stream), CORE_ERR_ARGUMENT, "--values", NULL);
    if (!values) data_set_close(set);
  }
  const data_stream_options options = {
      .batch = 30, .micro_batches = 1, .range = &range, .non_finite = DATA_NON_FINITE_SKIP};
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (int b = 0; b < 10; ++b) {
    data_batch *batch = NULL;
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    for (int64_t i = 0; i < 30; ++i) {
      const bool bad = (b * 30 + i) % 7 == 0;
      assert_int_equal(batch->present[i], !bad);
      assert_int_equal(batch->part[0].offset[i + 1] - batch->part[0].offset[i], !bad);
    }
    for (int64_t r = 0; r < batch->part[0].offset[30]; ++r)
      assert_true(fixture_stored(batch->part[0].dtype, batch->part[0].latent, r) == 1);
    data_stream_put(stream, batch);
  }
  assert_int_equal(data_stream_skipped(stream), 43);
  data_stream_close(stream);
  skipping_homogeneous(set);
  data_set_close(set);
  fixture_remove(root);
}

/* Every byte of an index counts: wherever one is changed, opening or streaming fails and says which file. */
static void any_damage_is_an_error(void **state) {
  (void)state;
  fixture f = fixture_small();
  f.modalities = 2;
  data_index_result result;
  char path[320];
  struct stat about;
  fixture_write(&f, "train");
  build(f.directory, true, &result);
  (void)snprintf(path, sizeof path, "%s/train/shards.index", f.directory);
  assert_int_equal(stat(path, &about), 0);
  uint8_t *sound = malloc((size_t)about.st_size);
  const int fd = open(path, O_RDWR);
  assert_int_equal(read(fd, sound, (size_t)about.st_size), about.st_size);
  for (int64_t i = 0; i < 400; ++i) {
    const int64_t at = i < 100 ? (int64_t)about.st_size - 1 - i
                               : (int64_t)core_random_below(9, 1, (uint64_t)i, (uint64_t)about.st_size);
    const uint8_t changed = (uint8_t)(sound[at] ^ 1u << i % 8);
    data_set *set = NULL;
    uint64_t hash = 0;
    int64_t skipped = 0;
    assert_int_equal(pwrite(fd, &changed, 1, at), 1);
    core_status status = data_set_open(f.directory, "train", f.names, 2, &set);
    if (status == CORE_OK) status = hash_stream(set, DATA_NON_FINITE_ERROR, &hash, &skipped);
    if (status == CORE_OK) print_error("byte %lld of %lld\n", (long long)at, (long long)about.st_size);
    assert_int_not_equal(status, CORE_OK);
    assert_non_null(strstr(core_error_get()->message, "shards.index"));
    data_set_close(set);
    assert_int_equal(pwrite(fd, &sound[at], 1, at), 1);
  }
  for (int64_t bytes = 0; bytes < about.st_size; bytes += 1 + about.st_size / 60) {
    data_set *set = NULL;
    assert_int_equal(ftruncate(fd, bytes), 0);
    assert_int_not_equal(data_set_open(f.directory, "train", f.names, 2, &set), CORE_OK);
    assert_int_equal(pwrite(fd, sound, (size_t)about.st_size, 0), about.st_size);
  }
  (void)close(fd);
  free(sound);
  fixture_remove(f.directory);
}

/* What a stream holds does not grow with the set. */
static void memory_does_not_grow(void **state) {
  (void)state;
  int64_t bytes[2];
  for (int large = 0; large < 2; ++large) {
    fixture f = fixture_small();
    data_index_result result;
    data_stream *stream = NULL;
    f.modalities = 1;
    f.width[0] = 1;
    f.most_rows = 1;
    f.shards = large ? 8 : 2;
    f.shard_samples = 2000;
    fixture_write(&f, "train");
    build(f.directory, false, &result);
    data_set *set = fixture_open(&f, "train");
    const data_range range = {0, 10};
    const data_stream_options options = {.order = {.shuffle_samples = 100},
                                         .batch = 10,
                                         .micro_batches = 1,
                                         .range = &range,
                                         .cache_bytes = 4096,
                                         .repeat = true};
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    bytes[large] = data_stream_bytes(stream);
    data_stream_close(stream);
    data_set_close(set);
    fixture_remove(f.directory);
  }
  assert_true(bytes[1] - bytes[0] < 4096); /* 12,000 samples more: a few words for each shard and chunk */
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(same_set_by_index),
                                     cmocka_unit_test(opens_no_shard),
                                     cmocka_unit_test(other_columns_in_a_shard),
                                     cmocka_unit_test(offsets_beyond_the_lengths),
                                     cmocka_unit_test(failing_reads_of_the_index),
                                     cmocka_unit_test(changes_are_noticed),
                                     cmocka_unit_test(skipping),
                                     cmocka_unit_test(any_damage_is_an_error),
                                     cmocka_unit_test(memory_does_not_grow)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
