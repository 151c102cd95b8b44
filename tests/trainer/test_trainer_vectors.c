/* The vectors file: round trip, taking up where a start ended, damage of every byte and at every length, and
 * headers that lie with a right checksum. */
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "core/random.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/serve/search.h"
#include "trainer/serve/vectors_impl.h"

enum { ROWS = 23, WIDTH = 6, BLOCKS = 5, KEY = 7 };
static const uint64_t block_row[BLOCKS + 1] = {0, 6, 12, 12, 18, 23}; /* the third has none */

typedef struct scene {
  char directory[64], path[96], part[104];
  uint64_t id[ROWS];
  int32_t label[ROWS];
  char key[ROWS * KEY];
  float value[ROWS * WIDTH];
  train_vectors_plan plan;
} scene;

static void scene_make(scene *s, core_dtype dtype) {
  memset(s, 0, sizeof *s);
  snprintf(s->directory, sizeof s->directory, "/tmp/antiphon-vectors-XXXXXX");
  assert_non_null(mkdtemp(s->directory));
  snprintf(s->path, sizeof s->path, "%s/v.h5", s->directory);
  snprintf(s->part, sizeof s->part, "%s.part", s->path);
  for (int i = 0; i < ROWS; i++) {
    char text[16];
    s->id[i] = 100 + 7 * (uint64_t)i;
    s->label[i] = i % 3 - 1;
    snprintf(text, sizeof text, "key-%d", i);
    memcpy(s->key + i * KEY, text, strlen(text));
    s->value[i * WIDTH + i % WIDTH] = i % 2 ? 0.75F : -0.5F; /* exact in float16 */
  }
  s->plan = (train_vectors_plan){.about = {.checkpoint = 0x1234abcd,
                                           .step = 77,
                                           .kind = TRAIN_VECTORS_KEY,
                                           .modality = "text",
                                           .dtype = dtype,
                                           .rows = ROWS,
                                           .width = WIDTH},
                                 .identity = 42,
                                 .samples = 30,
                                 .block_samples = 6,
                                 .blocks = BLOCKS,
                                 .block_row = block_row,
                                 .id = s->id,
                                 .label = s->label,
                                 .key_bytes = KEY};
}

static void scene_remove(scene *s) {
  test_remove_tree(s->directory);
}

static void put(const scene *s, const train_vectors_writer *writer, int64_t block) {
  uint16_t half[ROWS * WIDTH];
  const float *from = s->value + block_row[block] * WIDTH;
  int64_t numbers = (int64_t)(block_row[block + 1] - block_row[block]) * WIDTH;
  for (int64_t i = 0; i < numbers; i++) half[i] = core_half_from_float(from[i]);
  assert_ok(
      train_vectors_put(writer, block, s->plan.about.dtype == CORE_FLOAT16 ? (const void *)half : from));
}

/* Whole, its blocks put in any order and by two writers. */
static void write_file(scene *s) {
  static const int64_t order[BLOCKS] = {3, 0, 4, 2, 1};
  train_vectors_writer *writer = NULL, *other = NULL;
  train_vectors_state state;
  assert_ok(train_vectors_begin(s->path, &s->plan, &state, &writer));
  assert_int_equal(state, TRAIN_VECTORS_FRESH);
  assert_ok(train_vectors_attach(s->path, &other));
  assert_ok(train_vectors_put_keys(writer, 0, 10, s->key));
  assert_ok(train_vectors_put_keys(writer, 10, ROWS - 10, s->key + 10 * KEY));
  for (int i = 0; i < BLOCKS; i++) put(s, i % 2 ? other : writer, order[i]);
  assert_ok(train_vectors_sync(other));
  train_vectors_leave(other);
  assert_ok(train_vectors_publish(writer));
  train_vectors_leave(writer);
}

static void compare_rows(const scene *s, const train_vectors *v) {
  char bytes[ROWS * WIDTH * 4];
  assert_ok(train_vectors_read(v, 0, BLOCKS, bytes));
  for (int i = 0; i < ROWS * WIDTH; i++) {
    float got = s->plan.about.dtype == CORE_FLOAT16 ? core_float_from_half(((uint16_t *)(void *)bytes)[i])
                                                    : ((float *)(void *)bytes)[i];
    if (got != s->value[i]) fail_msg("value %d: expected %g, got %g", i, (double)s->value[i], (double)got);
  }
}

static void round_trip(void **state) {
  (void)state;
  static const core_dtype dtypes[] = {CORE_FLOAT32, CORE_FLOAT16};
  for (int d = 0; d < 2; d++) {
    scene s;
    train_vectors *v = NULL;
    char key[TRAIN_MOST_KEY + 1];
    scene_make(&s, dtypes[d]);
    write_file(&s);
    assert_false(core_file_exists(s.part));
    assert_ok(train_vectors_open(s.path, &v));
    const train_vectors_about *about = train_vectors_info(v);
    assert_memory_equal(about, &s.plan.about, sizeof *about);
    assert_memory_equal(train_vectors_ids(v), s.id, sizeof s.id);
    assert_memory_equal(train_vectors_labels(v), s.label, sizeof s.label);
    assert_int_equal(train_vectors_blocks(v), BLOCKS);
    for (int b = 0; b <= BLOCKS; b++) assert_int_equal(train_vectors_block_row(v, b), block_row[b]);
    compare_rows(&s, v);
    for (int i = 0; i < ROWS; i++) {
      char text[16];
      snprintf(text, sizeof text, "key-%d", i);
      assert_ok(train_vectors_key(v, i, key));
      assert_string_equal(key, text);
    }
    train_vectors_close(v);
    scene_remove(&s);
  }
}

/* No keys, no labels, no vectors. */
static void little(void **state) {
  (void)state;
  scene s;
  train_vectors_writer *writer = NULL;
  train_vectors_state found;
  train_vectors *v = NULL;
  train_gallery gallery;
  uint64_t rows[2] = {0, 0};
  char key[TRAIN_MOST_KEY + 1];
  scene_make(&s, CORE_FLOAT32);
  s.plan.about.rows = 0;
  s.plan.label = NULL;
  s.plan.key_bytes = 0;
  s.plan.blocks = 1;
  s.plan.block_row = rows;
  assert_ok(train_vectors_begin(s.path, &s.plan, &found, &writer));
  assert_error(train_vectors_publish(writer), CORE_ERR_INTERNAL, "1 of 1 blocks were not written");
  assert_ok(train_vectors_put(writer, 0, s.value));
  assert_ok(train_vectors_publish(writer));
  train_vectors_leave(writer);
  assert_ok(train_vectors_open(s.path, &v));
  assert_null(train_vectors_labels(v));
  assert_ok(train_vectors_key(v, 0, key));
  assert_string_equal(key, "");
  assert_error(train_gallery_of_file(v, &gallery), CORE_ERR_FORMAT, "empty gallery");
  train_vectors_close(v);
  scene_remove(&s);
}

static void queries_are_no_gallery(void **state) {
  (void)state;
  scene s;
  train_vectors *v = NULL;
  train_gallery gallery;
  scene_make(&s, CORE_FLOAT32);
  s.plan.about.kind = TRAIN_VECTORS_QUERY;
  snprintf(s.plan.about.toward, CORE_NAME, "image");
  write_file(&s);
  assert_ok(train_vectors_open(s.path, &v));
  assert_error(train_gallery_of_file(v, &gallery), CORE_ERR_FORMAT, "holds queries of text:image");
  train_vectors_close(v);
  scene_remove(&s);
}

/* ---- as a gallery ---- */

enum { MANY = 30000, WIDE = 48, BLOCK = 500, ASKED = 70, BEST = 9 };

/* Vectors of which one in seven comes twice, in a file of many blocks. */
static float *write_many(scene *s, uint64_t *id, uint64_t *rows) {
  train_vectors_writer *writer = NULL;
  train_vectors_state found;
  float *value = malloc((size_t)MANY * WIDE * sizeof *value);
  assert_non_null(value);
  for (int64_t i = 0; i < MANY; i++) {
    double square = 0;
    for (int64_t c = 0; c < WIDE; c++) {
      value[i * WIDE + c] = (float)core_random_normal(1, (uint64_t)(i % 7 ? i : i / 14), (uint64_t)c);
      square += (double)value[i * WIDE + c] * (double)value[i * WIDE + c];
    }
    for (int64_t c = 0; c < WIDE; c++) value[i * WIDE + c] = (float)(value[i * WIDE + c] / sqrt(square));
    id[i] = (uint64_t)(i * 7919 % MANY);
  }
  for (int64_t b = 0; b <= MANY / BLOCK; b++) rows[b] = (uint64_t)(b * BLOCK);
  s->plan.about.rows = s->plan.samples = MANY;
  s->plan.about.width = WIDE;
  s->plan.block_samples = BLOCK;
  s->plan.blocks = MANY / BLOCK;
  s->plan.block_row = rows;
  s->plan.id = id;
  s->plan.label = NULL;
  s->plan.key_bytes = 0;
  assert_ok(train_vectors_begin(s->path, &s->plan, &found, &writer));
  for (int64_t b = 0; b < MANY / BLOCK; b++)
    assert_ok(train_vectors_put(writer, b, value + b * BLOCK * WIDE));
  assert_ok(train_vectors_publish(writer));
  train_vectors_leave(writer);
  return value;
}

static core_status ask(const train_gallery *gallery, const float *query, int32_t threads, train_hit *hit) {
  train_search *engine = NULL;
  train_search_options options = {.threads = threads, .k = BEST, .batch = 16};
  assert_ok(train_search_create(gallery, &options, &engine));
  core_status status = train_search_run(engine, query, ASKED, hit);
  train_search_destroy(engine);
  return status;
}

/* The file in many pieces, the file loaded, and the numbers in memory give one answer. */
static void gallery_in_a_file(void **state) {
  (void)state;
  static uint64_t id[MANY], rows[MANY / BLOCK + 1];
  static train_hit expected[ASKED * BEST], got[ASKED * BEST];
  scene s;
  train_vectors *v = NULL;
  train_gallery gallery;
  scene_make(&s, CORE_FLOAT32);
  float *value = write_many(&s, id, rows);
  const float *query = value + 14 * WIDE;
  gallery = (train_gallery){.memory = value, .dtype = CORE_FLOAT32, .rows = MANY, .width = WIDE, .id = id};
  assert_ok(ask(&gallery, query, 1, expected));
  assert_true(expected[0].score > 0.999999 && expected[BEST - 1].score < 0.9);
  assert_ok(train_vectors_open(s.path, &v));
  for (int32_t threads = 1; threads <= 3; threads++) {
    assert_ok(train_gallery_of_file(v, &gallery));
    memset(got, 0, sizeof got);
    assert_ok(ask(&gallery, query, threads, got));
    assert_memory_equal(got, expected, sizeof got);
    assert_ok(train_gallery_load(v, threads, &gallery));
    memset(got, 0, sizeof got);
    assert_ok(ask(&gallery, query, threads, got));
    assert_memory_equal(got, expected, sizeof got);
    train_gallery_unload(&gallery);
  }
  train_vectors_close(v);
  free(value);
  scene_remove(&s);
}

/* Right checksums, wrong vectors. */
static void vectors_that_cannot_be(void **state) {
  (void)state;
  static const float values[] = {1.01F, NAN, INFINITY, -2};
  for (size_t n = 0; n < sizeof values / sizeof *values; n++) {
    scene s;
    train_vectors *v = NULL;
    train_gallery gallery;
    float query[ASKED * WIDTH] = {0};
    train_hit hit[ASKED * BEST];
    scene_make(&s, CORE_FLOAT32);
    s.value[20 * WIDTH + 3] = values[n];
    write_file(&s);
    assert_ok(train_vectors_open(s.path, &v));
    assert_ok(train_gallery_of_file(v, &gallery));
    assert_error(ask(&gallery, query, 2, hit), CORE_ERR_CORRUPT, "vector 20 is not of unit length");
    assert_error(train_gallery_load(v, 2, &gallery), CORE_ERR_CORRUPT, "vector 20 is not of unit length");
    train_vectors_close(v);
    scene_remove(&s);
  }
}

static void flip(const char *path, int64_t at) {
  char byte;
  int fd = open(path, O_RDWR);
  assert_true(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
  byte = (char)~byte;
  assert_true(pwrite(fd, &byte, 1, (off_t)at) == 1);
  close(fd);
}

static void resume(void **state) {
  (void)state;
  scene s;
  train_vectors_writer *writer = NULL, *second = NULL;
  train_vectors_state found;
  train_vectors_header header;
  train_vectors *v = NULL;
  uint8_t done[BLOCKS];
  scene_make(&s, CORE_FLOAT32);
  assert_ok(train_vectors_begin(s.path, &s.plan, &found, &writer));
  put(&s, writer, 0);
  put(&s, writer, 3);
  put(&s, writer, 4);
  assert_error(train_vectors_publish(writer), CORE_ERR_INTERNAL, "2 of 5 blocks were not written");
  assert_error(train_vectors_begin(s.path, &s.plan, &found, &second), CORE_ERR_IO, "another process");
  assert_error(train_vectors_open(s.part, &v), CORE_ERR_FORMAT, "is not finished");
  train_vectors_leave(writer);
  int fd = open(s.part, O_RDONLY); /* the last byte of block 3 did not reach the disk */
  assert_ok(train_vectors_header_read_priv(fd, s.part, &header));
  close(fd);
  flip(s.part, header.vectors_at + 18 * WIDTH * 4 - 1);
  s.plan.identity++;
  assert_error(train_vectors_begin(s.path, &s.plan, &found, &writer), CORE_ERR_MISMATCH, "something else");
  s.plan.identity--;
  assert_ok(train_vectors_begin(s.path, &s.plan, &found, &writer));
  assert_int_equal(found, TRAIN_VECTORS_RESUMED);
  assert_ok(train_vectors_done(writer, done));
  static const uint8_t expected[BLOCKS] = {1, 0, 0, 0, 1};
  assert_memory_equal(done, expected, BLOCKS);
  assert_ok(train_vectors_put_keys(writer, 0, ROWS, s.key));
  for (int b = 0; b < BLOCKS; b++)
    if (!done[b]) put(&s, writer, b);
  assert_ok(train_vectors_publish(writer));
  train_vectors_leave(writer);
  assert_ok(train_vectors_open(s.path, &v));
  compare_rows(&s, v);
  train_vectors_close(v);
  writer = (train_vectors_writer *)&s;
  assert_ok(train_vectors_begin(s.path, &s.plan, &found, &writer));
  assert_int_equal(found, TRAIN_VECTORS_DONE);
  assert_null(writer);
  s.plan.identity++;
  assert_error(train_vectors_begin(s.path, &s.plan, &found, &writer), CORE_ERR_MISMATCH, "something else");
  scene_remove(&s);
}

/* Opens and reads everything; what comes without an error is what was written. */
static bool reads_sound(const scene *s, const char *path) {
  train_vectors *v = NULL;
  char bytes[ROWS * WIDTH * 4], key[TRAIN_MOST_KEY + 1];
  bool sound = train_vectors_open(path, &v) == CORE_OK;
  if (sound) sound = train_vectors_read(v, 0, BLOCKS, bytes) == CORE_OK;
  if (sound) {
    assert_memory_equal(bytes, s->value, sizeof s->value);
    assert_memory_equal(train_vectors_ids(v), s->id, sizeof s->id);
    assert_memory_equal(train_vectors_labels(v), s->label, sizeof s->label);
    assert_memory_equal(train_vectors_info(v), &s->plan.about, sizeof s->plan.about);
    for (int i = 0; i < ROWS; i++) {
      assert_ok(train_vectors_key(v, i, key));
      assert_int_equal(strncmp(key, s->key + i * KEY, KEY), 0);
    }
  }
  train_vectors_close(v);
  return sound;
}

/* Every byte inverted: an error, or one of those that belong to HDF5 alone. */
static void damage(void **state) {
  (void)state;
  scene s;
  int64_t size = 0, found = 0, ours = 0;
  train_vectors_header header;
  train_vectors_section section[TRAIN_VECTORS_SECTIONS];
  scene_make(&s, CORE_FLOAT32);
  write_file(&s);
  assert_ok(core_file_size(s.path, &size));
  int fd = open(s.path, O_RDONLY);
  assert_ok(train_vectors_header_read_priv(fd, s.path, &header));
  assert_ok(train_vectors_sections_priv(&header, s.path, section));
  close(fd);
  ours = (int64_t)sizeof header;
  for (int i = 0; i < TRAIN_VECTORS_SECTIONS; i++) ours += section[i].bytes;
  assert_true(reads_sound(&s, s.path));
  for (int64_t at = 0; at < size; at++) {
    flip(s.path, at);
    found += !reads_sound(&s, s.path);
    flip(s.path, at);
  }
  assert_int_equal(found, ours);
  assert_true(reads_sound(&s, s.path));
  for (int64_t length = size - 1; length >= 0; length -= length > 64 ? 13 : 1) {
    assert_int_equal(truncate(s.path, (off_t)length), 0);
    bool whole = length >= section[0].at + section[0].bytes; /* the vectors come last */
    if (reads_sound(&s, s.path) != whole) fail_msg("cut to %lld bytes", (long long)length);
  }
  scene_remove(&s);
}

/* Numbers that overflow, point outside or lie, under a checksum that is right. */
static void lies(void **state) {
  (void)state;
  scene s;
  train_vectors_header sound, header;
  scene_make(&s, CORE_FLOAT32);
  write_file(&s);
  int fd = open(s.path, O_RDWR);
  assert_ok(train_vectors_header_read_priv(fd, s.path, &sound));
  static const int64_t values[] = {-1,        1,         INT64_MAX, INT64_MIN,          INT64_MAX / 8,
                                   1LL << 40, 1LL << 61, 0,         INT64_MAX / 24 + 1, 4096};
  int64_t *const fields[] = {&header.samples,      &header.block_samples, &header.blocks,
                             &header.rows,         &header.width,         &header.vectors_at,
                             &header.id_at,        &header.label_at,      &header.key_at,
                             &header.block_row_at, &header.block_hash_at, &header.key_bytes};
  for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
    for (size_t n = 0; n < sizeof values / sizeof *values; n++) {
      header = sound;
      *fields[f] = values[n];
      assert_ok(train_vectors_header_write_priv(fd, s.path, &header));
      train_vectors *v = NULL;
      char *bytes = malloc(ROWS * WIDTH * 4);
      if (train_vectors_open(s.path, &v) == CORE_OK) {
        assert_true(train_vectors_info(v)->rows == ROWS && train_vectors_info(v)->width <= WIDTH);
        core_status status = train_vectors_read(v, 0, train_vectors_blocks(v), bytes);
        assert_true(status == CORE_OK || status == CORE_ERR_CORRUPT);
      }
      free(bytes);
      train_vectors_close(v);
    }
  header = sound;
  header.dtype = CORE_FLOAT64;
  assert_ok(train_vectors_header_write_priv(fd, s.path, &header));
  train_vectors *v = NULL;
  assert_error(train_vectors_open(s.path, &v), CORE_ERR_CORRUPT, "dtype 3");
  close(fd);
  scene_remove(&s);
}

static void other_files(void **state) {
  (void)state;
  scene s;
  train_vectors *v = NULL;
  scene_make(&s, CORE_FLOAT32);
  assert_error(train_vectors_open(s.path, &v), CORE_ERR_NOT_FOUND, "there is no");
  assert_ok(core_file_replace(s.path, "text", 4));
  assert_error(train_vectors_open(s.path, &v), CORE_ERR_FORMAT, "no file of `antiphon embed`");
  char zero[5000] = {0};
  assert_ok(core_file_replace(s.path, zero, sizeof zero));
  assert_error(train_vectors_open(s.path, &v), CORE_ERR_FORMAT, "no file of `antiphon embed`");
  train_vectors_writer *writer = NULL;
  train_vectors_state found;
  assert_error(train_vectors_begin(s.path, &s.plan, &found, &writer), CORE_ERR_FORMAT, "is in the way");
  scene_remove(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(round_trip),
                                     cmocka_unit_test(little),
                                     cmocka_unit_test(queries_are_no_gallery),
                                     cmocka_unit_test(resume),
                                     cmocka_unit_test(damage),
                                     cmocka_unit_test(lies),
                                     cmocka_unit_test(other_files),
                                     cmocka_unit_test(gallery_in_a_file),
                                     cmocka_unit_test(vectors_that_cannot_be)};
  return cmocka_run_group_tests_name("vectors file", tests, NULL, NULL);
}
