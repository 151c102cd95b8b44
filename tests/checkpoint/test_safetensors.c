/* Safetensors: what is written comes back, in one file and in shards; other programs' files are read by the
 * format's rules alone; every lie of a header and every disagreement of an index has its error. */
#include "tests/support/test_unit.h"

#include "checkpoint/safetensors.h"
#include "core/file.h"
#include "safetensors_craft.h"

static const char *folder;
static char path[256];

static const char *in_folder(const char *name) {
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static int make_folder(void **state) {
  (void)state;
  folder = craft_folder();
  return 0;
}

static int remove_folder(void **state) {
  (void)state;
  craft_remove(folder);
  return 0;
}

/* Values that all three types hold. */
static core_real value_at(int64_t i) {
  return (core_real)((double)(i % 61) / 4 - 7);
}

static ckpt_safetensors_source source_of(const char *name, int32_t rank, int64_t rows, int64_t columns,
                                         const core_real *data) {
  ckpt_safetensors_source source = {.rank = rank, .shape = {rows, columns}, .data = data};
  snprintf(source.name, sizeof source.name, "%s", name);
  return source;
}

static void round_trip(void **state) {
  (void)state;
  enum { ROWS = 301, COLUMNS = 500 }; /* more than one piece */
  static const core_dtype types[] = {CORE_FLOAT32, CORE_FLOAT16, CORE_BFLOAT16};
  core_real *data = malloc(ROWS * COLUMNS * sizeof *data), *back = malloc(ROWS * COLUMNS * sizeof *back);
  for (int64_t i = 0; i < ROWS * COLUMNS; i++) data[i] = value_at(i);
  const ckpt_safetensors_source list[] = {
      source_of("z.weight", 2, ROWS, COLUMNS, data), source_of("a.bias", 1, 7, 1, data + 1),
      source_of("scalar", 0, 1, 1, data + 5), source_of("empty", 2, 0, 4, data)};
  const char *metadata[] = {"format", "pt", NULL};
  for (size_t t = 0; t < 3; t++) {
    ckpt_safetensors *c = NULL;
    assert_ok(ckpt_safetensors_write(in_folder("trip.safetensors"), list, 4, types[t], metadata));
    assert_ok(ckpt_safetensors_open(path, &c));
    assert_int_equal(ckpt_safetensors_count(c), 4);
    assert_string_equal(ckpt_safetensors_at(c, 0)->name, "a.bias"); /* by name */
    const ckpt_safetensor *z = ckpt_safetensors_find(c, "z.weight");
    assert_int_equal(z->dtype, types[t]);
    assert_int_equal(z->rank, 2);
    assert_int_equal(z->shape[0], ROWS);
    assert_int_equal(z->count, ROWS * COLUMNS);
    assert_int_equal(ckpt_safetensors_find(c, "scalar")->rank, 0);
    assert_int_equal(ckpt_safetensors_find(c, "empty")->count, 0);
    assert_null(ckpt_safetensors_find(c, "z"));
    assert_ok(ckpt_safetensors_read(c, z, 0, z->count, back));
    assert_memory_equal(back, data, ROWS * COLUMNS * sizeof *data);
    assert_ok(ckpt_safetensors_read(c, z, 70001, 999, back));
    assert_memory_equal(back, data + 70001, 999 * sizeof *data);
    assert_error(ckpt_safetensors_read(c, z, z->count - 1, 2, back), CORE_ERR_ARGUMENT, "z.weight");
    ckpt_safetensors_close(c);
  }
  free(data);
  free(back);
}

/* Blanks behind the header, metadata, any order, types that hold no weights. */
static void reads_what_others_write(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  core_real value[3];
  craft_file(
      in_folder("other.safetensors"),
      "{\"__metadata__\":{\"format\":\"pt\"},\"half\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":"
      "[8,14]},\"ids\":{\"data_offsets\":[0,8],\"dtype\":\"I64\",\"shape\":[1]}}    ",
      14);
  assert_ok(ckpt_safetensors_open(path, &c));
  const ckpt_safetensor *half = ckpt_safetensors_find(c, "half");
  assert_ok(ckpt_safetensors_read(c, half, 0, 3, value));
  for (int i = 0; i < 3; i++) {
    uint16_t bits = (uint16_t)((8 + 2 * i) | (9 + 2 * i) << 8);
    assert_true(value[i] == (core_real)core_float_from_half(bits));
  }
  assert_error(ckpt_safetensors_read(c, ckpt_safetensors_find(c, "ids"), 0, 1, value), CORE_ERR_UNSUPPORTED,
               "'ids' is int64");
  ckpt_safetensors_close(c);
}

static void not_finite(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  uint8_t bytes[256];
  core_real value[4], huge[2] = {1, 70000};
  size_t count = craft_make("{\"x\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,8]}}", 8, bytes);
  bytes[count - 3] = 0x7f;
  bytes[count - 4] = 0x80; /* infinity in element 2 */
  craft_bytes(in_folder("infinite.safetensors"), bytes, count);
  assert_ok(ckpt_safetensors_open(path, &c));
  assert_error(ckpt_safetensors_read(c, ckpt_safetensors_at(c, 0), 1, 3, value), CORE_ERR_NON_FINITE,
               "element 2 of tensor 'x'");
  ckpt_safetensors_close(c);
  ckpt_safetensors_source source = source_of("y", 1, 2, 1, huge);
  assert_error(ckpt_safetensors_write(in_folder("y.safetensors"), &source, 1, CORE_FLOAT16, NULL),
               CORE_ERR_NON_FINITE, "element 1 of tensor 'y'");
  assert_false(core_file_exists(path));
  assert_false(core_file_exists(in_folder("y.safetensors.tmp")));
}

/* One tensor `x` of these fields; the file has 16 bytes of data. */
#define X(fields) "{\"x\":{" fields "}}"
#define GOOD "\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]"

static const struct {
  const char *header;
  core_status code;
  const char *message;
} damages[] = {
    {"", CORE_ERR_FORMAT, "does not begin"},
    {"[]", CORE_ERR_FORMAT, "does not begin"},
    {"{\"x\"", CORE_ERR_CORRUPT, "no JSON object"},
    {X(GOOD) "  ,", CORE_ERR_CORRUPT, "follows the JSON object"},
    {"{}", CORE_ERR_CORRUPT, "end at byte 0 of 16"},
    {"{\"x\":3}", CORE_ERR_CORRUPT, "'x' is not described"},
    {"{\"\":{" GOOD "}}", CORE_ERR_CORRUPT, "name has 0 bytes"},
    {X("\"dtype\":\"F32\",\"shape\":[4]"), CORE_ERR_CORRUPT, "'x' is not described"},
    {X(GOOD ",\"shape\":[4]"), CORE_ERR_CORRUPT, "'x' is not described"},
    {X("\"dtype\":7,\"shape\":[4],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "'x' is not described"},
    {X("\"dtype\":\"F8_E4M3\",\"shape\":[16],\"data_offsets\":[0,16]"), CORE_ERR_UNSUPPORTED, "F8_E4M3"},
    {X("\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "has no shape"},
    {X("\"dtype\":\"F32\",\"shape\":[1,1,1,1,4],\"data_offsets\":[0,16]"), CORE_ERR_UNSUPPORTED,
     "5 dimensions"},
    {X("\"dtype\":\"F32\",\"shape\":[-4],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "at dimension 0"},
    {X("\"dtype\":\"F32\",\"shape\":[2,2.5],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "at dimension 1"},
    {X("\"dtype\":\"F32\",\"shape\":[1e300],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "at dimension 0"},
    {X("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT,
     "at dimension 1"},
    /* 2^62 elements of 4 bytes are 0 modulo 2^64 */
    {X("\"dtype\":\"F32\",\"shape\":[2147483648,2147483648],\"data_offsets\":[0,0]"), CORE_ERR_CORRUPT,
     "needs 4611686018427387904 elements"},
    {X("\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,16]"), CORE_ERR_CORRUPT, "needs 5 elements"},
    {X("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]"), CORE_ERR_CORRUPT, "no data_offsets"},
    {X("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]"), CORE_ERR_CORRUPT, "claims bytes 16 to 0"},
    {X("\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]"), CORE_ERR_CORRUPT,
     "claims bytes 0 to 20 of 16"},
    {X("\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[4,16]"), CORE_ERR_CORRUPT, "bytes 0 to 4"},
    {X("\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]"), CORE_ERR_CORRUPT, "end at byte 12 of 16"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},\"y\":{\"dtype\":\"F32\",\"shape\":[2]"
     ","
     "\"data_offsets\":[8,16]}}",
     CORE_ERR_CORRUPT, "'y' begins at byte 8, inside"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[2],"
     "\"data_offsets\":[8,16]}}",
     CORE_ERR_CORRUPT, "bytes 4 to 8 of the data, before tensor 'y'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"x\":{\"dtype\":\"F32\",\"shape\":[2],"
     "\"data_offsets\":[8,16]}}",
     CORE_ERR_CORRUPT, "'x' comes twice"},
    {"{\"__metadata__\":[],\"x\":{" GOOD "}}", CORE_ERR_CORRUPT, "__metadata__"},
    {"{\"__metadata__\":{\"a\":1},\"x\":{" GOOD "}}", CORE_ERR_CORRUPT, "__metadata__"},
    {"{\"__metadata__\":{},\"__metadata__\":{},\"x\":{" GOOD "}}", CORE_ERR_CORRUPT,
     "__metadata__ comes twice"},
};

static void damaged_headers(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  craft_file(in_folder("damaged.safetensors"), X(GOOD), 16);
  assert_ok(ckpt_safetensors_open(path, &c)); /* what the table varies is sound */
  ckpt_safetensors_close(c);
  for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
    craft_file(in_folder("damaged.safetensors"), damages[i].header, 16);
    assert_error(ckpt_safetensors_open(path, &c), damages[i].code, damages[i].message);
    assert_message("damaged.safetensors");
    assert_null(c);
  }
}

static void deep_and_long_headers(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  char *text = malloc(2 << 20);
  memset(text, '[', 2 << 20);
  memcpy(text, "{\"x\":", 5);
  text[(2 << 20) - 1] = '\0';
  craft_file(in_folder("deep.safetensors"), text, 16);
  assert_error(ckpt_safetensors_open(path, &c), CORE_ERR_CORRUPT, "no JSON object");
  memset(text, 'a', 400);
  memcpy(text, "{\"", 2);
  strcpy(text + 300, "\":{" GOOD "}}");
  craft_file(in_folder("long.safetensors"), text, 16);
  assert_error(ckpt_safetensors_open(path, &c), CORE_ERR_CORRUPT, "name has 298 bytes");
  free(text);
}

static void damaged_files(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  uint8_t bytes[256];
  size_t count = craft_make(X(GOOD), 16, bytes);
  for (size_t length = 0; length < count; length++) {
    craft_bytes(in_folder("short.safetensors"), bytes, length);
    assert_true(ckpt_safetensors_open(path, &c) != CORE_OK);
  }
  assert_error(ckpt_safetensors_open(in_folder("none.safetensors"), &c), CORE_ERR_NOT_FOUND,
               "none.safetensors");
  assert_error(ckpt_safetensors_open(folder, &c), CORE_ERR_NOT_FOUND, "holds neither");
  memset(bytes, 0xff, 8);
  craft_bytes(in_folder("short.safetensors"), bytes, count);
  assert_error(ckpt_safetensors_open(path, &c), CORE_ERR_FORMAT, "claim a header of 9223372036854775807");
  bytes[8] = '\0';
  craft_make(X(GOOD), 16, bytes);
  bytes[8 + 5] = '\0';
  craft_bytes(in_folder("short.safetensors"), bytes, count);
  assert_error(ckpt_safetensors_open(path, &c), CORE_ERR_CORRUPT, "zero byte");
}

/* ---- shards ---- */

static void write_shards(void) {
  core_real one[2] = {1, 2}, two[2] = {3, 4};
  const ckpt_safetensors_source x = source_of("x", 1, 2, 1, one), y = source_of("y", 1, 2, 1, two);
  assert_ok(ckpt_safetensors_write(in_folder("model-1.safetensors"), &x, 1, CORE_FLOAT32, NULL));
  assert_ok(ckpt_safetensors_write(in_folder("model-2.safetensors"), &y, 1, CORE_FLOAT32, NULL));
}

static void write_index(const char *text) {
  craft_bytes(in_folder("model.safetensors.index.json"), text, strlen(text));
}

static void shards(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  core_real value[2];
  write_shards();
  write_index(
      "{\"metadata\":{\"total_size\":16},\"weight_map\":{\"y\":\"model-2.safetensors\","
      "\"x\":\"model-1.safetensors\"}}");
  assert_ok(ckpt_safetensors_open(folder, &c));
  assert_int_equal(ckpt_safetensors_count(c), 2);
  const ckpt_safetensor *y = ckpt_safetensors_find(c, "y");
  assert_non_null(strstr(ckpt_safetensors_path(c, y), "model-2"));
  assert_ok(ckpt_safetensors_read(c, y, 0, 2, value));
  assert_true(value[0] == 3 && value[1] == 4);
  ckpt_safetensors_close(c);
}

static const struct {
  const char *index;
  core_status code;
  const char *message;
} disagreements[] = {
    {"nonsense", CORE_ERR_FORMAT, "no weight_map"},
    {"{\"weight_map\":[]}", CORE_ERR_FORMAT, "no weight_map"},
    {"{\"weight_map\":{}}", CORE_ERR_CORRUPT, "is empty"},
    {"{\"weight_map\":{\"x\":3}}", CORE_ERR_CORRUPT, "of 'x'"},
    {"{\"weight_map\":{\"x\":\"../model-1.safetensors\"}}", CORE_ERR_CORRUPT, "of 'x'"},
    {"{\"weight_map\":{\"x\":\"/etc/passwd\"}}", CORE_ERR_CORRUPT, "of 'x'"},
    {"{\"weight_map\":{\"x\":\"model-3.safetensors\"}}", CORE_ERR_NOT_FOUND, "model-3"},
    {"{\"weight_map\":{\"x\":\"model-1.safetensors\",\"z\":\"model-2.safetensors\"}}", CORE_ERR_MISMATCH,
     "'z' of the index is in no shard"},
    {"{\"weight_map\":{\"x\":\"model-2.safetensors\",\"y\":\"model-1.safetensors\"}}", CORE_ERR_MISMATCH,
     "'x' is in model-1.safetensors, the index says model-2"},
    {"{\"weight_map\":{\"x\":\"model-1.safetensors\",\"x\":\"model-1.safetensors\"}}", CORE_ERR_MISMATCH,
     "lists 2 tensors, its shards hold 1"},
    {"{\"weight_map\":{\"x\":\"model-1.safetensors\",\"y\":\"copy.safetensors\"}}", CORE_ERR_CORRUPT,
     "'x' comes twice"},
};

static void indexes_that_disagree(void **state) {
  (void)state;
  ckpt_safetensors *c = NULL;
  core_real one[2] = {1, 2};
  const ckpt_safetensors_source x = source_of("x", 1, 2, 1, one);
  write_shards();
  assert_ok(ckpt_safetensors_write(in_folder("copy.safetensors"), &x, 1, CORE_FLOAT32, NULL));
  for (size_t i = 0; i < sizeof disagreements / sizeof *disagreements; i++) {
    write_index(disagreements[i].index);
    assert_error(ckpt_safetensors_open(folder, &c), disagreements[i].code, disagreements[i].message);
    assert_null(c);
  }
}

/* ---- writing ---- */

/* Whichever operation fails, the file that was there stays and nothing else is left. */
static void failures_leave_what_was_there(void **state) {
  (void)state;
  core_real old[2] = {1, 2}, new[2] = {3, 4}, value[2];
  ckpt_safetensors_source source = source_of("x", 1, 2, 1, old);
  bool done = false;
  int64_t failed = 0;
  for (int64_t n = 1; !done; n++) {
    ckpt_safetensors *c = NULL;
    source.data = old;
    assert_ok(ckpt_safetensors_write(in_folder("kept.safetensors"), &source, 1, CORE_FLOAT32, NULL));
    source.data = new;
    core_file_fault fault = {.at = n, .error = 28 /* ENOSPC */, .sticky = 1};
    core_file_inject(&fault);
    done = ckpt_safetensors_write(path, &source, 1, CORE_FLOAT32, NULL) == CORE_OK;
    core_file_inject(&(core_file_fault){0});
    failed += !done;
    assert_ok(ckpt_safetensors_open(path, &c));
    assert_ok(ckpt_safetensors_read(c, ckpt_safetensors_at(c, 0), 0, 2, value));
    assert_true(done ? value[0] == 3 : value[0] == 1 || value[0] == 3); /* the last sync may fail too late */
    ckpt_safetensors_close(c);
    assert_false(core_file_exists(in_folder("kept.safetensors.tmp")));
  }
  assert_true(failed >= 6); /* open, two writes, sync, close, rename, and the directory's */
}

static void names_twice(void **state) {
  (void)state;
  core_real one[2] = {1, 2};
  const ckpt_safetensors_source list[] = {source_of("x", 1, 2, 1, one), source_of("y", 1, 2, 1, one),
                                          source_of("x", 1, 1, 1, one)};
  assert_error(ckpt_safetensors_write(in_folder("twice.safetensors"), list, 3, CORE_FLOAT32, NULL),
               CORE_ERR_ARGUMENT, "'x' is given twice");
  assert_false(core_file_exists(path));
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, make_folder, remove_folder)
  const struct CMUnitTest tests[] = {
      TEST(round_trip),      TEST(reads_what_others_write), TEST(not_finite),
      TEST(damaged_headers), TEST(deep_and_long_headers),   TEST(damaged_files),
      TEST(shards),          TEST(indexes_that_disagree),   TEST(failures_leave_what_was_there),
      TEST(names_twice)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
