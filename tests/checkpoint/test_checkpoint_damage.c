/* Damage of every kind is found by ckpt_verify, and loading gives an error or what was saved. Hostile
 * manifests and rank files, their hashes put right again, give errors and nothing worse. */
#include "ckpt_fixture.h"

#define XXH_STATIC_LINKING_ONLY
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"

#define TINY tiny_specs, tiny_specs_count

enum { SEED = 11, FUZZ = 6000 };
static const double FUZZ_SECONDS = 8;

/* One checkpoint and its two files in memory. */
typedef struct victim {
  const fixture *f;
  const spec *specs;
  int32_t count;
  char path[CKPT_PATH], manifest_path[CKPT_PATH + 32], rank_path[CKPT_PATH + 32];
  char *manifest, *rank;
  size_t manifest_count, rank_count;
} victim;

static victim victim_make(const fixture *f, const char *name, const spec *specs, int32_t count, int64_t step,
                          uint64_t generation) {
  victim v = {.f = f, .specs = specs, .count = count};
  char directory[CKPT_PATH - 64];
  layout l = layout_make(specs, count, 1, 0, 0, 1);
  ckpt_writer *writer;
  snprintf(directory, sizeof directory, "%s/%s", f->directory, name);
  const ckpt_options options = {.directory = directory};
  EXPECT_OK(ckpt_writer_create(f->control, &options, l.tensor, l.count, &writer));
  EXPECT_OK(save_step(f, writer, &l, specs, count, step, generation));
  ckpt_writer_destroy(writer);
  layout_free(&l);
  snprintf(v.path, sizeof v.path, "%s/step-%08lld", directory, (long long)step);
  snprintf(v.manifest_path, sizeof v.manifest_path, "%s/manifest.json", v.path);
  snprintf(v.rank_path, sizeof v.rank_path, "%s/rank-00000.ckpt", v.path);
  v.manifest = slurp(v.manifest_path, &v.manifest_count);
  v.rank = slurp(v.rank_path, &v.rank_count);
  EXPECT_OK(ckpt_verify(v.path, NULL));
  return v;
}

static void victim_restore(const victim *v) {
  spit(v->manifest_path, v->manifest, v->manifest_count);
  spit(v->rank_path, v->rank, v->rank_count);
}

static void victim_free(victim *v) {
  free(v->manifest);
  free(v->rank);
}

/* Loads all; an error, or exactly what was saved. Returns the status. */
static core_status load_all(const victim *v) {
  ckpt_reader *reader;
  layout full = layout_full(v->specs, v->count);
  core_status status = ckpt_reader_open(v->f->control, v->path, &reader);
  if (status == CORE_OK) {
    status = ckpt_reader_load(reader, full.tensor, full.count);
    if (status == CORE_OK) assert_null(layout_difference(&full, v->specs, v->count, SEED));
    ckpt_reader_close(reader);
  }
  layout_free(&full);
  return status;
}

static void expect_found(const victim *v, const char *what, int64_t where) {
  core_status status = ckpt_verify(v->path, NULL);
  if (status == CORE_OK) fail_msg("%s at %lld is not found", what, (long long)where);
  if (core_error_get()->message[0] == 0) fail_msg("%s at %lld has no message", what, (long long)where);
  (void)load_all(v);
}

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
        expect_found(&v, path, (int64_t)(at * 8) + bit);
      }
      poke(path, (int64_t)at, (uint8_t)bytes[at]);
    }
  }
  EXPECT_OK(ckpt_verify(v.path, NULL));
  EXPECT_OK(load_all(&v));
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
    expect_found(&v, v.rank_path, (int64_t)count);
  }
  victim_restore(&v);
  for (size_t count = 0; count < v.manifest_count; count++) {
    spit(v.manifest_path, v.manifest, count);
    expect_found(&v, v.manifest_path, (int64_t)count);
  }
  victim_restore(&v);
  char *longer = calloc(1, v.rank_count + v.manifest_count + 1);
  memcpy(longer, v.rank, v.rank_count);
  spit(v.rank_path, longer, v.rank_count + 1);
  expect_found(&v, "a byte too many", 0);
  victim_restore(&v);
  memcpy(longer, v.manifest, v.manifest_count);
  spit(v.manifest_path, longer, v.manifest_count + 1);
  expect_found(&v, "a byte too many", 1);
  free(longer);
  victim_free(&v);
}

static void missing_file(void **state) {
  victim v = victim_make(*state, "missing", TINY, 3, SEED);
  assert_int_equal(unlink(v.rank_path), 0);
  expect_found(&v, "a missing file", 0);
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
  expect_found(&v, "two blocks exchanged", 0);
  assert_non_null(strstr(core_error_get()->message, "u8/cells"));
  free(other);
  free(bytes);
  victim_free(&v);
}

static void files_of_another_checkpoint(void **state) {
  victim v = victim_make(*state, "foreign", TINY, 3, SEED);
  victim same = victim_make(*state, "foreign-step", TINY, 4, SEED); /* the same contents, another step */
  victim other = victim_make(*state, "foreign-content", TINY, 3, SEED + 1);
  spit(v.manifest_path, same.manifest, same.manifest_count);
  expect_found(&v, "the manifest of another step", 0);
  spit(v.rank_path, same.rank, same.rank_count);
  expect_found(&v, "a whole checkpoint of another step", 0);
  victim_restore(&v);
  spit(v.rank_path, same.rank, same.rank_count);
  expect_found(&v, "the file of another step", 0);
  victim_restore(&v);
  spit(v.rank_path, other.rank, other.rank_count);
  expect_found(&v, "the file of another run", 0);
  victim_restore(&v);
  spit(v.manifest_path, other.manifest, other.manifest_count);
  expect_found(&v, "the manifest of another run", 0);
  victim_free(&v);
  victim_free(&same);
  victim_free(&other);
}

/* ---- hostile files ---- */

static uint64_t pick(uint64_t *draw, uint64_t below) {
  return core_random_below(SEED, core_random_stream(CORE_RANDOM_TEST, 4, 0), (*draw)++, below);
}

/* Replaces, inserts, removes or repeats a few bytes; numbers and syntax are more likely than noise. */
static size_t mutate(char *bytes, size_t count, uint64_t *draw) {
  static const char *const pieces[] = {"\"0\"",
                                       "\"999999999999999999\"",
                                       "\"262144\"",
                                       "-1",
                                       "1e300",
                                       "null",
                                       "[",
                                       "]",
                                       "{",
                                       "}",
                                       ",",
                                       "\"",
                                       "9",
                                       "0",
                                       "\"../../x\"",
                                       "\"18446744073709551616\"",
                                       "\"parts\":[]",
                                       "\\u0000",
                                       "true",
                                       "\"int64\"",
                                       "\"uint8\""};
  for (uint64_t edits = 1 + pick(draw, 3); edits > 0; edits--) {
    size_t at = pick(draw, count);
    const char *piece = pieces[pick(draw, sizeof pieces / sizeof *pieces)];
    size_t length = strlen(piece), span = 1 + pick(draw, 12);
    if (at + span > count) span = count - at;
    switch (pick(draw, 4)) {
      case 0:
        bytes[at] = (char)pick(draw, 256);
        break;
      case 1:
        if (at + length <= count) memcpy(bytes + at, piece, length);
        break;
      case 2:
        memmove(bytes + at, bytes + at + span, count - at - span);
        if (count > span + 40) count -= span;
        break;
      default:
        memmove(bytes + at + length, bytes + at, count - at);
        memcpy(bytes + at, piece, length);
        count += length;
    }
  }
  return count;
}

/* Appends the tail with the right hash, so that the parser sees the mutated text. */
static size_t seal(char *text, size_t count) {
  return count + (size_t)sprintf(text + count, ",\n\"hash\":\"%016llx\"}\n",
                                 (unsigned long long)XXH64(text, count, 0));
}

static void mutated_manifests(void **state) {
  victim v = victim_make(*state, "manifests", TINY, 3, SEED);
  uint64_t draw = 0, parsed = 0;
  size_t tail = strlen(",\n\"hash\":\"0123456789abcdef\"}\n");
  char *text = malloc(v.manifest_count + 4096);
  double start = core_clock_now();
  for (int i = 0; i < FUZZ && core_clock_now() - start < FUZZ_SECONDS; i++) {
    memcpy(text, v.manifest, v.manifest_count);
    size_t count = mutate(text, v.manifest_count - tail, &draw);
    if (i % 8 != 0) count = seal(text, count);
    spit(v.manifest_path, text, count);
    if (ckpt_verify(v.path, NULL) == CORE_OK) parsed++;
    (void)load_all(&v);
  }
  victim_restore(&v);
  EXPECT_OK(load_all(&v));
  assert_true(parsed > 0); /* edits of meta leave it sound: the hashes were put right */
  free(text);
  victim_free(&v);
}

/* Deeply nested and huge: refused, not a stack overflow. */
static void nested_manifest(void **state) {
  victim v = victim_make(*state, "nested", TINY, 3, SEED);
  size_t depth = 1 << 20;
  char *text = malloc(depth + 64);
  memset(text, '[', depth);
  spit(v.manifest_path, text, seal(text, depth));
  expect_found(&v, "nesting", (int64_t)depth);
  free(text);
  victim_free(&v);
}

/* Puts all hashes right that guard the rank file's bytes, but not those of its contents. */
static void seal_rank_file(const victim *v, char *bytes) {
  ckpt_manifest m;
  ckpt_header header;
  ckpt_trailer trailer;
  size_t count = v->rank_count;
  EXPECT_OK(ckpt_manifest_parse(v->manifest, v->manifest_count, &m));
  int64_t blocks = m.file[0].blocks, at = (int64_t)sizeof header;
  ckpt_entry *entry = calloc((size_t)blocks, sizeof *entry);
  char *index = bytes + count - sizeof trailer - (size_t)blocks * sizeof *entry;
  memcpy(&header, bytes, sizeof header);
  memcpy(entry, index, (size_t)blocks * sizeof *entry);
  for (int64_t b = 0; b < blocks; b++) {
    size_t size = ckpt_entry_bytes(&entry[b]);
    if (size > (size_t)(index - bytes - at)) break;
    entry[b].stored_hash = XXH64(bytes + at, size, 0);
    at += (int64_t)size;
  }
  memcpy(index, entry, (size_t)blocks * sizeof *entry);
  trailer = ckpt_trailer_make(&header, entry, blocks, index - bytes);
  memcpy(bytes + count - sizeof trailer, &trailer, sizeof trailer);
  m.file[0].index_hash = trailer.index_hash;
  char *text;
  size_t text_count;
  EXPECT_OK(ckpt_manifest_print(&m, &text, &text_count));
  spit(v->manifest_path, text, text_count);
  free(text);
  free(entry);
  ckpt_manifest_free(&m);
}

static void mutated_rank_files(void **state) {
  victim v = victim_make(*state, "rank-files", TINY, 3, SEED);
  uint64_t draw = 1u << 30;
  char *bytes = malloc(v.rank_count);
  double start = core_clock_now();
  for (int i = 0; i < FUZZ && core_clock_now() - start < FUZZ_SECONDS; i++) {
    memcpy(bytes, v.rank, v.rank_count);
    for (uint64_t edits = 1 + pick(&draw, 3); edits > 0; edits--) {
      size_t at = pick(&draw, v.rank_count);
      bytes[at] = pick(&draw, 2) == 0 ? (char)pick(&draw, 256) : (char)(bytes[at] ^ 1 << pick(&draw, 8));
    }
    if (i % 8 != 0) seal_rank_file(&v, bytes);
    spit(v.rank_path, bytes, v.rank_count);
    bool sound = ckpt_verify(v.path, NULL) == CORE_OK;
    /* The elements have hashes of their own: wrong data cannot come out, whatever was put right. */
    assert_int_equal(load_all(&v) == CORE_OK, sound);
  }
  victim_restore(&v);
  EXPECT_OK(load_all(&v));
  free(bytes);
  victim_free(&v);
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
      cmocka_unit_test(files_of_another_checkpoint),
      cmocka_unit_test(mutated_manifests),
      cmocka_unit_test(nested_manifest),
      cmocka_unit_test(mutated_rank_files),
      cmocka_unit_test(describe_and_verify_say_what_is_there),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
