/* Hostile and arbitrarily changed files: an error, or exactly what was saved; never a crash, a hang or wrong
 * data. Some have their hashes put right again, so that what lies behind the hashes is reached. */
#include "ckpt_victim.h"

#define XXH_STATIC_LINKING_ONLY
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

#include "core/clock.h"
#include "core/random.h"

enum { FUZZ = 6000 };
static const double FUZZ_SECONDS = 8;

/* Rounds of each mutating test: FUZZ of them or FUZZ_SECONDS, or as many as ANTIPHON_FUZZ says. */
static bool fuzz_goes_on(int64_t round, double start) {
  const char *rounds = getenv("ANTIPHON_FUZZ");
  if (rounds != NULL) return round < strtoll(rounds, NULL, 10);
  return round < FUZZ && core_clock_now() - start < FUZZ_SECONDS;
}

/* What was done, where there is no fixed number. */
static void fuzz_report(const char *what, int64_t rounds, double start) {
  print_message("%s: %lld mutations in %.1f s\n", what, (long long)rounds, core_clock_now() - start);
  assert_true(rounds > 0);
}

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
  int64_t i = 0;
  for (; fuzz_goes_on(i, start); i++) {
    memcpy(text, v.manifest, v.manifest_count);
    size_t count = mutate(text, v.manifest_count - tail, &draw);
    if (i % 8 != 0) count = seal(text, count);
    spit(v.manifest_path, text, count);
    if (ckpt_verify(v.path, NULL) == CORE_OK) parsed++;
    (void)victim_load(&v);
  }
  fuzz_report("manifests", i, start);
  victim_restore(&v);
  EXPECT_OK(victim_load(&v));
  assert_true(parsed > 0); /* edits of meta leave it sound: the hashes were put right */
  free(text);
  victim_free(&v);
}

/* Nothing is put right: whatever is changed, in whichever file, is found, and nothing wrong is loaded. */
static void every_mutation_is_found(void **state) {
  victim v = victim_make(*state, "any", TINY, 3, SEED);
  uint64_t draw = 1u << 29;
  char *bytes = malloc(v.manifest_count + v.rank_count + 4096);
  double start = core_clock_now();
  int64_t i = 0;
  for (; fuzz_goes_on(i, start); i++) {
    bool manifest = pick(&draw, 2) == 0;
    const char *path = manifest ? v.manifest_path : v.rank_path, *before = manifest ? v.manifest : v.rank;
    size_t all = manifest ? v.manifest_count : v.rank_count;
    memcpy(bytes, before, all);
    size_t count = mutate(bytes, all, &draw);
    spit(path, bytes, count);
    bool same = count == all && memcmp(bytes, before, all) == 0;
    assert_true((ckpt_verify(v.path, NULL) == CORE_OK) == same);
    assert_true((victim_load(&v) == CORE_OK) == same);
    spit(path, before, all);
  }
  fuzz_report("any file", i, start);
  free(bytes);
  victim_free(&v);
}

/* A catalogue that leaves elements out, or has them twice, is refused though all its hashes are right. */
static void coverage_is_checked_on_load(void **state) {
  victim v = victim_make(*state, "coverage", all_specs, all_specs_count, 3, SEED);
  size_t tail = strlen(",\n\"hash\":\"0123456789abcdef\"}\n");
  static const struct {
    const char *from, *to, *message;
  } edit[] = {
      {"[0,\"262144\",\"262144\"],[0,\"524288\"", "[0,\"524288\",\"262144\"],[0,\"524288\"",
       "covered by no rank"},
      {"[0,\"262144\",\"262144\"],[0,\"524288\"", "[0,\"262144\",\"262144\"],[0,\"262144\"", "covered twice"},
      {"[0,\"786432\",\"17\"]", "[0,\"786432\",\"16\"]", "covered by no rank"},
      {"[0,\"786432\",\"17\"]", "[0,\"786432\",\"18\"]", "outside the shape"},
      {"[0,\"786432\",\"17\"]", "[1,\"786432\",\"17\"]", "file number 1"},
      {"[0,\"786432\",\"17\"]", "[0,\"786431\",\"18\"]", "covered twice"},
  };
  for (size_t i = 0; i < sizeof edit / sizeof *edit; i++) {
    char *text = calloc(1, v.manifest_count + 64);
    memcpy(text, v.manifest, v.manifest_count);
    char *at = strstr(text, edit[i].from);
    assert_non_null(at);
    memcpy(at, edit[i].to, strlen(edit[i].to));
    spit(v.manifest_path, text, seal(text, v.manifest_count - tail));
    assert_int_equal(victim_load(&v), CORE_ERR_CORRUPT);
    if (strstr(core_error_get()->message, edit[i].message) == NULL)
      fail_msg("\"%s\" does not say \"%s\"", core_error_get()->message, edit[i].message);
    free(text);
  }
  victim_free(&v);
}

/* Deeply nested and huge: refused, not a stack overflow. */
static void nested_manifest(void **state) {
  victim v = victim_make(*state, "nested", TINY, 3, SEED);
  size_t depth = 1 << 20;
  char *text = malloc(depth + 64);
  memset(text, '[', depth);
  spit(v.manifest_path, text, seal(text, depth));
  victim_expect_found(&v, "nesting", (int64_t)depth);
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
  int64_t i = 0;
  for (; fuzz_goes_on(i, start); i++) {
    memcpy(bytes, v.rank, v.rank_count);
    for (uint64_t edits = 1 + pick(&draw, 3); edits > 0; edits--) {
      size_t at = pick(&draw, v.rank_count);
      bytes[at] = pick(&draw, 2) == 0 ? (char)pick(&draw, 256) : (char)(bytes[at] ^ 1 << pick(&draw, 8));
    }
    if (i % 8 != 0) seal_rank_file(&v, bytes);
    spit(v.rank_path, bytes, v.rank_count);
    bool sound = ckpt_verify(v.path, NULL) == CORE_OK;
    /* The elements have hashes of their own: wrong data cannot come out, whatever was put right. */
    assert_int_equal(victim_load(&v) == CORE_OK, sound);
  }
  fuzz_report("rank files", i, start);
  victim_restore(&v);
  EXPECT_OK(victim_load(&v));
  free(bytes);
  victim_free(&v);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(mutated_manifests),           cmocka_unit_test(every_mutation_is_found),
      cmocka_unit_test(coverage_is_checked_on_load), cmocka_unit_test(nested_manifest),
      cmocka_unit_test(mutated_rank_files),
  };
  return cmocka_run_group_tests(tests, fixture_setup_small, fixture_teardown);
}
