#include "launcher/search_output.h"

#include <cJSON.h>
#include <inttypes.h>
#include <stdlib.h>

/* Quoted and escaped; malloc'ed. */
static char *quoted(const char *text) {
  cJSON *string = cJSON_CreateString(text);
  char *json = string ? cJSON_PrintUnformatted(string) : NULL;
  cJSON_Delete(string);
  return json;
}

static core_status print_json(FILE *out, const train_vectors *gallery, uint64_t query, const train_hit *match,
                              int64_t k) {
  const int32_t *label = train_vectors_labels(gallery);
  char key[TRAIN_MOST_KEY + 1];
  fprintf(out, "{\"query\": %" PRIu64 ", \"matches\": [", query);
  for (int64_t i = 0; i < k; i++) {
    fprintf(out, "%s{\"id\": %" PRIu64 ", \"score\": %.9g", i ? ", " : "", match[i].id, match[i].score);
    if (label) fprintf(out, ", \"label\": %d", label[match[i].row]);
    TRY(train_vectors_key(gallery, match[i].row, key));
    if (key[0]) {
      char *text = quoted(key);
      CHECK(text, CORE_ERR_MEMORY, "no memory for a key");
      fprintf(out, ", \"key\": %s", text);
      free(text);
    }
    fprintf(out, "}");
  }
  fprintf(out, "]}\n");
  return CORE_OK;
}

static core_status print_table(FILE *out, const train_vectors *gallery, uint64_t query,
                               const train_hit *match, int64_t k) {
  const int32_t *label = train_vectors_labels(gallery);
  char key[TRAIN_MOST_KEY + 1];
  for (int64_t i = 0; i < k; i++) {
    TRY(train_vectors_key(gallery, match[i].row, key));
    fprintf(out, "%12" PRIu64 " %6lld %12" PRIu64 " %10.6f", query, (long long)i + 1, match[i].id,
            match[i].score);
    if (label) fprintf(out, " %8d", label[match[i].row]);
    fprintf(out, "%s%s\n", key[0] ? "  " : "", key);
  }
  return CORE_OK;
}

void launch_search_head(FILE *out, launch_format format, const train_vectors *gallery) {
  if (format == LAUNCH_JSON) return;
  fprintf(out, "%12s %6s %12s %10s%s\n", "query", "rank", "id", "score",
          train_vectors_labels(gallery) ? "    label" : "");
}

core_status launch_search_print(FILE *out, launch_format format, const train_vectors *gallery, uint64_t query,
                                const train_hit *match, int64_t k) {
  if (format == LAUNCH_JSON)
    TRY(print_json(out, gallery, query, match, k));
  else
    TRY(print_table(out, gallery, query, match, k));
  CHECK(!ferror(out), CORE_ERR_IO, "the results cannot be written");
  return CORE_OK;
}
