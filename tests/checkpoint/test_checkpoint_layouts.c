/* Round trips: every dtype and size, saved by one layout and loaded by others; what is refused. 1, 2, 4
 * ranks. */
#include "ckpt_fixture.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/file.h"

#define ALL all_specs, all_specs_count

static uint64_t save_layout(const fixture *f, const char *directory, int64_t cells, int32_t shift,
                            int32_t threads, int64_t step) {
  layout l = layout_make(ALL, cells, shift, f->rank, f->ranks);
  const ckpt_options options = {.directory = directory, .keep = 100, .threads = threads};
  ckpt_writer *writer;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  EXPECT_OK(save_step(f, writer, &l, ALL, step, 7));
  assert_false(ckpt_writer_busy(writer));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  ckpt_reader *reader;
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  assert_non_null(reader);
  assert_int_equal(ckpt_reader_step(reader), step);
  assert_string_equal(ckpt_reader_meta(reader), "{\"generation\": 7}");
  uint64_t hash = ckpt_reader_content_hash(reader);
  ckpt_reader_close(reader);
  return hash;
}

static void load_layout(const fixture *f, const char *directory, int64_t cells, int32_t shift,
                        int32_t threads) {
  layout l = layout_make(ALL, cells, shift, f->rank, f->ranks);
  ckpt_reader *reader;
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  EXPECT_OK(ckpt_reader_threads(reader, threads));
  EXPECT_OK(ckpt_reader_load(reader, l.tensor, l.count));
  assert_null(layout_difference(&l, ALL, 7));
  ckpt_reader_close(reader);
  layout_free(&l);
}

static void any_layout_loads_at_any_other(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "layouts", directory);
  const struct {
    int64_t cells;
    int32_t shift, threads;
  } cut[] = {{0, 0, 1}, {1, 0, 1}, {2, 1, 3}, {1, 3, 2}};
  uint64_t first = 0;
  for (int i = 0; i < 4; i++) {
    uint64_t hash = save_layout(f, directory, cut[i].cells, cut[i].shift, cut[i].threads, i + 1);
    if (i == 0) first = hash;
    assert_true(hash == first);
    for (int j = 0; j < 4; j++) load_layout(f, directory, cut[j].cells, cut[j].shift, cut[j].threads);
    assert_int_equal(load_newest(f, directory, ALL, 7, 7), i + 1);
  }
}

/* Stored blocks of every size between a few bytes and more than the writer gathers, one behind the other:
 * small ones are gathered, large ones are written by themselves, and the order in the file must be that of
 * the index. */
static void blocks_of_every_size_keep_their_order(void **state) {
  enum { SIZES = 48 };
  const fixture *f = *state;
  char directory[CKPT_PATH], names[SIZES][16];
  spec specs[SIZES];
  fixture_directory(f, "sizes", directory);
  for (int i = 0; i < SIZES; i++) {
    int64_t count =
        i % 3 == 0 ? 40 + i : 5000 * (1 + (i * 7) % SIZES); /* 20 KB to 960 KB of what does not compress */
    snprintf(names[i], sizeof names[i], "t%02d", i);
    specs[i] = (spec){names[i], CORE_INT32, 1, {count, 1, 1, 1}};
  }
  layout l = layout_make(specs, SIZES, 0, 0, f->rank, f->ranks);
  ckpt_options options = {.directory = directory};
  ckpt_writer *writer = NULL;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  EXPECT_OK(save_step(f, writer, &l, specs, SIZES, 1, 7));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  assert_int_equal(load_newest(f, directory, specs, SIZES, 7, 7), 1);
}

/* The same content must have the same hash at 1, 2 and 4 ranks: it is written down here once for all. */
static void content_hash_is_canonical(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "canonical", directory);
  assert_int_equal(save_layout(f, directory, 1, 0, 1, 1), UINT64_C(0x946921414fa9ae0f));
}

static void content_hash_changes_with_content(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  uint64_t hash[2];
  fixture_directory(f, "content", directory);
  layout l = layout_make(ALL, 1, 0, f->rank, f->ranks);
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  layout_fill(&l, ALL, 7);
  for (int i = 0; i < 2; i++) {
    ckpt_reader *reader;
    for (int32_t t = 0; t < l.count; t++) { /* one bit of one element of one tensor */
      if (strcmp(l.tensor[t].name, "i32") == 0) ((uint8_t *)l.tensor[t].data)[4] ^= (uint8_t)i;
    }
    EXPECT_OK(ckpt_writer_begin(writer, i, "{}"));
    EXPECT_OK(ckpt_writer_commit(writer));
    EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
    hash[i] = ckpt_reader_content_hash(reader);
    ckpt_reader_close(reader);
  }
  assert_true(hash[0] != hash[1]);
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

static void odd_ranges_load(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "odd", directory);
  (void)save_layout(f, directory, 2, 0, 1, 1);
  const int64_t cut[][2] = {
      {0, 1}, {13, CKPT_CELL}, {CKPT_CELL - 1, 2}, {5, 3 * CKPT_CELL + 12}, {CKPT_CELL, 0}};
  ckpt_reader *reader;
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
    layout l = layout_make(all_specs, 1, 0, 0, 0, 1);
    l.tensor[0].first = cut[i][0];
    l.tensor[0].count = cut[i][1];
    EXPECT_OK(ckpt_reader_load(reader, l.tensor, 1));
    assert_null(layout_difference(&l, ALL, 7));
    assert_int_equal(((uint8_t *)l.tensor[0].data)[cut[i][1] * 4], 0xa5); /* nothing beyond the range */
    layout_free(&l);
  }
  ckpt_reader_close(reader);
}

/* ---- what is refused, on all ranks alike ---- */

static core_status create_status(const fixture *f, const ckpt_tensor *tensor, int32_t count) {
  char directory[CKPT_PATH];
  fixture_directory(f, "refused", directory);
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  core_status status = ckpt_writer_create(f->control, &options, tensor, count, &writer);
  if (status == CORE_OK)
    ckpt_writer_destroy(writer);
  else
    assert_null(writer);
  return status;
}

static void expect_message(core_status status, core_status code, const char *part) {
  assert_int_equal(status, code);
  if (strstr(core_error_get()->message, part) == NULL) {
    fail_msg("\"%s\" does not contain \"%s\"", core_error_get()->message, part);
  }
}

static void coverage_is_checked(void **state) {
  const fixture *f = *state;
  layout l = layout_make(all_specs, 1, 1, 0, 0, 1); /* 4 ranges of one tensor, held by every rank */
  for (int32_t i = 0; i < l.count; i++) l.tensor[i].owner = f->rank == 0;
  EXPECT_OK(create_status(f, l.tensor, l.count));
  l.tensor[1].owner = false;
  expect_message(create_status(f, l.tensor, l.count), CORE_ERR_INTERNAL,
                 "f32/cells: elements 262144 to 524287 are covered by no rank");
  l.tensor[1].owner = f->rank == 0;
  l.tensor[3].owner = false;
  expect_message(create_status(f, l.tensor, l.count), CORE_ERR_INTERNAL, "covered by no rank");
  free(l.tensor[3].data);
  l.tensor[3] = l.tensor[1];
  expect_message(create_status(f, l.tensor, l.count), CORE_ERR_INTERNAL, "element 262144 is covered twice");
  for (int32_t i = 0; i < 3; i++) free(l.tensor[i].data);
  free(l.tensor);
}

static void disagreement_is_found(void **state) {
  const fixture *f = *state;
  layout l = layout_make(tiny_specs, tiny_specs_count, 0, 0, 0, 1);
  for (int32_t i = 0; i < l.count; i++) l.tensor[i].owner = f->rank == 0;
  if (f->rank == f->ranks - 1) l.tensor[0].shape[1]--, l.tensor[0].count = 16;
  if (f->ranks > 1) {
    expect_message(create_status(f, l.tensor, l.count), CORE_ERR_INTERNAL, "w is float32 [4, 5] on rank 0");
  } else {
    EXPECT_OK(create_status(f, l.tensor, l.count));
  }
  layout_free(&l);
}

static void bad_tensors_are_refused(void **state) {
  const fixture *f = *state;
  float data[8];
  ckpt_tensor good = {.name = "x",
                      .dtype = CORE_FLOAT32,
                      .rank = 1,
                      .shape = {8},
                      .count = 8,
                      .data = data,
                      .owner = f->rank == 0};
  EXPECT_OK(create_status(f, &good, 1));
  const char *name[] = {"", "with blank", "with\"quote", "with\\backslash", "with\nline"};
  for (int i = 0; i < 5; i++) {
    ckpt_tensor t = good;
    t.name = name[i];
    expect_message(create_status(f, &t, 1), CORE_ERR_ARGUMENT, "tensor name");
  }
  ckpt_tensor bad[4] = {good, good, good, good};
  bad[0].count = 9;
  bad[1].first = 1;
  bad[2].shape[0] = -1;
  bad[3].rank = 2, bad[3].shape[0] = INT64_MAX / 2, bad[3].shape[1] = 4;
  for (int i = 0; i < 4; i++) expect_message(create_status(f, &bad[i], 1), CORE_ERR_ARGUMENT, "tensor x");
}

static void mismatch_names_the_tensor(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "mismatch", directory);
  (void)save_layout(f, directory, 0, 0, 1, 1);
  ckpt_reader *reader;
  ckpt_tensor found;
  float data[40];
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  ckpt_tensor t = {
      .name = "f32/odd", .dtype = CORE_FLOAT32, .rank = 2, .shape = {5, 7}, .count = 35, .data = data};
  EXPECT_OK(ckpt_reader_load(reader, &t, 1));
  /* One rank alone asks for something wrong; all are told. */
  if (f->rank == f->ranks - 1) t.shape[0] = 7, t.shape[1] = 5;
  expect_message(ckpt_reader_load(reader, &t, 1), CORE_ERR_MISMATCH, "f32/odd is float32 [5, 7]");
  t = (ckpt_tensor){
      .name = "f32/odd", .dtype = CORE_INT32, .rank = 2, .shape = {5, 7}, .count = 35, .data = data};
  expect_message(ckpt_reader_load(reader, &t, 1), CORE_ERR_MISMATCH, "expected int32 [5, 7]");
  t.name = "f32/absent";
  expect_message(ckpt_reader_load(reader, &t, 1), CORE_ERR_MISMATCH, "has no tensor f32/absent");
  expect_message(ckpt_reader_find(reader, "f32/absent", &found), CORE_ERR_NOT_FOUND, "f32/absent");
  EXPECT_OK(ckpt_reader_find(reader, "u64", &found));
  assert_true(found.dtype == CORE_UINT64 && found.rank == 4 && found.count == 16 && found.shape[3] == 2);
  ckpt_reader_close(reader);
}

static void meta_is_checked_and_kept(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  fixture_directory(f, "meta", directory);
  layout l = layout_make(tiny_specs, tiny_specs_count, 0, 0, f->rank, f->ranks);
  const ckpt_options options = {.directory = directory};
  const char *meta =
      "{\"seed\": 18446744073709551615, \"text\": \"a \\\"b\\\" \\\\ \\u00e9 \xc3\xa9\",\n\t\"list\": [1, "
      "2.5]}";
  ckpt_writer *writer;
  ckpt_reader *reader;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  expect_message(ckpt_writer_begin(writer, 1, "{\"open\":"), CORE_ERR_ARGUMENT, "not valid JSON");
  expect_message(ckpt_writer_begin(writer, -1, "{}"), CORE_ERR_ARGUMENT, "step -1");
  expect_message(ckpt_writer_commit(writer), CORE_ERR_ARGUMENT, "no save was begun");
  EXPECT_OK(ckpt_writer_begin(writer, 123456789, meta));
  EXPECT_OK(ckpt_writer_commit(writer));
  ckpt_writer_destroy(writer);
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  assert_string_equal(ckpt_reader_meta(reader), meta);
  assert_non_null(strstr(ckpt_reader_path(reader), "/step-123456789"));
  ckpt_reader_close(reader);
  layout_free(&l);
}

/* ---- faults on one rank ---- */

static void failure_of_one_rank_is_everyones(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], names[512], file[32];
  fixture_directory(f, "one-rank", directory);
  layout l = layout_make(tiny_specs, tiny_specs_count, 0, 0, f->rank, f->ranks);
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  EXPECT_OK(save_step(f, writer, &l, tiny_specs, tiny_specs_count, 1, 1));
  core_file_fault fault = {.at = 2, .error = 28 /* ENOSPC */};
  snprintf(file, sizeof file, "rank-%05d", f->ranks - 1);
  memcpy(fault.containing, file, sizeof file);
  if (f->rank == f->ranks - 1) core_file_inject(&fault);
  core_status status = save_step(f, writer, &l, tiny_specs, tiny_specs_count, 2, 2);
  core_file_inject(NULL);
  expect_message(status, CORE_ERR_IO, file);
  assert_non_null(strstr(core_error_get()->message, "No space left"));
  EXPECT_OK(comm_barrier(f->control));
  list_names(directory, names, sizeof names);
  assert_string_equal(names, "step-00000001");
  assert_int_equal(load_newest(f, directory, tiny_specs, tiny_specs_count, 1, 1), 1);
  EXPECT_OK(save_step(f, writer, &l, tiny_specs, tiny_specs_count, 3, 3));
  assert_int_equal(load_newest(f, directory, tiny_specs, tiny_specs_count, 3, 3), 3);
  ckpt_writer_destroy(writer);
  layout_free(&l);
}

/* The last rank's file is damaged in place: whichever rank verifies it, all fall back, and say so. */
static void damage_anywhere_makes_all_fall_back(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH], file[CKPT_PATH + 64];
  fixture_directory(f, "fall-back", directory);
  layout l = layout_make(tiny_specs, tiny_specs_count, 0, 0, f->rank, f->ranks);
  const ckpt_options options = {.directory = directory};
  ckpt_writer *writer;
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  for (int64_t step = 1; step <= 2; step++) {
    EXPECT_OK(save_step(f, writer, &l, tiny_specs, tiny_specs_count, step, (uint64_t)step));
  }
  ckpt_writer_destroy(writer);
  layout_free(&l);
  for (int64_t step = 2; step >= 1; step--) {
    assert_int_equal(load_newest(f, directory, tiny_specs, tiny_specs_count, (uint64_t)step, (uint64_t)step),
                     step);
    EXPECT_OK(comm_barrier(f->control));
    snprintf(file, sizeof file, "%s/step-%08lld/rank-%05d.ckpt", directory, (long long)step, f->ranks - 1);
    if (f->rank == 0) {
      size_t count;
      char *bytes = slurp(file, &count);
      bytes[count / 2] ^= 1;
      spit(file, bytes, count);
      free(bytes);
    }
    EXPECT_OK(comm_barrier(f->control));
  }
  ckpt_reader *reader;
  expect_message(ckpt_reader_newest(f->control, directory, 1, &reader), CORE_ERR_CORRUPT,
                 "none of the 2 checkpoints");
  assert_non_null(strstr(core_error_get()->message, "step-00000002"));
  assert_null(reader);
}

static void nothing_there_is_no_error(void **state) {
  const fixture *f = *state;
  char directory[CKPT_PATH];
  ckpt_reader *reader;
  fixture_directory(f, "nothing", directory);
  EXPECT_OK(ckpt_reader_newest(f->control, directory, 1, &reader));
  assert_null(reader);
  assert_int_equal(ckpt_reader_open(f->control, directory, &reader), CORE_ERR_NOT_FOUND);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(any_layout_loads_at_any_other),
      cmocka_unit_test(blocks_of_every_size_keep_their_order),
      cmocka_unit_test(content_hash_is_canonical),
      cmocka_unit_test(content_hash_changes_with_content),
      cmocka_unit_test(odd_ranges_load),
      cmocka_unit_test(coverage_is_checked),
      cmocka_unit_test(disagreement_is_found),
      cmocka_unit_test(bad_tensors_are_refused),
      cmocka_unit_test(mismatch_names_the_tensor),
      cmocka_unit_test(meta_is_checked_and_kept),
      cmocka_unit_test(failure_of_one_rank_is_everyones),
      cmocka_unit_test(damage_anywhere_makes_all_fall_back),
      cmocka_unit_test(nothing_there_is_no_error),
  };
  return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
