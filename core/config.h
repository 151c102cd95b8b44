/* YAML configuration: a libcyaml schema, defaults written as YAML, and refusals that name file, line, key and
 * what was expected. Local: rank 0's text is what ranks agree on.
 *
 * A file is merged over the defaults, `--set a.b.c=value` over both, where a mapping is merged key by key
 * and anything else replaced; the result must match the schema exactly. All fields of the schema are
 * required: what the user may leave out is in the defaults. List items are addressed by index or, where they
 * are mappings with a `name`, by that name: data.modalities.image.length */
#ifndef CORE_CONFIG_H
#define CORE_CONFIG_H

#include <cyaml/cyaml.h> /* cyaml_schema_value_t and the CYAML_FIELD macros */

#include "core/status.h"

typedef struct core_config core_config;

/* Defaults of every item of the list of mappings at `path` ("data.modalities"). */
typedef struct core_config_items {
  const char *path;
  const char *yaml;
  /* A key that an item gets its place in the list as, where it is -1; and the path of a list of names: unless
   * that is empty, items whose `name` is not in it are taken out. NULL: none. */
  const char *place, *use;
} core_config_items;

typedef struct core_config_spec {
  const cyaml_schema_value_t *schema; /* a mapping, CYAML_FLAG_POINTER */
  const char *defaults;               /* YAML text */
  const core_config_items *items;
  int32_t item_count;
} core_config_spec;

/* Reads `path` (text == NULL) or `text` (then `path` is only its name in messages), merges and loads.
 * overrides: "key=value" strings, copied. Errors: ERR_NOT_FOUND, ERR_IO, ERR_CONFIG. */
CORE_NODISCARD core_status core_config_load(const core_config_spec *spec, const char *path, const char *text,
                                            const char *const *overrides, int32_t override_count,
                                            core_config **out);
/* The same text as `base` was read from, with the overrides of `base` and then these: it is not read again,
 * so that several configurations of one file belong together. Errors: ERR_CONFIG, ERR_USAGE. */
CORE_NODISCARD core_status core_config_derive(const core_config *base, const char *const *overrides,
                                              int32_t override_count, core_config **out);
void core_config_destroy(core_config *config);
/* How the file was called, for messages. */
const char *core_config_path(const core_config *config);
/* The structure that the schema describes; owned by the config. */
const void *core_config_data(const core_config *config);
/* The merged configuration as YAML; owned by the config. */
const char *core_config_text(const core_config *config);
/* Refuses a value that the schema allows but the program does not: ERR_CONFIG with "file:line: key: <text>",
 * or "--set key: <text>". */
core_status core_config_refuse(const core_config *config, const char *key, const char *format, ...)
    CORE_PRINTF(3, 4);

/* For the schema: a boolean that accepts only true and false (libcyaml takes any word for true). */
extern const cyaml_strval_t core_config_bool[2];
#define CORE_FIELD_BOOL(key, structure, member) \
  CYAML_FIELD_ENUM(key, CYAML_FLAG_STRICT, structure, member, core_config_bool, 2)

#endif
