/* Files of format version 1, kept under fixtures/, load for ever after with the values that were written: a
 * checkpoint by three ranks, and a latent set. A later version is refused by name and not passed over.
 *
 *   test_checkpoint_old                    the test
 *   test_checkpoint_old --write DIRECTORY  writes such files with the program as it is (3 ranks); never to be
 *                                          done again for version 1 */
#include "ckpt_fixture.h"

#define XXH_STATIC_LINKING_ONLY
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "core/file.h"
#include "data/data.h"

#define OLD_STEP "step-00000123"
static const char meta[] =
    "{\"step\":\"123\",\"note\":\"gr\\u00fc\xc3\x9f\",\"config\":\"model:\\n  width: 8\\n\"}";
static const uint64_t content = UINT64_C(0x04d81d890c30ecaf);

/* ---- the values, without anything of the program's: they must not change with it ---- */

static const spec specs[] = {
    {"parameter/weights", CORE_FLOAT32, 2, {3, 500}},
    {"parameter/large", CORE_FLOAT32, 1, {CKPT_CELL + 3}},
    {"parameter/half", CORE_FLOAT16, 1, {777}},
    {"parameter/brain", CORE_BFLOAT16, 3, {3, 7, 11}},
    {"adam_v/double", CORE_FLOAT64, 2, {16, 16}},
    {"adam_steps/w", CORE_INT64, 1, {1}},
    {"cells", CORE_UINT8, 1, {2 * CKPT_CELL + 5}},
    {"noise", CORE_UINT64, 4, {2, 3, 4, 5}},
    {"counts", CORE_INT32, 2, {1, 9}},
    {"scalar", CORE_FLOAT32, 0, {0}},
    {"empty", CORE_FLOAT32, 2, {4, 0}},
};
enum { SPECS = sizeof specs / sizeof *specs };

static uint64_t scramble(uint64_t x) {
  x = (x ^ x >> 31) * UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
  return x ^ x >> 32;
}

/* Bits of element i: a sign, few exponents and any mantissa; long runs in the large ones. */
static uint64_t bits_of(const spec *s, int64_t i) {
  uint64_t h = scramble((uint64_t)i + 1000003 * (uint64_t)s->name[0]), exponent = h >> 40 & 3;
  if (ckpt_shape_count(s->dtype, s->rank, s->shape) > CKPT_CELL) return (uint64_t)(i / 5000) * 0x01010101;
  switch (s->dtype) {
    case CORE_FLOAT32:
      return (h & 0x807fffff) | (118 + exponent) << 23;
    case CORE_FLOAT16:
      return (h & 0x83ff) | (9 + exponent) << 10;
    case CORE_BFLOAT16:
      return (h & 0x807f) | (118 + exponent) << 7;
    case CORE_FLOAT64:
      return (h & UINT64_C(0x800fffffffffffff)) | (1000 + exponent) << 52;
    default:
      return h;
  }
}

static void fill_old(const layout *l) {
  for (int32_t t = 0; t < l->count; t++) {
    size_t size = core_dtype_size(l->tensor[t].dtype);
    const spec *s = specs;
    while (strcmp(s->name, l->tensor[t].name) != 0) s++;
    for (int64_t i = 0; i < l->tensor[t].count; i++) {
      uint64_t bits = bits_of(s, l->tensor[t].first + i);
      memcpy((char *)l->tensor[t].data + (size_t)i * size, &bits, size);
    }
  }
}

static core_status write_checkpoint(comm_group *control, const char *directory) {
  layout l = layout_make(specs, SPECS, 1, 0, comm_rank(control), comm_size(control));
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  fill_old(&l);
  TRY(ckpt_writer_create(control, &options, l.tensor, l.count, &writer));
  TRY(ckpt_writer_begin(writer, 123, meta));
  TRY(ckpt_writer_commit(writer));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  return CORE_OK;
}

/* ---- the checkpoint ---- */

static void a_checkpoint_of_version_1_loads(void **state) {
  const fixture *f = *state;
  static const char path[] = ANTIPHON_SOURCE_DIR "/tests/checkpoint/fixtures/v1/" OLD_STEP;
  ckpt_reader *reader;
  EXPECT_OK(ckpt_verify(path, NULL));
  EXPECT_OK(ckpt_reader_open(f->control, path, &reader));
  assert_int_equal(ckpt_reader_step(reader), 123);
  assert_string_equal(ckpt_reader_meta(reader), meta);
  assert_true(ckpt_reader_content_hash(reader) == content);
  layout found = layout_full(specs, SPECS), expected = layout_full(specs, SPECS);
  fill_old(&expected);
  EXPECT_OK(ckpt_reader_load(reader, found.tensor, found.count));
  for (int32_t t = 0; t < found.count; t++) {
    size_t bytes = (size_t)found.tensor[t].count * core_dtype_size(found.tensor[t].dtype);
    if (bytes > 0) assert_memory_equal(found.tensor[t].data, expected.tensor[t].data, bytes);
  }
  ckpt_reader_close(reader);
  layout_free(&found);
  layout_free(&expected);
}

static void copy_old(const fixture *f, const char *name, char directory[CKPT_PATH],
                     char path[2 * CKPT_PATH]) {
  static const char *const file[] = {"manifest.json", "rank-00000.ckpt", "rank-00001.ckpt",
                                     "rank-00002.ckpt"};
  fixture_directory(f, name, directory);
  snprintf(path, 2 * CKPT_PATH, "%s/" OLD_STEP, directory);
  EXPECT_OK(core_file_make_directories(path));
  for (int i = 0; i < 4; i++) {
    char from[512], to[3 * CKPT_PATH];
    size_t count;
    snprintf(from, sizeof from, ANTIPHON_SOURCE_DIR "/tests/checkpoint/fixtures/v1/" OLD_STEP "/%s", file[i]);
    snprintf(to, sizeof to, "%s/%s", path, file[i]);
    char *bytes = slurp(from, &count);
    spit(to, bytes, count);
    free(bytes);
  }
}

/* Swapped, doubled, missing: each rank's file has its place. */
static void files_of_ranks_are_not_interchangeable(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], path[2 * CKPT_PATH], name[3][3 * CKPT_PATH];
  size_t count[3];
  char *bytes[3];
  copy_old(f, "ranks", directory, path);
  for (int i = 0; i < 3; i++) {
    snprintf(name[i], sizeof name[i], "%s/rank-0000%d.ckpt", path, i);
    bytes[i] = slurp(name[i], &count[i]);
  }
  EXPECT_OK(ckpt_verify(path, NULL));
  for (int i = 0; i < 3; i++) {
    int j = (i + 1) % 3;
    spit(name[i], bytes[j], count[j]); /* j's twice */
    assert_int_equal(ckpt_verify(path, NULL), CORE_ERR_CORRUPT);
    spit(name[j], bytes[i], count[i]); /* exchanged */
    assert_int_equal(ckpt_verify(path, NULL), CORE_ERR_CORRUPT);
    spit(name[j], bytes[j], count[j]);
    assert_int_equal(remove(name[i]), 0);
    assert_int_equal(ckpt_verify(path, NULL), CORE_ERR_CORRUPT);
    assert_non_null(strstr(core_error_get()->message, "is missing"));
    spit(name[i], bytes[i], count[i]);
  }
  EXPECT_OK(ckpt_verify(path, NULL));
  for (int i = 0; i < 3; i++) free(bytes[i]);
}

static void a_later_version_is_refused(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], path[2 * CKPT_PATH], file[3 * CKPT_PATH];
  size_t count, tail = strlen(",\n\"hash\":\"0123456789abcdef\"}\n");
  ckpt_reader *reader;
  copy_old(f, "later", directory, path);
  snprintf(file, sizeof file, "%s/manifest.json", path);
  char *text = slurp(file, &count), *version = strstr(text, "\"version\":1");
  assert_non_null(version);
  version[strlen("\"version\":")] = '2';
  snprintf(text + count - tail, tail + 1, ",\n\"hash\":\"%016llx\"}\n",
           (unsigned long long)XXH64(text, count - tail, 0));
  spit(file, text, count);
  assert_int_equal(ckpt_reader_open(f->control, path, &reader), CORE_ERR_UNSUPPORTED);
  assert_non_null(strstr(core_error_get()->message, "version 2, this program reads version 1"));
  /* Going back to an older one would throw away work without a word. */
  snprintf(path, sizeof path, "%s/step-00000007", directory);
  EXPECT_OK(core_file_make_directory(path));
  assert_int_equal(ckpt_reader_newest(f->control, directory, 1, &reader), CORE_ERR_UNSUPPORTED);
  free(text);
}

/* ---- the latent set: 2 shards of 3 samples, image in float32, text in bfloat16; sample 4 has no text ----
 */

static const struct {
  const char *name;
  core_dtype dtype;
  int64_t width;
  data_filter filter;
} modality[] = {{"image", CORE_FLOAT32, 6, DATA_FILTER_SHUFFLE_ZSTD},
                {"text", CORE_BFLOAT16, 3, DATA_FILTER_GZIP}};
enum { SAMPLES = 6, SHARD = 3 };

static int64_t rows_of(int m, int64_t sample) {
  return m == 1 && sample == 4 ? 0 : 1 + (sample + m) % 3;
}

/* Few bits, so that every type holds it exactly. */
static float latent_of(int m, int64_t sample, int64_t i) {
  return (float)((sample * 16 + m * 8 + i) % 97 - 48) / 8;
}

static core_status write_shard(const char *directory, int m, int32_t shard) {
  const data_writer_options options = {.directory = directory,
                                       .modality = modality[m].name,
                                       .encoder = "arithmetic",
                                       .dtype = modality[m].dtype,
                                       .width = modality[m].width,
                                       .shard = shard,
                                       .filter = modality[m].filter};
  data_writer *writer;
  float latent[64];
  TRY(data_writer_open(&options, &writer));
  for (int64_t s = shard * SHARD; s < (shard + 1) * SHARD; s++) {
    const data_sample sample = {
        .id = 100 + (uint64_t)s * 7, .latent = latent, .rows = rows_of(m, s), .label = (int32_t)(s % 2)};
    for (int64_t i = 0; i < sample.rows * modality[m].width; i++) latent[i] = latent_of(m, s, i);
    TRY(data_writer_add(writer, &sample));
  }
  TRY(data_writer_close(writer));
  return CORE_OK;
}

static core_status write_set(const char *directory) {
  for (int m = 0; m < 2; m++)
    for (int32_t shard = 0; shard < 2; shard++) TRY(write_shard(directory, m, shard));
  return CORE_OK;
}

static float value_at(const data_part *part, int64_t i) {
  if (part->dtype == CORE_FLOAT32) return ((const float *)part->latent)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)part->latent)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static void expect_part(const data_part *part, int m) {
  assert_true(part->dtype == modality[m].dtype && part->width == modality[m].width);
  for (int64_t s = 0; s < SAMPLES; s++) {
    assert_int_equal(part->offset[s + 1] - part->offset[s], rows_of(m, s));
    int64_t begin = part->offset[s] * part->width;
    for (int64_t i = 0; i < rows_of(m, s) * part->width; i++)
      assert_true(value_at(part, begin + i) == latent_of(m, s, i));
  }
}

static void a_latent_set_of_version_1_streams(void **state) {
  (void)state;
  const char *const names[] = {modality[0].name, modality[1].name};
  const data_range range[2] = {{0, SAMPLES}, {0, SAMPLES}};
  const data_stream_options options = {.batch = SAMPLES, .micro_batches = 1, .range = range};
  data_set *set;
  data_stream *stream;
  data_batch *batch;
  EXPECT_OK(data_set_open(ANTIPHON_SOURCE_DIR "/tests/checkpoint/fixtures/shards", "train", names, 2, &set));
  assert_int_equal(data_set_samples(set), SAMPLES);
  EXPECT_OK(data_stream_open(set, &options, &stream));
  EXPECT_OK(data_stream_get(stream, &batch));
  assert_non_null(batch);
  for (int64_t s = 0; s < SAMPLES; s++) {
    assert_true(batch->id[s] == 100 + (uint64_t)s * 7);
    assert_int_equal(batch->label[s], s % 2);
  }
  for (int m = 0; m < 2; m++) expect_part(&batch->part[m], m);
  data_stream_put(stream, batch);
  data_stream_close(stream);
  data_set_close(set);
}

static int write_all(const char *directory) {
  comm_world *world;
  char path[CKPT_PATH];
  if (comm_start(&(comm_options){0}, &world) != CORE_OK) return 1;
  comm_group *control = comm_control_group(world);
  snprintf(path, sizeof path, "%s/v1", directory);
  core_status status = write_checkpoint(control, path);
  snprintf(path, sizeof path, "%s/shards/train", directory);
  if (status == CORE_OK && comm_rank(control) == 0) status = write_set(path);
  if (status != CORE_OK) fprintf(stderr, "%s\n", core_error_get()->message);
  comm_finish(world);
  return status == CORE_OK ? 0 : 1;
}

int main(int count, char **argument) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_checkpoint_of_version_1_loads),
      cmocka_unit_test(files_of_ranks_are_not_interchangeable),
      cmocka_unit_test(a_later_version_is_refused),
      cmocka_unit_test(a_latent_set_of_version_1_streams),
  };
  if (count == 3 && strcmp(argument[1], "--write") == 0) return write_all(argument[2]);
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
