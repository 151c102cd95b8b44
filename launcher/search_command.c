/* antiphon search */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h> /* sysconf */

#include "core/log.h"
#include "launcher/embedder.h"
#include "launcher/search_output.h"

static const launch_option options[] = {
    {"--query", true}, {"--latents", true}, {"--checkpoint", true},  {"--direction", true}, {"--ids", true},
    {"-k", true},      {"--batch", true},   {"--one-by-one", false}, {"--threads", true},   {NULL, false}};

/* One search, from the command line to the last line printed. */
typedef struct search {
  const launch_arguments *arguments;
  int64_t k, batch, threads;
  bool one_by_one;
  launch_format format;
  train_vectors *file;
  train_gallery gallery;
  bool loaded, printed;
  train_search *engine;
  train_hit *match; /* [group, k] */
} search;

static core_status parse(const launch_arguments *arguments, search *s) {
  const char *sources[] = {"--query", "--latents", "--ids"};
  int given = 0;
  s->arguments = arguments;
  s->format = arguments->json ? LAUNCH_JSON : LAUNCH_TABLE;
  s->one_by_one = launch_own(arguments, "--one-by-one") != NULL;
  for (int i = 0; i < 3; i++) given += launch_own(arguments, sources[i]) != NULL;
  CHECK(given == 1, CORE_ERR_USAGE, "expected one of --query FILE, --latents SHARDS and --ids LIST");
  bool latents = launch_own(arguments, "--latents");
  CHECK(latents == (launch_own(arguments, "--checkpoint") != NULL) &&
            latents == (launch_own(arguments, "--direction") != NULL),
        CORE_ERR_USAGE, "--latents, --checkpoint and --direction belong together");
  CHECK(!s->one_by_one || !launch_own(arguments, "--batch"), CORE_ERR_USAGE,
        "--one-by-one and --batch exclude each other");
  TRY(launch_own_number(arguments, "-k", 1, INT32_MAX, 10, &s->k));
  TRY(launch_own_number(arguments, "--batch", 1, 65536, 64, &s->batch));
  TRY(launch_own_number(arguments, "--threads", 1, 1024, 0, &s->threads));
  if (s->one_by_one) s->batch = 1;
  return CORE_OK;
}

/* ---- do queries and gallery belong together ---- */

static core_status check_pair(const train_vectors_about *query, const char *query_name,
                              const train_vectors_about *gallery, const char *gallery_name) {
  TRY(launch_embed_same(query->checkpoint, query->step, query_name, gallery, gallery_name));
  CHECK(query->width == gallery->width, CORE_ERR_MISMATCH, "%s is %lld wide, the gallery %s %lld", query_name,
        (long long)query->width, gallery_name, (long long)gallery->width);
  CHECK(query->kind != TRAIN_VECTORS_QUERY || strcmp(query->toward, gallery->modality) == 0,
        CORE_ERR_MISMATCH, "%s asks for '%s', the gallery %s holds '%s'", query_name, query->toward,
        gallery_name, gallery->modality);
  CHECK(
      query->kind != TRAIN_VECTORS_KEY || strcmp(query->modality, gallery->modality) == 0, CORE_ERR_MISMATCH,
      "%s holds keys of '%s' and the gallery %s keys of '%s': a connector asks with queries (`antiphon embed "
      "... "
      "--query %s:%s`)",
      query_name, query->modality, gallery_name, gallery->modality, query->modality, gallery->modality);
  return CORE_OK;
}

/* ---- the gallery ---- */

/* Half of the memory that is free may go to a gallery. */
static bool fits(const train_vectors_about *about) {
  double pages = (double)sysconf(_SC_AVPHYS_PAGES), page = (double)sysconf(_SC_PAGESIZE);
  double bytes = (double)about->rows * (double)about->width * (double)core_dtype_size(about->dtype);
  return pages > 0 && page > 0 && bytes <= pages * page / 2;
}

static core_status create_engine(search *s) {
  train_search_options engine = {.threads = (int32_t)s->threads, .k = s->k, .batch = s->batch};
  TRY(train_search_create(&s->gallery, &engine, &s->engine));
  s->match = malloc((size_t)(train_search_group(s->engine) * s->k) * sizeof *s->match);
  CHECK(s->match, CORE_ERR_MEMORY, "no memory for the best %lld of %lld queries", (long long)s->k,
        (long long)train_search_group(s->engine));
  return CORE_OK;
}

/* For `queries` queries: in memory where the file would be read again and again. */
static core_status prepare(search *s, int64_t queries) {
  const train_vectors_about *about = train_vectors_info(s->file);
  TRY(train_gallery_of_file(s->file, &s->gallery));
  if (s->k > about->rows) {
    LOG_WARNING("the gallery has %lld vectors: -k %lld answers with these", (long long)about->rows,
                (long long)s->k);
    s->k = about->rows;
  }
  TRY(create_engine(s));
  if (queries <= train_search_group(s->engine) && !(s->one_by_one && queries > 1)) return CORE_OK;
  if (!fits(about)) {
    LOG_INFO("the gallery is more than half of the free memory: it is read once for every %lld queries",
             (long long)(s->one_by_one ? 1 : train_search_group(s->engine)));
    return CORE_OK;
  }
  train_search_destroy(s->engine);
  free(s->match);
  s->engine = NULL;
  s->match = NULL;
  TRY(train_gallery_load(s->file, (int32_t)s->threads, &s->gallery));
  s->loaded = true;
  TRY(create_engine(s));
  return CORE_OK;
}

/* Answers `count` queries: float [count, width]. */
static core_status answer(search *s, const float *query, const uint64_t *id, int64_t count) {
  int64_t step = s->one_by_one ? 1 : train_search_group(s->engine), width = s->gallery.width;
  for (int64_t lo = 0; lo < count; lo += step) {
    int64_t here = count - lo < step ? count - lo : step;
    TRY(train_search_run(s->engine, query + lo * width, here, s->match));
    if (!s->printed) launch_search_head(stdout, s->format, s->file);
    s->printed = true;
    for (int64_t q = 0; q < here; q++)
      TRY(launch_search_print(stdout, s->format, s->file, id[lo + q], s->match + q * s->k, s->k));
  }
  return CORE_OK;
}

/* ---- where queries come from ---- */

/* Rows of blocks [first, last), widened: float [rows, width]. */
static core_status read_floats(const train_vectors *file, int64_t first, int64_t last, float *out) {
  const train_vectors_about *about = train_vectors_info(file);
  int64_t rows = train_vectors_block_row(file, last) - train_vectors_block_row(file, first);
  if (about->dtype == CORE_FLOAT32) {
    TRY(train_vectors_read(file, first, last, out));
    return CORE_OK;
  }
  uint16_t *half = malloc((size_t)(rows * about->width + 1) * sizeof *half);
  CHECK(half, CORE_ERR_MEMORY, "no memory for %lld vectors", (long long)rows);
  core_status status = train_vectors_read(file, first, last, half);
  for (int64_t i = 0; status == CORE_OK && i < rows * about->width; i++)
    out[i] = core_float_from_half(half[i]);
  free(half);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* Whole blocks, about a group's worth at a time. */
static core_status answer_blocks(search *s, const train_vectors *file) {
  int64_t blocks = train_vectors_blocks(file), width = train_vectors_info(file)->width, last = 0;
  for (int64_t first = 0; first < blocks; first = last) {
    int64_t lo = train_vectors_block_row(file, first), group = train_search_group(s->engine);
    for (last = first + 1; last < blocks && train_vectors_block_row(file, last) - lo < group;) last++;
    int64_t rows = train_vectors_block_row(file, last) - lo;
    float *query = malloc((size_t)(rows * width + 1) * sizeof *query);
    CHECK(query, CORE_ERR_MEMORY, "no memory for %lld queries", (long long)rows);
    core_status status = read_floats(file, first, last, query);
    if (status == CORE_OK) status = answer(s, query, train_vectors_ids(file) + lo, rows);
    free(query);
    if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  }
  return CORE_OK;
}

static core_status search_file(search *s, const char *path) {
  train_vectors *file = NULL;
  TRY(train_vectors_open(path, &file));
  const train_vectors_about *about = train_vectors_info(file);
  core_status status = check_pair(about, path, train_vectors_info(s->file), train_vectors_path(s->file));
  if (status == CORE_OK) status = prepare(s, about->rows);
  if (status == CORE_OK) status = answer_blocks(s, file);
  train_vectors_close(file);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* The row of an id; the gallery's ids are in the order of its samples. */
static core_status find_row(const search *s, uint64_t id, int64_t *row) {
  const uint64_t *ids = train_vectors_ids(s->file);
  for (*row = 0; *row < train_vectors_info(s->file)->rows; (*row)++)
    if (ids[*row] == id) return CORE_OK;
  FAIL(CORE_ERR_NOT_FOUND, "the gallery %s has no vector of id %" PRIu64, train_vectors_path(s->file), id);
}

/* The vector of one row: float [width]. */
static core_status read_row(const search *s, int64_t row, float *out) {
  int64_t block = 0, width = train_vectors_info(s->file)->width;
  while (train_vectors_block_row(s->file, block + 1) <= row) block++;
  int64_t first = train_vectors_block_row(s->file, block);
  int64_t rows = train_vectors_block_row(s->file, block + 1) - first;
  float *all = malloc((size_t)(rows * width) * sizeof *all);
  CHECK(all, CORE_ERR_MEMORY, "no memory for %lld vectors", (long long)rows);
  core_status status = read_floats(s->file, block, block + 1, all);
  if (status == CORE_OK) memcpy(out, all + (row - first) * width, (size_t)width * sizeof *out);
  free(all);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status take_ids(const search *s, const char *list, uint64_t *id, float *query, int64_t *count) {
  const char *at = list;
  for (*count = 0; *at; (*count)++) {
    char *end = NULL;
    int64_t row = 0;
    errno = 0;
    unsigned long long value = strtoull(at, &end, 10);
    CHECK(end != at && (*end == ',' || *end == '\0') && errno == 0 && *at != '-', CORE_ERR_USAGE,
          "--ids %s: expected numbers with commas between them", list);
    id[*count] = value;
    TRY(find_row(s, value, &row));
    TRY(read_row(s, row, query + *count * train_vectors_info(s->file)->width));
    at = *end ? end + 1 : end;
  }
  CHECK(*count > 0, CORE_ERR_USAGE, "--ids without an id");
  return CORE_OK;
}

static core_status search_ids(search *s, const char *list) {
  int64_t most = 1, count = 0, width = train_vectors_info(s->file)->width;
  for (const char *c = list; *c; c++) most += *c == ',';
  uint64_t *id = malloc((size_t)most * sizeof *id);
  float *query = malloc((size_t)(most * width) * sizeof *query);
  core_status status = CORE_OK;
  if (!id || !query)
    status = core_error_begin(CORE_ERR_MEMORY, __func__, __FILE__, __LINE__, "no memory for %lld queries",
                              (long long)most);
  if (status == CORE_OK) status = take_ids(s, list, id, query, &count);
  if (status == CORE_OK) status = prepare(s, count);
  if (status == CORE_OK) status = answer(s, query, id, count);
  free(id);
  free(query);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static core_status answer_embedded(search *s, train_embedder *embedder) {
  const train_vectors_about *about = train_embedder_about(embedder);
  TRY(check_pair(about, launch_own(s->arguments, "--checkpoint"), train_vectors_info(s->file),
                 train_vectors_path(s->file)));
  TRY(prepare(s, about->rows));
  float *query = malloc((size_t)(about->rows * about->width + 1) * sizeof *query);
  CHECK(query, CORE_ERR_MEMORY, "no memory for %lld queries", (long long)about->rows);
  core_status status = train_embedder_rows(embedder, query);
  if (status == CORE_OK) status = answer(s, query, train_embedder_ids(embedder), about->rows);
  free(query);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* A tower has embeddings: what looks and what is looked for are of one kind. */
static core_status search_latents(search *s, comm_world *world, launch_arguments *arguments) {
  launch_embedder e;
  char from[CORE_NAME];
  const train_vectors_about *gallery = train_vectors_info(s->file);
  const char *direction = launch_own(arguments, "--direction"), *colon = strchr(direction, ':');
  CHECK(colon && colon > direction && colon - direction < CORE_NAME, CORE_ERR_USAGE,
        "--direction %s: expected FROM:TOWARD, as in image:text", direction);
  snprintf(from, sizeof from, "%.*s", (int)(colon - direction), direction);
  CHECK(strcmp(colon + 1, gallery->modality) == 0, CORE_ERR_MISMATCH,
        "--direction %s asks for '%s', the gallery %s holds '%s'", direction, colon + 1,
        train_vectors_path(s->file), gallery->modality);
  bool tower = gallery->kind == TRAIN_VECTORS_EMBEDDING;
  launch_embed want = {.checkpoint = launch_own(arguments, "--checkpoint"),
                       .shards = launch_own(arguments, "--latents"),
                       .key = tower ? from : NULL,
                       .query = tower ? NULL : direction,
                       .gallery = gallery,
                       .gallery_path = train_vectors_path(s->file)};
  TRY(launch_embedder_open(world, &want, arguments, &e));
  core_status status = answer_embedded(s, e.embedder);
  launch_embedder_close(&e);
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

/* ---- the command ---- */

static core_status run_search(search *s, comm_world *world, launch_arguments *arguments) {
  const char *query = launch_own(arguments, "--query"), *ids = launch_own(arguments, "--ids");
  TRY(train_vectors_open(arguments->positional[0], &s->file));
  TRY(train_gallery_of_file(s->file, &s->gallery)); /* before anything is embedded */
  if (query) return search_file(s, query);
  if (ids) return search_ids(s, ids);
  return search_latents(s, world, arguments);
}

static core_status search_all(comm_world *world, launch_arguments *arguments, int *code) {
  search s = {0};
  CHECK(comm_size(comm_world_group(world)) == 1, CORE_ERR_USAGE,
        "search is for one rank; --threads says how many cores it takes");
  TRY(parse(arguments, &s));
  core_status status = run_search(&s, world, arguments);
  train_search_destroy(s.engine);
  free(s.match);
  if (s.loaded) train_gallery_unload(&s.gallery);
  train_vectors_close(s.file);
  if (status == CORE_ERR_STOPPED) {
    LOG_INFO("stopped on request");
    *code = LAUNCH_STOPPED;
    return CORE_OK;
  }
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  return launch_collective_own(command, options, argc, argv, 1, 1, search_all);
}

const launch_command launch_search_command = {
    "search", "the nearest of a gallery that `antiphon embed` made, exactly",
    "usage: antiphon search GALLERY.h5 --query FILE.h5|--ids ID,ID,... [-k 10] [--json] [--batch N]\n"
    "                                  [--one-by-one] [--threads N]\n"
    "       antiphon search GALLERY.h5 --latents SHARDS --checkpoint C --direction FROM:TOWARD [--split "
    "NAME]\n"
    "                                  [-k 10] ... [--set key=value]...\n\n"
    "GALLERY.h5 holds keys of a connector or embeddings of a tower.\n\n"
    "--query FILE.h5   asks with the vectors of a file of the same checkpoint\n"
    "--ids LIST        asks with vectors of the gallery itself, by their ids (which find themselves)\n"
    "--latents SHARDS  asks with latents, embedded on the fly as `antiphon embed` does\n"
    "-k N              matches of a query; more than the gallery has: all it has\n"
    "--json            one object a query and line, instead of a table\n"
    "--batch N         queries that are multiplied with the gallery together (64)\n"
    "--one-by-one      each query by itself, as an interactive service would\n"
    "--threads N       cores; left out, all\n\n"
    "Answers are exact: inner products in float64 decide, equal ones go by the lower id, whatever the batch "
    "and the\n"
    "threads. The gallery is read from the file in pieces, for about a thousand queries at a time; with "
    "more\n"
    "queries it is kept in memory where it takes at most half of what is free.\n",
    run};
