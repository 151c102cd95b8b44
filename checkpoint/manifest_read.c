/* The manifest as it comes from a file: nothing in it is believed before it is checked. */
#include <cJSON.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/file.h"

#define TAIL_START ",\n\"hash\":\""
#define TAIL_END "\"}\n"

enum { HASH_DIGITS = 16, TAIL = sizeof TAIL_START - 1 + HASH_DIGITS + sizeof TAIL_END - 1 };
static const int64_t MANIFEST_LIMIT = (int64_t)1 << 30;

/* ---- scalars; 64-bit numbers are decimal strings because JSON readers round them to doubles ---- */

static core_status parse_hash(const char *text, uint64_t *out) {
  uint64_t value = 0;
  for (int i = 0; i < HASH_DIGITS; i++) {
    const char *digits = "0123456789abcdef";
    const char *at = text[i] == 0 ? NULL : strchr(digits, text[i]);
    CHECK(at != NULL, CORE_ERR_CORRUPT, "a hash is not 16 hexadecimal digits");
    value = value << 4 | (uint64_t)(at - digits);
  }
  *out = value;
  return CORE_OK;
}

static const char *string_of(const cJSON *item) {
  return cJSON_IsString(item) ? item->valuestring : NULL;
}

static core_status take_hash(const cJSON *object, const char *key, uint64_t *out) {
  const char *text = string_of(cJSON_GetObjectItemCaseSensitive(object, key));
  CHECK(text != NULL && strlen(text) == HASH_DIGITS, CORE_ERR_CORRUPT, "\"%s\" is not a hash", key);
  return parse_hash(text, out);
}

static core_status count_of(const cJSON *item, const char *what, int64_t *out) {
  const char *text = string_of(item);
  size_t length = text == NULL ? 0 : strspn(text, "0123456789");
  CHECK(length > 0 && length < 19 && text[length] == 0, CORE_ERR_CORRUPT,
        "\"%s\" is not a number of at most 18 digits in quotes", what);
  *out = strtoll(text, NULL, 10);
  return CORE_OK;
}

static core_status take_count(const cJSON *object, const char *key, int64_t *out) {
  return count_of(cJSON_GetObjectItemCaseSensitive(object, key), key, out);
}

static core_status take_array(const cJSON *object, const char *key, const cJSON **out, int64_t *count) {
  *out = cJSON_GetObjectItemCaseSensitive(object, key);
  CHECK(cJSON_IsArray(*out), CORE_ERR_CORRUPT, "\"%s\" is not a list", key);
  *count = cJSON_GetArraySize(*out);
  return CORE_OK;
}

/* ---- parts of the manifest ---- */

static core_status take_file(const cJSON *object, int32_t number, ckpt_file *out) {
  char expected[32];
  const char *name = string_of(cJSON_GetObjectItemCaseSensitive(object, "name"));
  snprintf(expected, sizeof expected, "rank-%05d.ckpt", number);
  /* The only name allowed: no path can be smuggled in, and no file can be listed twice. */
  CHECK(name != NULL && strcmp(name, expected) == 0, CORE_ERR_CORRUPT, "file %d is not called %s", number,
        expected);
  TRY(take_count(object, "bytes", &out->bytes));
  TRY(take_count(object, "blocks", &out->blocks));
  TRY(take_hash(object, "index_hash", &out->index_hash));
  int64_t least = (int64_t)(sizeof(ckpt_header) + sizeof(ckpt_trailer));
  CHECK(out->bytes >= least && out->blocks <= (out->bytes - least) / (int64_t)(sizeof(ckpt_entry) + 1),
        CORE_ERR_CORRUPT, "%s: %lld bytes cannot hold %lld blocks", expected, (long long)out->bytes,
        (long long)out->blocks);
  return CORE_OK;
}

static core_status take_files(const cJSON *root, ckpt_manifest *m) {
  const cJSON *list = NULL, *object;
  int64_t count = 0, number = 0;
  TRY(take_array(root, "files", &list, &count));
  CHECK(count > 0 && count <= CKPT_MAX_FILES, CORE_ERR_CORRUPT, "%lld files listed, expected 1 to %d",
        (long long)count, CKPT_MAX_FILES);
  m->file = calloc((size_t)count, sizeof *m->file);
  CHECK(m->file != NULL, CORE_ERR_MEMORY, "no memory for a list of %lld files", (long long)count);
  m->files = (int32_t)count;
  cJSON_ArrayForEach(object, list) {
    TRY(take_file(object, (int32_t)number, &m->file[number]));
    number++;
  }
  return CORE_OK;
}

static core_status take_part(const cJSON *list, int32_t tensor, ckpt_part *out) {
  CHECK(cJSON_IsArray(list) && cJSON_GetArraySize(list) == 3, CORE_ERR_CORRUPT,
        "a part is not [file, first, count]");
  const cJSON *file = list->child;
  CHECK(cJSON_IsNumber(file) && file->valuedouble >= 0 && file->valuedouble < CKPT_MAX_FILES &&
            file->valuedouble == (double)(int32_t)file->valuedouble,
        CORE_ERR_CORRUPT, "a part's file is not a file number");
  *out = (ckpt_part){.tensor = tensor, .file = (int32_t)file->valuedouble};
  TRY(count_of(file->next, "first", &out->first));
  return count_of(file->next->next, "count", &out->count);
}

static core_status take_shape(const cJSON *object, ckpt_item *out) {
  const cJSON *list = NULL, *size;
  int64_t rank = 0, d = 0;
  TRY(take_array(object, "shape", &list, &rank));
  CHECK(rank <= CORE_MAX_RANK, CORE_ERR_CORRUPT, "tensor %s has %lld dimensions, at most %d are possible",
        out->name, (long long)rank, CORE_MAX_RANK);
  out->rank = (int32_t)rank;
  for (int i = 0; i < CORE_MAX_RANK; i++) out->shape[i] = 1;
  cJSON_ArrayForEach(size, list) TRY(count_of(size, "shape", &out->shape[d++]));
  return CORE_OK;
}

static core_status take_item(const cJSON *object, ckpt_manifest *m, int32_t number) {
  ckpt_item *item = &m->item[number];
  const cJSON *list = NULL, *part;
  int64_t parts = 0;
  const char *name = string_of(cJSON_GetObjectItemCaseSensitive(object, "name"));
  const char *dtype = string_of(cJSON_GetObjectItemCaseSensitive(object, "dtype"));
  CHECK(name != NULL && ckpt_name_valid(name), CORE_ERR_CORRUPT, "tensor %d has an invalid name", number);
  memcpy(item->name, name, strlen(name) + 1);
  item->dtype = dtype == NULL ? CORE_DTYPE_COUNT : core_dtype_parse(dtype);
  CHECK(item->dtype != CORE_DTYPE_COUNT, CORE_ERR_CORRUPT, "tensor %s has an unknown dtype", name);
  TRY(take_shape(object, item));
  TRY(take_hash(object, "hash", &item->hash));
  TRY(take_array(object, "parts", &list, &parts));
  cJSON_ArrayForEach(part, list) TRY(take_part(part, number, &m->part[m->parts++]));
  return CORE_OK;
}

static int64_t count_parts(const cJSON *list) {
  int64_t sum = 0;
  const cJSON *object;
  cJSON_ArrayForEach(object, list) {
    const cJSON *parts = cJSON_GetObjectItemCaseSensitive(object, "parts");
    if (cJSON_IsArray(parts)) sum += cJSON_GetArraySize(parts);
  }
  return sum;
}

static core_status take_items(const cJSON *root, ckpt_manifest *m) {
  const cJSON *list = NULL, *object;
  int64_t count = 0;
  int32_t number = 0;
  TRY(take_array(root, "tensors", &list, &count));
  int64_t parts = count_parts(list);
  m->item = calloc((size_t)count + 1, sizeof *m->item);
  m->part = calloc((size_t)parts + 1, sizeof *m->part);
  CHECK(m->item != NULL && m->part != NULL, CORE_ERR_MEMORY,
        "no memory for a catalogue of %lld tensors in %lld parts", (long long)count, (long long)parts);
  m->items = (int32_t)count;
  cJSON_ArrayForEach(object, list) TRY(take_item(object, m, number++));
  return CORE_OK;
}

/* Blocks of each file as they follow from the parts must be as many as the file is said to have. */
static core_status link_and_compare(ckpt_manifest *m) {
  int64_t *blocks = calloc((size_t)m->files, sizeof *blocks);
  CHECK(blocks != NULL, CORE_ERR_MEMORY, "no memory for a list of %d files", m->files);
  core_status status = ckpt_manifest_link(m, CORE_ERR_CORRUPT, blocks);
  int32_t f = 0;
  while (status == CORE_OK && f < m->files && blocks[f] == m->file[f].blocks) f++;
  int64_t expected = f < m->files ? blocks[f] : 0;
  free(blocks);
  TRY(status);
  CHECK(f == m->files, CORE_ERR_CORRUPT, "rank-%05d.ckpt has %lld blocks listed, its parts make %lld", f,
        (long long)m->file[f].blocks, (long long)expected);
  return CORE_OK;
}

static core_status take_root(const cJSON *root, ckpt_manifest *m) {
  const char *format = string_of(cJSON_GetObjectItemCaseSensitive(root, "format"));
  const cJSON *version = cJSON_GetObjectItemCaseSensitive(root, "version");
  const char *meta = string_of(cJSON_GetObjectItemCaseSensitive(root, "meta"));
  CHECK(format != NULL && strcmp(format, CKPT_FORMAT) == 0, CORE_ERR_FORMAT,
        "\"format\" is not \"" CKPT_FORMAT "\"");
  CHECK(cJSON_IsNumber(version) && version->valuedouble >= 1, CORE_ERR_CORRUPT,
        "\"version\" is not a number");
  CHECK(version->valuedouble == CKPT_VERSION, CORE_ERR_UNSUPPORTED,
        "format version %.0f, this program reads version %d", version->valuedouble, CKPT_VERSION);
  CHECK(meta != NULL, CORE_ERR_CORRUPT, "\"meta\" is not a string");
  TRY(take_count(root, "step", &m->step));
  TRY(take_hash(root, "content_hash", &m->content_hash));
  m->meta = strdup(meta);
  CHECK(m->meta != NULL, CORE_ERR_MEMORY, "no memory for %zu bytes of meta", strlen(meta));
  TRY(take_files(root, m));
  TRY(take_items(root, m));
  TRY(link_and_compare(m));
  uint64_t hash = ckpt_content_hash(m);
  CHECK(hash == m->content_hash, CORE_ERR_CORRUPT,
        "content hash %016llx does not belong to the tensors' hashes", (unsigned long long)m->content_hash);
  return CORE_OK;
}

/* ---- the whole ---- */

static core_status check_tail(const char *text, size_t count) {
  uint64_t expected = 0;
  CHECK(count > TAIL, CORE_ERR_CORRUPT, "%zu bytes are too few for a manifest", count);
  const char *tail = text + count - TAIL;
  CHECK(memcmp(tail, TAIL_START, sizeof TAIL_START - 1) == 0 &&
            memcmp(text + count - (sizeof TAIL_END - 1), TAIL_END, sizeof TAIL_END - 1) == 0,
        CORE_ERR_CORRUPT, "it does not end with its hash: cut off or not a manifest");
  TRY(parse_hash(tail + sizeof TAIL_START - 1, &expected));
  uint64_t hash = XXH64(text, count - TAIL, 0);
  CHECK(hash == expected, CORE_ERR_CORRUPT, "hash %016llx, expected %016llx", (unsigned long long)hash,
        (unsigned long long)expected);
  return CORE_OK;
}

core_status ckpt_manifest_parse(const char *text, size_t count, ckpt_manifest *out) {
  *out = (ckpt_manifest){0};
  TRY(check_tail(text, count));
  cJSON *root = cJSON_ParseWithLength(text, count);
  CHECK(root != NULL, CORE_ERR_CORRUPT, "not valid JSON");
  core_status status = take_root(root, out);
  cJSON_Delete(root);
  if (status != CORE_OK) ckpt_manifest_free(out);
  TRY(status);
  return CORE_OK;
}

core_status ckpt_manifest_text(const char *path, char **text, int64_t *count) {
  char file[CKPT_PATH];
  TRY(ckpt_path(file, "%s/" CKPT_MANIFEST, path));
  CHECK(core_file_exists(file), CORE_ERR_NOT_FOUND,
        "%s has no " CKPT_MANIFEST ": not a checkpoint, or one that was never finished", path);
  TRY(core_file_read_all(file, MANIFEST_LIMIT, text, count));
  return CORE_OK;
}

/* A manifest copied from another step's directory would otherwise pass if the contents are equal. */
static core_status check_step(const char *path, int64_t step) {
  size_t end = strlen(path);
  while (end > 0 && path[end - 1] == '/') end--;
  size_t begin = end;
  while (begin > 0 && path[begin - 1] != '/') begin--;
  char name[64];
  ckpt_place place;
  if (end - begin >= sizeof name) return CORE_OK;
  memcpy(name, path + begin, end - begin);
  name[end - begin] = 0;
  if (!ckpt_place_parse(name, &place)) return CORE_OK;
  CHECK(place.step == step, CORE_ERR_CORRUPT, "it is of step %lld, the directory of step %lld",
        (long long)step, (long long)place.step);
  return CORE_OK;
}

core_status ckpt_manifest_take(const char *path, const char *text, int64_t count, ckpt_manifest *out) {
  core_status status = ckpt_manifest_parse(text, (size_t)count, out);
  if (status == CORE_OK) {
    status = check_step(path, out->step);
    if (status != CORE_OK) ckpt_manifest_free(out);
  }
  if (status != CORE_OK) (void)core_error_context(status, "%s/" CKPT_MANIFEST, path);
  TRY(status);
  return CORE_OK;
}
