/* What `antiphon search` prints. */
#ifndef LAUNCH_SEARCH_OUTPUT_H
#define LAUNCH_SEARCH_OUTPUT_H

#include <stdio.h>

#include "core/status.h"
#include "trainer/serve/search.h"

typedef enum launch_format { LAUNCH_TABLE, LAUNCH_JSON } launch_format;

/* One query with its matches, best first; keys and labels where the gallery has them. The table has one line
 * a match; JSON one object a query and line. */
CORE_NODISCARD core_status launch_search_print(FILE *out, launch_format format, const train_vectors *gallery,
                                               uint64_t query, const train_hit *match, int64_t k);
/* The table's first line; nothing for JSON. */
void launch_search_head(FILE *out, launch_format format, const train_vectors *gallery);

#endif
