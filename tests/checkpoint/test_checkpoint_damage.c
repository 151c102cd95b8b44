/* Every flipped bit, every length, everything missing, exchanged or foreign is found by a check, and what is
 * loaded is an error or what was saved. */
#include "ckpt_victim.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/random.h"

static void poke(const char *path, int64_t at, uint8_t byte) {
  int fd = open(path, O_WRONLY);
  assert_true(fd >= 0);
  assert_int_equal(pwrite(fd, &byte, 1, at), 1);
  close(fd);
}

static void every_bit_of_a_tiny_checkpoint(void **state) {
  victim v = victim_make(*state, "tiny", TINY, 3, SEED);
  for (int file = 0; file < 2; file++) {
    const char *path = file == 0 ? v.manifest_path : v.rank_path;
    const char *bytes = file == 0 ? v.manifest : v.rank;
    size_t count = file == 0 ? v.manifest_count : v.rank_count;
    for (size_t at = 0; at < count; at++) {
      for (int bit = 0; bit < 8; bit++) {
        poke(path, (int64_t)at, (uint8_t)(bytes[at] ^ 1 << bit));
        victim_expect_found(&v, path, (int64_t)(at * 8) + bit);
      }
      poke(path, (int64_t)at, (uint8_t)bytes[at]);
    }
  }
  EXPECT_OK(ckpt_verify(v.path, NULL));
  EXPECT_OK(victim_load(&v));
  victim_free(&v);
}

static void sampled_bits_of_a_larger_one(void **state) {
  victim v = victim_make(*state, "larger", all_specs, all_specs_count, 3, SEED);
  uint64_t stream = core_random_stream(CORE_RANDOM_TEST, 3, 0);
  for (uint64_t i = 0; i < 60; i++) {
    uint64_t at = core_random_below(SEED, stream, 2 * i, v.rank_count);
    poke(v.rank_path, (int64_t)at,
         (uint8_t)(v.rank[at] ^ 1 << core_random_below(SEED, stream, 2 * i + 1, 8)));
    assert_int_not_equal(ckpt_verify(v.path, NULL), CORE_OK);
    poke(v.rank_path, (int64_t)at, (uint8_t)v.rank[at]);
  }
  EXPECT_OK(ckpt_verify(v.path, NULL));
  victim_free(&v);
}

static void every_length(void **state) {
  victim v = victim_make(*state, "lengths", TINY, 3, SEED);
  for (size_t count = 0; count < v.rank_count; count++) {
    spit(v.rank_path, v.rank, count);
    victim_expect_found(&v, v.rank_path, (int64_t)count);
  }
  victim_restore(&v);
  for (size_t count = 0; count < v.manifest_count; count++) {
    spit(v.manifest_path, v.manifest, count);
    victim_expect_found(&v, v.manifest_path, (int64_t)count);
  }
  victim_restore(&v);
  char *longer = calloc(1, v.rank_count + v.manifest_count + 1);
  memcpy(longer, v.rank, v.rank_count);
  spit(v.rank_path, longer, v.rank_count + 1);
  victim_expect_found(&v, "a byte too many", 0);
  victim_restore(&v);
  memcpy(longer, v.manifest, v.manifest_count);
  spit(v.manifest_path, longer, v.manifest_count + 1);
  victim_expect_found(&v, "a byte too many", 1);
  free(longer);
  victim_free(&v);
}

static void missing_file(void **state) {
  victim v = victim_make(*state, "missing", TINY, 3, SEED);
  assert_int_equal(unlink(v.rank_path), 0);
  victim_expect_found(&v, "a missing file", 0);
  assert_non_null(strstr(core_error_get()->message, "rank-00000.ckpt"));
  victim_restore(&v);
  assert_int_equal(unlink(v.manifest_path), 0);
  assert_int_equal(ckpt_verify(v.path, NULL), CORE_ERR_NOT_FOUND);
  victim_free(&v);
}

/* The one tensor of bytes has two whole cells of random bytes: stored as they are, equally long. */
static void swapped_blocks(void **state) {
  victim v = victim_make(*state, "swapped", all_specs, all_specs_count, 3, SEED);
  char *bytes = malloc(v.rank_count), first[64];
  assert_non_null(bytes);
  memcpy(bytes, v.rank, v.rank_count);
  for (int i = 0; i < 64; i++) {
    first[i] = (char)core_random_u64(SEED, core_hash_text("u8/cells"), (uint64_t)i);
  }
  char *at = memmem(bytes, v.rank_count, first, sizeof first);
  assert_non_null(at);
  char *other = malloc(CKPT_CELL);
  memcpy(other, at, CKPT_CELL);
  memcpy(at, at + CKPT_CELL, CKPT_CELL);
  memcpy(at + CKPT_CELL, other, CKPT_CELL);
  spit(v.rank_path, bytes, v.rank_count);
  victim_expect_found(&v, "two blocks exchanged", 0);
  assert_non_null(strstr(core_error_get()->message, "u8/cells"));
  free(other);
  free(bytes);
  victim_free(&v);
}

/* A block cut out of the file (what follows moves up), and one of another run in its place. Incompressible
 * cells are stored as they are, so they can be found in the file. */
static void missing_and_foreign_blocks(void **state) {
  victim v = victim_make(*state, "blocks", all_specs, all_specs_count, 3, SEED);
  victim other = victim_make(*state, "blocks-other", all_specs, all_specs_count, 3, SEED + 1);
  char *bytes = malloc(v.rank_count), first[2][64];
  assert_non_null(bytes);
  for (int i = 0; i < 64; i++)
    for (int run = 0; run < 2; run++)
      first[run][i] = (char)core_random_u64(SEED + (uint64_t)run, core_hash_text("u8/cells"), (uint64_t)i);
  const char *own = memmem(v.rank, v.rank_count, first[0], 64);
  const char *foreign = memmem(other.rank, other.rank_count, first[1], 64);
  assert_non_null(own);
  assert_non_null(foreign);
  const size_t at = (size_t)(own - v.rank);
  memcpy(bytes, v.rank, at);
  memcpy(bytes + at, own + CKPT_CELL, v.rank_count - at - CKPT_CELL);
  spit(v.rank_path, bytes, v.rank_count - CKPT_CELL);
  victim_expect_found(&v, "a block cut out", 0);
  memset(bytes + v.rank_count - CKPT_CELL, 0, CKPT_CELL); /* the same, and the file as long as it was */
  spit(v.rank_path, bytes, v.rank_count);
  victim_expect_found(&v, "a block cut out, the file filled up", 0);
  memcpy(bytes, v.rank, v.rank_count);
  memset(bytes + at, 0, CKPT_CELL);
  spit(v.rank_path, bytes, v.rank_count);
  victim_expect_found(&v, "a block of zeros", 0);
  memcpy(bytes + at, foreign, CKPT_CELL);
  spit(v.rank_path, bytes, v.rank_count);
  victim_expect_found(&v, "a block of another run", 0);
  assert_non_null(strstr(core_error_get()->message, "u8/cells"));
  free(bytes);
  victim_free(&v);
  victim_free(&other);
}

static void files_of_another_checkpoint(void **state) {
  victim v = victim_make(*state, "foreign", TINY, 3, SEED);
  victim same = victim_make(*state, "foreign-step", TINY, 4, SEED); /* the same contents, another step */
  victim other = victim_make(*state, "foreign-content", TINY, 3, SEED + 1);
  spit(v.manifest_path, same.manifest, same.manifest_count);
  victim_expect_found(&v, "the manifest of another step", 0);
  spit(v.rank_path, same.rank, same.rank_count);
  victim_expect_found(&v, "a whole checkpoint of another step", 0);
  victim_restore(&v);
  spit(v.rank_path, same.rank, same.rank_count);
  victim_expect_found(&v, "the file of another step", 0);
  victim_restore(&v);
  spit(v.rank_path, other.rank, other.rank_count);
  victim_expect_found(&v, "the file of another run", 0);
  victim_restore(&v);
  spit(v.manifest_path, other.manifest, other.manifest_count);
  victim_expect_found(&v, "the manifest of another run", 0);
  victim_free(&v);
  victim_free(&same);
  victim_free(&other);
}

/* ---- looking ---- */

static void describe_and_verify_say_what_is_there(void **state) {
  victim v = victim_make(*state, "describe", TINY, 3, SEED);
  char *text;
  size_t count;
  FILE *out = open_memstream(&text, &count);
  assert_true(ckpt_is(v.path));
  EXPECT_OK(ckpt_describe(v.path, out));
  EXPECT_OK(ckpt_verify(v.path, out));
  fclose(out);
  const char *const expected[] = {
      "step 3, 5 tensors",         "generation: 11", "position", "[4, 5]", "bfloat16",
      "rank-00000.ckpt: 5 blocks", "sound"};
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) assert_non_null(strstr(text, expected[i]));
  free(text);
  spit(v.manifest_path, "{\"format\":\"another\"}", 20);
  assert_false(ckpt_is(v.path));
  assert_false(ckpt_is(v.f->directory));
  assert_false(ckpt_is("/nonexistent"));
  victim_free(&v);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_bit_of_a_tiny_checkpoint),
      cmocka_unit_test(sampled_bits_of_a_larger_one),
      cmocka_unit_test(every_length),
      cmocka_unit_test(missing_file),
      cmocka_unit_test(swapped_blocks),
      cmocka_unit_test(missing_and_foreign_blocks),
      cmocka_unit_test(files_of_another_checkpoint),
      cmocka_unit_test(describe_and_verify_say_what_is_there),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
