/* Outline: libyaml turns file, defaults and overrides into one document tree, whose text libcyaml loads by
 * the schema. The user's own tree is kept beside it, because only it knows the line of a key. */
#include "core/config.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "core/file.h" /* core_file_read_all */

enum {
  DEEPEST = 24,
  KEY = 256,
  LARGEST_FILE = 4 << 20,
  MOST_NODES = 200000,
  MOST_KEYS = 1024,
  MOST_OPEN = 256
};

struct core_config {
  const core_config_spec *spec;
  char *path, *source; /* source: the user's text */
  yaml_document_t user, merged;
  bool has_user, has_merged;
  char **overrides; /* copies: messages name them as long as the configuration lives */
  int32_t override_count;
  char (*override_key)[KEY]; /* of each override, as call_item calls list items */
  char *text;
  void *data;
};

const cyaml_strval_t core_config_bool[2] = {{"false", 0}, {"true", 1}};

/* ---- document trees ---- */

/* Line of what the parser complains about; for bytes that are not UTF-8 it knows the offset only. */
static size_t problem_line(const yaml_parser_t *parser, const char *text, size_t count) {
  size_t line = parser->problem_mark.line + 1;
  if (parser->error != YAML_READER_ERROR) return line;
  for (size_t i = 0; i < parser->problem_offset && i < count; i++) line += text[i] == '\n';
  return line;
}

/* Brackets open at once. The parser's time grows with their square, so they are counted before it runs;
 * brackets in texts count too, which no sensible file notices. */
static int64_t deepest_brackets(const char *text, size_t count) {
  int64_t open = 0, most = 0;
  for (size_t i = 0; i < count; i++) {
    if (text[i] == '[' || text[i] == '{') open++;
    if ((text[i] == ']' || text[i] == '}') && open > 0) open--;
    if (open > most) most = open;
  }
  return most;
}

/* One document, and nothing after it that would be ignored. */
static core_status parse_text(const char *name, const char *text, size_t count, yaml_document_t *out) {
  yaml_parser_t parser;
  yaml_document_t next;
  bool more = false;
  CHECK(!memchr(text, '\0', count), CORE_ERR_CONFIG, "%s: a NUL byte; expected text in UTF-8", name);
  CHECK(deepest_brackets(text, count) <= MOST_OPEN, CORE_ERR_CONFIG, "%s: brackets nested too deeply", name);
  CHECK(yaml_parser_initialize(&parser), CORE_ERR_MEMORY, "no memory to parse %s", name);
  yaml_parser_set_input_string(&parser, (const unsigned char *)text, count);
  int good = yaml_parser_load(&parser, out);
  size_t line = problem_line(&parser, text, count);
  if (good && yaml_document_get_root_node(out)) {
    good = yaml_parser_load(&parser, &next);
    more = good && yaml_document_get_root_node(&next);
    line = more ? next.start_mark.line + 1 : problem_line(&parser, text, count);
    if (good) yaml_document_delete(&next);
    if (!good || more) yaml_document_delete(out);
  }
  char problem[160];
  snprintf(problem, sizeof problem, "%s", parser.problem ? parser.problem : "not YAML");
  yaml_parser_delete(&parser);
  CHECK(good, CORE_ERR_CONFIG, "%s:%zu: %s", name, line, problem);
  CHECK(!more, CORE_ERR_CONFIG, "%s:%zu: expected one document, here begins another", name, line);
  return CORE_OK;
}

static const char *scalar(const yaml_node_t *node) {
  return node && node->type == YAML_SCALAR_NODE ? (const char *)node->data.scalar.value : NULL;
}

static yaml_node_pair_t *find_pair(yaml_document_t *document, const yaml_node_t *mapping, const char *key) {
  yaml_node_pair_t *end = mapping->data.mapping.pairs.top;
  for (yaml_node_pair_t *pair = mapping->data.mapping.pairs.start; pair < end; pair++) {
    const char *name = scalar(yaml_document_get_node(document, pair->key));
    if (name && strcmp(name, key) == 0) return pair;
  }
  return NULL;
}

static int sequence_count(const yaml_node_t *node) {
  return (int)(node->data.sequence.items.top - node->data.sequence.items.start);
}

/* Item of a list by index, or by the `name` of a mapping in it; -1 if there is none. */
static int find_item(yaml_document_t *document, const yaml_node_t *list, const char *key) {
  char *end = NULL;
  long index = strtol(key, &end, 10);
  if (*key && !*end) return index >= 0 && index < sequence_count(list) ? (int)index : -1;
  for (int i = 0; i < sequence_count(list); i++) {
    yaml_node_t *item = yaml_document_get_node(document, list->data.sequence.items.start[i]);
    if (item->type != YAML_MAPPING_NODE) continue;
    yaml_node_pair_t *pair = find_pair(document, item, "name");
    const char *name = pair ? scalar(yaml_document_get_node(document, pair->value)) : NULL;
    if (name && strcmp(name, key) == 0) return i;
  }
  return -1;
}

/* Takes the next component of a dotted path; false at its end. */
static bool next_component(const char **path, char *out) {
  size_t length = strcspn(*path, ".");
  if (length == 0 || length >= KEY) return false;
  memcpy(out, *path, length);
  out[length] = '\0';
  *path += length + ((*path)[length] == '.' && (*path)[length + 1]);
  return true;
}

static void join(char *out, size_t capacity, const char *word, const char *separator) {
  size_t used = strlen(out);
  snprintf(out + used, capacity - used, "%s%s", used ? separator : "", word);
}

/* What a list's item is called: its name, which stays when others are taken out, or its number. */
static void call_item(yaml_document_t *document, const yaml_node_t *list, int item, char *out) {
  yaml_node_t *node =
      item >= 0 ? yaml_document_get_node(document, list->data.sequence.items.start[item]) : NULL;
  yaml_node_pair_t *pair = node && node->type == YAML_MAPPING_NODE ? find_pair(document, node, "name") : NULL;
  const char *name = pair ? scalar(yaml_document_get_node(document, pair->value)) : NULL;
  if (name && *name && strlen(name) < KEY && !strchr(name, '.') && find_item(document, list, name) == item)
    snprintf(out, KEY, "%s", name);
  else
    snprintf(out, KEY, "%d", item);
}

/* The place that holds the index of the node at `path`, NULL if there is none. canonical (KEY bytes, or
 * NULL): the path with list items as call_item calls them. */
static int *find_slot(yaml_document_t *document, const char *path, char *canonical) {
  yaml_node_t *node = yaml_document_get_root_node(document);
  char key[KEY];
  int *slot = NULL;
  if (canonical) *canonical = '\0';
  while (node && next_component(&path, key)) {
    slot = NULL;
    if (node->type == YAML_MAPPING_NODE) {
      yaml_node_pair_t *pair = find_pair(document, node, key);
      slot = pair ? &pair->value : NULL;
    } else if (node->type == YAML_SEQUENCE_NODE) {
      int item = find_item(document, node, key);
      call_item(document, node, item, key);
      slot = item >= 0 ? &node->data.sequence.items.start[item] : NULL;
    }
    if (canonical) join(canonical, KEY, key, ".");
    node = slot ? yaml_document_get_node(document, *slot) : NULL;
  }
  return node && *path == '\0' ? slot : NULL; /* an empty component ends the walk early */
}

static core_status copy_node(yaml_document_t *to, yaml_document_t *from, int node, int depth, int *out);

static core_status copy_mapping(yaml_document_t *to, yaml_document_t *from, int node, int depth, int target) {
  /* indices, not pointers: adding nodes moves them */
  int64_t count = yaml_document_get_node(from, node)->data.mapping.pairs.top -
                  yaml_document_get_node(from, node)->data.mapping.pairs.start;
  for (int64_t i = 0; i < count; i++) {
    yaml_node_pair_t pair = yaml_document_get_node(from, node)->data.mapping.pairs.start[i];
    int key = 0, value = 0;
    TRY(copy_node(to, from, pair.key, depth + 1, &key));
    TRY(copy_node(to, from, pair.value, depth + 1, &value));
    CHECK(yaml_document_append_mapping_pair(to, target, key, value), CORE_ERR_MEMORY,
          "no memory for the configuration");
  }
  return CORE_OK;
}

static core_status copy_sequence(yaml_document_t *to, yaml_document_t *from, int node, int depth,
                                 int target) {
  int count = sequence_count(yaml_document_get_node(from, node));
  for (int i = 0; i < count; i++) {
    int item = 0;
    TRY(copy_node(to, from, yaml_document_get_node(from, node)->data.sequence.items.start[i], depth + 1,
                  &item));
    CHECK(yaml_document_append_sequence_item(to, target, item), CORE_ERR_MEMORY,
          "no memory for the configuration");
  }
  return CORE_OK;
}

/* Depth and size are bounded: aliases can make a small file a huge or endless tree. */
static core_status copy_node(yaml_document_t *to, yaml_document_t *from, int node, int depth, int *out) {
  CHECK(depth < DEEPEST && to->nodes.top - to->nodes.start < MOST_NODES, CORE_ERR_CONFIG,
        "the configuration is nested too deeply or too large");
  const yaml_node_t *source = yaml_document_get_node(from, node);
  yaml_node_type_t type = source->type; /* kept: within one document, adding nodes moves the source */
  if (type == YAML_SCALAR_NODE) {
    *out = yaml_document_add_scalar(to, NULL, source->data.scalar.value, (int)source->data.scalar.length,
                                    source->data.scalar.style);
  } else if (type == YAML_MAPPING_NODE) {
    *out = yaml_document_add_mapping(to, NULL, YAML_BLOCK_MAPPING_STYLE);
  } else {
    *out = yaml_document_add_sequence(to, NULL, YAML_FLOW_SEQUENCE_STYLE);
  }
  CHECK(*out, CORE_ERR_MEMORY, "no memory for the configuration");
  if (type == YAML_MAPPING_NODE) TRY(copy_mapping(to, from, node, depth, *out));
  if (type == YAML_SEQUENCE_NODE) TRY(copy_sequence(to, from, node, depth, *out));
  return CORE_OK;
}

/* Mappings merge key by key; anything else replaces. */
static core_status merge(yaml_document_t *to, int target, yaml_document_t *from, int source, int depth) {
  int64_t count = yaml_document_get_node(from, source)->data.mapping.pairs.top -
                  yaml_document_get_node(from, source)->data.mapping.pairs.start;
  for (int64_t i = 0; i < count; i++) {
    yaml_node_pair_t pair = yaml_document_get_node(from, source)->data.mapping.pairs.start[i];
    const char *key = scalar(yaml_document_get_node(from, pair.key));
    CHECK(key && depth < DEEPEST, CORE_ERR_CONFIG, "keys must be plain words");
    yaml_node_pair_t *there = find_pair(to, yaml_document_get_node(to, target), key);
    bool both = there && yaml_document_get_node(to, there->value)->type == YAML_MAPPING_NODE &&
                yaml_document_get_node(from, pair.value)->type == YAML_MAPPING_NODE;
    if (both) {
      TRY(merge(to, there->value, from, pair.value, depth + 1));
      continue;
    }
    int value = 0, name = 0;
    TRY(copy_node(to, from, pair.value, depth + 1, &value));
    there = find_pair(to, yaml_document_get_node(to, target), key); /* copying may have moved it */
    if (there) {
      there->value = value;
      continue;
    }
    TRY(copy_node(to, from, pair.key, depth + 1, &name));
    CHECK(yaml_document_append_mapping_pair(to, target, name, value), CORE_ERR_MEMORY,
          "no memory for the configuration");
  }
  return CORE_OK;
}

/* Keys are plain words and given once. Visits are counted, not nodes: aliases make a small file a huge tree.
 */
static core_status check_tree(const char *path, yaml_document_t *document, int index, int depth,
                              int64_t *visits) {
  const yaml_node_t *node = yaml_document_get_node(document, index);
  size_t line = node->start_mark.line + 1;
  CHECK(depth < DEEPEST, CORE_ERR_CONFIG, "%s:%zu: nested too deeply", path, line);
  CHECK(++*visits <= MOST_NODES, CORE_ERR_CONFIG, "%s:%zu: the configuration is too large", path, line);
  if (node->type == YAML_SEQUENCE_NODE)
    for (int i = 0; i < sequence_count(node); i++)
      TRY(check_tree(path, document, node->data.sequence.items.start[i], depth + 1, visits));
  if (node->type != YAML_MAPPING_NODE) return CORE_OK;
  CHECK(node->data.mapping.pairs.top - node->data.mapping.pairs.start <= MOST_KEYS, CORE_ERR_CONFIG,
        "%s:%zu: a mapping of more than %d keys is too large", path, line, MOST_KEYS);
  for (yaml_node_pair_t *pair = node->data.mapping.pairs.start; pair < node->data.mapping.pairs.top; pair++) {
    const yaml_node_t *key = yaml_document_get_node(document, pair->key);
    CHECK(scalar(key), CORE_ERR_CONFIG, "%s:%zu: a key must be a plain word", path, key->start_mark.line + 1);
    CHECK(find_pair(document, node, scalar(key)) == pair, CORE_ERR_CONFIG,
          "%s:%zu: the key '%s' is given twice", path, key->start_mark.line + 1, scalar(key));
    TRY(check_tree(path, document, pair->value, depth + 1, visits));
  }
  return CORE_OK;
}

/* ---- messages ---- */

static bool prefix_of(const char *prefix, const char *key) {
  size_t length = strlen(prefix);
  return strncmp(prefix, key, length) == 0 && (key[length] == '\0' || key[length] == '.');
}

/* "--set key", or "file:line" of the key or of the nearest mapping around it. */
static void locate(const core_config *config, const char *asked, char *out, size_t capacity) {
  char canonical[KEY];
  yaml_document_t *merged = (yaml_document_t *)(uintptr_t)&config->merged; /* libyaml has no const */
  const char *key = config->has_merged && find_slot(merged, asked, canonical) ? canonical : asked;
  for (int32_t i = config->override_count - 1; i >= 0; i--)
    if (prefix_of(key, config->override_key[i]) || prefix_of(config->override_key[i], key)) {
      snprintf(out, capacity, "--set %s", config->overrides[i]);
      return;
    }
  char part[KEY];
  snprintf(part, sizeof part, "%s", key);
  while (config->has_user && part[0]) {
    int *slot = find_slot((yaml_document_t *)(uintptr_t)&config->user, part, NULL);
    if (slot) {
      const yaml_node_t *node = yaml_document_get_node((yaml_document_t *)(uintptr_t)&config->user, *slot);
      snprintf(out, capacity, "%s:%zu", config->path, node->start_mark.line + 1);
      return;
    }
    char *dot = strrchr(part, '.');
    *(dot ? dot : part) = '\0';
  }
  snprintf(out, capacity, "%s", config->path);
}

core_status core_config_refuse(const core_config *config, const char *key, const char *format, ...) {
  char place[2 * KEY + 512], text[CORE_ERROR_TEXT];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  locate(config, key, place, sizeof place);
  return core_error_begin(CORE_ERR_CONFIG, __func__, __FILE__, __LINE__, "%s: %s: %s", place, key, text);
}

/* ---- the schema, in words ---- */

static const cyaml_schema_value_t *schema_at(const cyaml_schema_value_t *schema, const char *path) {
  char key[KEY];
  while (schema && next_component(&path, key)) {
    if (schema->type == CYAML_SEQUENCE || schema->type == CYAML_SEQUENCE_FIXED) {
      schema = schema->sequence.entry;
      continue;
    }
    if (schema->type != CYAML_MAPPING) return NULL;
    const cyaml_schema_field_t *field = schema->mapping.fields;
    while (field->key && strcmp(field->key, key) != 0) field++;
    schema = field->key ? &field->value : NULL;
  }
  return schema;
}

static void describe_schema(const cyaml_schema_value_t *schema, char *out, size_t capacity) {
  char words[400] = "";
  if (!schema) {
    snprintf(out, capacity, "nothing");
    return;
  }
  switch (schema->type) {
    case CYAML_INT:
      snprintf(out, capacity, "an integer");
      break;
    case CYAML_UINT:
      snprintf(out, capacity, "an integer of at least 0");
      break;
    case CYAML_FLOAT:
      snprintf(out, capacity, "a number");
      break;
    case CYAML_STRING:
      snprintf(out, capacity, "a text");
      break;
    case CYAML_ENUM:
      for (uint32_t i = 0; i < schema->enumeration.count; i++)
        join(words, sizeof words, schema->enumeration.strings[i].str, ", ");
      snprintf(out, capacity, "one of: %s", words);
      break;
    case CYAML_MAPPING:
      for (const cyaml_schema_field_t *field = schema->mapping.fields; field->key; field++)
        join(words, sizeof words, field->key, ", ");
      snprintf(out, capacity, "a mapping with the keys %s", words);
      break;
    case CYAML_SEQUENCE:
      snprintf(out, capacity, "a list of %u to %u items", schema->sequence.min, schema->sequence.max);
      break;
    default:
      snprintf(out, capacity, "another kind of value");
  }
}

/* ---- libcyaml's report ---- */

typedef struct report {
  char message[256];
  char path[KEY];
  int lines;
} report;

/* libcyaml logs the reason first and then the path to it, innermost first:
 * "in mapping field 'width' (line: 2, column: 10)", "in sequence entry '4' (...)". */
static void collect(cyaml_log_t level, void *context, const char *format, va_list arguments) {
  report *seen = context;
  char line[256], component[KEY], rest[KEY];
  vsnprintf(line, sizeof line, format, arguments);
  line[strcspn(line, "\n")] = '\0';
  if (level != CYAML_LOG_ERROR) return;
  if (seen->lines++ == 0) {
    const char *text = strncmp(line, "Load: ", 6) == 0 ? line + 6 : line;
    snprintf(seen->message, sizeof seen->message, "%s", text);
    return;
  }
  const char *quote = strchr(line, '\'');
  if (!quote || !strstr(line, "  in ")) return;
  size_t length = strcspn(quote + 1, "'");
  if (length >= sizeof component) return;
  memcpy(component, quote + 1, length);
  component[length] = '\0';
  if (strstr(line, "in sequence entry")) /* counted from one */
    snprintf(component, sizeof component, "%ld", strtol(quote + 1, NULL, 10) - 1);
  snprintf(rest, sizeof rest, "%s", seen->path);
  snprintf(seen->path, sizeof seen->path, "%.120s%s%.120s", component, rest[0] ? "." : "", rest);
}

static const char *after(const char *text, const char *prefix) {
  size_t length = strlen(prefix);
  return strncmp(text, prefix, length) == 0 ? text + length : NULL;
}

static core_status refuse_report(const core_config *config, const report *seen) {
  char expected[512], key[2 * KEY];
  const char *unknown = after(seen->message, "Unexpected key: ");
  const char *missing = after(seen->message, "Missing required mapping field: ");
  if (unknown) {
    describe_schema(schema_at(config->spec->schema, seen->path), expected, sizeof expected);
    snprintf(key, sizeof key, "%s%s%s", seen->path, seen->path[0] ? "." : "", unknown);
    return core_config_refuse(config, key, "unknown key; expected %s", expected);
  }
  if (missing) { /* the path ends with the last key that was read in the mapping */
    char *dot;
    snprintf(key, sizeof key, "%s", seen->path);
    dot = strrchr(key, '.');
    *(dot ? dot : key) = '\0';
    size_t used = strlen(key);
    snprintf(key + used, sizeof key - used, "%s%s", used ? "." : "", missing);
    describe_schema(schema_at(config->spec->schema, key), expected, sizeof expected);
    return core_config_refuse(config, key, "missing; expected %s", expected);
  }
  snprintf(key, sizeof key, "%s", seen->path);
  char *item = after(seen->message, "Excessive entries") ? strrchr(key, '.') : NULL;
  if (item) *item = '\0'; /* it is the list that is wrong, not its last item */
  describe_schema(schema_at(config->spec->schema, key), expected, sizeof expected);
  return core_config_refuse(config, key, "expected %s (%s)", expected, seen->message);
}

/* ---- loading ---- */

static int append_output(void *data, unsigned char *buffer, size_t size) {
  core_config *config = data;
  size_t used = config->text ? strlen(config->text) : 0;
  char *grown = realloc(config->text, used + size + 1);
  if (!grown) return 0;
  memcpy(grown + used, buffer, size);
  grown[used + size] = '\0';
  config->text = grown;
  return 1;
}

/* yaml_document_dump empties the document, so it gets a copy. */
static core_status emit(core_config *config) {
  yaml_document_t copy;
  yaml_emitter_t emitter;
  int root = 0;
  CHECK(yaml_document_initialize(&copy, NULL, NULL, NULL, 1, 1), CORE_ERR_MEMORY,
        "no memory for the configuration");
  TRY(copy_node(&copy, &config->merged, 1, 0, &root));
  CHECK(yaml_emitter_initialize(&emitter), CORE_ERR_MEMORY, "no memory for the configuration");
  yaml_emitter_set_output(&emitter, append_output, config);
  yaml_emitter_set_width(&emitter, 100);
  int good =
      yaml_emitter_open(&emitter) && yaml_emitter_dump(&emitter, &copy) && yaml_emitter_close(&emitter);
  yaml_emitter_delete(&emitter);
  CHECK(good && config->text, CORE_ERR_MEMORY, "the configuration cannot be written as YAML");
  return CORE_OK;
}

static core_status merge_user(core_config *config) {
  const yaml_node_t *root = yaml_document_get_root_node(&config->user);
  if (!root) return CORE_OK; /* an empty file: defaults only */
  CHECK(root->type == YAML_MAPPING_NODE, CORE_ERR_CONFIG, "%s:%zu: expected keys and values", config->path,
        root->start_mark.line + 1);
  int64_t visits = 0;
  TRY(check_tree(config->path, &config->user, 1, 0, &visits));
  TRY(merge(&config->merged, 1, &config->user, 1, 0));
  return CORE_OK;
}

/* Each item of the list becomes: its defaults, with the item merged over them. */
static core_status apply_items(core_config *config, const core_config_items *items) {
  int *slot = find_slot(&config->merged, items->path, NULL);
  if (!slot || yaml_document_get_node(&config->merged, *slot)->type != YAML_SEQUENCE_NODE) return CORE_OK;
  int list = *slot, count = sequence_count(yaml_document_get_node(&config->merged, list));
  yaml_document_t defaults;
  TRY(parse_text("defaults", items->yaml, strlen(items->yaml), &defaults));
  core_status status = CORE_OK;
  for (int i = 0; i < count && status == CORE_OK; i++) {
    int item = yaml_document_get_node(&config->merged, list)->data.sequence.items.start[i], made = 0;
    if (yaml_document_get_node(&config->merged, item)->type != YAML_MAPPING_NODE) continue;
    status = copy_node(&config->merged, &defaults, 1, 0, &made);
    if (status == CORE_OK) status = merge(&config->merged, made, &config->merged, item, 0);
    yaml_document_get_node(&config->merged, list)->data.sequence.items.start[i] = made;
  }
  yaml_document_delete(&defaults);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* Items get their places, then the list keeps those that are used. */
static core_status place_items(core_config *config, yaml_node_t *list, const char *key) {
  for (int i = 0; i < sequence_count(list); i++) {
    char number[16];
    const yaml_node_t *item = yaml_document_get_node(&config->merged, list->data.sequence.items.start[i]);
    yaml_node_pair_t *pair = item->type == YAML_MAPPING_NODE ? find_pair(&config->merged, item, key) : NULL;
    const char *there = pair ? scalar(yaml_document_get_node(&config->merged, pair->value)) : NULL;
    if (!there || strcmp(there, "-1") != 0) continue;
    snprintf(number, sizeof number, "%d", i);
    int list_number = (int)(list - config->merged.nodes.start),
        pair_number = (int)(pair - item->data.mapping.pairs.start),
        item_number = (int)(item - config->merged.nodes.start);
    int made = yaml_document_add_scalar(&config->merged, NULL, (const unsigned char *)number, -1,
                                        YAML_PLAIN_SCALAR_STYLE);
    CHECK(made, CORE_ERR_MEMORY, "no memory for the configuration");
    list = config->merged.nodes.start + list_number; /* adding nodes moves them */
    config->merged.nodes.start[item_number].data.mapping.pairs.start[pair_number].value = made;
  }
  return CORE_OK;
}

static bool names_item(yaml_document_t *document, const yaml_node_t *use, const yaml_node_t *item) {
  yaml_node_pair_t *pair = item->type == YAML_MAPPING_NODE ? find_pair(document, item, "name") : NULL;
  const char *name = pair ? scalar(yaml_document_get_node(document, pair->value)) : NULL;
  for (int i = 0; name && i < sequence_count(use); i++) {
    const char *used = scalar(yaml_document_get_node(document, use->data.sequence.items.start[i]));
    if (used && strcmp(used, name) == 0) return true;
  }
  return false;
}

static core_status select_items(core_config *config, const core_config_items *items) {
  int *slot = find_slot(&config->merged, items->path, NULL);
  yaml_node_t *list = slot ? yaml_document_get_node(&config->merged, *slot) : NULL;
  if (!list || list->type != YAML_SEQUENCE_NODE) return CORE_OK;
  int number = *slot, kept = 0;
  if (items->place) TRY(place_items(config, list, items->place));
  slot = items->use ? find_slot(&config->merged, items->use, NULL) : NULL;
  const yaml_node_t *use = slot ? yaml_document_get_node(&config->merged, *slot) : NULL;
  if (!use || use->type != YAML_SEQUENCE_NODE || sequence_count(use) == 0) return CORE_OK;
  list = yaml_document_get_node(&config->merged, number);
  yaml_node_item_t *item = list->data.sequence.items.start;
  for (int i = 0; i < sequence_count(list); i++)
    if (names_item(&config->merged, use, yaml_document_get_node(&config->merged, item[i])))
      item[kept++] = item[i];
  list->data.sequence.items.top = item + kept;
  return CORE_OK;
}

/* The value as a node of the merged document: a mapping is merged over the one that is there. slot: of its
 * key, NULL where that is new; adding nodes leaves the list or mapping that it lies in where it is. */
static core_status take_value(core_config *config, const int *slot, yaml_document_t *value, int *out) {
  const yaml_node_t *root = yaml_document_get_root_node(value);
  int64_t visits = 0;
  if (root) TRY(check_tree("--set", value, 1, 0, &visits));
  if (root && slot && root->type == YAML_MAPPING_NODE &&
      yaml_document_get_node(&config->merged, *slot)->type == YAML_MAPPING_NODE) {
    *out = *slot;
    TRY(merge(&config->merged, *out, value, 1, 0));
    return CORE_OK;
  }
  if (root) TRY(copy_node(&config->merged, value, 1, 0, out));
  if (!root) /* nothing, blanks or a comment: an empty text */
    *out = yaml_document_add_scalar(&config->merged, NULL, (const unsigned char *)"", 0,
                                    YAML_SINGLE_QUOTED_SCALAR_STYLE);
  CHECK(*out, CORE_ERR_MEMORY, "no memory for the configuration");
  return CORE_OK;
}

static core_status apply_override(core_config *config, int32_t index) {
  const char *text = config->overrides[index], *equals = strchr(text, '=');
  char *key = config->override_key[index];
  CHECK(equals && equals > text && equals - text < KEY, CORE_ERR_USAGE, "--set %s: expected key=value", text);
  snprintf(key, KEY, "%.*s", (int)(equals - text), text);
  yaml_document_t value;
  TRY(parse_text("--set", equals + 1, strlen(equals + 1), &value));
  char canonical[KEY];
  int made = 0, *slot = find_slot(&config->merged, key, canonical); /* before a value renames its item */
  core_status status = take_value(config, slot, &value, &made);
  yaml_document_delete(&value);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  if (slot) {
    *slot = made;
    memcpy(key, canonical, KEY);
    return CORE_OK;
  }
  /* a key that is nowhere yet: put it into its mapping, the schema will judge it */
  char parent[KEY];
  snprintf(parent, sizeof parent, "%s", key);
  char *dot = strrchr(parent, '.'), *last = key;
  int mapping = 1;
  if (dot) {
    *dot = '\0';
    last = dot + 1;
    slot = find_slot(&config->merged, parent, canonical);
    mapping = slot ? *slot : 0;
  }
  if (!mapping || !*last || yaml_document_get_node(&config->merged, mapping)->type != YAML_MAPPING_NODE)
    return core_config_refuse(config, key, "there is no such key");
  if (dot) snprintf(key, KEY, "%s.%s", canonical, last);
  int name =
      yaml_document_add_scalar(&config->merged, NULL, (const unsigned char *)last, -1, YAML_ANY_SCALAR_STYLE);
  CHECK(name && yaml_document_append_mapping_pair(&config->merged, mapping, name, made), CORE_ERR_MEMORY,
        "no memory for the configuration");
  return CORE_OK;
}

/* Digits without leading zeros, which libcyaml would read as octal. */
static bool is_integer(const char *text, bool negative) {
  const char *digits = text + (negative && *text == '-');
  size_t count = strspn(digits, "0123456789");
  if (count == 0 || digits[count] || (count > 1 && *digits == '0')) return false;
  errno = 0;
  if (negative)
    (void)strtoll(text, NULL, 10);
  else
    (void)strtoull(text, NULL, 10);
  return errno == 0;
}

static bool is_number(const char *text) {
  char *end = NULL;
  errno = 0;
  double value = strtod(text, &end);
  return end != text && *end == '\0' && errno == 0 && value - value == 0;
}

static core_status check_number(const core_config *config, const cyaml_schema_value_t *schema,
                                const char *text, const char *path) {
  char expected[64];
  bool good = schema->type == CYAML_FLOAT ? is_number(text) : is_integer(text, schema->type == CYAML_INT);
  describe_schema(schema, expected, sizeof expected);
  if (!good) return core_config_refuse(config, path, "expected %s, got '%s'", expected, text);
  return CORE_OK;
}

/* libcyaml takes "0.1x" for 0.1 and "nan" for a number, so numbers are judged here. Whatever does not fit the
 * schema otherwise is left to libcyaml. */
static core_status check_numbers(core_config *config, const cyaml_schema_value_t *schema, int index,
                                 const char *path) {
  const yaml_node_t *node = yaml_document_get_node(&config->merged, index);
  char inner[KEY];
  if (schema->type == CYAML_INT || schema->type == CYAML_UINT || schema->type == CYAML_FLOAT) {
    if (scalar(node)) TRY(check_number(config, schema, scalar(node), path));
  } else if (schema->type == CYAML_SEQUENCE && node->type == YAML_SEQUENCE_NODE) {
    for (int i = 0; i < sequence_count(node); i++) {
      snprintf(inner, sizeof inner, "%s.%d", path, i);
      TRY(check_numbers(config, schema->sequence.entry, node->data.sequence.items.start[i], inner));
    }
  } else if (schema->type == CYAML_MAPPING && node->type == YAML_MAPPING_NODE) {
    for (const cyaml_schema_field_t *field = schema->mapping.fields; field->key; field++) {
      yaml_node_pair_t *pair = find_pair(&config->merged, node, field->key);
      snprintf(inner, sizeof inner, "%s%s%s", path, *path ? "." : "", field->key);
      if (pair) TRY(check_numbers(config, &field->value, pair->value, inner));
    }
  }
  return CORE_OK;
}

static core_status load_schema(core_config *config) {
  report seen = {{0}, {0}, 0};
  cyaml_config_t settings = {
      .log_fn = collect, .log_ctx = &seen, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR};
  cyaml_err_t result = cyaml_load_data((const unsigned char *)config->text, strlen(config->text), &settings,
                                       config->spec->schema, &config->data, NULL);
  if (result == CYAML_OK) return CORE_OK;
  if (seen.lines == 0) snprintf(seen.message, sizeof seen.message, "%s", cyaml_strerror(result));
  TRY(refuse_report(config, &seen));
  return CORE_OK;
}

static core_status load(core_config *config, const char *text) {
  int64_t count = text ? (int64_t)strlen(text) : 0;
  if (text)
    config->source = strdup(text);
  else
    TRY(core_file_read_all(config->path, LARGEST_FILE, &config->source, &count));
  CHECK(config->source, CORE_ERR_MEMORY, "no memory for the configuration");
  TRY(parse_text(config->path, config->source, (size_t)count, &config->user));
  config->has_user = true;
  TRY(parse_text("defaults", config->spec->defaults, strlen(config->spec->defaults), &config->merged));
  config->has_merged = true;
  TRY(merge_user(config));
  for (int32_t i = 0; i < config->spec->item_count; i++) TRY(apply_items(config, &config->spec->items[i]));
  for (int32_t i = 0; i < config->override_count; i++) TRY(apply_override(config, i));
  /* once more: an override may have brought items of its own */
  for (int32_t i = 0; i < config->spec->item_count; i++) TRY(apply_items(config, &config->spec->items[i]));
  for (int32_t i = 0; i < config->spec->item_count; i++) TRY(select_items(config, &config->spec->items[i]));
  TRY(check_numbers(config, config->spec->schema, 1, ""));
  TRY(emit(config));
  TRY(load_schema(config));
  return CORE_OK;
}

core_status core_config_load(const core_config_spec *spec, const char *path, const char *text,
                             const char *const *overrides, int32_t override_count, core_config **out) {
  core_config *config = calloc(1, sizeof *config);
  CHECK(config, CORE_ERR_MEMORY, "no memory for the configuration");
  config->spec = spec;
  config->path = strdup(path);
  config->overrides = calloc((size_t)override_count + 1, sizeof *config->overrides);
  config->override_count = config->overrides ? override_count : 0;
  bool copied = config->overrides != NULL;
  for (int32_t i = 0; i < config->override_count; i++) {
    config->overrides[i] = strdup(overrides[i]);
    copied = copied && config->overrides[i];
  }
  config->override_key = calloc((size_t)override_count + 1, sizeof *config->override_key);
  core_status status = CORE_OK;
  if (!config->path || !config->override_key || !copied)
    status =
        core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for the configuration");
  if (status == CORE_OK) status = load(config, text);
  if (status != CORE_OK) {
    core_config_destroy(config);
    return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  *out = config;
  return CORE_OK;
}

core_status core_config_derive(const core_config *base, const char *const *overrides, int32_t override_count,
                               core_config **out) {
  int32_t before = base->override_count;
  const char **all = calloc((size_t)(before + override_count) + 1, sizeof *all);
  CHECK(all, CORE_ERR_MEMORY, "no memory for the configuration");
  for (int32_t i = 0; i < before; i++) all[i] = base->overrides[i];
  for (int32_t i = 0; i < override_count; i++) all[before + i] = overrides[i];
  core_status status =
      core_config_load(base->spec, base->path, base->source, all, before + override_count, out);
  free(all);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

const char *core_config_path(const core_config *config) {
  return config->path;
}

void core_config_destroy(core_config *config) {
  if (!config) return;
  cyaml_config_t settings = {.log_fn = NULL, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR};
  if (config->data) cyaml_free(&settings, config->spec->schema, config->data, 0);
  if (config->has_user) yaml_document_delete(&config->user);
  if (config->has_merged) yaml_document_delete(&config->merged);
  for (int32_t i = 0; i < config->override_count; i++) free(config->overrides[i]);
  free(config->overrides);
  free(config->override_key);
  free(config->text);
  free(config->path);
  free(config->source);
  free(config);
}

const void *core_config_data(const core_config *config) {
  return config->data;
}

const char *core_config_text(const core_config *config) {
  return config->text;
}
