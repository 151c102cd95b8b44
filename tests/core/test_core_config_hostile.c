/* Configurations made to break the reader: bombs, wrong bytes, and a bounded walk of mutations of a good
 * file. Every one loads or is refused with a message, quickly. */
#include <stdio.h>
#include <stdlib.h>

#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/settings.h"

static const char good[] =
    "# a run\n"
    "run: {directory: out, seed: 7, steps: 20, threads: 1, deadline: 60.5}\n"
    "data:\n"
    "  path: \"some where\"\n"
    "  shuffle: 40\n"
    "  modalities:\n"
    "    - {name: image, length: 8, local: 0.05, global: 0.1, experts: 3}\n"
    "    - name: text\n"
    "      length: 12\n"
    "      connector: mlp\n"
    "model: &model\n"
    "  width: 32\n"
    "  layers: 3\n"
    "  heads: 4\n"
    "  moe: {layers: 'every 2', experts: 4, buffer: 4.0e-1}\n"
    "objective: {pairs: ['image:text']}\n"
    "optimizer:\n"
    "  batch: 16\n"
    "  rate: 0.01\n";

static core_status load(const char *text, const char *override) {
  core_config *config = NULL;
  double start = core_clock_now();
  core_error_clear();
  core_status status =
      core_config_load(train_settings_spec(), "h.yaml", text, &override, override ? 1 : 0, &config);
  if (status == CORE_OK) {
    status = train_settings_check(config, 1);
    assert_true(strlen(core_config_text(config)) > 100);
  } else {
    assert_null(config);
  }
  if (status != CORE_OK) {
    assert_true(strlen(core_error_get()->message) > 5);
    assert_int_equal(core_error_get()->code, status);
  }
  core_config_destroy(config);
  assert_true(core_clock_now() - start < 10);
  return status;
}

/* Bytes with a NUL can only come from a file. */
static core_status load_bytes(const char *bytes, size_t count) {
  char path[] = "/tmp/antiphon-hostile-XXXXXX";
  core_config *config = NULL;
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  assert_ok(core_file_write(fd, path, bytes, count));
  assert_ok(core_file_close(fd, path));
  core_status status = core_config_load(train_settings_spec(), path, NULL, NULL, 0, &config);
  core_config_destroy(config);
  assert_ok(core_file_remove(path) == CORE_OK ? CORE_OK : CORE_ERR_IO);
  return status;
}

static void the_good_file_is_good(void **state) {
  (void)state;
  assert_ok(load(good, NULL));
}

/* A list's item is merged within one document, whose nodes move as it grows: wherever that happens, the same
 * refusal of the unknown keys follows (and nothing freed is read, which a sanitizer sees). */
static void growing_while_an_item_is_merged(void **state) {
  (void)state;
  for (int pads = 0; pads < 300; pads++) {
    char text[4096] = "pad: [";
    size_t used = strlen(text);
    for (int i = 0; i < pads; i++) used += (size_t)snprintf(text + used, sizeof text - used, "x, ");
    snprintf(text + used, sizeof text - used,
             "]\ndata: {modalities: [{name: a, extra: {b: {c: 1, d: [2]}}, more: {e: {f: 3}}}]}\n");
    assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
    assert_non_null(strstr(core_error_get()->message, "modalities.0.extra: unknown key"));
  }
}

/* "a: &a [x x ..]; b: &b [*a *a ..]; ..": a small file that unfolds to 10^levels items. */
static void alias_bombs_are_refused(void **state) {
  (void)state;
  for (int levels = 3; levels <= 20; levels++) {
    char text[8192];
    size_t used = (size_t)snprintf(text, sizeof text, "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for (int i = 1; i < levels; i++) {
      used += (size_t)snprintf(text + used, sizeof text - used, "a%d: &a%d [", i, i);
      for (int j = 0; j < 10; j++)
        used += (size_t)snprintf(text + used, sizeof text - used, "%s*a%d", j ? ", " : "", i - 1);
      used += (size_t)snprintf(text + used, sizeof text - used, "]\n");
    }
    assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
    if (levels > 6) assert_message("too large");
  }
  for (int levels = 3; levels <= 20; levels++) { /* of mappings */
    char text[8192];
    size_t used = (size_t)snprintf(text, sizeof text, "a0: &a0 {p: 1, q: 2}\n");
    for (int i = 1; i < levels; i++)
      used += (size_t)snprintf(text + used, sizeof text - used,
                               "a%d: &a%d {p: *a%d, q: *a%d, r: *a%d, s: *a%d}\n", i, i, i - 1, i - 1, i - 1,
                               i - 1);
    assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
  }
}

static void endless_trees_are_refused(void **state) {
  (void)state;
  assert_error(load("a: &a [*a]\n", NULL), CORE_ERR_CONFIG, "deep");
  assert_error(load("a: &a {b: *a, c: *a}\n", NULL), CORE_ERR_CONFIG, "deep");
  assert_error(load(good, "model=&a {width: *a}"), CORE_ERR_CONFIG, "deep");
}

static void deep_nesting_is_refused(void **state) {
  (void)state;
  static const int depths[] = {23, 24, 25, 30, 100, 999, 1500, 100000};
  for (int i = 0; i < 8; i++)
    for (int kind = 0; kind < 3; kind++) {
      static const char *const opening[] = {"[", "{a: ", "- "}, *const closing[] = {"]", "}", ""};
      const char *open = opening[kind], *close = closing[kind];
      size_t size = (size_t)depths[i] * 8 + 64;
      char *text = calloc(1, size), *at = text;
      assert_non_null(text);
      strcpy(text, kind == 2 ? "model:\n" : "model: ");
      at += strlen(text);
      for (int d = 0; d < depths[i]; d++) at = stpcpy(at, open);
      at = stpcpy(at, "1");
      for (int d = 0; d < depths[i]; d++) at = stpcpy(at, close);
      assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
      free(text);
    }
}

static void wide_files_are_refused_in_time(void **state) {
  (void)state;
  size_t size = 4 << 20;
  char *text = malloc(size + 1);
  assert_non_null(text);
  size_t used = 0;
  for (int i = 0; used + 16 < size; i++) used += (size_t)snprintf(text + used, 16, "k%d: 1\n", i);
  assert_error(load(text, NULL), CORE_ERR_CONFIG, "too large"); /* half a million keys */
  used = (size_t)sprintf(text, "data: {modalities: [");
  while (used + 16 < size) used += (size_t)snprintf(text + used, 16, "{},");
  strcpy(text + used, "]}");
  assert_error(load(text, NULL), CORE_ERR_CONFIG, "too large");
  memset(text, 'k', size);
  text[size] = '\0';
  assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
  used = (size_t)sprintf(text, "run: {directory: ");
  memset(text + used, 'd', size - used - 2);
  strcpy(text + size - 2, "}");
  assert_int_equal(load(text, NULL), CORE_ERR_CONFIG);
  free(text);
}

static void bytes_that_are_no_text_are_refused(void **state) {
  (void)state;
  char text[2 * sizeof good + 64];
  size_t length = strlen(good);
  static const char *const wrong[] = {"\xff", "\xc3(", "\xed\xa0\x80", "\xf8\x88\x80\x80\x80",
                                      "\x80", "\x07"};
  for (int i = 0; i < 6; i++) {
    snprintf(text, sizeof text, "%snotes: %s\n", good, wrong[i]);
    assert_error(load(text, NULL), CORE_ERR_CONFIG, "h.yaml:20:");
  }
  memcpy(text, good, length);
  memcpy(text + length, "\0rubbish: 1\n", 12);
  assert_error(load_bytes(text, length + 12), CORE_ERR_CONFIG, "NUL"); /* what follows must not be lost */
  for (size_t i = 0; i < length; i++) {
    text[2 * i] = good[i];
    text[2 * i + 1] = '\0';
  }
  assert_error(load_bytes(text, 2 * length), CORE_ERR_CONFIG, "NUL"); /* UTF-16 */
  snprintf(text, sizeof text, "\xef\xbb\xbf%s", good);
  assert_ok(load(text, NULL)); /* a byte-order mark of UTF-8 is legal */
}

/* ---- mutations ---- */

static const char *const pieces[] = {
    "[",     "]",       "{",      "}",    ":",        ": ",   "- ",  "\n",    "\n  ",    "&a ",
    "*a",    "*model",  "!!int ", "!x ",  "<<: ",     "\"",   "'",   "|\n",   ">\n",     "%YAML 1.1\n",
    "---\n", "...\n",   "# ",     "? ",   "1e999",    "-1",   "nan", "0",     "",        "999999999999",
    "name",  "model: ", "\t",     "\r\n", "\xc2\x85", "\xff", ",",   "\\x00", "\"\\0\"", "null",
    "~"};

static uint64_t draw(uint64_t round, uint64_t *turn, uint64_t n) {
  return core_random_below(2024, round, (*turn)++, n);
}

/* One to three edits: delete, double or move a range, insert a piece, change a byte. */
static void mutate(uint64_t round, char *text, size_t capacity) {
  uint64_t turn = 0, edits = 1 + draw(round, &turn, 3);
  for (uint64_t e = 0; e < edits; e++) {
    size_t length = strlen(text), at = draw(round, &turn, length + 1), count = draw(round, &turn, 24);
    if (at + count > length) count = length - at;
    char piece[64];
    switch (draw(round, &turn, 4)) {
      case 0:
        memmove(text + at, text + at + count, length - at - count + 1);
        continue;
      case 1:
        snprintf(piece, sizeof piece, "%s", pieces[draw(round, &turn, sizeof pieces / sizeof *pieces)]);
        break;
      case 2:
        snprintf(piece, sizeof piece, "%.*s", (int)count, text + draw(round, &turn, length + 1 - count));
        break;
      default:
        if (at < length) text[at] = (char)(1 + draw(round, &turn, 255));
        continue;
    }
    size_t added = strlen(piece);
    if (length + added + 1 > capacity) continue;
    memmove(text + at + added, text + at, length - at + 1);
    memcpy(text + at, piece, added);
  }
}

static void mutations_load_or_are_refused(void **state) {
  (void)state;
  enum { ROUNDS = 6000 };
  int accepted = 0, refused = 0;
  for (uint64_t round = 0; round < ROUNDS; round++) {
    char text[4096];
    strcpy(text, good);
    mutate(round, text, sizeof text);
    if (load(text, NULL) == CORE_OK)
      accepted++;
    else
      refused++;
  }
  print_message("           %d accepted, %d refused\n", accepted, refused);
  assert_true(accepted > ROUNDS / 50 && refused > ROUNDS / 4); /* the walk explores both sides */
}

static void mutated_overrides_load_or_are_refused(void **state) {
  (void)state;
  static const char *const seeds[] = {"model.width=64", "data.modalities.text.length=4",
                                      "data.modalities.0={name: x}", "objective.pairs=[image:text]",
                                      "run.directory=a b"};
  int accepted = 0;
  for (uint64_t round = 0; round < 3000; round++) {
    char text[512];
    strcpy(text, seeds[round % 5]);
    mutate(round + 1000000, text, sizeof text);
    accepted += load(good, text) == CORE_OK;
  }
  assert_true(accepted > 50);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_good_file_is_good),
      cmocka_unit_test(growing_while_an_item_is_merged),
      cmocka_unit_test(alias_bombs_are_refused),
      cmocka_unit_test(endless_trees_are_refused),
      cmocka_unit_test(deep_nesting_is_refused),
      cmocka_unit_test(wide_files_are_refused_in_time),
      cmocka_unit_test(bytes_that_are_no_text_are_refused),
      cmocka_unit_test(mutations_load_or_are_refused),
      cmocka_unit_test(mutated_overrides_load_or_are_refused),
  };
  return cmocka_run_group_tests_name("core/config, hostile", tests, NULL, NULL);
}
