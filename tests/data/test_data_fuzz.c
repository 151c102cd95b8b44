/* Mutations of a small sound shard: every outcome is an error with a message, or (where the file has
 * checksums) the very same content; never a fault, never a hang. Seeds are fixed; the time is bounded. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/clock.h"
#include "core/random.h"
#include "data_craft.h"
#include "data_fixture.h"

enum { MUTATIONS = 4000, MOST_BYTES = 1 << 16 };
static const double most_seconds = 15;

typedef struct corpus {
  char root[256], path[320];
  uint8_t bytes[MOST_BYTES];
  int64_t count;
} corpus;

static void read_file(corpus *c) {
  const int fd = open(c->path, O_RDONLY);
  c->count = read(fd, c->bytes, sizeof c->bytes);
  (void)close(fd);
  assert_true(c->count > 0 && c->count < MOST_BYTES);
}

static void write_file(const corpus *c, const uint8_t *bytes, int64_t count) {
  const int fd = open(c->path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  assert_int_equal(write(fd, bytes, (size_t)count), count);
  (void)close(fd);
}

/* One hash of everything that a stream delivers. */
static core_status hash_all(const char *root, uint64_t *hash) {
  const char *const names[] = {"image"};
  data_set *set = NULL;
  data_stream *stream = NULL;
  core_status status = data_set_open(root, "train", names, 1, &set);
  if (status != CORE_OK) return status;
  const data_range range = {0, 4};
  const data_stream_options options = {
      .batch = 4, .micro_batches = 1, .range = &range, .cache_bytes = 1 << 20};
  status = data_stream_open(set, &options, &stream);
  *hash = data_set_fingerprint(set);
  for (data_batch *batch = NULL; status == CORE_OK;) {
    status = data_stream_get(stream, &batch);
    if (status != CORE_OK || batch == NULL) break;
    const data_part *part = &batch->part[0];
    const size_t bytes = (size_t)(part->offset[batch->samples] * part->width) * core_dtype_size(part->dtype);
    *hash = core_hash(part->latent, bytes, *hash);
    *hash = core_hash(batch->label, (size_t)batch->samples * sizeof *batch->label, *hash);
    *hash = core_hash(part->offset, (size_t)(batch->samples + 1) * sizeof *part->offset, *hash);
    data_stream_put(stream, batch);
  }
  core_error saved;
  core_error_save(&saved);
  data_stream_close(stream);
  data_set_close(set);
  return status == CORE_OK ? CORE_OK : core_error_restore(&saved);
}

/* Up to four changed bytes, or a cut. Returns the length. */
static int64_t mutate(const corpus *c, uint64_t seed, uint8_t *out) {
  memcpy(out, c->bytes, (size_t)c->count);
  const uint64_t kind = core_random_below(1, seed, 0, 8);
  if (kind == 0) return (int64_t)core_random_below(1, seed, 1, (uint64_t)c->count);
  const uint64_t changes = 1 + core_random_below(1, seed, 2, 4);
  for (uint64_t i = 0; i < changes; ++i) {
    const uint64_t at = core_random_below(1, seed, 3 + 3 * i, (uint64_t)c->count);
    const uint64_t how = core_random_below(1, seed, 4 + 3 * i, 3), draw = core_random_u64(1, seed, 5 + 3 * i);
    out[at] = how == 0          ? (uint8_t)(out[at] ^ 1u << draw % 8)
              : how == 1        ? (uint8_t)draw
              : (draw & 1) != 0 ? 0xff
                                : 0;
  }
  return c->count;
}

/* shape NULL: a shard by our own writer. */
static void write_shard(const corpus *c, const craft *shape) {
  if (shape != NULL) {
    craft_write(shape, c->path);
    return;
  }
  char train[300];
  data_writer *writer = NULL;
  (void)snprintf(train, sizeof train, "%s/train", c->root);
  const data_writer_options options = {.directory = train,
                                       .modality = "image",
                                       .encoder = "by hand",
                                       .dtype = CORE_FLOAT16,
                                       .width = 20,
                                       .filter = DATA_FILTER_SHUFFLE_ZSTD};
  float latent[60];
  assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
  for (uint64_t id = 0; id < 40; ++id) {
    for (int i = 0; i < 60; ++i) latent[i] = fixture_value(0, id, i, 0);
    const data_sample sample = {
        .id = 7 * id, .latent = latent, .rows = (int64_t)(id % 4), .label = (int32_t)(id % 5)};
    assert_int_equal(data_writer_add(writer, &sample), CORE_OK);
  }
  assert_int_equal(data_writer_close(writer), CORE_OK);
}

static void fuzz(const craft *shape, uint64_t seed) {
  corpus *c = calloc(1, sizeof *c);
  uint8_t *mutant = malloc(MOST_BYTES);
  char train[300];
  uint64_t sound = 0;
  int64_t same = 0, refused = 0, other = 0;
  fixture_directory(c->root);
  (void)snprintf(train, sizeof train, "%s/train", c->root);
  assert_int_equal(mkdir(train, 0777), 0);
  (void)snprintf(c->path, sizeof c->path, "%s/train/image-00000.h5", c->root);
  write_shard(c, shape);
  read_file(c);
  assert_int_equal(hash_all(c->root, &sound), CORE_OK);
  const double since = core_clock_now();
  for (uint64_t i = 0; i < MUTATIONS && core_clock_now() - since < most_seconds / 3; ++i) {
    const int64_t count = mutate(c, seed + i, mutant);
    uint64_t hash = 0;
    write_file(c, mutant, count);
    const core_status status = hash_all(c->root, &hash);
    if (status != CORE_OK) assert_true(core_error_get()->message[0] != '\0');
    refused += status != CORE_OK;
    same += status == CORE_OK && hash == sound;
    other += status == CORE_OK && hash != sound;
  }
  print_message("%lld refused, %lld the same, %lld different\n", (long long)refused, (long long)same,
                (long long)other);
  assert_true(refused > 50 && same > 10); /* the mutations do reach what matters */
  /* What our writer makes has checksums everywhere. Files of older structure have none for ids, labels and
   * metadata: there a changed value cannot be told from a value. */
  assert_true(shape == NULL ? other == 0 : other < (refused + same) / 20);
  fixture_remove(c->root);
  free(mutant);
  free(c);
}

static void compressed(void **state) {
  (void)state;
  craft c = craft_sound();
  c.gzip = c.shuffle = true;
  fuzz(&c, 1000);
}

static void chunked_in_columns(void **state) {
  (void)state;
  craft c = craft_sound();
  c.chunk_columns = 2;
  c.gzip = true;
  c.text = CRAFT_FIXED_NUL;
  fuzz(&c, 900000);
}

static void by_our_writer(void **state) {
  (void)state;
  fuzz(NULL, 5000000);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(compressed), cmocka_unit_test(chunked_in_columns),
                                     cmocka_unit_test(by_our_writer)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
