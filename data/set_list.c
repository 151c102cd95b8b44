/* Outline: which splits, modalities and shard numbers a directory holds, read in one pass; what to say when
 * something is missing. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "data/memory_impl.h"
#include "data/set_impl.h"

enum { LIST_TEXT = 256, MOST_SHARDS = 1000000 };

/* A short list of names for a message; each name once. */
typedef struct name_list {
  char text[LIST_TEXT];
  char seen[DATA_MOST_SPLITS][CORE_NAME];
  int count;
} name_list;

static void add_name(name_list *list, const char *name, size_t length) {
  if (length >= CORE_NAME || list->count == DATA_MOST_SPLITS) return;
  for (int i = 0; i < list->count; ++i)
    if (strlen(list->seen[i]) == length && memcmp(list->seen[i], name, length) == 0) return;
  memcpy(list->seen[list->count], name, length);
  list->seen[list->count][length] = '\0';
  const size_t used = strlen(list->text);
  (void)snprintf(list->text + used, sizeof list->text - used, "%s%.*s", list->count > 0 ? ", " : "",
                 (int)length, name);
  ++list->count;
}

static const char *listed(const name_list *list) {
  return list->count > 0 ? list->text : "none";
}

/* "<modality>-<digits>.h5": length of the modality's name and the number; false for any other name. */
static bool parse_name(const char *name, size_t *modality, int64_t *number) {
  const char *dash = strrchr(name, '-');
  if (dash == NULL || dash == name || !isdigit((unsigned char)dash[1])) return false;
  char *end = NULL;
  errno = 0;
  *number = strtoll(dash + 1, &end, 10);
  *modality = (size_t)(dash - name);
  return errno == 0 && end - dash >= 6 && strcmp(end, ".h5") == 0; /* at least five digits */
}

static bool is_directory(const char *path) {
  struct stat about;
  return stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

static void list_splits(const char *directory, name_list *list) {
  DIR *dir = opendir(directory);
  for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
    if (entry->d_name[0] != '.' && is_directory(path)) add_name(list, entry->d_name, strlen(entry->d_name));
  }
  if (dir != NULL) (void)closedir(dir);
}

static core_status check_directories(const char *directory, const char *split, const char *path) {
  name_list splits = {.text = ""};
  CHECK(is_directory(directory), CORE_ERR_NOT_FOUND, "%s: no such directory of latent shards", directory);
  if (is_directory(path)) return CORE_OK;
  list_splits(directory, &splits);
  FAIL(CORE_ERR_NOT_FOUND, "%s: no such split \"%s\"; there are: %s", directory, split, listed(&splits));
}

/* Shard numbers of one modality. Freed by the caller. */
typedef struct shard_numbers {
  data_bytes numbers; /* int64 */
  int64_t count, largest;
} shard_numbers;

/* The modalities that are looked for. */
typedef struct shard_search {
  const char *path;
  const char *const *modality;
  int32_t count;
  shard_numbers *found; /* [count] */
  name_list others;
} shard_search;

static core_status take_entry(shard_search *search, const char *name) {
  size_t length = 0;
  int64_t number = 0;
  if (!parse_name(name, &length, &number)) return CORE_OK;
  add_name(&search->others, name, length);
  for (int32_t m = 0; m < search->count; ++m) {
    const char *modality = search->modality[m];
    shard_numbers *found = &search->found[m];
    if (strlen(modality) != length || memcmp(modality, name, length) != 0) continue;
    CHECK(number < MOST_SHARDS, CORE_ERR_FORMAT, "%s/%s: shard numbers must be below %d", search->path, name,
          MOST_SHARDS);
    TRY(data_bytes_append_priv(&found->numbers, &number, sizeof number));
    ++found->count;
    if (number > found->largest) found->largest = number;
  }
  return CORE_OK;
}

static core_status find_shards(shard_search *search) {
  core_status status = CORE_OK;
  DIR *dir = opendir(search->path);
  CHECK(dir != NULL, CORE_ERR_IO, "%s: cannot list: %s", search->path, strerror(errno));
  for (struct dirent *entry; status == CORE_OK && (entry = readdir(dir)) != NULL;)
    status = take_entry(search, entry->d_name);
  (void)closedir(dir);
  TRY(status);
  for (int32_t m = 0; m < search->count; ++m)
    CHECK(search->found[m].count > 0, CORE_ERR_NOT_FOUND, "%s: no shards of modality \"%s\"; there are: %s",
          search->path, search->modality[m], listed(&search->others));
  return CORE_OK;
}

/* Every number from 0 to `last` must be there once. */
static core_status check_gaps(const char *path, const char *modality, const shard_numbers *found,
                              int64_t last) {
  const int64_t *number = (const int64_t *)(const void *)found->numbers.bytes;
  uint8_t *seen = NULL;
  TRY(DATA_ALLOCATE(last + 1, "list of shards", &seen));
  int64_t missing = -1, twice = -1;
  for (int64_t i = 0; i < found->count; ++i) {
    if (seen[number[i]]) twice = number[i];
    seen[number[i]] = 1;
  }
  for (int64_t k = last; k >= 0; --k)
    if (!seen[k]) missing = k;
  free(seen);
  CHECK(twice < 0, CORE_ERR_MISMATCH, "%s: shard %lld of \"%s\" is there twice under different names", path,
        (long long)twice, modality);
  CHECK(missing < 0, CORE_ERR_NOT_FOUND, "%s/%s-%05lld.h5: missing; the set has shards 0 to %lld", path,
        modality, (long long)missing, (long long)last);
  return CORE_OK;
}

static core_status check_modalities(const char *path, const char *const *modalities, int32_t count,
                                    shard_numbers *found, int32_t *shards) {
  shard_search search = {.path = path, .modality = modalities, .count = count, .found = found};
  int64_t last = 0;
  for (int32_t m = 0; m < count; ++m) found[m].largest = -1;
  TRY(find_shards(&search));
  for (int32_t m = 0; m < count; ++m)
    if (found[m].largest > last) last = found[m].largest;
  for (int32_t m = 0; m < count; ++m) TRY(check_gaps(path, modalities[m], &found[m], last));
  *shards = (int32_t)last + 1;
  return CORE_OK;
}

core_status data_list_shards_priv(const char *directory, const char *split, const char *const *modalities,
                                  int32_t modality_count, int32_t *shards) {
  shard_numbers found[CORE_MAX_MODALITIES] = {0};
  char *path = NULL;
  TRY(data_text_priv(&path, "%s/%s", directory, split));
  core_status status = check_directories(directory, split, path);
  if (status == CORE_OK) status = check_modalities(path, modalities, modality_count, found, shards);
  for (int32_t m = 0; m < modality_count; ++m) free(found[m].numbers.bytes);
  free(path);
  TRY(status);
  return CORE_OK;
}

/* ---- names ---- */

static int compare_names(const void *a, const void *b) {
  return strcmp(a, b);
}

core_status data_list_modalities(const char *directory, const char *split,
                                 char names[CORE_MAX_MODALITIES][CORE_NAME], int32_t *count) {
  char *path = NULL;
  shard_search search = {.others = {.text = ""}};
  *count = 0;
  TRY(data_text_priv(&path, "%s/%s", directory, split));
  search.path = path;
  core_status status = check_directories(directory, split, path);
  if (status == CORE_OK) status = find_shards(&search);
  if (status == CORE_OK && (search.others.count < 1 || search.others.count > CORE_MAX_MODALITIES))
    status = core_error_begin(CORE_ERR_NOT_FOUND, __func__, __FILE__, __LINE__,
                              "%s: holds shards of %d modalities, expected 1 to %d", path,
                              search.others.count, CORE_MAX_MODALITIES);
  free(path);
  TRY(status);
  *count = search.others.count;
  memcpy(names, search.others.seen, (size_t)*count * CORE_NAME);
  qsort(names, (size_t)*count, CORE_NAME, compare_names);
  return CORE_OK;
}

core_status data_list_splits(const char *directory, char names[DATA_MOST_SPLITS][CORE_NAME], int32_t *count) {
  name_list splits = {.text = ""};
  *count = 0;
  CHECK(is_directory(directory), CORE_ERR_NOT_FOUND, "%s: no such directory of latent shards", directory);
  list_splits(directory, &splits);
  CHECK(splits.count > 0, CORE_ERR_NOT_FOUND, "%s: holds no splits (directories of shards)", directory);
  *count = splits.count;
  memcpy(names, splits.seen, (size_t)*count * CORE_NAME);
  qsort(names, (size_t)*count, CORE_NAME, compare_names);
  return CORE_OK;
}
