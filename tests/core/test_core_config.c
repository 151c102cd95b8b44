/* The configuration: a small schema of the test's own, and the real one. Refusals are judged by what they
 * name: file, line, key, and what was expected. */
#include "core/config.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "core/file.h"
#include "tests/support/test_set.h"
#include "tests/support/test_unit.h"
#include "trainer/settings.h"

/* ---- the small schema ---- */

enum { RED, GREEN };

typedef struct item {
  char *name;
  int64_t size;
  double weight;
} item;

typedef struct shape {
  int64_t width;
  uint64_t seed;
  double rate;
  char *title;
  int colour, on;
  struct {
    int64_t depth;
    double scale;
  } inner;
  item *items;
  unsigned items_count;
  int64_t *numbers;
  unsigned numbers_count;
  char **used;
  unsigned used_count;
} shape;

static const cyaml_strval_t colours[] = {{"red", RED}, {"green", GREEN}};
static const cyaml_schema_field_t item_fields[] = {
    CYAML_FIELD_STRING_PTR("name", CYAML_FLAG_POINTER, item, name, 0, 64),
    CYAML_FIELD_INT("size", CYAML_FLAG_DEFAULT, item, size),
    CYAML_FIELD_FLOAT("weight", CYAML_FLAG_DEFAULT, item, weight), CYAML_FIELD_END};
static const cyaml_schema_value_t item_value = {CYAML_VALUE_MAPPING(CYAML_FLAG_DEFAULT, item, item_fields)};
static const cyaml_schema_value_t word_value = {CYAML_VALUE_STRING(CYAML_FLAG_POINTER, char *, 0, 64)};
static const cyaml_schema_value_t number_value = {CYAML_VALUE_INT(CYAML_FLAG_DEFAULT, int64_t)};
typedef __typeof__(((shape *)0)->inner) inner_part;
static const cyaml_schema_field_t inner_fields[] = {
    CYAML_FIELD_INT("depth", CYAML_FLAG_DEFAULT, inner_part, depth),
    CYAML_FIELD_FLOAT("scale", CYAML_FLAG_DEFAULT, inner_part, scale), CYAML_FIELD_END};
static const cyaml_schema_field_t shape_fields[] = {
    CYAML_FIELD_INT("width", CYAML_FLAG_DEFAULT, shape, width),
    CYAML_FIELD_UINT("seed", CYAML_FLAG_DEFAULT, shape, seed),
    CYAML_FIELD_FLOAT("rate", CYAML_FLAG_DEFAULT, shape, rate),
    CYAML_FIELD_STRING_PTR("title", CYAML_FLAG_POINTER, shape, title, 0, 64),
    CYAML_FIELD_ENUM("colour", CYAML_FLAG_STRICT, shape, colour, colours, 2),
    CORE_FIELD_BOOL("on", shape, on),
    CYAML_FIELD_MAPPING("inner", CYAML_FLAG_DEFAULT, shape, inner, inner_fields),
    CYAML_FIELD_SEQUENCE("items", CYAML_FLAG_POINTER, shape, items, &item_value, 0, 4),
    CYAML_FIELD_SEQUENCE("numbers", CYAML_FLAG_POINTER, shape, numbers, &number_value, 0, 3),
    CYAML_FIELD_SEQUENCE("used", CYAML_FLAG_POINTER, shape, used, &word_value, 0, 4),
    CYAML_FIELD_END};
static const cyaml_schema_value_t shape_value = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_POINTER, shape, shape_fields)};
static const core_config_items shape_items = {
    .path = "items", .yaml = "{size: 3, weight: 0.5}", .place = "size", .use = "used"};
/* width, and inner.depth, have no default */
static const core_config_spec spec = {&shape_value,
                                      "{seed: 1, rate: 0.1, title: none, colour: red, on: false, inner: "
                                      "{scale: 2}, items: [], numbers: [], used: "
                                      "[]}",
                                      &shape_items, 1};

static core_config *config;

static int forget(void **state) {
  (void)state;
  core_config_destroy(config);
  config = NULL;
  core_file_inject(NULL);
  return 0;
}

#define LENGTH(list) ((int32_t)(sizeof(list) / sizeof *(list)))

static core_status load(const char *text) {
  core_config_destroy(config);
  config = NULL;
  return core_config_load(&spec, "a.yaml", text, NULL, 0, &config);
}

static core_status load_with(const char *text, const char *override) {
  core_config_destroy(config);
  config = NULL;
  return core_config_load(&spec, "a.yaml", text, &override, 1, &config);
}

static const shape *data(void) {
  return core_config_data(config);
}

static const char good[] =
    "width: 7\n"
    "inner:\n"
    "  depth: 4\n"
    "items:\n"
    "  - name: left\n"
    "    size: 10\n"
    "  - name: right\n";

static void a_file_is_merged_over_the_defaults(void **state) {
  (void)state;
  assert_ok(load(good));
  const shape *s = data();
  assert_int_equal(s->width, 7);
  assert_int_equal(s->seed, 1);
  assert_true(s->rate == 0.1);
  assert_string_equal(s->title, "none");
  assert_int_equal(s->colour, RED);
  assert_int_equal(s->on, 0);
  assert_int_equal(s->inner.depth, 4);
  assert_true(s->inner.scale == 2); /* a default beside a key that the file gives */
  assert_int_equal(s->items_count, 2);
  assert_string_equal(s->items[0].name, "left");
  assert_int_equal(s->items[0].size, 10);
  assert_true(s->items[0].weight == 0.5);
  assert_int_equal(s->items[1].size, 3);
}

/* A size of -1 becomes the item's place, which it keeps when others are taken out. */
static void items_that_are_not_used_leave_the_list(void **state) {
  (void)state;
  static const char three[] =
      "width: 7\ninner: {depth: 4}\nitems: [{name: left, size: -1}, {name: right, size: -1}, {name: mid}]\n";
  assert_ok(load_with(three, "used=[mid, right]"));
  assert_int_equal(data()->items_count, 2);
  assert_string_equal(data()->items[0].name, "right");
  assert_int_equal(data()->items[0].size, 1);
  assert_string_equal(data()->items[1].name, "mid");
  assert_int_equal(data()->items[1].size, 3);
  char *text = strdup(core_config_text(config));
  assert_ok(load(text));
  assert_string_equal(core_config_text(config), text);
  free(text);
  assert_ok(load(three));
  assert_int_equal(data()->items_count, 3);
  /* a message finds the override of an item whose place has changed */
  static const char *const set[] = {"items.0.weight=8", "items.2.weight=7", "used=[mid]"};
  core_config_destroy(config);
  assert_ok(core_config_load(&spec, "a.yaml", three, set, LENGTH(set), &config));
  assert_error(core_config_refuse(config, "items.0.weight", "bad"), CORE_ERR_CONFIG,
               "--set items.2.weight=7: ");
}

static void a_derived_configuration_has_all_overrides(void **state) {
  (void)state;
  core_config *derived = NULL;
  const char *const more[] = {"width=5", "title=other"};
  assert_ok(load_with(good, "width=9"));
  assert_ok(core_config_derive(config, more, 2, &derived));
  const shape *s = core_config_data(derived);
  assert_int_equal(s->width, 5);
  assert_string_equal(s->title, "other");
  assert_int_equal(s->inner.depth, 4);
  assert_int_equal(data()->width, 9);
  assert_string_equal(core_config_path(derived), "a.yaml");
  core_config_destroy(derived);
  assert_error(core_config_derive(config, (const char *const[]){"no=1"}, 1, &derived), CORE_ERR_CONFIG,
               "--set no=1: no: unknown key");
}

static void the_merged_text_loads_to_the_same(void **state) {
  (void)state;
  assert_ok(load(good));
  char *text = strdup(core_config_text(config));
  assert_ok(load(text));
  assert_string_equal(core_config_text(config), text);
  assert_int_equal(data()->items_count, 2);
  free(text);
}

static void overrides_win_and_the_last_wins(void **state) {
  (void)state;
  static const char *const set[] = {"width=9",           "inner.depth=5",        "items.1.size=20",
                                    "items.left.size=8", "items.right.weight=3", "title=two words",
                                    "numbers=[4, 5]",    "numbers.1=6",          "on=true",
                                    "width=11",          "colour=green",         "seed=18446744073709551615"};
  assert_ok(core_config_load(&spec, "a.yaml", good, set, LENGTH(set), &config));
  const shape *s = data();
  assert_int_equal(s->width, 11);
  assert_int_equal(s->inner.depth, 5);
  assert_int_equal(s->items[0].size, 8);
  assert_int_equal(s->items[1].size, 20);
  assert_true(s->items[1].weight == 3);
  assert_string_equal(s->title, "two words");
  assert_int_equal(s->numbers_count, 2);
  assert_int_equal(s->numbers[1], 6);
  assert_int_equal(s->on, 1);
  assert_int_equal(s->colour, GREEN);
  assert_true(s->seed == UINT64_MAX);
}

static void a_mapping_in_an_override_is_merged(void **state) {
  (void)state;
  assert_ok(load_with(good, "inner={depth: 6}"));
  assert_int_equal(data()->inner.depth, 6);
  assert_true(data()->inner.scale == 2);
}

static void items_of_an_override_get_the_defaults_too(void **state) {
  (void)state;
  assert_ok(load_with(good, "items=[{name: new, size: 4}, {name: newer}]"));
  assert_int_equal(data()->items_count, 2);
  assert_string_equal(data()->items[1].name, "newer");
  assert_int_equal(data()->items[0].size, 4);
  assert_int_equal(data()->items[1].size, 3);
  assert_ok(load_with(good, "items.right={name: other}"));
  assert_string_equal(data()->items[1].name, "other");
  assert_int_equal(data()->items[1].size, 3);
}

/* ---- refusals ---- */

typedef struct refusal {
  const char *text; /* after the good text, or alone if it begins with '!' */
  const char *place, *expected;
} refusal;

static void refuse_all(const refusal *list, int32_t count) {
  for (int32_t i = 0; i < count; i++) {
    char text[1024];
    const char *given = list[i].text;
    snprintf(text, sizeof text, "%s%s", *given == '!' ? "" : good, *given == '!' ? given + 1 : given);
    print_message("           %s\n", given);
    core_status status = load(text);
    assert_error(status, CORE_ERR_CONFIG, list[i].place);
    assert_message(list[i].expected);
    assert_null(config);
  }
}

static void refusals_name_file_line_key_and_what_was_expected(void **state) {
  (void)state;
  static const refusal list[] = {
      {"widht: 3\n", "a.yaml:8: widht: unknown key", "width, seed, rate, title, colour, on, inner, items"},
      {"!width: 1\ninner: {depth: 1, depht: 2}\n", "a.yaml:2: inner.depht: unknown key", "depth, scale"},
      {"!width: 1\ninner: {depth: 1}\nitems:\n- {name: a, sise: 2}\n", "a.yaml:4: items.0.sise: unknown key",
       "name, size, weight"},
      {"!inner: {depth: 1}\n", "a.yaml: width: missing", "an integer"},
      {"!width: 1\n", "inner.depth: missing", "an integer"},
      {"!width: 1\ninner: {scale: 1}\n", "a.yaml:2: inner.depth: missing", "an integer"},
      {"!width: 1\ninner: {depth: 1}\nitems: [{size: 2}]\n", "a.yaml:3: items.0.name: missing", "a text"},
      {"!\nwidth: wide\ninner: {depth: 1}\n", "a.yaml:2: width", "expected an integer, got 'wide'"},
      {"!width: 1.5\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"!width: 0x10\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"!width: 010\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"}, /* ten, or eight? */
      {"!width: 99999999999999999999\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"!width: [1]\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"!width: {a: 1}\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"!width:\ninner: {depth: 1}\n", "a.yaml:1: width", "an integer"},
      {"seed: -1\n", "a.yaml:8: seed", "an integer"},
      {"seed: 18446744073709551616\n", "a.yaml:8: seed", "an integer"},
      {"rate: 0.1x\n", "a.yaml:8: rate", "expected a number, got '0.1x'"},
      {"rate: nan\n", "a.yaml:8: rate", "expected a number"},
      {"rate: .inf\n", "a.yaml:8: rate", "expected a number"},
      {"rate: inf\n", "a.yaml:8: rate", "expected a number"},
      {"rate: 1e999\n", "a.yaml:8: rate", "expected a number"},
      {"rate: ''\n", "a.yaml:8: rate", "expected a number"},
      {"colour: blue\n", "a.yaml:8: colour", "one of: red, green"},
      {"colour: Red\n", "a.yaml:8: colour", "one of: red, green"},
      {"on: yes\n", "a.yaml:8: on", "one of: false, true"},
      {"title: [a, b]\n", "a.yaml:8: title", "a text"},
      {"numbers: 3\n", "a.yaml:8: numbers", "a list of 0 to 3 items"},
      {"numbers: [1, 2, 3, 4]\n", "a.yaml:8: numbers", "a list of 0 to 3 items"},
      {"numbers:\n- 1\n- x\n", "a.yaml:10: numbers.1", "an integer, got 'x'"},
      {"!width: 1\ninner: 4\n", "a.yaml:2: inner", "a mapping with the keys depth, scale"},
      {"!width: 1\ninner: {depth: 1}\nitems: [3]\n", "a.yaml:3: items.0", "a mapping with the keys name"},
      {"width: 8\n", "a.yaml:8: the key 'width' is given twice", ""},
      {"!width: 1\ninner: {depth: 1, scale: 1, depth: 2}\n", "a.yaml:2: the key 'depth' is given twice", ""},
      {"!width: 1\nitems:\n- name: a\n  size: 1\n  name: b\n", "a.yaml:5: the key 'name' is given twice", ""},
      {"!- 1\n- 2\n", "a.yaml:1: expected keys and values", ""},
      {"!just words\n", "a.yaml:1: expected keys and values", ""},
      {"? [a, b]\n: 1\n", "a.yaml:8: a key must be a plain word", ""},
      {"!width: 1\n\tinner: 2\n", "a.yaml:2:", ""},
      {"!width: {\n", "a.yaml:", ""},
      {"!width: *nowhere\n", "a.yaml:1:", "alias"},
      {"!width: 1\n---\ninner: {depth: 1}\n", "a.yaml:2:", "one document"},
      {"!", "inner.depth: missing", "an integer"}, /* an empty file: only the defaults */
      {"!# nothing\n", "inner.depth: missing", "an integer"},
  };
  refuse_all(list, LENGTH(list));
}

static void overrides_are_refused_by_their_own_text(void **state) {
  (void)state;
  static const char *const list[][3] = {
      {"widht=3", "--set widht=3: widht: unknown key", "width, seed"},
      {"inner.depht=3", "--set inner.depht=3: inner.depht: unknown key", "depth, scale"},
      {"nothing.depth=3", "--set nothing.depth=3: nothing.depth: there is no such key", ""},
      {"items.5.size=3", "--set items.5.size=3", "there is no such key"},
      {"items.-1.size=3", "--set items.-1.size=3", "there is no such key"},
      {"items.middle.size=3", "--set items.middle.size=3", "there is no such key"},
      {"items.left.sise=3", "--set items.left.sise=3", "unknown key"},
      {"width.depth=3", "--set width.depth=3", "there is no such key"},
      {"title..x=3", "--set title..x=3", "there is no such key"},
      {"title.=3", "--set title.=3", "there is no such key"},
      {"width=wide", "--set width=wide: width: expected an integer", "got 'wide'"},
      {"items.right.size=1.5", "--set items.right.size=1.5", "an integer"},
      {"items.0.size=x", "--set items.0.size=x: items.0.size", "an integer"},
      {"colour=blue", "--set colour=blue: colour", "one of: red, green"},
      {"width=", "--set width=: width", "an integer"},
      {"width= ", "--set width= : width", "an integer"},
      {"width=# a comment", "--set width=# a comment", "an integer"},
      {"inner={depth: 1, scale: 1, depth: 2}", "--set", "the key 'depth' is given twice"},
      {"inner={[a]: 1}", "--set", "a key must be a plain word"},
      {"width=[", "--set", ""},
      {"width={a: 1", "--set", ""},
  };
  for (int32_t i = 0; i < LENGTH(list); i++) {
    print_message("           --set %s\n", list[i][0]);
    assert_error(load_with(good, list[i][0]), CORE_ERR_CONFIG, list[i][1]);
    assert_message(list[i][2]);
    assert_null(config);
  }
  assert_error(load_with(good, "width"), CORE_ERR_USAGE, "--set width: expected key=value");
  assert_error(load_with(good, "=3"), CORE_ERR_USAGE, "expected key=value");
  char longer[400];
  memset(longer, 'k', sizeof longer - 1);
  memcpy(longer + sizeof longer - 3, "=1", 3);
  assert_error(load_with(good, longer), CORE_ERR_USAGE, "expected key=value");
}

static void a_program_refuses_values_by_their_place(void **state) {
  (void)state;
  static const char *const set[] = {"items.right.size=0"};
  assert_ok(core_config_load(&spec, "a.yaml", good, set, 1, &config));
  assert_error(core_config_refuse(config, "inner.depth", "too deep: %d", 4), CORE_ERR_CONFIG,
               "a.yaml:3: inner.depth: too deep: 4");
  assert_error(core_config_refuse(config, "items.left.size", "too large"), CORE_ERR_CONFIG,
               "a.yaml:6: items.left.size: too large");
  assert_error(core_config_refuse(config, "items.right.size", "zero"), CORE_ERR_CONFIG,
               "--set items.right.size=0: items.right.size: zero");
  assert_error(core_config_refuse(config, "items.1.size", "zero"), CORE_ERR_CONFIG,
               "--set items.right.size=0: items.1.size: zero"); /* the same place by its number */
  assert_error(core_config_refuse(config, "items.right.weight", "heavy"), CORE_ERR_CONFIG,
               "a.yaml:7: items.right.weight: heavy"); /* a default: the line of what is around it */
  assert_error(core_config_refuse(config, "rate", "slow"), CORE_ERR_CONFIG, "a.yaml: rate: slow");
}

/* ---- files ---- */

static void files_are_read_or_refused_by_name(void **state) {
  (void)state;
  char directory[] = "/tmp/antiphon-config-XXXXXX", path[64];
  assert_non_null(mkdtemp(directory));
  snprintf(path, sizeof path, "%s/c.yaml", directory);
  assert_ok(core_file_replace(path, good, strlen(good)));
  assert_ok(core_config_load(&spec, path, NULL, NULL, 0, &config));
  assert_int_equal(data()->width, 7);
  forget(state);
  assert_error(core_config_load(&spec, "/nonexistent.yaml", NULL, NULL, 0, &config), CORE_ERR_NOT_FOUND,
               "/nonexistent.yaml");
  assert_error(core_config_load(&spec, directory, NULL, NULL, 0, &config), CORE_ERR_IO, directory);
  core_file_fault fault = {.at = 3, .error = 5};
  core_file_inject(&fault);
  assert_error(core_config_load(&spec, path, NULL, NULL, 0, &config), CORE_ERR_IO, path);
  core_file_inject(NULL);
  size_t size = 5 << 20;
  char *large = malloc(size);
  assert_non_null(large);
  memset(large, ' ', size);
  memcpy(large, good, strlen(good));
  assert_ok(core_file_replace(path, large, size));
  free(large);
  assert_error(core_config_load(&spec, path, NULL, NULL, 0, &config), CORE_ERR_FORMAT, "5242880 bytes");
  assert_message(path);
  assert_null(config);
  test_remove_tree(directory);
}

/* ---- the real schema ---- */

static const char real[] =
    "data:\n"
    "  path: somewhere\n"
    "  modalities:\n"
    "    - {name: image, length: 8}\n"
    "    - {name: text}\n"
    "model: {width: 32, layers: 2, heads: 4}\n";

static core_status load_real(const char *text, const char *override) {
  core_config_destroy(config);
  config = NULL;
  return core_config_load(train_settings_spec(), "r.yaml", text, &override, override ? 1 : 0, &config);
}

static void the_real_configuration_loads(void **state) {
  (void)state;
  assert_ok(load_real(real, NULL));
  const train_settings *s = core_config_data(config);
  assert_int_equal(s->data.modalities_count, 2);
  assert_int_equal(s->data.modalities[0].length, 8);
  assert_int_equal(s->data.modalities[1].length, 64);
  assert_int_equal(s->model.width, 32);
  assert_int_equal(s->model.moe.experts, 8);
  assert_ok(train_settings_check(config, 1));
  assert_ok(load_real(real, "data.modalities.text.length=12"));
  s = core_config_data(config);
  assert_int_equal(s->data.modalities[1].length, 12);
  assert_int_equal(s->data.modalities[0].length, 8);
}

static void the_real_configuration_refuses(void **state) {
  (void)state;
  assert_error(load_real(real, "model.widht=3"), CORE_ERR_CONFIG,
               "--set model.widht=3: model.widht: unknown key");
  assert_message("kv_heads");
  assert_error(load_real(real, "data.modalities.sound.length=3"), CORE_ERR_CONFIG, "no such key");
  assert_error(load_real(real, "model.moe.dispatch=drop"), CORE_ERR_CONFIG, "one of: dropless, capacity");
  assert_error(load_real(real, "model.dense=no"), CORE_ERR_CONFIG, "one of: false, true");
  assert_error(load_real(real, "run.seed=-3"), CORE_ERR_CONFIG, "run.seed");
  assert_error(load_real("model: {width: 32, layers: 2, heads: 4}\ndata: {path: x}\n", NULL), CORE_ERR_CONFIG,
               "r.yaml:2: data.modalities: missing");
  assert_error(load_real("model: {width: 32, layers: 2}\n", NULL), CORE_ERR_CONFIG, "missing");
  assert_error(load_real(real, "data.modalities=[]"), CORE_ERR_CONFIG, "data.modalities");
  assert_error(load_real(real, "optimizer.rate=0.1x"), CORE_ERR_CONFIG, "--set optimizer.rate=0.1x");
}

#define TEST(name) cmocka_unit_test_teardown(name, forget)

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(a_file_is_merged_over_the_defaults),
      TEST(the_merged_text_loads_to_the_same),
      TEST(items_that_are_not_used_leave_the_list),
      TEST(a_derived_configuration_has_all_overrides),
      TEST(a_mapping_in_an_override_is_merged),
      TEST(overrides_win_and_the_last_wins),
      TEST(items_of_an_override_get_the_defaults_too),
      TEST(refusals_name_file_line_key_and_what_was_expected),
      TEST(overrides_are_refused_by_their_own_text),
      TEST(a_program_refuses_values_by_their_place),
      TEST(files_are_read_or_refused_by_name),
      TEST(the_real_configuration_loads),
      TEST(the_real_configuration_refuses),
  };
  return cmocka_run_group_tests_name("core/config", tests, NULL, NULL);
}
