/* One table of faults: each is refused, when the set is opened or at the latest when the batch is read, with
 * its code and a message that names the file and the matter. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
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
#include "data_craft.h"
#include "data_fixture.h"

typedef struct scene {
  char root[256], path[320];
} scene;

static scene scene_create(void) {
  scene s;
  char train[300];
  fixture_directory(s.root);
  (void)snprintf(train, sizeof train, "%s/train", s.root);
  assert_int_equal(mkdir(train, 0777), 0);
  (void)snprintf(s.path, sizeof s.path, "%s/train/image-00000.h5", s.root);
  return s;
}

/* Opens the set and reads all of it. */
static core_status read_all(const char *root) {
  const char *const names[] = {"image"};
  data_set *set = NULL;
  data_stream *stream = NULL;
  core_status status = data_set_open(root, "train", names, 1, &set);
  if (status != CORE_OK) return status;
  const data_range range = {0, 4};
  const data_stream_options options = {.batch = 4, .micro_batches = 1, .range = &range, .threads = 2};
  status = data_stream_open(set, &options, &stream);
  for (data_batch *batch = NULL; status == CORE_OK;) {
    status = data_stream_get(stream, &batch);
    if (status != CORE_OK || batch == NULL) break;
    data_stream_put(stream, batch);
  }
  if (stream != NULL && status != CORE_OK) { /* the error stays */
    data_batch *batch = NULL;
    assert_int_equal(data_stream_get(stream, &batch), status);
    assert_null(batch);
  }
  core_error saved;
  core_error_save(&saved);
  data_stream_close(stream);
  data_set_close(set);
  return status == CORE_OK ? CORE_OK : core_error_restore(&saved);
}

static void expect_craft(const craft *c, core_status code, const char *text) {
  const scene s = scene_create();
  craft_write(c, s.path);
  const double since = core_clock_now();
  fixture_expect(read_all(s.root), code, "image-00000.h5", text);
  assert_true(core_clock_now() - since < 5);
  fixture_remove(s.root);
}

static void attributes(void **state) {
  (void)state;
  const struct {
    const char *left_out, *format, *modality, *dtype;
    int64_t version, width;
    core_status code;
    const char *text;
  } table[] = {
      {"format", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"format\" is missing"},
      {"version", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"version\" is missing"},
      {"modality", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"modality\" is missing"},
      {"encoder", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"encoder\" is missing"},
      {"dtype", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"dtype\" is missing"},
      {"width", NULL, NULL, NULL, 0, 0, CORE_ERR_FORMAT, "\"width\" is missing"},
      {NULL, "webdataset", NULL, NULL, 0, 0, CORE_ERR_FORMAT, "webdataset"},
      {NULL, NULL, "text", NULL, 0, 0, CORE_ERR_MISMATCH, "\"text\""},
      {NULL, NULL, NULL, "int8", 0, 0, CORE_ERR_FORMAT, "int8"},
      {NULL, NULL, NULL, "float16", 0, 0, CORE_ERR_FORMAT, "\"latent\" holds 4-byte"},
      {NULL, NULL, NULL, "bfloat16", 0, 0, CORE_ERR_FORMAT, "uint16"},
      {NULL, NULL, NULL, NULL, 2, 0, CORE_ERR_UNSUPPORTED, "version is 2"},
      {NULL, NULL, NULL, NULL, 0, 4, CORE_ERR_CORRUPT, "the attribute width says 4"},
      {NULL, NULL, NULL, NULL, 0, -3, CORE_ERR_FORMAT, "width is -3"},
      {NULL, NULL, NULL, NULL, 0, (int64_t)1 << 40, CORE_ERR_FORMAT, "width is 1099511627776"},
  };
  for (size_t i = 0; i < sizeof table / sizeof *table; ++i) {
    craft c = craft_sound();
    c.left_out = table[i].left_out;
    if (table[i].format != NULL) c.format = table[i].format;
    if (table[i].modality != NULL) c.modality = table[i].modality;
    if (table[i].dtype != NULL) c.dtype = table[i].dtype;
    if (table[i].version != 0) c.version = table[i].version;
    if (table[i].width != 0) c.width = table[i].width;
    expect_craft(&c, table[i].code, table[i].text);
  }
}

static void small_datasets(void **state) {
  (void)state;
  static const int64_t decreasing[5] = {0, 3, 2, 5, 6}, short_end[5] = {0, 2, 2, 5, 5},
                       late[5] = {1, 2, 2, 5, 6};
  static const int64_t huge[5] = {0, 2, INT64_MAX, 5, 6}, minus[5] = {0, -2, 2, 5, 6},
                       large_label[4] = {1, 2, 3, (int64_t)1 << 31};
  static const int64_t twice[4] = {5, 3, 9, 3};
  craft c = craft_sound();
  c.offset = decreasing;
  expect_craft(&c, CORE_ERR_CORRUPT, "decreases from 3 to 2 at sample 1");
  c.offset = short_end;
  expect_craft(&c, CORE_ERR_CORRUPT, "ends with 5, expected the 6 rows");
  c.offset = late;
  expect_craft(&c, CORE_ERR_CORRUPT, "starts with 1");
  c.offset = huge;
  expect_craft(&c, CORE_ERR_CORRUPT, "decreases");
  c.offset = minus;
  c.small_integers = true;
  expect_craft(&c, CORE_ERR_FORMAT, "\"offset\"[1] is -2");
  c = craft_sound();
  c.offsets = 4;
  expect_craft(&c, CORE_ERR_CORRUPT, "\"offset\" has 4 entries, expected 5");
  c = craft_sound();
  c.id = twice;
  expect_craft(&c, CORE_ERR_MISMATCH, "sample id 3 comes twice");
  for (int i = 0; i < 3; ++i) {
    const char *name = (const char *const[]){"id", "offset", "latent"}[i];
    c = craft_sound();
    c.left_out = name;
    expect_craft(&c, CORE_ERR_FORMAT, "is missing");
  }
  c = craft_sound();
  c.linked = "id";
  expect_craft(&c, CORE_ERR_UNSUPPORTED, "link");
  c = craft_sound();
  c.wide_labels = true;
  c.label = large_label;
  expect_craft(&c, CORE_ERR_FORMAT, "\"label\"[3] does not fit an int32");
}

/* Latents. */
static void latents(void **state) {
  (void)state;
  static const float nan_latent[18] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, NAN};
  static const float inf_latent[18] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -INFINITY};
  craft c = craft_sound();
  c.latent = nan_latent;
  expect_craft(&c, CORE_ERR_NON_FINITE, "sample 9 holds NaN or infinity at row 1, feature 2");
  c.contiguous = true;
  expect_craft(&c, CORE_ERR_NON_FINITE, "sample 9 holds");
  c = craft_sound();
  c.latent = inf_latent;
  c.gzip = true;
  expect_craft(&c, CORE_ERR_NON_FINITE, "sample 100 holds");
  c.shuffle = true; /* found on the way, not in the rows */
  expect_craft(&c, CORE_ERR_NON_FINITE, "sample 100 holds");
  c = craft_sound();
  c.double_latent = true;
  expect_craft(&c, CORE_ERR_FORMAT, "8-byte floats");
  c = craft_sound();
  c.big_endian_latent = true;
  expect_craft(&c, CORE_ERR_FORMAT, "big-endian");
  c = craft_sound();
  c.flat_latent = true;
  expect_craft(&c, CORE_ERR_FORMAT, "must have 2 dimensions, it has 1");
  c = craft_sound();
  c.nbit = true;
  expect_craft(&c, CORE_ERR_UNSUPPORTED, "HDF5 filter 5 ");
  c = craft_sound();
  c.claimed_rows = (int64_t)1 << 50;
  expect_craft(&c, CORE_ERR_CORRUPT, "claims");
  c.gzip = true;
  expect_craft(&c, CORE_ERR_CORRUPT, "claims");
  c = craft_sound();
  c.gzip = true;
  c.chunk_rows = (int64_t)1 << 24;
  c.claimed_rows = 6;
  expect_craft(&c, CORE_ERR_CORRUPT, "chunk");
  c = craft_sound();
  c.hole = true;
  expect_craft(&c, CORE_ERR_CORRUPT, "chunk");
  c.contiguous = true;
  expect_craft(&c, CORE_ERR_CORRUPT, "stores 0 bytes");
}

/* Stored chunks that are not what their filters say. */
static void chunks(void **state) {
  (void)state;
  /* A zstd frame whose header claims 2^56 bytes; a sound one of 4 bytes; bytes that are no frame. */
  static const uint8_t claims[] = {0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0};
  static const uint8_t small[] = {0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x04, 0x21, 0, 0, 1, 2, 3, 4};
  static const uint8_t garbage[64] = {7, 1, 9};
  craft c = craft_sound();
  c.zstd_declared = 1;
  c.raw = claims;
  c.raw_bytes = sizeof claims;
  expect_craft(&c, CORE_ERR_CORRUPT, "zstd data are damaged");
  c.raw = small;
  c.raw_bytes = sizeof small;
  expect_craft(&c, CORE_ERR_CORRUPT, "decompresses to 4 bytes, expected 48");
  c.raw = garbage;
  c.raw_bytes = sizeof garbage;
  expect_craft(&c, CORE_ERR_CORRUPT, "chunk 0 at row 0");
  c.zstd_declared = 0;
  c.gzip = true;
  expect_craft(&c, CORE_ERR_CORRUPT, "gzip data are damaged");
  static uint8_t long_chunk[60000];
  c.raw = long_chunk;
  c.raw_bytes = sizeof long_chunk;
  expect_craft(&c, CORE_ERR_CORRUPT, "claims 60000 stored bytes");
}

/* ---- files ---- */

static int64_t file_size(const char *path) {
  struct stat about;
  assert_int_equal(stat(path, &about), 0);
  return (int64_t)about.st_size;
}

static void truncated_files(void **state) {
  (void)state;
  const scene s = scene_create();
  const craft c = craft_sound();
  craft_write(&c, s.path);
  const int64_t whole = file_size(s.path);
  for (int64_t bytes = whole - 1; bytes >= 0; bytes -= bytes > 600 ? 97 : 13) {
    craft_write(&c, s.path);
    assert_int_equal(truncate(s.path, bytes), 0);
    const core_status status = read_all(s.root);
    fixture_expect(status, bytes >= 8 && status == CORE_ERR_CORRUPT ? CORE_ERR_CORRUPT : CORE_ERR_FORMAT,
                   "image-00000.h5", NULL);
  }
  fixture_remove(s.root);
}

static void other_files(void **state) {
  (void)state;
  const scene s = scene_create();
  FILE *file = fopen(s.path, "w");
  (void)fputs("id,latent\n1,0.5\n", file);
  (void)fclose(file);
  fixture_expect(read_all(s.root), CORE_ERR_FORMAT, "image-00000.h5", "not an HDF5 file");
  assert_int_equal(unlink(s.path), 0);
  assert_int_equal(mkdir(s.path, 0777), 0);
  fixture_expect(read_all(s.root), CORE_ERR_FORMAT, "image-00000.h5", "not a file");
  assert_int_equal(rmdir(s.path), 0);
  assert_int_equal(symlink("/nowhere", s.path), 0);
  fixture_expect(read_all(s.root), CORE_ERR_NOT_FOUND, "image-00000.h5", NULL);
  fixture_remove(s.root);
}

/* Flips one byte in the middle of the first compressed chunk; the file is otherwise sound. */
static void flipped_byte_in_a_chunk(void **state) {
  (void)state;
  for (int filter = DATA_FILTER_GZIP; filter <= DATA_FILTER_SHUFFLE_ZSTD; ++filter) {
    fixture f = fixture_small();
    f.modalities = 1;
    f.filter = (data_filter)filter;
    f.shards = 1;
    fixture_write(&f, "train");
    char path[320];
    (void)snprintf(path, sizeof path, "%s/train/image-00000.h5", f.directory);
    const int64_t bytes = file_size(path);
    uint8_t *content = malloc((size_t)bytes);
    const int fd = open(path, O_RDWR);
    assert_int_equal(pread(fd, content, (size_t)bytes, 0), bytes);
    /* Frames are found by their first bytes; the one met last lies well inside the file. */
    const bool zstd = filter >= DATA_FILTER_ZSTD;
    int64_t at = -1;
    for (int64_t i = 0; i + 200 < bytes; ++i)
      if (zstd ? memcmp(content + i, "\x28\xb5\x2f\xfd", 4) == 0
               : content[i] == 0x78 && content[i + 1] == 0x5e)
        at = i;
    if (at < 0)
      for (int64_t i = 0; i + 200 < bytes; ++i)
        if (content[i] == 0x78 && content[i + 1] == 0x9c) at = i;
    assert_true(at > 0);
    const uint8_t flipped[4] = {(uint8_t)~content[at + 8], (uint8_t)~content[at + 9],
                                (uint8_t)~content[at + 10], (uint8_t)~content[at + 11]};
    assert_int_equal(pwrite(fd, flipped, 4, at + 8), 4);
    (void)close(fd);
    free(content);
    fixture_expect(read_all(f.directory), CORE_ERR_CORRUPT, "image-00000.h5", "damaged");
    fixture_remove(f.directory);
  }
}

/* What comes before the damage is still delivered, whatever the reader found ahead. */
static void batches_before_the_damage(void **state) {
  (void)state;
  const scene s = scene_create();
  static int64_t id[400], offset[401];
  static float latent[400];
  for (int i = 0; i < 400; ++i) id[i] = offset[i] = i;
  offset[400] = 400;
  latent[250] = NAN;
  craft c = craft_sound();
  c.samples = c.rows = 400;
  c.columns = c.width = 1;
  c.chunk_rows = 10;
  c.id = id;
  c.offset = offset;
  c.label = NULL;
  c.latent = latent;
  c.gzip = true;
  craft_write(&c, s.path);
  const char *const names[] = {"image"};
  const data_range range = {0, 20};
  const data_stream_options options = {.batch = 20, .micro_batches = 1, .range = &range, .threads = 3};
  data_set *set = NULL;
  data_stream *stream = NULL;
  data_batch *batch = NULL;
  assert_int_equal(data_set_open(s.root, "train", names, 1, &set), CORE_OK);
  assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
  for (int b = 0; b < 12; ++b) {
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    assert_int_equal(batch->id[0], 20 * b);
    data_stream_put(stream, batch);
  }
  fixture_expect(data_stream_get(stream, &batch), CORE_ERR_NON_FINITE, "sample 250", s.path);
  data_stream_close(stream);
  data_set_close(set);
  fixture_remove(s.root);
}

/* The file is gone or replaced after the set was opened. */
static void changed_under_way(void **state) {
  (void)state;
  const scene s = scene_create();
  const char *const names[] = {"image"};
  const data_range range = {0, 4};
  const data_stream_options options = {.batch = 4, .micro_batches = 1, .range = &range};
  for (int i = 0; i < 2; ++i) {
    craft c = craft_sound();
    data_set *set = NULL;
    data_stream *stream = NULL;
    data_batch *batch = NULL;
    craft_write(&c, s.path);
    assert_int_equal(data_set_open(s.root, "train", names, 1, &set), CORE_OK);
    c.chunk_rows = 2;
    if (i == 0)
      assert_int_equal(unlink(s.path), 0);
    else
      craft_write(&c, s.path);
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    fixture_expect(data_stream_get(stream, &batch), i == 0 ? CORE_ERR_NOT_FOUND : CORE_ERR_MISMATCH,
                   "image-00000.h5", "attempt 1");
    data_stream_close(stream);
    data_set_close(set);
  }
  fixture_remove(s.root);
}

/* Written in place, under the descriptor that a stream holds, in a form without checksums. */
static void changed_while_open(void **state) {
  (void)state;
  const scene s = scene_create();
  const char *const names[] = {"image"};
  const data_range range = {0, 1};
  for (int chunked = 0; chunked < 2; ++chunked) {
    /* One sample a batch and one batch ahead: the last ones are read after the first was delivered. */
    const data_stream_options options = {
        .batch = 1, .micro_batches = 1, .range = &range, .queue = 1, .cache_bytes = 1};
    craft c = craft_sound();
    data_set *set = NULL;
    data_stream *stream = NULL;
    data_batch *batch = NULL;
    struct stat about;
    static int64_t id[400], offset[401];
    static float latent[400 * 256];
    for (int i = 0; i <= 400; ++i) offset[i] = i;
    for (int i = 0; i < 400; ++i) id[i] = i;
    c.samples = c.rows = 400;
    c.width = c.columns = 256;
    c.chunk_rows = 1;
    c.contiguous = chunked == 0;
    c.id = id;
    c.offset = offset;
    c.label = NULL;
    c.latent = latent;
    craft_write(&c, s.path);
    assert_int_equal(data_set_open(s.root, "train", names, 1, &set), CORE_OK);
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    assert_int_equal(data_stream_get(stream, &batch), CORE_OK);
    data_stream_put(stream, batch);
    const int fd = open(s.path, O_WRONLY);
    assert_int_equal(fstat(fd, &about), 0);
    const float other = 5;
    assert_int_equal(pwrite(fd, &other, sizeof other, about.st_size - 4096), sizeof other);
    assert_int_equal(close(fd), 0);
    core_status status = CORE_OK;
    int got = 1;
    while (status == CORE_OK && (status = data_stream_get(stream, &batch)) == CORE_OK && batch != NULL &&
           ++got)
      data_stream_put(stream, batch);
    fixture_expect(status, CORE_ERR_MISMATCH, "image-00000.h5", "was changed while it was in use");
    assert_in_range(got, 1, 399);
    data_stream_close(stream);
    data_set_close(set);
  }
  fixture_remove(s.root);
}

static void *restore_file(void *path) {
  char good[330];
  (void)snprintf(good, sizeof good, "%s.good", (const char *)path);
  core_clock_sleep(0.1);
  return rename(good, path) == 0 ? path : NULL;
}

/* A read that fails for a while is repeated; one that fails for good ends with the reason. */
static void failing_reads(void **state) {
  (void)state;
  const scene s = scene_create();
  const char *const names[] = {"image"};
  const data_range range = {0, 4};
  const data_stream_options options = {.batch = 4, .micro_batches = 1, .range = &range};
  for (int heals = 0; heals < 2; ++heals) {
    char good[330];
    const craft c = craft_sound();
    data_set *set = NULL;
    data_stream *stream = NULL;
    data_batch *batch = NULL;
    pthread_t thread;
    void *restored = NULL;
    (void)snprintf(good, sizeof good, "%s.good", s.path);
    craft_write(&c, s.path);
    assert_int_equal(data_set_open(s.root, "train", names, 1, &set), CORE_OK);
    assert_int_equal(rename(s.path, good), 0);
    assert_int_equal(symlink(s.path, s.path), 0); /* opening it fails with ELOOP */
    assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
    if (heals) assert_int_equal(pthread_create(&thread, NULL, restore_file, (void *)(uintptr_t)s.path), 0);
    const core_status status = data_stream_get(stream, &batch);
    if (heals) assert_int_equal(pthread_join(thread, &restored), 0);
    if (heals) assert_non_null(restored);
    if (heals)
      assert_int_equal(status, CORE_OK);
    else
      fixture_expect(status, CORE_ERR_IO, "attempt 4", s.path);
    data_stream_close(stream);
    data_set_close(set);
    if (!heals) assert_int_equal(unlink(s.path), 0);
  }
  fixture_remove(s.root);
}

/* The n-th read of the shard fails, n = 1, 2, ... until a run meets no failure: once is healed by reading
 * again; for good it is an error that names shard, chunk and attempts. Neither gives other latents. */
static void failing_reads_of_chunks(void **state) {
  (void)state;
  const scene s = scene_create();
  const char *const names[] = {"image"};
  const data_range range = {0, 4};
  craft c = craft_sound();
  c.chunk_rows = 2;
  c.gzip = true;
  craft_write(&c, s.path);
  for (int sticky = 0; sticky < 2; ++sticky) {
    bool met = true;
    for (int64_t n = 1; met; ++n) {
      core_file_fault fault = {.at = n, .error = EIO, .sticky = sticky};
      data_set *set = NULL;
      data_stream *stream = NULL;
      data_batch *batch = NULL;
      const data_stream_options options = {.batch = 4, .micro_batches = 1, .range = &range};
      assert_int_equal(data_set_open(s.root, "train", names, 1, &set), CORE_OK);
      (void)snprintf(fault.containing, sizeof fault.containing, "image-00000.h5");
      core_file_inject(&fault);
      assert_int_equal(data_stream_open(set, &options, &stream), CORE_OK);
      const core_status status = data_stream_get(stream, &batch);
      met = core_file_operations() >= n;
      if (sticky && met)
        fixture_expect(status, CORE_ERR_IO, "attempt 4", "image-00000.h5");
      else
        assert_int_equal(status, CORE_OK);
      if (status == CORE_OK)
        for (int i = 0; i < 18; ++i)
          assert_true(fixture_stored(CORE_FLOAT32, batch->part[0].latent, i) == c.latent[i]);
      data_stream_close(stream);
      core_file_inject(NULL);
      data_set_close(set);
      assert_true(n < 100);
      if (n == 1) assert_true(met); /* the gate is in use */
    }
  }
  fixture_remove(s.root);
}

/* A user block before the HDF5 file: what addresses count from depends on the library. */
static void user_block(void **state) {
  (void)state;
  const scene s = scene_create();
  char moved[340], bytes[8192];
  const craft c = craft_sound();
  craft_write(&c, s.path);
  (void)snprintf(moved, sizeof moved, "%s.moved", s.path);
  FILE *from = fopen(s.path, "rb"), *to = fopen(moved, "wb");
  memset(bytes, 0, sizeof bytes);
  assert_int_equal(fwrite(bytes, 1, 512, to), 512);
  for (size_t count; (count = fread(bytes, 1, sizeof bytes, from)) > 0;)
    assert_int_equal(fwrite(bytes, 1, count, to), count);
  (void)fclose(from);
  (void)fclose(to);
  assert_int_equal(rename(moved, s.path), 0);
  fixture_expect(read_all(s.root), CORE_ERR_UNSUPPORTED, "user block of 512 bytes", s.path);
  fixture_remove(s.root);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(attributes),
                                     cmocka_unit_test(small_datasets),
                                     cmocka_unit_test(latents),
                                     cmocka_unit_test(chunks),
                                     cmocka_unit_test(truncated_files),
                                     cmocka_unit_test(other_files),
                                     cmocka_unit_test(flipped_byte_in_a_chunk),
                                     cmocka_unit_test(batches_before_the_damage),
                                     cmocka_unit_test(changed_under_way),
                                     cmocka_unit_test(changed_while_open),
                                     cmocka_unit_test(failing_reads),
                                     cmocka_unit_test(failing_reads_of_chunks),
                                     cmocka_unit_test(user_block)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
