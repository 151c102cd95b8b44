/* Arbitrarily changed safetensors files and indexes: an error, or a collection whose tensors can be read
 * whole and lie inside the file; never a crash or a hang. ANTIPHON_FUZZ=10000 sets the number of mutations.
 */
#include "tests/support/test_unit.h"

#include "checkpoint/safetensors.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/random.h"
#include "safetensors_craft.h"

enum { ROUNDS = 20000, MOST = 4096 };
static const double SECONDS = 4;

static const char header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},\"a.weight\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":"
    "[0,24]},\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},\"c\":{\"dtype\":\"F16\","
    "\"shape\":[],\"data_offsets\":[32,34]},\"d\":{\"dtype\":\"I64\",\"shape\":[1,0],\"data_offsets\":[34,34]"
    "}}";
static const char index_text[] =
    "{\"metadata\":{\"total_size\":34},\"weight_map\":{\"a.weight\":\"model.bin\",\"b\":\"model.bin\","
    "\"c\":\"model.bin\",\"d\":\"model.bin\"}}";

static bool goes_on(int64_t round, double start) {
  const char *rounds = getenv("ANTIPHON_FUZZ");
  if (rounds) return round < strtoll(rounds, NULL, 10);
  return round < ROUNDS && core_clock_now() - start < SECONDS;
}

static uint64_t pick(uint64_t *draw, uint64_t below) {
  return core_random_below(17, core_random_stream(CORE_RANDOM_TEST, 9, 0), (*draw)++, below);
}

/* Numbers and syntax are likelier than noise. */
static size_t mutate(uint8_t *bytes, size_t count, uint64_t *draw) {
  static const char *const pieces[] = {
      "0",      "9",       "-1",       "1e300", "4294967296",  "9007199254740993",
      "34",     "24",      "[",        "]",     "{",           "}",
      ",",      ":",       "\"",       "null",  "[]",          "\"F64\"",
      "\"U8\"", "\\u0000", "\"../x\"", "\"b\"", "__metadata__"};
  for (uint64_t edits = 1 + pick(draw, 3); edits > 0; edits--) {
    size_t at = pick(draw, count), span = 1 + pick(draw, 6);
    const char *piece = pieces[pick(draw, sizeof pieces / sizeof *pieces)];
    size_t length = strlen(piece);
    if (at + span > count) span = count - at;
    switch (pick(draw, 4)) {
      case 0:
        bytes[at] = (uint8_t)pick(draw, 256);
        break;
      case 1:
        if (at + length <= count) memcpy(bytes + at, piece, length);
        break;
      case 2:
        memmove(bytes + at, bytes + at + span, count - at - span);
        if (count > span + 16) count -= span;
        break;
      default:
        memmove(bytes + at + length, bytes + at, count - at);
        memcpy(bytes + at, piece, length);
        count += length;
    }
  }
  return count;
}

/* Everything that an opened collection offers is there. */
static void read_all(ckpt_safetensors *c) {
  core_real value[MOST];
  for (int32_t i = 0; i < ckpt_safetensors_count(c); i++) {
    const ckpt_safetensor *tensor = ckpt_safetensors_at(c, i);
    assert_true(ckpt_safetensors_find(c, tensor->name) == tensor);
    assert_in_range(tensor->count, 0, MOST);
    core_status status = ckpt_safetensors_read(c, tensor, 0, tensor->count, value);
    assert_true(status == CORE_OK || status == CORE_ERR_UNSUPPORTED || status == CORE_ERR_NON_FINITE);
  }
}

static int64_t try_to_open(const char *path) {
  ckpt_safetensors *c = NULL;
  if (ckpt_safetensors_open(path, &c) != CORE_OK) return 0;
  read_all(c);
  ckpt_safetensors_close(c);
  return 1;
}

static void mutated_files(void **state) {
  (void)state;
  const char *folder = craft_folder();
  char path[128];
  uint8_t sound[MOST], bytes[MOST];
  size_t length = strlen(header);
  size_t count = craft_make(header, 34, sound);
  uint64_t draw = 0;
  int64_t opened = 0, round = 0;
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  craft_bytes(path, sound, count);
  assert_int_equal(try_to_open(path), 1);
  double start = core_clock_now();
  for (; goes_on(round, start); round++) {
    memcpy(bytes, sound, count);
    size_t now;
    if (round % 8 == 0) { /* anywhere, the length and the data too */
      now = mutate(bytes, count, &draw);
    } else { /* the header, with its length put right */
      size_t text = mutate(bytes + 8, length, &draw);
      for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(text >> (8 * i));
      memcpy(bytes + 8 + text, sound + 8 + length, 34);
      now = 8 + text + 34;
    }
    craft_bytes(path, bytes, now);
    opened += try_to_open(path);
  }
  assert_true(opened > 0 && opened < round); /* names and metadata may change, most else may not */
  craft_remove(folder);
}

static void mutated_indexes(void **state) {
  (void)state;
  const char *folder = craft_folder();
  char path[128], data[128];
  uint8_t bytes[MOST];
  size_t length = strlen(index_text);
  uint64_t draw = 1u << 20;
  int64_t opened = 0, round = 0;
  snprintf(data, sizeof data, "%s/model.bin", folder);
  snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
  craft_file(data, header, 34);
  craft_bytes(path, index_text, length);
  assert_int_equal(try_to_open(folder), 1);
  double start = core_clock_now();
  for (; goes_on(round, start); round++) {
    memcpy(bytes, index_text, length);
    craft_bytes(path, bytes, mutate(bytes, length, &draw));
    opened += try_to_open(folder);
  }
  assert_true(opened > 0 && opened < round);
  craft_remove(folder);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(mutated_files), cmocka_unit_test(mutated_indexes)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
