#include "data_fixture.h"

#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/log.h"
#include "core/random.h"

void fixture_directory(char path[256]) {
  (void)snprintf(path, 256, "%s/data-test-XXXXXX", ANTIPHON_TEMPORARY);
  assert_non_null(mkdtemp(path));
}

static int remove_entry(const char *path, const struct stat *about, int kind, struct FTW *where) {
  (void)about;
  (void)kind;
  (void)where;
  return remove(path);
}

void fixture_remove(const char *path) {
  (void)nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

fixture fixture_small(void) {
  core_log_set_level(CORE_LOG_ERROR); /* small caches are meant here */
  static const char *const names[3] = {"image", "text", "speech"};
  fixture f = {.modalities = 3,
               .names = names,
               .width = {12, 7, 33},
               .most_rows = 9,
               .dtype = CORE_FLOAT16,
               .filter = DATA_FILTER_ZSTD,
               .chunk_bytes = 1024,
               .shards = 3,
               .shard_samples = 40};
  fixture_directory(f.directory);
  return f;
}

uint64_t fixture_id(int64_t index) {
  return (uint64_t)index * 7919 % 1000003 + 11;
}

int64_t fixture_rows(const fixture *f, int32_t m, uint64_t id) {
  const uint64_t draw = core_random_u64(3, (uint64_t)m, id);
  return draw % 5 == 0 ? 0 : (int64_t)(draw / 5 % (uint64_t)f->most_rows) + 1;
}

int32_t fixture_label(uint64_t id) {
  return id % 3 == 0 ? -1 : (int32_t)(id % 17);
}

float fixture_value(int32_t m, uint64_t id, int64_t row, int64_t feature) {
  return (float)((int64_t)((id * 131 + (uint64_t)row * 17 + (uint64_t)feature * 7 + (uint64_t)m * 29) % 255) -
                 127) /
         16;
}

static int64_t samples_of(const fixture *f, int32_t k) {
  return k == f->shards - 1 && k > 0 ? f->shard_samples / 2 : f->shard_samples;
}

int64_t fixture_samples(const fixture *f) {
  int64_t samples = 0;
  for (int32_t k = 0; k < f->shards; ++k) samples += samples_of(f, k);
  return samples;
}

static void write_sample(const fixture *f, data_writer *writer, int32_t m, uint64_t id) {
  char key[32];
  const int64_t rows = fixture_rows(f, m, id), width = f->width[m];
  float *latent = malloc((size_t)(rows * width + 1) * sizeof *latent);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) latent[r * width + c] = fixture_value(m, id, r, c);
  (void)snprintf(key, sizeof key, "thing %llu", (unsigned long long)id);
  const int32_t token[2] = {1, (int32_t)id};
  const data_sample sample = {.id = id,
                              .latent = latent,
                              .rows = rows,
                              .label = fixture_label(id),
                              .key = key,
                              .prompt = token,
                              .prompt_count = (int64_t)(id % 3)};
  assert_int_equal(data_writer_add(writer, &sample), CORE_OK);
  free(latent);
}

void fixture_write(const fixture *f, const char *split) {
  char directory[300];
  (void)snprintf(directory, sizeof directory, "%s/%s", f->directory, split);
  for (int32_t m = 0; m < f->modalities; ++m) {
    int64_t index = 0;
    for (int32_t k = 0; k < f->shards; ++k) {
      data_writer *writer = NULL;
      const data_writer_options options = {.directory = directory,
                                           .modality = f->names[m],
                                           .encoder = "known values",
                                           .dtype = f->dtype,
                                           .width = f->width[m],
                                           .shard = k,
                                           .filter = f->filter,
                                           .chunk_bytes = f->chunk_bytes};
      assert_int_equal(data_writer_open(&options, &writer), CORE_OK);
      for (int64_t i = 0; i < samples_of(f, k); ++i) write_sample(f, writer, m, fixture_id(index++));
      assert_int_equal(data_writer_close(writer), CORE_OK);
    }
  }
}

data_set *fixture_open(const fixture *f, const char *split) {
  data_set *set = NULL;
  const core_status status = data_set_open(f->directory, split, f->names, f->modalities, &set);
  if (status != CORE_OK) print_error("%s\n", core_error_get()->message);
  assert_int_equal(status, CORE_OK);
  return set;
}

float fixture_stored(core_dtype dtype, const void *values, int64_t index) {
  if (dtype == CORE_FLOAT32) return ((const float *)values)[index];
  const uint16_t bits = ((const uint16_t *)values)[index];
  return dtype == CORE_FLOAT16 ? core_float_from_half(bits) : core_float_from_bfloat(bits);
}

static void check_part(const fixture *f, int32_t m, const data_part *part, const int64_t *order) {
  assert_int_equal(part->width, f->width[m]);
  assert_int_equal(part->dtype, f->dtype);
  assert_int_equal(part->offset[0], 0);
  for (int64_t i = part->lo; i < part->hi; ++i) {
    const uint64_t id = fixture_id(order[i]);
    const int64_t first = part->offset[i - part->lo], rows = part->offset[i - part->lo + 1] - first;
    int64_t wrong = 0;
    assert_int_equal(rows, fixture_rows(f, m, id));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < part->width; ++c)
        wrong += fixture_stored(part->dtype, part->latent, (first + r) * part->width + c) !=
                 fixture_value(m, id, r, c);
    assert_int_equal(wrong, 0);
  }
}

void fixture_check_batch(const fixture *f, const data_batch *batch, const int64_t *order) {
  for (int64_t i = 0; i < batch->samples; ++i) {
    const uint64_t id = fixture_id(order[i]);
    assert_int_equal(batch->id[i], id);
    assert_int_equal(batch->label[i], fixture_label(id));
    for (int32_t m = 0; m < batch->modalities; ++m)
      assert_int_equal(batch->present[m * batch->samples + i], fixture_rows(f, m, id) > 0);
  }
  for (int32_t micro = 0; micro < batch->micro_batches; ++micro)
    for (int32_t m = 0; m < batch->modalities; ++m)
      check_part(f, m, &batch->part[micro * batch->modalities + m], order);
}

void fixture_expect(core_status status, core_status code, const char *first, const char *second) {
  const char *message = core_error_get()->message;
  const char *texts[2] = {first, second};
  if (status != code) print_error("got %s: %s\n", core_status_name(status), message);
  assert_int_equal(status, code);
  for (int i = 0; i < 2; ++i) {
    if (texts[i] == NULL) continue;
    if (strstr(message, texts[i]) == NULL) print_error("\"%s\" is not in: %s\n", texts[i], message);
    assert_non_null(strstr(message, texts[i]));
  }
}
